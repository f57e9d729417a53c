"""An independent statement of one training step, in plain PyTorch on the whole slide.

It is written from the method's text and from timm's own modules: the network is timm's, cut by hand at its blocks; classifier,
decoder and losses are spelled out as formulas; all stages' losses are summed and sent back by one ``backward()``, with a
``detach`` at each border. From the package come only weights and random draws.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import timm
import torch
from timm.models.convnext import ConvNeXt
from timm.models.efficientnet import EfficientNet
from timm.models.regnet import RegNet
from timm.models.resnet import ResNet
from torch import Tensor, nn
from torch.nn import functional as F

from wholeslide.draws import Draws
from wholeslide.model.network import LocalNetwork

#: Divisible by every stride of the networks that are tried: 2, 4, 6, 12, 24, 48, 32.
_PROBE_PX = 192


@dataclass
class OracleStep:
    """Losses and probabilities of each stage, and each parameter's gradient by the package's name for it."""

    classification_losses: list[float] = field(default_factory=list)
    reconstruction_losses: list[float] = field(default_factory=list)
    probabilities: list[np.ndarray] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    features: list[Tensor] = field(default_factory=list)
    grids: list[Tensor] = field(default_factory=list)


class Oracle:
    """The whole-slide step of a network whose weights and cuts are copied from ``network``."""

    def __init__(self, network: LocalNetwork) -> None:
        self.config = network.config
        self.depth = len(network.stages)
        self.dtype = next(network.parameters()).dtype
        state = {key: value.detach().clone() for key, value in network.state_dict().items()}
        self.mean, self.std = state["pixel_mean"], state["pixel_std"]
        self.class_weights = state.get("classification_loss.class_weights")
        self.backbone = _timm_network(self.config.backbone, self.config.first_stride).to(self.dtype)
        self.stage_of_name = _load(self.backbone, state)
        self.stem, units = _cut(self.backbone)
        self.stages: list[list[nn.Module]] = [[] for _ in range(self.depth)]
        for prefix, modules in units:
            (stage,) = {number for name, number in self.stage_of_name.items() if name.startswith(prefix)}
            self.stages[stage - 1] += modules
        self.factors = self._factors()
        self.heads = {
            k: v.requires_grad_()
            for k, v in state.items()
            if k.startswith(("heads.", "decoders.")) and v.is_floating_point()
        }

    def step(
        self,
        pixels_hwc: np.ndarray,
        label: int,
        draws: Draws,
        *,
        weight: float = 1.0,
        stages: Collection[int] | None = None,
        dropout: bool = True,
    ) -> OracleStep:
        """Forward and backward of one slide; gradients are those of this call alone."""
        self.backbone.zero_grad()
        for value in self.heads.values():
            value.grad = None
        trained = range(1, self.depth + 1) if stages is None else stages
        result = OracleStep()
        with torch.no_grad():
            x = ((torch.from_numpy(pixels_hwc).to(self.dtype) - self.mean) / self.std).permute(2, 0, 1)[None]
            for module in self.stem:
                x = module(x)
        result.features.append(x)
        view_height_px, view_width_px = pixels_hwc.shape[:2]
        total = torch.zeros((), dtype=self.dtype)
        stride_px = self.factors[0]
        for number in range(1, self.depth + 1):
            previous = x.detach()
            x = previous
            for module in self.stages[number - 1]:
                x = module(x)
            factor = self.factors[number]
            stride_px *= factor
            z = self._grid(x, number)
            logits = self._classify(z, number, draws if dropout else None)
            loss = -torch.log_softmax(logits, 0)[label]
            if self.class_weights is not None:
                loss = loss * self.class_weights[label]
            result.classification_losses.append(loss.item())
            result.probabilities.append(torch.softmax(logits.detach(), 0).numpy())
            rebuilt = None
            if number < self.depth and self.config.reconstruction:
                rebuilt = self._rebuild(x, previous, number, draws, stride_px, factor, view_width_px * view_height_px)
            result.reconstruction_losses.append(float("nan") if rebuilt is None else rebuilt.item())
            if number in trained:
                total = total + loss + (0 if rebuilt is None else self.config.reconstruction_weight * rebuilt)
            result.features.append(x.detach())
            result.grids.append(z.detach())
        (total * weight).backward()
        result.gradients = self._gradients()
        return result

    @torch.no_grad()
    def _factors(self) -> list[int]:
        """By how much the stem and each stage shrink an image whose side every stride divides."""
        x, factors = torch.zeros((1, 3, _PROBE_PX, _PROBE_PX), dtype=self.dtype), []
        for modules in (self.stem, *self.stages):
            side = x.shape[-1]
            for module in modules:
                x = module(x)
            factors.append(side // x.shape[-1])
        return factors

    def _grid(self, x: Tensor, number: int) -> Tensor:
        kernel = self.heads[f"heads.{number - 1}.to_grid.weight"]
        side = kernel.shape[-1]
        rows, columns = -(-x.shape[-2] // side) * side, -(-x.shape[-1] // side) * side
        padded = x.new_zeros((1, x.shape[1], rows, columns))
        padded[:, :, : x.shape[-2], : x.shape[-1]] = x
        return F.conv2d(padded, kernel, stride=side)

    def _classify(self, z: Tensor, number: int, draws: Draws | None) -> Tensor:
        def p(name: str) -> Tensor:
            return self.heads[f"heads.{number - 1}.{name}"]

        cells_cn = z[0].flatten(1)
        mean = cells_cn.mean(1, keepdim=True)
        variance = ((cells_cn - mean) ** 2).mean(1, keepdim=True)
        normed_cn = (cells_cn - mean) / torch.sqrt(variance + 1e-5)
        h_nc = torch.relu(normed_cn * p("norm.weight")[:, None] + p("norm.bias")[:, None]).T
        left = torch.tanh(h_nc @ p("attention_tanh.weight").T + p("attention_tanh.bias"))
        right = torch.sigmoid(h_nc @ p("attention_gate.weight").T + p("attention_gate.bias"))
        weights_n = torch.softmax((left * right @ p("attention_score.weight").T)[:, 0], 0)
        if draws is not None:
            kept = draws.rng("dropout", stage=number).random(tuple(z.shape[-2:])) >= self.config.attention_dropout
            weights_n = weights_n * torch.from_numpy(kept).flatten() / (1 - self.config.attention_dropout)
        pooled = (weights_n[:, None] * h_nc).sum(0)
        hidden = torch.relu(p("hidden.weight") @ pooled + p("hidden.bias"))
        return p("logits.weight") @ hidden + p("logits.bias")

    def _rebuild(
        self, x: Tensor, target: Tensor, number: int, draws: Draws, stride_px: int, factor: int, area_px: int
    ) -> Tensor:
        """L1(R(S(x_k)), S(x_{k−1})): the mean over every cell of every region, cropped at the border."""

        def p(name: str) -> Tensor:
            return self.heads[f"decoders.{number - 1}.{name}"]

        region_px = self.config.reconstruction_region_px
        count = min(max(area_px // region_px**2, 1), self.config.reconstruction_regions)
        rows, columns = x.shape[-2:]
        height, width = min(region_px // stride_px, rows), min(region_px // stride_px, columns)
        rng = draws.rng("regions", stage=number)
        lefts = rng.integers(0, columns - width + 1, size=count)
        tops = rng.integers(0, rows - height + 1, size=count)
        batch = torch.stack([x[0, :, t : t + height, a : a + width] for a, t in zip(lefts, tops, strict=True)])
        if factor > 1:
            batch = F.interpolate(batch, size=(height * factor, width * factor), mode="bilinear", align_corners=False)
        batch = F.conv2d(batch, p("widen.weight"), padding=1)
        mean = batch.mean((0, 2, 3), keepdim=True)
        variance = ((batch - mean) ** 2).mean((0, 2, 3), keepdim=True)
        batch = (batch - mean) / torch.sqrt(variance + 1e-5)
        batch = torch.relu(batch * p("norm.weight")[:, None, None] + p("norm.bias")[:, None, None])
        batch = F.conv2d(batch, p("to_target.weight"), p("to_target.bias"), padding=1)
        distance, cells = torch.zeros((), dtype=self.dtype), 0
        for decoded, a, t in zip(batch, lefts * factor, tops * factor, strict=True):
            wanted = target[0, :, t : t + height * factor, a : a + width * factor]
            distance = distance + (decoded[:, : wanted.shape[1], : wanted.shape[2]] - wanted).abs().sum()
            cells += wanted.numel()
        return distance / cells

    def _gradients(self) -> dict[str, Tensor]:
        gradients = {name: value.grad for name, value in self.heads.items() if value.grad is not None}
        for name, parameter in self.backbone.named_parameters():
            if parameter.grad is not None:
                gradients[f"stages.{self.stage_of_name[name] - 1}.body.{name}"] = parameter.grad.clone()
        return gradients


def _timm_network(name: str, first_stride: int | None) -> nn.Module:
    extra = {"bn_eps": 1e-3} if name == "efficientnet_lite0" else {}
    network: nn.Module = timm.create_model(name, num_classes=0, global_pool="", **extra).eval()
    first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    if first_stride is not None:
        first.stride = (first_stride, first_stride)
    elif name.startswith("resnet"):
        first.stride = (3, 3)
    return network


def _load(backbone: nn.Module, state: dict[str, Tensor]) -> dict[str, int]:
    """Copy the weights; the stage, counted from 1, that holds each of them (0: the stem)."""
    stage_of_name, own = {}, {}
    for key, value in state.items():
        room, _, rest = key.partition(".")
        if room == "stem":
            stage, name = 0, rest.removeprefix("body.")
        elif room == "stages":
            number, _, name = rest.partition(".body.")
            stage = int(number) + 1
        else:
            continue
        assert name not in own, f"{name} is in two stages"
        stage_of_name[name], own[name] = stage, value
    missing, unexpected = backbone.load_state_dict(own, strict=False)
    # ConvNeXt's head norm comes behind the features.
    assert not unexpected
    assert all(key.startswith("head.") for key in missing), missing
    return stage_of_name


def _cut(network: nn.Module) -> tuple[list[nn.Module], list[tuple[str, list[nn.Module]]]]:
    """The stem's modules, and each block's: the prefix of its weights' names and what it runs, in timm's order."""
    units: list[tuple[str, list[nn.Module]]] = []
    if isinstance(network, ResNet):
        stem = [network.conv1, network.bn1, network.act1, network.maxpool]
        for layer in range(1, 5):
            units += [(f"layer{layer}.{i}.", [block]) for i, block in enumerate(getattr(network, f"layer{layer}"))]
    elif isinstance(network, ConvNeXt):
        stem = [network.stem]
        for s, stage in enumerate(network.stages):
            for b, block in enumerate(stage.blocks):
                units.append((f"stages.{s}.blocks.{b}.", [block] if b else [stage.downsample, block]))
        units[-1][1].append(network.norm_pre)
    elif isinstance(network, EfficientNet):
        stem = [network.conv_stem, network.bn1]
        for s, stage in enumerate(network.blocks):
            units += [(f"blocks.{s}.{b}.", [block]) for b, block in enumerate(stage)]
        units[-1][1].extend([network.conv_head, network.bn2])
    else:
        assert isinstance(network, RegNet), type(network)
        stem = [network.stem]
        for s in ("s1", "s2", "s3", "s4"):
            units += [(f"{s}.{name}.", [block]) for name, block in getattr(network, s).named_children()]
        units[-1][1].append(network.final_conv)
    return stem, units
