"""From the y of pixels, or the bytes of images, to shades that can be shown."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.colors import to_rgb
from torch import Tensor

from metabatch_cli.report.style import numbers

UNKNOWN = "#8FAAC8"  # a pixel that the context does not hold: no grey, so no shade of an image


@dataclass(frozen=True)
class PixelScale:
    """From the y of pixels, or the bytes of images, to shades of [0, 1]."""

    low: float
    high: float

    @classmethod
    def of(cls, y: Tensor) -> PixelScale:
        """Black to white: from 0 to 1 if that holds all of y, else from its least to its most."""
        if not y.is_floating_point():
            return cls(0.0, 255.0)
        values = numbers(y)
        low, high = float(values.min()), float(values.max())
        if low >= -1e-3 and high <= 1 + 1e-3:
            low, high = 0.0, 1.0
        return cls(low, high if high > low else low + 1.0)

    def shade(self, values: np.ndarray) -> np.ndarray:
        """`[H, W, C]` in y's units → `[H, W, 3]`; else than 3 channels: the first."""
        shades = (values - self.low) / (self.high - self.low)
        shades = np.nan_to_num(shades).clip(0, 1)
        return shades if shades.shape[-1] == 3 else shades[..., :1].repeat(3, axis=-1)

    def masked(self, values: np.ndarray, known: np.ndarray) -> np.ndarray:
        """As `shade`, with all pixels but the known ones, in raster order, in another colour."""
        shades = self.shade(values).reshape(-1, 3)
        picture = np.tile(to_rgb(UNKNOWN), (len(shades), 1))
        picture[known] = shades[known]
        return picture.reshape(*values.shape[:2], 3)
