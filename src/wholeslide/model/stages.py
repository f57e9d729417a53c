"""A backbone cut into a frozen stem and K consecutive local stages.

Cuts lie only between residual blocks. For ResNet34 they are the paper's at K = 1, 2, 4 and 8; for every other network and K the
blocks are dealt so that the largest activation memory of a stage is smallest.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from wholeslide.errors import ModelError
from wholeslide.model.folding import FoldedBody, StepWeights
from wholeslide.model.locality import Locality
from wholeslide.model.tracing import locality_of

#: Where the families of timm keep their blocks: ResNet, ConvNeXt, EfficientNet and MobileNet, RegNet.
_BLOCK_PATH = re.compile(r"^(layer\d+\.\d+|stages\.\d+\.blocks\.\d+|blocks\.\d+\.\d+|s\d+\.b\d+)(?=\.|$)")

#: Blocks in each of the paper's eight stages of ResNet34; at K = 4 neighbours are joined in pairs, at K = 2 pairs of those.
_PAPER_RESNET34_BLOCKS = (1, 1, 1, 2, 2, 3, 3, 3)

#: Side of the image on which activation memory is counted; only ratios between blocks matter.
_PROBE_PX = 256


class Stage(nn.Module):
    """F_k of the paper: consecutive blocks, all local.

    Args:
        body: the traced operations, sharing the backbone's layers and their names.
        name: the backbone, for messages.
        in_channels: channels of x_{k−1}.
        out_channels: channels of x_k.
        input_stride: pixels per cell of x_{k−1}, so that one cell of x_k is ``stride`` pixels.
    """

    def __init__(
        self, body: fx.GraphModule, *, name: str, in_channels: int, out_channels: int, input_stride: int
    ) -> None:
        super().__init__()
        self.body = body
        self.locality: Locality = locality_of(body, name)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stride = input_stride * self.locality.stride
        self._folded = FoldedBody(body)

    def step_weights(self, *, trained: bool, dtype: torch.dtype | None = None) -> StepWeights:
        """What computes this stage's tiles on one slide: the same function, with its frozen norms folded.

        Args:
            trained: whether gradients will be asked for.
            dtype: of the convolutions' arithmetic, where it is not that of the parameters.
        """
        return StepWeights(self._folded, trained=trained, dtype=dtype)

    def forward(self, x_bchw: Tensor) -> Tensor:
        """x_{k−1} of shape (1, C, h, w) to x_k; every side of the input is taken as the image's edge."""
        output: Tensor = self.body(x_bchw)
        return output

    def train(self, mode: bool = True) -> Stage:
        """Norm statistics are frozen: a stage never leaves evaluation mode."""
        return super().train(False)


@dataclass(frozen=True)
class _Block:
    """Consecutive nodes of the graph, from just behind one border to the next."""

    nodes: tuple[fx.Node, ...]

    @property
    def border(self) -> fx.Node:
        return self.nodes[-1]


def cut_into_stages(traced: fx.GraphModule, stages: int, *, name: str) -> tuple[Stage, list[Stage]]:
    """The stem and the stages of a traced backbone.

    Raises:
        ModelError: an operation is not local, or ``stages`` is not between 1 and the number of blocks.
    """
    locality_of(traced, name)
    stem_nodes, blocks = _blocks_of(traced)
    if not 1 <= stages <= len(blocks):
        raise ModelError.single(
            f"cannot cut {len(blocks)} blocks into {stages} stages",
            where=f"backbone {name}",
            remedy=f"choose --stages between 1 and {len(blocks)}",
        )
    shapes, activations = _probe(traced)
    sizes = _stage_sizes(name, stages, [sum(activations[node] for node in block.nodes) for block in blocks])
    image = next(node for node in traced.graph.nodes if node.op == "placeholder")
    stem = _segment(traced, image, stem_nodes, name, shapes, input_stride=1)
    built: list[Stage] = []
    begin, border, stride = 0, stem_nodes[-1], stem.stride
    for size in sizes:
        nodes = [node for block in blocks[begin : begin + size] for node in block.nodes]
        built.append(_segment(traced, border, nodes, name, shapes, input_stride=stride))
        begin, border, stride = begin + size, nodes[-1], built[-1].stride
    return stem, built


def paper_partition(stages: int) -> tuple[int, ...] | None:
    """Blocks in each stage of ResNet34 at K = 1, 2, 4, 8; ``None`` where the paper's code has no cut."""
    if stages not in (1, 2, 4, 8):
        return None
    joined = len(_PAPER_RESNET34_BLOCKS) // stages
    return tuple(sum(_PAPER_RESNET34_BLOCKS[i : i + joined]) for i in range(0, len(_PAPER_RESNET34_BLOCKS), joined))


