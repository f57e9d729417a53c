"""The optimiser, the state, validation, signals: what the loop is put together from."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import threading
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from wholeslide.errors import RunError
from wholeslide.model.network import LocalNetwork
from wholeslide.train.config import TrainConfig
from wholeslide.train.history import CsvLog
from wholeslide.train.optim import (
    RateSchedule,
    RateState,
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
)
from wholeslide.train.signals import Interrupted, SignalWatch, watch_signals
from wholeslide.train.state import Best, EpochLoss, LoopState, RunningLosses
from wholeslide.train.validation import (
    Score,
    balanced_weights,
    constant_answer_loss,
    does_not_move,
    grows,
    monitored,
    stage_metrics,
)


def config(**options: Any) -> TrainConfig:
    return TrainConfig(manifest=Path("labels.csv"), slides=Path("slides"), out=Path("run"), **options)


class TwoStages(nn.Module):
    """Two stages with a classifier each, as the optimiser sees a network."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        self.heads = nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1)])

    def backbone_parameters(self, stage: int | None = None) -> list[nn.Parameter]:
        return list((self.stages if stage is None else self.stages[stage - 1]).parameters())

    def head_parameters(self, stage: int | None = None) -> list[nn.Parameter]:
        return list((self.heads if stage is None else self.heads[stage - 1]).parameters())


def two_stages() -> LocalNetwork:
    return cast(LocalNetwork, TwoStages())


