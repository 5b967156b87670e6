"""Operations against PyTorch's own counter and the paper's figures."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import swinv2_scale
from swinv2_scale.models.accounting import forward_flops, matmul_rate

SHAPES = [("t", 256, 256, 8), ("t", 224, 320, 7), ("debug", 100, 64, 4)]
# Of the paper and the released code: size, image, window, multiplications in 10^9.
KNOWN = [
    ("t", 192, 12, 3.5),
    ("t", 256, 16, 6.6),
    ("t", 384, 24, 17.4),
    ("b", 256, 8, 20.3),
    ("g", 192, 12, 370.7),
    ("g", 640, 40, 4639),
]


@pytest.mark.parametrize(("size", "rows", "columns", "window"), SHAPES)
def test_flops_are_those_that_are_counted(size: str, rows: int, columns: int, window: int) -> None:
    model = swinv2_scale.create_model(size, image_size=[rows, columns], window_size=window, num_classes=10).eval()
    for blocks in model.blocks():
        for block in blocks:
            block.attn.implementation = "reference"
    with torch.no_grad():
        one, two = FlopCounterMode(display=False), FlopCounterMode(display=False)
        with one:
            model(torch.zeros(1, 3, rows, columns))
        with two:
            model(torch.zeros(2, 3, rows, columns))
    # The network of the position bias runs once a block, whatever the batch: it falls out of the difference.
    per_image = two.get_total_flops() - one.get_total_flops()
    assert sum(forward_flops(model, rows, columns).values()) == per_image


def test_flops_of_training_are_without_dropped_branches() -> None:
    model = swinv2_scale.create_model("debug", drop_path_rate=0.4, depths=[1, 1, 1, 2], num_classes=10)
    whole, found = (forward_flops(model, 128, 128, training=training) for training in (False, True))
    assert all(found[part] == whole[part] for part in ("embedding", "merging", "head"))
    for part in ("projections", "attention", "mlp"):  # the first block keeps all, the last 0.6 of them
        assert 0.6 * whole[part] < found[part] < whole[part]
    for block in (block for blocks in model.blocks() for block in blocks):
        block.drop_path.rate = 0.25
    assert forward_flops(model, 128, 128, training=True)["mlp"] == 0.75 * whole["mlp"]


@pytest.mark.parametrize(
    ("frames", "patch_frames", "window"), [(4, 1, [2, 4, 4]), (5, 2, [2, 7, 5]), (4, 2, [8, 8, 8])]
)
def test_flops_of_a_clip_are_those_that_are_counted(frames: int, patch_frames: int, window: list[int]) -> None:
    clip = {"frames": frames, "patch_frames": patch_frames, "image_size": [52, 64], "window_size": window}
    model = swinv2_scale.create_model("video_debug", **clip).eval()
    for blocks in model.blocks():
        for block in blocks:
            block.attn.implementation = "reference"
    with torch.no_grad():
        one, two = FlopCounterMode(display=False), FlopCounterMode(display=False)
        with one:
            model(torch.zeros(1, 3, frames, 52, 64))
        with two:
            model(torch.zeros(2, 3, frames, 52, 64))
    assert sum(forward_flops(model, frames, 52, 64).values()) == two.get_total_flops() - one.get_total_flops()


@pytest.mark.parametrize(("size", "window"), [(256, 16), (320, 20), (384, 24)])
def test_a_clip_costs_what_its_frames_cost_and_attention_over_time(size: int, window: int) -> None:
    """Attention costs as many times more, with a window over all frames, as there are frames."""
    with torch.device("meta"):
        video = swinv2_scale.create_model("video_g", image_size=size, window_size=[8, window, window], num_classes=0)
        image = swinv2_scale.create_model("g", image_size=size, window_size=window, num_classes=0)
    clip, frame = forward_flops(video, 8, size, size), forward_flops(image, size, size)
    assert clip.pop("attention") == pytest.approx(8 * 8 * frame.pop("attention"), rel=1e-12)
    assert clip == pytest.approx({part: 8 * flops for part, flops in frame.items()}, rel=1e-12)


@pytest.mark.parametrize(("size", "image", "window", "giga"), KNOWN)
def test_multiplications_of_the_papers_models(size: str, image: int, window: int, giga: float) -> None:
    with torch.device("meta"):
        model = swinv2_scale.create_model(size, image_size=image, window_size=window, num_classes=0)
    found = sum(forward_flops(model, image, image).values()) / 2e9
    assert found == pytest.approx(giga, rel=0.02)


def test_the_rate_of_products_is_a_rate() -> None:
    assert 1e8 < matmul_rate(torch.device("cpu"), torch.float32) < 1e14
