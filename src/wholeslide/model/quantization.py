"""Stages that multiply 8-bit integers, for prediction: twice as fast as bfloat16 where the processor has such instructions.

Torch's own post-training quantisation does the work: norms are folded, weights get a scale a channel, activations one a tensor,
from the ranges that were observed on a few windows of slides. Classifiers and the stem stay as they are.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, fx
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from wholeslide.errors import ConfigError
from wholeslide.model.network import LocalNetwork
from wholeslide.model.stages import Stage

#: oneDNN's integer kernels: the ones that keep their speed in channels-last layout.
_ENGINE = "onednn"
_EXAMPLE_CELLS = 32


class QuantizedStage:
    """x_{k−1} to x_k in integers; outside, features are floating-point numbers of any kind."""

    def __init__(self, converted: fx.GraphModule) -> None:
        self._converted = converted

    def __call__(self, x_bchw: Tensor) -> Tensor:
        output: Tensor = self._converted(x_bchw.float())
        return output


class Calibration:
    """The ranges of every stage's activations.

    Args:
        network: whose stages are observed; it is not changed.

    Raises:
        ConfigError: this processor or this torch has no integer kernels.
    """

    def __init__(self, network: LocalNetwork) -> None:
        with _integer_kernels():
            self._observed = [_observing(network.stage(number)) for number in range(1, network.depth + 1)]
        self.windows = 0

    @torch.no_grad()
    def observe(self, x_bchw: Tensor) -> None:
        """Widen the ranges by one window of x_0, (1, C, h, w) fp32."""
        for stage in self._observed:
            x_bchw = stage(x_bchw)
        self.windows += 1

    def state(self) -> dict[str, Tensor]:
        """The ranges alone, to be kept beside the weights."""
        return {
            f"{number}.{name}": tensor.clone()
            for number, stage in enumerate(self._observed, start=1)
            for name, tensor in stage.state_dict().items()
            if "activation_post_process" in name
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take the ranges that :meth:`state` gave for the same network.

        Raises:
            KeyError: they are of another network.
        """
        for number, stage in enumerate(self._observed, start=1):
            own = stage.state_dict()
            ranges = {name: state[f"{number}.{name}"] for name in own if "activation_post_process" in name}
            stage.load_state_dict({**own, **ranges})
        self.windows = 1

    def quantized(self) -> tuple[QuantizedStage, ...]:
        """The stages in integers, in order."""
        assert self.windows, "nothing was observed"
        with _integer_kernels():
            return tuple(QuantizedStage(convert_fx(copy.deepcopy(stage))) for stage in self._observed)


def _observing(stage: Stage) -> fx.GraphModule:
    example = torch.zeros((1, stage.in_channels, _EXAMPLE_CELLS, _EXAMPLE_CELLS))
    body = copy.deepcopy(stage.body).float().cpu().eval()
    observed: fx.GraphModule = prepare_fx(body, get_default_qconfig_mapping(_ENGINE), (example,))
    return observed


@contextmanager
def _integer_kernels() -> Iterator[None]:
    if _ENGINE not in torch.backends.quantized.supported_engines:
        raise ConfigError.single(
            "this torch has no 8-bit kernels for this processor",
            where="--precision int8",
            remedy="leave it out, or give bf16",
        )
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = _ENGINE
    try:
        with warnings.catch_warnings():
            # Torch announces that its quantisation will move to another package, and that observers have moved.
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        torch.backends.quantized.engine = before
