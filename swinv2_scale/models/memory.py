"""Memory policies, applied to a built model from outside. Each changes what is kept for backward and nothing else."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from fairscale.nn.checkpoint import checkpoint_wrapper
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from swinv2_scale.models.swin_v2 import Block, Mlp, SwinTransformerV2, WindowAttention
from swinv2_scale.ops.cosine_window_attention import IMPLEMENTATIONS

ACTIVATIONS = ("keep", "recompute", "recompute_mlp", "offload")


def apply(
    model: nn.Module,
    *,
    activations: str,
    stages: Sequence[int] | None,
    every: int,
    attention: str,
    attention_stages: Sequence[int] | None,
    mlp_tokens: int,
) -> None:
    """Apply a policy of conf/memory in place of the one before; names in the state dict do not change.

    activations       "keep"; "recompute": a block keeps its input and is run again in backward (PyTorch's non-reentrant
                      checkpointing, random state included); "offload": the same, the input in host memory (fairscale);
                      "recompute_mlp": only the MLP of a block is run again
    stages, every     which blocks: those of these stages (None: all), of each stage every n-th beginning with the first
    attention         the operator's implementation in attention_stages (None: all; "auto" in the others): "auto",
                      "reference", "sequential" or "kernel" (see ops/cosine_window_attention)
    mlp_tokens        the MLP is run over so many tokens at a time, each part again in backward; 0: all at once
    Raises ValueError for other names and for stages that the model does not have; with "offload", the forward pass
    raises it under autocast.
    """
    if activations not in ACTIVATIONS:
        raise ValueError(f"memory.activations must be one of {', '.join(ACTIVATIONS)}, got {activations!r}")
    if attention not in IMPLEMENTATIONS:
        raise ValueError(f"memory.attention must be one of {', '.join(IMPLEMENTATIONS)}, got {attention!r}")
    if every < 1 or mlp_tokens < 0:
        raise ValueError(f"memory.every={every} must be 1 or more, memory.mlp_tokens={mlp_tokens} 0 or more")
    remove(model)
    for backbone in [module for module in model.modules() if isinstance(module, SwinTransformerV2)]:
        blocks = backbone.blocks()
        attention_in = _chosen("attention_stages", attention_stages, len(blocks))
        recomputed = [block for stage in _chosen("stages", stages, len(blocks)) for block in blocks[stage][::every]]
        for stage, own in enumerate(blocks):
            for block in own:
                block.attn.implementation = attention if stage in attention_in else "auto"
                if mlp_tokens:
                    _replace_forward(block.mlp, partial(_in_parts, block.mlp, mlp_tokens))
        for block in recomputed:
            if activations == "recompute":
                _replace_forward(block, partial(checkpoint, block.forward, use_reentrant=False))
            elif activations == "recompute_mlp":
                _replace_forward(block.mlp, partial(checkpoint, block.mlp.forward, use_reentrant=False))
            elif activations == "offload":
                checkpoint_wrapper(block, offload_to_cpu=True)
                _replace_forward(block, partial(_without_autocast, block.forward))


def remove(model: nn.Module) -> None:
    """Take away the policy that was applied, so that every block keeps its activations and chooses its attention."""
    for module in model.modules():
        if isinstance(module, (Block, Mlp)):
            module.__dict__.pop("forward", None)
        elif isinstance(module, WindowAttention):
            module.implementation = "auto"


def _chosen(name: str, stages: Sequence[int] | None, number: int) -> list[int]:
    if stages is not None and not set(stages) <= set(range(number)):
        raise ValueError(f"memory.{name}={list(stages)}: the model has stages 0 to {number - 1}")
    return list(range(number)) if stages is None else list(stages)


def _without_autocast(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """fairscale's wrapper runs a block again in float16 or without autocast, whatever its type was."""
    if torch.is_grad_enabled() and torch.is_autocast_enabled(x.device.type):
        raise ValueError(
            "memory.activations='offload' does not work under autocast: use 'recompute', or cast the weights"
        )
    return forward(x)


def _replace_forward(module: nn.Module, forward: partial) -> None:
    """An attribute of the instance, which shadows the class's forward: no wrapper module, so no renamed weights."""
    module.forward = forward


def _in_parts(mlp: Mlp, tokens: int, x: Tensor) -> Tensor:
    """(B, Y, X, C) -> (B, Y, X, C), a number of tokens at a time."""
    parts = x.flatten(0, -2).split(tokens)
    outputs = [checkpoint(Mlp.forward, mlp, part, use_reentrant=False) for part in parts]
    return torch.cat(outputs).view_as(x)
