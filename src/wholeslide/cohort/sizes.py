"""Parts of exactly so many files, as near as whole groups allow.

A draw divides the groups in proportions; patients with several slides then leave a part some files larger or smaller than
was meant. Single groups are moved or exchanged until the sizes are met.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

CLASS_LACKING = 1e6
"""What a class that a part lacks adds to `unlikeness`: more than any other deviation."""

_LEAST_GAIN = 1e-12


def unlikeness(share: np.ndarray, fractions: np.ndarray) -> float:
    """How unlike the asked proportions parts are.

    Args:
        share: (parts, classes), the part of each class's files.
        fractions: (parts,), what they should be.
    """
    missing = int((share == 0).sum())
    return missing * CLASS_LACKING + float((((share - fractions[:, None]) ** 2) / fractions[:, None]).sum())


def apportioned(sizes: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers that add up to ``total`` in the proportions of ``sizes`` (parts,), by the largest remainders."""
    exact = sizes * total / sizes.sum()
    whole: np.ndarray = np.floor(exact + 1e-9).astype(np.int64)
    neediest = np.argsort(whole - exact, kind="stable")[: total - whole.sum()]
    whole[neediest] += 1
    return whole


def meet_sizes(parts: np.ndarray, files: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Parts whose numbers of files come as near to ``sizes`` as moves and exchanges of single groups bring them.

    Of the changes that bring the numbers nearest, the one is made that leaves the classes' proportions best; in the end,
    those that leave the numbers as they are and mend the proportions. None takes a class away from a part.

    Args:
        parts: (groups,), the part of each group.
        files: (groups, classes), the files of each group.
        sizes: (parts,), the files that each part should have; they add up to all files.

    Returns:
        (groups,), the new part of each group.
    """
    kinds, kind = np.unique(files, axis=0, return_inverse=True)
    kind = kind.reshape(-1)
    state = _State(kinds=kinds, sizes=sizes, fractions=sizes / sizes.sum())
    counts = np.zeros((len(sizes), len(kinds)), dtype=np.int64)
    np.add.at(counts, (parts, kind), 1)
    parts = parts.copy()
    while (change := state.best_change(counts)) is not None:
        for source, target, moved in change.moves():
            counts[source, moved] -= 1
            counts[target, moved] += 1
            parts[np.flatnonzero((parts == source) & (kind == moved))[0]] = target
    return parts


@dataclass(frozen=True)
class _Change:
    """A group of the kind ``moved`` goes from ``source`` to ``target``, in exchange for one of ``returned`` or for none."""

    source: int
    target: int
    moved: int
    returned: int | None

    def moves(self) -> Iterator[tuple[int, int, int]]:
        yield self.source, self.target, self.moved
        if self.returned is not None:
            yield self.target, self.source, self.returned


@dataclass(frozen=True)
class _State:
    """What does not change: ``kinds`` (kinds, classes) are the distinct rows of files; groups of one kind are alike."""

    kinds: np.ndarray
    sizes: np.ndarray
    fractions: np.ndarray

    def best_change(self, counts: np.ndarray) -> _Change | None:
        """None where no change is for the better; ``counts`` (parts, kinds) are the groups of each kind in each part."""
        surplus = counts @ self.kinds.sum(axis=1) - self.sizes
        by_gain: dict[int, list[_Change]] = {}
        for change, moved_files in self._changes(counts):
            source, target = int(surplus[change.source]), int(surplus[change.target])
            gain = abs(source) + abs(target) - abs(source - moved_files) - abs(target + moved_files)
            if gain >= 0:
                by_gain.setdefault(gain, []).append(change)
        least = self._unlikeness(counts)
        for gain in sorted(by_gain, reverse=True):
            cost, index = min((self._after(counts, change), index) for index, change in enumerate(by_gain[gain]))
            if (gain > 0 and cost < CLASS_LACKING) or cost < least - _LEAST_GAIN:
                return by_gain[gain][index]
        return None

    def _changes(self, counts: np.ndarray) -> Iterator[tuple[_Change, int]]:
        """Every change that can be made, and by how many files the source shrinks."""
        files = self.kinds.sum(axis=1)
        for source in range(len(counts)):
            for target in set(range(len(counts))) - {source}:
                for moved in np.flatnonzero(counts[source]):
                    yield _Change(source, target, int(moved), None), int(files[moved])
                    for returned in np.flatnonzero((counts[target] > 0) & (files <= files[moved])):
                        yield _Change(source, target, int(moved), int(returned)), int(files[moved] - files[returned])

    def _after(self, counts: np.ndarray, change: _Change) -> float:
        changed = counts.copy()
        for source, target, moved in change.moves():
            changed[source, moved] -= 1
            changed[target, moved] += 1
        return self._unlikeness(changed)

    def _unlikeness(self, counts: np.ndarray) -> float:
        return unlikeness(counts @ self.kinds / (counts.sum(axis=0) @ self.kinds), self.fractions)
