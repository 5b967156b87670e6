"""What timm 1.0.31, torchvision 0.29 and transformers 5.23 compute otherwise; each test fails when that ends.

A test first shows the difference. Then it changes one thing, mostly in this project's model, so that both agree again:
that proves the cause. docs/numerics.md has the table. Where they agree: tests/numerics/test_against_libraries.py
"""

import math
from collections.abc import Sequence
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from golden import relative_error
from test_against_libraries import (
    BUILD,
    CLASSES,
    LIBRARIES,
    WIDTH,
    build_ours,
    draw,
    load_into,
    operator,
    random_images,
    transformers_config,
)
from torch import Tensor, nn

from swinv2_scale.models import swin_v2
from swinv2_scale.models.layouts import from_released, to_released
from swinv2_scale.models.simmim import SimMIM
from swinv2_scale.ops import windows

SAME = 1e-10  # largest relative error, in float64, of logits that count as equal
COUNTED = 1e-7  # the same of SimMIM's loss, because transformers divides by a float32 number of hidden pixels
STRICT = 2.0  # a logit scale at which one shift mask hides a token from float64, and two do not differ


def difference(ours: nn.Module, theirs: nn.Module, images: Tensor) -> float:
    with torch.no_grad():
        return relative_error(theirs.eval()(images), ours.eval()(images))


def pair(library: str, image, window: int, depths: Sequence[int], /, logit_scale: float = STRICT, **changes):
    """A library's model, and ours with the same weights; `changes` are of ours."""
    ours = build_ours(**({"image": image, "window": window, "depths": depths} | changes))
    draw(ours, logit_scale)
    theirs = BUILD[library](image, window, depths)
    load_into(theirs, ours, library)
    return ours, theirs


def blocks(model: nn.Module) -> list[swin_v2.Block]:
    return [module for module in model.modules() if isinstance(module, swin_v2.Block)]


def never_shift(model: nn.Module) -> None:
    for block in blocks(model):
        block.shift = [0, 0]


def let_zeros_take_part(monkeypatch: pytest.MonkeyPatch, roll_first: bool = False) -> None:
    """Our attention with the map completed by tokens of zeros, as if they existed; before or after it is rolled."""
    original = swin_v2.WindowAttention.forward

    def forward(self, x: Tensor, window: Sequence[int], shift: Sequence[int], reference: Sequence[int]) -> Tensor:
        early = [s if roll_first else 0 for s in shift]
        rows, columns = x.shape[1:3]
        padded = windows.padded_grid([rows, columns], window)
        x = x.roll([-s for s in early], (1, 2))
        x = F.pad(x, (0, 0, 0, padded[1] - columns, 0, padded[0] - rows)).roll(early, (1, 2))
        out = original(self, x, window, shift, reference).roll([-s for s in early], (1, 2))
        return out[:, :rows, :columns].roll(early, (1, 2))

    monkeypatch.setattr(swin_v2.WindowAttention, "forward", forward)


# --- shift mask ---


def test_transformers_adds_the_shift_mask_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    # The scale is 100, and heads look away from what resembles a token. Windows of 2 by 2, cut by a shift of 1, have
    # regions of one token, whose logit is then 100 and more below those of its neighbours: one mask lets them through.
    ours, theirs = pair("transformers", 32, 2, (2, 2), logit_scale=5.0)
    for block in blocks(ours):
        query, key, _ = block.attn.qkv.weight.data.chunk(3)
        key.copy_(-query)
        block.attn.q_bias.data.zero_()
    load_into(theirs, ours, "transformers")
    assert difference(ours, theirs, random_images(32)) > 0.01
    monkeypatch.setattr(operator, "MAX_LOGIT_SCALE", math.log(100))
    once = swin_v2.cosine_window_attention
    monkeypatch.setattr(swin_v2, "cosine_window_attention", partial(once, mask_value=-200.0))
    assert difference(ours, theirs, random_images(32)) < SAME


# --- windows and maps that do not fit ---


