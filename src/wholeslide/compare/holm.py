"""Holm's correction of a family of tests."""

from __future__ import annotations

from collections.abc import Mapping


def holm(p_values: Mapping[str, float | None]) -> dict[str, float | None]:
    """The family's p values, adjusted so that rejecting those up to α keeps the family-wise error at α.

    The k-th smallest of m is multiplied by m − k + 1, and never falls below the one before (Holm: A simple sequentially
    rejective multiple test procedure. Scandinavian Journal of Statistics 6, 1979). A test that is still to come (``None``)
    counts in m and as the largest: what is told of the others holds whatever it brings.
    """
    known = sorted((value, name) for name, value in p_values.items() if value is not None)
    adjusted: dict[str, float | None] = dict.fromkeys(p_values)
    largest = 0.0
    for rank, (value, name) in enumerate(known):
        largest = max(largest, min(1.0, (len(p_values) - rank) * value))
        adjusted[name] = largest
    return adjusted
