"""Every random draw of training, seeded by what it is for and by nothing else.

No global generator is touched, so the order of slides, prefetching and resuming cannot change a draw.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Draws:
    """The draws of one slide in one epoch.

    ``slide`` is the file's name as the cohort has it, so that a moved folder draws the same.
    """

    seed: int
    epoch: int
    slide: str

    def rng(self, purpose: str, *, stage: int = 0) -> np.random.Generator:
        """A fresh generator for one purpose (``"augmentation"``, ``"regions"``, ``"dropout"``) of one stage."""
        key = repr((self.seed, self.epoch, self.slide, stage, purpose)).encode()
        return np.random.default_rng(int.from_bytes(hashlib.blake2b(key, digest_size=16).digest(), "little"))
