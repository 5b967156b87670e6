"""The backbone: sizes, initialisation, geometry, positions, types and errors."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinv2_scale import create_model
from swinv2_scale.models import swin_v2
from swinv2_scale.models.position_bias import PositionBias
from swinv2_scale.models.swin_v2 import Block, DropPath, PatchMerging, PostNorm, SwinTransformerV2
from swinv2_scale.ops.windows import fit_window


def model_of(**changes) -> SwinTransformerV2:
    """A four-stage model of 0.2 million parameters."""
    arguments = {
        "in_channels": 3,
        "embed_dim": 16,
        "depths": [2, 2, 2, 2],
        "num_heads": [1, 2, 4, 8],
        "window_size": 4,
        "pretrained_window_size": None,
        "mlp_ratio": 4.0,
        "drop_path_rate": 0.0,
        "extra_norm_period": 0,
        "absolute_pos_embed": False,
        "num_classes": 5,
        "image_size": 64,
        "weight_init": "released",
    }
    return SwinTransformerV2(**{**arguments, **changes})


def drawn(model: nn.Module) -> nn.Module:
    """The model with every parameter random, so that no path is silent: fresh blocks are the identity."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.copy_(noise * 0.2 + (2.0 if "logit_scale" in name else "norm" in name and "weight" in name))
    return model


def blocks_of(model: SwinTransformerV2) -> list[Block]:
    return [block for stage in model.layers for block in stage.blocks]


# ---------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("size", "backbone", "classifier", "published"),
    [
        ("debug", 2_303_230, 2_560_230, None),
        ("t", 27_578_154, 28_347_154, ("27.58", "28.35")),
        ("s", 48_959_418, 49_728_418, ("48.96", "49.73")),
        ("b", 86_893_816, 87_918_816, ("86.89", "87.92")),
        ("l", 195_202_932, 196_739_932, ("195.20", "196.74")),
        ("h", 655_219_370, 658_036_370, ("655.2", "658")),
        ("giant", 1_060_976_996, 1_064_561_996, ("1061", "1064.6")),
        ("g", 2_997_843_680, 3_001_940_680, ("2997.8", "3001.9")),
    ],
)
def test_parameter_counts(size, backbone, classifier, published) -> None:
    counts = []
    for num_classes in (0, 1000):
        with torch.device("meta"):
            model = create_model(size, num_classes=num_classes)
        counts.append(sum(parameter.numel() for parameter in model.parameters()))
    assert counts == [backbone, classifier]
    for count, text in zip(counts, published or (), strict=False):
        assert f"{count / 1e6:.{len(text.partition('.')[2])}f}" == text


def test_giant_of_the_paper_has_seven_extra_norms() -> None:
    with torch.device("meta"):
        model = create_model("g")
    names = {name.rpartition(".")[0] for name, _ in model.named_parameters() if "enorm" in name}
    assert names == {f"layers.2.blocks.{block}.enorm" for block in (5, 11, 17, 23, 29, 35, 41)}


# ------------------------------------------------------------------------------------------------------- initialisation


@pytest.mark.parametrize("training", [True, False])
def test_fresh_blocks_are_the_identity(training) -> None:
    model = model_of(extra_norm_period=2, drop_path_rate=0.3).train(training)
    for number, block in enumerate(blocks_of(model)):
        x = torch.randn(2, 5, 6, block.norm1.normalized_shape[0])
        assert torch.equal(block(x), F.layer_norm(x, x.shape[-1:]) if number % 2 else x)


