"""z of one slide: the coarse grid that a stage's classifier sees, as rows of which one may stand for many cells."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from wholeslide.geometry import Box, Size

#: Rows of z that a classifier works on at a time.
ROWS_OF_A_PART = 8192


@dataclass(frozen=True)
class GridLayout:
    """Which cells of a grid the rows of z are.

    Attributes:
        size: of the grid, in its cells.
        cell_n: for each computed row, its cell, counted along the rows of the grid.
    """

    size: Size
    cell_n: npt.NDArray[np.int64]

    @classmethod
    def of_boxes(cls, size: Size, boxes: list[Box]) -> GridLayout:
        """Rows box by box, and row by row in each."""
        cells = np.arange(size.area).reshape(size.height, size.width)
        return cls(size, np.concatenate([cells[box.rows_columns].ravel() for box in boxes] or [cells[:0].ravel()]))

    @property
    def elided(self) -> int:
        """How many cells are not computed, because they are all alike; one last row stands for them."""
        return self.size.area - len(self.cell_n)

    @property
    def rows(self) -> int:
        """Of z."""
        return len(self.cell_n) + (self.elided > 0)

    def counts(self, like: Tensor) -> Tensor:
        """How many cells each row stands for, (N,)."""
        return self._counted(np.ones(self.size.area, np.bool_), like)

    def survivors(self, kept_hw: npt.NDArray[np.bool_], like: Tensor) -> Tensor:
        """How many of the cells that each row stands for are kept, (N,)."""
        return self._counted(kept_hw.ravel(), like)

    def whole(self, z_nc: Tensor) -> Tensor:
        """The grid with every cell, (1, C, h, w)."""
        cells_nc = z_nc[-1:].expand(self.size.area, -1).clone()
        cells_nc[torch.from_numpy(self.cell_n).to(z_nc.device)] = z_nc[: len(self.cell_n)]
        return cells_nc.T.reshape(1, -1, self.size.height, self.size.width)

    def _counted(self, kept: npt.NDArray[np.bool_], like: Tensor) -> Tensor:
        own = kept[self.cell_n]
        counted = np.append(own, kept.sum() - own.sum()) if self.elided else own
        return torch.from_numpy(counted.astype(np.float64)).to(like)
