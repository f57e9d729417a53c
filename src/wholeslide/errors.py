"""What a user can mend, said in one line: ``error: WHAT (WHICH SLIDE OR ROW): HOW TO MEND``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Problem:
    """One thing that the user can mend.

    ``what`` says what is wrong, ``where`` names the slide, row, file or option, ``remedy`` says how to mend it.
    """

    what: str
    where: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what} ({self.where}): {self.remedy}"


class WholeslideError(ValueError):
    """All the problems of one input, together. The command line prints a line for each and exits with status 2."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems: tuple[Problem, ...] = tuple(problems)
        assert self.problems, "an error without a problem"
        super().__init__("\n".join(str(problem) for problem in self.problems))

    @classmethod
    def single(cls, what: str, *, where: str, remedy: str) -> Self:
        """The usual case: one problem."""
        return cls([Problem(what, where, remedy)])


class SlideError(WholeslideError):
    """A slide that is missing, cannot be opened, cannot be decoded, or has no usable scale or tissue."""


class CohortError(WholeslideError):
    """A manifest, a split or a set of labels that must not be trained on."""


class ModelError(WholeslideError):
    """A backbone, a cut or weights that cannot be used."""


class FeatureError(WholeslideError):
    """A file of patch features that is missing, damaged, or none that can be trained on."""


class RunError(WholeslideError):
    """A run directory, checkpoint or output that is missing, damaged or in the way."""


class StoreError(WholeslideError):
    """A disk that does not keep the features between two stages: full, or failing."""


class ConfigError(WholeslideError):
    """An option whose value makes no sense."""


def option(name: str) -> str:
    """A field's name as the command line spells it."""
    return "--" + name.replace("_", "-")


def too_small(config: object, least: Mapping[str, float]) -> list[Problem]:
    """The fields of a configuration that are below their least value; ``None`` is not."""
    return [
        Problem(f"{value} is too small", option(name), f"give {lowest} or more")
        for name, lowest in least.items()
        if (value := getattr(config, name)) is not None and value < lowest
    ]
