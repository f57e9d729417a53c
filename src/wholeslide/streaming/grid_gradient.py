"""A classifier's loss and the gradient of its whole grid, part by part: z becomes its own gradient, and there is no second one.

The softmax and the moments of the norm look at all rows. What they need of each is a number or a sum, so the rows pass four times:
for the moments, for the scores, for what the pooled sum and the scores send back to the moments and the weights, and, when that is
complete, for the gradient of each row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from wholeslide.model.heads import AttentionClassifier, Moments
from wholeslide.streaming.grid import ROWS_OF_A_PART, GridLayout

Decision = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From the logits, (classes,), to a scalar whose gradient is asked for, and the probabilities, (classes,)."""


def classify(
    head: AttentionClassifier,
    decide: Decision,
    z_nc: Tensor,
    layout: GridLayout,
    *,
    kept_n: Tensor | None = None,
    weight: float = 1.0,
) -> tuple[float, Tensor]:
    """The scalar that is asked for and the probabilities (classes,); the classifier's gradients are accumulated on the way.

    Args:
        head: the stage's classifier.
        decide: what becomes of its logits.
        z_nc: the rows of the whole grid, (N, C); on return, the gradient of the scalar with respect to them.
        layout: which cells the rows are.
        kept_n: how many of each row's cells survive dropout; by default all do.
        weight: factor on all gradients.
    """
    parts, count_n = torch.split(z_nc, ROWS_OF_A_PART), layout.counts(z_nc)
    with torch.no_grad():
        moments = Moments.of_rows(parts, count_n).leaves()
        scores = torch.cat([head.scores(part, moments) for part in parts])
    scores.requires_grad_()
    weights_n = head.dropped_out(head.attention(scores, count_n), count_n, kept_n)
    shares = torch.split(weights_n.detach(), ROWS_OF_A_PART)
    with torch.no_grad():
        pooled = [head.pooled(part, moments, share) for part, share in zip(parts, shares, strict=True)]
        pooled_c = torch.stack(pooled).sum(dim=0)
    pooled_c.requires_grad_()
    loss, probabilities = decide(head.decided(pooled_c))
    torch.autograd.backward([loss * weight])
    assert pooled_c.grad is not None
    with torch.no_grad():
        to_weights_n = torch.cat([head.features(part, moments) @ pooled_c.grad for part in parts])
    torch.autograd.backward([weights_n], [to_weights_n])
    assert scores.grad is not None
    to_scores = torch.split(scores.grad, ROWS_OF_A_PART)
    for part, share, to_score in zip(parts, shares, to_scores, strict=True):
        outputs = _outputs(head, part, moments, share)
        torch.autograd.backward(outputs, [to_score, pooled_c.grad])
    for part, share, to_score, through_moments in zip(parts, shares, to_scores, moments.gradients(parts), strict=True):
        leaf = part.detach().clone().requires_grad_()
        outputs = _outputs(head, leaf, moments, share)
        (direct,) = torch.autograd.grad(outputs, [leaf], [to_score, pooled_c.grad])
        part.copy_(direct + through_moments)
    return loss.item(), probabilities


def _outputs(head: AttentionClassifier, z_nc: Tensor, moments: Moments, share_n: Tensor) -> list[Tensor]:
    """The scores of some rows and their share of the pooled sum."""
    return [head.scores(z_nc, moments), head.pooled(z_nc, moments, share_n)]
