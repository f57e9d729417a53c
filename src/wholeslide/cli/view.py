"""``wholeslide view``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from wholeslide.cli.command import Command
from wholeslide.cli.output import write
from wholeslide.errors import ConfigError, Problem

_PORTS = 65535


@dataclass(frozen=True, kw_only=True)
class ViewArguments:
    """Which run is looked at, and where the viewer listens.

    Args:
        run: The run directory.
        slides: Folder of its slides, left out: where they were in training.
        pixels: Folder of the slides that files of features were made of, where the run was trained on such.
        host: Address of this machine that is listened on. Other machines reach any but a loopback address, and need the
            token of the address that is printed.
        port: Where it listens; 0 takes a free one.
    """

    run: Path
    slides: Path | None = None
    pixels: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8000

    def __post_init__(self) -> None:
        if not 0 <= self.port <= _PORTS:
            raise ConfigError([Problem(f"{self.port} is no port", "--port", f"give 0 to {_PORTS}")])


def run(arguments: ViewArguments) -> int:
    """Serve until Ctrl-C."""
    from wholeslide.viewer import serve

    def tell(address: str) -> None:
        write(f"Open {address} in a browser. Ctrl-C ends it.")

    serve(
        arguments.run,
        slides=arguments.slides,
        pixels=arguments.pixels,
        host=arguments.host,
        port=arguments.port,
        on_ready=tell,
    )
    return 0


COMMAND = Command(
    name="view",
    summary="Look at a run's slides, and at what it looked at, in a web browser.",
    arguments=ViewArguments,
    positionals=("run",),
    run=run,
    example="wholeslide view runs/first",
)
