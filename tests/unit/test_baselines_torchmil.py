"""ABMIL and GABMIL against torchmil's, on the same weights. Its one logit of two classes is ours' difference."""

from __future__ import annotations

import pytest
import torch
from mil_cases import bag
from torch import nn
from torchmil.models import ABMIL

from wholeslide.baselines.attention import AttentionMIL


def theirs_like(ours: AttentionMIL, features: int, width: int, attention_width: int, *, gated: bool) -> ABMIL:
    embedding = nn.Sequential(nn.Linear(features, width), nn.ReLU())
    theirs = ABMIL((features,), att_dim=attention_width, gated=gated, feat_ext=embedding)
    pairs = [(embedding[0], ours.embedding), (theirs.pool.fc1.module, ours.attention.tanh)]
    if gated:
        pairs.append((theirs.pool.fc_gated.module, ours.attention.gate))
    for copy, source in pairs:
        copy.load_state_dict(source.state_dict())
    with torch.no_grad():
        theirs.pool.fc2.weight.copy_(ours.attention.score.weight)
        classifier = theirs.classifier.module
        classifier.weight.copy_(ours.logits.weight[1:] - ours.logits.weight[:1])
        classifier.bias.copy_(ours.logits.bias[1:] - ours.logits.bias[:1])
    return theirs


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("count", [1, 2, 50])
def test_the_same_answer_attention_loss_and_gradient(gated: bool, count: int) -> None:
    torch.manual_seed(0)
    ours = AttentionMIL(24, 2, gated=gated, width=32, attention_width=16)
    theirs = theirs_like(ours, 24, 32, 16, gated=gated)
    patches = 3 * bag(count, 24, seed=count)
    logit, scores = theirs(patches[None], return_att=True)
    loss, output = ours.loss(patches, 1)
    assert output.attention_bn is not None
    torch.testing.assert_close(output.logits[1] - output.logits[0], logit[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(output.attention_bn[0], torch.softmax(scores[0], dim=0), atol=1e-5, rtol=0)
    probability = torch.sigmoid(logit[0]).item()
    assert ours.probabilities(output)[1].item() == pytest.approx(probability, abs=1e-5)
    their_loss = theirs.compute_loss(torch.tensor([1.0]), patches[None])[1]["BCEWithLogitsLoss"]
    torch.testing.assert_close(loss, their_loss, atol=1e-5, rtol=0)
    loss.backward()
    their_loss.backward()
    torch.testing.assert_close(ours.embedding.weight.grad, theirs.feat_ext[0].weight.grad, atol=1e-5, rtol=0)
