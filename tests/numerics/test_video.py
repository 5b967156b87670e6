"""Models of clips: what they share with models of images, in float64, and what time adds."""

import json
import re
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from test_model import blocks_of, drawn, model_of
from torch import Tensor

from swinv2_scale import create_model, load_checkpoint
from swinv2_scale.models import convert, layouts, memory, swin_v2
from swinv2_scale.models.position_bias import PositionBias
from swinv2_scale.models.simmim import SimMIM
from swinv2_scale.models.swin_v2 import SwinTransformerV2, stage_grid
from swinv2_scale.models.video import inflate
from swinv2_scale.ops import native

EXACT = {"rtol": 0.0, "atol": 1e-9}
SMALL = {"depths": [2, 2], "num_heads": [2, 4], "image_size": (32, 24)}


def image_model(**changes) -> SwinTransformerV2:
    """Two stages of 8×6 and 4×3 patches, every parameter random, in float64."""
    return drawn(model_of(**{**SMALL, "window_size": (3, 4), **changes}).double())


def video_model(**changes) -> SwinTransformerV2:
    """The same over clips; its window over time is 4 patches."""
    return drawn(model_of(**{**SMALL, "frames": 8, "window_size": (4, 3, 4), **changes}).double())


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def still(images: Tensor, frames: int) -> Tensor:
    """(B, C, Y, X) -> the clip (B, C, T, Y, X) of equal frames."""
    return images[:, :, None].expand(-1, -1, frames, -1, -1)


def time_columns(model: SwinTransformerV2) -> list[Tensor]:
    """Of each block's position bias, the weights of its input of time."""
    return [block.attn.cpb_mlp.get_parameter("0.weight")[:, 0] for block in blocks_of(model)]


# -------------------------------------------------------------------------------------------------------- inflation


