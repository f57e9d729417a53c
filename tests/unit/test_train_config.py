from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from wholeslide.cohort.config import SplitConfig
from wholeslide.errors import ConfigError
from wholeslide.model.config import ModelConfig
from wholeslide.slides.config import AugmentationConfig, SlideConfig
from wholeslide.streaming.config import StreamingConfig
from wholeslide.train.config import TrainConfig
from wholeslide.train.setup import resumed_config


def config(**options: Any) -> TrainConfig:
    return TrainConfig(manifest=Path("labels.csv"), slides=Path("slides"), out=Path("run"), **options)


def test_defaults_are_the_papers() -> None:
    chosen = config()
    chosen.check()
    recipe = chosen.recipe()
    assert (recipe.lr, chosen.classifier_lr(), recipe.weight_decay, recipe.accumulate) == (1e-5, 2e-5, 1e-6, 8)
    assert (recipe.optimizer, recipe.epochs, recipe.lr_schedule) == ("adamw", 55, "plateau")
    assert (chosen.depth, chosen.backbone, chosen.reconstruction_weight) == (4, "resnet34", 1.0)


@pytest.mark.parametrize(
    ("method", "stages", "depth"), [("local", 8, 8), ("local-k2", 8, 2), ("end-to-end", 8, 1), ("local-k12", 4, 12)]
)
def test_methods_say_how_many_stages(method: str, stages: int, depth: int) -> None:
    assert config(method=method, stages=stages).model_config().stages == depth


def test_a_number_of_stages_may_be_left_to_the_run() -> None:
    chosen = config(stages="auto")
    chosen.check()
    assert chosen.chooses_stages
    assert not config(stages="auto", method="local-k4").chooses_stages
    assert resumed_config(config(stages=8), chosen).stages == 8


def test_every_option_is_documented() -> None:
    documented = TrainConfig.__doc__ or ""
    for field in dataclasses.fields(TrainConfig):
        assert f"        {field.name}: " in documented, field.name


def test_every_option_is_read_somewhere() -> None:
    """An option that nothing reads is a lie."""
    sources = Path(sys.modules[TrainConfig.__module__].__file__ or "").parent.glob("*.py")
    text = "\n".join(path.read_text() for path in sources)
    for field in dataclasses.fields(TrainConfig):
        assert f"config.{field.name}" in text or f"self.{field.name}" in text, field.name


def test_options_reach_the_parts() -> None:
    chosen = config(mpp=0.5, jitter=0.2, reconstruction=False, tile=64, memory="2GiB", first_stride=2)
    assert chosen.slide_config().mpp == 0.5
    augmentation = chosen.augmentation_config()
    assert augmentation is not None
    assert augmentation.jitter == 0.2
    assert not chosen.model_config().reconstruction
    assert chosen.model_config().first_stride == 2
    assert (chosen.streaming_config().tile, chosen.streaming_config().memory) == (64, "2GiB")
    assert config(augmentation=False).augmentation_config() is None


def test_defaults_are_those_of_the_parts() -> None:
    chosen = config()
    assert chosen.slide_config() == SlideConfig()
    assert chosen.model_config() == ModelConfig()
    assert chosen.streaming_config() == StreamingConfig()
    assert chosen.augmentation_config() == AugmentationConfig()
    assert (chosen.fractions, chosen.group, chosen.seed) == (SplitConfig().fractions, SplitConfig().group, 0)


def test_yaml_gives_the_same_options_back() -> None:
    chosen = config(mask_dir=Path("masks"), loggers=("csv", "wandb"), fractions=(0.6, 0.2, 0.2), mpp="native")
    assert TrainConfig.from_dict({**chosen.to_dict(), "format_version": 1}) == chosen


def test_paths_are_made_absolute() -> None:
    chosen = config(cache=Path("cache")).with_absolute_paths()
    assert chosen.slides == Path.cwd() / "slides"
    assert chosen.cache == Path.cwd() / "cache"
    assert chosen.mask_dir is None


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            {"method": "clam"},
            "unknown method 'clam' (--method): choose local-kN with N stages (local-k4), or one of local, ",
        ),
        ({"devices": 2}, "training on 2 is not supported (--devices): leave --devices at 1"),
        ({"nodes": 3}, "training on 3 is not supported (--nodes): leave --nodes at 1"),
        ({"epochs": 0}, "0 is too small (--epochs): give 1 or more"),
        ({"accumulate": 0}, "0 is too small (--accumulate): give 1 or more"),
        ({"patience": -1}, "-1 is too small (--patience): give 0 or more"),
        ({"prefetch_bytes": -5}, "-5 is too small (--prefetch-bytes): give 0 or more"),
        ({"head_lr": 0.0}, "0.0 is no learning rate (--head-lr): give a positive number, such as 1e-5"),
        ({"lr": float("nan")}, "nan is no learning rate (--lr)"),
        ({"attention_dropout": 1.0}, "1.0 is no dropout (--attention-dropout): give 0 or more, below 1"),
        ({"fractions": (0.7, 0.7, 0.1)}, "not a split (--fractions 0.7,0.7,0.1)"),
        ({"tile": 0}, "0 is too small (--tile): give 1 or more"),
        ({"fold": -1}, "-1 is too small (--fold): give 0 or more"),
        ({"fold": 0, "splits_csv": Path("s.csv")}, "two splits are asked for (--fold and --splits-csv): give one"),
        ({"jitter": 2.0}, "not a jitter strength"),
        ({"mpp": 1.0, "magnification": 40.0}, "two resolutions that disagree"),
    ],
)
def test_options_without_sense_are_named(options: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**options).check()
    assert line in str(caught.value)
    assert len(caught.value.problems) == 1


def test_all_problems_come_together() -> None:
    with pytest.raises(ConfigError) as caught:
        config(epochs=0, lr=0.0, devices=4, jitter=3.0).check()
    assert len(caught.value.problems) == 4


def test_the_options_are_free_of_torch() -> None:
    code = "import sys, wholeslide.train.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("before", "after", "allowed"), [("m", None, False), (None, "m", False), ("m", "moved", True)])
def test_masks_may_move_but_not_come_or_go(before: str | None, after: str | None, *, allowed: bool) -> None:
    """Without its masks a slide is another one: the second half of a run would train on other pixels."""
    stored, given = (config(mask_dir=name and Path(name)) for name in (before, after))
    if allowed:
        assert resumed_config(stored, given).mask_dir == given.mask_dir
        return
    with pytest.raises(ConfigError, match="--mask-dir"):
        resumed_config(stored, given)
