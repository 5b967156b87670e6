"""Memory policies, applied to a built model from outside. Each changes what is kept for backward and nothing else."""

import functools

from fairscale.nn.checkpoint import checkpoint_wrapper
from torch import nn
from torch.utils.checkpoint import checkpoint

from swinv2_scale.models.swin_v2 import Block, WindowAttention
from swinv2_scale.ops.cosine_window_attention import IMPLEMENTATIONS


def apply(model: nn.Module, *, activations: str, attention: str) -> None:
    """Apply a policy of conf/memory in place; names in the state dict do not change.

    activations  "keep"; "recompute": each block keeps its input and is run again in backward (PyTorch's non-reentrant
                 checkpointing, random state included); "offload": the same, the input in host memory (fairscale)
    attention    the operator's implementation: "auto", "reference", or "sequential" (see ops/cosine_window_attention)
    Raises ValueError for other names.
    """
    if activations not in ("keep", "recompute", "offload"):
        raise ValueError(f"memory.activations must be keep, recompute or offload, got {activations!r}")
    if attention not in IMPLEMENTATIONS:
        raise ValueError(f"memory.attention must be one of {', '.join(IMPLEMENTATIONS)}, got {attention!r}")
    for module in model.modules():
        if isinstance(module, WindowAttention):
            module.implementation = attention
    for block in [module for module in model.modules() if isinstance(module, Block)]:
        if activations == "recompute":
            # An attribute of the instance, which shadows the class's forward: no wrapper module, so no renamed weights.
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
        elif activations == "offload":
            checkpoint_wrapper(block, offload_to_cpu=True)
