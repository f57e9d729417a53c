"""Reads a command line and its ``--config`` file, and reports everything that is wrong with them at once."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from wholeslide.cli.command import Command
from wholeslide.cli.options import METAVARS, SWITCH_WORDS, Option, build, check_value, options_of
from wholeslide.errors import ConfigError, Problem

ANNOTATIONS = ("format_version", "versions", "classes", "class_weighting", "tissue", "feature_width")
"""Keys that a run's ``config.yaml`` has beside its options: a run's file can be given to ``--config`` as it is."""

POSITIONALS = "_positionals"
"""``argparse`` collects what is given by position under this name; it is told apart afterwards."""


def parse(command: Command, tokens: Sequence[str]) -> Any:
    """An instance of the command's arguments.

    Options on the command line win over those of the file that ``--config`` names, wherever they stand.

    Raises:
        ConfigError: all unknown options, unfit values and missing arguments together.
        SystemExit: with status 0, after ``--help`` was printed.
    """
    options = {option.name: option for option in options_of(command.arguments) if option.name not in command.without}
    raw, problems = _raw_values(command, options, tokens)
    values: dict[str, Any] = {}
    if "config" in raw:
        file_values, file_problems = _read_config(Path(raw.pop("config")), options)
        values |= file_values
        problems += file_problems
    for name, text in raw.items():
        _check(options[name], text, _place(command, options[name]), values, problems)
    mentioned = {problem.where for problem in problems}
    for option in options.values():
        place = _place(command, option)
        if option.required and option.name not in values and place not in mentioned:
            problems.append(Problem("not given", place, f"for example: {command.example}"))
    if problems:
        raise ConfigError(problems)
    return build(command.arguments, values)


class _RawParser(argparse.ArgumentParser):
    """Splits a command line into texts; what they mean is checked later."""

    def error(self, message: str) -> NoReturn:
        raise argparse.ArgumentError(None, message)


def _raw_values(
    command: Command, options: Mapping[str, Option], tokens: Sequence[str]
) -> tuple[dict[str, Any], list[Problem]]:
    """The texts given, by option, and what is unknown; a switch gives a bool, the last positional a list if it is one.

    Raises:
        ConfigError: an option lacks its value, or a switch has one.
    """
    parser = _raw_parser(command, options)
    try:
        namespace, unknown = parser.parse_known_intermixed_args(_spelled_out(tokens, options))
    except argparse.ArgumentError as error:
        problem = Problem(str(error), f"wholeslide {command.name}", f"see wholeslide {command.name} --help")
        raise ConfigError([_missing_value(str(error), options) or problem]) from None
    raw = dict(vars(namespace))
    given: list[str] = raw.pop(POSITIONALS, None) or []
    unknown_flags = [token.split("=")[0] for token in unknown if token.startswith("-")]
    problems = [_unknown_option(command, flag, options.values()) for flag in unknown_flags]
    for name in command.positionals:
        if not given:
            break
        several = options[name].is_sequence
        raw[name] = given if several else given[0]
        given = [] if several else given[1:]
    if given and not unknown_flags:
        surplus = " ".join(given)
        problems.append(Problem("one argument too many", surplus, f"for example: {command.example}"))
    return raw, problems


def _raw_parser(command: Command, options: Mapping[str, Option]) -> argparse.ArgumentParser:
    names = [_place(command, options[name]) for name in command.positionals]
    if names and options[command.positionals[-1]].is_sequence:
        names[-1] += "..."
    required = [option for option in options.values() if option.required and option.name not in command.positionals]
    names += [f"{option.flag} {option.metavar}" for option in required]
    parser = _RawParser(
        prog=f"wholeslide {command.name}",
        usage=" ".join([f"wholeslide {command.name}", *names, "[options]"]),
        description=command.summary,
        epilog=f"For example: {command.example}",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=110),
    )
    described = [f"{_place(command, options[name])}: {options[name].help}" for name in command.positionals]
    group = parser.add_argument_group("arguments", " ".join(described)) if described else parser
    group.add_argument(POSITIONALS, nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--config", metavar="FILE", help="YAML file of options; those on the command line win.")
    for option in options.values():
        if option.name in command.positionals:
            continue
        if option.is_switch:
            _add_switch(parser, option)
        else:
            parser.add_argument(option.flag, dest=option.name, metavar=option.metavar, help=_help(option))
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    return parser


def _add_switch(parser: argparse.ArgumentParser, option: Option) -> None:
    """``--json``, and ``--no-json``; the help shows the one that changes something."""
    off = f"--no-{option.flag[2:]}"
    shown, hidden = _help(option), argparse.SUPPRESS
    names = (option.flag, off) if option.default is True else (option.flag,)
    parser.add_argument(*names, action=_Switch, dest=option.name, nargs=0, help=shown)
    if option.default is not True:
        parser.add_argument(off, action=_Switch, dest=option.name, nargs=0, help=hidden)


class _Switch(argparse.Action):
    """True, or False where it was spelled with ``--no-``."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, not (option_string or "").startswith("--no-"))


