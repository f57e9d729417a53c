"""TransMIL and Nyström attention on cases that numpy computes from the published formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from mil_cases import arrays, bag, cross_entropy, linear, small, softmax

from wholeslide.baselines.transmil import NystromAttention, TransMIL, pseudo_inverse

FEATURES, WIDTH, HEADS, LANDMARKS = 3, 4, 2, 5
HEAD = WIDTH // HEADS


def landmarks_of(x: np.ndarray) -> np.ndarray:
    """Means of runs of tokens; where their number is no multiple, neighbouring runs share a token."""
    tokens = len(x)
    runs = [(i * tokens // LANDMARKS, -(-(i + 1) * tokens // LANDMARKS)) for i in range(LANDMARKS)]
    return np.stack([x[start:stop].mean(axis=0) for start, stop in runs])


def approximate_inverse(a: np.ndarray, scale: float) -> np.ndarray:
    z, eye = a.T / scale, np.eye(len(a))
    for _ in range(6):
        az = a @ z
        z = 0.25 * z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az)))
    return z


def attention_by_hand(w: dict[str, np.ndarray], name: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The tokens after attention, and the mean over heads of the attention matrix."""
    tokens = len(x)
    queries, keys, values = np.split(linear(w, f"{name}to_qkv", x), 3, axis=1)
    heads = [slice(h * HEAD, (h + 1) * HEAD) for h in range(HEADS)]
    q, k = [queries[:, h] / math.sqrt(HEAD) for h in heads], [keys[:, h] for h in heads]
    if tokens <= LANDMARKS:
        matrices = [softmax(a @ b.T) for a, b in zip(q, k, strict=True)]
    else:
        among = [softmax(landmarks_of(a) @ landmarks_of(b).T) for a, b in zip(q, k, strict=True)]
        scale = max(a.sum(axis=1).max() for a in among) * max(a.sum(axis=0).max() for a in among)
        matrices = [
            softmax(a @ landmarks_of(b).T) @ approximate_inverse(m, scale) @ softmax(landmarks_of(a) @ b.T)
            for a, b, m in zip(q, k, among, strict=True)
        ]
    mixed = []
    for h, (head, matrix) in enumerate(zip(heads, matrices, strict=True)):
        value, kernel = values[:, head], w[f"{name}order.weight"][h, 0, :, 0]
        assert len(kernel) == 33
        padded = np.pad(value, ((16, 16), (0, 0)))
        mixed.append(matrix @ value + np.stack([kernel @ padded[t : t + 33] for t in range(tokens)]))
    return linear(w, f"{name}output.0", np.concatenate(mixed, axis=1)), np.mean(matrices, axis=0)