def stepped(network: LocalNetwork, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        for index, parameter in enumerate(network.parameters()):
            parameter.grad = torch.full_like(parameter, 0.1 * (index + 1) * (-1) ** step)
        optimizer.step()


class TestOptimizer:
    def test_two_rates(self) -> None:
        optimizer = build_optimizer(two_stages(), config(lr=1e-3, head_lr=5e-3, weight_decay=0.5), None)
        assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(1e-3, 0.5), (5e-3, 0.5)]
        assert sum(len(group["params"]) for group in optimizer.param_groups) == 8

    def test_one_stage(self) -> None:
        network = two_stages()
        optimizer = build_optimizer(network, config(lr=0.1), 2)
        before = {name: value.clone() for name, value in network.named_parameters()}
        stepped(network, optimizer, 1)
        moved = {name for name, value in network.named_parameters() if not torch.equal(value, before[name])}
        assert moved == {"stages.1.weight", "stages.1.bias", "heads.1.weight", "heads.1.bias"}

    def test_slow_weights_follow_half_of_the_way_every_six_steps(self) -> None:
        """Against RAdam itself, and the slow weights kept apart by hand."""
        torch.manual_seed(0)
        network, plain = two_stages(), two_stages()
        plain.load_state_dict(network.state_dict())
        optimizer = build_optimizer(network, config(lr=0.1, optimizer="radam-lookahead"), None)
        by_hand = torch.optim.RAdam(plain.parameters(), lr=0.1, weight_decay=1e-6)
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        slow = [p.detach().clone() for p in plain.parameters()]
        for _ in range(7):
            stepped(network, optimizer, 2)
            stepped(plain, by_hand, 2)
            if int(by_hand.state[next(plain.parameters())]["step"]) % 6 == 0:
                for weights, parameter in zip(slow, plain.parameters(), strict=True):
                    weights.add_(parameter.detach() - weights, alpha=0.5)
                    parameter.data.copy_(weights)
        for found, expected in zip(network.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(found, expected)

    @pytest.mark.parametrize(
        ("name", "kind"),
        [("adamw", "AdamW"), ("adam", "Adam"), ("sgd-nesterov", "SGD"), ("radam-lookahead", "LookaheadRAdam")],
    )
    def test_each_rule_by_its_name(self, name: Any, kind: str) -> None:
        optimizer = build_optimizer(two_stages(), config(optimizer=name), None)
        assert type(optimizer).__name__ == kind
        assert name != "sgd-nesterov" or (optimizer.defaults["nesterov"], optimizer.defaults["momentum"]) == (True, 0.9)

    @pytest.mark.parametrize("rule", ["adamw", "sgd-nesterov", "radam-lookahead"])
    def test_state_goes_through_tensors(self, rule: Any) -> None:
        chosen = config(lr=0.1, optimizer=rule)
        torch.manual_seed(0)
        whole, first, second = two_stages(), two_stages(), two_stages()
        first.load_state_dict(whole.state_dict())
        stepped(whole, build_optimizer(whole, chosen, None), 8)
        optimizer = build_optimizer(first, chosen, None)
        stepped(first, optimizer, 2)
        second.load_state_dict(first.state_dict())
        resumed = build_optimizer(second, chosen, None)
        load_optimizer_tensors(second, resumed, optimizer_tensors(first, optimizer), where="step-2")
        for step in range(2, 8):
            for index, parameter in enumerate(second.parameters()):
                parameter.grad = torch.full_like(parameter, 0.1 * (index + 1) * (-1) ** step)
            resumed.step()
        for name, value in whole.state_dict().items():
            assert torch.equal(value, second.state_dict()[name]), name

    @pytest.mark.parametrize("key", ["elsewhere.weight/exp_avg", "stages.0.weight/exp_avg"])
    def test_state_of_another_network_is_refused(self, key: str) -> None:
        network = two_stages()
        optimizer = build_optimizer(network, config(), 2)
        with pytest.raises(RunError, match="does not belong to this network"):
            load_optimizer_tensors(network, optimizer, {key: torch.zeros(2, 2)}, where="step-2.safetensors")


class TestRates:
    @staticmethod
    def factors(chosen: TrainConfig, improved: list[bool]) -> list[float]:
        schedule = RateSchedule(chosen, RateState())
        factors = []
        for done, better in enumerate(improved, start=1):
            schedule.epoch_end(epochs_done=done, improved=better)
            factors.append(schedule.state.factor)
        return factors

    def test_multistep_is_the_public_codes(self) -> None:
        schedule = RateSchedule(config(lr_schedule="multistep", epochs=55), RateState())
        assert schedule.milestones == [25, 35, 45]
        factors = self.factors(config(lr_schedule="multistep", epochs=11), [True] * 11)
        assert factors == pytest.approx([1] * 4 + [0.1] * 2 + [0.01] * 2 + [0.001] * 3)

    def test_plateau(self) -> None:
        chosen = config(lr_schedule="plateau", lr_patience=2)
        factors = self.factors(chosen, [True, False, True, False, False, False, False])
        assert factors == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01])

    def test_cosine(self) -> None:
        factors = self.factors(config(lr_schedule="cosine", epochs=4), [False] * 5)
        assert factors[:4] == pytest.approx([0.05 + 0.95 * (1 + math.cos(math.pi * n / 4)) / 2 for n in (1, 2, 3, 4)])
        assert factors[3] == factors[4] == pytest.approx(0.05)

    def test_constant(self) -> None:
        assert self.factors(config(lr_schedule="constant"), [False] * 20) == [1.0] * 20

    def test_both_rates_decay(self) -> None:
        chosen = config(lr=1e-3)
        optimizer = build_optimizer(two_stages(), chosen, None)
        RateSchedule(chosen, RateState(factor=0.1)).apply(optimizer)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-4, 2e-4])


class TestState:
    def test_goes_through_json_bit_by_bit(self) -> None:
        state = LoopState(stage=2, epoch=1, step=7, seconds=0.1 + 0.2, best=Best(0.9, 1 / 3, 1, 6, "f", "h"))
        state.running.add([0.1, math.nan], [math.nan, 1e-300])
        state.losses.append(EpochLoss(1 / 3, 0.1, 4))
        again = LoopState.from_dict(json.loads(json.dumps(state.to_dict())))
        assert json.dumps(again.to_dict()) == json.dumps(state.to_dict())
        assert again.best == state.best
        assert again.losses == state.losses

    def test_means_and_deviations(self) -> None:
        running = RunningLosses()
        for loss in (1.0, 3.0):
            running.add([loss, 0.0], [2 * loss, math.nan])
        assert running.means()[0] == [2.0, 0.0]
        assert running.means()[1][0] == 4.0
        assert math.isnan(running.means()[1][1])
        assert running.epoch_loss(1) == EpochLoss(2.0, 1.0, 2)
        assert running.epoch_loss(1).error == pytest.approx(1 / math.sqrt(2))


