"""A slide file, read at the working resolution, cropped to its tissue, masked and augmented."""

from wholeslide.slides.config import AugmentationConfig, SlideConfig

__all__ = ["AugmentationConfig", "SlideConfig"]