@pytest.mark.parametrize("scheme", ["released", "research"])
def test_initial_values(scheme) -> None:
    model = model_of(embed_dim=64, absolute_pos_embed=True, extra_norm_period=2, weight_init=scheme)
    number = 0
    for name, parameter in model.named_parameters():
        if name.endswith("attn.logit_scale"):
            number += 1  # blocks are numbered from 1
        values = parameter.detach().double()
        if name.endswith("logit_scale"):
            expected = torch.full_like(values, math.log(10))
        elif re.search(r"norm[12]\.weight$", name):
            expected = torch.full_like(values, 0.0 if scheme == "released" else 1e-5)
        elif "norm" in name and name.endswith("weight"):
            expected = torch.ones_like(values)
        elif name.startswith("patch_embed.proj"):
            bound = 48**-0.5
            assert bound * 0.8 < values.abs().max() <= bound
            assert name.endswith("bias") or values.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
            continue
        elif name.endswith("bias"):
            expected = torch.zeros_like(values)
        else:
            shrunk = scheme == "research" and re.search(r"(attn\.proj|mlp\.fc2)\.weight$", name)
            std = 0.02 / math.sqrt(2 * number) if shrunk else 0.02
            assert values.std().item() == pytest.approx(std, rel=5 / math.sqrt(values.numel())), name
            assert abs(values.mean().item()) < 5 * std / math.sqrt(values.numel()), name
            continue
        assert torch.allclose(values, expected, rtol=1e-6, atol=0), name
    assert number == 8


# ------------------------------------------------------------------------------------------------------------- geometry


def test_patch_merging_order() -> None:
    merging = PatchMerging(1)
    merging.reduction, merging.norm = nn.Identity(), nn.Identity()
    x = torch.arange(1.0, 16.0).view(1, 3, 5, 1)
    out = merging(x)
    assert out.shape == (1, 2, 3, 4)
    assert out[0, 0, 1].tolist() == [3, 8, 4, 9]  # (0,0) (1,0) (0,1) (1,1)
    assert out[0, 1, 2].tolist() == [15, 0, 0, 0]  # completed at the bottom and at the right


def test_patch_merging_normalises_after_the_reduction() -> None:
    merging = drawn(PatchMerging(6))
    x = torch.randn(2, 3, 4, 6)
    flat = torch.cat([F.pad(x, (0, 0, 0, 0, 0, 1))[:, r::2, c::2] for c in (0, 1) for r in (0, 1)], dim=-1)
    expected = F.layer_norm(flat @ merging.reduction.weight.T, (12,), merging.norm.weight, merging.norm.bias)
    assert torch.allclose(merging(x), expected, atol=1e-5)


@pytest.mark.parametrize("window", [1, (3, 5), [8, 8, (2, 7), 1]], ids=str)
@pytest.mark.parametrize("size", [(65, 97), (12, 132), (7, 5), (1, 1), (32, 32)], ids=str)
def test_any_image_size_gives_finite_values_and_gradients(size, window) -> None:
    model = drawn(model_of(window_size=window)).train()
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0)).requires_grad_()
    maps = model.forward_features(images)
    for stage, feature_map in enumerate(maps):
        assert feature_map.shape == (2, *(math.ceil(s / (4 * 2**stage)) for s in size), 16 * 2**stage)
    logits = model(images)
    assert logits.shape == (2, 5)
    assert logits.isfinite().all()
    logits.square().sum().backward()
    assert images.grad.isfinite().all()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_image_is_completed_with_zeros_to_whole_patches() -> None:
    model = drawn(model_of())
    images = torch.randn(2, 3, 37, 50)
    assert torch.equal(model(images), model(F.pad(images, (0, 2, 0, 3))))
    assert not torch.allclose(model(images), model(F.pad(images, (2, 0, 3, 0))))


def test_windows_shrink_and_shift_per_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def recorded(*tensors, **arguments):
        calls.append((arguments["window"], arguments["shift"]))
        return original(*tensors, **arguments)

    original = swin_v2.cosine_window_attention
    monkeypatch.setattr(swin_v2, "cosine_window_attention", recorded)
    model_of(window_size=(8, 7))(torch.randn(1, 3, 32, 256))  # maps of 8×64, 4×32, 2×16, 1×8
    assert calls[0::2] == [([8, 7], [0, 0]), ([4, 7], [0, 0]), ([2, 7], [0, 0]), ([1, 7], [0, 0])]
    assert calls[1::2] == [([8, 7], [0, 3]), ([4, 7], [0, 3]), ([2, 7], [0, 3]), ([1, 7], [0, 3])]


# ------------------------------------------------------------------------------------------------------------ positions


