"""A network that turns each patch of a slide into a vector of features."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import timm.data
import torch
from torch import Tensor, nn

from wholeslide.baselines.bag import Fact
from wholeslide.baselines.config import EncoderConfig
from wholeslide.errors import ModelError
from wholeslide.model.network import set_first_stride
from wholeslide.model.weights import LITE0, TF_LITE0, create_backbone, load_weights
from wholeslide.slides.readers import Pixels
from wholeslide.streaming.execution import Execution
from wholeslide.streaming.timings import remembered

Features = npt.NDArray[np.float32]
Precision = Literal["fp32", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
_PROBE_PATCHES = 8
_ROUNDS = 3


class PatchEncoder(nn.Module):
    """A patch's features: what the backbone's pooling gives, or its last feature map averaged over its cells.

    Args:
        backbone: normalised patches, (B, 3, s, s), to (B, D), or to maps, (B, D, h, w).
        patch_px: the side s.
        pixel_mean: of the pixels in [0, 1] that are normalised to 0, for red, green and blue.
        pixel_std: the standard deviation that is normalised to 1.
        execution: arithmetic and layout of :meth:`encode`.
        made_of: what the backbone is, in words and numbers, for whoever keeps its features.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        *,
        patch_px: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        execution: Execution,
        made_of: dict[str, Fact] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = execution.arrange_parameters(backbone)
        self.patch_px = patch_px
        self.execution = execution
        self.made_of = made_of or {}
        self.register_buffer("pixel_mean", torch.tensor(list(pixel_mean), dtype=torch.float32))
        self.register_buffer("pixel_std", torch.tensor(list(pixel_std), dtype=torch.float32))
        self.eval().requires_grad_(False)

    def forward(self, patches_bchw: Tensor) -> Tensor:
        """Normalised patches, (B, 3, s, s), to features, (B, D), in fp32."""
        features: Tensor = self.backbone(patches_bchw)
        return features.float().mean(dim=(2, 3)) if features.dim() == 4 else features.float()

    def to_input(self, patches_bhwc: Pixels | npt.NDArray[np.float32]) -> Tensor:
        """Pixels from 0 to 255, (B, s, s, 3), normalised: (B, 3, s, s), channels last in memory."""
        return normalised(torch.from_numpy(patches_bhwc).to(self.pixel_mean.device), self.pixel_mean, self.pixel_std)

    @torch.inference_mode()
    def encode(self, patches_bhwc: Pixels) -> Features:
        """Pixels as they are stored, (B, s, s, 3), to features, (B, D)."""
        device = self.pixel_mean.device
        with self.execution.autocast(device):
            features_bd = self(self.execution.arrange(self.to_input(patches_bhwc)))
        encoded: Features = features_bd.cpu().numpy()
        return encoded

    def normalise_by(self, pixel_mean: Sequence[float], pixel_std: Sequence[float]) -> None:
        """Take other statistics of pixels in [0, 1], three numbers each."""
        self.pixel_mean.copy_(torch.tensor(list(pixel_mean)))
        self.pixel_std.copy_(torch.tensor(list(pixel_std)))

    def facts(self) -> dict[str, Fact]:
        """All that features depend on beside the pixels; the weights by their hash."""
        mean, std = (",".join(f"{value:.6g}" for value in stat.tolist()) for stat in (self.pixel_mean, self.pixel_std))
        return {
            **self.made_of,
            "weights_hash": _weights_hash(self.backbone),
            "patch_px": self.patch_px,
            "pixel_mean": mean,
            "pixel_std": std,
            "precision": self.execution.precision,
        }

    def seconds_a_patch(self) -> float:
        """Of :meth:`encode`, the least of a few rounds after a first one that warms up."""
        patches_bhwc = np.full((_PROBE_PATCHES, self.patch_px, self.patch_px, 3), 128, np.uint8)
        self.encode(patches_bhwc)
        times = []
        for _ in range(_ROUNDS):
            begun = time.perf_counter()
            self.encode(patches_bhwc)
            times.append(time.perf_counter() - begun)
        return min(times) / _PROBE_PATCHES


