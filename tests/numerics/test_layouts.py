"""Weights keep their function in other libraries' layouts: logits equal those libraries' own models in float64."""

import pytest
import torch
from golden import load, relative_error
from torch import Tensor, nn

from swinv2_scale.models.layouts import DERIVED, LAYOUTS, detect, from_released, to_released
from swinv2_scale.models.simmim import SimMIM
from swinv2_scale.models.swin_v2 import SwinTransformerV2

# Three stages whose maps the window divides: 16, 8 and 4 patches. There all four implementations agree.
IMAGE, WINDOW, WIDTH, DEPTHS, HEADS, CLASSES = 64, 4, 8, [1, 2, 3], [1, 2, 4], 5
OTHERS = ("timm", "torchvision", "transformers")


def build_ours(window: int = WINDOW, **changes) -> SwinTransformerV2:
    arguments = dict(
        in_channels=3,
        embed_dim=WIDTH,
        depths=DEPTHS,
        num_heads=HEADS,
        window_size=window,
        pretrained_window_size=None,
        mlp_ratio=4.0,
        drop_path_rate=0.0,
        extra_norm_period=0,
        absolute_pos_embed=False,
        num_classes=CLASSES,
        image_size=IMAGE,
        weight_init="released",
    )
    return SwinTransformerV2(**(arguments | changes)).double()


def build_timm(window: int) -> nn.Module:
    timm_model = pytest.importorskip("timm.models.swin_transformer_v2")
    return timm_model.SwinTransformerV2(
        img_size=IMAGE, embed_dim=WIDTH, depths=DEPTHS, num_heads=HEADS, window_size=window, num_classes=CLASSES
    )


def build_torchvision(window: int) -> nn.Module:
    vision = pytest.importorskip("torchvision.models.swin_transformer")
    return vision.SwinTransformer(
        [4, 4],
        WIDTH,
        DEPTHS,
        HEADS,
        [window, window],
        num_classes=CLASSES,
        block=vision.SwinTransformerBlockV2,
        downsample_layer=vision.PatchMergingV2,
    )


def transformers_config(window: int):
    return pytest.importorskip("transformers").Swinv2Config(
        image_size=IMAGE,
        embed_dim=WIDTH,
        depths=DEPTHS,
        num_heads=HEADS,
        window_size=window,
        pretrained_window_sizes=[0] * len(DEPTHS),
        num_labels=CLASSES,
        encoder_stride=16,
    )


def build_transformers(window: int) -> nn.Module:
    return pytest.importorskip("transformers").Swinv2ForImageClassification(transformers_config(window))


BUILD = {"timm": build_timm, "torchvision": build_torchvision, "transformers": build_transformers}


def draw(model: nn.Module, seed: int) -> None:
    """Every parameter random. Logits in windows stay far below 100, so that a shift mask of -100 or -200 is strict."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            if name.endswith("logit_scale") or ("norm" in name and name.endswith("weight")):
                parameter.add_(1.0)


def logits(model: nn.Module) -> Tensor:
    images = torch.randn(2, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        out = model.eval()(images)
    return getattr(out, "logits", out)


def load_into(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Strictly, derived buffers apart."""
    result = model.load_state_dict(tensors, strict=False)
    assert not result.unexpected_keys
    assert [name for name in result.missing_keys if not DERIVED.search(name)] == []


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def weights(seed: int = 0, **changes) -> dict[str, Tensor]:
    model = build_ours(**changes)
    draw(model, seed)
    return model.state_dict()


# timm and transformers shrink the last stage's window from 8 to 4, as the released code does; torchvision does not.
@pytest.mark.parametrize(
    ("layout", "window"),
    [("timm", 4), ("timm", 8), ("torchvision", 4), ("transformers", 4), ("transformers", 8)],
)
def test_logits_survive_the_way_there_and_back(layout: str, window: int) -> None:
    ours, theirs = build_ours(window), BUILD[layout](window).double()
    draw(ours, 0)
    expected = logits(ours)
    load_into(theirs, from_released(ours.state_dict(), layout))
    assert relative_error(logits(theirs), expected) < 1e-10

    draw(theirs, 2)
    expected = logits(theirs)
    assert detect(theirs.state_dict()) == layout
    ours.load_state_dict(to_released(theirs.state_dict(), layout))
    assert relative_error(logits(ours), expected) < 1e-10


