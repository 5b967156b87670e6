"""UPerNet equals transformers' on a Swin V2 backbone, with copied weights; batch norm over ranks equals torch's."""

import re

import pytest
import torch
import torch.nn.functional as F
from golden import relative_error
from test_layouts import DEPTHS, HEADS, IMAGE, WIDTH, build_ours, draw
from torch import Tensor, nn

from swinv2_scale import distributed
from swinv2_scale.models.layouts import to_released
from swinv2_scale.models.upernet import BatchNorm, UPerNet

CLASSES, CHANNELS, AUXILIARY = 5, 12, 6
WINDOW = 4
# Rows (ours, transformers'), of UperNetHead and UperNetFCNHead.
NAMES = (
    (r"decoder\.levels\.(\d)\.lateral", r"decode_head.lateral_convs.\1"),
    (r"decoder\.levels\.(\d)\.output", r"decode_head.fpn_convs.\1"),
    (r"decoder\.pyramid\.(\d)", r"decode_head.psp_modules.\1.1"),
    (r"decoder\.bottleneck", "decode_head.bottleneck"),
    (r"decoder\.fuse", "decode_head.fpn_bottleneck"),
    (r"decoder\.classifier", "decode_head.classifier"),
    (r"decoder\.auxiliary_classifier", "auxiliary_head.classifier"),
    (r"decoder\.auxiliary\.", "auxiliary_head.convs.0."),
    (r"\.norm\.", ".batch_norm."),
)


def build(pool_scales=(1, 2, 3, 6), **changes) -> UPerNet:
    heads = {"num_classes": CLASSES, "channels": CHANNELS, "auxiliary_channels": AUXILIARY, "dropout": 0.0}
    return UPerNet(build_ours(WINDOW, num_classes=0, **changes), pool_scales=pool_scales, **heads).double()


def build_transformers(norms: list[int]) -> nn.Module:
    """In float64, its backbone's maps followed by LayerNorms of these widths, which its Swin V2 does not have."""
    transformers = pytest.importorskip("transformers")
    backbone = transformers.Swinv2Config(
        image_size=IMAGE,
        embed_dim=WIDTH,
        depths=DEPTHS,
        num_heads=HEADS,
        window_size=WINDOW,
        drop_path_rate=0.0,
        pretrained_window_sizes=[0] * len(DEPTHS),
        out_features=[f"stage{number + 1}" for number in range(len(DEPTHS))],
    )
    config = transformers.UperNetConfig(
        backbone_config=backbone,
        hidden_size=CHANNELS,
        pool_scales=[1, 2, 3, 6],
        use_auxiliary_head=True,
        auxiliary_loss_weight=0.4,
        auxiliary_channels=AUXILIARY,
        auxiliary_num_convs=1,
        auxiliary_in_channels=WIDTH * 2 ** (len(DEPTHS) - 2),
        num_labels=CLASSES,
        loss_ignore_index=255,
    )
    # Its auxiliary head takes the third map whatever their number is; here there are three, and it is the second.
    model = transformers.UperNetForSemanticSegmentation(config)
    model.auxiliary_head.in_index = len(DEPTHS) - 2
    if norms:
        model.norms = nn.ModuleList(nn.LayerNorm(width) for width in norms)
        plain = model.backbone.forward_with_filtered_kwargs

        def normed(*arguments, **settings):
            outputs = plain(*arguments, **settings)
            maps = zip(model.norms, outputs.feature_maps, strict=True)
            outputs.feature_maps = tuple(norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for norm, x in maps)
            return outputs

        model.backbone.forward_with_filtered_kwargs = normed
    return model.double()


def copied(theirs: nn.Module, ours: UPerNet) -> None:
    """Their weights and running statistics into our model, every one of them, drawn at random first."""
    draw(theirs, 0)
    state = theirs.state_dict()
    for name, buffer in state.items():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2.0)
        elif name.endswith("running_mean"):
            buffer.normal_()
    taken = set()
    backbone = {
        name.removeprefix("backbone."): tensor
        for name, tensor in state.items()
        if name.startswith("backbone.") and not name.endswith("num_batches_tracked")
    }
    released = to_released({**backbone}, "transformers")
    taken |= {f"backbone.{name}" for name in backbone}
    for name, own in ours.state_dict().items():
        if name.startswith("encoder.") and not name.startswith("encoder.norm."):
            own.copy_(released[name.removeprefix("encoder.")])
            continue
        if match := re.fullmatch(r"(?:decoder\.levels\.(\d)\.norm|encoder\.norm)\.(weight|bias)", name):
            their_name = f"norms.{match[1] or len(DEPTHS) - 1}.{match[2]}"
        else:
            their_name = name
            for pattern, replacement in NAMES:
                their_name = re.sub(pattern, replacement, their_name)
        own.copy_(state[their_name])
        taken.add(their_name)
    assert set(ours.encoder.state_dict()) - set(released) <= {"norm.weight", "norm.bias"}
    left = [n for n in state if n not in taken and not n.endswith("num_batches_tracked")]
    assert left == [], "every tensor of theirs has its place"


def pictures(rows: int = IMAGE, columns: int = IMAGE) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, rows, columns, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, CLASSES + 1, (2, rows, columns), generator=generator)
    return images, torch.where(labels == CLASSES, 255, labels)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("normed", [False, True])