def test_pretrained_windows() -> None:
    def square(*edges: int) -> list[list[int]]:
        return [[edge, edge] for edge in edges]

    with torch.device("meta"):
        model = create_model("b", image_size=192, window_size=12)
        assert model.pretrained_windows == square(12, 12, 12, 6)
        assert create_model("b", image_size=256, window_size=16).pretrained_windows == square(16, 16, 16, 8)
        assert create_model("t", image_size=[64, 256]).pretrained_windows == [[8, 8], [8, 8], [4, 8], [2, 8]]
        finetuned = create_model("b", image_size=384, window_size=24, pretrained_window_size=[12, 12, 12, 6])
    assert finetuned.pretrained_windows == square(12, 12, 12, 6)
    assert [block.window for block in blocks_of(finetuned)] == [[24, 24]] * 24
    model.pretrained_windows = square(8, 8, 8, 4)
    assert [block.reference_window for block in blocks_of(model)][1::2] == square(8, 8, *[8] * 9, 4)


def test_position_bias_formula() -> None:
    torch.manual_seed(0)
    bias = PositionBias(3, hidden=32).double()
    first, _, last = bias
    table = bias((3, 5), (4, 1))
    assert table.shape == (3, 5, 9)
    for dy in range(-2, 3):
        for dx in range(-4, 5):
            scaled = [8 * dy / 3, 8.0 * dx]  # a reference of one token counts as distance 1
            x = torch.tensor([math.copysign(math.log2(abs(s) + 1) / 3, s) for s in scaled], dtype=torch.float64)
            expected = 16 / (1 + torch.exp(-last.weight @ (first.weight @ x + first.bias).clamp(min=0)))
            assert torch.allclose(table[:, dy + 2, dx + 4], expected, rtol=1e-6)  # coordinates are float32


def test_position_bias_is_one_function_of_the_offset() -> None:
    bias = PositionBias(3)
    small, large = bias((8, 6), (8, 8)), bias((12, 7), (8, 8))
    assert torch.allclose(small, large[:, 4:-4, 1:-1], rtol=1e-6)
    assert not torch.allclose(small, bias((12, 7), (12, 7))[:, 4:-4, 1:-1], rtol=1e-3)


def test_model_at_another_window_keeps_its_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = []

    def recorded(qkv, logit_scale, bias_table, **arguments):
        tables.append(bias_table)
        return original(qkv, logit_scale, bias_table, **arguments)

    original = swin_v2.cosine_window_attention
    monkeypatch.setattr(swin_v2, "cosine_window_attention", recorded)
    model = drawn(model_of(window_size=4, image_size=64))
    wider = model_of(window_size=6, image_size=96, pretrained_window_size=model.pretrained_windows)
    wider.load_state_dict(model.state_dict())
    model(torch.randn(1, 3, 64, 64))
    wider(torch.randn(1, 3, 96, 96))
    for small, large in zip(tables[:8], tables[8:], strict=True):
        cut = (large.shape[-1] - small.shape[-1]) // 2
        assert cut in (2, 1)  # 4 -> 6, in the last stage 2 -> 3
        assert torch.allclose(small, large[:, cut:-cut, cut:-cut], rtol=1e-5)


# ----------------------------------------------------------------------------------------------------------- state dict


