"""What a worker process runs; see :mod:`wholeslide.slides.workers`."""

from __future__ import annotations

from multiprocessing.connection import Connection

from wholeslide.slides.opening import open_here
from wholeslide.slides.workers import Serving, ignore_interrupts


def serve(handle: int) -> None:
    """Open and read slides for the process at the other end of the socket ``handle``, until it ends."""
    ignore_interrupts()
    connection = Connection(handle)
    connection.send(None)  # it is there
    Serving(open_here).run(connection)
