"""What a training step multiplies and adds: of the undivided network, of what varies on a slide, and of the tiles.

A multiplication with its addition is two operations. Counted are convolutions and matrix products, layer by layer, from the traced
graph and the sizes; what works cell by cell (norms, activations, bilinear sampling) is not.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from torch import Tensor, fx, nn

from wholeslide.geometry import Box, Size
from wholeslide.model.locality import Locality, compose
from wholeslide.model.network import LocalNetwork
from wholeslide.model.reconstruction import region_count, region_side
from wholeslide.model.stages import Stage
from wholeslide.model.tracing import localities_of
from wholeslide.streaming.background import VaryingPixels
from wholeslide.streaming.stores import FeatureStore
from wholeslide.streaming.tile_runner import PartWeights, TileRunner
from wholeslide.streaming.tiles import Tile, lone_tile

#: Backward costs as much as forward for a layer's weights, and once more for its input.
_WEIGHTS_AND_INPUT = 2
#: Rows of cells that are looked at together.
_BAND_CELLS = 256


@dataclass(frozen=True)
class Multiplication:
    """One layer: ``flops`` of an output cell forward, and how many times as much ``backward``.

    ``locality`` leads from the input of the stem or of the stage to the layer's output.
    """

    locality: Locality
    flops: int
    backward: int


def multiplications(part: Stage, *, trained: bool) -> list[Multiplication]:
    """The convolutions and linear layers of a stage, or of the stem; no gradient is asked for the part's own input."""
    reached = localities_of(part.body, "backbone")
    learns: dict[fx.Node, bool] = {}
    found = []
    for node in part.body.graph.nodes:
        inputs_learn = any(learns[source] for source in node.all_input_nodes)
        layer = part.body.get_submodule(str(node.target)) if node.op == "call_module" else None
        own = layer is not None and any(parameter.requires_grad for parameter in layer.parameters())
        learns[node] = trained and (inputs_learn or own or _is_learned(part.body, node))
        if isinstance(layer, nn.Conv2d | nn.Linear):
            backward = trained * (layer.weight.requires_grad + inputs_learn)
            found.append(Multiplication(reached[node], 2 * layer.weight.numel(), backward))
    return found