def test_state_dict_has_the_released_names_and_nothing_derived() -> None:
    model = model_of(extra_norm_period=2, absolute_pos_embed=True)
    block = ["attn.q_bias", "attn.v_bias", "attn.logit_scale", "attn.qkv.weight", "attn.proj.weight", "attn.proj.bias"]
    block += ["attn.cpb_mlp.0.weight", "attn.cpb_mlp.0.bias", "attn.cpb_mlp.2.weight"]
    block += [f"{name}.{kind}" for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2") for kind in ("weight", "bias")]
    names = ["absolute_pos_embed", "head.weight", "head.bias", "norm.weight", "norm.bias"]
    names += [f"patch_embed.{name}.{kind}" for name in ("proj", "norm") for kind in ("weight", "bias")]
    names += [f"layers.{stage}.blocks.{b}.{name}" for stage in range(4) for b in range(2) for name in block]
    names += [f"layers.{stage}.blocks.1.enorm.{kind}" for stage in range(4) for kind in ("weight", "bias")]
    for stage in range(3):
        names += [f"layers.{stage}.downsample.{name}" for name in ("reduction.weight", "norm.weight", "norm.bias")]
    assert sorted(model.state_dict()) == sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert model.layers[1].blocks[0].attn.logit_scale.shape == (2, 1, 1)


def test_weights_load_at_another_window_and_image_size() -> None:
    model = drawn(model_of(window_size=4, image_size=64))
    other = model_of(window_size=(7, 9), image_size=(160, 224), pretrained_window_size=3)
    other.load_state_dict(model.state_dict(), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_absolute_position_is_added_and_fits_one_size_only() -> None:
    model = drawn(model_of(absolute_pos_embed=True, image_size=(32, 48)))
    x = torch.randn(2, 8, 12, 16)
    assert torch.equal(model.add_position(x)[1, 3, 5], x[1, 3, 5] + model.absolute_pos_embed[0, 3 * 12 + 5])
    with pytest.raises(ValueError, match=r"absolute_pos_embed fits images of \[32, 48\]"):
        model(torch.randn(1, 3, 48, 32))


# ------------------------------------------------------------------------------------------------------------ drop path


def test_drop_path_rates_rise_linearly_over_all_blocks() -> None:
    model = model_of(depths=[2, 1, 4, 2], drop_path_rate=0.4)
    rates = [block.drop_path.rate for block in blocks_of(model)]
    assert rates == pytest.approx([0.4 * i / 8 for i in range(9)])


def test_drop_path_drops_whole_images_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    drop, norm = DropPath(0.3), drawn(PostNorm(16))
    x = torch.randn(20000, 2, 16)
    whole = norm(x, 2 * x) - x
    out = drop(x, lambda some: 2 * some, norm) - x
    kept = (out != 0).all(dim=(1, 2))
    assert torch.equal(out[~kept], torch.zeros_like(out[~kept]))
    assert torch.allclose(out[kept], whole[kept] / 0.7, atol=2e-6)
    assert kept.double().mean().item() == pytest.approx(0.7, abs=0.02)
    for without in (drop.eval(), DropPath(0.0).train()):
        assert torch.equal(without(x, lambda some: 2 * some, norm), norm(x, 2 * x))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.95])  # of three images all, some or none have the branch
