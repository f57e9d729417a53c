"""A convolution's gradients are the same, however many strips of rows its weights' gradient is summed over."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wholeslide.model import strips
from wholeslide.model.strips import StripConv2d

CASES = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "stride 2": {"kernel_size": 3, "padding": 1, "stride": 2},
    "7x7, stride 3": {"kernel_size": 7, "padding": 3, "stride": 3},
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "not padded": {"kernel_size": 2, "stride": 2},
    "with gaps": {"kernel_size": 2, "stride": 4},
    "one row": {"kernel_size": (1, 3), "padding": (0, 1)},
    "one column": {"kernel_size": (3, 1), "padding": (1, 0)},
}


def _layers(options: dict, *, bias: bool) -> tuple[nn.Conv2d, StripConv2d]:
    torch.manual_seed(0)
    plain = nn.Conv2d(4, 6, **options, bias=bias, dtype=torch.float64)
    striped = StripConv2d(4, 6, **options, bias=bias, dtype=torch.float64)
    striped.load_state_dict(plain.state_dict())
    return plain, striped


def _gradients(layer: nn.Conv2d, x_bchw: Tensor) -> list[Tensor]:
    x_bchw = x_bchw.detach().requires_grad_()
    output = layer(x_bchw)
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view(output.shape)
    return [output, *torch.autograd.grad((output.square() * weights).sum(), [x_bchw, *layer.parameters()])]


@pytest.fixture
def seen_rows(monkeypatch: pytest.MonkeyPatch) -> list[slice]:
    """The rows of output of each strip, as they are taken."""
    taken, made = list[slice](), strips._strips

    def noted(*args):
        for strip in made(*args):
            taken.append(strip.output)
            yield strip

    monkeypatch.setattr(strips, "_strips", noted)
    return taken


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rows", [37, 40])
@pytest.mark.parametrize("strip_bytes", [1, 2_000, 5_000])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_torchs(
    case: str,
    strip_bytes: int,
    rows: int,
    dtype: torch.dtype,
    seen_rows: list[slice],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In fp64, which torch multiplies itself, and in fp32, which oneDNN does."""
    monkeypatch.setattr(strips, "_STRIP_BYTES", strip_bytes * dtype.itemsize // 8)
    plain, striped = (layer.to(dtype) for layer in _layers(CASES[case], bias=True))
    x_bchw = torch.randn(1, 4, rows, 11, dtype=dtype).to(memory_format=torch.channels_last)
    for ours, theirs in zip(_gradients(striped, x_bchw), _gradients(plain, x_bchw), strict=True):
        error = ((ours - theirs).norm() / theirs.norm()).item()
        assert error <= (1e-13 if dtype == torch.float64 else 2e-6)
    assert len(seen_rows) > 1
    assert all(before.stop == after.start for before, after in pairwise(seen_rows))


def test_strips_are_no_larger_than_they_may_be(seen_rows: list[slice], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strips, "_STRIP_BYTES", 3_000)
    _, striped = _layers(CASES["3x3"], bias=False)
    x_bchw = torch.randn(1, 4, 64, 8, dtype=torch.float64).to(memory_format=torch.channels_last)
    _gradients(striped, x_bchw)
    assert max(rows.stop - rows.start for rows in seen_rows) * 6 * 8 * 8 <= 3_000
    assert len(seen_rows) == 10  # of at most 7 rows
    assert (seen_rows[0].start, seen_rows[-1].stop) == (0, 64)


@pytest.mark.parametrize("strip_bytes", [500, 10**6])
@pytest.mark.parametrize("trained", [("weight",), ("bias",), ()])
def test_what_is_not_asked_for_is_not_there(
    trained: tuple[str, ...], strip_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strips, "_STRIP_BYTES", strip_bytes)
    _, striped = _layers(CASES["3x3"], bias=True)
    for name, parameter in striped.named_parameters():
        parameter.requires_grad_(name in trained)
    x_bchw = torch.randn(1, 4, 9, 9, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    striped(x_bchw).sum().backward()
    assert x_bchw.grad is not None
    assert {name for name, p in striped.named_parameters() if p.grad is not None} == set(trained)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("images", [1, 2])
def test_other_maps_are_left_to_torch(images: int, layout: torch.memory_format, seen_rows: list[slice]) -> None:
    plain, striped = _layers(CASES["3x3"], bias=True)
    x_bchw = torch.randn(images, 4, 9, 9, dtype=torch.float64).to(memory_format=layout)
    for ours, theirs in zip(_gradients(striped, x_bchw), _gradients(plain, x_bchw), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert bool(seen_rows) == (images == 1 and layout == torch.channels_last)


def test_gradients_of_bf16_are_summed_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum of 64 strips in bf16 would lose about three bits."""
    torch.manual_seed(0)
    weight, bias = torch.randn(6, 4, 3, 3).bfloat16().requires_grad_(), torch.zeros(6).bfloat16().requires_grad_()
    x_bchw = torch.rand(1, 4, 64, 9).bfloat16().to(memory_format=torch.channels_last)
    output = strips._StripConvolution.apply(x_bchw, weight, bias, (1, 1), (1, 1), (1, 1), 1)
    output.backward(torch.ones_like(output))
    exact = weight.detach().double().requires_grad_()
    F.conv2d(x_bchw.double(), exact, None, 1, 1).sum().backward()
    torch.testing.assert_close(weight.grad.double(), exact.grad, rtol=2**-7, atol=0)
    assert bias.grad.tolist() == [64 * 9] * 6


def test_autocast_is_left_to_torch(seen_rows: list[slice]) -> None:
    _, striped = _layers(CASES["3x3"], bias=True)
    x_bchw = torch.randn(1, 4, 9, 9).to(memory_format=torch.channels_last).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = striped.float()(x_bchw)
    output.sum().backward()
    assert output.dtype == torch.bfloat16
    assert not seen_rows


@pytest.mark.parametrize(
    ("layer", "taken"),
    [
        (nn.Conv2d(4, 4, 3), True),
        (nn.Conv2d(4, 4, 1), False),
        (nn.Conv2d(4, 4, 3, groups=4), False),
        (nn.Conv2d(4, 4, 3, padding="same"), False),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), False),
        (nn.Conv2d(4, 4, (1, 3), padding=1), False),
        (nn.Linear(4, 4), False),
        (StripConv2d(4, 4, 3), False),
    ],
)
def test_layers_that_are_replaced(layer: nn.Module, taken: bool) -> None:
    assert StripConv2d.replaces(layer) is taken
