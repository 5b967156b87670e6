"""Classification of videos, by the conventions of Kinetics: many views of a video, judged by their mean."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from swinv2_scale.data.images import EncodedImage
from swinv2_scale.data.shards import filmed
from swinv2_scale.data.stream import Batch
from swinv2_scale.data.transforms import to_uint8
from swinv2_scale.tasks.classification import Classification
from swinv2_scale.train import Prediction

SHOWN = 8  # frames in the picture of a clip


class VideoClassification(Classification):
    """As Classification, of clips (B, 3, T, Y, X); held-out videos are (B, V, 3, T, Y, X), of V views.

    With evaluation_flip there are mirrored views beside them.
    """

    open_sample = staticmethod(filmed)

    def logits(self, model: Callable, batch: Batch) -> Tensor:
        """Logarithms of probabilities that are means over a video's views: float32 (B, classes).

        One view after the other, so that memory does not depend on their number.
        """
        views = batch["image"].unbind(1)
        if self.evaluation_flip:
            views = (*views, *(view.flip(-1) for view in views))
        logs = torch.stack([torch.log_softmax(model(view).float(), dim=1) for view in views])
        return logs.logsumexp(0) - math.log(len(logs))

    def picture(self, image: Tensor) -> Tensor:
        """Up to SHOWN frames of the first view side by side."""
        clip = image[0]
        return torch.cat([to_uint8(frame) for frame in clip[:, :: -(-clip.shape[1] // SHOWN)].unbind(1)], dim=2)

    def predict(self, model: nn.Module, image: EncodedImage, classes: Sequence[str]) -> Prediction:
        """Raises ValueError: a picture is no video."""
        raise ValueError(
            "a model of videos says nothing of a picture: pack the videos, and let launch/evaluate.py judge them"
        )