def test_branches_that_are_dropped_are_not_computed(rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is what it would be if they were computed and then forgotten, gradients of all weights included."""
    model = drawn(model_of(drop_path_rate=rate)).double().train()
    images, counts = torch.randn(3, 3, 64, 64, dtype=torch.float64), []
    attend = swin_v2.cosine_window_attention

    def counted(qkv: Tensor, *tensors: Tensor, **arguments: Any) -> Tensor:
        counts.append(len(qkv))
        return attend(qkv, *tensors, **arguments)

    def forgotten(self: DropPath, x: Tensor, branch: Callable[[Tensor], Tensor], norm: PostNorm) -> Tensor:
        kept = torch.rand(len(x)) >= self.rate if self.rate else torch.ones(len(x))
        return x + (norm(x, branch(x)) - x) * (kept / (1 - self.rate)).view(-1, 1, 1, 1)

    def run() -> list[Tensor]:
        torch.manual_seed(3)
        model.zero_grad()
        out = model(images)
        out.square().sum().backward()
        return [out.detach(), *(parameter.grad for parameter in model.parameters())]

    monkeypatch.setattr(swin_v2, "cosine_window_attention", counted)
    found, drawn_counts = run(), counts.copy()
    monkeypatch.setattr(DropPath, "forward", forgotten)
    for ours, theirs in zip(found, run(), strict=True):
        assert (ours - theirs).abs().max() <= 1e-9 * theirs.abs().max() + 1e-12
    assert min(drawn_counts) < 3 and (rate < 0.9 or 0 in drawn_counts)


def test_drop_path_comes_after_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    block = drawn(model_of()).layers[0].blocks[0].double().train()
    x = torch.randn(2, 5, 6, 16, dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda _, **__: torch.tensor([0.0, 1.0]))  # drops those of the first image
    block.drop_path.rate = 0.5
    geometry = fit_window(x.shape[1:-1], block.window, block.shift)
    attended = block.attn(x[1:], *geometry, block.reference_window)
    second = x[1:] + 2 * F.layer_norm(attended, [16], block.norm1.weight, block.norm1.bias)
    second = second + 2 * F.layer_norm(block.mlp(second), [16], block.norm2.weight, block.norm2.bias)
    assert torch.allclose(block(x), torch.cat([x[:1], second]), rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------- types


def check_exact(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Record the types of qkv, and require scale and table to be float32 at the operator."""
    types = []

    def checked(qkv, logit_scale, bias_table, **arguments) -> Tensor:
        assert logit_scale.dtype == bias_table.dtype == torch.float32
        types.append(qkv.dtype)
        return original(qkv, logit_scale, bias_table, **arguments)

    original = swin_v2.cosine_window_attention
    monkeypatch.setattr(swin_v2, "cosine_window_attention", checked)
    return types


def test_bfloat16_model(monkeypatch: pytest.MonkeyPatch) -> None:
    types = check_exact(monkeypatch)
    model, images = drawn(model_of()), torch.randn(2, 3, 38, 50)
    expected = model(images)
    types.clear()
    logits = model.to(torch.bfloat16)(images)
    assert logits.dtype == torch.bfloat16 and types == [torch.bfloat16] * 8
    assert (logits - expected).norm() < 0.1 * expected.norm()
    logits.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    types = check_exact(monkeypatch)
    model, images = drawn(model_of()), torch.randn(2, 3, 38, 50)
    expected = model(images)
    types.clear()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
    assert types == [torch.bfloat16] * 8
    assert (logits - expected).norm() < 0.1 * expected.norm()
    logits.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# --------------------------------------------------------------------------------------------------------------- errors

BAD_ARGUMENTS = [
    ("num_heads", {"num_heads": [1, 2, 4]}),
    ("num_heads: 3 does not divide the 16 channels", {"num_heads": [3, 2, 4, 8]}),
    ("window_size", {"window_size": 0}),
    ("window_size", {"window_size": [4, 4, 4]}),
    ("window_size", {"window_size": [4, 4, 4, (4, 4, 4)]}),
    ("pretrained_window_size", {"pretrained_window_size": [4, 4, 4]}),
    ("pretrained_window_size", {"pretrained_window_size": (0, 4)}),
    ("image_size", {"image_size": 0}),
    ("image_size", {"image_size": (64, 64, 64)}),
    ("weight_init must be 'released' or 'research', got 'jax'", {"weight_init": "jax"}),
    ("drop_path_rate", {"drop_path_rate": 1.0}),
    ("drop_path_rate", {"drop_path_rate": -0.1}),
]


@pytest.mark.parametrize(("message", "changes"), BAD_ARGUMENTS)
def test_constructor_errors(message, changes) -> None:
    with pytest.raises(ValueError, match=message):
        model_of(**changes)


@pytest.mark.parametrize(("message", "changes"), [BAD_ARGUMENTS[i] for i in (0, 1, 3, 9)])
def test_constructor_errors_reach_the_user_of_create_model(message, changes) -> None:
    with pytest.raises(ValueError, match=message):
        create_model("debug", **{"embed_dim": 16, **changes})


@pytest.mark.parametrize(
    ("message", "size", "arguments"),
    [
        ("'windw_size' is not an argument of the model. Did you mean 'window_size'?", "debug", {"windw_size": 8}),
        ("Did you mean 'drop_path_rate'?", "debug", {"drop_path": 0.2}),
        ("model size 'tiny' is not one of b, debug, g, giant, h, l, s, t, video_b", "tiny", {}),
        ("model size '_common' is not one of", "_common", {}),
    ],
)
def test_misspelt_arguments(message, size, arguments) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        create_model(size, **arguments)


def test_create_model_passes_every_kind_of_argument() -> None:
    model = create_model(
        "debug", depths=(1, 2), num_heads=[2, 4], window_size=[(4, 6), 3], num_classes=0, in_channels=4
    )
    assert [len(stage.blocks) for stage in model.layers] == [1, 2]
    assert [stage.blocks[0].window for stage in model.layers] == [[4, 6], [3, 3]]
    assert model(torch.randn(1, 4, 24, 40)).shape == (1, 64)


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 4, 64, 64), (1, 64, 64, 3), (1, 1, 3, 64, 64)], ids=str)
def test_images_of_another_shape_are_refused(shape) -> None:
    with pytest.raises(ValueError, match=r"images must be \(B, 3, Y, X\)"):
        model_of()(torch.zeros(shape))
