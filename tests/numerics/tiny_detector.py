"""A detector that runs in a tenth of a second, and images with rectangles for it."""

from typing import Any

import torch
from torch import Tensor

from swinv2_scale.models import create_model
from swinv2_scale.models.detection.cascade import CascadeRCNN

HTC: dict[str, Any] = {
    **{"num_classes": 3, "iou_thresholds": [0.5, 0.6, 0.7], "box_stds": [0.1, 0.05, 0.033]},
    **{"stage_weights": [1, 0.5, 0.25], "masks": True, "mask_information_flow": True, "semantic_classes": 4},
    **{"semantic_weight": 0.2, "global_attention": True, "channels": 32, "box_convolutions": 1, "box_features": 64},
    **{"mask_convolutions": 1, "semantic_convolutions": 1, "anchor_sizes": [16, 24, 32, 48, 64], "proposals": 40},
    **{"samples": 32, "positive_share": 0.25, "crowd_overlap": 0.5, "suppression": "linear", "suppression_iou": 0.5},
    **{"suppression_sigma": 0.5, "score_threshold": 0.001, "detections": 20},
}


def detector(seed: int = 0, **changes: Any) -> CascadeRCNN:
    """HTC++ on model `debug`, with random weights where a fresh model has zeros."""
    torch.manual_seed(seed)
    encoder = create_model("debug", num_classes=0, image_size=64)
    model = CascadeRCNN(encoder, **{**HTC, **changes})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".norm1." in name or ".norm2." in name:  # so that blocks and the global attention do something
                parameter.normal_(std=0.1)
    return model


def scene(size: tuple[int, int], boxes: list[list[int]], labels: list[int], *, seed: int = 0) -> tuple[Tensor, Any]:
    """A noisy image (3, Y, X) whose rectangles have the colour of their class, and its target, all of its parts."""
    rows, columns = size
    image = torch.randn(3, rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1
    masks = torch.zeros(len(boxes), rows, columns, dtype=torch.uint8)
    semantic = torch.zeros(rows, columns, dtype=torch.int64)
    for mask, (x1, y1, x2, y2), label in zip(masks, boxes, labels, strict=True):
        mask[y1:y2, x1:x2] = 1
        image[label, y1:y2, x1:x2] += 2
        semantic[y1:y2, x1:x2] = label + 1
    target = {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "crowd": torch.zeros(0, 4),
        "masks": masks,
        "has_mask": torch.ones(len(boxes), dtype=torch.bool),
        "semantic": semantic,
    }
    return image, target


def batch() -> tuple[Tensor, list[tuple[int, int]], list[Any]]:
    """Two images of 64 x 64 pixels with two objects and one."""
    first, second = (
        scene((64, 64), [[4, 8, 28, 40], [34, 30, 60, 62]], [0, 1]),
        scene((64, 64), [[14, 10, 50, 34]], [2], seed=1),
    )
    return torch.stack([first[0], second[0]]), [(64, 64)] * 2, [first[1], second[1]]
