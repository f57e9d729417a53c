"""What a step without tiles will need: a row that does not fit the machine is not tried, or the system would end something."""

from __future__ import annotations

import psutil
import torch
from torch import Tensor

from wholeslide.errors import ConfigError
from wholeslide.geometry import Size
from wholeslide.model.network import LocalNetwork
from wholeslide.streaming.costs import gradient_bytes
from wholeslide.streaming.execution import Execution

_PROBE_PX = 384
#: Tensors as large as the largest of a graph that are in flight besides it.
_IN_FLIGHT = 3
#: So many times what the saved tensors tell is resident at the peak: the kernels' workspace, and holes in the heap.
_RESIDENT = 1.45
#: Of the whole view: as it is read, and as it is given to the stem, in fp32.
_PIXEL_BYTES = 2 * 3 * 4


def require_memory(network: LocalNetwork, execution: Execution, view: Size) -> None:
    """Refuse a step on a view whose graphs are larger than what is free.

    Raises:
        ConfigError: they are.
    """
    needed_bytes, free_bytes = whole_step_bytes(network, execution, view), psutil.virtual_memory().available
    if needed_bytes > free_bytes:
        raise ConfigError.single(
            f"too large for this machine: about {needed_bytes / 2**30:.1f} GiB, and {free_bytes / 2**30:.1f} GiB are free",
            where=f"--modes whole, {view} pixels",
            remedy="measure a smaller size, from which this one is extrapolated",
        )


def whole_step_bytes(network: LocalNetwork, execution: Execution, view: Size) -> int:
    """The stage with the largest graph and what it needs besides, counted on a small image and scaled by its pixels."""
    device = torch.device("cpu")
    probe = network.padded_size(Size(_PROBE_PX, _PROBE_PX))
    pixels = torch.zeros((1, 3, probe.height, probe.width), dtype=execution.parameter_dtype)
    with torch.no_grad(), execution.autocast(device):
        x_bchw = network.stem(execution.arrange(pixels)).to(execution.store_dtype)
    largest_bytes = 0
    for number in range(1, network.depth + 1):
        saved_bytes: dict[int, int] = {}

        def note(tensor: Tensor, saved_bytes: dict[int, int] = saved_bytes) -> Tensor:
            if tensor.ndim == 4 and tensor.shape[0] == 1:  # features, which grow with the view; weights do not
                saved_bytes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), execution.autocast(device):
            output = network.stage(number)(execution.arrange(x_bchw)).to(execution.store_dtype)
        graph = list(saved_bytes.values())
        largest_bytes = max(largest_bytes, sum(graph) + _IN_FLIGHT * max(graph))
        x_bchw = output.detach()
    return int(max(_RESIDENT * largest_bytes / probe.area, _PIXEL_BYTES) * view.area) + gradient_bytes(network)
