"""Augmentation: every image turned, stretched, sheared and moved a little, at random."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Le, Lt
from torch import Tensor
from torch.nn import functional as F

from metabatch_cli.batching.arguments import at_least, one_of


class Affine:
    """A random affine map of each image, about its centre, by bilinear interpolation.

    Each number is drawn uniformly between its negative and itself, one for every image.

    Args:
        rotate: degrees that it is turned by.
        scale: by how much height and width change, each by itself, as fractions.
        shear: how far a row moves against the one a unit above.
        shift: pixels that it is moved by, along either axis.
        beyond: what stands beyond the image's edges: `zeros`, or the pixel at the `border`.

    Raises:
        ValueError: a number below 0, a scale of 1 or more.
    """

    def __init__(
        self,
        rotate: Annotated[float, Ge(0), Le(180)] = 10.0,
        scale: Annotated[float, Ge(0), Lt(1)] = 0.1,
        shear: Annotated[float, Ge(0)] = 0.1,
        shift: Annotated[float, Ge(0)] = 1.5,
        beyond: Literal["zeros", "border"] = "zeros",
    ) -> None:
        self.rotate = at_least("rotate", rotate, 0)
        self.scale = at_least("scale", scale, 0)
        self.shear = at_least("shear", shear, 0)
        self.shift = at_least("shift", shift, 0)
        self.beyond = one_of("beyond", beyond, ("zeros", "border"))
        if scale >= 1:
            raise ValueError(f"scale={scale} must be below 1: an image would have no size")

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """`images [images, C, H, W]` uint8 → the same shape and type."""
        draws = 2 * torch.rand(6, len(images), generator=generator) - 1
        angle = math.radians(self.rotate) * draws[0]
        wider, higher = 1 + self.scale * draws[1:3]
        cosine, sine = angle.cos(), angle.sin()
        sides = torch.tensor(images.shape[:1:-1])[:, None]  # width, height
        moved = 2 * self.shift * draws[4:6] / sides  # the image goes from −1 to 1
        aspect = images.shape[2] / images.shape[3]  # a turn is one of pixels
        across = [cosine * wider, (self.shear * draws[3] - sine) * aspect, moved[0]]
        down = [sine / aspect, cosine * higher, moved[1]]
        maps = torch.stack([torch.stack(across, dim=1), torch.stack(down, dim=1)], dim=1)
        places = F.affine_grid(maps, list(images.shape), align_corners=False)
        changed = F.grid_sample(
            images.float(), places, padding_mode=self.beyond, align_corners=False
        )
        return changed.round_().to(torch.uint8)
