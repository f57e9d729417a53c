"""Which errors mean that memory did not suffice, and which plan follows."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from wholeslide.errors import SlideError
from wholeslide.geometry import Size
from wholeslide.streaming.costs import TileCost
from wholeslide.streaming.execution import Execution
from wholeslide.streaming.needs import StageNeeds, TileChoice
from wholeslide.streaming.plan import Plan
from wholeslide.streaming.recovery import SlideMemoryError, is_out_of_memory, memory_for

TOO_MUCH = 2**60


def test_allocations_that_really_fail() -> None:
    for allocate in (
        lambda: torch.empty(TOO_MUCH, dtype=torch.uint8),
        lambda: np.empty(TOO_MUCH, np.uint8),
        lambda: bytearray(TOO_MUCH),
    ):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            allocate()
        assert is_out_of_memory(caught.value), caught.value


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:83] . DefaultCPUAllocator: not enough memory: you tried"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("could not create a primitive"),
    ],
    ids=str,
)
def test_what_devices_and_libraries_say(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("size mismatch"),
        RuntimeError("could not create a primitive descriptor for the convolution forward propagation primitive"),
        ValueError("not enough memory"),
        KeyboardInterrupt(),
        OSError(12, "x"),
    ],
)
def test_other_errors_stay_what_they_are(error: BaseException) -> None:
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)) as caught, memory_for("a.svs"):
        raise error
    assert caught.value is error


def test_the_error_names_the_slide_in_one_line() -> None:
    with pytest.raises(SlideError) as caught, memory_for("a.svs"):
        raise MemoryError
    assert isinstance(caught.value, SlideMemoryError)
    assert caught.value.file == "a.svs"
    assert str(caught.value).startswith("not enough memory (a.svs): end other programs")
    assert "\n" not in str(caught.value)


def needs(*, graph: float = 100.0, step_px: int = 54, halo_px: int = 100) -> StageNeeds:
    cost = TileCost(
        graph_bytes_per_px=graph, flight_bytes_per_px=50.0, weight_bytes=1000, step_px=step_px, halo_px=halo_px
    )
    return StageNeeds(
        cost=cost,
        view=Size(3000, 2000),
        stores_bytes=10_000,
        features_bytes=4000,
        gradients_bytes=500,
        freed_bytes=2**20,
        decoder_bytes=0,
        forward_seconds=1.0,
        backward_seconds=2.0,
        decoder_seconds=0.5,
    )


def plan() -> Plan:
    return Plan.of(
        [needs(graph=0.0), needs(), needs(halo_px=700)],
        [TileChoice(1536, 0), TileChoice(8192, 10**7), TileChoice(1000, 10**6)],
        execution=Execution("bf16", True),
        store="disk",
        elide=False,
    )


def chain(first: Plan) -> list[Plan]:
    plans = [first]
    while (smaller := plans[-1].smaller) is not None:
        plans.append(smaller)
    return plans


def test_smaller_plans_are_economical_first_and_end_at_the_smallest_tiles() -> None:
    plans = chain(plan())
    assert plans[1].tile_px == (810, 1512, 702)  # half of the view's 3000, where the tile is larger than the view
    assert [p.kept_px for p in plans[1:]] == [(0, 0, 0)] * (len(plans) - 1)
    economical = tuple(stage.cost.economical_side for stage in plan().needs)
    small = [p for p in plans if any(side < least for side, least in zip(p.tile_px, economical, strict=True))]
    assert small == plans[-len(small) :]
    assert plans[-1].tile_px == (54, 54, 54)
    assert 4 < len(plans) < 12
    for larger, smaller in itertools.pairwise(plans):
        assert smaller.predicted_peak_bytes < larger.predicted_peak_bytes
        assert (smaller.execution, smaller.store, smaller.elide) == (larger.execution, larger.store, larger.elide)
        assert smaller.seconds_per_megapixel > larger.seconds_per_megapixel


def test_a_peak_that_no_tile_lowers_leads_to_the_smallest_tiles_at_once() -> None:
    fixed = [replace(stage, decoder_bytes=10**12) for stage in plan().needs]
    stuck = Plan.of(fixed, [TileChoice(1512, 0)] * 3, execution=plan().execution, store="host")
    assert [p.tile_px for p in chain(stuck)] == [(1512,) * 3, (54,) * 3]


def test_tiles_that_are_smaller_than_economical_are_not_enlarged() -> None:
    small = replace(plan(), tile_px=(50, 100, 120))
    assert small.smaller is not None
    assert small.smaller.tile_px == (50, 100, 120)  # less is kept


def test_a_plan_without_needs_has_no_smaller_one() -> None:
    assert replace(plan(), needs=()).smaller is None


def test_features_are_written_where_the_store_is_the_disk() -> None:
    assert plan().disk_bytes == 3 * 4000
    assert replace(plan(), store="host").disk_bytes == 0


def test_time_counts_halos_and_what_is_computed_twice() -> None:
    stage = needs(halo_px=0, step_px=1000)
    windows = 6.0  # megapixels: six tiles without halo
    assert stage.training_seconds(TileChoice(1000, 0)) == pytest.approx(windows * (2 * 1.0 + 2.0) + 0.5)
    assert stage.training_seconds(TileChoice(1000, 3 * 10**6)) == pytest.approx(windows * (1.5 * 1.0 + 2.0) + 0.5)
    assert stage.training_seconds(TileChoice(1000, 10**9)) == pytest.approx(windows * (1.0 + 2.0) + 0.5)
    with_halo = needs(halo_px=500, step_px=1000)
    assert with_halo.inference_seconds(TileChoice(1000, 0)) == pytest.approx(6 * 1.5 * 1.5)
