"""Finds the tiles that a region touches."""

from __future__ import annotations

import numpy as np

from wholeslide.geometry import Box


class TileIndex:
    """Boxes that do not overlap, numbered as they are appended."""

    def __init__(self) -> None:
        self.boxes: list[Box] = []
        self._edges_n4 = np.empty((0, 4), np.int64)

    def append(self, cell_box: Box) -> None:
        """Add a box."""
        self.boxes.append(cell_box)

    def overlapping(self, cell_box: Box) -> list[tuple[int, Box]]:
        """The number of each box that has cells in common with this one, and those cells."""
        if len(self._edges_n4) < len(self.boxes):
            self._edges_n4 = np.array([(box.left, box.top, box.right, box.bottom) for box in self.boxes], np.int64)
        left, top, right, bottom = self._edges_n4.T
        touching = (left < cell_box.right) & (right > cell_box.left) & (top < cell_box.bottom) & (bottom > cell_box.top)
        return [(int(index), self.boxes[index].intersection(cell_box)) for index in np.flatnonzero(touching)]
