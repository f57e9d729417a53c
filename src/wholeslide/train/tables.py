"""A plan, and the choices there were, as tables for a person."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from wholeslide.streaming.plan import Plan
from wholeslide.train.config import GIB

MIB = 2**20
_PLACES = {"device": "on the device", "host": "in host memory", "disk": "on disk"}
_WIDTH = 120
"""Of the widest table, in letters; none is ever cut to a terminal."""


def plan_lines(plan: Plan) -> list[str]:
    """A row for the stem and for each stage, of the largest view."""
    execution = plan.execution
    layout = "channels last" if execution.channels_last else "channels first"
    heading = [
        f"plan for views of up to {plan.largest} px: {execution.precision}, {layout}, features between stages "
        f"{_PLACES[plan.store]}"
    ]
    if not plan.needs:
        sides = ", ".join(str(side) for side in plan.tile_px)
        return [*heading, f"  tiles of at most {sides} px a side (stem, stages 1 to {len(plan.tile_px) - 1})"]
    rows = []
    for number, (stage, choice) in enumerate(zip(plan.needs, plan.choices, strict=True)):
        kept = stage.kept_share(choice)
        rows.append(
            [
                f"stage {number}" if number else "stem",
                f"{choice.side_px} px",
                str(stage.tiles(choice)),
                "-" if kept is None else f"{kept:.0%}",
                amount(stage.features_bytes) if stage.features_bytes else "-",
                amount(stage.peak_bytes(choice)),
            ]
        )
    return heading + table_lines(["part", "tile side", "tiles", "graphs kept", "features", "peak of a step"], rows)


def table_lines(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in plain letters: it may be read in a log."""
    table = Table(box=box.ASCII, show_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*[Text(cell) for cell in row])
    text = io.StringIO()
    Console(file=text, width=_WIDTH, color_system=None).print(table)
    return ["  " + line.rstrip() for line in text.getvalue().splitlines()]


def clock(seconds: float) -> str:
    """A length of time in the unit that suits it."""
    for limit, unit, length in ((90, "s", 1), (90 * 60, "min", 60), (48 * 3600, "h", 3600)):
        if seconds < limit:
            return f"{seconds / length:.0f} {unit}" if unit != "h" else f"{seconds / length:.1f} h"
    return f"{seconds / 86400:.1f} days"


def amount(count_bytes: float) -> str:
    """A number of bytes in KiB, MiB or GiB."""
    if 0 < count_bytes < MIB:
        return f"{count_bytes / 1024:.0f} KiB"
    return f"{count_bytes / GIB:.1f} GiB" if count_bytes >= GIB else f"{count_bytes / MIB:.0f} MiB"
