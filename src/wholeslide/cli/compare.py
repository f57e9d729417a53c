"""``wholeslide compare``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wholeslide.cli.command import Command
from wholeslide.cli.failures import MENDABLE, write_line, write_problem
from wholeslide.cli.options import check_value, options_of
from wholeslide.cli.output import print_table, write
from wholeslide.compare.config import OWN, CompareConfig, given_points
from wholeslide.errors import ConfigError, Problem, option
from wholeslide.train.config import TrainConfig

if TYPE_CHECKING:
    from wholeslide.compare.harness import Comparison


@dataclass(frozen=True, kw_only=True)
class CompareArguments:
    """What is compared, on what, and how.

    Args:
        out: The folder of the comparison, which is made; where one was begun, it goes on.
    """

    out: Path
    compare: CompareConfig


def run(arguments: CompareArguments) -> int:
    """Compare, and show the table; 2 where a training failed."""
    from wholeslide.compare.harness import compare

    return _show(compare(typed(arguments.compare)), arguments.out)


def typed(config: CompareConfig) -> CompareConfig:
    """The same with the options of single methods checked, as those of the command line are: YAML reads 1e-4 as a text.

    Raises:
        ConfigError: all that are no value for their option.
    """
    options = {found.name: found for found in options_of(TrainConfig)}
    problems: list[Problem] = []

    def checked(name: str, method: str, point: dict[str, Any]) -> dict[str, Any]:
        values = {}
        for key, value in point.items():
            known = options.get(key.replace("-", "_"))
            if known is None:  # the configuration's own check tells it
                values[key] = value
                continue
            try:
                values[known.name] = check_value(known, value)
            except ValueError:
                where = f"{option(name)}, {method}, {key}"
                problems.append(Problem(f"{value!r} is not a value it takes", where, f"give {known.expectation}"))
        return values

    overrides: dict[str, dict[str, Any]] = {}
    grid: dict[str, list[dict[str, Any]]] = {}
    for name, method, point in given_points(config):
        found = checked(name, method, point)
        if name == "overrides":
            overrides[method] = found
        else:
            grid.setdefault(method, []).append(found)
    if problems:
        raise ConfigError(problems)
    return replace(config, overrides=overrides, grid=grid)


def _show(found: Comparison, out: Path) -> int:
    from wholeslide.compare.tables import cells_of, columns_of

    print_table(
        columns_of(found.summary), cells_of(found.summary), title=f"{found.summary.files} files, each tested once"
    )
    if found.unfinished:
        write_line(f"{found.unfinished} trainings are in work elsewhere or not begun; call again when they are done")
    for cell, record in found.failed:
        for problem in record.reasons:
            write_problem(replace(problem, where=f"{cell}, {problem.where}"))
    write(f"Table: {out / 'table'}.md, .tex, .csv. Numbers: {out / 'results.json'}")
    write(f"Predictions: {out / 'predictions.csv'}. Protocol: {out / 'protocol.json'}")
    return MENDABLE if found.failed else 0


COMMAND = Command(
    name="compare",
    summary="Compare methods fairly by cross-validation, with tests that were fixed before.",
    arguments=CompareArguments,
    positionals=("manifest",),
    run=run,
    example="wholeslide compare labels.csv --slides slides/ --out compared --methods abmil,clam-sb,local-k4",
    without=tuple(sorted(OWN)),
)
