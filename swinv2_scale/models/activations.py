"""What one training pass keeps in memory beside weights and optimiser states, from shapes alone.

A model is a sequence of units (embedding, blocks, patch merging, head), each of chains of operations, and an operation
keeps for backward what autograd keeps: a linear layer its input, an MLP also its hidden map before GELU, post-norm its
branch, LayerNorm its float32 input, the attention operator qkv, its output and one log-sum-exp per row. Backward walks
the chains from their end: gradients come, kept tensors go, and the largest sum on the way is the peak. It never lies in
forward, where a unit holds less than when its own backward begins. Heads of dense tasks are more than a chain, and are
run on the meta device instead (dry_run.py).

Drop path leaves branches out; what is planned is for a step in which none is.

tests/unit/test_activations.py compares what is kept, and the peak, with what PyTorch holds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from swinv2_scale.models import dry_run
from swinv2_scale.models.detection.cascade import CascadeRCNN
from swinv2_scale.models.simmim import SimMIM
from swinv2_scale.models.swin_v2 import Block, SwinTransformerV2, stage_grid
from swinv2_scale.models.upernet import UPerNet
from swinv2_scale.ops import native
from swinv2_scale.ops.block import LARGE
from swinv2_scale.ops.cosine_window_attention import SEQUENTIAL_BYTES
from swinv2_scale.ops.windows import fit_window, padded_grid

EXACT = 4  # bytes of float32: inside norms, position bias, logits, loss
BIAS_HIDDEN = 512  # of the network of the position bias
CPU_TASKS, CPU_CHUNKS = 128, 8  # chunks_of() of kernels/bindings.cpp: partial gradients of the bias table


class Op(NamedTuple):
    """An operation on the result of the one before it in its chain; in bytes, but for `weights`.

    out          its output, and the gradient of that
    keeps_input, keeps_output   whether backward needs them
    extra        kept besides
    weights      elements of its parameters, whose gradients its backward makes
    scratch      needed while its backward runs
    """

    out: float
    keeps_input: bool = False
    keeps_output: bool = False
    extra: float = 0.0
    weights: float = 0.0
    scratch: float = 0.0


class Chain(NamedTuple):
    """Operations that follow each other; residual: their input is added to their output."""

    ops: list[Op]
    residual: bool = False


@dataclass
class Unit:
    """A part of the model. source: bytes of its input; policy: "keep", "recompute" or "offload".

    pinned: bytes that PyTorch holds from the first forward although the unit is run again. joined: bytes of a gradient
    of its output that heads have left there, besides that of the next unit.
    """

    name: str
    source: float
    chains: list[Chain]
    policy: str = "keep"
    pinned: float = 0.0
    joined: float = 0.0

    def kept(self) -> float:
        """Bytes that its operations keep for backward, its input among them where they need it."""
        total, source = 0.0, self.source
        for ops, _ in self.chains:
            tensors = [source, *(op.out for op in ops)]
            total += sum(op.extra for op in ops) + sum(tensors[i] for i in _first_keepers(ops))
            source = ops[-1].out
        return total


@dataclass
class Activations:
    """Bytes of one micro-batch.

    kept        between forward and backward, by unit ("stage 1", …), on the device
    host        the same in host memory: inputs of offloaded blocks
    peak        of backward, with the gradients of weights that it has made until then
    workspace   the most that an operation of the backbone needs only while it runs
    heads_flops operations of heads that were run, forward and backward
    """

    kept: dict[str, float] = field(default_factory=dict)
    host: float = 0.0
    peak: float = 0.0
    workspace: float = 0.0
    heads_flops: float = 0.0

    @property
    def total(self) -> float:
        """Kept on the device."""
        return sum(self.kept.values())


def activations(
    model: nn.Module,
    *,
    images: int,
    size: Sequence[int],
    precision: str,
    device: str,
    memory: dict[str, Any],
    lasting_gradient: float,
) -> Activations:
    """What a micro-batch of `images` takes under a policy, the arguments of memory.apply.

    size              rows and columns in pixels; of a model of clips frames, rows and columns
    model             a SwinTransformerV2 or a SimMIM, also on the meta device; or, on the meta device and in the types
                      that it trains in, a UPerNet or a CascadeRCNN
    device            "cpu" or "cuda", whose kernel's workspace is counted. On a CPU what is offloaded stays where it is
    lasting_gradient  bytes of each weight's gradient that its own backward adds to what lasts until the step
    """
    low = 4 if precision == "fp32" else 2
    found = Activations()
    parts = units(model, images=images, size=size, low=low, device=device, memory=memory)
    for unit in parts:
        kept = unit.kept() if unit.policy == "keep" else unit.source + unit.pinned
        on_host = unit.policy == "offload" and device != "cpu"
        found.host += kept if on_host else 0.0
        found.kept[unit.name] = found.kept.get(unit.name, 0.0) + (0.0 if on_host else kept)
    walk = _Walk(found.total, gradient=low, lasting=lasting_gradient)
    if isinstance(model, UPerNet | CascadeRCNN):
        grids = [stage_grid(_embedded(model.encoder, size), stage) for stage in range(len(model.encoder.widths))]
        shapes = tuple((images, *grid, width) for grid, width in zip(grids, model.encoder.widths, strict=True))
        heads = dry_run.heads(model, shapes, size=tuple(size), lasting_gradient=lasting_gradient)
        walk = _Walk(found.total + heads.left, gradient=low, lasting=lasting_gradient)
        walk.peak = max(walk.peak, found.total + heads.peak)
        found.kept |= heads.kept
        found.heads_flops = heads.flops
    for unit in reversed(parts):
        until_done = 0.0
        walk.live -= unit.joined
        if unit.policy == "recompute":
            until_done = unit.pinned
            walk.live += unit.kept() - unit.source
            walk.run_again(unit)
        elif unit.policy == "offload":  # fairscale holds its output, and that output's gradient
            until_done = 2 * unit.chains[-1].ops[-1].out
            walk.live += unit.kept() - (unit.source if device == "cpu" else 0.0) + until_done
        walk.backward(unit)
        walk.live -= until_done
    found.peak, found.workspace = walk.peak, walk.workspace
    return found


class _Walk:
    """Backward, in thought. gradient, lasting: bytes of each element of a weight's gradient, while and after."""

    def __init__(self, live: float, *, gradient: float, lasting: float) -> None:
        self.live, self.peak, self.workspace = live, live, 0.0
        self._gradient, self._lasting = gradient, lasting

    def run_again(self, unit: Unit) -> None:
        """The end of a unit's second forward: its last norm's output, and the gradient that waits."""
        ops = unit.chains[-1].ops
        self._need(2 * max(op.out for op in ops if op.keeps_input))

    def backward(self, unit: Unit) -> None:
        """From the gradient of the unit's output to that of its input; all that it kept is live at the beginning."""
        sources = [unit.source, *(chain.ops[-1].out for chain in unit.chains)]
        for (ops, residual), source in zip(reversed(unit.chains), reversed(sources[:-1]), strict=True):
            tensors = [source, *(op.out for op in ops)]
            first = _first_keepers(ops)
            for i in reversed(range(len(ops))):
                op = ops[i]
                self._need(tensors[i] + op.weights * self._gradient + op.scratch)
                self.workspace = max(self.workspace, op.scratch)
                # Gone: the gradient of the output, and what nothing before this operation needs.
                self.live += tensors[i] - op.out - op.extra
                self.live -= sum(tensors[t] for t, keeper in first.items() if keeper == i)
                self.live += op.weights * self._lasting
                self._need(op.weights * self._gradient)
                if residual and i == len(ops) - 1:
                    self.live += op.out  # which the connection still holds
            if residual:
                self._need(source)  # the sum of both gradients
                self.live -= source

    def _need(self, bytes: float) -> None:
        self.peak = max(self.peak, self.live + bytes)