def test_torchvision_keeps_windows_larger_than_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pair("torchvision", 16, 8, (2, 2), pretrained=8)  # maps of 4 and 2 tokens
    assert difference(ours, theirs, random_images(16)) > 0.1

    def keep(grid: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> tuple[list[int], list[int]]:
        padded = windows.padded_grid(grid, window)
        return list(window), [0 if w >= p else s for p, w, s in zip(padded, window, shift, strict=True)]

    monkeypatch.setattr(swin_v2, "fit_window", keep)
    assert difference(ours, theirs, random_images(16)) > 0.1  # our tokens beyond the map do not exist
    let_zeros_take_part(monkeypatch)
    assert difference(ours, theirs, random_images(16)) < SAME


@pytest.mark.parametrize("library", LIBRARIES)
def test_zeros_beyond_the_map_take_part(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pair(library, 28, 4, (2,))  # a map of 7 tokens, completed to 8
    images = random_images(28)
    assert difference(ours, theirs, images) > 0.05
    for roll_first in (False, True):
        with monkeypatch.context() as patch:
            let_zeros_take_part(patch, roll_first)
            error = difference(ours, theirs, images)
            assert error < SAME if roll_first == (library == "timm") else error > 0.01, roll_first


@pytest.mark.parametrize("library", LIBRARIES)
def test_opposite_borders_meet_in_timm(library: str) -> None:
    """How much row 0 of a shifted block depends on row 6, the last of the map: the shift mask should part them."""
    ours, theirs = pair(library, 28, 4, (2,))
    x = torch.randn(1, 7, 7, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def influence(block) -> float:
        tokens = x.clone().requires_grad_()
        block(tokens)[:, 0].square().sum().backward()
        assert tokens.grad is not None
        return (tokens.grad[:, 6].norm() / tokens.grad[:, 0].norm()).item()

    if library == "transformers":
        layer = theirs.inner.swinv2.encoder.layers[0].blocks[1]
        found = influence(lambda tokens: layer(tokens.flatten(1, 2), (7, 7))[0].view(tokens.shape))
    else:
        found = influence(theirs.layers[0].blocks[1] if library == "timm" else theirs.features[1][1])
    assert influence(blocks(ours)[1]) < 1e-20
    assert found > 0.01 if library == "timm" else found < 1e-20


def test_transformers_halves_odd_maps_downwards() -> None:
    """It fits windows to 3 // 2 = 1 token, although the map of the second stage is 3 halved upwards, 2 tokens."""
    ours, theirs = pair("transformers", 12, 4, (2, 2))
    assert difference(ours, theirs, random_images(12)) > 0.1
    ours, theirs = pair("transformers", 12, 4, (2, 2), window=[(3, 3), (1, 1)])
    assert difference(ours, theirs, random_images(12)) < SAME


def test_transformers_takes_the_window_of_the_height() -> None:
    """On a map of 4 rows and 8 columns a window of 8 becomes 4 by 4 without shift; ours 4 by 8."""
    ours, theirs = pair("transformers", (16, 32), 8, (2,))
    assert difference(ours, theirs, random_images((16, 32))) > 0.1
    ours, theirs = pair("transformers", (16, 32), 8, (2,), window=4)
    never_shift(ours)
    assert difference(ours, theirs, random_images((16, 32))) < SAME


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_windows_stay_as_they_were_built(library: str) -> None:
    """Built for 32 px, run at 64 px: a window that had shrunk stays small, one that covered its map never shifts."""
    ours, theirs = pair(library, 32, 8, (2, 2))
    if library == "timm":
        timm_model = pytest.importorskip("timm.models.swin_transformer_v2")
        theirs = timm_model.SwinTransformerV2(
            img_size=32,
            embed_dim=WIDTH,
            depths=(2, 2),
            num_heads=(1, 2),
            window_size=8,
            num_classes=CLASSES,
            strict_img_size=False,  # otherwise it refuses
        ).double()
        load_into(theirs, ours, library)
    assert difference(ours, theirs, random_images(32)) < SAME
    assert difference(ours, theirs, random_images(64)) > 0.1
    ours, _ = pair(library, 32, 8, (2, 2), window=[(8, 8), (4, 4)])
    never_shift(ours)
    assert difference(ours, theirs, random_images(64)) < SAME


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_rows_that_the_patch_does_not_divide_are_dropped(library: str) -> None:
    """Of 18 pixels, 16 are seen; ours completes them to 20."""
    ours, theirs = pair(library, 18, 4, (2,))
    images = random_images(18)
    assert difference(ours, theirs, images) > 0.1
    with torch.no_grad():
        assert relative_error(theirs(images), ours(images[:, :, :16, :16])) < SAME


# --- position bias ---


def test_torchvision_has_no_pretrained_window() -> None:
    """Weights of window 4 at window 8: torchvision measures distances in units of the window that runs."""
    ours, theirs = pair("torchvision", 64, 8, (2, 2), pretrained=4)
    assert difference(ours, theirs, random_images(64)) > 0.01
    ours, theirs = pair("torchvision", 64, 8, (2, 2), pretrained=8)
    assert difference(ours, theirs, random_images(64)) < SAME


def test_a_window_of_one_token_is_nan() -> None:
    """0 / 0: in torchvision at window 1, in transformers at pretrained window 1. timm divides by 1, as we do."""
    images = random_images(16)
    ours, theirs = pair("torchvision", 16, 1, (2,))
    assert ours(images).isfinite().all() and theirs(images).isnan().all()
    for library in ("timm", "transformers"):
        ours = build_ours(16, 4, (2,), pretrained=1)
        draw(ours, STRICT)
        theirs = BUILD[library](16, 4, (2,), [1])
        load_into(theirs, ours, library)
        assert ours(images).isfinite().all()
        assert theirs(images).isnan().all() if library == "transformers" else difference(ours, theirs, images) < SAME


# --- normalisation, clamp, precision ---


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_clamp_is_the_exact_log_100(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours and the released code's is log 100 rounded to float32, so that the two are one number in float32."""
    ours, theirs = pair(library, 32, 4, (2,))
    blocks(ours)[0].attn.logit_scale.data.fill_(5.0)  # not the shifted block, whose mask differs in transformers
    load_into(theirs, ours, library)
    assert 1e-9 < difference(ours, theirs, random_images(32)) < 1e-5
    monkeypatch.setattr(operator, "MAX_LOGIT_SCALE", math.log(100))
    assert difference(ours, theirs, random_images(32)) < 1e-12
    monkeypatch.undo()
    assert torch.tensor(math.log(100), dtype=torch.float32).item() == operator.MAX_LOGIT_SCALE


@pytest.mark.parametrize("library", LIBRARIES)
def test_norms_have_our_epsilon(library: str) -> None:
    """No divergence: 1e-5 everywhere, unless a configuration of transformers changes it, for some norms only."""
    norms = [module.eps for module in BUILD[library](32, 4, (2, 2)).modules() if isinstance(module, nn.LayerNorm)]
    assert set(norms) == {1e-5} and len(norms) == 2 * 4 + 3
    if library == "transformers":
        config = transformers_config(32, 4, (2, 2))
        config.layer_norm_eps = 1e-6
        model = pytest.importorskip("transformers").Swinv2Model(config)
        other = {name for name, module in model.named_modules() if getattr(module, "eps", None) == 1e-5}
        assert other == {"embeddings.norm", "encoder.layers.0.downsample.norm"}


@pytest.mark.parametrize("library", LIBRARIES)
def test_float16_is_nan_on_padded_maps(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token of zeros has a key of length 0, which is divided by max(0, 1e-12); 1e-12 is 0 in float16."""
    ours, theirs = pair(library, 28, 4, (2,))
    images = random_images(28).half()
    ours, theirs = ours.half(), theirs.half()
    assert ours(images).isfinite().all() and theirs(images).isnan().all()
    monkeypatch.setattr(F, "normalize", lambda x, dim: operator._unit_length(x))
    assert theirs(images).isfinite().all()


def test_gradients_of_zero_tokens_are_multiplied_by_1e12(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh SimMIM of transformers has them: its mask token starts at zero, and so do the biases of the queries."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.Swinv2ForMaskedImageModeling(transformers_config(32, 4, (2, 2))).double()
    tensors = to_released(theirs.state_dict(), "transformers")
    assert not tensors["encoder.mask_token"].any()
    encoder = build_ours(32, 4, (2, 2))
    encoder.head = nn.Identity()
    ours = SimMIM(encoder, norm_target_window=0).double()
    ours.load_state_dict(tensors)
    images = random_images(32)
    mask = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(4)) < 0.6

    def our_gradients() -> tuple[Tensor, dict[str, Tensor]]:
        ours.zero_grad()
        loss = ours(images, mask.long())
        loss.backward()
        named = {name: parameter.grad for name, parameter in ours.named_parameters()}
        return loss.detach(), from_released(named, "transformers")

    query_bias = "swinv2.encoder.layers.0.blocks.0.attention.self.query.bias"
    expected = theirs(images, bool_masked_pos=mask.flatten(1))
    expected.loss.backward()
    gradient = theirs.get_parameter(query_bias).grad
    loss, ours_named = our_gradients()
    assert relative_error(loss, expected.loss.detach()) < COUNTED
    assert gradient.norm() > 1e9 and ours_named[query_bias].norm() < 1
    monkeypatch.setattr(operator, "_unit_length", partial(F.normalize, dim=-1))
    assert relative_error(our_gradients()[1][query_bias], gradient) < COUNTED


# --- parameters and what a fresh model is ---


@pytest.mark.parametrize("library", ["ours", *LIBRARIES])
def test_fresh_blocks(library: str) -> None:
    """norm1 and norm2 start at 0 in the released code, here and in timm: blocks are the identity. Elsewhere at 1."""
    torch.manual_seed(0)
    model = build_ours(32, 4, (2, 2)) if library == "ours" else BUILD[library](32, 4, (2, 2))
    images = random_images(32)
    with torch.no_grad():
        fresh = model(images)
        parts = ("norm1.", "norm2.", "layernorm_before.", "layernorm_after.")
        norms = {n: p for n, p in model.named_parameters() if any(part in n for part in parts)}
        assert len(norms) == 4 * 4
        start = 0.0 if library in ("ours", "timm") else 1.0
        assert all((p == (start if name.endswith("weight") else 0.0)).all() for name, p in norms.items())
        for parameter in norms.values():
            parameter.zero_()
        error = relative_error(fresh, model(images))
        assert error > 0.3 if start else error == 0


@pytest.mark.parametrize("library", ["ours", *LIBRARIES])
def test_fresh_patch_embedding(library: str) -> None:
    """PyTorch's default here, in timm and in torchvision: uniform to 1 / sqrt(48). transformers: normal, 0.02."""
    torch.manual_seed(0)
    model = build_ours(32, 4, (2, 2)) if library == "ours" else BUILD[library](32, 4, (2, 2))
    convolution = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    deviation = 0.02 if library == "transformers" else 1 / math.sqrt(3 * 48)
    assert convolution.weight.std().item() == pytest.approx(deviation, rel=0.1)
    assert convolution.bias.any() == (library != "transformers")


def test_torchvision_counts_a_key_bias_that_nothing_reads() -> None:
    ours, theirs = pair("torchvision", 32, 4, (2, 2))
    images = random_images(32)
    expected = theirs(images).detach()
    attentions = [module for name, module in theirs.named_modules() if name.endswith("attn")]
    for attention in attentions:
        attention.qkv.bias.data.chunk(3)[1].fill_(7.0)
    logits = theirs(images)
    assert torch.equal(logits, expected)
    logits.sum().backward()
    assert len(attentions) == 4 and not any(a.qkv.bias.grad.chunk(3)[1].any() for a in attentions)
    extra = sum(p.numel() for p in theirs.parameters()) - sum(p.numel() for p in ours.parameters())
    assert extra == 2 * WIDTH + 2 * 2 * WIDTH


def test_absolute_positions_of_transformers_fit_no_image() -> None:
    """One position too many, for a class token that a Swin Transformer does not have."""
    config = transformers_config(32, 4, (2, 2))
    config.use_absolute_embeddings = True
    model = pytest.importorskip("transformers").Swinv2Model(config)
    with pytest.raises(RuntimeError, match=r"size of tensor a \(64\) must match the size of tensor b \(65\)"):
        model(random_images(32).float())


def test_simmim_of_transformers_predicts_plain_pixels() -> None:
    """Swin Transformer V2 normalises the target over a sliding window; its loss equals ours without that."""
    transformers = pytest.importorskip("transformers")
    encoder = build_ours(32, 4, (2, 2))
    encoder.head = nn.Identity()
    ours = SimMIM(encoder, norm_target_window=47).double()
    draw(ours, STRICT)
    theirs = transformers.Swinv2ForMaskedImageModeling(transformers_config(32, 4, (2, 2))).double().eval()
    load_into(theirs, ours, "transformers")
    images = 3 + random_images(32)
    mask = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(4)) < 0.6
    with torch.no_grad():
        loss = theirs(images, bool_masked_pos=mask.flatten(1)).loss
        assert relative_error(loss, ours(images, mask.long())) > 0.1
        ours.norm_target_window = 0
        assert relative_error(loss, ours(images, mask.long())) < COUNTED
