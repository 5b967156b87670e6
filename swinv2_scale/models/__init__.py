"""Models: the Swin Transformer V2 backbone, SimMIM, and what is applied to them from outside."""

from typing import Any

from swinv2_scale import config
from swinv2_scale.models.swin_v2 import SwinTransformerV2

__all__ = ["create_model"]


def create_model(size: str, **arguments: Any) -> SwinTransformerV2:
    """A model of conf/model/{size}.yaml: debug, t, s, b, l, h, giant or g.

    Any constructor argument of SwinTransformerV2 can be given by keyword, for example image_size=256, window_size=8,
    num_classes=1000, drop_path_rate=0.2. Raises ValueError for an unknown size or argument.
    """
    model = config.instantiate(config.compose_model(size, **arguments))
    assert isinstance(model, SwinTransformerV2)
    return model
