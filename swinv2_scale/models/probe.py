"""Signals inside a backbone while it trains, the stability plot of the paper: looked at now and then, from outside."""

from typing import Any

import torch
from torch import Tensor

from swinv2_scale.models.swin_v2 import SwinTransformerV2, WindowAttention


class BlockProbe:
    """While `watching`, notes of each block the amplitude of its output and its logit scales, of the last forward pass.

    amplitude         root mean square over a micro-batch
    logit_scale_mean  of a block's heads, and
    logit_scale_max   the largest: the scales themselves, at most 100
    """

    def __init__(self, backbone: SwinTransformerV2) -> None:
        self.watching = False
        self._noted: dict[int, Tensor] = {}
        self._scales: dict[int, Tensor] = {}
        for number, block in enumerate(block for blocks in backbone.blocks() for block in blocks):
            block.register_forward_hook(lambda _, __, out, number=number: self._note(number, out))
            # Of the attention, since under ZeRO 3 its parameters are there while it runs and not afterwards.
            block.attn.register_forward_hook(lambda attn, _, __, number=number: self._note_scale(number, attn))

    def take(self) -> dict[str, list[float]]:
        """What was noted, a list of each kind with a number for each block; empty if nothing was."""
        if not self._noted:
            return {}
        blocks = sorted(self._noted)
        kinds: dict[str, Any] = {"amplitude": [self._noted[block] for block in blocks]}
        kinds["logit_scale_mean"] = [self._scales[block].mean() for block in blocks]
        kinds["logit_scale_max"] = [self._scales[block].max() for block in blocks]
        self._noted, self._scales = {}, {}
        return {kind: torch.stack(values).tolist() for kind, values in kinds.items()}

    @torch.no_grad()
    def _note(self, number: int, out: Tensor) -> None:
        if self.watching:
            self._noted[number] = out.detach().float().square().mean().sqrt()

    @torch.no_grad()
    def _note_scale(self, number: int, attn: WindowAttention) -> None:
        if self.watching:
            self._scales[number] = attn.logit_scale.detach().float().flatten().exp().clamp(max=100.0)
