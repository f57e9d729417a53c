"""What ``wholeslide bench`` may be asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class MemoryBenchConfig:
    """Measure the peak memory and the time of one training step, for every combination of the choices.

    Args:
        sizes: WIDTHxHEIGHT of the slide in pixels, separated by commas; the paper's three by default.
        methods: local (cut into --stages), end-to-end (one stage), or both, separated by commas.
        stages: Numbers K of stages for the local method, separated by commas.
        modes: streamed (tile by tile), whole (one graph over the slide, a stage at a time), or both, separated by commas.
        stores: Where features between stages are kept: host, device, or both, separated by commas.
        backbone: A timm network of local operations; its weights are random.
        dtype: Arithmetic of the stages; auto times the choices on this machine.
        rfr: Train with random feature reconstruction.
        memory: The process's memory that the plan may use, such as 2GiB, or "smallest" for the plan with the lowest peak.
        seed: Decides weights, slide, regions and dropout.
    """

    sizes: str = "8698x7496,12223x10057,23849x10257"
    methods: str = "local"
    stages: str = "8"
    modes: str = "streamed"
    stores: str = "host"
    backbone: str = "resnet34"
    dtype: Literal["auto", "bf16", "fp32"] = "bf16"
    rfr: Literal["on", "off"] = "on"
    memory: str = "smallest"
    seed: int = 0