def _first_keepers(ops: Sequence[Op]) -> dict[int, int]:
    """Of the chain's tensors (0: its input) that are kept, the first operation that keeps it: backward's last."""
    first: dict[int, int] = {}
    for i, op in enumerate(ops):
        if op.keeps_input:
            first.setdefault(i, i)
        if op.keeps_output:
            first.setdefault(i + 1, i)
    return first


def backbone_of(model: nn.Module) -> SwinTransformerV2:
    """The backbone of a model. Raises ValueError for a model whose activations are not known."""
    backbone = model.encoder if isinstance(model, SimMIM | UPerNet | CascadeRCNN) else model
    if not isinstance(backbone, SwinTransformerV2):
        raise ValueError(f"a {type(model).__name__} cannot be planned: SimMIM, classifiers, UPerNet and detectors can")
    return backbone


def _embedded(backbone: SwinTransformerV2, size: Sequence[int]) -> list[int]:
    return [math.ceil(side / patch) for side, patch in zip(size, backbone.patch, strict=True)]


def units(
    model: nn.Module, *, images: int, size: Sequence[int], low: int, device: str, memory: dict[str, Any]
) -> list[Unit]:
    """The units of a model in the order of forward; low: bytes of an activation. Their names are parts of the table."""
    simmim = model if isinstance(model, SimMIM) else None
    backbone = backbone_of(model)
    embedded = _embedded(backbone, size)
    pixels = images * math.prod(size) * backbone.patch_embed.proj.in_channels
    tokens = images * math.prod(embedded)
    # 1  embedding: images need no gradient, so its source is none
    out = tokens * backbone.widths[0] * low
    weights = backbone.patch_embed.proj.weight.numel()
    embed = [Op(out, extra=pixels * low, weights=weights, scratch=out)]
    embed += _norm(tokens, backbone.widths[0], low, device)
    if simmim:
        embed.append(Op(out, extra=2 * tokens * low, scratch=out))
    found = [Unit("embedding", 0.0, [Chain(embed)])]
    # 2  stages
    recomputed = memory["stages"] if memory["stages"] is not None else range(len(backbone.layers))
    sequential = memory["attention_stages"] if memory["attention_stages"] is not None else range(len(backbone.layers))
    policies = {"recompute": "recompute", "offload": "offload"}
    for stage, (layer, blocks, width) in enumerate(
        zip(backbone.layers, backbone.blocks(), backbone.widths, strict=True)
    ):
        grid = stage_grid(embedded, stage)
        for number, block in enumerate(blocks):
            chosen = stage in recomputed and number % memory["every"] == 0
            parts = math.prod(grid) * images if chosen and memory["activations"] == "recompute_mlp" else 0
            attention = memory["attention"] if stage in sequential else "auto"
            shape: dict[str, Any] = {"images": images, "grid": grid, "low": low, "device": device}
            chains = _block(block, attention=attention, mlp_tokens=memory["mlp_tokens"] or parts, **shape)
            policy = policies.get(memory["activations"], "keep") if chosen else "keep"
            unit = Unit(f"stage {stage + 1}", images * math.prod(grid) * width * low, chains, policy)
            if policy == "recompute" and attention == "sequential":  # each chunk's checkpoint refers to these
                window, _ = fit_window(grid, block.window, block.shift)
                offsets = math.prod(2 * w - 1 for w in window)
                unit.pinned = 8 * math.prod(window) ** 2 + EXACT * block.attn.num_heads * offsets
            found.append(unit)
        if layer.downsample is not None:
            source = images * math.prod(grid) * width * low
            found[-1].joined = source if isinstance(model, UPerNet | CascadeRCNN) else 0.0
            tokens = images * math.prod(stage_grid(embedded, stage + 1))
            whole = 4 * tokens * width * low
            ops = [Op(whole), Op(whole / 2, True, weights=8 * width**2)]
            ops += _norm(tokens, 2 * width, low, device)
            found.append(Unit(f"stage {stage + 1}", source, [Chain(ops)]))
    # 3  head and loss, or what is before heads that are run
    tokens = images * math.prod(grid)
    source = tokens * backbone.widths[-1] * low
    if isinstance(model, CascadeRCNN) and model.decoder.attention is not None:
        chains = _block(model.decoder.attention, attention="auto", mlp_tokens=0, **shape)
        found.append(Unit("global attention", source, chains))
    if not isinstance(model, UPerNet | CascadeRCNN):
        head = _head(backbone, simmim, images, tokens, pixels, low, device)
        found.append(Unit("head and loss", source, [Chain(head)]))
    return found


