"""How a network is streamed: fixed before the first step, stored with the run, so that a resumed run repeats it bit by bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from wholeslide.errors import RunError
from wholeslide.geometry import Size
from wholeslide.streaming.execution import Execution

_PLACES = {"device": "on the device", "host": "in host memory", "disk": "on disk"}


@dataclass(frozen=True)
class Plan:
    """Everything that decides a step's arithmetic and memory.

    ``tile_px`` has the side of a tile in input pixels, and ``kept_px`` how many pixels the windows may have together whose graphs
    are kept between the two passes, both for the stem and for each stage (the stem has no graph). ``elide`` says that background
    is computed once and not wherever it is. ``freed_bytes`` of host memory
    may stay resident between stages, to be used again. ``predicted_peak_bytes`` is what a step is expected to hold above what the
    process held before it, on any view of at most the area of ``largest``.
    """

    execution: Execution
    store: Literal["device", "host", "disk"]
    tile_px: tuple[int, ...]
    kept_px: tuple[int, ...]
    largest: Size
    elide: bool = True
    freed_bytes: int = 0
    predicted_peak_bytes: int = 0
    seconds_per_megapixel: float = 0.0
    inference_seconds_per_megapixel: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """The inverse of :meth:`to_dict`.

        Raises:
            RunError: the values are not those of a plan.
        """
        try:
            return cls(
                **{
                    **values,
                    "execution": Execution(**values["execution"]),
                    "tile_px": tuple(values["tile_px"]),
                    "kept_px": tuple(values["kept_px"]),
                    "largest": Size(**values["largest"]),
                }
            )
        except (KeyError, TypeError) as error:
            raise RunError.single(
                "not a plan",
                where="plan.json",
                remedy="start a new run; the file was damaged or written by another version",
            ) from error

    @property
    def summary(self) -> list[str]:
        """Lines for a person."""
        execution = self.execution
        layout = "channels last" if execution.channels_last else "channels first"
        kept = ", ".join(f"{px / 1e6:.3g}" for px in self.kept_px[1:])
        tiles = ", ".join(str(side) for side in self.tile_px)
        return [
            f"arithmetic {execution.precision}, {layout}; features between stages {_PLACES[self.store]}",
            f"tiles of at most {tiles} px a side (stem, stages 1 to {len(self.tile_px) - 1})",
            f"graphs of {kept} megapixels are kept, and not computed twice",
            f"largest view {self.largest}: about {self.predicted_peak_bytes / 2**30:.2f} GiB above the process's baseline",
        ]
