"""A backbone's graph, and the proof that every operation in it is local.

``trace`` records the feature extractor of a timm network with torch.fx; ``locality_of`` walks a graph in order and derives each
node's reach. An operation that looks at more than a neighbourhood (squeeze-excite, global pooling, batch statistics,
attention, stochastic depth) is refused with its layer's name.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.layers.drop import DropPath
from timm.layers.norm import LayerNorm2d
from timm.layers.norm_act import BatchNormAct2d
from torch import fx, nn
from torch.nn import functional as F

from wholeslide.errors import ModelError
from wholeslide.model.locality import Locality, Sampling

ALTERNATIVE = (
    "choose a backbone of local operations, for example resnet34, convnext_tiny, efficientnet_lite0, mobilenetv2_100 or "
    "regnetx_032"
)

_POINTWISE_MODULES = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.ELU,
    nn.Mish, nn.Softplus, nn.Hardtanh,
)  # fmt: skip
_POINTWISE_FUNCTIONS = {
    F.relu, F.relu6, F.gelu, F.silu, F.hardswish, F.sigmoid, F.tanh, F.leaky_relu, F.elu, F.mish, torch.relu, torch.sigmoid,
    torch.tanh, operator.neg,
}  # fmt: skip
_POINTWISE_METHODS = {"relu", "sigmoid", "tanh", "contiguous", "clamp"}
_COMBINING = {operator.add, operator.iadd, operator.mul, operator.imul, operator.sub, torch.add, torch.mul}
_COMBINING_METHODS = {"add", "add_", "mul", "mul_"}
_TO_CHANNELS_LAST, _TO_CHANNELS_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)


class _LocalTracer(fx.Tracer):
    """Keeps norms whole: their Python code checks shapes, which a trace cannot follow."""

    traced_func_name = "forward_features"

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        norm = isinstance(module, nn.BatchNorm2d | nn.LayerNorm | nn.GroupNorm | DropPath)
        return norm or super().is_leaf_module(module, qualified_name)


def trace(backbone: nn.Module, name: str) -> fx.GraphModule:
    """The graph of ``backbone.forward_features`` in evaluation mode.

    Raises:
        ModelError: the network's Python code cannot be traced.
    """
    backbone.eval()
    try:
        graph = _LocalTracer().trace(backbone)
    except (fx.proxy.TraceError, TypeError, AttributeError, RuntimeError) as error:
        raise ModelError.single(
            f"the backbone cannot be traced: {str(error).splitlines()[0]}", where=name, remedy=ALTERNATIVE
        ) from error
    return fx.GraphModule(backbone, graph)


@dataclass(frozen=True)
class _Field:
    """A node that is a feature map: its reach, its channels' place."""

    locality: Locality
    layout: Literal["chw", "hwc"] = "chw"


@dataclass(frozen=True)
class _Constant:
    """A node that is a parameter, the same at every position."""

    shape: torch.Size


def locality_of(module: fx.GraphModule, name: str) -> Locality:
    """The reach of a graph's output into its one input.

    Raises:
        ModelError: an operation is not local; the error names its layer.
    """
    output = next(node for node in module.graph.nodes if node.op == "output")
    value = _values_of(module, name)[output.args[0]]
    if not isinstance(value, _Field) or value.layout != "chw":
        raise _refusal("output", "the output is not a feature map", name)
    return value.locality


def localities_of(module: fx.GraphModule, name: str) -> dict[fx.Node, Locality]:
    """The reach of every node of a graph that is a feature map.

    Raises:
        ModelError: an operation is not local; the error names its layer.
    """
    values = _values_of(module, name)
    return {node: value.locality for node, value in values.items() if isinstance(value, _Field)}


def _values_of(module: fx.GraphModule, name: str) -> dict[fx.Node, _Field | _Constant]:
    values: dict[fx.Node, _Field | _Constant] = {}
    for node in module.graph.nodes:
        if node.op != "output":
            values[node] = _value_of(node, module, values, name)
    return values


def _value_of(
    node: fx.Node, module: fx.GraphModule, values: dict[fx.Node, _Field | _Constant], name: str
) -> _Field | _Constant:
    if node.op == "placeholder":
        return _Field(Locality())
    if node.op == "get_attr":
        return _Constant(operator.attrgetter(str(node.target))(module).shape)
    inputs = [values[argument] for argument in node.all_input_nodes]
    fields = [value for value in inputs if isinstance(value, _Field)]
    if node.op == "call_module":
        layer = str(node.target)
        return _module_value(module.get_submodule(layer), fields[0], layer, name)
    if node.target == "reshape" and not fields:
        shape = torch.empty(inputs[0].shape).reshape(*node.args[1:]).shape  # type: ignore[union-attr,arg-type]
        return _Constant(shape)
    return _function_value(node, inputs, fields, name)


