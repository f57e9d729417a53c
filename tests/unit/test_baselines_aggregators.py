"""What every classifier of bags does, and pooling on cases that are computed by hand."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from mil_cases import SMALL, WITH_ATTENTION, bag, small

from wholeslide.baselines.pooling import Pooling
from wholeslide.baselines.registry import method_info, method_names

BY_ORDER = ("transmil", "mil-rnn")


@pytest.mark.parametrize(("how", "pooled"), [("max", (4.0, 3.0)), ("average", (2.0, -1.0))])
def test_pooling_by_hand(how: Literal["average", "max"], pooled: tuple[float, float]) -> None:
    """Each feature is pooled by itself: the largest are of different patches."""
    model = Pooling(2, 3, how=how)
    with torch.no_grad():
        model.logits.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]]))
        model.logits.bias.copy_(torch.tensor([0.5, 0.0, -1.0]))
    patches = torch.tensor([[4.0, -2.0], [0.0, 3.0], [2.0, -4.0]])
    logits = [pooled[0] + 0.5, pooled[1], pooled[0] - pooled[1] - 1]
    exponentials = [math.exp(logit) for logit in logits]
    for label in range(3):
        loss, output = model.loss(patches, label)
        assert output.logits.tolist() == pytest.approx(logits)
        assert output.attention_bn is None
        assert loss.item() == pytest.approx(-math.log(exponentials[label] / sum(exponentials)), rel=1e-5)
    assert model.probabilities(output).tolist() == pytest.approx([e / sum(exponentials) for e in exponentials])


def test_every_method_of_bags_is_tested_here() -> None:
    published = {name for name in method_names() if method_info(name).home}
    assert published - {"finetuned-patch+abmil"} == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_bags_of_any_size_and_classes_of_any_number(name: str) -> None:
    """One patch, fewer than CLAM looks at, odd numbers, more than TransMIL has landmarks."""
    for classes in (2, 3):
        model = small(name, 6, classes)
        for count in range(1, 21):
            loss, output = model.loss(bag(count, 6, seed=count), classes - 1)
            assert output.logits.shape == (classes,)
            assert math.isfinite(loss.item())
            probabilities = model.probabilities(output)
            assert probabilities.dtype == torch.float64
            assert probabilities.sum().item() == pytest.approx(1)
            assert (probabilities > 0).all()
            if output.attention_bn is not None:
                assert (output.attention_bn >= 0).all()
                assert output.attention_bn.sum(dim=1).tolist() == pytest.approx([1.0] * len(output.attention_bn))


@pytest.mark.parametrize("name", SMALL)
def test_what_attends_says_so_for_each_branch_and_patch(name: str) -> None:
    attention_bn = small(name, 6, 3)(bag(11, 6)).attention_bn
    branches = WITH_ATTENTION.get(name)
    assert (None if attention_bn is None else tuple(attention_bn.shape)) == (branches and (branches, 11))


@pytest.mark.parametrize("name", SMALL)
def test_the_order_of_patches_counts_only_where_it_should(name: str) -> None:
    model = small(name, 6, 3).eval()
    patches = bag(13, 6)
    order = torch.randperm(13, generator=torch.Generator().manual_seed(3))
    straight, turned = model(patches), model(patches[order])
    same = torch.allclose(turned.logits, straight.logits, atol=1e-6)
    assert same == (name not in BY_ORDER)
    if straight.attention_bn is not None and same:
        torch.testing.assert_close(turned.attention_bn, straight.attention_bn[:, order])


@pytest.mark.parametrize("name", SMALL)
def test_gradients_reach_every_parameter(name: str) -> None:
    """From slides of every class. Only the bias of a score has none: it adds the same to all patches."""
    model = small(name, 6, 3).eval()
    torch.stack([model.loss(bag(20, 6, seed=label), label)[0] for label in range(3)]).sum().backward()
    largest = {key: 0.0 if p.grad is None else p.grad.abs().max().item() for key, p in model.named_parameters()}
    still = {key for key, gradient in largest.items() if gradient < 1e-6}
    assert still == {key for key in largest if key == "attention.score.bias"}


@pytest.mark.parametrize("name", ["clam-sb", "clam-mb", "transmil"])
def test_dropout_is_for_training_and_follows_torchs_generator(name: str) -> None:
    model, patches = small(name, 6, 3), bag(12, 6)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(model(patches).logits)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.allclose(drawn[0], drawn[2])
    model.eval()
    assert torch.equal(model(patches).logits, model(patches).logits)


@pytest.mark.parametrize("name", SMALL)
def test_the_loss_judges_the_answer_that_it_returns(name: str) -> None:
    model, patches = small(name, 6, 3).eval(), bag(9, 6)
    torch.testing.assert_close(model.loss(patches, 1)[1].logits, model(patches).logits)
