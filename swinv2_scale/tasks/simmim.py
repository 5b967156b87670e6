"""Masked image modelling (SimMIM): pretraining without labels."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from swinv2_scale.config import instantiate
from swinv2_scale.data.images import EncodedImage
from swinv2_scale.data.shards import labelled
from swinv2_scale.data.stream import Batch
from swinv2_scale.data.transforms import SimMIMEvaluationTransform, collate, to_uint8
from swinv2_scale.models.simmim import SimMIM
from swinv2_scale.models.swin_v2 import PATCH, SwinTransformerV2
from swinv2_scale.telemetry import Picture
from swinv2_scale.train import Evaluation, Prediction


class MaskedImageModelling:
    """Reconstructs hidden pixels. norm_target_window: see models/simmim.py."""

    open_sample = staticmethod(labelled)
    metrics = ("loss",)
    tallies: ClassVar[dict[str, tuple[int, ...]]] = {}
    num_classes = 0
    shown = 8

    def __init__(
        self, *, train_transform: Callable, evaluation_transform: SimMIMEvaluationTransform, norm_target_window: int
    ) -> None:
        self.train_transform, self.evaluation_transform = train_transform, evaluation_transform
        of = evaluation_transform
        self.settings = {"image_size": of.image_size, "mask_unit": of.mask_unit, "mask_ratio": of.mask_ratio}
        self.train_collate = self.evaluation_collate = collate
        self.norm_target_window = norm_target_window

    def build(self, model: Any) -> SimMIM:
        """The model to train, from a configuration of the backbone."""
        return SimMIM(instantiate(model, num_classes=0), norm_target_window=self.norm_target_window)

    def backbone(self, model: nn.Module) -> SwinTransformerV2:
        """The part of a built model that `checkpoint=` fills."""
        assert isinstance(model, SimMIM)
        return model.encoder

    def check_classes(self, *classes: Sequence[str], highest_label: int | None = None) -> None:
        """Labels are not used: any data fits."""

    def loss(self, model: Callable, batch: Batch) -> Tensor:
        """Mean L1 distance over hidden pixels."""
        return model(batch["image"], batch["mask"])

    def scores(self, model: Callable, batch: Batch) -> dict[str, Tensor]:
        """The loss, (B,), the same for each: every image has equally many hidden pixels."""
        return {"loss": self.loss(model, batch).expand(len(batch["key"]))}

    def derived(self, tallies: dict[str, Tensor]) -> dict[str, float]:
        """Nothing but the mean loss."""
        return {}

    def per_class(self, outcome: Evaluation) -> dict[str, list[float]]:
        """There are no classes."""
        return {}

    def pictures(self, model: nn.Module, batch: Batch, classes: Sequence[str]) -> tuple[str, list[Picture]]:
        """Original, masked image and reconstruction side by side, for 8 images of a held-out batch."""
        assert isinstance(model, SimMIM)
        images, mask = batch["image"][:8], batch["mask"][:8]
        predicted = model.reconstruct(images, mask).to(images.dtype)
        if self.norm_target_window:  # predicted in units of local mean and spread, which hidden pixels do not tell
            predicted = predicted * images.std(dim=(2, 3), keepdim=True) + images.mean(dim=(2, 3), keepdim=True)
        hidden = mask.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)[:, None]
        rebuilt = torch.where(hidden.bool(), predicted, images)
        panels = torch.cat((images, torch.where(hidden.bool(), 0.0, images), rebuilt), dim=3)
        return "reconstructions", [
            Picture(to_uint8(panel), key) for panel, key in zip(panels, batch["key"], strict=False)
        ]

    def predict(self, model: nn.Module, image: EncodedImage, classes: Sequence[str]) -> Prediction:
        """Raises ValueError: there are no classes."""
        raise ValueError(
            "a SimMIM fills in hidden pixels and knows no classes: train it for some first, with launch/finetune.py "
            "checkpoint=… (its report shows what it fills in)"
        )