def _is_learned(body: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "get_attr" and str(node.target) in {
        name for name, p in body.named_parameters() if p.requires_grad
    }


class StepFlops:
    """Counts for one step on a view of ``view_size`` pixels, in which every stage is trained."""

    def __init__(self, network: LocalNetwork, view_size: Size) -> None:
        self._network, self._view_size = network, view_size
        self._layers = [
            multiplications(network.stage(number) if number else network.stem, trained=number > 0)
            for number in range(network.depth + 1)
        ]

    def dense(self) -> int:
        """Of the network without tiles: forward, and backward through all weights and all inner features."""
        total = 0
        for number in range(self._network.depth + 1):
            total += self._part(number, self._input_size(number), backward=True)
            if number:
                cells = self._grid_size(number).area
                total += self._grid(number, cells, backward=True) + self._classifier(number, cells)
        return total + self._decoders()

    def forward(self) -> int:
        """Of a prediction without tiles, which asks the final classifier alone."""
        depth = self._network.depth
        cells = self._grid_size(depth).area
        parts = sum(self._part(number, self._input_size(number), backward=False) for number in range(depth + 1))
        return parts + self._grid(depth, cells, backward=False) + self._classifier(depth, cells, trained=False)

    def active(self, varying: VaryingPixels) -> int:
        """Of the cells, layer by layer, that see a varying block or the border; and, once, of what stands for the others."""
        total = 0
        for number in range(self._network.depth + 1):
            for layer in self._layers[number]:
                cells = _active_cells(varying, self._reach(number, layer), layer.locality, self._input_size(number))
                total += cells * layer.flops * (1 + layer.backward)
            if number:
                cells = self._active_grid_cells(number, varying)
                rows = min(cells + 1, self._grid_size(number).area)
                total += self._grid(number, cells, backward=True) + self._classifier(number, rows)
        if varying.anywhere_constant:
            total += self._lone_tiles()
        return total + self._decoders()

    def computed(self, runner: CountingRunner) -> int:
        """Of the windows that a step ran through ``runner``, halos and what is computed twice included."""
        total = 0
        for run in runner.runs:
            total += self._part(run.number, run.window, forward=not run.backward, backward=run.backward)
            if run.number:
                kernel_cells = self._grid_cells(run.number, run.own)
                total += self._grid(run.number, kernel_cells, forward=not run.backward, backward=run.backward)
        for number, tiles in runner.tiles_of.items():
            rows = sum(self._grid_cells(number, tile.cell_own.size) for tile in tiles)
            total += self._classifier(number, min(rows + 1, self._grid_size(number).area), part_by_part=True)
        return total + self._decoders(region_by_region=True)

    def _part(self, number: int, window: Size, *, forward: bool = True, backward: bool) -> int:
        """Of a window of the input of stage ``number``, or of the stem."""
        return sum(
            layer.locality.output_size(window).area * layer.flops * (forward + backward * layer.backward)
            for layer in self._layers[number]
        )

    def _grid(self, number: int, cells: int, *, forward: bool = True, backward: bool) -> int:
        """Of the classifier's first layer."""
        flops = 2 * self._network.head(number).to_grid.weight.numel()
        return cells * flops * (forward + backward * _WEIGHTS_AND_INPUT)

    def _classifier(self, number: int, rows: int, *, trained: bool = True, part_by_part: bool = False) -> int:
        """Of the classifier behind its grid, with so many rows: both branches of attention, its score, the pooling.

        Part by part, the rows pass three times forward, once back to weights and rows, and once to the rows alone.
        """
        head = self._network.head(number)
        a_row = sum(layer.weight.numel() for layer in (head.attention_tanh, head.attention_gate, head.attention_score))
        ways = 1 + _WEIGHTS_AND_INPUT * trained
        once = (head.hidden.weight.numel() + head.logits.weight.numel()) * ways
        scored, pooled = (6, 5) if part_by_part else (ways, ways)
        return 2 * (rows * (scored * a_row + pooled * head.to_grid.out_channels) + once)

    def _decoders(self, *, region_by_region: bool = False) -> int:
        """Of all regions of all stages; one by one, they pass the first convolution twice."""
        total, config = 0, self._network.config
        for number in range(1, self._network.depth + 1):
            decoder, stage = self._network.decoder(number), self._network.stage(number)
            if decoder is None:
                continue
            side = region_side(config.reconstruction_region_px, stage.stride)
            x_size = self._network.feature_size(self._view_size, number)
            regions = region_count(self._view_size.area, config.reconstruction_region_px, config.reconstruction_regions)
            cells = regions * min(side, x_size.width) * min(side, x_size.height) * decoder.stride**2
            weights = decoder.widen.weight.numel() + decoder.to_target.weight.numel()
            total += 2 * cells * weights * (1 + _WEIGHTS_AND_INPUT)
            total += 2 * cells * decoder.widen.weight.numel() * region_by_region
        return total

    def _lone_tiles(self) -> int:
        """Of the cells that stand for all background, each with its halo."""
        stem = lone_tile(self._network.stem.locality, align=1)
        total = self._part(0, stem.cell_window.size, backward=False)
        for number in range(1, self._network.depth + 1):
            tile = lone_tile(self._network.stage(number).locality, align=self._network.head(number).kernel)
            total += self._part(number, tile.cell_window.size, backward=True) + self._grid(number, 1, backward=True)
        return total

    def _input_size(self, number: int) -> Size:
        return self._network.feature_size(self._view_size, number - 1) if number else self._view_size

    def _reach(self, number: int, layer: Multiplication) -> Locality:
        """From pixels to a layer's output."""
        return compose([self._network.reach(number - 1), layer.locality]) if number else layer.locality

    def _grid_size(self, number: int) -> Size:
        x_size, head = self._network.feature_size(self._view_size, number), self._network.head(number)
        return Size(head.grid_length(x_size.width), head.grid_length(x_size.height))

    def _grid_cells(self, number: int, x_size: Size) -> int:
        head = self._network.head(number)
        return head.grid_length(x_size.width) * head.grid_length(x_size.height)

    def _active_grid_cells(self, number: int, varying: VaryingPixels) -> int:
        """The cells of z that see something varying, or zeros beside x_k."""
        x_size, kernel = self._network.feature_size(self._view_size, number), self._network.head(number).kernel
        active = varying.seen_by(self._network.reach(number), x_size, side=kernel)
        active[-1] |= x_size.height % kernel > 0
        active[:, -1] |= x_size.width % kernel > 0
        return int(active.sum())


def _active_cells(varying: VaryingPixels, reach: Locality, locality: Locality, input_size: Size) -> int:
    """Cells of a layer's output that see something varying; band by band, as a mask of all may be large."""
    cells = locality.output_size(input_size)
    bands = (
        Box(0, top, cells.width, min(_BAND_CELLS, cells.height - top)) for top in range(0, cells.height, _BAND_CELLS)
    )
    return sum(int(varying.seen_by(reach, cells, side=1, within=band).sum()) for band in bands)


@dataclass(frozen=True)
class Run:
    """A window of the input of stage ``number`` (0: pixels) that was computed, ``own`` cells of it for good."""

    number: int
    window: Size
    own: Size
    backward: bool


@dataclass(frozen=True)
class CountingRunner(TileRunner):
    """Notes what a step computes, and how large the stores become."""

    runs: list[Run] = field(default_factory=list)
    tiles_of: dict[int, list[Tile]] = field(default_factory=dict)
    stored_bytes: dict[int, int] = field(default_factory=dict)
    _stores: list[FeatureStore] = field(default_factory=list)

    @classmethod
    def like(cls, runner: TileRunner) -> CountingRunner:
        """The same runner, counting."""
        return cls(**{own.name: getattr(runner, own.name) for own in fields(TileRunner)})

    def tiles(self, number: int, input_size: Size, varying: VaryingPixels | None = None) -> list[Tile]:
        """The tiles of a stage: the store of its input is complete now, and all runs are its own from here on."""
        self.stored_bytes[number - 1] = self._stores[-1].nbytes
        self.tiles_of[number] = super().tiles(number, input_size, varying)
        return self.tiles_of[number]

    def run(self, weights: PartWeights, window_bchw: Tensor, tile: Tile) -> Tensor:
        """A tile's own cells; a hook tells whether anything comes back through them."""
        own_bchw = super().run(weights, window_bchw, tile)
        number = max(self.tiles_of, default=0)
        window, own = Size(window_bchw.shape[-1], window_bchw.shape[-2]), tile.cell_own.size
        self.runs.append(Run(number, window, own, backward=False))
        if own_bchw.requires_grad:
            own_bchw.register_hook(  # type: ignore[no-untyped-call]
                lambda _: self.runs.append(Run(number, window, own, backward=True))
            )
        return own_bchw

    def open_store(self, number: int, input_size: Size) -> FeatureStore:
        """An empty store, remembered until the next one opens."""
        self._stores[:] = [super().open_store(number, input_size)]
        return self._stores[-1]

    @property
    def largest_stored_bytes(self) -> int:
        """Of the input and the output of a stage together, where that is most."""
        return max(self.stored_bytes.get(k, 0) + self.stored_bytes.get(k + 1, 0) for k in self.stored_bytes)
