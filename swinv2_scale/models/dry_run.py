"""What the heads of a model take in a training pass, by running them on the meta device: shapes without numbers.

    heads   forward and backward of all that lies behind the backbone's maps, of a UPerNet or a CascadeRCNN
    Live    bytes of the storages that are there, and the operations that were done

PyTorch's autograd keeps and frees on the meta device what it keeps and frees anywhere. What a detector does depends on
what it finds; so here it finds as much as it can: `samples` boxes an image in each stage, as many of them objects as
may be. They are cut from the maps of the pyramid in equal parts.
B images, R boxes, C channels.
"""

import weakref
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import roi_align

from swinv2_scale.models.detection.cascade import MASKS_AT_A_TIME, CascadeRCNN, Pyramid, semantic_loss
from swinv2_scale.models.detection.heads import last_mask_logits
from swinv2_scale.models.detection.parts import BOX_SIDE, MASK_SIDE, STRIDES
from swinv2_scale.models.upernet import UPerNet


class Heads(NamedTuple):
    """Bytes of a micro-batch.

    kept    between forward and backward, by part; the backbone's maps among them where a head needs them
    peak    the most at a time, in forward or backward
    left    when only the backbone's backward is to come: the gradients of all maps, and those of weights that last
    flops   of forward and backward of all images
    """

    kept: dict[str, float]
    peak: float
    left: float
    flops: float


class Live(TorchDispatchMode):
    """Bytes of the storages that operations have made and that are still there, the most of them at a time, and the
    floating-point operations of matrix products and convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.left = self.flops = 0.0
        self.grown: dict[str, float] = {}
        self._marked = 0.0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._sizes:
                    self._sizes[storage._cdata] = storage.nbytes()
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage._cdata)
        self.peak = max(self.peak, self.live)
        return out

    def mark(self, part: str) -> None:
        """What has come since the last mark is of this part."""
        self.grown[part] = self.grown.get(part, 0.0) + self.live - self._marked
        self._marked = self.live

    def _gone(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


class _Maps(torch.autograd.Function):
    """(B, Y/s, X/s, C_s) as of a backbone, whose own backward begins when all heads' are done."""

    @staticmethod
    def forward(ctx: Any, start: Tensor, shapes: Sequence[Sequence[int]], dtype: torch.dtype, live: Live) -> Any:
        ctx.live = live
        return tuple(start.new_empty(shape, dtype=dtype) for shape in shapes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.live.left = ctx.live.live
        return gradients[0].new_zeros(()), None, None, None


@lru_cache(maxsize=64)  # memory policies do not change it
def heads(
    model: UPerNet | CascadeRCNN, shapes: tuple[tuple[int, ...], ...], *, size: tuple[int, ...], lasting_gradient: float
) -> Heads:
    """Of a model on the meta device, in the types that it trains in.

    shapes             (B, Y/s, X/s, C_s) of the backbone's maps
    size               rows and columns of the images
    lasting_gradient   bytes of each weight's gradient that last until the step
    """
    live = Live()

    def made(weight: Tensor) -> None:
        live.live += lasting_gradient * weight.numel()
        weight.grad = None

    weights = [*model.decoder.parameters(), *model.encoder.norm.parameters()]
    hooks = [weight.register_post_accumulate_grad_hook(made) for weight in weights]
    start = torch.zeros((), device="meta", requires_grad=True)
    with live:
        *lower, last = _Maps.apply(start, shapes, next(model.encoder.parameters()).dtype, live)
        run = _segmented if isinstance(model, UPerNet) else _detected
        loss = run(model, lower, last, size, live)  # type: ignore[arg-type]
        del lower, last
        live.mark(next(iter(live.grown)))  # what this part's own variables have held until now
        loss.backward()
    for hook in hooks:
        hook.remove()
    return Heads(live.grown, live.peak, live.left, live.flops)


def _segmented(model: UPerNet, lower: list[Tensor], last: Tensor, size: Sequence[int], live: Live) -> Tensor:
    """The loss of both heads."""
    main, auxiliary = model.answers([*lower, last], size)
    live.mark("heads")
    target = torch.zeros(len(last), *size, dtype=torch.int64, device="meta")
    loss = sum(F.cross_entropy(logits, target, reduction="sum") for logits in (main, auxiliary))
    live.mark("loss")
    assert isinstance(loss, Tensor)
    return loss


def _detected(model: CascadeRCNN, lower: list[Tensor], last: Tensor, size: Sequence[int], live: Live) -> Tensor:
    """The sum of all losses."""
    images, rpn = len(last), model.decoder.rpn
    pyramid = model.pyramid_of(lower, last, (size[0], size[1]))
    live.mark("pyramid")
    objectness, deltas = concat_box_prediction_layers(*rpn.head(list(pyramid.maps.values())))
    drawn = _numbers(images * rpn.fg_bg_sampler.batch_size_per_image)
    losses = [
        F.binary_cross_entropy_with_logits(objectness.flatten()[drawn], objectness.new_zeros(len(drawn))),
        F.smooth_l1_loss(deltas[drawn], deltas.new_zeros(len(drawn), 4)),
    ]
    live.mark("proposals")
    boxes, objects = images * model.samples, images * most_objects(model)
    for stage in range(len(model.stage_weights)):
        classes, moved = model.decoder.box_heads[stage](_cut(pyramid, boxes, BOX_SIDE))
        losses.append(F.cross_entropy(classes, _numbers(boxes), reduction="sum"))
        losses.append(F.smooth_l1_loss(moved[_numbers(objects)], moved.new_zeros(objects, 4)))
        live.mark("box heads")
        if model.decoder.mask_heads:
            torch.empty(min(objects, MASKS_AT_A_TIME), *size, device="meta")  # while targets are cut out
            seen = _cut(pyramid, objects, MASK_SIDE)
            logits = last_mask_logits(model.mask_heads(stage + 1), seen, flow=model.mask_information_flow)
            of_classes = logits[_numbers(objects), _numbers(objects)]
            losses.append(F.binary_cross_entropy_with_logits(of_classes, torch.zeros_like(of_classes)))
            live.mark("mask heads")
    if pyramid.logits is not None:
        label = torch.zeros(*size, dtype=torch.int64, device="meta")
        losses.append(semantic_loss(pyramid.logits, [{"semantic": label}] * images))
        live.mark("semantic loss")
    return torch.stack(losses).sum()


def most_objects(model: CascadeRCNN) -> int:
    """How many of the boxes that a stage learns from are objects, in an image, at most."""
    return int(model.samples * model.positive_share)


def _numbers(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int64, device="meta")


def _cut(pyramid: Pyramid, boxes: int, side: int) -> Tensor:
    """What a head sees of so many boxes, as torchvision's MultiScaleRoIAlign cuts it: (R, C, side, side)."""
    maps = list(pyramid.maps.values())[: len(STRIDES) - 1]
    cut = maps[0].new_zeros(boxes, maps[0].shape[1], side, side)
    for one, index in zip(maps, _numbers(boxes).tensor_split(len(maps)), strict=True):
        cut[index] = roi_align(one, cut.new_empty(len(index), 5), side, sampling_ratio=2)
    if pyramid.semantic is None:
        return cut
    semantic = roi_align(pyramid.semantic, cut.new_empty(boxes, 5), MASK_SIDE, sampling_ratio=2)
    return cut + (F.adaptive_avg_pool2d(semantic, side) if side != MASK_SIDE else semantic)