def layer_norm(w: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(axis=-1, keepdims=True)
    scaled = centred / np.sqrt(centred.var(axis=-1, keepdims=True) + 1e-5)
    return np.asarray(scaled * w[f"{name}.weight"] + w[f"{name}.bias"])


def position_by_hand(w: dict[str, np.ndarray], x: np.ndarray, side: int) -> np.ndarray:
    """Each token of the square plus three depthwise convolutions around it."""
    square = x.reshape(side, side, WIDTH)
    total = square.copy()
    for number, kernel_px in enumerate((7, 5, 3)):
        kernel, bias = (w[f"position.convolutions.{number}.{part}"] for part in ("weight", "bias"))
        reach = kernel_px // 2
        padded = np.pad(square, ((reach, reach), (reach, reach), (0, 0)))
        for row in range(side):
            for column in range(side):
                window = padded[row : row + kernel_px, column : column + kernel_px]
                total[row, column] += np.einsum("ijc,cij->c", window, kernel[:, 0]) + bias
    return total.reshape(-1, WIDTH)


def whole_by_hand(w: dict[str, np.ndarray], patches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and the attention of the class token to each patch."""
    count, side = len(patches), math.ceil(math.sqrt(len(patches)))
    embedded = np.maximum(linear(w, "embedding", patches), 0)
    embedded = np.concatenate([embedded, embedded[: side * side - count]])
    tokens = np.concatenate([w["class_token"], embedded])
    tokens = tokens + attention_by_hand(w, "first.attention.", layer_norm(w, "first.norm", tokens))[0]
    tokens[1:] = position_by_hand(w, tokens[1:], side)
    mixed, matrix = attention_by_hand(w, "second.attention.", layer_norm(w, "second.norm", tokens))
    given = np.maximum(matrix[0, 1:], 1e-12)
    share = given[:count].copy()
    share[: side * side - count] += given[count:]
    return linear(w, "logits", layer_norm(w, "norm", tokens + mixed)[0]), share / share.sum()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 9, 12, 30])
def test_the_whole_by_hand(count: int) -> None:
    """Full squares and those filled up with the first patches, fewer and more tokens than landmarks."""
    model = small("transmil", FEATURES, 3, width=WIDTH, heads=HEADS, landmarks=LANDMARKS).double().eval()
    patches = bag(count, FEATURES, seed=count).double()
    logits, attention = whole_by_hand(arrays(model), patches.numpy())
    for label in range(3):
        loss, output = model.loss(patches, label)
        np.testing.assert_allclose(output.logits.detach().numpy(), logits, atol=1e-11)
        assert output.attention_bn is not None
        np.testing.assert_allclose(output.attention_bn[0].numpy(), attention, atol=1e-11)
        assert loss.item() == pytest.approx(cross_entropy(logits, label), rel=1e-9)


@pytest.mark.parametrize("tokens", [1, 5, 6, 10, 23])
def test_attention_by_hand(tokens: int) -> None:
    """The landmarks fit or do not; the first token's row is the matrix's."""
    torch.manual_seed(0)
    layer = NystromAttention(WIDTH, heads=HEADS, landmarks=LANDMARKS, dropout=0.0).double()
    x = bag(tokens, WIDTH, seed=tokens).double()
    mixed, matrix = attention_by_hand(arrays(layer), "", x.numpy())
    np.testing.assert_allclose(layer(x).detach().numpy(), mixed, atol=1e-12)
    np.testing.assert_allclose(layer.of_the_first(x).detach().numpy(), matrix[0], atol=1e-12)


def test_the_pseudo_inverse_approaches_the_true_one() -> None:
    logits = 3 * np.eye(6) + np.random.default_rng(0).normal(size=(2, 6, 6))
    matrices = softmax(logits)
    found = pseudo_inverse(torch.from_numpy(matrices), 12).numpy()
    np.testing.assert_allclose(found, np.linalg.pinv(matrices), atol=1e-9)
    six = np.abs(pseudo_inverse(torch.from_numpy(matrices), 6).numpy() @ matrices - np.eye(6)).max()
    assert six < 0.02


def test_landmarks_are_near_to_exact_attention() -> None:
    """Tokens that come in runs of like ones are what landmarks stand for."""
    torch.manual_seed(0)
    layer = NystromAttention(WIDTH, heads=HEADS, landmarks=LANDMARKS, dropout=0.0, iterations=20).double()
    x = (2 * bag(LANDMARKS, WIDTH).double()).repeat_interleave(4, dim=0)
    approximate = layer(x)
    layer.landmarks = len(x)
    torch.testing.assert_close(approximate, layer(x), atol=1e-6, rtol=0)


def test_its_widths_are_published() -> None:
    model = TransMIL(1024, 2)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.dim() > 1}
    layers = {
        f"{layer}.attention.{part}.weight": shape
        for layer in ("first", "second")
        for part, shape in {"to_qkv": (1536, 512), "order": (8, 1, 33, 1), "output.0": (512, 512)}.items()
    }
    kernels = {f"position.convolutions.{n}.weight": (512, 1, k, k) for n, k in enumerate((7, 5, 3))}
    assert shapes == {
        "class_token": (1, 512),
        "embedding.weight": (512, 1024),
        "logits.weight": (2, 512),
        **layers,
        **kernels,
    }
    assert model.first.attention.landmarks == 256
    assert model.first.attention.iterations == 6
    assert model.first.attention.output[1].p == 0.1
