"""Models: the Swin Transformer V2 backbone, SimMIM, and what is applied to them from outside."""

from pathlib import Path
from typing import Any

from swinv2_scale import config
from swinv2_scale.models.convert import describe, load_checkpoint
from swinv2_scale.models.swin_v2 import SwinTransformerV2

__all__ = ["create_model", "load_checkpoint"]


def create_model(
    size: str | None = None, *, checkpoint: str | Path | None = None, **arguments: Any
) -> SwinTransformerV2:
    """A model of conf/model/{size}.yaml: debug, t, s, b, l, h, giant or g, and of clips video_debug, video_t, video_b,
    video_l or video_g; with the weights of a file, if one is named. Weights of images fit models of clips too.

    Without a size the model is the one that the file holds, as its metadata or its names and shapes tell. Any
    constructor argument of SwinTransformerV2 can be given by keyword, for example image_size=256, window_size=8,
    num_classes=1000, drop_path_rate=0.2. Raises ValueError for an unknown size or argument, for a file that leaves open
    what is not given, and for one that `load_checkpoint` refuses.
    """
    if size is not None:
        model = config.instantiate(config.compose_model(size, **arguments))
        assert isinstance(model, SwinTransformerV2)
    elif checkpoint is not None:
        model = _model_of(Path(checkpoint), arguments)
    else:
        raise ValueError("create_model needs a size (debug t s b l h giant g), a checkpoint, or both")
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model


def _model_of(path: Path, given: dict[str, Any]) -> SwinTransformerV2:
    """The model that a file of weights is of, except for what is given; its weights are not loaded yet.

    The configuration out of a file goes to the constructor only: hydra would call whatever a `_target_` in it names.
    """
    found, _ = describe(path)
    names = ["window_size", "image_size", *["frames"] * ("frames" in found.ambiguous)]
    needed = [name for name in names if name not in {**found.arguments, **given}]
    if needed:
        reason = found.ambiguous.get(needed[0], "it does not say")
        raise ValueError(
            f"checkpoint {path} leaves open {' and '.join(needed)} ({reason}): give "
            f"{' and '.join(f'{name}=…' for name in needed)}, or the model's size"
        )
    usual = config.plain(config.compose_model("t", **given))  # drop path, initialisation: what weights do not decide
    del usual["_target_"]
    if strange := sorted(found.arguments.keys() - usual.keys()):
        raise ValueError(f"checkpoint {path} has a model with {', '.join(strange)}, which is unknown here")
    return SwinTransformerV2(**{**usual, **found.arguments, **given})