def balanced_partition(costs: Sequence[int], parts: int) -> tuple[int, ...]:
    """Lengths of ``parts`` consecutive groups whose largest sum is least; among those, the later groups are the longer."""
    best: dict[tuple[int, int], tuple[int, tuple[int, ...]]] = {(0, 0): (0, ())}
    for part in range(1, parts + 1):
        for end in range(part, len(costs) - (parts - part) + 1):
            best[part, end] = min(
                (max(best[part - 1, begin][0], sum(costs[begin:end])), (*best[part - 1, begin][1], end - begin))
                for begin in range(part - 1, end)
                if (part - 1, begin) in best
            )
    return best[parts, len(costs)][1]


def _stage_sizes(name: str, stages: int, block_activations: list[int]) -> tuple[int, ...]:
    paper = paper_partition(stages)
    if name.partition(".")[0] == "resnet34" and paper is not None:
        return paper
    return balanced_partition(block_activations, stages)


def _blocks_of(traced: fx.GraphModule) -> tuple[list[fx.Node], list[_Block]]:
    """The nodes before the first block, and the blocks; what follows the last block belongs to it.

    A node outside every named block (ConvNeXt's downsampling) belongs to the block that follows it. Where a network names no
    blocks (VGG), every trunk layer that looks around opens one.
    """
    nodes = [node for node in traced.graph.nodes if node.op not in ("placeholder", "output")]
    position = {node: index for index, node in enumerate(nodes)}
    last_use = {node: max((position.get(user, len(nodes)) for user in node.users), default=-1) for node in nodes}
    paths = [_block_path(node) for node in nodes]
    named = any(paths)
    starts: list[int] = []
    current: str | None = None
    reach, trunk_start = 0, 0
    behind_block: int | None = None  # where the trunk goes on after the current block
    for index, node in enumerate(nodes):
        if index and reach < index:  # nothing but the previous node is used from here on
            trunk_start = index
            behind_block = index if behind_block is None else behind_block
            if not named and _looks_around(traced, node):
                starts.append(index)
        path = paths[index]
        if path is not None:
            if current is None:
                starts.append(trunk_start)
            elif path != current and behind_block is not None:
                starts.append(behind_block)
            current, behind_block = path, None
        if node.op != "get_attr":
            others = [last_use[earlier] for earlier in nodes[:index] if earlier.op != "get_attr"]
            reach = max([use for use in others if use > index], default=0)
    starts = sorted(set(starts) - {0}) or [len(nodes) - 1]
    ends = [*starts[1:], len(nodes)]
    return nodes[: starts[0]], [_Block(tuple(nodes[a:b])) for a, b in zip(starts, ends, strict=True)]


def _block_path(node: fx.Node) -> str | None:
    if node.op not in ("call_module", "get_attr"):
        return None
    match = _BLOCK_PATH.match(str(node.target))
    return match[1] if match else None


def _looks_around(traced: fx.GraphModule, node: fx.Node) -> bool:
    layer = traced.get_submodule(str(node.target)) if node.op == "call_module" else None
    return isinstance(layer, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d) and layer.kernel_size not in (1, (1, 1))


def _segment(
    traced: fx.GraphModule,
    entry: fx.Node,
    nodes: Sequence[fx.Node],
    name: str,
    shapes: dict[fx.Node, torch.Size],
    *,
    input_stride: int,
) -> Stage:
    """A module that computes ``nodes`` from the value of ``entry``."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {entry: graph.placeholder("x_bchw")}
    for node in nodes:
        copies[node] = graph.node_copy(node, lambda argument: copies[argument])
    graph.output(copies[nodes[-1]])
    return Stage(
        fx.GraphModule(traced, graph),
        name=name,
        in_channels=shapes[entry][1],
        out_channels=shapes[nodes[-1]][1],
        input_stride=input_stride,
    )


class _ShapeProbe(fx.Interpreter):
    """Runs the graph once and notes each feature map's shape."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[fx.Node, torch.Size] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.shapes[n] = result.shape
        return result


def _probe(traced: fx.GraphModule) -> tuple[dict[fx.Node, torch.Size], dict[fx.Node, int]]:
    """Shape of every node for a square image, and the elements of every operation's output, which backward needs."""
    probe = _ShapeProbe(traced)
    parameter = next(traced.parameters())
    with torch.no_grad():
        probe.run(torch.zeros(1, 3, _PROBE_PX, _PROBE_PX, dtype=parameter.dtype, device=parameter.device))
    kept = {
        node: (shape.numel() if node.op in ("call_module", "call_function") and not _is_identity(traced, node) else 0)
        for node, shape in probe.shapes.items()
    }
    return probe.shapes, {node: kept.get(node, 0) for node in traced.graph.nodes}


def _is_identity(traced: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(traced.get_submodule(str(node.target)), nn.Identity | nn.Dropout)
