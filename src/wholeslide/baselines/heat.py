"""What a classifier of patches looked at, and what speaks for each class, patch by patch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from wholeslide.baselines.aggregator import Aggregator


@dataclass(frozen=True, eq=False)
class PatchHeat:
    """One part of a method on one bag of N patches.

    Attributes:
        number: of the part, from 1.
        probabilities_c: of the classes, float64.
        attention_bn: each branch's, adding up to one; ``None`` where the part has none.
        evidence_cn: for each class, of each patch, its features times the gradient of the class's logit, in units of the logit.
    """

    number: int
    probabilities_c: npt.NDArray[np.float64]
    attention_bn: npt.NDArray[np.float32] | None
    evidence_cn: npt.NDArray[np.float32]


def patch_heat(aggregator: Aggregator, features_nd: Tensor, *, number: int) -> PatchHeat:
    """Of a classifier of bags, as it predicts.

    Args:
        aggregator: put into evaluation.
        features_nd: of the patches, (N, D).
        number: of the part.
    """
    leaf_nd = features_nd.detach().clone().requires_grad_()
    with torch.enable_grad():
        output = aggregator.eval()(leaf_nd)
        gradients = [torch.autograd.grad(logit, leaf_nd, retain_graph=True)[0] for logit in output.logits]
    evidence_cn = torch.stack([(leaf_nd.detach() * gradient_nd).sum(dim=1) for gradient_nd in gradients])
    attention_bn = None if output.attention_bn is None else output.attention_bn.detach().float().cpu().numpy()
    return PatchHeat(
        number, aggregator.probabilities(output).cpu().numpy(), attention_bn, evidence_cn.float().cpu().numpy()
    )
