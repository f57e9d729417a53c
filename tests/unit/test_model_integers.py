"""Products of integers, and graphs that are rewritten to make them, against the same with real numbers."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from wholeslide.model.config import ModelConfig
from wholeslide.model.folding import folded_copy
from wholeslide.model.integer_layers import (
    IntegerProduct,
    LargestInteger,
    Normalised,
    PixelProduct,
    Range,
    Real,
    Rounded,
)
from wholeslide.model.integers import in_integers, products, rounded_nodes, without_identities
from wholeslide.model.network import LocalNetwork, build_network
from wholeslide.model.quantization import Calibration, stored_pixels
from wholeslide.verify import redraw_weights

SOURCE, SHORTCUT, RESULT = Range(8 / 255, 120), Range(9 / 255, 77), Range(20 / 255, 100)
with torch.random.fork_rng(devices=[]):
    torch.manual_seed(0)
    LAYERS = {
        "first": nn.Conv2d(3, 64, 7, stride=3, padding=3),
        "dense": nn.Conv2d(24, 32, 3, padding=1),
        "strided": nn.Conv2d(24, 40, 3, stride=2, padding=1, bias=False),
        "pointwise": nn.Conv2d(24, 32, 1, stride=2),
        "depthwise": nn.Conv2d(32, 32, 3, padding=1, groups=32),
        "dilated": nn.Conv2d(16, 16, 3, padding=2, dilation=2),
    }


def integers(shape: tuple[int, ...], seed: int) -> Tensor:
    drawn = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return drawn.contiguous(memory_format=torch.channels_last)


def held(values: Tensor) -> Tensor:
    """What eight bits of the result's range hold of them: what lies beyond is cut off."""
    return values.clamp(-RESULT.zero * RESULT.scale, (255 - RESULT.zero) * RESULT.scale)


def with_rounded_weights(layer: nn.Conv2d) -> nn.Conv2d:
    """Weights that 8 bits hold exactly, so that a product's only error is that of its result."""
    scales = layer.weight.detach().abs().amax(dim=(1, 2, 3), keepdim=True) / 127
    with torch.no_grad():
        layer.weight.copy_((layer.weight / scales).round() * scales)
    return layer


@pytest.mark.parametrize("activation", ["none", "relu", "hardtanh"])
@pytest.mark.parametrize("kind", LAYERS)
def test_products_are_right_to_half_a_level(kind: str, activation: str) -> None:
    torch.manual_seed(0)
    layer, bounds = with_rounded_weights(LAYERS[kind]), (0.0, 2.0) if activation == "hardtanh" else ()
    source = integers((1, layer.in_channels, 29, 34), 1)
    with torch.no_grad():
        expected = layer(Real(SOURCE)(source))
    expected = {"none": lambda x: x, "relu": F.relu, "hardtanh": lambda x: x.clamp(0, 2)}[activation](expected)
    found = IntegerProduct(layer, SOURCE, None, RESULT, activation, bounds)(source)
    assert (Real(RESULT)(found) - held(expected)).abs().max() <= 0.51 * RESULT.scale


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_shortcut_is_added_before_the_only_rounding(kind: str, activation: str) -> None:
    torch.manual_seed(0)
    layer = with_rounded_weights(LAYERS[kind])
    source = integers((1, layer.in_channels, 29, 34), 1)
    with torch.no_grad():
        expected = layer(Real(SOURCE)(source))
    shortcut = integers(tuple(expected.shape), 2)
    expected = expected + Real(SHORTCUT)(shortcut)
    found = IntegerProduct(layer, SOURCE, SHORTCUT, RESULT, activation, ())(source, shortcut)
    expected = F.relu(expected) if activation == "relu" else expected
    assert (Real(RESULT)(found) - held(expected)).abs().max() <= 0.51 * RESULT.scale


def test_a_channel_without_weights_is_its_bias() -> None:
    layer = nn.Conv2d(4, 4, 3, padding=1)
    nn.init.zeros_(layer.weight)
    nn.init.constant_(layer.bias, 1.0)  # type: ignore[arg-type]
    found = IntegerProduct(layer, SOURCE, None, RESULT, "none", ())(integers((1, 4, 9, 9), 0))
    torch.testing.assert_close(Real(RESULT)(found), torch.ones(1, 4, 9, 9), atol=RESULT.scale, rtol=0)


def test_rounding_there_and_back() -> None:
    x_bchw = torch.linspace(-3.5, 4, 64 * 9).view(1, 64, 3, 3)
    torch.testing.assert_close(Real(SOURCE)(Rounded(SOURCE)(x_bchw)), x_bchw, atol=SOURCE.scale / 2 + 1e-6, rtol=0)
    out_of_range = Rounded(SOURCE)(torch.tensor([[[[-99.0, 99.0]]]]))
    assert out_of_range.flatten().tolist() == [0, 255]


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [(k, s, p) for k, s, p in itertools.product((2, 3, 5), (1, 2, 3), (0, 1)) if 2 * p <= k],
)
def test_pooling_is_that_of_torch(kernel: int, stride: int, padding: int) -> None:
    layer = nn.MaxPool2d(kernel, stride, padding)
    for height, width in itertools.product((7, 8, 9, 300), (5, 11, 200)):
        source = integers((1, 4, height, width), height)
        assert torch.equal(LargestInteger(layer)(source), layer(source.float()).to(torch.uint8))


def test_pooling_that_is_not_ours_is_left_alone() -> None:
    assert not LargestInteger.replaces(nn.MaxPool2d(3, ceil_mode=True))
    assert not LargestInteger.replaces(nn.MaxPool2d(3, dilation=2))
    assert not LargestInteger.replaces(nn.AvgPool2d(3))


