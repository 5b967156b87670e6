"""Soft-NMS (https://arxiv.org/abs/1704.04503): boxes that overlap a better one lose score instead of their place."""

import torch
from torch import Tensor
from torchvision.ops import box_iou

METHODS = ("linear", "gaussian", "hard")


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    *,
    method: str,
    iou_threshold: float,
    sigma: float,
    score_threshold: float,
    most: int,
) -> tuple[Tensor, Tensor]:
    """Indices of the `most` best boxes (K,), best first, and their scores (K,) after suppression.

    boxes (N, 4), scores (N,), labels (N,): only boxes of one label suppress each other. Again and again the best box
    is taken, and the scores s of the others become, by their overlap u with it,

        linear     s · (1 - u) where u > iou_threshold
        gaussian   s · exp(-u² / sigma)
        hard       0 where u > iou_threshold, which is ordinary NMS

    until `most` are taken or none is above score_threshold. Scores only fall, so that the first `most` of all are found
    after `most` rounds. Raises ValueError for another method.
    """
    if method not in METHODS:
        raise ValueError(f"suppression must be one of {', '.join(METHODS)}, got {method!r}")
    left = scores.clone()
    kept: list[Tensor] = []
    kept_scores: list[Tensor] = []
    for _ in range(min(most, len(boxes))):
        best = left.argmax()
        if left[best] <= score_threshold:
            break
        kept.append(best)
        kept_scores.append(left[best].clone())
        overlap = box_iou(boxes[best][None], boxes)[0] * (labels == labels[best])
        if method == "linear":
            left *= torch.where(overlap > iou_threshold, 1 - overlap, 1.0)
        elif method == "gaussian":
            left *= torch.exp(-(overlap**2) / sigma)
        else:
            left *= overlap <= iou_threshold
        left[best] = -1.0
    if not kept:
        return labels.new_zeros(0, dtype=torch.int64), scores.new_zeros(0)
    return torch.stack(kept), torch.stack(kept_scores)