class TestValidation:
    @staticmethod
    def predictions() -> pd.DataFrame:
        rows = []
        for stage in (1, 2):
            for index in range(4):
                label = "ab"[index % 2]
                sure = 0.5 if stage == 1 else 0.8
                p_b = sure if label == "b" else 1 - sure
                rows.append((stage, f"f{index}", f"s{index}", f"p{index}", label, label, 1 - p_b, p_b))
        names = ["stage", "file", "slide", "patient", "label", "prediction", "prob_a", "prob_b"]
        return pd.DataFrame(rows, columns=names)

    def test_metrics_of_every_stage(self) -> None:
        found = stage_metrics(self.predictions(), classes=("a", "b"), unit="patient")
        assert found[1]["loss"] == pytest.approx(math.log(2))
        assert found[2]["loss"] == pytest.approx(-math.log(0.8))
        assert (found[1]["auroc"], found[2]["auroc"]) == (0.5, 1.0)

    def test_scores_are_larger_for_better(self) -> None:
        metrics = {"loss": 0.7, "auroc": 0.9}
        assert monitored(metrics, "loss") == Score(-0.7, 0.7)
        assert monitored(metrics, "auroc") == Score(0.9, 0.7)

    @pytest.mark.parametrize(
        ("score", "best", "better"),
        [
            ((0.8, 0.5), None, True),
            ((math.nan, 0.5), None, True),
            ((0.8, 0.5), (0.7, 0.1), True),
            ((0.8, 0.5), (0.8, 0.6), True),
            ((0.8, 0.5), (0.8, 0.5), False),
            ((0.8, 0.5), (0.8, 0.4), False),
            ((0.6, 0.1), (0.7, 0.5), False),
            ((math.nan, 0.1), (0.7, 0.5), False),
            ((0.5, 0.9), (math.nan, 0.5), True),
        ],
    )
    def test_ties_are_broken_by_the_loss(self, score: Any, best: Any, better: bool) -> None:
        held = None if best is None else Best(*best, epoch=1, step=1, file="", sha256="")
        assert Score(*score).better_than(held) is better

    def test_class_weights(self) -> None:
        assert balanced_weights([6, 2]) == pytest.approx([8 / 12, 8 / 4])
        assert np.average(balanced_weights([6, 2]), weights=[6, 2]) == pytest.approx(1)

    def test_what_a_constant_answer_gets(self) -> None:
        assert constant_answer_loss([5, 5], None) == pytest.approx(math.log(2))
        assert constant_answer_loss([9, 1], None) == pytest.approx(-0.9 * math.log(0.9) - 0.1 * math.log(0.1))
        assert constant_answer_loss([9, 1], balanced_weights([9, 1])) == pytest.approx(math.log(2))

    @pytest.mark.parametrize(
        ("means", "deviation", "stuck"),
        [
            ([0.693], 0.1, True),
            ([0.60], 0.05, False),
            ([0.70, 0.695, 0.692], 0.02, True),
            ([1.40, 1.00, 0.75], 0.05, False),
            ([0.70, 0.50], 0.05, False),
            ([0.80, 0.70], 1.0, True),
            ([], 0.0, False),
        ],
    )
    def test_a_loss_that_does_not_move(self, means: list[float], deviation: float, stuck: bool) -> None:
        losses = [EpochLoss(mean, deviation, 50) for mean in means]
        assert does_not_move(losses, constant_loss=math.log(2)) is stuck

    @pytest.mark.parametrize(
        ("means", "deviation", "expected"),
        [
            ([0.65, 0.67, 0.99, 1.83], 0.3, True),
            ([0.70, 0.695, 0.71], 0.1, False),
            ([1.83, 0.99], 0.3, False),
            ([0.40, 0.60], 0.05, False),  # it overshoots, but still knows more than a constant answer
            ([1.83], 0.3, False),
        ],
    )
    def test_a_loss_that_grows(self, means: list[float], deviation: float, expected: bool) -> None:
        losses = [EpochLoss(mean, deviation, 50) for mean in means]
        assert grows(losses, constant_loss=math.log(2)) is expected