def _module_value(layer: nn.Module, field: _Field, layer_name: str, name: str) -> _Field:
    channels_first = field.layout == "chw"
    if isinstance(layer, nn.Conv2d) and channels_first:
        return _Field(field.locality.then(*_samplings(layer, layer_name, name)))
    if isinstance(layer, nn.MaxPool2d | nn.AvgPool2d) and channels_first:
        return _Field(field.locality.then(*_samplings(layer, layer_name, name)))
    if isinstance(layer, nn.BatchNorm2d):
        if layer.running_mean is None:
            raise _refusal(layer_name, "batch statistics", name)
        if isinstance(layer, BatchNormAct2d):
            for part in (layer.drop, layer.act):
                field = _module_value(part, field, layer_name, name)
        return field
    if isinstance(layer, LayerNorm2d) and channels_first:
        return field
    if isinstance(layer, nn.LayerNorm) and not channels_first and len(layer.normalized_shape) == 1:
        return field
    if isinstance(layer, nn.Linear) and not channels_first:
        return field
    if (isinstance(layer, nn.Dropout) and layer.p == 0) or isinstance(layer, _POINTWISE_MODULES):
        return field
    if isinstance(layer, nn.Dropout | DropPath):
        raise _refusal(layer_name, "random depth or dropout inside the backbone", name)
    raise _refusal(layer_name, type(layer).__name__, name)


def _function_value(
    node: fx.Node, inputs: list[_Field | _Constant], fields: list[_Field], name: str
) -> _Field | _Constant:
    owners = list(node.meta.get("nn_module_stack", {}))
    where = owners[-1] if owners else node.name
    called = node.target if node.op == "call_method" else getattr(node.target, "__name__", str(node.target))
    pointwise = node.target in (_POINTWISE_METHODS if node.op == "call_method" else _POINTWISE_FUNCTIONS)
    combining = node.target in (_COMBINING_METHODS if node.op == "call_method" else _COMBINING)
    if pointwise and len(inputs) == 1 and fields:
        return fields[0]
    if combining and fields:
        return _combined(inputs, fields, where, name)
    if node.target == "permute" and fields:
        order = tuple(node.args[1:]) if len(node.args) > 2 else node.args[1]
        if fields[0].layout == "chw" and order == _TO_CHANNELS_LAST:
            return _Field(fields[0].locality, "hwc")
        if fields[0].layout == "hwc" and order == _TO_CHANNELS_FIRST:
            return _Field(fields[0].locality, "chw")
    if node.target in (torch.cat, torch.concat) and len(fields) == len(inputs):
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        if dim == 1 and all(field.layout == "chw" for field in fields):
            return _combined(inputs, fields, where, name)
    raise _refusal(where, str(called), name)


def _combined(inputs: list[_Field | _Constant], fields: list[_Field], where: str, name: str) -> _Field:
    """Several feature maps of one layout, cell by cell, and parameters that do not vary over the positions."""
    joined = fields[0]
    for field in fields[1:]:
        if field.layout != joined.layout or field.locality.stride != joined.locality.stride:
            raise _refusal(where, "feature maps of different stride or layout meet", name)
        if not joined.locality.agrees_in_size(field.locality):
            raise _refusal(where, "feature maps meet that differ by a cell at some image sizes", name)
        joined = _Field(joined.locality.joined(field.locality), joined.layout)
    for constant in inputs:
        if isinstance(constant, _Constant):
            trailing = constant.shape[-2:] if joined.layout == "chw" else constant.shape[-3:-1]
            if math.prod(trailing) != 1 or (
                joined.layout == "chw" and len(constant.shape) < 3 and math.prod(constant.shape) != 1
            ):
                raise _refusal(where, "a parameter that varies over the positions", name)
    return joined


def _samplings(layer: Any, layer_name: str, name: str) -> tuple[Sampling, Sampling]:
    """The samplings of a convolution or pooling: along x, along y."""
    if isinstance(layer.padding, str) or getattr(layer, "padding_mode", "zeros") != "zeros":
        raise _refusal(layer_name, "padding other than a fixed number of zeros", name)
    if type(layer) not in (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d):
        raise _refusal(layer_name, f"{type(layer).__name__}, whose padding depends on the image", name)
    stride = layer.kernel_size if layer.stride is None else layer.stride

    def axis(value: Any, index: int) -> int:
        return int(value[index] if isinstance(value, tuple) else value)

    def sampling(index: int) -> Sampling:
        return Sampling(
            kernel=axis(layer.kernel_size, index),
            stride=axis(stride, index),
            padding=axis(layer.padding, index),
            dilation=axis(getattr(layer, "dilation", 1), index),
            ceil_mode=bool(getattr(layer, "ceil_mode", False)),
        )

    return sampling(1), sampling(0)


def _refusal(layer: str, what: str, name: str) -> ModelError:
    return ModelError.single(
        f"not a local operation: {what}", where=f"backbone {name}, layer {layer}", remedy=ALTERNATIVE
    )