@pytest.mark.parametrize("patch_frames", [1, 2, 3])
@pytest.mark.parametrize(("frames", "window"), [(1, 1), (8, 1), (8, 4), (8, 3), (7, 2), (8, 8), (5, 16), (12, 5)])
def test_a_clip_of_equal_frames_gives_what_the_image_gives(frames: int, window: int, patch_frames: int) -> None:
    image = image_model(extra_norm_period=2)
    video = video_model(
        extra_norm_period=2,
        frames=frames,
        patch_frames=patch_frames,
        window_size=(window, 3, 4),
        pretrained_window_size=[[window, *reference] for reference in image.pretrained_windows],
    )
    video.load_state_dict(inflate(image.state_dict(), patch_frames))
    images = draw(2, 3, 29, 24)
    clip = still(images, frames)
    patches = -(-frames // patch_frames)
    for flat, deep in zip(image.forward_features(images), video.forward_features(clip), strict=True):
        assert deep.shape == (2, patches, *flat.shape[1:])
        assert flat.std() > 0.5  # not zeros
        assert torch.allclose(deep, flat[:, None].expand_as(deep), **EXACT)
    assert torch.allclose(video(clip), image(images), **EXACT)


def test_time_counts_as_soon_as_the_bias_has_learned_it() -> None:
    image, video = image_model(), video_model()
    video.load_state_dict(inflate(image.state_dict(), 1))
    images = draw(2, 3, 32, 24)
    video(draw(2, 3, 8, 32, 24)).square().sum().backward()
    for block in blocks_of(video):
        assert block.attn.cpb_mlp.get_parameter("0.weight").grad[:, 0].abs().max() > 1e-6  # a first step moves it
    with torch.no_grad():
        for column in time_columns(video):
            column.add_(0.5)
    assert (video(still(images, 8)) - image(images)).abs().max() > 1e-3


def test_inflated_weights() -> None:
    state = image_model().state_dict()
    inflated = inflate(state, 4)
    video = video_model(frames=8, patch_frames=4)
    assert {name: tensor.shape for name, tensor in inflated.items()} == {
        name: tensor.shape for name, tensor in video.state_dict().items()
    }
    patch = inflated["patch_embed.proj.weight"]
    assert torch.allclose(patch.sum(2), state["patch_embed.proj.weight"]) and torch.equal(
        patch[:, :, 0], patch[:, :, 3]
    )
    bias = "layers.1.blocks.1.attn.cpb_mlp.0.weight"
    assert inflated[bias][:, 0].count_nonzero() == 0 and torch.equal(inflated[bias][:, 1:], state[bias])
    changed = {name for name in state if state[name].shape != inflated[name].shape}
    assert changed == {"patch_embed.proj.weight", *(name for name in state if name.endswith("cpb_mlp.0.weight"))}
    assert all(inflated[name] is state[name] for name in state if name not in changed)


def test_what_cannot_be_inflated() -> None:
    with pytest.raises(ValueError, match="patch_frames must be at least 1, got 0"):
        inflate(image_model().state_dict(), 0)
    with pytest.raises(ValueError, match="only weights of images can be inflated"):
        inflate(video_model().state_dict(), 1)


# ------------------------------------------------------------------------------------------------------------- time


@pytest.mark.parametrize(
    ("frames", "window", "patch_frames"), [(8, 4, 1), (8, 2, 1), (12, 6, 1), (5, 8, 1), (4, 4, 1), (16, 4, 2)]
)
def test_reversed_time_is_a_mirrored_time_column(frames: int, window: int, patch_frames: int) -> None:
    """Where windows divide the clip evenly, or one covers it; else the ends of a clip are not alike."""
    model = video_model(frames=frames, window_size=(window, 3, 4), patch_frames=patch_frames)
    mirrored = video_model(frames=frames, window_size=(window, 3, 4), patch_frames=patch_frames)
    with torch.no_grad():
        for column in time_columns(mirrored):
            column.neg_()
        patch = mirrored.patch_embed.proj.weight
        patch.copy_(patch.flip(2))
    clip = draw(1, 3, frames, 32, 24)
    for one, other in zip(model.forward_features(clip), mirrored.forward_features(clip.flip(2)), strict=True):
        assert torch.allclose(one, other.flip(1), **EXACT)
    assert torch.allclose(model(clip), mirrored(clip.flip(2)), **EXACT)
    assert (model(clip) - model(clip.flip(2))).abs().max() > 1e-6  # its order matters


def test_windows_of_one_frame_treat_frames_apart() -> None:
    image, video = image_model(), video_model(frames=3, window_size=(1, 3, 4))
    video.load_state_dict(inflate(image.state_dict(), 1))
    clip = draw(2, 3, 3, 32, 24)
    maps = video.forward_features(clip)
    for frame in range(3):
        for flat, deep in zip(image.forward_features(clip[:, :, frame]), maps, strict=True):
            assert torch.allclose(deep[:, frame], flat, **EXACT)


def test_how_far_a_frame_reaches() -> None:
    """Two blocks, windows of 4: the first reaches frames 4 to 7 from frame 7, the second, shifted by 2, 2 to 5."""
    model = video_model(depths=[2], num_heads=[2])
    clip = draw(1, 3, 8, 32, 24)
    other = clip.clone()
    other[:, :, 7] += 1.0
    change = (model.forward_features(other)[0] - model.forward_features(clip)[0]).abs().amax(dim=(0, 2, 3, 4))
    assert (change[:2] < 1e-12).all() and (change[2:] > 1e-6).all()


@pytest.mark.parametrize("order", [(0, 2, 1), (1, 0, 2), (2, 1, 0), (1, 2, 0)], ids=str)
def test_a_block_treats_all_axes_alike(order: tuple[int, ...]) -> None:
    """Axes of the map, the window and the bias in another order give the same map with its axes in that order."""
    window, reference, grid = (2, 3, 4), (2, 3, 3), (5, 6, 4)

    def block(axes: tuple[int, ...]) -> swin_v2.Block:
        return swin_v2.Block(
            16,
            2,
            window=[window[a] for a in axes],
            shifted=True,
            reference=[reference[a] for a in axes],
            mlp_ratio=2.0,
            drop_path_rate=0.0,
            extra_norm=False,
            position_bias="log",
        ).double()

    one, other = drawn(block((0, 1, 2))), block(order)
    state = one.state_dict()
    state["attn.cpb_mlp.0.weight"] = state["attn.cpb_mlp.0.weight"][:, list(order)]
    other.load_state_dict(state)
    x = draw(2, *grid, 16)
    axes = (0, *(a + 1 for a in order), 4)
    assert torch.allclose(other(x.permute(axes)), one(x).permute(axes), **EXACT)


def test_windows_shrink_and_shift_per_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def recorded(*tensors, **arguments):
        calls.append((arguments["window"], arguments["shift"]))
        return original(*tensors, **arguments)

    original = swin_v2.cosine_window_attention
    monkeypatch.setattr(swin_v2, "cosine_window_attention", recorded)
    model = video_model(window_size=(4, 3, 4))
    model(draw(1, 3, 8, 32, 24))  # maps of 8×6 and 4×3 patches, both over 8 frames
    assert calls == [([4, 3, 4], [0, 0, 0]), ([4, 3, 4], [2, 1, 2]), ([4, 3, 3], [0, 0, 0]), ([4, 3, 3], [2, 1, 0])]
    calls.clear()
    model(draw(1, 3, 3, 32, 24))  # 3 frames, which one window covers
    assert calls == [([3, 3, 4], [0, 0, 0]), ([3, 3, 4], [0, 1, 2]), ([3, 3, 3], [0, 0, 0]), ([3, 3, 3], [0, 1, 0])]


def test_merging_leaves_time_alone() -> None:
    merging = drawn(swin_v2.PatchMerging(4).double())
    x = draw(2, 5, 3, 6, 4)
    assert torch.allclose(merging(x), torch.stack([merging(frame) for frame in x.unbind(1)], dim=1), **EXACT)
    assert merging(x).shape == (2, 5, 2, 3, 8)
    assert stage_grid([5, 3, 6], 0) == [5, 3, 6] and stage_grid([5, 3, 6], 2) == [5, 1, 2]


def test_a_clip_is_completed_with_its_last_frame() -> None:
    model = video_model(patch_frames=3)
    clip = draw(1, 3, 7, 30, 24)
    whole = torch.cat((clip, clip[:, :, -1:], clip[:, :, -1:]), dim=2)
    assert torch.equal(model(clip), model(whole))
    assert model.patch_embed(clip).shape == (1, 3, 8, 6, 16)


@pytest.mark.parametrize("window", [1, (2, 3, 5), [(8, 8, 8), (3, 1, 2)]], ids=str)
@pytest.mark.parametrize("size", [(1, 7, 5), (5, 33, 20), (8, 16, 48)], ids=str)
def test_any_clip_gives_finite_values_and_gradients(size: tuple[int, ...], window) -> None:
    model = video_model(window_size=window, patch_frames=2).train()
    clip = draw(2, 3, *size).requires_grad_()
    logits = model(clip)
    assert logits.shape == (2, 5) and logits.isfinite().all()
    logits.square().sum().backward()
    assert clip.grad.isfinite().all()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_memory_policies_change_nothing() -> None:
    model, clip = video_model().train(), draw(2, 3, 8, 32, 24)
    policy = {"stages": None, "every": 1, "attention": "auto", "attention_stages": None, "mlp_tokens": 0}
    found = []
    for changes in ({"activations": "keep"}, {"activations": "recompute", "attention": "sequential", "mlp_tokens": 50}):
        memory.apply(model, **{**policy, **changes})
        model.zero_grad()
        model(clip).square().sum().backward()
        found.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in zip(*found, strict=True))