def test_simmim_of_transformers() -> None:
    ours = SimMIM(build_ours(num_classes=0), norm_target_window=0).double()
    theirs = pytest.importorskip("transformers").Swinv2ForMaskedImageModeling(transformers_config(WINDOW)).double()
    draw(ours, 0)
    tensors = from_released(ours.state_dict(), "transformers")
    load_into(theirs, tensors)
    assert detect(tensors) == "transformers" and equal(to_released(tensors, "transformers"), ours.state_dict())

    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, IMAGE, IMAGE, generator=generator, dtype=torch.float64)
    mask = (torch.rand(2, IMAGE // 4, IMAGE // 4, generator=generator) < 0.5).long()
    with torch.no_grad():
        expected = theirs.eval()(images, bool_masked_pos=mask.flatten(1).bool()).reconstruction
        assert relative_error(ours.eval().reconstruct(images, mask), expected) < 1e-10


@pytest.mark.parametrize("headless", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip_is_bit_identical(layout: str, headless: bool) -> None:
    released = weights(num_classes=0 if headless else CLASSES)
    there = from_released(released, layout)
    assert detect(there) == layout
    assert equal(to_released(there, layout), released)
    storages = [tensor.untyped_storage().data_ptr() for tensor in there.values()]
    assert len(set(storages)) == len(storages), "tensors that share memory cannot be saved as safetensors"


def test_round_trip_through_all() -> None:
    tensors = released = weights()
    for layout in OTHERS:
        tensors = to_released(from_released(tensors, layout), layout)
    assert equal(tensors, released)


def test_more_than_nine_stages_and_blocks() -> None:
    released = weights(depths=[11, 1], num_heads=[1, 2])
    for layout in OTHERS:
        assert equal(to_released(from_released(released, layout), layout), released)


@pytest.mark.parametrize("prefix", ["module.", "model.", "backbone.", "module.model.", "_orig_mod.module."])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_wrappers_prefixes_go(layout: str, prefix: str) -> None:
    released = weights()
    tensors = from_released(released, layout)
    everywhere = {prefix + name: tensor for name, tensor in tensors.items()}
    not_the_head = {name if "classifier" in name or "head" in name else prefix + name: t for name, t in tensors.items()}
    for wrapped in (everywhere, not_the_head):
        assert detect(wrapped) == layout
        assert equal(to_released(wrapped, layout), released)


def test_task_prefix_is_optional() -> None:
    released = weights(num_classes=0)
    bare = from_released(released, "transformers")
    assert not any(name.startswith("swinv2.") for name in bare)
    for tensors in (bare, {f"swinv2.{name}": tensor for name, tensor in bare.items()}):
        assert detect(tensors) == "transformers"
        assert equal(to_released(tensors, "transformers"), released)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_derived_buffers_are_dropped(layout: str) -> None:
    released = weights()
    tensors = from_released(released, layout)
    stems = {name.removesuffix("logit_scale") for name in tensors if name.endswith("logit_scale")}
    buffers = ["relative_position_index", "relative_coords_table"] + (["k_bias"] if layout == "timm" else [])
    tensors |= {stem + buffer: torch.zeros(3) for stem in stems for buffer in buffers}
    assert detect(tensors) == layout
    assert equal(to_released(tensors, layout), released)


def test_variants_of_the_released_layout() -> None:
    _, golden = load("classifier_extra_norm_every2")
    research = {name.replace("cpb_mlp", "rpe_mlp"): tensor for name, tensor in golden["param"].items()}
    assert detect(research) == "released"
    assert equal(to_released(research, "released"), golden["param"])

    _, golden = load("simmim_plain")
    assert detect(golden["param"]) == "released"
    assert equal(to_released(golden["param"], "released"), golden["param"])


def test_key_third_of_torchvision_is_ignored_and_written_as_zero() -> None:
    tensors = from_released(weights(), "torchvision")
    name = "features.3.1.attn.qkv.bias"
    assert tensors[name].count_nonzero() == 2 * 2 * WIDTH and not tensors[name].chunk(3)[1].any()
    noisy = tensors | {name: tensors[name] + torch.cat([torch.full((2 * WIDTH,), x) for x in (0.0, 7.0, 0.0)])}
    assert equal(to_released(noisy, "torchvision"), to_released(tensors, "torchvision"))


@pytest.mark.parametrize("layout", OTHERS)
@pytest.mark.parametrize(
    ("changes", "named"), [({"extra_norm_period": 2}, "enorm"), ({"absolute_pos_embed": True}, "absolute_pos_embed")]
)
def test_what_a_layout_cannot_express_is_refused(layout: str, changes: dict, named: str) -> None:
    with pytest.raises(ValueError, match=rf"no place for .*{named}.*{layout}"):
        from_released(weights(**changes), layout)


@pytest.mark.parametrize("layout", ["timm", "torchvision"])
def test_simmim_is_refused_where_it_has_no_place(layout: str) -> None:
    tensors = SimMIM(build_ours(num_classes=0), norm_target_window=0).state_dict()
    with pytest.raises(ValueError, match=r"mask_token, decoder\.0\.weight, decoder\.0\.bias.*leave out"):
        from_released(tensors, layout)
    encoder = {name: tensor for name, tensor in tensors.items() if name.startswith("encoder.") and "mask" not in name}
    assert detect(from_released(encoder, layout)) == layout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_unknown_names_are_refused(layout: str) -> None:
    tensors = from_released(weights(), layout) | {f"extra.{i}": torch.zeros(1) for i in range(4)}
    with pytest.raises(ValueError, match=r"no place for extra\.0, extra\.1, extra\.2 and 1 more"):
        to_released(tensors, layout)


def test_impossible_stage_numbers_are_refused() -> None:
    for layout, name in (("timm", "layers.0.downsample.norm.weight"), ("torchvision", "features.3.norm.weight")):
        with pytest.raises(ValueError, match="no place for"):
            to_released({name: torch.zeros(1)}, layout)


def test_two_tensors_of_one_name_are_refused() -> None:
    tensors = weights()
    name = "layers.0.blocks.0.attn.cpb_mlp.2.weight"
    with pytest.raises(ValueError, match=f"two tensors would be named {name}"):
        to_released(tensors | {name.replace("cpb", "rpe"): tensors[name]}, "released")


def test_incomplete_attention_is_refused() -> None:
    for layout, part in (("transformers", "key.weight"), ("transformers", "query.weight")):
        tensors = from_released(weights(), layout)
        del tensors[f"swinv2.encoder.layers.0.blocks.0.attention.self.{part}"]
        with pytest.raises(ValueError, match="incomplete attention"):
            to_released(tensors, layout)
    for part in ("q_bias", "v_bias"):
        tensors = weights()
        del tensors[f"layers.0.blocks.0.attn.{part}"]
        with pytest.raises(ValueError, match=f"incomplete attention.*{part}"):
            from_released(tensors, "torchvision")


def test_key_bias_is_refused() -> None:
    tensors = from_released(weights(), "timm") | {"layers.0.blocks.0.attn.k_bias": torch.ones(WIDTH)}
    with pytest.raises(ValueError, match=r"layers\.0\.blocks\.0\.attn\.k_bias is not zero"):
        to_released(tensors, "timm")


@pytest.mark.parametrize(
    ("library", "reason"), [("timm cr", "swinv2_cr"), ("timm V1", "first Swin"), ("torchvision V1", "first Swin")]
)
def test_lookalikes_are_refused_with_the_reason(library: str, reason: str) -> None:
    size = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "num_classes": 2}
    if library == "timm cr":
        model = pytest.importorskip("timm.models.swin_transformer_v2_cr").SwinTransformerV2Cr(img_size=64, **size)
    elif library == "timm V1":
        model = pytest.importorskip("timm.models.swin_transformer").SwinTransformer(img_size=56, **size)
    else:
        vision = pytest.importorskip("torchvision.models.swin_transformer")
        model = vision.SwinTransformer([4, 4], 8, [1, 1], [1, 2], [7, 7], num_classes=2)
    with pytest.raises(ValueError, match=reason):
        detect(model.state_dict())
    with pytest.raises(ValueError, match=reason):
        detect({f"module.{name}": tensor for name, tensor in model.state_dict().items()})


def test_other_order_of_merged_patches_is_refused() -> None:
    tensors = {"backbone.stages.0.blocks.0.attn.w_msa.logit_scale": torch.zeros(1)}
    with pytest.raises(ValueError, match="another order"):
        detect(tensors)


def test_everything_else_is_refused_with_three_names() -> None:
    tensors = {f"conv{i}.weight": torch.zeros(1) for i in range(5)}
    with pytest.raises(ValueError, match=r"conv0\.weight, conv1\.weight, conv2\.weight$"):
        detect(tensors)
    with pytest.raises(ValueError, match="empty"):
        detect({})
    with pytest.raises(ValueError, match=r"layout must be one of released, timm.*got 'keras'"):
        to_released({}, "keras")
    with pytest.raises(ValueError, match="layout must be one of"):
        from_released({}, "keras")
