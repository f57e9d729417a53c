"""Features between stages: written by tile, read by region."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wholeslide.geometry import Box, Size
from wholeslide.streaming import stores
from wholeslide.streaming.stores import FeatureStore, PagePool, StorePlace, TensorStore, open_store

CPU = torch.device("cpu")


PLACES: list[StorePlace] = ["host", "device", "disk"]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> StorePlace:
    chosen: StorePlace = request.param
    return chosen


def empty(place: StorePlace, dtype: torch.dtype = torch.float32) -> FeatureStore:
    return open_store(place, Size(7, 5), 3, dtype=dtype, device=CPU)


@settings(max_examples=60, deadline=None)
@given(place=st.sampled_from(PLACES), cut_x=st.integers(0, 7), cut_y=st.integers(0, 5), data=st.data())
def test_what_tiles_write_regions_read(place: StorePlace, cut_x: int, cut_y: int, data: st.DataObject) -> None:
    x = torch.randn(1, 3, 5, 7)
    store = empty(place)
    for left, right in ((0, cut_x), (cut_x, 7)):
        for top, bottom in ((0, cut_y), (cut_y, 5)):
            store.write(Box.from_edges(left, top, right, bottom), x[:, :, top:bottom, left:right])
    left, top = data.draw(st.integers(0, 6)), data.draw(st.integers(0, 4))
    box = Box.from_edges(left, top, data.draw(st.integers(left, 7)), data.draw(st.integers(top, 5)))
    found = store.read(box)
    assert found.shape == (1, 3, box.height, box.width)
    assert torch.equal(found, x[:, :, box.top : box.bottom, box.left : box.right])


def test_a_read_is_a_copy(place: StorePlace) -> None:
    """Stages may work in place on what they read."""
    store = empty(place)
    everything = Box.covering(store.size)
    store.write(everything, torch.ones(1, 3, 5, 7))
    store.read(everything).zero_()
    assert torch.equal(store.read(everything), torch.ones(1, 3, 5, 7))
    part = Box(0, 0, 7, 2)
    store.read(part).zero_()
    assert torch.equal(store.read(part), torch.ones(1, 3, 2, 7))


def test_features_are_rounded_to_the_stores_type(place: StorePlace) -> None:
    store = empty(place, torch.bfloat16)
    store.write(Box.covering(store.size), torch.full((1, 3, 5, 7), 1.001))
    found = store.read(Box(0, 0, 1, 1))
    assert found.dtype == torch.bfloat16
    assert (found == 1).all()


@pytest.mark.parametrize(("dtype", "item_bytes"), [(torch.bfloat16, 2), (torch.float32, 4), (torch.float64, 8)])
def test_bytes_and_their_return(place: StorePlace, dtype: torch.dtype, item_bytes: int) -> None:
    store = empty(place, dtype)
    assert store.nbytes == 0
    store.write(Box(0, 0, 7, 4), torch.zeros(1, 3, 4, 7))
    assert store.nbytes == 7 * 4 * 3 * item_bytes
    store.close()
    store.close()
    assert store.nbytes == 0


def test_a_read_is_channels_last_in_every_stride(place: StorePlace) -> None:
    """Convolutions look at the batch's stride, too: where it does not fit, they run channels first."""
    store = empty(place)
    store.write(Box.covering(store.size), torch.zeros(1, 3, 5, 7))
    assert store.read(Box(1, 1, 4, 3)).stride() == (4 * 3 * 3, 1, 4 * 3, 3)


def test_cells_that_no_tile_wrote_are_the_constant(place: StorePlace) -> None:
    store = empty(place)
    store.constant_c = torch.tensor([1.0, 2.0, 3.0])
    x = torch.randn(1, 3, 2, 4)
    store.write(Box(3, 1, 4, 2), x)
    expected = torch.tensor([1.0, 2.0, 3.0])[None, :, None, None].expand(1, 3, 5, 7).clone()
    expected[:, :, 1:3, 3:] = x
    assert torch.equal(store.read(Box.covering(store.size)), expected)
    assert torch.equal(store.read(Box(0, 3, 2, 2)), expected[:, :, 3:, :2])


def test_tiles_of_many_pages_are_all_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "_PAGE_BYTES", 100)
    store, x = empty("host"), torch.randn(1, 3, 5, 7)
    for top in range(5):
        store.write(Box(0, top, 7, 1), x[:, :, top : top + 1])
    assert torch.equal(store.read(Box.covering(store.size)), x)


def test_regions_come_in_order(place: StorePlace) -> None:
    store, x = empty(place), torch.randn(1, 3, 5, 7)
    store.write(Box.covering(store.size), x)
    boxes = [Box(column, row, 3, 2) for row in range(4) for column in range(5)]
    for box, found in zip(boxes, store.regions(boxes), strict=True):
        assert torch.equal(found, x[:, :, box.top : box.bottom, box.left : box.right])
    assert list(store.regions([])) == []


def test_pages_are_handed_on_once_they_are_kept() -> None:
    pool = PagePool()
    first = TensorStore(Size(9, 4), 3, dtype=torch.float32, place=CPU, device=CPU, pool=pool)
    first.write(Box(0, 0, 9, 4), torch.ones((1, 3, 4, 9)))
    address = first._features_hwc[0].data_ptr()
    first.close()
    assert pool._pages == []  # as in training
    pool.keep(True)
    first.write(Box(0, 0, 9, 4), torch.ones((1, 3, 4, 9)))
    address = first._features_hwc[0].data_ptr()
    first.close()
    second = TensorStore(Size(6, 6), 6, dtype=torch.bfloat16, place=CPU, device=CPU, pool=pool)  # as many bytes
    features = torch.arange(216, dtype=torch.bfloat16).view(1, 6, 6, 6)
    second.write(Box(0, 0, 6, 6), features)
    assert second._features_hwc[0].data_ptr() == address
    assert torch.equal(second.read(Box(0, 0, 6, 6)), features)
    third = TensorStore(Size(6, 6), 6, dtype=torch.bfloat16, place=CPU, device=CPU, pool=pool)
    third.write(Box(0, 0, 6, 6), features + 1)  # while the second lives: another page
    assert torch.equal(second.read(Box(0, 0, 6, 6)), features)
    second.close()
    third.close()
    assert len(pool._pages) == 2
    pool.keep(False)
    assert pool._pages == []
