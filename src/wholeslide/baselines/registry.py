"""The methods that ``train --method`` knows: what they are, who published them, and with which settings.

Free of torch, so that ``--help`` can list them. To add one, see docs/methods.md.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

from wholeslide.errors import ConfigError, Problem

Kind = Literal["stages", "bags", "patches"]
"""What a method sees of a slide: all of its pixels, the features of its patches, or these patches, to train their encoder."""
Optimizer = Literal["adamw", "adam", "radam-lookahead", "sgd-nesterov"]
RateDecay = Literal["plateau", "multistep", "cosine", "constant"]

ENTRY_POINTS = "wholeslide.methods"
"""The group of entry points in which installed packages name the modules that register methods."""
_PARTS: dict[Kind, int] = {"stages": 1, "bags": 1, "patches": 2}
_STAGES = re.compile(r"local-k([1-9]\d*)")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a method is trained where nothing else is asked for: what its authors published.

    Attributes:
        optimizer: the rule of the steps.
        lr: learning rate of layers that were trained before.
        head_factor: how many times larger the rate of layers is that start at random.
        weight_decay: of the optimiser.
        betas: of the optimiser's moments; of SGD, the first is its momentum.
        accumulate: slides whose gradients are averaged for one step.
        epochs: passes over the training split.
        lr_schedule: how the rates decay.
    """

    optimizer: Optimizer = "adam"
    lr: float = 2e-4
    head_factor: float = 1.0
    weight_decay: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    accumulate: int = 1
    epochs: int = 100
    lr_schedule: RateDecay = "constant"


@dataclass(frozen=True, kw_only=True)
class PatchRule:
    """Which of a slide's patches a method takes that trains an encoder on them.

    Attributes:
        taught: most patches of a slide that the encoder learns from at a step: the highest-scoring, or drawn ones.
        highest: how many patches the classifier of the slide is given, the highest-scoring first; nothing where patches are
            not ranked, and it is given all.
    """

    taught: int = 16
    highest: int | None = None

    @property
    def ranked(self) -> bool:
        """Whether it matters how high a patch scores."""
        return self.highest is not None


@dataclass(frozen=True, kw_only=True)
class MethodInfo:
    """A method.

    Attributes:
        name: as ``--method`` has it.
        summary: what it is, in a sentence.
        citation: who published it, where.
        kind: what it sees of a slide.
        home: ``module:Class`` of what is trained; nothing for the kind ``stages``; for the kind ``patches`` it is the second part.
        options: what the class is made with, beside the width of the features and the number of classes.
        recipes: its published settings, of each part where a method's parts are trained one after another, as the two of the
            kind ``patches`` are: the encoder, then the classifier of slides.
        patches: which patches are taken, for the kind ``patches``.
    """

    name: str
    summary: str
    citation: str
    kind: Kind
    home: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    recipes: tuple[Recipe, ...] = (Recipe(),)
    patches: PatchRule = PatchRule()

    @property
    def parts(self) -> int:
        """How many parts are trained one after another."""
        return len(self.recipes)

    def load(self) -> Any:
        """What ``home`` names.

        Raises:
            ConfigError: it cannot be imported.
        """
        module, _, name = self.home.partition(":")
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError.single(
                f"its home {self.home!r} cannot be imported: {error}",
                where=f"method {self.name!r}",
                remedy="give it as module:Class, and install what it needs",
            ) from error


_methods: dict[str, MethodInfo] = {}
_loaded: set[str] = set()


def register(info: MethodInfo) -> MethodInfo:
    """Add a method. Registering the same once more changes nothing.

    Raises:
        ConfigError: there is another one of this name; there are settings for a part that the kind has not, or none for one.
    """
    taken = _STAGES.fullmatch(info.name) is not None or _methods.get(info.name, info) != info
    if taken:
        raise ConfigError.single(
            "there is a method of this name already", where=f"method {info.name!r}", remedy="give it another name"
        )
    if info.parts != _PARTS[info.kind]:
        raise ConfigError.single(
            f"{info.parts} recipes, where its kind {info.kind!r} is trained in {_PARTS[info.kind]} parts",
            where=f"method {info.name!r}",
            remedy="give one for each part",
        )
    _methods[info.name] = info
    return info


def method_names() -> list[str]:
    """All names, in the order in which they were registered, those of installed packages last.

    Raises:
        ConfigError: an installed package cannot be used.
    """
    _load_installed()
    return list(_methods)


def method_info(name: str) -> MethodInfo:
    """A method by its name; ``local-kN`` is ``local``.

    Raises:
        ConfigError: there is none; it lists those that there are. Or an installed package cannot be used.
    """
    _load_installed()
    info = _methods.get("local" if _STAGES.fullmatch(name) else name)
    if info is None:
        known = ", ".join(_methods)
        raise ConfigError.single(
            f"unknown method {name!r}",
            where="--method",
            remedy=f"choose local-kN with N stages (local-k4), or one of {known}",
        )
    return info


def _load_installed() -> None:
    """Import the modules that installed packages name; they register their methods. All that fail are told, at every call."""
    import wholeslide.baselines.published  # noqa: F401  ours come first

    problems: list[Problem] = []
    for point in _installed(tuple(sys.path)):
        if point.value not in _loaded:
            problems += _load_point(point)
    if problems:
        raise ConfigError(problems)


@cache
def _installed(path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """The entry points below ``sys.path``: found once for each, since that reads the metadata of all that is installed."""
    return tuple(entry_points(group=ENTRY_POINTS))


def _load_point(point: EntryPoint) -> list[Problem]:
    package = point.dist.name if point.dist else point.module
    where = f"package {package!r}, entry point {point.name} = {point.value}"
    try:
        point.load()
    except (ImportError, AttributeError) as error:
        return [Problem(f"its methods cannot be imported: {error}", where, "mend the package or uninstall it")]
    except ConfigError as error:
        return [Problem(problem.what, f"{problem.where} of {where}", problem.remedy) for problem in error.problems]
    _loaded.add(point.value)
    return []
