"""How a cohort is split; free of torch and pandas, so that ``--help`` stays fast."""

from __future__ import annotations

from dataclasses import dataclass

from wholeslide.errors import ConfigError, Problem

SPLITS = ("train", "valid", "test")

Fractions = tuple[float, float, float]
DEFAULT_FRACTIONS: Fractions = (0.7, 0.15, 0.15)

Sizes = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """The draw of a split or of folds."""

    fractions: Fractions = DEFAULT_FRACTIONS
    """Parts of the training, validation and test split; they add up to 1."""
    sizes: Sizes | None = None
    """Files of the training, validation and test split, in place of the fractions: scaled to the files that there are, and met
    as nearly as whole patients allow."""
    keep_test: bool = False
    """Leave in test what the manifest's column split says is test, and divide the others into training and validation."""
    folds: int | None = None
    """Number of folds, in place of the fractions."""
    repeats: int = 1
    """How often folds are drawn, each time by the next seed; more than once, each draw gets a file of its own."""
    group: str = "patient"
    """Column whose values are never cut; patients never are, whatever the column."""
    seed: int = 0
    """Seed of the draw. The order of the manifest's rows does not matter."""

    def __post_init__(self) -> None:
        check_fractions(self.fractions)
        if self.sizes is not None:
            check_sizes(self.sizes)
        problems = [
            Problem("two splits are asked for", f"--folds {self.folds} and {name}", "give one of the two")
            for name, asked in (("--sizes", self.sizes is not None), ("--keep-test", self.keep_test))
            if asked and self.folds is not None
        ]
        if self.sizes is not None and self.fractions != DEFAULT_FRACTIONS:
            problems.append(Problem("two splits are asked for", "--fractions and --sizes", "give one of the two"))
        if self.keep_test and not self._divides_two():
            remedy = "give both training and validation a part of what is not tested"
            problems.append(Problem("only one part is asked for", "--keep-test", remedy))
        if problems:
            raise ConfigError(problems)
        if self.folds is not None:
            check_folds(self.folds)
        if self.repeats < 1 or (self.repeats > 1 and self.folds is None):
            raise ConfigError.single(
                "not a number of draws", where=f"--repeats {self.repeats}", remedy="give 1 or more, with --folds"
            )

    def _divides_two(self) -> bool:
        """Whether there is something to train on and something to validate on."""
        return all(part > 0 for part in (self.sizes or self.fractions)[:2])


def check_sizes(sizes: Sizes) -> None:
    """Raise a ConfigError unless these are three numbers of files with something to train on."""
    if len(sizes) != 3 or min(sizes) < 0 or sizes[0] == 0:
        raise ConfigError.single(
            "not a split",
            where=f"--sizes {','.join(map(str, sizes))}",
            remedy="give the files of training, validation and test, for example 663,166,214",
        )


def check_fractions(fractions: tuple[float, ...]) -> None:
    """Raise a ConfigError unless these are three parts of 1 with something to train on."""
    inside = all(0 <= part <= 1 for part in fractions)
    if len(fractions) != 3 or not inside or abs(sum(fractions) - 1) > 1e-6 or fractions[0] == 0:
        raise ConfigError.single(
            "not a split",
            where=f"--fractions {','.join(f'{part:g}' for part in fractions)}",
            remedy="give training, validation and test as three parts that add up to 1, for example 0.7,0.15,0.15",
        )


def check_folds(folds: int) -> None:
    """Raise a ConfigError below two folds."""
    if folds < 2:
        raise ConfigError.single("too few folds", where=f"--folds {folds}", remedy="ask for 2 or more, 5 is usual")
