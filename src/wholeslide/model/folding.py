"""Frozen batch norms folded into the convolutions before them, for training too.

With frozen statistics, a convolution and its norm are one convolution with the weights ``w·γ/σ`` and the bias ``β − μ·γ/σ``. A
step computes these once, runs all its tiles with them, and sends the sum of their gradients through the same two formulas
once: the chain rule gives the gradients of w, γ and β exactly, and no tile ever computes a norm.
"""

from __future__ import annotations

import copy
import operator
from dataclasses import dataclass

import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, fx, nn

from wholeslide.model.strips import StripConv2d


@dataclass(frozen=True)
class _Pair:
    """The names of a convolution and of the norm behind it."""

    convolution: str
    norm: str


class FoldedBody:
    """A stage's operations without the norms that fold, to be run with weights that are given at each call.

    Args:
        body: the stage's operations; not changed.
    """

    def __init__(self, body: fx.GraphModule) -> None:
        self._body = body
        # On the meta device: the structure only, no second copy of the weights.
        self._structure = copy.deepcopy(body).to("meta")
        self._pairs = [_Pair(str(node.args[0].target), str(node.target)) for node in _foldable(self._structure)]  # type: ignore[union-attr]
        for node in _foldable(self._structure):
            _remove_norm(self._structure, node)
        _add_in_place(self._structure)
        _skip_before_pointwise(self._structure)
        _take_strips(self._structure)
        self._structure.graph.eliminate_dead_code()
        self._structure.recompile()
        #: names of the weights and biases of convolutions and linear layers
        self.multiplied = frozenset(
            f"{path}.{name}"
            for path, layer in self._structure.named_modules()
            if isinstance(layer, nn.Conv2d | nn.Linear)
            for name, _ in layer.named_parameters(recurse=False)
        )

    @property
    def tensors(self) -> list[Tensor]:
        """The stage's own parameters and statistics."""
        return [*self._body.parameters(), *self._body.buffers()]

    def weights(self) -> dict[str, Tensor]:
        """Every tensor that a call needs, as a function of the stage's own parameters and statistics."""
        weights = {**dict(self._body.named_parameters()), **dict(self._body.named_buffers())}
        for pair in self._pairs:
            norm = self._body.get_submodule(pair.norm)
            assert isinstance(norm, nn.BatchNorm2d)
            assert norm.running_mean is not None
            assert norm.running_var is not None
            scale = (norm.running_var + norm.eps).rsqrt() * norm.weight
            offset = norm.bias - norm.running_mean * scale
            bias = weights.get(f"{pair.convolution}.bias")
            weights[f"{pair.convolution}.weight"] = weights[f"{pair.convolution}.weight"] * scale[:, None, None, None]
            weights[f"{pair.convolution}.bias"] = offset if bias is None else offset + bias * scale
            for name, _ in (*norm.named_parameters(), *norm.named_buffers()):
                del weights[f"{pair.norm}.{name}"]
        return weights

    def __call__(self, weights: dict[str, Tensor], x_bchw: Tensor) -> Tensor:
        """x_{k−1} to x_k, with weights from :meth:`weights`."""
        output: Tensor = torch.func.functional_call(self._structure, weights, (x_bchw,))
        return output


class StepWeights:
    """One slide's weights of a stage: leaves that tiles accumulate gradients on, and the way back to the parameters.

    Args:
        body: of the stage.
        trained: whether gradients will be asked for.
        dtype: what convolutions and linear layers compute in, where it is not the parameters' own. They are cast once, as
            autocast would for every tile; gradients are summed over tiles in the leaves' type.
    """

    def __init__(self, body: FoldedBody, *, trained: bool, dtype: torch.dtype | None = None) -> None:
        self._body = body
        with torch.set_grad_enabled(trained):
            self._roots = body.weights()
            self._leaves = {
                name: root.detach().requires_grad_(root.requires_grad) for name, root in self._roots.items()
            }
            # A cast saves no tensors, so that many backward passes may go through it.
            cast = body.multiplied if dtype is not None else frozenset()
            self._given = {name: leaf.to(dtype) if name in cast else leaf for name, leaf in self._leaves.items()}

    def __call__(self, x_bchw: Tensor) -> Tensor:
        """Run the stage on one window."""
        return self._body(self._given, x_bchw)

    @property
    def tensors(self) -> list[Tensor]:
        """What all tiles share."""
        return [*self._leaves.values(), *self._given.values()]

    @property
    def own_bytes(self) -> int:
        """What a step holds beside the parameters: folded weights, casts, and the gradients of the leaves."""
        parameters = {p.untyped_storage().data_ptr() for p in self._body.tensors}
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in self.tensors}
        copies_bytes = sum(size for key, size in storages.items() if key not in parameters)
        return copies_bytes + sum(int(leaf.nbytes) for leaf in self._leaves.values() if leaf.requires_grad)

    def backward(self) -> None:
        """Add what the tiles accumulated to the parameters' own gradients."""
        pairs = [(self._roots[name], leaf.grad) for name, leaf in self._leaves.items() if leaf.grad is not None]
        torch.autograd.backward([root for root, _ in pairs], [gradient for _, gradient in pairs])