def normalised(patches_bhwc: Tensor, pixel_mean: Tensor, pixel_std: Tensor) -> Tensor:
    """From 0 to 255, (B, h, w, 3), to (B, 3, h, w) in fp32, channels last in memory."""
    return patches_bhwc.to(torch.float32, copy=True).sub_(255 * pixel_mean).div_(255 * pixel_std).permute(0, 3, 1, 2)


def build_encoder(
    config: EncoderConfig,
    *,
    pixel_mean: Sequence[float] | None = None,
    pixel_std: Sequence[float] | None = None,
    device: torch.device | None = None,
    seed: int = 0,
) -> PatchEncoder:
    """An encoder ready to run.

    Args:
        config: what the user chose. ``weights="lite0"`` takes the variant of EfficientNet-Lite0 that pads as these weights were
            trained, ``tf_efficientnet_lite0``.
        pixel_mean: three numbers in [0, 1]; left out: those that timm has with the architecture's pretrained weights.
        pixel_std: likewise.
        device: where it runs; left out: a CUDA device where there is one.
        seed: decides ``random`` weights; the global generator is left as it was.

    Raises:
        ModelError: unknown backbone, weights that are not found or do not fit, patches of a size that it does not take.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = TF_LITE0 if config.weights == "lite0" and config.backbone.partition(".")[0] == LITE0 else config.backbone
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = create_backbone(name, pooled=True)
    set_first_stride(backbone, config.first_stride)
    load_weights(backbone, name, config.weights, pooled=True)
    pretrained: dict[str, Any] = getattr(backbone, "pretrained_cfg", None) or {}
    _check_patches(backbone.eval(), config, pretrained)
    encoder = PatchEncoder(
        backbone,
        patch_px=config.patch,
        pixel_mean=pixel_mean or pretrained.get("mean", timm.data.IMAGENET_DEFAULT_MEAN),
        pixel_std=pixel_std or pretrained.get("std", timm.data.IMAGENET_DEFAULT_STD),
        execution=Execution("fp32", channels_last=True),
        made_of={
            "backbone": name,
            "weights": config.weights or "timm",
            "first_stride": "own" if config.first_stride is None else config.first_stride,
        },
    ).to(device)
    precision = _faster(encoder, device) if config.precision == "auto" else config.precision
    encoder.execution = Execution(precision, channels_last=True)
    return encoder


def _check_patches(backbone: nn.Module, config: EncoderConfig, pretrained: dict[str, Any]) -> None:
    """Raise a ModelError unless the backbone makes a vector or a map of a patch."""
    where = f"--backbone {config.backbone} --patch {config.patch}"
    try:
        with torch.inference_mode():
            shape = tuple(backbone(torch.zeros(1, 3, config.patch, config.patch)).shape)
    except (AssertionError, RuntimeError, ValueError) as error:
        own = pretrained.get("input_size", (3, "another size"))[-1]
        raise ModelError.single(
            f"the backbone does not take patches of {config.patch} pixels ({error})",
            where=where,
            remedy=f"give --patch {own}",
        ) from error
    if len(shape) not in (2, 4) or 0 in shape:
        what = f"the backbone gives features of shape {shape}, not a vector a patch"
        raise ModelError.single(what, where=where, remedy="choose another one, such as resnet34")


def _faster(encoder: PatchEncoder, device: torch.device) -> Precision:
    """The arithmetic that takes less time, measured once for this machine and network."""

    def measure() -> Precision:
        seconds: dict[Precision, float] = {}
        for precision in PRECISIONS:
            encoder.execution = Execution(precision, channels_last=True)
            seconds[precision] = encoder.seconds_a_patch()
        return min(PRECISIONS, key=seconds.__getitem__)

    facts = {name: encoder.made_of[name] for name in ("backbone", "first_stride")} | {"patch_px": encoder.patch_px}
    return remembered("encoder", facts, device, _as_precision, measure)


def _as_precision(found: Any) -> Precision:
    return PRECISIONS[PRECISIONS.index(found)]


def _weights_hash(backbone: nn.Module) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(backbone.state_dict().items()):
        array = value.detach().cpu().contiguous().numpy()
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
