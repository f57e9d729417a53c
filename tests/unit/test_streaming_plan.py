"""Memory as people write it, plans, and what the planner makes of a limit."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import pytest
import torch

from wholeslide.errors import ConfigError, RunError
from wholeslide.geometry import Size
from wholeslide.model.config import ModelConfig
from wholeslide.model.network import LocalNetwork, build_network
from wholeslide.streaming import planner
from wholeslide.streaming.config import StreamingConfig
from wholeslide.streaming.costs import tile_cost
from wholeslide.streaming.execution import Execution, candidates
from wholeslide.streaming.needs import TileChoice
from wholeslide.streaming.plan import Plan
from wholeslide.streaming.planner import NotEnoughMemoryError, least_memory, make_plan, parse_memory
from wholeslide.streaming.stores import store_bytes
from wholeslide.streaming.tiles import partition, tile_side

CPU = torch.device("cpu")
LARGEST = Size(2000, 1500)


@pytest.mark.parametrize(
    ("text", "expected_bytes"),
    [
        ("8GiB", 8 * 2**30),
        ("8gib", 8 * 2**30),
        ("900 MB", 900 * 10**6),
        ("1536KiB", 1536 * 1024),
        ("12345678", 12345678),
        ("12345678b", 12345678),
        ("2TB", 2 * 10**12),
        (" 3 MiB ", 3 * 2**20),
    ],
)
def test_memory(text: str, expected_bytes: int) -> None:
    assert parse_memory(text) == expected_bytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "8 apples", "-8GiB", "0GiB", "1e9", "8GiB 2", "8,5GiB", "nan", "8", "512KiB"]
)
def test_what_is_no_memory_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_memory(text)
    assert str(caught.value) == f"not a size of memory (--memory {text}): write for example 8GiB or 900MiB"


PLAN = Plan(
    execution=Execution("bf16", True),
    store="host",
    tile_px=(512, 540, 720),
    kept_px=(0, 200_000, 1_000_000),
    largest=Size(8698, 7496),
    predicted_peak_bytes=2**30,
    seconds_per_megapixel=1.25,
    inference_seconds_per_megapixel=0.5,
)


def test_a_plan_survives_json() -> None:
    assert Plan.from_dict(json.loads(json.dumps(PLAN.to_dict()))) == PLAN


@pytest.mark.parametrize(
    "damage",
    [
        {"execution": None},
        {"largest": {"width": 3}},
        {"unknown": 1},
        {"execution": {"precision": "bf16"}},
        {"tile_px": 5},
    ],
    ids=str,
)
def test_a_damaged_plan_is_refused(damage: dict[str, Any]) -> None:
    with pytest.raises(RunError, match=r"not a plan \(plan.json\): start a new run"):
        Plan.from_dict({**PLAN.to_dict(), **damage})


@pytest.mark.parametrize(("precision", "tried"), [("auto", {"fp32", "bf16"}), ("fp64", {"fp64"}), ("bf16", {"bf16"})])
def test_candidates(precision: Any, tried: set[str]) -> None:
    found = candidates(precision)
    assert {c.precision for c in found} == tried
    assert len(found) == len(set(found)) == 2 * len(tried)
    assert {c.channels_last for c in found} == {True, False}


def test_types_of_an_execution() -> None:
    assert [Execution(p, True).store_dtype for p in ("fp32", "bf16", "fp64")] == [
        torch.float32,
        torch.bfloat16,
        torch.float64,
    ]
    assert [Execution(p, True).parameter_dtype for p in ("fp32", "bf16", "fp64")] == [
        torch.float32,
        torch.float32,
        torch.float64,
    ]


def test_arrangement_changes_the_layout_and_not_the_values() -> None:
    x = torch.randn(1, 3, 4, 5)
    last, first = Execution("fp32", True).arrange(x), Execution("fp32", False).arrange(x)
    assert torch.equal(last, x)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert first.is_contiguous()


@pytest.fixture(scope="module")
def network() -> LocalNetwork:
    return build_network(
        ModelConfig(backbone="resnet10t", stages=2, weights="random"),
        classes=2,
        pixel_mean=(0.5,) * 3,
        pixel_std=(0.2,) * 3,
        seed=0,
    )


def plan(network: LocalNetwork, **config: Any) -> Plan:
    return make_plan(network, LARGEST, StreamingConfig(precision="fp32", **config), CPU)


def test_the_default_plan(network: LocalNetwork) -> None:
    found = plan(network)
    assert found.execution.precision == "fp32"
    assert found.store == "host"
    assert found.largest == LARGEST
    assert len(found.tile_px) == network.depth + 1
    assert found.seconds_per_megapixel > found.inference_seconds_per_megapixel > 0
    assert found.predicted_peak_bytes > 0


def test_a_plan_with_all_that_it_was_made_from_survives_json(network: LocalNetwork) -> None:
    found = plan(network)
    assert len(found.needs) == network.depth + 1
    assert Plan.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_the_least_memory_is_what_just_fits(network: LocalNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "process_bytes", lambda *_, **__: 100 * 2**20)
    least_bytes = least_memory(network, LARGEST, StreamingConfig(precision="fp32"), Execution("fp32", True), CPU)
    assert 0 < least_bytes < 2**30
    with pytest.raises(NotEnoughMemoryError) as caught:
        plan(network, memory=str(int(0.98 * least_bytes)))
    assert caught.value.needed_bytes == pytest.approx(least_bytes, rel=0.01)


def test_a_tile_that_the_user_names_is_taken(network: LocalNetwork) -> None:
    assert plan(network, tile=300).tile_px == (300, 300, 300)


def test_more_memory_never_costs_more_computing(monkeypatch: pytest.MonkeyPatch) -> None:
    # Without decoders, which need so much that graphs fit beside.
    config = ModelConfig(backbone="resnet10t", stages=2, weights="random", reconstruction=False)
    network = build_network(config, classes=2, pixel_mean=(0.5,) * 3, pixel_std=(0.2,) * 3, seed=0)
    monkeypatch.setattr(planner, "process_bytes", lambda *_, **__: 100 * 2**20)
    plans = [plan(network, memory=memory) for memory in ("350MiB", "420MiB", "16GiB")]
    for smaller, larger in itertools.pairwise(plans):
        assert smaller.seconds_per_megapixel >= larger.seconds_per_megapixel
        assert smaller.predicted_peak_bytes <= larger.predicted_peak_bytes
    assert plans[0].seconds_per_megapixel > plans[-1].seconds_per_megapixel  # something is computed twice
    assert min(plans[-1].kept_px[1:]) > 0


@pytest.mark.parametrize("memory", ["900MiB", "1500MiB", "3GiB"])
def test_a_plan_keeps_to_the_limit(network: LocalNetwork, monkeypatch: pytest.MonkeyPatch, memory: str) -> None:
    held_bytes = 100 * 2**20
    monkeypatch.setattr(planner, "process_bytes", lambda *_, **__: held_bytes)
    assert plan(network, memory=memory).predicted_peak_bytes + held_bytes <= parse_memory(memory)


@pytest.mark.parametrize("memory", ["720MiB", "900MiB", "1500MiB"])
@pytest.mark.parametrize(
    "shape", ["2000x1500", "1500x2000", "1732x1732", "3000x1000", "6000x500", "1999x900", "300x200"]
)
def test_the_limit_holds_for_other_shapes_of_the_same_area(
    network: LocalNetwork, monkeypatch: pytest.MonkeyPatch, memory: str, shape: str
) -> None:
    """What the tiles of a view take, counted from the tiles themselves."""
    held_bytes = 100 * 2**20
    monkeypatch.setattr(planner, "process_bytes", lambda *_, **__: held_bytes)
    found = plan(network, memory=memory)
    view = network.padded_size(Size.parse(shape))
    for number in range(1, network.depth + 1):
        stage, kept_px = network.stage(number), found.kept_px[number]
        cell_px = stage.stride // stage.locality.stride
        side = tile_side(found.tile_px[number], stride_px=stage.stride, align=network.head(number).kernel)
        input_size = network.feature_size(view, number - 1)
        tiles = partition(input_size, stage.locality, tile_cells=side, align=network.head(number).kernel)
        windows_px = [tile.cell_window.size.area * cell_px**2 for tile in tiles]
        kept_px = min(kept_px, sum(windows_px))
        cost = tile_cost(network, number, found.execution, CPU, training=True)
        graphs_bytes = max(cost.graph_bytes(kept_px), cost.graph_bytes(max(windows_px)))
        step_bytes = graphs_bytes + cost.flight_bytes(max(windows_px))
        assert step_bytes + store_bytes(network, view, number, found.execution) <= found.predicted_peak_bytes
    assert found.predicted_peak_bytes + held_bytes <= parse_memory(memory)


def test_a_prediction_needs_less_memory_than_training(network: LocalNetwork) -> None:
    config = StreamingConfig(precision="fp32", memory="smallest")
    prediction, training = (make_plan(network, LARGEST, config, CPU, training=training) for training in (False, True))
    assert prediction.predicted_peak_bytes < training.predicted_peak_bytes
    assert set(prediction.kept_px) == {0}


def test_too_little_memory_is_refused_with_what_would_do(
    network: LocalNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner, "process_bytes", lambda *_, **__: 100 * 2**20)
    with pytest.raises(ConfigError) as caught:
        plan(network, memory="120MiB")
    text = str(caught.value)
    assert text.startswith("not enough memory for a slide of 2000x1500 pixels (--memory 120MiB): give at least ")
    advised = re.search(r"give at least (\S+)$", text)
    assert advised is not None
    assert plan(network, memory=advised[1]).tile_px  # what it names does fit


@pytest.mark.parametrize("over_baseline_bytes", [600 * 2**20, 2**30])
def test_a_limit_over_the_baseline_counts_nothing_but_the_step(network: LocalNetwork, over_baseline_bytes: int) -> None:
    config = StreamingConfig(precision="fp32", memory="smallest")
    found = make_plan(network, LARGEST, config, CPU, over_baseline_bytes=over_baseline_bytes)
    assert found.predicted_peak_bytes <= over_baseline_bytes
    assert found.predicted_peak_bytes >= plan(network, memory="smallest").predicted_peak_bytes


def test_too_little_over_the_baseline_is_refused_with_what_would_do(network: LocalNetwork) -> None:
    config = StreamingConfig(precision="fp32")
    with pytest.raises(ConfigError) as caught:
        make_plan(network, LARGEST, config, CPU, over_baseline_bytes=20 * 2**20)
    advised = re.search(r"pixels \(--over-baseline 20MiB\): give at least (\S+)$", str(caught.value))
    assert advised is not None
    enough_bytes = parse_memory(advised[1], option="--over-baseline")
    assert make_plan(network, LARGEST, config, CPU, over_baseline_bytes=enough_bytes).tile_px


def test_tiles_are_whole_steps_of_the_classifiers_grid(network: LocalNetwork) -> None:
    sides = plan(network).tile_px
    for number in (1, 2):
        assert sides[number] % (network.stage(number).stride * network.head(number).kernel) == 0


def test_where_features_are_kept_is_the_users_choice(network: LocalNetwork) -> None:
    assert plan(network, store="device").store == "device"
    assert plan(network, store="host").store == "host"


def test_the_smallest_plan_is_not_larger_than_the_default(network: LocalNetwork) -> None:
    smallest, default = plan(network, memory="smallest"), plan(network)
    assert smallest.predicted_peak_bytes < default.predicted_peak_bytes
    assert smallest.needs[1].freed_bytes < default.needs[1].freed_bytes


def test_a_grid_that_grows_with_the_slide_is_planned_for(network: LocalNetwork) -> None:
    """z of the first stage of 10 gigapixels is 64 channels for each square of its classifier's kernel."""
    huge = Size(100_000, 100_000)
    needs = make_plan(network, huge, StreamingConfig(precision="fp32", memory="smallest"), CPU).needs[1]
    side_px = network.stage(1).stride * network.head(1).kernel
    cells = (100_000 // side_px) ** 2
    assert needs.grid_bytes >= cells * network.head(1).to_grid.out_channels * 4
    assert needs.fixed_bytes > needs.grid_bytes
    assert needs.peak_bytes(TileChoice(side_px, 0)) > needs.fixed_bytes


def test_fp64_is_planned_for_checking() -> None:
    small = build_network(
        ModelConfig(backbone="test_convnext", stages=1, weights="random"),
        classes=2,
        pixel_mean=(0.5,) * 3,
        pixel_std=(0.2,) * 3,
        seed=0,
    )
    found = make_plan(small, Size(300, 300), StreamingConfig(precision="fp64", tile=96), CPU)
    assert found.execution.precision == "fp64"
    assert next(small.parameters()).dtype == torch.float64


def test_a_stage_whose_least_tile_is_larger_than_the_usual_probes_is_counted() -> None:
    config = ModelConfig(backbone="test_resnet", stages=4, weights="random", first_stride=8)
    network = build_network(config, classes=2, pixel_mean=(0.5,) * 3, pixel_std=(0.5,) * 3, seed=0)
    execution = Execution("fp32", channels_last=True)
    costs = [tile_cost(network, number, execution, CPU, training=True) for number in range(1, 5)]
    assert costs[-1].step_px == 128 * 5
    assert all(cost.graph_bytes_per_px > 0 for cost in costs)
