"""How a cohort is split; free of torch and pandas, so that ``--help`` stays fast."""

from __future__ import annotations

from dataclasses import dataclass

from wholeslide.errors import ConfigError

SPLITS = ("train", "valid", "test")

Fractions = tuple[float, float, float]
DEFAULT_FRACTIONS: Fractions = (0.7, 0.15, 0.15)


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """The draw of a split or of folds."""

    fractions: Fractions = DEFAULT_FRACTIONS
    """Parts of the training, validation and test split; they add up to 1."""
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
        if self.folds is not None:
            check_folds(self.folds)
        if self.repeats < 1 or (self.repeats > 1 and self.folds is None):
            raise ConfigError.single(
                "not a number of draws", where=f"--repeats {self.repeats}", remedy="give 1 or more, with --folds"
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
