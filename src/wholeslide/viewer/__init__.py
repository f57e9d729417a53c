"""A run's slides in a web browser: the slides themselves, at every resolution, and what the run looked at."""

from wholeslide.viewer.gallery import Gallery
from wholeslide.viewer.server import serve

__all__ = ["Gallery", "serve"]
