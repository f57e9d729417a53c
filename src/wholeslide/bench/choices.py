"""Options of the benchmarks that name several values, separated by commas."""

from __future__ import annotations

from wholeslide.errors import ConfigError, option
from wholeslide.geometry import Size


def choices(name: str, text: str, known: tuple[str, ...]) -> list[str]:
    """Words that are all ``known``, without repetition.

    Raises:
        ConfigError: one is not, or there is none.
    """
    words = _words(text)
    if not words or not set(words) <= set(known):
        raise _not_a_choice(name, text, f"choose among {', '.join(known)}")
    return words


def numbers(name: str, text: str) -> list[int]:
    """Whole numbers of 1 or more.

    Raises:
        ConfigError: one is something else, or there is none.
    """
    words = _words(text)
    if not words or not all(word.isdigit() and int(word) > 0 for word in words):
        raise _not_a_choice(name, text, "give numbers of 1 or more")
    return [int(word) for word in words]


def fractions(text: str) -> list[float]:
    """Parts of a slide's area.

    Raises:
        ConfigError: one is not above 0 and up to 1, or there is none.
    """
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < fraction <= 1 for fraction in found):
        raise ConfigError.single(
            "not parts of an area",
            where=f"--tissue-fractions {text}",
            remedy="give numbers above 0 and up to 1, separated by commas",
        )
    return found


def sizes(text: str) -> list[Size]:
    """WIDTHxHEIGHT, several of them.

    Raises:
        ConfigError: one is something else.
    """
    return [Size.parse(word) for word in text.split(",")]


def _words(text: str) -> list[str]:
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def _not_a_choice(name: str, text: str, remedy: str) -> ConfigError:
    return ConfigError.single("not a choice", where=f"{option(name)} {text}", remedy=f"{remedy}, separated by commas")