def test_logits_loss_and_gradients_are_those_of_transformers(normed: bool, training: bool) -> None:
    ours = build()
    theirs = build_transformers(ours.encoder.widths if normed else [])
    if not normed:  # as transformers has it: the maps as they leave the stages
        ours.encoder.norm = nn.Identity()
        for level in ours.decoder.levels:
            level.norm = nn.Identity()
    copied(theirs, ours)
    images, labels = pictures()
    ours.train(training), theirs.train(training)
    logits, auxiliary = ours(images)
    expected = theirs(images, labels=labels)
    assert relative_error(logits, expected.logits) < 1e-10
    assert torch.equal(ours.eval().segment(images), logits) or training
    loss = F.cross_entropy(logits, labels, ignore_index=255) + 0.4 * F.cross_entropy(
        auxiliary, labels, ignore_index=255
    )
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-10), "its loss has both heads"
    loss.backward(), expected.loss.backward()
    pairs = [
        (ours.encoder.patch_embed.proj, theirs.backbone.embeddings.patch_embeddings.projection),
        (ours.decoder.fuse.conv, theirs.decode_head.fpn_bottleneck.conv),
        (ours.decoder.pyramid[0].norm, theirs.decode_head.psp_modules.blocks[0].layers[1].batch_norm),
        (ours.decoder.auxiliary.norm, theirs.auxiliary_head.convs[0].batch_norm),
    ]
    for own, other in pairs:
        assert relative_error(own.weight.grad, other.weight.grad) < 1e-9
        if isinstance(own, BatchNorm):  # running statistics have moved alike
            assert relative_error(own.bias.grad, other.bias.grad) < 1e-9
            assert relative_error(own.running_mean, other.running_mean) < 1e-10
            assert relative_error(own.running_var, other.running_var) < 1e-10


def test_any_size_of_image() -> None:
    model = build().eval()
    draw(model, 0)
    images, _ = pictures(37, 90)
    with torch.no_grad():
        logits, auxiliary = model(images)
        assert logits.shape == auxiliary.shape == (2, CLASSES, 37, 90)
        assert relative_error(model.segment(images[1:]), logits[1:]) < 1e-10, "images do not see each other"


def test_an_image_alone_cannot_be_trained_on_one_rank() -> None:
    with pytest.raises(ValueError, match="set micro_batch=2 or more"):
        build()(pictures()[0][:1])
    build(pool_scales=(2,))(pictures()[0][:1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 0}, "channels=0"),
        ({"pool_scales": [1, 0]}, r"pool_scales=\[1, 0\]"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_impossible_numbers_are_refused(changes: dict, message: str) -> None:
    given = {"num_classes": 2, "channels": 4, "auxiliary_channels": 4, "pool_scales": [1], "dropout": 0.1}
    with pytest.raises(ValueError, match=message):
        UPerNet(build_ours(num_classes=0), **{**given, **changes})
    with pytest.raises(ValueError, match="without classifier"):
        UPerNet(build_ours(), **given)


def test_batch_norm_is_torchs() -> None:
    ours, theirs = BatchNorm(3).double(), nn.BatchNorm2d(3).double()
    x = 2 + 3 * torch.randn(2, 3, 4, 5, dtype=torch.float64)
    for norm in (ours, theirs):
        nn.init.normal_(norm.weight.data, generator=torch.Generator().manual_seed(0))
        nn.init.normal_(norm.bias.data, generator=torch.Generator().manual_seed(1))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [norm(value) for norm, value in zip((ours, theirs), inputs, strict=True)]
    for output in outputs:
        (output * output.detach().roll(1, 0).exp()).sum().backward()
    assert relative_error(*outputs) < 1e-12
    assert relative_error(inputs[0].grad, inputs[1].grad) < 1e-10
    for name in ("weight", "bias"):
        assert relative_error(getattr(ours, name).grad, getattr(theirs, name).grad) < 1e-12
    for name in ("running_mean", "running_var"):
        assert relative_error(getattr(ours, name), getattr(theirs, name)) < 1e-12
    assert relative_error(ours.eval()(x), theirs.eval()(x)) < 1e-12
    low = BatchNorm(3)(x.bfloat16())
    assert (
        low.dtype == torch.bfloat16 and (low.double() - BatchNorm(3).double()(x.bfloat16().double())).abs().max() < 0.02
    )


def test_a_batch_that_is_not_finite_leaves_the_statistics() -> None:
    norm = BatchNorm(2)
    x = torch.ones(2, 2, 3, 3)
    x[0, 1, 0, 0] = float("nan")
    norm(x)
    assert norm.running_mean.tolist() == pytest.approx([0.1, 0.0])
    assert norm.running_var.tolist() == pytest.approx([0.9, 1.0])


def test_batch_norm_of_ranks_is_that_of_their_batches_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks stand for one another here: each has the same half, so that means over ranks are those of one."""
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    whole = BatchNorm(3).double()
    expected = whole(torch.cat((x, x)))
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "sum_tensor", lambda tensor: tensor.mul_(2))
    half = BatchNorm(3).double()
    assert relative_error(half(x), expected[:2]) < 1e-12
    assert relative_error(half.running_var, whole.running_var) < 1e-12, "the unbiased variance counts all values"
