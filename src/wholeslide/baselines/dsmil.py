"""Two streams: the patch that scores highest for a class, and attention to what is like it (DSMIL, Li et al. 2021)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wholeslide.baselines.aggregator import Aggregator, BagOutput


class DSMIL(Aggregator):
    """For each class, patches are attended to by their likeness to the one that scores highest for it.

    Each class has a sigmoid of its own, for the slide and for its highest-scoring patch; both are trained. Probabilities are the
    slide's sigmoids, divided by their sum.

    Args:
        features: width D of a patch's features.
        classes: number of classes C, two or more.
        query_width: of the vectors whose likeness is taken.
    """

    def __init__(self, features: int, classes: int, *, query_width: int = 128) -> None:
        super().__init__()
        self.instance_logits = nn.Linear(features, classes)
        self.query = nn.Sequential(
            nn.Linear(features, query_width), nn.ReLU(), nn.Linear(query_width, query_width), nn.Tanh()
        )
        self.logits = nn.Conv1d(classes, classes, kernel_size=features)

    def forward(self, bag_nd: Tensor) -> BagOutput:
        return self._classify(bag_nd, self.instance_logits(bag_nd))

    def loss(self, bag_nd: Tensor, label: int) -> tuple[Tensor, BagOutput]:
        scores_nc = self.instance_logits(bag_nd)
        output = self._classify(bag_nd, scores_nc)
        truth_c = F.one_hot(torch.tensor(label, device=bag_nd.device), scores_nc.shape[1]).to(scores_nc.dtype)
        losses = [
            F.binary_cross_entropy_with_logits(found, truth_c) for found in (output.logits, scores_nc.amax(dim=0))
        ]
        return (losses[0] + losses[1]) / 2, output

    def probabilities(self, output: BagOutput) -> Tensor:
        sigmoids_c = torch.sigmoid(output.logits.detach().double())
        return sigmoids_c / sigmoids_c.sum()

    def _classify(self, bag_nd: Tensor, scores_nc: Tensor) -> BagOutput:
        query_nq = self.query(bag_nd)
        critical_cq = query_nq[scores_nc.argmax(dim=0)]
        attention_cn = torch.softmax(critical_cq @ query_nq.T / math.sqrt(query_nq.shape[1]), dim=1)
        logits_1c1 = self.logits((attention_cn @ bag_nd)[None])
        return BagOutput(logits_1c1[0, :, 0], attention_cn)
