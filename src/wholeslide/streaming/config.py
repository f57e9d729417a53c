"""What a user may choose about memory and precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from wholeslide.errors import ConfigError, too_small


@dataclass(frozen=True, kw_only=True)
class StreamingConfig:
    """How a slide is streamed through the network. None of it changes the result but for rounding.

    Args:
        memory: Memory that the process may take, such as 8GiB; it bounds the tiles and the graphs that are kept. "smallest"
            asks for the lowest peak with tiles that are not nearly all halo: below that, time soars. By default most of what
            is free on a GPU, and on a CPU about 1 GiB above the smallest.
        store: Where features between stages are kept: on the device, in host memory, on disk, or auto: the first of these that
            leaves at least half of the memory to the tiles.
        tile: Side of a tile in input pixels, rounded up for each stage to its grid; memory then decides the kept graphs.
        precision: Arithmetic of the stages; auto times the choices on this machine. fp64 is for checking.

    Raises:
        ConfigError: the tile is not positive.
    """

    memory: str | None = None
    store: Literal["auto", "device", "host", "disk"] = "auto"
    tile: int | None = None
    precision: Literal["auto", "fp32", "bf16", "fp64"] = "auto"

    def __post_init__(self) -> None:
        problems = too_small(self, {"tile": 1})
        if problems:
            raise ConfigError(problems)
