"""Patch features and gated attention as public pipelines compute them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from wholeslide.baselines.encoder import PatchEncoder
from wholeslide.baselines.patches import PATCH_PX
from wholeslide.bench.pipelines.case import SpeedCase
from wholeslide.bench.pipelines.patches import bag_flops, gated_attention, probabilities, random_encoder, whole_boxes
from wholeslide.bench.pipelines.pipeline import Pipeline, Probabilities
from wholeslide.bench.pyramid import WORKING_MPP
from wholeslide.bench.slide_reads import PatchReads
from wholeslide.geometry import Box

_BATCH = 64
_WORKERS = 1


class UsualPipeline(Pipeline):
    """Patches of 256 pixels, read one by one through OpenSlide; timm's network as it is, in batches of 64; then the classifier.

    A ``DataLoader`` with one worker reads and normalises the next batches while one is computed: on two cores that was quicker
    than reading in the same process, and more workers than that take the cores that compute. In bf16 the network runs under
    autocast.
    """

    def __init__(self, case: SpeedCase) -> None:
        self._case = case
        self._encoder = random_encoder(case)
        self._classifier = gated_attention(self._encoder, case)
        self._patches: np.ndarray | None = None

    @torch.no_grad()
    def warm_up(self) -> None:
        self._features(iter([torch.zeros(_BATCH, 3, PATCH_PX, PATCH_PX)]))

    @torch.no_grad()
    def predict(self) -> Probabilities:
        return self._classified(self._batches())

    def read(self) -> None:
        for _ in self._batches():
            pass

    def load(self) -> None:
        boxes = whole_boxes(self._case, fast=False)
        reads = PatchReads(Path(self._case.path), WORKING_MPP)
        self._patches = np.stack([reads.read(box) for box in boxes])
        reads.close()

    @torch.no_grad()
    def compute(self) -> Probabilities:
        patches = self._loaded
        batches = (patches[start : start + _BATCH] for start in range(0, len(patches), _BATCH))
        return self._classified(self._encoder.to_input(batch).contiguous() for batch in batches)

    def flops(self) -> int:
        return bag_flops(self._encoder, self._classifier, len(self._loaded))

    def facts(self) -> dict[str, Any]:
        return {"patches": len(self._loaded), "batch": _BATCH, "workers": _WORKERS}

    def close(self) -> None:
        self._patches = None

    @property
    def _loaded(self) -> np.ndarray:
        assert self._patches is not None, "nothing was loaded"
        return self._patches

    def _batches(self) -> Iterator[Tensor]:
        boxes = whole_boxes(self._case, fast=False)
        yield from DataLoader(_Patches(self._case.path, boxes, self._encoder), batch_size=_BATCH, num_workers=_WORKERS)

    def _classified(self, batches: Iterator[Tensor]) -> Probabilities:
        return probabilities(self._classifier, self._features(batches))

    def _features(self, batches: Iterator[Tensor]) -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self._case.dtype == "bf16"):
            return [self._encoder(batch) for batch in batches]


class _Patches(Dataset[Tensor]):
    """Normalised patches, (3, 256, 256); the slide is opened by the process that reads."""

    def __init__(self, path: str, boxes: list[Box], encoder: PatchEncoder) -> None:
        self._path, self._boxes, self._encoder = Path(path), boxes, encoder
        self._reads: PatchReads | None = None

    def __len__(self) -> int:
        return len(self._boxes)

    def __getitem__(self, index: int) -> Tensor:
        if self._reads is None:
            self._reads = PatchReads(self._path, WORKING_MPP)
        return self._encoder.to_input(self._reads.read(self._boxes[index])[None].copy())[0].contiguous()
