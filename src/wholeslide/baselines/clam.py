"""Attention with a second loss on the patches that it attends to most and least (CLAM, Lu et al. 2021)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from wholeslide.baselines.aggregator import Aggregator, BagOutput, cross_entropy
from wholeslide.baselines.attention import Attention


class CLAM(Aggregator):
    """CLAM-SB, with one branch of attention, and CLAM-MB, with one for each class.

    The patches that the branch of the true class attends to most are taught to be evidence for it, and those that it attends to
    least to be none; with ``subtyping``, what is attended to most is also taught to be no evidence for the other classes. A bag
    with fewer than twice ``instances`` patches gives half of them each, so that no patch is taught both.

    Args:
        features: width D of a patch's features.
        classes: number of classes C, two or more.
        branches: ``"one"`` branch of attention, or one for each of the ``"classes"``.
        width: of the features that are pooled.
        attention_width: of the hidden layers of attention.
        dropout: on the pooled features and within attention.
        instances: patches that are taught, at each end of attention.
        subtyping: whether classes exclude each other for each patch, too.
        bag_weight: share of the slide's loss; the rest is the patches'.
    """

    def __init__(
        self,
        features: int,
        classes: int,
        *,
        branches: Literal["one", "classes"] = "one",
        width: int = 512,
        attention_width: int = 256,
        dropout: float = 0.25,
        instances: int = 8,
        subtyping: bool = False,
        bag_weight: float = 0.7,
    ) -> None:
        super().__init__()
        self.instances, self.subtyping, self.bag_weight = instances, subtyping, bag_weight
        self.embedding = nn.Sequential(nn.Linear(features, width), nn.ReLU(), nn.Dropout(dropout))
        self.one_branch = branches == "one"
        count = 1 if self.one_branch else classes
        self.attention = Attention(width, attention_width, gated=True, branches=count, dropout=dropout)
        outputs = [classes] if self.one_branch else [1] * classes
        self.logits = nn.ModuleList(nn.Linear(width, output) for output in outputs)
        self.instance_logits = nn.ModuleList(nn.Linear(width, 2) for _ in range(classes))

    def forward(self, bag_nd: Tensor) -> BagOutput:
        return self._classify(self.embedding(bag_nd))

    def loss(self, bag_nd: Tensor, label: int) -> tuple[Tensor, BagOutput]:
        embedded_nw = self.embedding(bag_nd)
        output = self._classify(embedded_nw)
        loss = self.bag_weight * cross_entropy(output.logits, label)
        assert output.attention_bn is not None
        return loss + (1 - self.bag_weight) * self._instance_loss(embedded_nw, output.attention_bn, label), output

    def _classify(self, embedded_nw: Tensor) -> BagOutput:
        attention_bn = torch.softmax(self.attention(embedded_nw), dim=1)
        pooled_bw = attention_bn @ embedded_nw
        parts = [layer(pooled_w) for layer, pooled_w in zip(self.logits, pooled_bw, strict=True)]
        return BagOutput(torch.cat(parts), attention_bn)

    def _instance_loss(self, embedded_nw: Tensor, attention_bn: Tensor, label: int) -> Tensor:
        count = len(embedded_nw)
        most, least = min(self.instances, -(-count // 2)), min(self.instances, count // 2)
        losses = []
        for number, classifier in enumerate(self.instance_logits):
            attention_n = attention_bn[0 if self.one_branch else number]
            top_kw = embedded_nw[attention_n.topk(most).indices]
            if number == label:
                bottom_kw = embedded_nw[attention_n.topk(least, largest=False).indices]
                losses.append(_smooth_svm(classifier(torch.cat([top_kw, bottom_kw])), [1] * most + [0] * least))
            elif self.subtyping:
                losses.append(_smooth_svm(classifier(top_kw), [0] * most))
        return torch.stack(losses).sum() / (len(self.instance_logits) if self.subtyping else 1)


def _smooth_svm(scores_kc: Tensor, labels: list[int]) -> Tensor:
    """Smooth top-1 SVM (Berrada et al. 2018, equation 6, with α = τ = 1): mean of logsumexp_j(s_j + [j ≠ y] − s_y)."""
    target_k1 = torch.tensor(labels, device=scores_kc.device)[:, None]
    margin_kc = torch.ones_like(scores_kc).scatter_(1, target_k1, 0.0)
    return torch.logsumexp(scores_kc + margin_kc - scores_kc.gather(1, target_k1), dim=1).mean()