class Odd(nn.Module):
    """Shortcuts that are read again after they were added, or by the very convolution that they are added to; and what has no
    integers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three, self.four = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))

    def forward(self, x_bchw: Tensor) -> Tensor:
        first = self.one(x_bchw)
        total = F.relu(self.two(first) + x_bchw)
        total = F.relu(self.four(total) + total)
        bounded = F.hardtanh(self.three(total) + first, -1.0, 1.0)
        return torch.sigmoid(bounded) + x_bchw  # type: ignore[no-any-return]


def test_values_that_are_read_again_are_not_overwritten() -> None:
    torch.manual_seed(0)
    module = without_identities(folded_copy(fx.symbolic_trace(Odd().eval())))
    found = products(module)
    assert [[node.name for node in product.nodes] for product in found] == [
        ["one"],
        ["two", "add", "relu"],
        ["four", "add_1", "relu_1"],
        ["three", "add_2"],
    ]
    entry = Range(8 / 255, 128)
    source = integers((1, 8, 20, 22), 0)
    expected = module(Real(entry)(source))
    ranges = {node.name: Range(8 / 255, 128) for node in rounded_nodes(module)}
    rewritten, leaving = in_integers(module, ranges, entry=entry, leave_integers=False)
    assert leaving is None
    assert (rewritten(source) - expected).abs().mean() < 0.02


class ReadLate(nn.Module):
    """A convolution that stands before the sum which overwrites its input, and is computed behind it, with a sum of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))

    def forward(self, x_bchw: Tensor) -> Tensor:
        first = self.one(x_bchw)
        late = self.two(first)
        total = self.three(x_bchw) + first
        return late + total  # type: ignore[no-any-return]


def test_a_shortcut_is_kept_for_a_product_that_is_computed_later_than_its_convolution_stands() -> None:
    torch.manual_seed(0)
    module = without_identities(folded_copy(fx.symbolic_trace(ReadLate().eval())))
    assert [[node.name for node in product.nodes] for product in products(module)] == [
        ["one"],
        ["two", "add_1"],
        ["three", "add"],
    ]
    entry, source = Range(8 / 255, 128), integers((1, 8, 20, 22), 0)
    expected = module(Real(entry)(source))
    ranges = {node.name: Range(16 / 255, 128) for node in rounded_nodes(module)}
    rewritten, _ = in_integers(module, ranges, entry=entry, leave_integers=False)
    assert (rewritten(source) - expected).abs().mean() < 0.05


def test_a_convolution_of_pixels_sees_the_mean_around_them() -> None:
    torch.manual_seed(0)
    normalised = Normalised(torch.tensor([0.7, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.15]))
    layer, pixels_bchw = LAYERS["first"], integers((1, 3, 40, 43), 0)
    with torch.no_grad():
        expected = layer(normalised(pixels_bchw))
    to = Range(
        float(expected.max() - expected.min()) / 250,
        round(-250 * float(expected.min() / (expected.max() - expected.min()))),
    )
    found = Real(to)(PixelProduct(layer, normalised, to, "none", ())(pixels_bchw))
    error = (found - expected).abs()
    assert error.max() < 4 * to.scale
    border = torch.cat([error[:, :, 0].flatten(), error[:, :, :, 0].flatten()])
    assert border.max() < 4 * to.scale


def test_rounded_weights_see_nothing_in_pixels_of_the_mean_colour() -> None:
    torch.manual_seed(0)
    mean = torch.tensor([204, 153, 178]) / 255
    layer = nn.Conv2d(3, 64, 7)
    pixels_bchw = (255 * mean).round().to(torch.uint8).view(1, 3, 1, 1).repeat(1, 1, 12, 12)
    to = Range(0.001, 128)  # fine enough to tell; biases lie within 0.09
    found = PixelProduct(layer, Normalised(mean, torch.tensor([0.2, 0.25, 0.15])), to, "none", ())(pixels_bchw)
    assert layer.bias is not None
    expected = layer.bias.detach().view(1, 64, 1, 1).expand(found.shape)
    assert (Real(to)(found) - expected).abs().max() <= 0.51 * to.scale


@pytest.mark.parametrize(
    ("backbone", "stages", "most"),
    [
        ("resnet18", 3, 0.05),
        ("resnet26", 2, 0.06),
        ("regnetx_002", 2, 0.08),
        ("convnext_atto", 2, 0.08),
        ("vgg11_bn", 2, 0.06),
    ],
)
def test_networks_of_every_family(backbone: str, stages: int, most: float) -> None:
    network = build_network(
        ModelConfig(backbone=backbone, stages=stages, weights="random"),
        classes=2,
        pixel_mean=(0.5,) * 3,
        pixel_std=(0.2,) * 3,
        seed=0,
    )
    redraw_weights(network, 0)
    drawn = torch.rand((1, 3, 40, 40), generator=torch.Generator().manual_seed(0))
    pixels_hwc = F.interpolate(drawn, size=(256, 256), mode="bilinear")[0].permute(1, 2, 0).mul(255).byte().numpy()
    calibration = Calibration(network)
    calibration.observe(stored_pixels(pixels_hwc))
    expected = run_whole(network, network.to_input(pixels_hwc))
    found = stored_pixels(pixels_hwc)
    with torch.no_grad():
        for part in calibration.quantized():
            found = part(found)
    assert 0 < (found - expected).norm() / expected.norm() < most


@torch.no_grad()
def run_whole(network: LocalNetwork, pixels_bchw: Tensor) -> Tensor:
    x_bchw: Tensor = network.stem(pixels_bchw)
    for number in range(1, network.depth + 1):
        x_bchw = network.stage(number)(x_bchw)
    return x_bchw
