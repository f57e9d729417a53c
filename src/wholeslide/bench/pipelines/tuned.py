"""The usual network with this library's means: what remains is what patches cost by themselves."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wholeslide.baselines.patches import PATCH_PX, read_batches, tissue_patches
from wholeslide.bench.pipelines.case import SpeedCase
from wholeslide.bench.pipelines.patches import bag_flops, gated_attention, patches_of, probabilities, random_encoder
from wholeslide.bench.pipelines.pipeline import Pipeline, Probabilities, open_tissue
from wholeslide.model.stages import cut_into_stages
from wholeslide.model.tracing import trace

_BATCHES = (4, 8, 16, 32, 64)
_ROUNDS = 2
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class TunedPipeline(Pipeline):
    """The same patches and weights as the usual pipeline's.

    Tiles are decoded directly, at half their size, on threads while others are computed; what is background is not read; norms
    are folded into convolutions, whose weights are cast once; channels are last; the batch is that which is quickest here.
    """

    def __init__(self, case: SpeedCase) -> None:
        self._case, self._dtype = case, _DTYPES[case.dtype]
        self._encoder = random_encoder(case)
        self._classifier = gated_attention(self._encoder, case)
        backbone = self._encoder.backbone.to(memory_format=torch.channels_last)
        stem, (body,) = cut_into_stages(trace(backbone, case.backbone), 1, name=case.backbone)
        self._parts = [part.step_weights(trained=False, dtype=self._dtype) for part in (stem, body)]
        most = len(patches_of(case.size))
        self._batch = min((size for size in _BATCHES if size <= max(most, _BATCHES[0])), key=self._seconds_a_patch)
        self._patches: list[np.ndarray] | None = None

    @torch.inference_mode()
    def warm_up(self) -> None:
        self._features(_grey_patches(self._batch))

    @torch.inference_mode()
    def predict(self) -> Probabilities:
        return self._classified(self._read_batches())

    def read(self) -> None:
        for _ in self._read_batches():
            pass

    def load(self) -> None:
        self._patches = list(self._read_batches())

    @torch.inference_mode()
    def compute(self) -> Probabilities:
        return self._classified(self._loaded)

    def flops(self) -> int:
        return bag_flops(self._encoder, self._classifier, self._count)

    def facts(self) -> dict[str, Any]:
        return {"patches": self._count, "batch": self._batch}

    def close(self) -> None:
        self._patches = None

    @property
    def _loaded(self) -> list[np.ndarray]:
        assert self._patches is not None, "nothing was loaded"
        return self._patches

    @property
    def _count(self) -> int:
        return sum(map(len, self._loaded))

    def _features(self, patches_bhwc: np.ndarray) -> Tensor:
        x_bchw = self._encoder.to_input(patches_bhwc).to(self._dtype)
        for part in self._parts:
            x_bchw = part(x_bchw)
        return x_bchw.float().mean(dim=(2, 3))

    def _classified(self, batches: Iterable[np.ndarray]) -> Probabilities:
        return probabilities(self._classifier, [self._features(batch) for batch in batches])

    def _read_batches(self) -> Iterator[np.ndarray]:
        """Patches, (B, 256, 256, 3) uint8, the next batches read while one is computed."""
        with closing(open_tissue(self._case)) as slide:
            yield from read_batches(slide, tissue_patches(slide), self._batch)

    @torch.inference_mode()
    def _seconds_a_patch(self, batch: int) -> float:
        patches_bhwc = _grey_patches(batch)
        self._features(patches_bhwc)
        begun = time.perf_counter()
        for _ in range(_ROUNDS):
            self._features(patches_bhwc)
        return (time.perf_counter() - begun) / batch


def _grey_patches(count: int) -> np.ndarray:
    return np.full((count, PATCH_PX, PATCH_PX, 3), 128, np.uint8)
