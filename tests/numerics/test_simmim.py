"""SimMIM: the mask token, the target, the loss, its gradients and its errors."""

import math

import pytest
import torch
from torch import Tensor

from swinv2_scale.models.simmim import SimMIM, normalise_target
from swinv2_scale.models.swin_v2 import SwinTransformerV2


def encoder_of(**changes) -> SwinTransformerV2:
    arguments = {
        "in_channels": 3,
        "embed_dim": 8,
        "depths": [2, 2, 2],
        "num_heads": [1, 2, 2],
        "window_size": 4,
        "pretrained_window_size": None,
        "mlp_ratio": 2.0,
        "drop_path_rate": 0.0,
        "extra_norm_period": 0,
        "absolute_pos_embed": False,
        "num_classes": 0,
        "image_size": 32,
        "weight_init": "released",
    }
    return SwinTransformerV2(**{**arguments, **changes})


def drawn(window: int = 0, **changes) -> SimMIM:
    """A model whose every parameter is random, in float64."""
    model = SimMIM(encoder_of(**changes), norm_target_window=window).double()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


def batch(rows: int = 32, columns: int = 48) -> tuple[Tensor, Tensor]:
    """Images, and a mask in units of patches (finer than the units of pretraining, so that every border matters)."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, rows, columns, generator=generator, dtype=torch.float64)
    return images, (torch.rand(2, rows // 4, columns // 4, generator=generator) < 0.6).long()


def pixels(mask: Tensor) -> Tensor:
    """The mask per pixel, (B, 1, Y, X)."""
    return torch.kron(mask, torch.ones(4, 4, dtype=mask.dtype))[:, None].bool()


@pytest.mark.parametrize("window", [3, 5, 47])
def test_normalised_target(window) -> None:
    images = torch.randn(2, 3, 9, 13, dtype=torch.float64) * 2 + 1
    images[0, 0, :5, :6] = 0.7  # no variance: the floor under the square root counts
    target = normalise_target(images, window)
    reach = window // 2
    for y in range(9):
        for x in range(13):
            near = images[:, :, max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1].flatten(2)
            expected = (images[:, :, y, x] - near.mean(-1)) / (near.var(-1, unbiased=True) + 1e-6).sqrt()
            assert torch.allclose(target[:, :, y, x], expected, rtol=1e-7, atol=1e-9)


def test_normalised_target_of_a_flat_image_is_zero() -> None:
    target = normalise_target(torch.full((1, 3, 64, 64), 2.64), 47)
    assert target.abs().max() < 1e-3  # float32: the variance is a difference of squares


@pytest.mark.parametrize("position", [False, True])
def test_the_mask_token_replaces_hidden_patches_and_only_those(position) -> None:
    model = drawn(absolute_pos_embed=position, image_size=(32, 48))
    images, mask = batch()
    seen = []
    model.encoder.layers[0].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    model(images, mask)
    patches = model.encoder.patch_embed(images)
    for b, y, x in torch.cartesian_prod(torch.arange(2), torch.arange(8), torch.arange(12)):
        expected = model.encoder.mask_token[0, 0] if mask[b, y, x] else patches[b, y, x]
        if position:
            expected = expected + model.encoder.absolute_pos_embed[0, 12 * y + x]
        assert torch.allclose(seen[0][b, y, x], expected, rtol=1e-12)


def test_predictions_depend_on_visible_pixels_only() -> None:
    model = drawn()
    images, mask = batch()
    hidden = pixels(mask)
    expected = model.reconstruct(images, mask)
    assert expected.shape == images.shape
    noise = torch.randn_like(images)
    assert torch.equal(model.reconstruct(torch.where(hidden, noise, images), mask), expected)
    assert not torch.allclose(model.reconstruct(torch.where(hidden, images, noise), mask), expected)
    assert torch.equal(model.reconstruct(images, mask.bool()), expected)


def test_decoder_places_its_channels_as_pixels() -> None:
    model = drawn()
    images, mask = batch()
    predicted = model.reconstruct(images, mask)
    model.decoder[1] = torch.nn.Identity()
    features = model.reconstruct(images, mask)
    assert features.shape == (2, 3 * 16 * 16, 2, 3)
    for channel, y, x in [(0, 0, 0), (1, 5, 17), (2, 31, 47)]:
        source = features[:, (channel * 16 + y % 16) * 16 + x % 16, y // 16, x // 16]
        assert torch.equal(predicted[:, channel, y, x], source)


@pytest.mark.parametrize("window", [0, 5])
def test_loss_formula(window) -> None:
    model = drawn(window)
    images, mask = batch()
    target = normalise_target(images, window) if window else images
    hidden = pixels(mask)
    distances = (target - model.reconstruct(images, mask)).abs()
    expected = distances.sum(1, keepdim=True)[hidden].sum().item() / (hidden.sum().item() + 1e-5) / 3
    assert model(images, mask).item() == pytest.approx(expected, rel=1e-12)
    assert model(images, torch.zeros_like(mask)).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("window", [0, 47])
def test_loss_is_at_least_float32_whatever_the_images_are(dtype, window) -> None:
    """16-bit images must not make the sums over pixels, and the variance, 16-bit."""
    images, mask = batch()
    images = images.to(dtype)
    model = drawn(window).float()
    loss = model(images, mask)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(model(images.float(), mask).item(), rel=1e-5)


@pytest.mark.parametrize("fresh", [True, False])
def test_every_gradient_is_finite_in_training(fresh) -> None:
    encoder = encoder_of(depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], drop_path_rate=0.2, absolute_pos_embed=True)
    model = SimMIM(encoder, norm_target_window=47).train()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    if not fresh:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.3 * torch.randn_like(parameter))
    images, mask = batch(32, 32)
    model(images.float(), mask).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert encoder.mask_token.grad.norm() > 0


def test_fresh_mask_token_and_shapes() -> None:
    torch.manual_seed(0)
    model = SimMIM(encoder_of(embed_dim=512, depths=[1, 1], num_heads=[1, 1]), norm_target_window=0)
    assert model.encoder.mask_token.shape == (1, 1, 512)
    assert model.encoder.mask_token.std().item() == pytest.approx(0.02, rel=0.15)
    assert model.decoder[0].weight.shape == (8 * 8 * 3, 1024, 1, 1)
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("window", [-1, 2, 46, 1])
def test_target_windows_that_have_no_variance_or_no_centre_are_refused(window) -> None:
    with pytest.raises(ValueError, match="norm_target_window"):
        SimMIM(encoder_of(), norm_target_window=window)


def test_an_encoder_with_a_classifier_is_refused() -> None:
    with pytest.raises(ValueError, match="num_classes=0"):
        SimMIM(encoder_of(num_classes=3), norm_target_window=0)


@pytest.mark.parametrize(
    ("message", "image", "mask"),
    [
        ("image sizes that 16 divides", (2, 3, 32, 40), (2, 8, 10)),
        ("image sizes that 16 divides", (2, 3, 30, 32), (2, 8, 8)),
        (r"mask must be \(2, 8, 8\)", (2, 3, 32, 32), (2, 2, 2)),
        (r"mask must be \(2, 8, 8\)", (2, 3, 32, 32), (1, 8, 8)),
        (r"mask must be \(2, 8, 8\)", (2, 3, 32, 32), (2, 1, 8, 8)),
        (r"images must be \(B, 3, Y, X\)", (2, 1, 32, 32), (2, 8, 8)),
    ],
)
def test_inputs_that_do_not_fit_are_refused(message, image, mask) -> None:
    model = SimMIM(encoder_of(), norm_target_window=5)
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(image), torch.ones(mask))
    assert math.isfinite(model(torch.zeros(2, 3, 32, 32), torch.ones(2, 8, 8)).item())
