"""A network of a few thousand weights and a cohort of small images, so that whole training runs take a second."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.models.resnet import BasicBlock, ResNet

from wholeslide.model.network import LocalNetwork
from wholeslide.streaming import planner
from wholeslide.streaming.execution import Execution, Timing
from wholeslide.train.config import TrainConfig


@timm.models.register_model
def resnet_micro(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """A ResNet with one block a layer. With fewer than 16 channels oneDNN's strided 1x1 convolutions crash."""
    assert not pretrained
    wanted = {key: kwargs[key] for key in ("num_classes", "global_pool") if key in kwargs}
    return ResNet(BasicBlock, layers=(1, 1, 1, 1), channels=(16, 16, 32, 32), stem_width=16, **wanted)


def make_cohort(folder: Path, *, train: int = 5, valid: int = 2, test: int = 2, seed: int = 0) -> Path:
    """Images of two classes that differ in colour. Returns the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    rows = ["file,patient,label,split"]
    for index, split in enumerate(["train"] * train + ["valid"] * valid + ["test"] * test):
        width, height = rng.integers(242, 262, size=2)
        pixels = rng.integers(120, 255, size=(height, width, 3), dtype=np.uint8)
        if index % 2:
            pixels[:, :, 1] //= 2
        Image.fromarray(pixels).save(folder / f"slide{index}.png")
        rows.append(f"slide{index}.png,patient{index},{'ab'[index % 2]},{split}")
    manifest = folder / "labels.csv"
    manifest.write_text("\n".join(rows) + "\n")
    return manifest


def tiny_config(manifest: Path, out: Path, **options: Any) -> TrainConfig:
    """Two stages, two epochs, groups of two slides, on the CPU."""
    defaults: dict[str, Any] = {
        "manifest": manifest,
        "slides": manifest.parent,
        "out": out,
        "backbone": "resnet_micro",
        "weights": "random",
        "stages": 2,
        "mpp": "native",
        "precision": "fp32",
        "tile": 256,
        "accelerator": "cpu",
        "reconstruction_region_px": 96,
        "epochs": 2,
        "accumulate": 2,
        "lr": 1e-3,
        "monitor": "loss",
        "loggers": ("csv",),
        "quiet": True,
    }
    return TrainConfig(**{**defaults, **options})


@contextmanager
def same_arithmetic() -> Iterator[None]:
    """One thread, and a layout that no timing chooses, so that a test is the same on every machine."""
    execution = Execution("fp32", channels_last=False)

    def chosen(network: LocalNetwork, *others: object) -> tuple[Execution, Timing]:
        """The same time for all stages together, however many there are."""
        share, none = 1 / network.depth, 0.0
        forward, backward = ((none, *[seconds * share] * network.depth) for seconds in (1.0, 2.0))
        return execution, Timing(forward, backward, (none,) * (network.depth + 1))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "remembered_execution", chosen)
        yield
    torch.set_num_threads(threads)


def train_in_child(config: TrainConfig) -> None:
    """What a forked process runs, to be killed at any moment."""
    from wholeslide.train.loop import train

    with same_arithmetic():
        train(config)


#: The run that is never interrupted, by its schedule.
Whole = Callable[[str], Path]
_TIMES = ["seconds", "wait_seconds", "memory_bytes", "training_seconds"]


def assert_same_end(run: Path, other: Path) -> None:
    """Weights, the optimiser, the loop's state and the logs are equal."""
    for which in ("last", "best"):
        left, right = (json.loads((path / "checkpoints" / f"{which}.json").read_text()) for path in (run, other))
        tensors, others = (
            load_file(path / "checkpoints" / record["file"]) for path, record in ((run, left), (other, right))
        )
        assert tensors.keys() == others.keys()
        assert any(key.startswith("optimizer:") for key in tensors)
        for key, value in tensors.items():
            assert torch.equal(value, others[key]), key
        for record in (left, right):
            del record["state"]["seconds"]
        assert left == right
    for name in ("slides.csv", "epochs.csv"):
        tables = [pd.read_csv(path / "log" / name).drop(columns=_TIMES, errors="ignore") for path in (run, other)]
        pd.testing.assert_frame_equal(*tables)
