"""Reading a CSV as text: what people's spreadsheets write, with each row's line number."""

from __future__ import annotations

import csv
import io
from collections import Counter
from pathlib import Path

import pandas as pd

from wholeslide.errors import CohortError, Problem

_SEPARATORS = (",", ";", "\t")


def read_text_table(path: Path) -> pd.DataFrame:
    """Every cell as stripped text; the index is the line in the file, columns are named as in the header.

    Commas, semicolons (Excel in much of Europe) and tabs separate; UTF-8 with or without a byte order mark, or UTF-16
    with one. Columns without a name (an index that a data frame left) are dropped. ``DataFrame.attrs["separator"]``
    says what separated the cells.

    Raises:
        CohortError: not there, not a text table, empty, a column twice, or rows of the wrong length.
    """
    text = _read_text(path)
    separator = _separator(text)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
        lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except csv.Error as error:
        raise _error(f"not a CSV file, {error}", path, "save it as CSV in UTF-8") from None
    lines = [(number, cells) for number, cells in lines if any(cells)]
    if len(lines) < 2:
        raise _error("no rows", path, "give a header line and a line for each file")
    header, rows = lines[0][1], lines[1:]
    _check_header(header, path)
    problems = [
        Problem(
            f"{len(cells)} cells under {len(header)} columns",
            f"{path.name} line {number}",
            "give each column a cell, and quote cells that hold the separator",
        )
        for number, cells in rows
        if len(cells) < len(header) or any(cells[len(header) :])
    ]
    if problems:
        raise CohortError(problems)
    width = len(header)
    table = pd.DataFrame(
        [cells[:width] for _, cells in rows], columns=header, index=[number for number, _ in rows], dtype=object
    )
    table.attrs["separator"] = separator
    return table.loc[:, [bool(name) and not name.lower().startswith("unnamed:") for name in header]]


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _error(f"cannot read the table, {error.strerror}", path, "check the path") from None
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        raise _error("not a text file in UTF-8", path, 'save it as "CSV UTF-8"') from None
    if "\0" in text:
        raise _error("not a text file", path, 'save it as "CSV UTF-8"')
    if not text.strip():
        raise _error("the table is empty", path, "give a header line and a line for each file")
    return text


def _separator(text: str) -> str:
    header = next(line for line in text.splitlines() if line.strip())
    return max(_SEPARATORS, key=header.count)


def _check_header(header: list[str], path: Path) -> None:
    counts = Counter(name.casefold() for name in header if name)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        problems = [
            Problem(f"column {name!r} stands twice in the header", str(path), "rename or remove one") for name in twice
        ]
        raise CohortError(problems)


def _error(what: str, path: Path, remedy: str) -> CohortError:
    return CohortError([Problem(what, str(path), remedy)])
