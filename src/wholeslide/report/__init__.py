"""A page that says what a run learned, how well, and on what: ``report.html``, with nothing beside it."""

from wholeslide.report.page import Report, report

__all__ = ["Report", "report"]
