"""Convolutions that multiply 8-bit integers: a folded graph is rewritten so that what stands between two of them stays integers.

A real number r is kept as an integer q from 0 to 255 with r = scale·(q − zero) (Jacob et al., CVPR 2018, equation 1), weights as
integers from −127 to 127 with a scale for each output channel. A convolution adds the products up exactly in 32 bits, then its
bias and a shortcut, takes the activation, and rounds once. oneDNN does all that in one call. Every other operation is computed
with real numbers, as without integers.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

_LEVELS = 255
_WEIGHT_LEVELS = 127
_LEAST_SCALE = 1e-12
#: Only a hint for how weights are laid out.
_USUAL_CELLS = 128


class Range(NamedTuple):
    """Which real numbers the integers from 0 to 255 stand for."""

    scale: float
    zero: int


class Rounded(nn.Module):
    """Real numbers to integers."""

    def __init__(self, to: Range) -> None:
        super().__init__()
        self.to_range = to

    def forward(self, x_bchw: Tensor) -> Tensor:
        """(B, C, h, w) of any type to uint8, channels last."""
        levels = torch.mul(x_bchw.float(), 1 / self.to_range.scale).add_(self.to_range.zero).round_().clamp_(0, _LEVELS)
        return levels.to(torch.uint8).contiguous(memory_format=torch.channels_last)


class Real(nn.Module):
    """Integers to the real numbers that they stand for."""

    def __init__(self, source: Range) -> None:
        super().__init__()
        self.source = source

    def forward(self, q_bchw: Tensor) -> Tensor:
        """(B, C, h, w) uint8 to fp32."""
        return q_bchw.float().sub_(self.source.zero).mul_(self.source.scale)


@dataclass(frozen=True)
class Product:
    """A convolution and what is computed with it: a shortcut that is added, and the activation behind.

    ``nodes`` are these, in order; the value of the last one is what the whole gives.
    """

    nodes: tuple[fx.Node, ...]
    shortcut: fx.Node | None
    activation: str
    bounds: tuple[float, ...]

    @property
    def source(self) -> fx.Node:
        """What is multiplied."""
        source = self.nodes[0].args[0]
        assert isinstance(source, fx.Node)
        return source

    @property
    def last(self) -> fx.Node:
        """Whose value the whole gives."""
        return self.nodes[-1]


class IntegerProduct(nn.Module):
    """A :class:`Product` in one call, integers to integers.

    Args:
        layer: the convolution, with real weights.
        source: range of its input.
        shortcut: of what is added to its output, or nothing.
        to: range of the result.
        activation: ``none``, ``relu`` or ``hardtanh``.
        bounds: of ``hardtanh``.
    """

    def __init__(
        self,
        layer: nn.Conv2d,
        source: Range,
        shortcut: Range | None,
        to: Range,
        activation: str,
        bounds: tuple[float, ...],
    ) -> None:
        super().__init__()
        weight = layer.weight.detach().float()
        scales = weight.abs().amax(dim=(1, 2, 3)).div_(_WEIGHT_LEVELS).clamp_(min=_LEAST_SCALE)
        integers = (weight / scales[:, None, None, None]).round_().to(torch.int8)
        self._geometry = (list(layer.stride), list(layer.padding), list(layer.dilation), layer.groups)
        shape = [1, layer.in_channels, _USUAL_CELLS, _USUAL_CELLS]
        self._weight = torch.ops.onednn.qconv_prepack(integers, scales, *source, *self._geometry, shape)
        self._scales, self._zeros = scales, torch.zeros(layer.out_channels, dtype=torch.int64)
        self._bias = None if layer.bias is None else layer.bias.detach().float()
        self._source, self._shortcut, self._to = source, shortcut, to
        self._activation, self._bounds = activation, list(bounds)

    def forward(self, q_bchw: Tensor, shortcut_bchw: Tensor | None = None) -> Tensor:
        """(B, C, h, w) to (B, C', h', w'), uint8. ``shortcut_bchw`` is overwritten."""
        weights = (self._weight, self._scales, self._zeros)
        if shortcut_bchw is None:
            output: Tensor = torch.ops.onednn.qconv2d_pointwise(
                *(q_bchw, *self._source, *weights, self._bias, *self._geometry, *self._to, torch.uint8),
                *(self._activation, self._bounds, ""),
            )
            return output
        assert self._shortcut is not None
        torch.ops.onednn.qconv2d_pointwise.binary(
            *(q_bchw, *self._source, *weights, shortcut_bchw, self._bias, *self._geometry, *self._to, torch.uint8),
            *(*self._shortcut, "sum", 1.0, self._activation, [], ""),
        )
        return shortcut_bchw


class Normalised(nn.Module):
    """Stored pixels to what a network is trained on.

    Args:
        mean: of the pixels in [0, 1], (3,).
        std: of them, (3,).
    """

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.mean, self.std = (value.detach().float().view(1, 3, 1, 1) for value in (mean, std))

    def forward(self, pixels_bchw: Tensor) -> Tensor:
        """(B, 3, h, w) uint8 to fp32."""
        return pixels_bchw.sub(255 * self.mean).div_(255 * self.std)


class PixelProduct(nn.Module):
    """The first :class:`Product`: multiplies stored pixels as they are, with the normalisation folded into its weights.

    Where the layer pads with zeros, which stand for the mean colour, pixels of that colour lie around the window.

    Args:
        layer: the convolution of normalised pixels.
        normalised: how they would be normalised.
        to: range of the result.
        activation: as of :class:`IntegerProduct`.
        bounds: likewise.
    """

    def __init__(
        self, layer: nn.Conv2d, normalised: Normalised, to: Range, activation: str, bounds: tuple[float, ...]
    ) -> None:
        super().__init__()
        folded = copy.deepcopy(layer)
        weight = layer.weight.detach().float() / normalised.std
        shift = (weight * normalised.mean).sum(dim=(1, 2, 3))
        folded.weight = nn.Parameter(weight / 255)
        folded.bias = nn.Parameter(-shift if layer.bias is None else layer.bias.detach().float() - shift)
        folded.padding = (0, 0)
        assert not isinstance(layer.padding, str)
        self._padding = layer.padding
        self._mean = (255 * normalised.mean).round().to(torch.uint8)
        self._product = IntegerProduct(folded, Range(1.0, 0), None, to, activation, bounds)

    @staticmethod
    def replaces(product: Product, layer: nn.Conv2d) -> bool:
        """Whether a product of pixels is one that this class computes."""
        return layer.groups == 1 and product.shortcut is None

    def forward(self, pixels_bchw: Tensor) -> Tensor:
        """(B, 3, h, w) to (B, C, h', w'), uint8."""
        batch, _, height, width = pixels_bchw.shape
        rows, columns = self._padding
        around = self._mean.repeat(batch, 1, height + 2 * rows, width + 2 * columns)
        around = around.contiguous(memory_format=torch.channels_last)
        around[:, :, rows : rows + height, columns : columns + width] = pixels_bchw
        output: Tensor = self._product(around)
        return output


class LargestInteger(nn.Module):
    """Max pooling of integers, along one axis and then along the other: torch's own takes only the smallest maps of bytes.

    Args:
        layer: the pooling, without dilation and not rounding up.
    """

    def __init__(self, layer: nn.MaxPool2d) -> None:
        super().__init__()
        values = (layer.kernel_size, layer.stride, layer.padding)
        self._axes = [[value if isinstance(value, int) else value[axis] for value in values] for axis in (0, 1)]

    @staticmethod
    def replaces(layer: nn.Module) -> bool:
        """Whether a layer is one that this class computes."""
        return isinstance(layer, nn.MaxPool2d) and layer.dilation in (1, (1, 1)) and not layer.ceil_mode

    def forward(self, q_bchw: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C, h', w'), uint8."""
        for dim, (kernel, stride, padding) in enumerate(self._axes, start=2):
            q_bchw = _largest_along(q_bchw, dim, kernel, stride, padding)
        return q_bchw


def _largest_along(q_bchw: Tensor, dim: int, kernel: int, stride: int, padding: int) -> Tensor:
    length = q_bchw.shape[dim]
    count = (length + 2 * padding - kernel) // stride + 1
    shape = list(q_bchw.shape)
    shape[dim] = count
    largest = torch.empty(
        shape, dtype=q_bchw.dtype, memory_format=torch.channels_last
    ).zero_()  # below which is nothing
    for offset in range(-padding, kernel - padding):
        first = max(0, -(offset // stride))  # whose window has a cell at this offset
        seen = min(count, (length - 1 - offset) // stride + 1) - first
        if seen > 0:
            cells = q_bchw.narrow(dim, first * stride + offset, (seen - 1) * stride + 1)
            own = largest.narrow(dim, first, seen)
            torch.maximum(own, cells[:, :, ::stride] if dim == 2 else cells[:, :, :, ::stride], out=own)
    return largest


def products(module: fx.GraphModule) -> list[Product]:
    """The convolutions of a folded graph, each with what can be computed in its call."""
    found: list[Product] = []
    sums: set[fx.Node] = set()  # that belong to a product
    for node in module.graph.nodes:
        if not (node.op == "call_module" and _multiplies(module.get_submodule(str(node.target)))):
            continue
        nodes, shortcut = [node], None
        behind = _only_user(node)
        if behind is not None and behind not in sums:
            shortcut = _other_summand(behind, node)
        if behind is not None and shortcut is not None:
            sums.add(behind)
            nodes.append(behind)
            behind = _only_user(behind)
        activation, bounds = ("none", ()) if behind is None else _activation_of(module, behind)
        if activation == "relu" or (activation == "hardtanh" and shortcut is None):  # as oneDNN has them
            assert behind is not None
            nodes.append(behind)
        else:
            activation, bounds = "none", ()
        found.append(Product(tuple(nodes), shortcut, activation, bounds))
    return found


def without_identities(module: fx.GraphModule) -> fx.GraphModule:
    """The graph without layers that do nothing in evaluation, in place."""
    for node in list(module.graph.nodes):
        if node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), nn.Identity | nn.Dropout):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    module.graph.lint()
    module.recompile()
    return module


def rounded_nodes(module: fx.GraphModule) -> list[fx.Node]:
    """The nodes whose values become integers, the output apart: their ranges must be known."""
    found = products(module)
    needed = {
        node for product in found for node in (product.source, product.shortcut, product.last) if node is not None
    }
    return [node for node in module.graph.nodes if node in needed]


def in_integers(
    module: fx.GraphModule, ranges: Mapping[str, Range], *, entry: Range | Normalised, leave_integers: bool
) -> tuple[fx.GraphModule, Range | None]:
    """The same graph with its products in integers, and the range of what it gives, where that is integers.

    Args:
        module: from :func:`without_identities`.
        ranges: of :func:`rounded_nodes`, by their names.
        entry: of the graph's input, which are integers that may be overwritten; or how it is normalised, if it is stored pixels.
        leave_integers: whether the graph gives integers, or the real numbers that they stand for.
    """
    rewriting = _Rewriting(module, ranges)
    found = {product.last: product for product in products(module)}
    absorbed = {node for product in found.values() for node in product.nodes}
    leaving = None
    for node in module.graph.nodes:
        if node.op == "placeholder":
            rewriting.enter(node, entry)
        elif node.op == "output":
            leaving = rewriting.leave(node.args[0], integers=leave_integers)
        elif node in found:
            rewriting.multiply(found[node])
        elif node not in absorbed:
            rewriting.take_over(node)
    return rewriting.done(), leaving


class _Rewriting:
    """A new graph, in which a value of the old one is there as integers, as real numbers, or as both once both are needed."""

    def __init__(self, module: fx.GraphModule, ranges: Mapping[str, Range]) -> None:
        self._module, self._ranges = module, ranges
        self._position = {node: index for index, node in enumerate(module.graph.nodes)}
        self._graph = fx.Graph()
        self._layers = dict[str, nn.Module]()
        self._integers: dict[fx.Node, tuple[fx.Node, Range]] = {}
        self._pixels: dict[fx.Node, tuple[fx.Node, Normalised]] = {}
        self._reals: dict[fx.Node, fx.Node] = {}

    def enter(self, node: fx.Node, entry: Range | Normalised) -> None:
        value = self._graph.placeholder(node.name)
        if isinstance(entry, Normalised):
            self._pixels[node] = value, entry
        else:
            self._integers[node] = value, entry

    def leave(self, value: fx.Node, *, integers: bool) -> Range | None:
        left, leaving = self._rounded(value) if integers else (self._real(value), None)
        self._graph.output(left)
        return leaving

    def multiply(self, product: Product) -> None:
        layer, to = self._module.get_submodule(str(product.nodes[0].target)), self._ranges[product.last.name]
        assert isinstance(layer, nn.Conv2d)
        if product.source in self._pixels and PixelProduct.replaces(product, layer):
            pixels, normalised = self._pixels[product.source]
            first = PixelProduct(layer, normalised, to, product.activation, product.bounds)
            self._integers[product.last] = self._call(first, pixels), to
            return
        source, source_range = self._rounded(product.source)
        arguments, shortcut_range = [source], None
        if product.shortcut is not None:
            shortcut, shortcut_range = self._rounded(product.shortcut)
            now = self._position[product.last]
            read_besides = shortcut is source or any(self._position[user] > now for user in product.shortcut.users)
            arguments.append(self._graph.call_method("clone", (shortcut,)) if read_besides else shortcut)
        made = IntegerProduct(layer, source_range, shortcut_range, to, product.activation, product.bounds)
        self._integers[product.last] = self._call(made, *arguments), to

    def take_over(self, node: fx.Node) -> None:
        """An operation as it is: on real numbers, but for one that only chooses among integers."""
        source = node.args[0] if node.args else None
        if isinstance(source, fx.Node) and source in self._integers and self._is_pooling(node):
            integers, found = self._integers[source]
            layer = self._module.get_submodule(str(node.target))
            assert isinstance(layer, nn.MaxPool2d)
            self._integers[node] = self._call(LargestInteger(layer), integers), found
        else:
            self._reals[node] = self._graph.node_copy(node, self._real)

    def done(self) -> fx.GraphModule:
        for name, layer in self._layers.items():
            self._module.add_submodule(name, layer)
        self._graph.lint()
        return fx.GraphModule(self._module, self._graph)

    def _rounded(self, value: fx.Node) -> tuple[fx.Node, Range]:
        if value not in self._integers:
            to = self._ranges[value.name]
            self._integers[value] = self._call(Rounded(to), self._real(value)), to
        return self._integers[value]

    def _real(self, value: fx.Node) -> fx.Node:
        if value in self._pixels and value not in self._reals:
            pixels, normalised = self._pixels[value]
            self._reals[value] = self._call(normalised, pixels)
        elif value not in self._reals:
            integers, found = self._integers[value]
            self._reals[value] = self._call(Real(found), integers)
        return self._reals[value]

    def _is_pooling(self, node: fx.Node) -> bool:
        return node.op == "call_module" and LargestInteger.replaces(self._module.get_submodule(str(node.target)))

    def _call(self, layer: nn.Module, *arguments: fx.Node) -> fx.Node:
        name = f"integers_{len(self._layers)}"
        self._layers[name] = layer
        return self._graph.create_node("call_module", name, arguments)


def _multiplies(layer: nn.Module) -> bool:
    """Whether a layer is a convolution as oneDNN has it: padded with zeros by a number of cells."""
    return type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _other_summand(node: fx.Node, one: fx.Node) -> fx.Node | None:
    """What a sum adds to ``one``; nothing where ``node`` is no such sum."""
    if node.op != "call_function" or node.target not in (operator.add, operator.iadd, torch.add) or node.kwargs:
        return None
    others = [argument for argument in node.args if argument is not one]
    return others[0] if len(others) == 1 and isinstance(others[0], fx.Node) else None


def _activation_of(module: fx.GraphModule, node: fx.Node) -> tuple[str, tuple[float, ...]]:
    """What oneDNN calls an activation, and its bounds; ``none`` where it has no name for it."""
    layer = module.get_submodule(str(node.target)) if node.op == "call_module" else None
    if isinstance(layer, nn.Hardtanh):  # ReLU6 among them
        return "hardtanh", (float(layer.min_val), float(layer.max_val))
    is_relu = isinstance(layer, nn.ReLU) or (node.op == "call_function" and node.target in (F.relu, torch.relu))
    return "relu" if is_relu else "none", ()
