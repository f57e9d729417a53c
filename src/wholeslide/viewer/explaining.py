"""Slides that are explained when somebody asks for it, one after another, in a thread of its own."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from queue import Queue
from threading import Lock, Thread
from typing import Literal

from wholeslide.errors import WholeslideError
from wholeslide.explain import explain_cohort
from wholeslide.viewer.gallery import Gallery

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """How far the explanation of a slide is; ``problem`` says why it failed."""

    state: Literal["none", "waiting", "working", "there", "failed"]
    problem: str | None = None


class Explaining:
    """Explains a gallery's slides into its run.

    The thread ends with the process: an explanation is there and complete, or not there.
    """

    def __init__(self, gallery: Gallery) -> None:
        self._gallery = gallery
        self._asked: Queue[str] = Queue()
        self._states: dict[str, Progress] = {}
        self._lock = Lock()
        self._thread: Thread | None = None

    def progress(self, file: str) -> Progress:
        """Of one slide."""
        with self._lock:
            found = self._states.get(file)
        if found is not None and found.state != "there":
            return found
        return Progress("there" if file in self._gallery.explained() else "none")

    def ask(self, file: str) -> Progress:
        """Explain a slide, unless it is being done or there."""
        now = self.progress(file)
        if now.state not in ("none", "failed"):
            return now
        with self._lock:
            self._states[file] = Progress("waiting")
            if self._thread is None:
                self._thread = Thread(target=self._work, name="explaining", daemon=True)
                self._thread.start()
        self._asked.put(file)
        return Progress("waiting")

    def _work(self) -> None:
        while True:
            file = self._asked.get()
            self._note(file, Progress("working"))
            self._note(file, self._explain(file))

    def _note(self, file: str, progress: Progress) -> None:
        with self._lock:
            self._states[file] = progress

    def _explain(self, file: str) -> Progress:
        gallery = self._gallery
        try:
            found = explain_cohort(gallery.run_dir, {file}, slides=gallery.slides_dir, pixels=gallery.pixels_dir)
        except WholeslideError as error:
            return Progress("failed", str(error))
        except Exception as error:  # the viewer goes on
            logger.exception("%s could not be explained", file)
            return Progress("failed", f"{type(error).__name__}: {error}")
        return Progress("failed", str(found.errors[0])) if found.errors else Progress("there")
