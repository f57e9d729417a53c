"""What ``wholeslide bench`` may be asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from wholeslide.errors import ConfigError, too_small
from wholeslide.slides.config import LARGEST_MPP

SMALLEST = "smallest"
PAPER_SIZES = "8698x7496,12223x10057,23849x10257"


@dataclass(frozen=True, kw_only=True)
class MemoryBenchConfig:
    """Measure the peak memory and the time of one training step, for every combination of the choices.

    Args:
        sizes: WIDTHxHEIGHT of the slide in pixels, separated by commas; the paper's three by default.
        methods: local (cut into --stages), end-to-end (one stage), or both, separated by commas.
        stages: Numbers K of stages for the local method, separated by commas.
        modes: streamed (tile by tile), whole (one graph over the slide, a stage at a time), or both, separated by commas.
        stores: Where features between stages are kept: host, device, disk, or several, separated by commas.
        store_dir: Folder for features that are kept on disk, not one in memory; left out: where temporary files go.
        tissue_fractions: Parts of the slide's area that a disc of texture covers, separated by commas; all else is white.
        crop: Cut a slide that has background to its tissue, as training does; off shows what eliding background does alone.
        backbone: A timm network of local operations; its weights are random.
        dtype: Arithmetic of the stages; auto times the choices on this machine.
        rfr: Train with random feature reconstruction.
        memory: The process's memory that the plan may use, such as 2GiB, or "smallest" for the lowest peak with
            tiles that are not nearly all halo.
        over_baseline: In place of --memory, what a step may take above what the process holds before it.
        seed: Decides weights, slide, regions and dropout.

    Raises:
        ConfigError: both limits of memory are given.
    """

    sizes: str = PAPER_SIZES
    methods: str = "local"
    stages: str = "8"
    modes: str = "streamed"
    stores: str = "host"
    store_dir: Path | None = None
    tissue_fractions: str = "1.0"
    crop: Literal["on", "off"] = "on"
    backbone: str = "resnet34"
    dtype: Literal["auto", "bf16", "fp32"] = "bf16"
    rfr: Literal["on", "off"] = "on"
    memory: str = SMALLEST
    over_baseline: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.over_baseline is not None and self.memory != SMALLEST:
            raise ConfigError.single(
                "two limits of memory",
                where=f"--memory {self.memory} --over-baseline {self.over_baseline}",
                remedy="give one of the two",
            )


@dataclass(frozen=True, kw_only=True)
class IoBenchConfig:
    """Measure how fast slides are read at a working resolution, for every combination of the choices.

    Args:
        sizes: WIDTHxHEIGHT of the slides in pixels at 5x (2 microns a pixel), separated by commas.
        readers: fast (ours), openslide-patch (256-pixel patches one by one, as is usual), openslide-region (large regions,
            area-averaged), fastslide (the package, if it is installed), separated by commas.
        formats: How tiles are stored: jpeg (colour at half the resolution), jpeg-rgb, jpeg2000, separated by commas.
        mpp: Microns per working pixel, 1 or coarser; the slides are at 0.25, 1 and 4.
        threads: Threads that read, on as many cores, separated by commas.
        texture: A slide whose tissue the slides are made of; made up by default, which takes longer to decode than tissue.
        seed: Decides where which texture lies.

    Raises:
        ConfigError: the resolution is finer than the texture.
    """

    sizes: str = "8698x7496"
    readers: str = "fast,openslide-patch,openslide-region,fastslide"
    formats: str = "jpeg"
    mpp: float = 2.0
    threads: str = "1,2"
    texture: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.mpp <= LARGEST_MPP:
            raise ConfigError.single(
                "not a resolution at which there is texture",
                where=f"--mpp {self.mpp:g}",
                remedy=f"give 1 to {LARGEST_MPP:g} microns per pixel",
            )


@dataclass(frozen=True, kw_only=True)
class SpeedBenchConfig:
    """Measure how long it takes from a file to its prediction, for every combination of the choices.

    Args:
        sizes: WIDTHxHEIGHT of the slides in pixels at 5x (2 microns a pixel), separated by commas; the paper's three by default.
        pipelines: local (this library), local-int8, gabmil-usual (patch features and gated attention as public pipelines
            compute them), gabmil-tuned (the same network with this library's means), separated by commas.
        tissue_fractions: Parts of the slide's area that a disc of texture covers, separated by commas; all else is white.
        rows: all (every combination of arithmetic and first stride), or meant (each pipeline as it is meant to be run: local
            in bf16 and local-int8 at stride 3, gabmil-usual in fp32 and gabmil-tuned in bf16 at stride 2).
        dtype: Arithmetic of all but local-int8: bf16, fp32, or both, separated by commas.
        first_stride: Strides of the backbone's first convolution, separated by commas: 3 is the paper's, 2 a ResNet's own.
        stages: Number K of stages of the local network.
        backbone: A timm network of local operations, for all pipelines; its weights are random.
        texture: A slide whose tissue the slides are made of; made up by default, which takes longer to decode than tissue.
        repeats: Times that each thing is timed, for every pipeline alike, behind an untimed batch; the median counts.
        seed: Decides weights and where which texture lies.

    Raises:
        ConfigError: there would be nothing to time.
    """

    sizes: str = PAPER_SIZES
    pipelines: str = "local,local-int8,gabmil-usual,gabmil-tuned"
    tissue_fractions: str = "1.0"
    rows: Literal["all", "meant"] = "all"
    dtype: str = "bf16,fp32"
    first_stride: str = "3,2"
    stages: int = 8
    backbone: str = "resnet34"
    texture: Path | None = None
    repeats: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        problems = too_small(self, {"stages": 1, "repeats": 1})
        if problems:
            raise ConfigError(problems)
