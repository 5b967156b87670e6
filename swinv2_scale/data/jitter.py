"""Objects moved a little inside their own image: InstaBoost (arXiv 1908.07801), simplified.

As there, an object is shifted, scaled and turned by little, where the background is likely to continue. The hole that
it leaves is filled smoothly from the pixels around it, where InstaBoost paints the background by an algorithm of
OpenCV's; objects are cut out along their masks, without matting; and there is no map of likely places for far jumps.
"""

import torch
import torch.nn.functional as F
from torchvision.ops import masks_to_boxes
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as V

Target = dict[str, torch.Tensor]

IGNORED = 255  # of a semantic map, where no class is
SHIFT, SCALE, ANGLE = 1 / 15, (0.8, 1.2), 1.0  # InstaBoost's: of the object's sides at most, a factor, degrees at most
LEFT = 0.5  # of another object's pixels, which must stay free, or else an object is not moved


class ObjectJitter:
    """Moves each object that has a mask with `probability`, by draws from torch's default generator.

    No object is lost. Raises ValueError for what is no probability.
    """

    def __init__(self, probability: float) -> None:
        if not 0 <= probability <= 1:
            raise ValueError(f"object_jitter must be a probability from 0 to 1, got {probability}")
        self.probability = probability

    def __call__(self, image: torch.Tensor, target: Target) -> tuple[torch.Tensor, Target]:
        """An image, uint8 (3, Y, X), and its target; the same ones where nothing is moved."""
        drawn = target["has_mask"].tolist() if "masks" in target and self.probability > 0 else []
        for number in (number for number, has_mask in enumerate(drawn) if has_mask):
            chance, across, down, size, turn = torch.rand(5).tolist()
            if chance < self.probability:
                shift, scale = (
                    (SHIFT * (2 * across - 1), SHIFT * (2 * down - 1)),
                    SCALE[0] + size * (SCALE[1] - SCALE[0]),
                )
                image, target = moved(image, target, number, shift=shift, scale=scale, angle=ANGLE * (2 * turn - 1))
        return image, target


def moved(
    image: torch.Tensor, target: Target, number: int, *, shift: tuple[float, float], scale: float, angle: float
) -> tuple[torch.Tensor, Target]:
    """An image and its target with one object elsewhere: it covers what is there, and its old place is filled.

    shift (x, y) in its sides, scale and angle (degrees) around its centre. Unchanged if nothing would be left of it, or
    less than LEFT of another object.
    """
    # 1  the part of the image in which it moves, as views of everything
    x1, y1, x2, y2 = (int(edge) for edge in around(target["masks"][number : number + 1])[0])
    room = max(x2 - x1, y2 - y1) // 4 + 2
    top, left = max(0, y1 - room), max(0, x1 - room)
    place = (..., slice(top, y2 + room), slice(left, x2 + room))
    masks = target["masks"][place] > 0
    own, others = masks[number], masks.clone()
    others[number] = False
    # 2  where it goes
    motion = {
        **{"angle": angle, "scale": scale, "shear": [0.0, 0.0]},
        "translate": [round(shift[0] * (x2 - x1)), round(shift[1] * (y2 - y1))],
        "center": [(x1 + x2) / 2 - left, (y1 + y2) / 2 - top],
    }
    there = V.affine(own[None].to(torch.uint8), **motion)[0] > 0
    whole = torch.ones_like(own[None], dtype=torch.float32)
    # Pixels from beyond the image's edge, even in part, would be black.
    there &= V.affine(whole, **motion, interpolation=InterpolationMode.BILINEAR)[0] > 0.99
    covered = (others & there).flatten(1).sum(dim=1)
    area = (target["masks"] > 0).flatten(1).sum(dim=1)
    if not there.any() or (area - covered < LEFT * area)[covered > 0].any():
        return image, target
    # 3  pixels, masks, boxes
    hole = own & ~others.any(dim=0)
    background = filled(image[place].float(), ~masks.any(dim=0)).round().to(image.dtype)
    pixels = V.affine(image[place], **motion, interpolation=InterpolationMode.BILINEAR)
    image, new = image.clone(), {**target, "masks": target["masks"].clone(), "boxes": target["boxes"].clone()}
    image[place] = torch.where(there, pixels, torch.where(hole, background, image[place]))
    others &= ~there
    others[number] = there
    new["masks"][place] = others.to(new["masks"].dtype)
    changed = covered > 0
    changed[number] = True
    new["boxes"][changed] = around(new["masks"][changed])
    if "semantic" in target:
        new["semantic"] = target["semantic"].clone()
        classes = V.affine(target["semantic"][place][None], **motion)[0]
        new["semantic"][place] = torch.where(there, classes, torch.where(hole, IGNORED, target["semantic"][place]))
    return image, new


def filled(image: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """An image, float (C, Y, X), whose pixels that are not `known`, bool (Y, X), follow from those around them.

    At half the resolution a pixel is the mean of the known ones of four, and so on until all are; back up, bilinearly.
    """
    if known.all() or not known.any():
        return image
    weight = known[None].to(image.dtype)
    share = F.avg_pool2d(weight, 2, ceil_mode=True)
    half = F.avg_pool2d(image * weight, 2, ceil_mode=True) / share.clamp(min=1e-6)
    coarse = filled(half, share[0] > 0)
    return torch.where(known, image, F.interpolate(coarse[None], image.shape[1:], mode="bilinear")[0])


def around(masks: torch.Tensor) -> torch.Tensor:
    """The boxes (N, 4) of masks (N, Y, X) with pixels; a pixel has an extent."""
    return masks_to_boxes(masks) + torch.tensor([0.0, 0.0, 1.0, 1.0])
