"""Stem and stages that multiply 8-bit integers, for prediction: twice as fast as bfloat16 where a processor can.

Norms are folded, weights get a scale a channel, and activations one a tensor, from the ranges that torch's observers find on a few
windows of slides. Features between two stages stay integers. Classifiers stay as they are.
"""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, fx

from wholeslide.errors import ConfigError
from wholeslide.model.folding import folded_copy
from wholeslide.model.integer_layers import Normalised, Range, Real
from wholeslide.model.integers import in_integers, rounded_nodes, without_identities
from wholeslide.model.network import LocalNetwork

with warnings.catch_warnings():
    # Torch announces that its observers will move to another package.
    warnings.simplefilter("ignore")
    from torch.ao.quantization.observer import HistogramObserver


def stored_pixels(pixels_hwc: np.ndarray) -> Tensor:
    """Pixels, (h, w, 3) uint8 or floating-point numbers in [0, 1], as they are stored: (1, 3, h, w) uint8, channels last."""
    if pixels_hwc.dtype != np.uint8:
        pixels_hwc = np.rint(255 * pixels_hwc).astype(np.uint8)
    return torch.from_numpy(np.require(pixels_hwc, requirements=["C", "W"]))[None].permute(0, 3, 1, 2)


class QuantizedPart:
    """The stem, or one stage, in integers.

    Args:
        body: the rewritten operations.
        leaving: range of what they give; nothing where that is real.
    """

    def __init__(self, body: fx.GraphModule, leaving: Range | None) -> None:
        self._body = body
        self._real = None if leaving is None else Real(leaving)

    def __call__(self, x_bchw: Tensor) -> Tensor:
        """Stored pixels, (1, 3, h, w) uint8, to x_0; or x_{k−1} to x_k, which may overwrite x_{k−1}.

        All are uint8, but for the last stage's x_k, which is fp32.
        """
        output: Tensor = self._body(x_bchw.contiguous(memory_format=torch.channels_last))
        return output

    def real(self, x_bchw: Tensor) -> Tensor:
        """The numbers that the features of this part stand for, fp32."""
        return x_bchw if self._real is None else self._real(x_bchw)


class Calibration:
    """The ranges of all activations of a network.

    Args:
        network: whose activations are observed; it is not changed.

    Raises:
        ConfigError: this processor has no integer arithmetic that is worth it.
    """

    def __init__(self, network: LocalNetwork) -> None:
        _require_integer_products()
        parts = [network.stem, *(network.stage(number) for number in range(1, network.depth + 1))]
        self._normalised = Normalised(network.pixel_mean.cpu(), network.pixel_std.cpu())
        self._bodies = [without_identities(folded_copy(part.body).float().cpu()) for part in parts]
        self._observers = [{name: HistogramObserver() for name in _names(body)} for body in self._bodies]
        self._ranges: list[dict[str, Range]] | None = None

    @torch.no_grad()
    def observe(self, pixels_bchw: Tensor) -> None:
        """Widen the ranges by one window of stored pixels, (1, 3, h, w) uint8."""
        x_bchw = self._normalised(pixels_bchw)
        for body, observers in zip(self._bodies, self._observers, strict=True):
            x_bchw = _Observing(body, observers).run(x_bchw)
        self._ranges = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing was observed yet."""
        return self._ranges is None and bool(
            (self._observers[0][_names(self._bodies[0])[0]].min_val == torch.inf).all()
        )

    def state(self) -> dict[str, Tensor]:
        """The ranges, to be kept beside the weights: of each value, scale and zero, float64."""
        return {
            f"{number}.{name}": torch.tensor(found, dtype=torch.float64)
            for number, ranges in enumerate(self._found())
            for name, found in ranges.items()
        }

    @property
    def sha256(self) -> str:
        """Hash of the ranges, in hexadecimal: what they are, not how they were found."""
        found = {name: tensor.tolist() for name, tensor in self.state().items()}
        return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take the ranges that :meth:`state` gave for the same network.

        Raises:
            KeyError: they are of another network.
        """
        self._ranges = [
            {name: Range(float(state[f"{number}.{name}"][0]), int(state[f"{number}.{name}"][1])) for name in observers}
            for number, observers in enumerate(self._observers)
        ]

    def quantized(self) -> tuple[QuantizedPart, ...]:
        """The stem and the stages in integers, in order."""
        parts: list[QuantizedPart] = []
        entry: Range | Normalised | None = self._normalised
        found = self._found()
        for number, (body, ranges) in enumerate(zip(self._bodies, found, strict=True)):
            assert entry is not None
            is_last = number == len(found) - 1
            rewritten, leaving = in_integers(copy.deepcopy(body), ranges, entry=entry, leave_integers=not is_last)
            parts.append(QuantizedPart(rewritten, leaving))
            entry = leaving
        return tuple(parts)

    def _found(self) -> list[dict[str, Range]]:
        assert not self.is_empty, "nothing was observed"
        if self._ranges is None:
            self._ranges = [
                {name: _range_of(observer) for name, observer in observers.items()} for observers in self._observers
            ]
        return self._ranges


class _Observing(fx.Interpreter):
    """Computes with real numbers, and shows values to their observers."""

    def __init__(self, body: fx.GraphModule, observers: Mapping[str, HistogramObserver]) -> None:
        super().__init__(body)
        self._observers = observers

    def run_node(self, n: fx.Node) -> Tensor:
        value: Tensor = super().run_node(n)
        if n.name in self._observers:
            self._observers[n.name](value)
        return value


def _names(body: fx.GraphModule) -> list[str]:
    """Of the values whose ranges are needed; a part's output is one of them."""
    return list(dict.fromkeys([*(node.name for node in rounded_nodes(body)), _output_of(body).name]))


def _output_of(body: fx.GraphModule) -> fx.Node:
    output = next(node for node in body.graph.nodes if node.op == "output").args[0]
    assert isinstance(output, fx.Node)
    return output


def _range_of(observer: HistogramObserver) -> Range:
    scale, zero = observer.calculate_qparams()
    return Range(float(scale), int(zero))


def _require_integer_products() -> None:
    # Without these instructions oneDNN adds pairs of products up in 16 bits, which saturate.
    if not (torch.backends.mkldnn.enabled and torch.cpu._is_vnni_supported()):
        raise ConfigError.single(
            "this processor has no instructions for products of 8-bit integers",
            where="--precision int8",
            remedy="leave it out, or give bf16",
        )
