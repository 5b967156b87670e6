"""The task of videos: views are averaged as probabilities, and what it shares with the task of images it shares."""

from pathlib import Path
from typing import Any

import pytest
import torch

from swinv2_scale import config
from swinv2_scale.tasks.video import VideoClassification

BASE = ["task=video", "model=video_debug", "model.num_classes=6", "name=x", "data.train=x", "global_batch=2"]


def task_of(*settings: str) -> VideoClassification:
    return config.instantiate(config.compose("finetune", [*BASE, *settings]).task)


def model(clips: torch.Tensor) -> torch.Tensor:
    """(B, 3, T, Y, X) -> logits (B, 6): the first six pixels of a clip."""
    return 3 * clips[:, 0, 0, 0, :6]


@pytest.mark.parametrize("flip", [False, True])
def test_probabilities_of_all_views_are_averaged(flip: bool) -> None:
    task = task_of(f"task.evaluation_flip={str(flip).lower()}")
    views = torch.randn(4, 5, 3, 2, 6, 9, generator=torch.Generator().manual_seed(0))
    batch = {"image": views, "label": torch.tensor([0, 1, 5, 3])}
    each = torch.cat([views, views.flip(-1)], dim=1) if flip else views
    mean = torch.stack([model(view).softmax(1) for view in each.unbind(1)]).mean(0)
    assert torch.allclose(task.logits(model, batch), mean.log(), atol=1e-6)
    scores = task.scores(model, batch)
    assert torch.allclose(scores["loss"], -mean.log()[torch.arange(4), batch["label"]], atol=1e-6)
    if not flip:  # which makes ties of this model's classes
        assert torch.equal(scores["top1"], mean.argmax(1) == batch["label"])
        assert torch.equal(scores["top5"], mean.argmin(1) != batch["label"])


def test_a_view_that_is_certain_and_wrong_leaves_the_loss_finite() -> None:
    views = torch.zeros(1, 2, 3, 1, 6, 6)
    views[..., 2] = 1e3
    loss = task_of().scores(model, {"image": views, "label": torch.tensor([0])})["loss"]
    assert loss.isfinite().all() and loss > 1e3


def test_pictures_are_strips_of_frames() -> None:
    batch: dict[str, Any] = {"image": torch.zeros(3, 2, 3, 16, 8, 10), "label": torch.tensor([0, 1, 2])}
    name, pictures = task_of().pictures(model, batch, list("abcdef"))
    assert name == "predictions" and len(pictures) == 3
    assert pictures[0].image.shape == (3, 8, 80) and pictures[0].image.dtype == torch.uint8
    assert [one.caption for one in pictures] == ["a (17%)", "a (17%), is b", "a (17%), is c"] and pictures[0].good


def test_what_a_result_depends_on() -> None:
    settings = task_of("task.evaluation_transform.views=4", "task.evaluation_transform.crops=5").settings
    assert settings == {
        **{"image_size": 64, "frames": 4, "sampling": "dense", "interval": 8, "shuffled": False},
        **{"views": 4, "crops": 5, "resize": 1.0, "interpolation": "bicubic", "flip": False},
    }


def test_a_model_of_images_is_refused() -> None:
    with pytest.raises(ValueError, match="clips need a model of clips: choose model=video_b"):
        task_of("model=debug")


def test_weights_of_images_start_a_model_of_clips(tmp_path: Path, one_rank: None) -> None:
    from safetensors.torch import save_file

    from swinv2_scale import create_model, run

    image = create_model("debug", num_classes=6, image_size=64, window_size=4)
    save_file(image.state_dict(), tmp_path / "image.safetensors")
    cfg = config.compose("finetune", [*BASE, f"checkpoint={tmp_path}/image.safetensors"])
    with torch.device("meta"):
        video = task_of().build(cfg.model)
    start = run.starting_weights(cfg, video)
    weight = start("patch_embed.proj.weight")
    assert weight.shape[2] == 1 and torch.equal(weight[:, :, 0], image.patch_embed.proj.weight)
    assert start("layers.0.blocks.0.attn.cpb_mlp.0.weight")[:, 0].count_nonzero() == 0
