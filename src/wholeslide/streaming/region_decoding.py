"""Random feature reconstruction with its gradients, region by region, so that the decoder takes the memory of one region.

The norm between a decoder's two convolutions takes its moments from all regions. So the regions pass three times: to the norm for
its moments; from the norm to the loss and back; and, computed once more, from the norm back to the regions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from wholeslide.streaming.objective import StageObjective, head_dtype, shares_of_cells


def reconstruct(
    objective: StageObjective,
    regions_rchw: Tensor,
    targets_bchw: Sequence[Tensor],
    *,
    weight: float,
    autocast: Callable[[], AbstractContextManager[None]],
) -> tuple[float, Tensor]:
    """The reconstruction loss and its gradient for the regions, (R, C, h, w); the decoder's own are accumulated on the way.

    Args:
        objective: of the stage, which has a decoder.
        regions_rchw: of x_k.
        targets_bchw: of x_{k−1} below each of them, (1, C', h, w).
        weight: factor on all gradients.
        autocast: the precision of the convolutions.
    """
    decoder = objective.network.decoder(objective.number)
    assert decoder is not None
    regions = torch.split(regions_rchw, 1)

    def widened(region_bchw: Tensor) -> Tensor:
        with autocast():
            result: Tensor = decoder.widened(region_bchw)
        return result

    with torch.no_grad():
        widened_bchw = [widened(region) for region in regions]
        mean_c, variance_c = (moment.requires_grad_() for moment in _moments(widened_bchw))
    total = 0.0
    gradients_bchw: list[Tensor] = []
    for target, share in zip(targets_bchw, shares_of_cells(targets_bchw), strict=True):
        leaf = widened_bchw.pop(0).requires_grad_()
        with autocast():
            decoded_bchw = decoder.rebuilt(leaf, mean_c, variance_c)
        loss = objective.region_loss(decoded_bchw[0], target[0]) * share
        torch.autograd.backward([loss * weight])
        total += loss.item()
        assert leaf.grad is not None
        gradients_bchw.append(leaf.grad)
    assert mean_c.grad is not None
    assert variance_c.grad is not None
    cells = sum(gradient[0, 0].numel() for gradient in gradients_bchw)
    regions_gradient = torch.empty_like(regions_rchw)
    for index, region in enumerate(regions):
        leaf = region.detach().requires_grad_()
        result = widened(leaf)
        through_moments = mean_c.grad[:, None, None] + 2 * variance_c.grad[:, None, None] * (
            result.detach() - mean_c.detach()[:, None, None]
        )
        torch.autograd.backward([result], [(gradients_bchw.pop(0) + through_moments / cells).to(result.dtype)])
        assert leaf.grad is not None
        regions_gradient[index] = leaf.grad[0]
    return total, regions_gradient


def _moments(widened_bchw: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel, (C,), over all cells of all regions."""
    cells, dtype = sum(each[0, 0].numel() for each in widened_bchw), head_dtype(widened_bchw[0].dtype)
    mean_c = torch.stack([each.sum(dim=(0, 2, 3), dtype=dtype) for each in widened_bchw]).sum(dim=0) / cells
    squares = [(each - mean_c[:, None, None]).square().sum(dim=(0, 2, 3), dtype=dtype) for each in widened_bchw]
    return mean_c, torch.stack(squares).sum(dim=0) / cells
