"""A folded graph rewritten so that what stands between two of its convolutions stays integers.

Convolutions become those of :mod:`wholeslide.model.integer_layers`; every other operation is computed with real numbers, as without
integers.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn import functional as F

from wholeslide.model.integer_layers import (
    IntegerProduct,
    LargestInteger,
    Normalised,
    PixelProduct,
    Range,
    Real,
    Rounded,
)


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
    found = {product.last: product for product in products(module)}
    absorbed = {node: product for product in found.values() for node in product.nodes}
    rewriting = _Rewriting(module, ranges, absorbed)
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

    def __init__(
        self, module: fx.GraphModule, ranges: Mapping[str, Range], absorbed: Mapping[fx.Node, Product]
    ) -> None:
        self._module, self._ranges = module, ranges
        position = {node: index for index, node in enumerate(module.graph.nodes)}
        # A product is computed where its last node stands, and there it reads what its first ones take.
        self._computed_at = {node: position[absorbed[node].last if node in absorbed else node] for node in position}
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
        if product.source in self._pixels and product.shortcut is None and PixelProduct.replaces(layer):
            pixels, normalised = self._pixels[product.source]
            first = PixelProduct(layer, normalised, to, product.activation, product.bounds)
            self._integers[product.last] = self._call(first, pixels), to
            return
        source, source_range = self._rounded(product.source)
        arguments, shortcut_range = [source], None
        if product.shortcut is not None:
            shortcut, shortcut_range = self._rounded(product.shortcut)
            now = self._computed_at[product.last]
            read_besides = shortcut is source or any(self._computed_at[user] > now for user in product.shortcut.users)
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