def folded_copy(body: fx.GraphModule) -> fx.GraphModule:
    """The same function with norms folded into weights of its own, without gradients; nothing is rearranged for speed."""
    structure = copy.deepcopy(body)
    weights = FoldedBody(body).weights()
    for node in _foldable(structure):
        _remove_norm(structure, node)
    structure.graph.eliminate_dead_code()
    structure.delete_all_unused_submodules()
    structure.recompile()
    structure.load_state_dict(
        {name: tensor.detach().clone() for name, tensor in weights.items()}, strict=False, assign=True
    )
    return structure.requires_grad_(False)


def _foldable(module: fx.GraphModule) -> list[fx.Node]:
    """Norms with frozen statistics that see nothing but a convolution that nobody else sees."""
    found = []
    for node in module.graph.nodes:
        if node.op != "call_module" or not isinstance(module.get_submodule(str(node.target)), nn.BatchNorm2d):
            continue
        source = node.args[0]
        convolution = module.get_submodule(str(source.target)) if source.op == "call_module" else None
        affine = module.get_submodule(str(node.target)).affine
        if isinstance(convolution, nn.Conv2d) and len(source.users) == 1 and affine:
            found.append(node)
    return found


def _remove_norm(structure: fx.GraphModule, node: fx.Node) -> None:
    """Let the convolution's output stand for the norm's; an activation that the norm carries stays."""
    norm, source = structure.get_submodule(str(node.target)), node.args[0]
    assert isinstance(source, fx.Node)
    convolution = structure.get_submodule(str(source.target))
    assert isinstance(convolution, nn.Conv2d)
    convolution.bias = nn.Parameter(torch.empty(convolution.out_channels, device="meta"))
    replacement = source
    if isinstance(norm, BatchNormAct2d) and not isinstance(norm.act, nn.Identity):
        with structure.graph.inserting_after(node):
            replacement = structure.graph.call_module(f"{node.target}.act", (source,))
    node.replace_all_uses_with(replacement)
    structure.graph.erase_node(node)


def _add_in_place(structure: fx.GraphModule) -> None:
    """Add a shortcut onto a convolution's output where nobody else needs that: one tensor less for each block."""
    for node in structure.graph.nodes:
        if node.op != "call_function" or node.target is not operator.add:
            continue
        first = node.args[0]
        while isinstance(first, fx.Node) and _is_identity(structure, first) and len(first.users) == 1:
            first = first.args[0]
        if (
            isinstance(first, fx.Node)
            and first.op == "call_module"
            and isinstance(structure.get_submodule(str(first.target)), nn.Conv2d)
            and len(first.users) == 1
        ):
            node.target = operator.iadd


def _skip_before_pointwise(structure: fx.GraphModule) -> None:
    """Take every n-th cell before a 1x1 convolution of stride n: then it is a product of matrices, several times as fast."""
    for node in structure.graph.nodes:
        layer = structure.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(layer, nn.Conv2d) or layer.stride == (1, 1):
            continue
        if layer.kernel_size != (1, 1) or layer.padding != (0, 0):
            continue
        every_row, every_column = (slice(None, None, step) for step in layer.stride)
        layer.stride = (1, 1)
        with structure.graph.inserting_before(node):
            cells = (slice(None), slice(None), every_row, every_column)
            node.args = (structure.graph.call_function(operator.getitem, (node.args[0], cells)), *node.args[1:])


def _take_strips(structure: fx.GraphModule) -> None:
    """Let wide convolutions sum their weights' gradients over strips."""
    for layer in structure.modules():
        if StripConv2d.replaces(layer):
            layer.__class__ = StripConv2d  # the same layer: nothing but its methods differ


def _is_identity(structure: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(structure.get_submodule(str(node.target)), nn.Identity)
