"""When memory does not suffice for a slide: forget what it has done so far, and go on with smaller tiles.

Whoever trains or predicts does the slide again. It is never cropped, and never left out.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import nn

from wholeslide.allocator import return_freed_memory
from wholeslide.errors import Problem, SlideError
from wholeslide.streaming.plan import Plan

logger = logging.getLogger(__name__)

#: What an allocation that failed says where it is no ``MemoryError`` and no ``torch.OutOfMemoryError``.
_SAYINGS = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "std::bad_alloc",
    "could not create a primitive",  # oneDNN, when it finds no room for its code or its scratch memory
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
#: What oneDNN says where it has no way to compute a layer at all.
_UNSUPPORTED = "could not create a primitive descriptor"
_REMEDY = "end other programs, or use a machine with more memory; more --stages, a coarser --mpp and --store disk all need less"


class SlideMemoryError(SlideError):
    """Memory did not suffice for a slide. ``file`` is its name, ``reason`` what the allocation that failed said."""

    def __init__(self, file: str, reason: str, what: str = "not enough memory") -> None:
        super().__init__([Problem(what, file, _REMEDY)])
        self.file, self.reason = file, reason


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, in host memory or on a device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    if _UNSUPPORTED in text:
        return False
    return isinstance(error, RuntimeError) and any(saying in text for saying in _SAYINGS)


@contextmanager
def memory_for(file: str) -> Iterator[None]:
    """A block that works on one slide.

    Raises:
        SlideMemoryError: an allocation failed in it. As long as that error is handled, it holds all that the block held: leave its
            ``except`` clause before anything is tried again.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise SlideMemoryError(file, f"{type(error).__name__} {error}".strip()) from error


class Engine(Protocol):
    """What may take another plan; none where its memory is not planned."""

    @property
    def network(self) -> nn.Module: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def plan(self) -> Plan | None: ...

    def go_on_with(self, plan: Plan) -> None:
        """Take other tiles from now on."""


def take_smaller_plan(engine: Engine, file: str, reason: str) -> Plan:
    """Discard all gradients, give back what is free, and turn the engine to smaller tiles without kept graphs.

    Args:
        engine: between two slides.
        file: the slide that memory did not suffice for.
        reason: what the allocation that failed said.

    Returns:
        The plan that the engine has from now on.

    Raises:
        SlideMemoryError: there are no smaller ones.
    """
    engine.network.zero_grad(set_to_none=True)
    gc.collect()
    if engine.device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        return_freed_memory()
    logger.info("%s: %s", file, reason)
    if engine.plan is None:
        raise SlideMemoryError(file, reason)
    smaller = engine.plan.smaller
    if smaller is None:
        raise SlideMemoryError(file, reason, "not enough memory, even with the smallest tiles")
    timed = engine.plan.seconds_per_megapixel  # none where a plan's arithmetic was given to it
    longer = f", which takes about {smaller.seconds_per_megapixel / timed:.1f} times as long" if timed else ""
    engine.go_on_with(smaller)
    logger.warning(
        "not enough memory for %s: it is done again, and all from here on, with tiles of at most %d px and no graphs kept%s",
        file,
        max(smaller.tile_px[1:]),
        longer,
    )
    return smaller
