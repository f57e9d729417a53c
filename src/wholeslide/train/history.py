"""What a run logs: a row a training slide, a row an epoch, in CSV, and the same for TensorBoard, W&B and MLflow."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wholeslide.errors import ConfigError
from wholeslide.train.checkpoint import disk_errors, write_atomically
from wholeslide.train.state import LoopState

if TYPE_CHECKING:
    from lightning.fabric.loggers.logger import Logger

Row = Mapping[str, str | int | float]


class History:
    """The ``log`` folder. ``slides.csv`` and ``epochs.csv`` are always written, every row at once."""

    def __init__(self, folder: Path, loggers: Sequence[Logger]) -> None:
        self.slides = CsvLog(folder / "slides.csv")
        self.epochs = CsvLog(folder / "epochs.csv")
        self.loggers = loggers

    def roll_back(self, state: LoopState) -> None:
        """Drop the rows of what is going to be trained again."""
        self.slides.keep("slides_seen", state.slides_seen)
        self.epochs.keep("epochs_seen", state.epochs_seen)

    def slide(self, row: Row) -> None:
        """One training slide. ``row`` has ``slides_seen``, counting it."""
        self.slides.append(row)
        self._send("slide", row, int(row["slides_seen"]))

    def epoch(self, row: Row) -> None:
        """One finished epoch. ``row`` has ``epochs_seen``, counting it."""
        self.epochs.append(row)
        self._send("epoch", row, int(row["epochs_seen"]))

    def close(self) -> None:
        """Let the loggers write what they hold back."""
        for logger in self.loggers:
            logger.finalize("success")

    def _send(self, prefix: str, row: Row, step: int) -> None:
        numbers = {f"{prefix}/{key}": float(value) for key, value in row.items() if not isinstance(value, str)}
        for logger in self.loggers:
            logger.log_metrics(numbers, step)


class CsvLog:
    """A CSV file that rows are appended to. Its columns are those of its first row."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: Row) -> None:
        """Write a row, on disk when this returns but for the system's own buffers.

        Raises:
            RunError: the disk is full.
        """
        header = [] if self.path.exists() else [list(row)]
        with disk_errors(self.path), self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(_csv_text([*header, list(row.values())]))

    def keep(self, column: str, last: int) -> None:
        """Drop the rows whose ``column`` is above ``last``, and a row that a kill cut off."""
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1].decode("utf-8")
        header, *rows = list(csv.reader(io.StringIO(whole, newline=""))) or [[]]
        if not header:
            self.path.unlink()
            return
        at = header.index(column)
        # A row that was cut off at a line break inside a name is shorter than the header.
        kept = [row for row in rows if len(row) == len(header) and int(row[at]) <= last]
        with disk_errors(self.path):
            write_atomically(self.path, _csv_text([header, *kept]).encode())


def _csv_text(rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def make_loggers(names: Sequence[str], folder: Path, *, run_name: str, first_step: int) -> list[Logger]:
    """The loggers beside CSV, writing into the run's ``log`` folder.

    Raises:
        ConfigError: one is asked for that is not installed.
    """
    check_loggers(names)
    loggers: list[Logger] = []
    for name in names:
        if name == "tensorboard":
            fabric = importlib.import_module("lightning.fabric.loggers")
            loggers.append(fabric.TensorBoardLogger(folder, name="", version="", purge_step=first_step))
        elif name == "wandb":
            lightning = importlib.import_module("lightning.pytorch.loggers")
            loggers.append(lightning.WandbLogger(name=run_name, save_dir=folder, project="wholeslide"))
        elif name == "mlflow":
            lightning = importlib.import_module("lightning.pytorch.loggers")
            loggers.append(
                lightning.MLFlowLogger("wholeslide", run_name=run_name, tracking_uri=f"file:{folder / 'mlflow'}")
            )
    return loggers


def check_loggers(names: Sequence[str]) -> None:
    """See that the loggers are installed.

    Raises:
        ConfigError: one is not.
    """
    for name in names:
        if name in ("wandb", "mlflow") and importlib.util.find_spec(name) is None:
            raise ConfigError.single(
                f"the logger {name!r} is not installed",
                where="--loggers",
                remedy=f"run `pip install wholeslide[{name}]`, or leave it out",
            )
