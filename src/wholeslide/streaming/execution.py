"""Arithmetic and memory layout of the stages, chosen by timing them on this machine."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from wholeslide.model.network import LocalNetwork

Network = TypeVar("Network", bound=nn.Module)
Precision = Literal["fp32", "bf16", "fp64"]
PrecisionChoice = Literal["auto", "fp32", "bf16", "fp64"]
_DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}

#: Side of the images that are timed, in pixels: large enough that a convolution is not all overhead.
_PROBE_PX = 768
_ROUNDS = 4
#: A choice that takes so many times as long as another in the first round is not timed again.
_FAR_BEHIND = 1.5


@dataclass(frozen=True)
class Execution:
    """How a stage is run: ``precision`` of its arithmetic and its features, ``channels_last`` in memory or not."""

    precision: Precision
    channels_last: bool

    @property
    def store_dtype(self) -> torch.dtype:
        """What x_k is rounded to; part of the definition of x_k."""
        return _DTYPES[self.precision]

    @property
    def parameter_dtype(self) -> torch.dtype:
        """Parameters and gradients stay in fp32 under bf16: what multiplies is cast once a step."""
        return torch.float64 if self.precision == "fp64" else torch.float32

    @property
    def multiplied_dtype(self) -> torch.dtype | None:
        """What autocast turns the weights of convolutions and linear layers into; nothing where it does not cast."""
        return torch.bfloat16 if self.precision == "bf16" else None

    @contextmanager
    def autocast(self, device: torch.device) -> Iterator[None]:
        """Around the forward pass of one tile."""
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            yield

    def arrange_parameters(self, network: Network) -> Network:
        """The network with its weights in this layout, so that neither they nor their gradients are rearranged tile by tile."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        arranged: Network = network.to(memory_format=layout)
        return arranged

    def arrange(self, x_bchw: Tensor) -> Tensor:
        """The same features in this layout."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return x_bchw.contiguous(memory_format=layout)


@dataclass(frozen=True)
class Timing:
    """Seconds a megapixel, of the stem and of each stage in order.

    ``forward_seconds`` and ``backward_seconds`` are by pixels of input; ``decoder_seconds`` are of both ways through a stage's
    decoder, by pixels of the regions. The stem has no backward pass; it and the last stage have no decoder.
    """

    forward_seconds: tuple[float, ...]
    backward_seconds: tuple[float, ...]
    decoder_seconds: tuple[float, ...]

    @property
    def training_seconds(self) -> float:
        """Forward and backward, of all."""
        return sum(self.forward_seconds) + sum(self.backward_seconds)


def candidates(precision: PrecisionChoice) -> list[Execution]:
    """What a user's choice leaves open."""
    precisions: tuple[Precision, ...] = ("fp32", "bf16") if precision == "auto" else (precision,)
    return [Execution(p, channels_last) for p in precisions for channels_last in (True, False)]


def choose_execution(
    network: LocalNetwork, precision: PrecisionChoice, device: torch.device
) -> tuple[Execution, Timing]:
    """The fastest execution of all stages, forward and backward, and what it costs.

    The choices are timed in turn, round after round, so that a busy moment of the machine hits all of them alike. The first round
    warms up, and shows which choices are far behind.
    """
    first = {choice: time_execution(network, choice, device).training_seconds for choice in candidates(precision)}
    near = [choice for choice, seconds in first.items() if seconds <= _FAR_BEHIND * min(first.values())]
    rounds = [[time_execution(network, choice, device) for choice in near] for _ in range(_ROUNDS)]
    best = [_quickest(timings) for timings in zip(*rounds, strict=True)]
    return min(zip(near, best, strict=True), key=lambda pair: pair[1].training_seconds)


def time_execution(network: LocalNetwork, execution: Execution, device: torch.device) -> Timing:
    """One pass of a small image through stem, stages, the classifiers' first layers and the decoders."""
    network = execution.arrange_parameters(network)
    pixels = torch.zeros((1, 3, _PROBE_PX, _PROBE_PX), dtype=execution.parameter_dtype, device=device)
    dtype = execution.multiplied_dtype
    begun = time.perf_counter()
    with torch.no_grad(), execution.autocast(device):
        stem = network.stem.step_weights(trained=False, dtype=dtype)
        x_bchw = stem(execution.arrange(pixels)).to(execution.store_dtype)
    forward, backward, decoder = [_elapsed(begun, device)], [0.0], [0.0]
    for number in range(1, network.depth + 1):
        begun = time.perf_counter()
        stage = network.stage(number).step_weights(trained=True, dtype=dtype)
        with execution.autocast(device):
            output = stage(execution.arrange(x_bchw)).to(execution.store_dtype)
            grid = network.head(number).grid(output)
        forward.append(_elapsed(begun, device))
        leaves = [tensor for tensor in stage.tensors if tensor.is_leaf and tensor.requires_grad]
        begun = time.perf_counter()
        torch.autograd.grad(grid.sum(), [*leaves, network.head(number).to_grid.weight], allow_unused=True)
        backward.append(_elapsed(begun, device))
        x_bchw = output.detach()
        decoder.append(_time_decoder(network, number, x_bchw, execution, device))
    megapixels = _PROBE_PX**2 / 1e6
    return Timing(*(tuple(seconds / megapixels for seconds in times) for times in (forward, backward, decoder)))


def _time_decoder(
    network: LocalNetwork, number: int, x_bchw: Tensor, execution: Execution, device: torch.device
) -> float:
    decoder = network.decoder(number)
    if decoder is None:
        return 0.0
    begun = time.perf_counter()
    regions_rchw = execution.arrange(x_bchw).requires_grad_()
    with execution.autocast(device):
        with torch.no_grad():
            decoder.widened(regions_rchw)  # for the norm's moments
        reconstruction = decoder(regions_rchw)
    torch.autograd.grad(reconstruction.sum(), [regions_rchw, *decoder.parameters()])
    return _elapsed(begun, device)


def _quickest(timings: Sequence[Timing]) -> Timing:
    """Each part's least time."""

    def least(times: list[tuple[float, ...]]) -> tuple[float, ...]:
        return tuple(min(seconds) for seconds in zip(*times, strict=True))

    return Timing(
        least([timing.forward_seconds for timing in timings]),
        least([timing.backward_seconds for timing in timings]),
        least([timing.decoder_seconds for timing in timings]),
    )


def _elapsed(begun: float, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun
