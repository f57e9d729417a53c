"""``wholeslide verify``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from wholeslide.cli.command import Command
from wholeslide.cli.failures import UNEXPECTED, write_line
from wholeslide.cli.output import print_json, print_table, write
from wholeslide.verify_config import VerifyConfig


@dataclass(frozen=True, kw_only=True)
class VerifyArguments:
    """What is compared, and how the result is shown.

    Args:
        json: Write JSON.
    """

    check: VerifyConfig
    json: bool = False


def run(arguments: VerifyArguments) -> int:
    """Compare, and show each stage's errors; 1 where streaming is not exact."""
    from wholeslide.allocator import fix_thresholds
    from wholeslide.verify import verify

    fix_thresholds()
    check = arguments.check
    found = verify(check)
    if found["enlarged"]:
        tiles = ", ".join(str(side) for side in found["tile_px"])
        write_line(
            f"{check.size} with tiles of {check.tile} px would check little: {found['size']} is used, "
            f"with tiles of {tiles} px (stem, then each stage)"
        )
    if arguments.json:
        print_json(found)
    else:
        _show(found)
    return 0 if found["max_gradient_error"] <= found["tolerance"] else UNEXPECTED


def _show(found: dict[str, Any]) -> None:
    rows = [
        [stage["stage"], stage["tiles"], f"{stage['output_error']:.1e}", f"{stage['gradient_error']:.1e}"]
        for stage in found["stages"]
    ]
    title = f"{found['backbone']}, {len(rows)} stages, {found['size']}, {found['dtype']}"
    print_table(["stage", "tiles", "output error", "gradient error"], rows, title=title)
    exact = found["max_gradient_error"] <= found["tolerance"]
    comparison = "at most" if exact else "more than"
    verdict = "Streamed equals whole" if exact else "Streaming is NOT exact here; please report this"
    write(f"{verdict}: the largest error is {found['max_gradient_error']:.1e}, {comparison} {found['tolerance']:.0e}.")


COMMAND = Command(
    name="verify",
    summary="Show on this machine that streaming tile by tile is exact.",
    arguments=VerifyArguments,
    run=run,
    example="wholeslide verify --backbone resnet34 --stages 4",
)
