"""A transformer over all patches of a slide (TransMIL, Shao et al. 2021), with Nyström attention (Xiong et al. 2021)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wholeslide.baselines.aggregator import Aggregator, BagOutput


class TransMIL(Aggregator):
    """Two layers of attention over the patches in their order, with convolutions over a square of them in between.

    The patches are repeated from the first on until they fill a square. The attention that is told is the class token's in the last
    layer, the mean of its heads.

    Args:
        features: width D of a patch's features.
        classes: number of classes, two or more.
        width: of the tokens.
        heads: of attention.
        landmarks: tokens that stand for all in the approximation; fewer tokens are attended to exactly.
        dropout: behind each attention.
    """

    def __init__(
        self,
        features: int,
        classes: int,
        *,
        width: int = 512,
        heads: int = 8,
        landmarks: int = 256,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.embedding = nn.Linear(features, width)
        self.class_token = nn.Parameter(torch.randn(1, width))
        self.first = _Layer(width, heads=heads, landmarks=landmarks, dropout=dropout)
        self.position = _PositionEncoding(width)
        self.second = _Layer(width, heads=heads, landmarks=landmarks, dropout=dropout)
        self.norm = nn.LayerNorm(width)
        self.logits = nn.Linear(width, classes)

    def forward(self, bag_nd: Tensor) -> BagOutput:
        count, side = len(bag_nd), math.isqrt(len(bag_nd) - 1) + 1
        repeated = torch.arange(side * side, device=bag_nd.device) % count
        patches_tw = torch.relu(self.embedding(bag_nd))[repeated]
        tokens_tw = self.first(torch.cat([self.class_token, patches_tw]))
        tokens_tw = torch.cat([tokens_tw[:1], self.position(tokens_tw[1:], side)])
        share_t = self.second.class_attention(tokens_tw.detach())
        tokens_tw = self.second(tokens_tw)
        share_n = torch.zeros_like(share_t[:count]).index_add_(0, repeated, share_t)
        return BagOutput(self.logits(self.norm(tokens_tw)[0]), (share_n / share_n.sum())[None])


class _Layer(nn.Module):
    """Attention with a norm before it and the tokens themselves added."""

    def __init__(self, width: int, *, heads: int, landmarks: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = NystromAttention(width, heads=heads, landmarks=landmarks, dropout=dropout)

    def forward(self, tokens_tw: Tensor) -> Tensor:
        attended: Tensor = tokens_tw + self.attention(self.norm(tokens_tw))
        return attended

    @torch.no_grad()
    def class_attention(self, tokens_tw: Tensor) -> Tensor:
        """What the first token gives each other, (T − 1,), none below zero; at least something to each."""
        return self.attention.of_the_first(self.norm(tokens_tw))[1:].clamp(min=1e-12)


class NystromAttention(nn.Module):
    """Self-attention whose matrix is approximated through landmarks (Xiong et al. 2021, equations 13 and 14).

    Landmarks are means of as many runs of neighbouring tokens; with no more tokens than ``landmarks``, attention is exact. A
    convolution over the order of the values is added (their section 3.3).

    Args:
        width: of the tokens.
        heads: of which each is ``width // heads`` wide.
        landmarks: their number.
        dropout: on the output.
        iterations: of the pseudo-inverse.
        kernel: of the convolution.
    """

    def __init__(
        self, width: int, *, heads: int, landmarks: int, dropout: float, iterations: int = 6, kernel: int = 33
    ) -> None:
        super().__init__()
        self.heads, self.landmarks, self.iterations = heads, landmarks, iterations
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.order = nn.Conv2d(heads, heads, (kernel, 1), padding=(kernel // 2, 0), groups=heads, bias=False)
        self.output = nn.Sequential(nn.Linear(width, width), nn.Dropout(dropout))

    def forward(self, tokens_tw: Tensor) -> Tensor:
        """(T, width) to the same."""
        query_htd, key_htd, value_htd = self._parts(tokens_tw)
        if len(tokens_tw) <= self.landmarks:
            attended_htd = torch.softmax(query_htd @ key_htd.mT, dim=-1) @ value_htd
        else:
            to_landmarks, among, from_landmarks = self._factors(query_htd, key_htd)
            attended_htd = to_landmarks @ (pseudo_inverse(among, self.iterations) @ (from_landmarks @ value_htd))
        attended_htd = attended_htd + self.order(value_htd[None])[0]
        output: Tensor = self.output(attended_htd.transpose(0, 1).flatten(1))
        return output

    def of_the_first(self, tokens_tw: Tensor) -> Tensor:
        """The row of the first token, (T,), averaged over the heads."""
        query_htd, key_htd, _ = self._parts(tokens_tw)
        if len(tokens_tw) <= self.landmarks:
            return torch.softmax(query_htd[:, :1] @ key_htd.mT, dim=-1)[:, 0].mean(dim=0)
        to_landmarks, among, from_landmarks = self._factors(query_htd, key_htd)
        row_h1t = to_landmarks[:, :1] @ pseudo_inverse(among, self.iterations) @ from_landmarks
        return row_h1t[:, 0].mean(dim=0)

    def _parts(self, tokens_tw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, scaled, keys and values, each (heads, T, d)."""
        tokens, width = tokens_tw.shape
        query, key, value = self.to_qkv(tokens_tw).view(tokens, 3, self.heads, width // self.heads).permute(1, 2, 0, 3)
        return query / math.sqrt(width // self.heads), key, value

    def _factors(self, query_htd: Tensor, key_htd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens to landmarks (h, T, m), landmarks to landmarks (h, m, m), landmarks to tokens (h, m, T)."""
        queries_hmd, keys_hmd = (F.adaptive_avg_pool1d(x.mT, self.landmarks).mT for x in (query_htd, key_htd))
        pairs = ((query_htd, keys_hmd), (queries_hmd, keys_hmd), (queries_hmd, key_htd))
        to_landmarks, among, from_landmarks = (torch.softmax(query @ key.mT, dim=-1) for query, key in pairs)
        return to_landmarks, among, from_landmarks


def pseudo_inverse(matrix_hmm: Tensor, iterations: int) -> Tensor:
    """The Moore-Penrose inverse, approached by iterations of third order (Xiong et al. 2021, equation 11)."""
    magnitude = matrix_hmm.abs()
    inverse_hmm = matrix_hmm.mT / (magnitude.sum(dim=-1).amax() * magnitude.sum(dim=-2).amax())
    identity = torch.eye(matrix_hmm.shape[-1], dtype=matrix_hmm.dtype, device=matrix_hmm.device)
    for _ in range(iterations):
        product = matrix_hmm @ inverse_hmm
        inner = 15 * identity - product @ (7 * identity - product)
        inverse_hmm = inverse_hmm @ (13 * identity - product @ inner) / 4
    return inverse_hmm


class _PositionEncoding(nn.Module):
    """Depthwise convolutions of three sizes over a square of tokens, added to them."""

    def __init__(self, width: int, kernels: tuple[int, ...] = (7, 5, 3)) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width) for kernel in kernels
        )

    def forward(self, tokens_tw: Tensor, side: int) -> Tensor:
        map_1wss = tokens_tw.T.reshape(1, -1, side, side)
        encoded_1wss = map_1wss + torch.stack([layer(map_1wss) for layer in self.convolutions]).sum(dim=0)
        return encoded_1wss[0].flatten(1).T
