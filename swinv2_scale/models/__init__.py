"""Models: the Swin Transformer V2 backbone, SimMIM, and what is applied to them from outside."""

from pathlib import Path
from typing import Any

from swinv2_scale import config
from swinv2_scale.models.convert import load_checkpoint
from swinv2_scale.models.swin_v2 import SwinTransformerV2

__all__ = ["create_model", "load_checkpoint"]


def create_model(size: str, *, checkpoint: str | Path | None = None, **arguments: Any) -> SwinTransformerV2:
    """A model of conf/model/{size}.yaml: debug, t, s, b, l, h, giant or g; with the weights of a file, if one is named.

    Any constructor argument of SwinTransformerV2 can be given by keyword, for example image_size=256, window_size=8,
    num_classes=1000, drop_path_rate=0.2. Raises ValueError for an unknown size or argument, and for a file that
    `load_checkpoint` refuses.
    """
    model = config.instantiate(config.compose_model(size, **arguments))
    assert isinstance(model, SwinTransformerV2)
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model
