"""Colours as the scanner's ICC profile says, turned into sRGB."""

from __future__ import annotations

import io
import threading

import numpy as np
from PIL import Image, ImageCms

from wholeslide.slides.readers import Pixels


class ToSrgb:
    """A profile's colours as sRGB, pixel by pixel.

    Raises:
        ValueError: the profile is damaged, or not one of red, green and blue.
    """

    def __init__(self, icc_profile: bytes) -> None:
        self._icc_profile = icc_profile
        self._of_thread = threading.local()
        self._transform()

    def __call__(self, pixels: Pixels) -> Pixels:
        """Of uint8 (height, width, 3), the same in sRGB."""
        image = ImageCms.applyTransform(Image.fromarray(pixels), self._transform())
        assert image is not None
        return np.asarray(image)

    def _transform(self) -> ImageCms.ImageCmsTransform:
        """One a thread: the library keeps what it did last in it."""
        if not hasattr(self._of_thread, "transform"):
            try:
                profile = ImageCms.ImageCmsProfile(io.BytesIO(self._icc_profile))
                srgb = ImageCms.createProfile("sRGB")
                self._of_thread.transform = ImageCms.buildTransform(profile, srgb, "RGB", "RGB")
            except (ImageCms.PyCMSError, OSError) as error:
                raise ValueError(str(error)) from error
        transform: ImageCms.ImageCmsTransform = self._of_thread.transform
        return transform
