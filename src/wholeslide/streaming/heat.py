"""What a stage's classifier looked at, and what speaks for each class, cell by cell.

Attention is the classifier's own, on its grid. The evidence for a class is, for each cell of x_k, the sum over channels of its
features times the gradient of the class's logit with respect to them, through the classifier only: Grad-CAM (Selvaraju et al.
2017) with the gradient of each cell in place of its mean over cells, so that what stands at a place is what that place
contributes (HiResCAM, Draelos & Carin 2020). The first layer of the classifier is linear and without a bias, so the evidence of
the cells below a cell of the grid adds up to z times the gradient of z.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wholeslide.streaming.grid import ROWS_OF_A_PART
from wholeslide.streaming.grid_gradient import Decision, classify
from wholeslide.streaming.stage_pass import StagePass

Map = npt.NDArray[np.float32]

MOST_CELLS = 2**22
"""Of the evidence of a stage, all classes together; where x_k has more, it is summed over the cells of the grid."""


@dataclass(frozen=True, eq=False)
class StageHeat:
    """One stage's classifier on one view. Cells are square and lie at multiples of their side from the view's upper left corner.

    Attributes:
        number: of the stage, from 1.
        probabilities_c: of the classes, float64.
        attention_hw: of each cell of the grid; all together add up to one.
        attention_px: the side of such a cell in pixels of the view.
        evidence_chw: for each class, of each cell of x_k, in units of the logit.
        evidence_px: the side of such a cell in pixels of the view.
    """

    number: int
    probabilities_c: npt.NDArray[np.float64]
    attention_hw: Map
    attention_px: int
    evidence_chw: Map
    evidence_px: int


def stage_heat(work: StagePass, *, stride_px: int, number: int) -> StageHeat:
    """Of a stage whose x_k and z have been computed; both are still there.

    Args:
        work: with its features kept, the last stage's too.
        stride_px: pixels of a cell of x_k.
        number: of the stage.
    """
    head, layout = work.head, work.layout
    classes = head.logits.out_features
    with _untrained(head):
        with torch.no_grad():
            output = head(torch.split(work.z_nc, ROWS_OF_A_PART), layout.counts(work.z_nc))
            attention_hw = layout.whole(output.attention_n[:, None])[0, 0]
        fine = classes * work.x_size.area <= MOST_CELLS
        evidence = [_evidence(work, label, fine=fine) for label in range(classes)]
    return StageHeat(
        number,
        torch.softmax(output.logits.double(), dim=0).cpu().numpy(),
        attention_hw.float().cpu().numpy(),
        stride_px * head.kernel,
        np.stack(evidence),
        stride_px if fine else stride_px * head.kernel,
    )


def _evidence(work: StagePass, label: int, *, fine: bool) -> Map:
    """For one class: of the cells of x_k where ``fine``, else of those of the grid."""
    layout, gradient_nc = work.layout, work.z_nc.clone()
    classify(work.head, _logit(label), gradient_nc, layout)
    with torch.no_grad():
        gradient_nc /= layout.counts(gradient_nc)[:, None]  # of one of the cells that a row stands for
        if fine:
            return _evidence_of_cells(work, gradient_nc)
        found: Map = layout.whole((gradient_nc * work.z_nc).sum(dim=1, keepdim=True))[0, 0].float().cpu().numpy()
        return found


def _evidence_of_cells(work: StagePass, gradient_nc: Tensor) -> Map:
    """Of each cell of x_k, from the gradient of one cell of each row of z."""
    assert work.x is not None
    found: Map = np.empty((work.x_size.height, work.x_size.width), np.float32)
    if work.lone is not None:
        assert work.x.constant_c is not None
        constant_1chw = work.x.constant_c[None, :, None, None]
        pattern_hw = _product(constant_1chw, _sent_back(work, gradient_nc[-1][None, :, None, None]))
        repeats = tuple(-(-length // work.head.kernel) for length in found.shape)
        found[:] = np.tile(pattern_hw, repeats)[: found.shape[0], : found.shape[1]]
    features = work.x.regions(tile.cell_own for tile in work.tiles)
    for tile, x_bchw in zip(work.tiles, features, strict=True):
        gradient_bchw = work.grid_gradient(tile, gradient_nc)
        assert gradient_bchw is not None
        height, width = x_bchw.shape[-2:]  # what is padded has no features
        sent_bchw = _sent_back(work, gradient_bchw)[:, :, :height, :width]
        found[tile.cell_own.rows_columns] = _product(x_bchw, sent_bchw)
    return found


def _sent_back(work: StagePass, gradient_bchw: Tensor) -> Tensor:
    """The gradient of the cells of x_k below some cells of the grid."""
    weight = work.head.to_grid.weight
    return F.conv_transpose2d(gradient_bchw.to(weight.dtype), weight, stride=work.head.kernel)


def _product(x_bchw: Tensor, gradient_bchw: Tensor) -> Map:
    """Summed over the channels of a single map."""
    found: Map = (x_bchw.to(gradient_bchw.dtype) * gradient_bchw).sum(dim=1)[0].float().cpu().numpy()
    return found


def _logit(label: int) -> Decision:
    return lambda logits: (logits[label], torch.softmax(logits.detach().double(), dim=0))


@contextmanager
def _untrained(head: nn.Module) -> Iterator[None]:
    """A block in which a classifier's parameters gather no gradients."""
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
