"""From a dataclass to flat command line options, and back.

A field ``first_stride: int | None = None`` is the option ``--first-stride N``; its documentation (an ``Args:`` entry or
a docstring below the field) is the option's help; its type checks what is given, on the command line as in a YAML file.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import docstring_parser
from jsonargparse import ArgumentParser

Arguments = TypeVar("Arguments")

METAVARS = {
    "memory": "SIZE",
    "over_baseline": "SIZE",
    "size": "WxH",
    "sizes": "WxH,...",
    "weights": "FILE|random",
    "overrides": "YAML",
    "grid": "YAML",
    "methods": "METHOD,...",
    "reference": "METHOD",
    "cells": "I/N|slurm",
    "inputs": "SLIDE|FOLDER|MANIFEST",
    "slide": "SLIDE",
    "tables": "TABLE",
}
"""What stands for a value in the help, where the type alone says too little."""

SWITCH_WORDS = {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}
"""What may stand behind a switch: ``--rfr off`` is ``--no-rfr``."""

_NAMES = {int: "a whole number", float: "a number", str: "a text", Path: "a path", bool: "on or off"}
_LETTERS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}


@dataclass(frozen=True)
class Option:
    """One field, as the command line knows it. ``hint`` is its type, ``required`` if there is no default."""

    name: str
    hint: Any
    default: Any
    required: bool
    help: str

    @property
    def flag(self) -> str:
        """The spelling with dashes."""
        return "--" + self.name.replace("_", "-")

    @property
    def is_switch(self) -> bool:
        """Given without a value: ``--json``, ``--no-json``."""
        return self.hint is bool

    @property
    def is_sequence(self) -> bool:
        """Several values in one: ``0.7,0.15,0.15``."""
        return any(get_origin(hint) in (list, tuple) for hint in _alternatives(self.hint))

    @property
    def metavar(self) -> str:
        """What stands for the value in the help; a fixed number of values tells enough by itself, as in N,N,N."""
        fixed = any(get_origin(hint) is tuple and Ellipsis not in get_args(hint) for hint in _alternatives(self.hint))
        return _metavar(self.hint) if fixed else METAVARS.get(self.name) or _metavar(self.hint)

    @property
    def expectation(self) -> str:
        """What the value may be, in words."""
        return " or ".join(_words(hint) for hint in _alternatives(self.hint) if hint is not type(None))


def options_of(arguments: type) -> list[Option]:
    """The options of a dataclass; those of a field that is itself a dataclass stand among them.

    An option that two of the dataclasses share is listed once, and both get its value.
    """
    options: dict[str, Option] = {}
    hints = get_type_hints(arguments)
    documentation = _documentation(arguments)
    for field in dataclasses.fields(arguments):
        if not field.init:
            continue
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            options = {option.name: option for option in options_of(_a_type(hint))} | options
            continue
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        options[field.name] = Option(
            field.name, hint, None if required else _default(field), required, documentation.get(field.name, "")
        )
    return list(options.values())


def build(arguments: type[Arguments], values: Mapping[str, Any]) -> Arguments:
    """The dataclass, from checked values by the options' names; what is not given keeps its default.

    Raises:
        WholeslideError: the dataclass itself refuses a value.
    """
    hints = get_type_hints(arguments)
    chosen: dict[str, Any] = {}
    assert dataclasses.is_dataclass(arguments)
    for field in dataclasses.fields(arguments):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            chosen[field.name] = build(_a_type(hint), values)
        elif field.init and field.name in values:
            chosen[field.name] = values[field.name]
    return arguments(**chosen)


def check_value(option: Option, value: Any) -> Any:
    """The value in the option's type. ``value`` is the text given, or what a YAML file holds.

    Raises:
        ValueError: it cannot be one.
    """
    if option.is_sequence:
        value = [part.strip() for part in value.split(",")] if isinstance(value, str) else list(value)
    if option.is_switch and isinstance(value, str):
        value = SWITCH_WORDS.get(value.lower(), value)
    if value == "" and option.hint is not str:
        raise ValueError("empty")
    checker = _ValueParser(add_help=False)
    checker.add_argument("--value", type=option.hint)
    checked = checker.parse_object({"value": value}).value
    if checked is None and type(None) not in _alternatives(option.hint):
        raise ValueError("empty")
    return checked.expanduser() if isinstance(checked, Path) else checked


class _ValueParser(ArgumentParser):
    """Raises what the usual parser would print before it exits."""

    def error(self, message: str, ex: Exception | None = None) -> None:  # type: ignore[override]
        raise ValueError(message) from ex


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _documentation(arguments: type) -> dict[str, str]:
    parsed = docstring_parser.parse_from_object(arguments)
    return {entry.arg_name: " ".join((entry.description or "").split()) for entry in parsed.params}


def _a_type(hint: Any) -> type:
    assert isinstance(hint, type), f"{hint} is no plain dataclass"
    return hint


def _alternatives(hint: Any) -> Sequence[Any]:
    """The members of a union; a type alone is its own."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _words(hint: Any) -> str:
    if get_origin(hint) is Literal:
        choices = [str(choice) for choice in get_args(hint)]
        return "one of " + ", ".join(choices) if len(choices) > 1 else choices[0]
    if get_origin(hint) in (list, tuple):
        parts = [part for part in get_args(hint) if part is not Ellipsis]
        inner = _words(parts[0]).removeprefix("a ").removeprefix("one ")
        if get_origin(hint) is list or Ellipsis in get_args(hint):
            return f"several of {inner.removeprefix('of ')}, separated by commas"
        return f"{len(parts)} times {_words(parts[0])}, separated by commas"
    return _NAMES.get(hint, "a value")


def _metavar(hint: Any) -> str:
    shown = [part for part in _alternatives(hint) if part is not type(None)]
    return "|".join(_letters(part) for part in shown)


def _letters(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "|".join(str(choice) for choice in get_args(hint))
    if get_origin(hint) in (list, tuple):
        parts = get_args(hint)
        if get_origin(hint) is list or Ellipsis in parts:
            return f"{_letters(parts[0])},..."
        return ",".join(_letters(part) for part in parts)
    return _LETTERS.get(hint, "VALUE")