def test_the_kernel_agrees_with_the_reference() -> None:
    model = video_model().float()
    clip = draw(1, 3, 8, 32, 24).float()
    found = []
    for implementation in ("cpu", "reference"):
        for block in blocks_of(model):
            block.attn.implementation = implementation
        found.append(model(clip))
    assert torch.allclose(*found, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------------------------- window transfer

PAPER = [(256, (8, 16, 16)), (320, (8, 20, 20)), (384, (8, 24, 24))]


def test_sizes_of_the_paper() -> None:
    with torch.device("meta"):
        models = [
            create_model("video_g", image_size=size, window_size=window, pretrained_window_size=PAPER[0][1])
            for size, window in PAPER
        ]
        first = create_model("video_g")
    for model, (size, (time, edge, _)) in zip(models, PAPER, strict=True):
        assert model.windows == [[time, edge, edge]] * 3 + [[time, edge // 2, edge // 2]]
        assert model.input_size == [8, size, size] and model.patch == [1, 4, 4]
    assert first.windows == first.pretrained_windows == models[0].windows
    assert first.head.out_features == 400
    shapes = [[parameter.shape for parameter in model.parameters()] for model in (first, *models)]
    assert all(one == other for one, other in pairwise(shapes))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("window", [window for _, window in PAPER], ids=str)
def test_kernels_take_the_windows_of_the_paper(window, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of 8x24x24, which are 4,608 tokens."""
    monkeypatch.setattr(native, "missing", {})
    low, exact = (
        SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(1, *window, 3, 4, 32))
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert native.unfit(device, low, exact, exact, window) is None
    assert "exceeds 64 tokens per axis" in str(native.unfit(device, low, exact, exact, (1, 1, 65)))


@pytest.mark.parametrize(
    ("size", "backbone"), [("video_t", 27_584_298), ("video_b", 86_906_104), ("video_g", 2_997_869_280)]
)
def test_parameter_counts(size: str, backbone: int) -> None:
    """Those of the image model and 512 for each block: an input of its position bias."""
    with torch.device("meta"):
        model, image = create_model(size, num_classes=0), create_model(size.removeprefix("video_"), num_classes=0)
    counts = [sum(parameter.numel() for parameter in one.parameters()) for one in (model, image)]
    assert counts == [backbone, backbone - 512 * len(blocks_of(model))]


@pytest.mark.parametrize("window", [window for _, window in PAPER], ids=str)
def test_position_bias_is_one_function_of_the_offset(window: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    bias, reference = PositionBias(2, axes=3, hidden=8).double(), PAPER[0][1]
    small, large = bias(reference, reference), bias(window, reference)
    cut = [slice(w - r, w + r - 1) for w, r in zip(window, reference, strict=True)]
    assert large.shape == (2, *(2 * w - 1 for w in window))
    assert torch.allclose(large[:, cut[0], cut[1], cut[2]], small, **EXACT)


def test_window_transfer_keeps_the_bias(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tables = []

    def recorded(qkv, logit_scale, bias_table, **arguments):
        tables.append(bias_table)
        return original(qkv, logit_scale, bias_table, **arguments)

    original = swin_v2.cosine_window_attention
    monkeypatch.setattr(swin_v2, "cosine_window_attention", recorded)
    model = video_model()
    save_file(model.state_dict(), tmp_path / "m.safetensors", {"pretrained_windows": str(model.pretrained_windows)})
    wider = video_model(window_size=(6, 5, 6), image_size=(48, 36))
    report = load_checkpoint(wider, tmp_path / "m.safetensors")
    assert wider.pretrained_windows == model.pretrained_windows == [[4, 3, 4], [4, 3, 3]]
    assert report.transferred == [
        "position bias of windows [[4, 3, 4], [4, 3, 3]] -> windows [[6, 5, 6], [6, 5, 5]]",
    ]
    model(draw(1, 3, 8, 32, 24))
    wider(draw(1, 3, 8, 48, 36))
    for small, large in zip(tables[:4], tables[4:], strict=True):
        cut = [slice((b - a) // 2, (b + a) // 2) for a, b in zip(small.shape[1:], large.shape[1:], strict=True)]
        assert torch.allclose(large[:, cut[0], cut[1], cut[2]], small, **EXACT)


# ----------------------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_of_images_becomes_a_model_of_clips(tmp_path: Path) -> None:
    image = image_model().float()
    metadata = {"pretrained_windows": json.dumps(image.pretrained_windows)}
    save_file(image.state_dict(), tmp_path / "m.safetensors", metadata)
    size = {key: value for key, value in SMALL.items() if key != "image_size"} | {"embed_dim": 16, "num_classes": 5}
    changes = {"image_size": (48, 36), "window_size": (4, 5, 6), "patch_frames": 2}
    video = create_model("video_debug", checkpoint=tmp_path / "m.safetensors", **size, **changes).double()
    assert video.pretrained_windows == [[2, 3, 4], [2, 3, 3]]  # the unit of time is the model's own window
    images = draw(2, 3, 48, 36)
    wider = image_model(image_size=(48, 36), window_size=(5, 6), pretrained_window_size=image.pretrained_windows)
    wider.load_state_dict(image.state_dict())
    assert torch.allclose(video(still(images, 4)), wider(images), **EXACT)


def test_a_checkpoint_of_clips_says_so(tmp_path: Path) -> None:
    arguments = {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "num_classes": 3, "patch_frames": 2}
    model = create_model("video_debug", **arguments)
    path = tmp_path / "m.safetensors"
    save_file(model.state_dict(), path, {"pretrained_windows": json.dumps(model.pretrained_windows)})
    found, _ = convert.describe(path)
    assert found.arguments["patch_frames"] == 2 and found.ambiguous["frames"] == "weights fit clips of any length"
    with pytest.raises(ValueError, match="leaves open window_size and image_size and frames"):
        create_model(checkpoint=path)
    again = create_model(checkpoint=path, frames=4, image_size=64, window_size=[2, 4, 4])
    clip = draw(1, 3, 4, 64, 64).float()
    assert torch.equal(again(clip), model(clip))
    with pytest.raises(ValueError, match="is of another model"):
        create_model("debug", **{**arguments, "patch_frames": None}, checkpoint=path)
    with pytest.raises(ValueError, match="the layout of timm has no models of clips"):
        layouts.from_released(model.state_dict(), "timm")


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("frames 0 and patch_frames None must be positive", {"frames": 0}),
        ("frames 8 and patch_frames 0 must be positive", {"patch_frames": 0}),
        ("frames None and patch_frames 2 must be positive; for images, both null", {"frames": None, "patch_frames": 2}),
        (
            "window_size: expected a positive integer or 3 of them, one per axis, got [3, 4]",
            {"window_size": [[3, 4], 4]},
        ),
        (
            "window_size [4, 4]: give an integer, 3 of them",
            {"window_size": [4, 4], "depths": [1] * 4, "num_heads": [1] * 4},
        ),
        ("pretrained_window_size: expected", {"pretrained_window_size": (0, 4, 4)}),
        ("image_size: expected a positive integer or 2 of them", {"image_size": (8, 32, 32)}),
        ("needs absolute_pos_embed=false", {"absolute_pos_embed": True}),
    ],
)
def test_bad_arguments(message: str, changes: dict) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        model_of(**{**SMALL, "frames": 8, "window_size": (4, 3, 4), **changes})


@pytest.mark.parametrize("shape", [(3, 8, 32, 24), (1, 3, 32, 24), (1, 8, 3, 32, 24)], ids=str)
def test_clips_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images must be \(B, 3, T, Y, X\)"):
        video_model()(torch.zeros(shape))


def test_simmim_is_for_images() -> None:
    with pytest.raises(ValueError, match="SimMIM is for images"):
        SimMIM(video_model(num_classes=0), norm_target_window=0)
