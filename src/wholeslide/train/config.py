"""Everything that ``wholeslide train`` can be told. Free of torch, so that ``--help`` is quick."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from wholeslide.baselines.config import EncoderConfig
from wholeslide.baselines.registry import Optimizer, RateDecay, Recipe, method_info
from wholeslide.errors import ConfigError
from wholeslide.model.config import ModelConfig
from wholeslide.slides.config import AugmentationConfig, Decoders, SlideConfig
from wholeslide.streaming.config import StreamingConfig

GIB = 2**30

Logger = Literal["csv", "tensorboard", "wandb", "mlflow"]
Monitor = Literal["auroc", "loss", "accuracy", "balanced_accuracy", "f1"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The options of one training run.

    Args:
        manifest: CSV of the cohort: file, label, and where known slide, patient, split, mpp.
        slides: Folder that is searched, with its subfolders, for the files that the manifest names.
        out: The run directory that is made.
        cache: Folder of slides prepared by `wholeslide prepare`; a slide that is not in it is read as it is.
        splits_csv: CLAM's splits_k.csv, which then says which slide is in which split.
        method: local (locally supervised stages), local-kN for N stages, end-to-end (one stage), or one that this is compared
            with, such as abmil, clam-sb or transmil; docs/methods.md has them all.
        stages: Number of locally supervised stages that the backbone is cut into; auto: of 1, 2, 4 and 8 the one that trains
            quickest within the memory, which the run then keeps.
        backbone: Name of a convolutional timm model.
        weights: A file of backbone weights, lite0 for the packaged EfficientNet-Lite0, or random; left out: the
            pretrained weights of timm's hub.
        first_stride: Stride of the backbone's first convolution (3 is the paper's choice for ResNets).
        patch: Side of the square patches, in working pixels, of methods that see patches or their features.
        least_tissue: Part of a patch that has to be tissue for it to be taken.
        features_cache: Folder where such methods keep what they make of patches; runs may share it. Left out: in the run.
        freeze_norm_affine: Freeze the scale and shift of batch norms too, not only their statistics.
        reconstruction: Train each stage but the last also to reconstruct random regions of its input.
        reconstruction_weight: Weight of the reconstruction loss against the classification loss.
        reconstruction_regions: Most regions of one slide that are reconstructed.
        reconstruction_region_px: Side of such a region in input pixels.
        attention_dropout: Dropout on the attention weights of every classifier.
        mpp: Working resolution in microns per pixel, or native for the pixels as they are stored.
        magnification: May stand for mpp, as 10 / magnification.
        downsample: Whole number that stored pixels are divided by; implies native.
        background: What lies outside the tissue: constant masks it, keep leaves it, auto keeps it in plain images only.
        mask_dir: Folder of GeoJSON tissue masks drawn in QuPath, named like the slides.
        mpp_override: Scale of the stored pixels, for files that tell none or a wrong one.
        icc: Turn colours into sRGB where the file holds the scanner's ICC profile.
        decoders: Where files are decoded: in threads; in processes, so that a decoder that crashes on a damaged file costs
            that slide only; or auto, which takes processes for formats that are none of a scanner's and no everyday image's.
        augmentation: Crop, flip, turn and jitter the training slides.
        crop_probability: How often a training slide is cropped.
        crop_minimum: Smallest part of each side that a crop keeps.
        crop_minimum_small: The same for a side shorter than small_side_px.
        small_side_px: Sides shorter than this many working pixels count as small.
        flips: Flip training slides at random.
        turns: Turn training slides by random quarter turns.
        jitter: Strength of the colour jitter.
        memory: Most memory to use, as 8GiB, or smallest. Left out: on a GPU most of what is free, on a CPU tiles and kept
            graphs of about 1 GiB.
        store: Where the features between stages are kept; auto: the first of device, host and disk that leaves at least half
            of the memory to the tiles.
        store_dir: Folder for features that are kept on disk, not one in memory; left out: where temporary files go.
        tile: Side of a tile in working pixels; left out: chosen to fit the memory.
        precision: Number format of the stages' arithmetic; auto measures which is quickest.
        accelerator: Kind of device to train on.
        devices: Number of devices.
        nodes: Number of machines.
        prefetch_bytes: Most memory that a slide being read ahead may take, on top of --memory. Left out: 1 GiB, or
            nothing where --memory bounds the memory of a CPU.
        schedule: simultaneous trains all stages at every slide; sequential trains a stage for all its epochs, goes
            back to its best epoch, freezes it and trains the next.
        epochs: Passes over the training split; with the sequential schedule, for each stage. As the options of the
            optimiser, left out: as the method was published; 55 for local.
        unit: What counts as one case when a metric is taken.
        group: Column whose values are never cut by a split.
        fold: Number of the fold that is tested; the next one validates, the others train. For a manifest with a column
            fold, as `wholeslide split --folds` writes it.
        valid_fold: Number of the fold that validates, in place of the one after --fold.
        fractions: Shares of the training, validation and test split, drawn if the manifest has no split.
        seed: Seed of every draw: the split, new layers, the order of slides, augmentation, regions, dropout.
        on_unreadable: stop at slides that are missing or cannot be read, or exclude and list them.
        lr: Learning rate of the backbone; 1e-5 for local.
        head_lr: Learning rate of classifiers and decoders; left out: for local, twice lr, for others, lr.
        optimizer: The rule of the steps; adamw for local.
        weight_decay: Weight decay of the optimiser; 1e-6 for local.
        accumulate: Slides whose gradients are averaged for one step of the optimiser; 8 for local.
        lr_schedule: Divide the rates by ten on a plateau of the monitored metric, or at 25/55, 35/55 and 45/55 of the
            epochs (multistep), lower them to a twentieth along a cosine, or never (constant); plateau for local.
        lr_patience: Epochs without improvement that make a plateau.
        monitor: Validation metric of the trained head that chooses the best checkpoint, ends plateaus and stops early.
            Ties are broken by the validation loss.
        patience: Stop after this many epochs without improvement of the monitored metric; 0 never stops early.
        class_weights: balanced weighs classes by the inverse of their number of training slides.
        loggers: Where losses and metrics are logged.
        checkpoint_minutes: Save at least this often, besides at the end of every epoch; 0 saves at every step.
        resume: Go on with the run in out where it was saved last.
        quiet: No progress bar.
    """

    manifest: Path
    slides: Path
    out: Path
    cache: Path | None = None
    splits_csv: Path | None = None

    method: str = "local"
    stages: int | Literal["auto"] = 4
    backbone: str = "resnet34"
    weights: str | None = None
    first_stride: int | None = None
    patch: int = 256
    least_tissue: float = 0.5
    features_cache: Path | None = None
    freeze_norm_affine: bool = False
    reconstruction: bool = True
    reconstruction_weight: float = 1.0
    reconstruction_regions: int = 10
    reconstruction_region_px: int = 768
    attention_dropout: float = 0.2

    mpp: float | Literal["native"] = 2.0
    magnification: float | None = None
    downsample: float | None = None
    background: Literal["auto", "constant", "keep"] = "auto"
    mask_dir: Path | None = None
    mpp_override: float | None = None
    icc: bool = False
    decoders: Decoders = "auto"

    augmentation: bool = True
    crop_probability: float = 0.6
    crop_minimum: float = 0.5
    crop_minimum_small: float = 0.9
    small_side_px: int = 3000
    flips: bool = True
    turns: bool = True
    jitter: float = 0.1

    memory: str | None = None
    store: Literal["auto", "device", "host", "disk"] = "auto"
    store_dir: Path | None = None
    tile: int | None = None
    precision: Literal["auto", "fp32", "bf16", "fp64"] = "auto"
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    devices: int = 1
    nodes: int = 1
    prefetch_bytes: int | None = None

    schedule: Literal["simultaneous", "sequential"] = "simultaneous"
    epochs: int | None = None
    unit: Literal["patient", "slide", "file"] = "patient"
    group: str = "patient"
    fold: int | None = None
    valid_fold: int | None = None
    fractions: tuple[float, float, float] = (0.7, 0.15, 0.15)
    seed: int = 0
    on_unreadable: Literal["stop", "exclude"] = "stop"

    lr: float | None = None
    head_lr: float | None = None
    optimizer: Optimizer | None = None
    weight_decay: float | None = None
    accumulate: int | None = None
    lr_schedule: RateDecay | None = None
    lr_patience: int = 5
    monitor: Monitor = "auroc"
    patience: int = 15
    class_weights: Literal["none", "balanced"] = "none"

    loggers: tuple[Logger, ...] = ("csv", "tensorboard")
    checkpoint_minutes: float = 10.0
    resume: bool = False
    quiet: bool = False

    @property
    def depth(self) -> int:
        """Number of stages, with the methods that stand for a number resolved; one as long as it is to be chosen."""
        if self.method in ("end-to-end", "frozen-whole"):
            return 1
        if method_info(self.method).kind != "stages":
            return method_info(self.method).parts
        short = re.fullmatch(r"local-k(\d+)", self.method)
        if short:
            return int(short[1])
        return 1 if self.stages == "auto" else self.stages

    @property
    def in_turn(self) -> bool:
        """Whether stages are trained one after another."""
        return self.schedule == "sequential" or method_info(self.method).parts > 1

    @property
    def chooses_stages(self) -> bool:
        """Whether the number of stages is to be chosen."""
        return self.method == "local" and self.stages == "auto"

    def recipe(self, stage: int = 1) -> Recipe:
        """How part ``stage``, counted from 1, is trained: as the method was published, but for what is asked for.

        Raises:
            ConfigError: there is no such method.
        """
        recipes = method_info(self.method).recipes
        options: dict[str, Any] = {
            "epochs": self.epochs,
            "lr": self.lr,
            "optimizer": self.optimizer,
            "weight_decay": self.weight_decay,
            "accumulate": self.accumulate,
            "lr_schedule": self.lr_schedule,
        }
        asked = {name: value for name, value in options.items() if value is not None}
        return dataclasses.replace(recipes[min(stage, len(recipes)) - 1], **asked)

    def classifier_lr(self, stage: int = 1) -> float:
        """Learning rate of classifiers and decoders."""
        recipe = self.recipe(stage)
        return recipe.lr * recipe.head_factor if self.head_lr is None else self.head_lr

    def resolved(self) -> TrainConfig:
        """The same with all that the method's recipe decides, where all its parts are trained by one."""
        if method_info(self.method).parts > 1:
            return self
        recipe = self.recipe()
        return dataclasses.replace(
            self,
            epochs=recipe.epochs,
            lr=recipe.lr,
            optimizer=recipe.optimizer,
            weight_decay=recipe.weight_decay,
            accumulate=recipe.accumulate,
            lr_schedule=recipe.lr_schedule,
        )

    def model_config(self) -> ModelConfig:
        """What the network is built from."""
        return ModelConfig(
            backbone=self.backbone,
            stages=self.depth,
            weights=self.weights,
            first_stride=self.first_stride,
            frozen=self.method == "frozen-whole",
            freeze_norm_affine=self.freeze_norm_affine,
            reconstruction=self.reconstruction,
            reconstruction_weight=self.reconstruction_weight,
            reconstruction_regions=self.reconstruction_regions,
            reconstruction_region_px=self.reconstruction_region_px,
            attention_dropout=self.attention_dropout,
        )

    def slide_config(self) -> SlideConfig:
        """How slides are read, in training and in every later prediction."""
        return SlideConfig(
            mpp=self.mpp,
            magnification=self.magnification,
            downsample=self.downsample,
            background=self.background,
            mask_dir=self.mask_dir,
            mpp_override=self.mpp_override,
            icc=self.icc,
            decoders=self.decoders,
        )

    def encoder_config(self) -> EncoderConfig:
        """What patches are encoded by, where a method sees patches or their features."""
        if self.precision == "fp64":
            raise ConfigError.single("encoders do not compute in fp64", where="--precision fp64", remedy="give fp32")
        return EncoderConfig(
            backbone=self.backbone,
            weights=self.weights,
            first_stride=self.first_stride,
            patch=self.patch,
            least_tissue=self.least_tissue,
            precision=self.precision,
        )

    def streaming_config(self) -> StreamingConfig:
        """What the planner is given."""
        return StreamingConfig(memory=self.memory, store=self.store, tile=self.tile, precision=self.precision)

    def augmentation_config(self) -> AugmentationConfig | None:
        """How training slides are varied; None: not at all."""
        if not self.augmentation:
            return None
        return AugmentationConfig(
            crop_probability=self.crop_probability,
            crop_minimum=self.crop_minimum,
            crop_minimum_small=self.crop_minimum_small,
            small_side_px=self.small_side_px,
            flips=self.flips,
            turns=self.turns,
            jitter=self.jitter,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for YAML. Whether the run was resumed is not part of it."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "resume"]
        return {name: _plain(getattr(self, name)) for name in names}

    def with_absolute_paths(self) -> TrainConfig:
        """The same, valid from whatever folder it is used."""
        given = {name: getattr(self, name) for name in _PATHS}
        absolute: dict[str, Any] = {
            name: Path(path).expanduser().absolute() for name, path in given.items() if path is not None
        }
        return dataclasses.replace(self, **absolute)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """The inverse of :meth:`to_dict`; keys that are no options are left aside."""
        options: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            if field.name not in values:
                continue
            value = values[field.name]
            if field.name in _PATHS and value is not None:
                value = Path(value)
            elif field.name in _TUPLES:
                value = tuple(value)
            options[field.name] = value
        return cls(**options)

    def check(self) -> None:
        """Find every option that makes no sense.

        Raises:
            ConfigError: all of them together.
        """
        from wholeslide.train.config_checks import config_problems

        problems = config_problems(self)
        if problems:
            raise ConfigError(problems)


_PATHS = frozenset({"manifest", "slides", "out", "cache", "splits_csv", "mask_dir", "store_dir", "features_cache"})
_TUPLES = frozenset({"fractions", "loggers"})


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
