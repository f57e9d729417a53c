"""A step without tiles that would not fit is refused before it is tried."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest
import torch

from wholeslide.bench.whole_step import require_memory, whole_step_bytes
from wholeslide.errors import ConfigError
from wholeslide.geometry import Size
from wholeslide.model.config import ModelConfig
from wholeslide.model.network import LocalNetwork, build_network
from wholeslide.streaming.costs import gradient_bytes
from wholeslide.streaming.execution import Execution

FP32 = Execution("fp32", channels_last=True)


@pytest.fixture(scope="module")
def network() -> LocalNetwork:
    config = ModelConfig(backbone="test_resnet", stages=1, weights="random")
    return build_network(config, classes=2, pixel_mean=(0.5,) * 3, pixel_std=(0.2,) * 3, seed=0)


def test_graphs_grow_with_the_pixels_and_gradients_do_not(network: LocalNetwork) -> None:
    fixed_bytes = gradient_bytes(network)
    small, large = (whole_step_bytes(network, FP32, Size(side, side)) - fixed_bytes for side in (1000, 3000))
    assert large == pytest.approx(9 * small, rel=1e-6)


def test_the_estimate_is_that_of_a_graph(network: LocalNetwork) -> None:
    """What autograd saves for a real image of that size is a part of it, and not a small one."""
    saved_bytes: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved_bytes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        network.stage(1)(network.stem(torch.zeros(1, 3, 800, 600)))
    estimated_bytes = whole_step_bytes(network, FP32, Size(800, 600))
    assert 0.3 * estimated_bytes < sum(saved_bytes.values()) < estimated_bytes


def test_too_large_for_the_machine(network: LocalNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    needed_bytes = whole_step_bytes(network, FP32, Size(5000, 4000))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=needed_bytes))
    require_memory(network, FP32, Size(5000, 4000))
    with pytest.raises(
        ConfigError, match=r"^too large for this machine: about \d.* \(--modes whole, 5000x4400 pixels\): "
    ):
        require_memory(network, FP32, Size(5000, 4400))