def _place(command: Command, option: Option) -> str:
    """How an option is spoken of: ``--slides``, or ``MANIFEST`` for what is given by position."""
    if option.name not in command.positionals:
        return option.flag
    return METAVARS.get(option.name, option.name.upper())


def _help(option: Option) -> str:
    text = option.help.replace("%", "%%")
    if option.required:
        return f"{text} (required)"
    default = option.default
    if default is None or default is False or default == ():
        return text
    if default is True:
        return f"{text} (default: on)"
    shown = ",".join(map(str, default)) if isinstance(default, list | tuple) else str(default)
    return f"{text} (default: {shown})"


def _spelled_out(tokens: Sequence[str], options: Mapping[str, Option]) -> list[str]:
    """``--first_stride=3`` as ``--first-stride=3``, ``--rfr off`` and ``--rfr=off`` as ``--no-rfr``."""
    switches = {option.flag for option in options.values() if option.is_switch}
    spelled: list[str] = []
    for position, token in enumerate(tokens):
        if token == "--":
            return spelled + list(tokens[position:])
        flag, equals, value = token.partition("=")
        flag = flag.replace("_", "-") if token.startswith("--") else flag
        if flag in switches and value.lower() in SWITCH_WORDS:
            spelled.append(_switch(flag, value))
        elif spelled and spelled[-1] in switches and token.lower() in SWITCH_WORDS:
            spelled[-1] = _switch(spelled[-1], token)
        else:
            spelled.append(flag + equals + value)
    return spelled


def _switch(flag: str, word: str) -> str:
    return flag if SWITCH_WORDS[word.lower()] else f"--no-{flag[2:]}"


def _missing_value(message: str, options: Mapping[str, Option]) -> Problem | None:
    for option in options.values():
        if message.startswith((f"argument {option.flag}:", f"argument {option.flag}/")):
            if option.is_switch:
                return Problem("a switch takes no value", option.flag, f"write {option.flag} or --no-{option.flag[2:]}")
            return Problem("no value given", option.flag, f"give {option.expectation}")
    return None


def _unknown_option(command: Command, flag: str, options: Iterable[Option]) -> Problem:
    known = [option.flag for option in options if option.name not in command.positionals]
    return Problem("unknown option", flag, _nearest(flag, known, f"see wholeslide {command.name} --help"))


def _nearest(name: str, known: Iterable[str], otherwise: str) -> str:
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return "did you mean " + " or ".join(near) + "?" if near else otherwise


def nearest_command(name: str, known: Iterable[str]) -> ConfigError:
    """The error for a command that there is not."""
    return ConfigError.single("unknown command", where=name, remedy=_nearest(name, known, "see wholeslide --help"))


def _check(option: Option, given: Any, where: str, values: dict[str, Any], problems: list[Problem]) -> None:
    try:
        values[option.name] = check_value(option, given)
    except ValueError:
        shown = given if isinstance(given, str) else repr(given)
        problems.append(Problem(f"{shown} is not a value it takes", where, f"give {option.expectation}"))


def _read_config(path: Path, options: Mapping[str, Option]) -> tuple[dict[str, Any], list[Problem]]:
    """The checked values of a YAML file, and what is wrong with it. Paths in it are relative to the current folder."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = (error.strerror or "cannot be read").lower()
        return {}, [Problem(reason, f"--config {path}", "name a YAML file that can be read")]
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark is not None else ""
        return {}, [Problem("not valid YAML", f"{path}{line}", "write one OPTION: VALUE a line, as in epochs: 30")]
    if content is None:
        return {}, []
    if not isinstance(content, dict):
        return {}, [Problem("not a list of options", str(path), "write one OPTION: VALUE a line, as in epochs: 30")]
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name in options:
            _check(options[name], value, f"{key} in {path}", values, problems)
        elif name not in ANNOTATIONS:
            remedy = _nearest(name, options, "remove it, or see --help for the options")
            problems.append(Problem("unknown option", f"{key} in {path}", remedy))
    return values, problems