def _head(
    backbone: SwinTransformerV2, simmim: SimMIM | None, images: int, tokens: int, pixels: int, low: int, device: str
) -> list[Op]:
    """The last norm, the classifier or the decoder, and the loss in float32."""
    ops = _norm(tokens, backbone.widths[-1], low, device)
    if simmim:
        out, decoder = pixels * EXACT, math.prod(simmim.decoder.get_parameter("0.weight").shape)
        ops += [Op(pixels * low, True, weights=decoder), Op(pixels * low)] + [Op(out)] * (low != EXACT)
        return [*ops, Op(out), Op(out, True), Op(out, extra=out / simmim.channels), Op(EXACT)]
    ops.append(Op(images * backbone.widths[-1] * low))
    if isinstance(backbone.head, nn.Linear):
        classes, weights = images * backbone.head.out_features, backbone.head.weight.numel()
        ops += [Op(classes * low, True, weights=weights)] + [Op(classes * EXACT)] * (low != EXACT)
        ops += [Op(classes * EXACT, keeps_output=True), Op(EXACT, scratch=classes * EXACT)]
    return ops


def _norm(tokens: int, channels: int, low: int, device: str) -> list[Op]:
    """models.swin_v2.LayerNorm: mean and deviation of each token; a CPU needs no float32 copy of a map of 16 bits."""
    exact, size, statistics = tokens * channels * EXACT, tokens * channels * low, 2 * tokens * EXACT
    if device == "cpu" or low == EXACT:
        return [Op(size, True, extra=statistics)]
    return [Op(exact), Op(exact, True, extra=statistics), Op(size)]