class TestSignals:
    def test_raised_at_once_where_nothing_is_half_done(self) -> None:
        def work(watch: SignalWatch) -> None:
            with watch.interruptible():
                os.kill(os.getpid(), signal.SIGTERM)
                pytest.fail("went on")

        with watch_signals() as watch, pytest.raises(Interrupted) as caught:
            work(watch)
        assert caught.value.exit_status == 143

    def test_kept_for_later_elsewhere(self) -> None:
        reached = False
        with watch_signals() as watch:
            os.kill(os.getpid(), signal.SIGINT)
            reached = True
            with pytest.raises(Interrupted) as caught, watch.interruptible():
                pytest.fail("went on")
        assert reached
        assert caught.value.exit_status == 130

    @pytest.mark.parametrize("at_once", [True, False])
    def test_what_comes_before_leaving_is_not_interrupted(self, at_once: bool) -> None:
        told = []

        def save() -> None:
            os.kill(os.getpid(), signal.SIGINT)
            told.append("saved")

        def work(watch: SignalWatch) -> None:
            with watch.interruptible():
                try:
                    os.kill(os.getpid(), signal.SIGTERM)
                finally:
                    told.append("left")

        with watch_signals() as watch:
            watch.before_leaving = save
            if not at_once:
                os.kill(os.getpid(), signal.SIGTERM)
                assert told == []
            with pytest.raises(Interrupted) as caught:
                work(watch)
        assert told == (["saved", "left"] if at_once else ["saved"])
        assert caught.value.exit_status == 143

    def test_only_the_first_is_raised(self) -> None:
        with watch_signals() as watch:
            with pytest.raises(Interrupted), watch.interruptible():
                os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)  # while the state is being saved

    def test_handlers_are_put_back(self) -> None:
        before = signal.getsignal(signal.SIGTERM)
        with watch_signals():
            assert signal.getsignal(signal.SIGTERM) != before
        assert signal.getsignal(signal.SIGTERM) == before

    def test_nothing_is_watched_in_a_thread(self) -> None:
        done = []

        def work() -> None:
            with watch_signals() as watch, watch.interruptible():
                done.append(True)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert done == [True]


class TestCsvLog:
    def test_rows_after_the_checkpoint_are_dropped(self, tmp_path: Path) -> None:
        log = CsvLog(tmp_path / "log.csv")
        for number in range(1, 5):
            log.append({"seen": number, "file": 'a "quoted", name', "loss": 0.1 * number})
        with log.path.open("a") as file:
            file.write("5,cut o")
        log.keep("seen", 3)
        table = pd.read_csv(log.path)
        assert table["seen"].tolist() == [1, 2, 3]
        assert table["file"].tolist() == ['a "quoted", name'] * 3
        log.append({"seen": 4, "file": "b", "loss": 1.0})
        assert pd.read_csv(log.path)["seen"].tolist() == [1, 2, 3, 4]

    @pytest.mark.parametrize("name", ["two\nlines.png", "two\r\nlines.png", "line\u2028separator.png"])
    def test_names_with_line_breaks(self, tmp_path: Path, name: str) -> None:
        log = CsvLog(tmp_path / "log.csv")
        for number in range(1, 4):
            log.append({"seen": number, "file": name, "loss": 0.5})
        log.keep("seen", 2)
        with log.path.open(encoding="utf-8", newline="") as file:
            assert [(row["seen"], row["file"]) for row in csv.DictReader(file)] == [("1", name), ("2", name)]
        whole = log.path.read_bytes()
        for cut in range(1, 22):
            log.path.write_bytes(whole + f'3,"ß {name}",0.5\n'.encode()[:cut])
            log.keep("seen", 3)
            assert log.path.read_bytes() == whole

    def test_a_header_that_was_cut_off(self, tmp_path: Path) -> None:
        log = CsvLog(tmp_path / "log.csv")
        log.path.write_text("seen,fi")
        log.keep("seen", 3)
        log.append({"seen": 1, "file": "a"})
        assert pd.read_csv(log.path)["seen"].tolist() == [1]
