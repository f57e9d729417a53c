"""The slow, obvious reference: each stage's whole graph over the whole slide.

It states what a step *is*; the streaming engine must agree with it. Memory grows with the slide.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor

from wholeslide.draws import Draws
from wholeslide.geometry import Box, Size
from wholeslide.model.network import LocalNetwork
from wholeslide.streaming.background import PixelSource
from wholeslide.streaming.execution import Execution
from wholeslide.streaming.grid import GridLayout
from wholeslide.streaming.objective import StageObjective, head_dtype
from wholeslide.streaming.step import StepResult, chosen_stages


class WholeEngine:
    """The same step as :class:`~wholeslide.streaming.engine.StreamingEngine`, without tiles.

    Args:
        network: moved to ``device`` and to the parameters' type in place.
        execution: precision and layout.
        device: where the graphs are.
        record: whether ``features`` and ``grids`` hold x_0 … x_K and z_1 … z_K of the last step.
    """

    def __init__(
        self, network: LocalNetwork, execution: Execution, device: torch.device, *, record: bool = False
    ) -> None:
        self.network = network.to(device=device, dtype=execution.parameter_dtype)
        self.network.train()
        self.execution, self.device, self.record = execution, device, record
        self.features: list[Tensor] = []
        self.grids: list[Tensor] = []

    def step(
        self, view: PixelSource, label: int, draws: Draws, *, weight: float = 1.0, stages: Collection[int] | None = None
    ) -> StepResult:
        """Forward and backward of one slide; see the streaming engine."""
        depth = self.network.depth
        trained = chosen_stages(self.network, stages)
        classification, reconstruction = [math.nan] * depth, [math.nan] * depth
        rows: list[np.ndarray | None] = [None] * depth
        with torch.no_grad():
            pixels = self.network.to_input(view.read(Box.covering(view.size)))
            x_bchw = self._rounded(self.network.stem, pixels)
        del pixels
        self.features, self.grids = [x_bchw] if self.record else [], []
        for number in range(1, max(trained) + 1):
            previous = x_bchw.detach()
            with torch.set_grad_enabled(number in trained):
                x_bchw = self._rounded(self.network.stage(number), previous)
            if number in trained:
                objective = StageObjective(self.network, number, label, draws, view.size)
                loss, probabilities = objective.classification(*self._grid(number, x_bchw))
                classification[number - 1], rows[number - 1] = loss.item(), probabilities.cpu().numpy()
                if number < depth and self.network.decoder(number) is not None:
                    reconstructed = self._reconstruction(objective, x_bchw, previous)
                    reconstruction[number - 1] = reconstructed.item()
                    loss = loss + self.network.config.reconstruction_weight * reconstructed
                torch.autograd.backward([loss * weight])
            x_bchw = x_bchw.detach()
            if self.record:
                self.features.append(x_bchw)
        classes = next(row for row in rows if row is not None).size
        return StepResult(
            classification,
            reconstruction,
            np.stack([np.full(classes, math.nan) if row is None else row for row in rows]),
        )

    def _rounded(self, stage: torch.nn.Module, x_bchw: Tensor) -> Tensor:
        with self.execution.autocast(self.device):
            output: Tensor = stage(self.execution.arrange(x_bchw))
        return output.to(self.execution.store_dtype)

    def _grid(self, number: int, x_bchw: Tensor) -> tuple[list[Tensor], GridLayout]:
        with self.execution.autocast(self.device):
            z_bchw = self.network.head(number).grid(x_bchw)
        z_bchw = z_bchw.to(head_dtype(z_bchw.dtype))
        if self.record:
            self.grids.append(z_bchw.detach())
        size = _size_of(z_bchw)
        return [z_bchw[0].flatten(1).T], GridLayout.of_boxes(size, [Box.covering(size)])

    def _reconstruction(self, objective: StageObjective, x_bchw: Tensor, previous_bchw: Tensor) -> Tensor:
        regions = objective.regions(_size_of(x_bchw))
        targets = objective.target_boxes(regions, _size_of(previous_bchw))
        with self.execution.autocast(self.device):
            return objective.reconstruction(
                torch.cat([_crop(x_bchw, box) for box in regions]), [_crop(previous_bchw, box) for box in targets]
            )


def _size_of(x_bchw: Tensor) -> Size:
    return Size(x_bchw.shape[-1], x_bchw.shape[-2])


def _crop(x_bchw: Tensor, cell_box: Box) -> Tensor:
    rows, columns = cell_box.rows_columns
    return x_bchw[:, :, rows, columns]