def _block(
    block: Block, *, images: int, grid: Sequence[int], low: int, device: str, attention: str, mlp_tokens: int
) -> list[Chain]:
    """A block; mlp_tokens: its MLP is run over so many tokens at a time, each part again in backward; 0: at once."""
    window, shift = fit_window(grid, block.window, block.shift)
    tokens, channels, heads = images * math.prod(grid), block.attn.qkv.in_features, block.attn.num_heads
    size, hidden = tokens * channels * low, block.mlp.fc1.out_features
    copies = 0 if device == "cpu" else 3 * tokens * channels * EXACT  # of the branch and two gradients
    post_norm = Op(size, True, extra=2 * tokens * EXACT, scratch=copies)
    # Position bias: coordinates, hidden layer and sigmoid are kept; backward needs the hidden layer's gradient twice.
    # With the CPU's operator the table is enough.
    offsets = math.prod(2 * w - 1 for w in window)
    table = offsets * heads * EXACT
    operator = device == "cpu" and "cpu" not in native.missing
    bias_kept = 0 if operator else offsets * EXACT * (len(window) + BIAS_HIDDEN + heads)
    bias_scratch = table if operator else offsets * EXACT * (2 * BIAS_HIDDEN + heads)
    if attention not in ("reference", "sequential") and _has_kernel(channels // heads, window):
        lse = tokens * heads * EXACT
        scratch = _kernel_scratch(device, images * math.prod(padded_grid(grid, window)), tokens, heads, window)
        ops = [Op(size, True, True, bias_kept + table + lse, scratch=max(scratch + table, bias_scratch))]
    else:
        padded = images * math.prod(padded_grid(grid, window)) * channels * low
        windows = images * math.prod(padded_grid(grid, window)) // math.prod(window)
        chunked = attention == "sequential"
        attend = _attend(padded, window, windows, heads, low, images if chunked else None)
        attend = attend._replace(extra=attend.extra + bias_kept + table, scratch=max(attend.scratch, bias_scratch))
        copies = 1 + any(shift)  # cut into windows, and rolled; and back
        ops = [*[Op(3 * padded)] * copies, attend, *[Op(padded)] * copies]
        if padded != size:
            ops = [Op(3 * padded), *ops, Op(size)]
    ops = [Op(3 * size, True, weights=3 * channels**2), *ops, Op(size, True, weights=channels**2)]
    if mlp_tokens:
        part = min(mlp_tokens, tokens) * hidden * low
        scratch = max(3 * part + 2 * channels * hidden * low, size)
        mlp = [Op(size, True, weights=2 * channels * hidden, scratch=scratch)]
    else:
        wide = tokens * hidden * low  # backward needs GELU's output and the gradient of its input too: both, before it
        both = 2 * wide - size  # has that of x; one after the other where a map is large
        scratch = wide if tokens // images * hidden >= LARGE else both
        mlp = [Op(size, True, extra=wide, weights=2 * channels * hidden, scratch=scratch)]
    chains = [Chain([*ops, post_norm], residual=True), Chain([*mlp, post_norm], residual=True)]
    return chains if isinstance(block.enorm, nn.Identity) else [*chains, Chain(_norm(tokens, channels, low, device))]


def _attend(size: float, window: Sequence[int], windows: int, heads: int, low: int, images: int | None) -> Op:
    """The reference on 3 · `size` bytes of windows, of all images: at once, or, given `images`, chunks that run again.

    Of every logit 16 bytes are live when the scale's gradient is made, of those 8 or 10 were kept: logits and softmax
    in float32, and the softmax in the type of v. Of q, k and v: copies in that type, q and k in float32.
    """
    square = math.prod(window) ** 2
    per_logit = 2 * EXACT + (low if low != EXACT else 0)
    copies = size / low * (2 * EXACT + 3 * low if low != EXACT else 3 * low)
    copies += 2 * windows * heads * math.prod(window) * (3 * EXACT + 1)  # their lengths
    table = EXACT * heads * square  # the bias of every pair of tokens, and later its gradient
    index = 8 * square
    logits = windows * heads * square
    if images is None:
        extra = per_logit * logits + copies + index
        scratch = (4 * EXACT - per_logit) * logits + table - 2 * size
        return Op(size, keeps_input=low == EXACT, extra=extra, scratch=scratch)
    one = images * square  # logits of a head in one window of each image
    some_heads = min(heads, max(1, SEQUENTIAL_BYTES // (EXACT * one)))
    chunk = min(logits, some_heads * one * max(1, SEQUENTIAL_BYTES // (EXACT * one * some_heads)))
    scratch = 4 * EXACT * chunk + EXACT * some_heads * square + (copies - 3 * size) * chunk / logits
    return Op(size, True, extra=index, scratch=max(scratch, 6 * size if chunk < logits else 0.0))


def _has_kernel(width: int, window: Sequence[int]) -> bool:
    """Whether the kernels take such windows and heads, where they are built."""
    return width in native.WIDTHS and max(window) <= native.MAX_WINDOW


def _kernel_scratch(device: str, padded: int, tokens: int, heads: int, window: Sequence[int]) -> float:
    """Bytes that the kernel's backward works in: gradients of the bias table, one per task, and on CUDA a row sum.

    As in kernels/bindings.cpp and kernels/cosine_window_attention_cuda.h.
    """
    offsets, windows = math.prod(2 * w - 1 for w in window), padded // math.prod(window)
    if device == "cpu":
        return EXACT * min(windows, max(CPU_TASKS // heads, CPU_CHUNKS)) * heads * offsets
    room = max(2**22, 2 * tokens * heads)
    slots = max(1, min(room // (heads * (offsets + 1)), (2048 + heads - 1) // heads, padded))
    return EXACT * (tokens * heads + slots * heads * (offsets + 1))
