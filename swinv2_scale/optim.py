"""Parameter groups and learning rates. Both are plain functions: there is no scheduler state to save or to lose."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from swinv2_scale.ops import adamw

# The first pattern that matches a parameter's name says whether weight decay applies; 1-D parameters never decay.
# The released SimMIM trainer looks these names up with a prefix that is not there and so decays the first three.
WEIGHT_DECAY = (
    (r"(^|\.)absolute_pos_embed$", False),
    (r"\.cpb_mlp\.", False),
    (r"\.logit_scale$", False),
    (r"(^|\.)mask_token$", True),
    (r"\.bias$|_bias$", False),
    (r"\.weight$", True),
)


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies to a parameter. Raises ValueError for a name that no pattern covers."""
    for pattern, answer in WEIGHT_DECAY:
        if re.search(pattern, name):
            return answer and parameter.dim() > 1
    raise ValueError(f"no pattern of WEIGHT_DECAY covers the parameter {name!r}: add one in swinv2_scale/optim.py")


def layer_id(name: str, depths: Sequence[int]) -> int:
    """Layer number for layer decay: 0 for the patch embedding, block k -> k + 1, all that follows -> the last.

    Patch merging has the number of its stage's last block. `absolute_pos_embed` counts with the head: so it is in the
    released code, and `golden/param_groups_layer_decay.json` holds us to it.
    """
    name = name.removeprefix("encoder.")
    if name.startswith("patch_embed.") or name == "mask_token":
        return 0
    if match := re.match(r"layers\.(\d+)\.(?:blocks\.(\d+)|downsample)\.", name):
        stage, block = int(match[1]), match[2]
        return sum(depths[:stage]) + (int(block) + 1 if block is not None else depths[stage])
    return sum(depths) + 1


def parameter_groups(
    model: nn.Module,
    depths: Sequence[int],
    *,
    weight_decay: float,
    layer_decay: float | None,
    encoder_scale: float = 1.0,
) -> list[dict[str, Any]]:
    """Optimiser groups that cover every trainable parameter once.

    depths: blocks per stage. layer_decay: the learning rate of layer i is scaled by layer_decay ** (last - i); None or
    1 for one rate. encoder_scale: the rates of a model's `encoder` are scaled by this too. Each group has params,
    names, weight_decay and lr_scale, by which `learning_rate` is multiplied.
    """
    last = sum(depths) + 1
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = decays(name, parameter)
        scale = (layer_decay or 1.0) ** (last - layer_id(name, depths))
        scale *= encoder_scale if name.startswith("encoder.") else 1.0
        group = groups.setdefault(
            (decay, scale),
            {"params": [], "names": [], "weight_decay": weight_decay if decay else 0.0, "lr_scale": scale},
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


class LossScale:
    """What the loss is multiplied by before backward in fp16, and the gradients divided by: 1 in other precisions.

    Halved, down to 1, by a step whose gradients are not finite; doubled, up to 2^24, after 2000 steps that were.
    `state` is what a checkpoint must hold.
    """

    def __init__(self, value: float, *, grows: bool) -> None:
        self.value, self.grows, self._steady = value, grows, 0

    def after(self, applied: bool) -> bool:
        """Take notice of a step; whether it lowered the scale."""
        lower = not applied and self.value > 1.0
        self._steady = self._steady + 1 if applied else 0
        if lower:
            self.value /= 2
        elif self.grows and self._steady == 2000:
            self.value, self._steady = min(self.value * 2, 2.0**24), 0
        return lower

    @property
    def state(self) -> dict[str, float]:
        return {"value": self.value, "steady": self._steady} if self.grows else {}

    @state.setter
    def state(self, state: dict[str, float]) -> None:
        if self.grows and state:
            self.value, self._steady = state["value"], int(state["steady"])


class FlatAdamW(torch.optim.AdamW):
    """PyTorch's AdamW, which steps flat weights on the CPU in one native pass where ZeRO hands it those (zero.py)."""

    def update(self, group: dict[str, Any], trained: Tensor, gradient: Tensor, scale: float) -> None:
        """A step of a group's flat master weights, whose values go to `trained`; the gradient counts `scale` times."""
        (weights,) = group["params"]
        state = self.state[weights]
        state["step"] += 1
        adamw.step(
            weights.detach(),
            state["exp_avg"],
            state["exp_avg_sq"],
            trained,
            gradient,
            scale=scale,
            steps=float(state["step"]),
            **{name: group[name] for name in ("lr", "betas", "eps", "weight_decay")},
        )


class Lamb(torch.optim.Optimizer):
    """LAMB (arXiv 1904.00962, algorithm 2, with the identity for phi): AdamW whose step has each weight's own length.

    Parameters without weight decay (norms, biases, scales) take plain Adam steps, as in the authors' code. `found_inf`,
    a tensor that is not 0 where gradients are not finite, makes a step that changes nothing.
    """

    found_inf: Tensor | None = None

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        if self.found_inf is not None and bool(self.found_inf):
            return
        for group in self.param_groups:
            slow, slower = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros(())
                    state.update(exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
                state["step"] += 1
                mean, square = state["exp_avg"], state["exp_avg_sq"]
                mean.lerp_(parameter.grad, 1 - slow)
                square.mul_(slower).addcmul_(parameter.grad, parameter.grad, value=1 - slower)
                steps = float(state["step"])
                update = (mean / (1 - slow**steps)) / ((square / (1 - slower**steps)).sqrt() + group["eps"])
                ratio: Tensor | float = 1.0
                if group["weight_decay"]:
                    update.add_(parameter, alpha=group["weight_decay"])
                    lengths = parameter.norm(), update.norm()
                    ratio = torch.where((lengths[0] > 0) & (lengths[1] > 0), lengths[0] / lengths[1], 1.0)
                parameter.sub_(group["lr"] * ratio * update)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate as a function of the step: linear warm-up, then cosine, linear or multi-step decay.

    lr, minimum_lr, warmup_lr   peak, end and start value
    steps, warmup_steps         length of the run and of its warm-up
    warmup_prefix               decay starts after the warm-up and takes the remaining steps (as released), or runs
                                from step 0 over all steps with the warm-up laid over its beginning
    milestones, factor          multistep: at each milestone (a step) the rate is multiplied by factor
    """

    kind: str
    lr: float
    minimum_lr: float
    warmup_lr: float
    steps: int
    warmup_steps: int
    warmup_prefix: bool
    milestones: tuple[int, ...] = ()
    factor: float = 0.1

    def __post_init__(self) -> None:
        if self.kind not in ("cosine", "linear", "multistep"):
            raise ValueError(f"optim.schedule must be cosine, linear or multistep, got {self.kind!r}")
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(
                f"the warm-up of {self.warmup_steps} steps is longer than the run of {self.steps} steps: set "
                "optim.warmup_epochs or optim.warmup_steps, or train longer"
            )

    def __call__(self, step: int) -> float:
        """Learning rate of step 0, 1, …"""
        if step < self.warmup_steps:
            return self.warmup_lr + step * (self.lr - self.warmup_lr) / self.warmup_steps
        if self.kind == "multistep":
            return self.lr * self.factor ** sum(step >= milestone for milestone in self.milestones)
        begin = self.warmup_steps if self.warmup_prefix else 0
        progress = min(1.0, (step - begin) / max(1, self.steps - begin))
        share = (1 + math.cos(math.pi * progress)) / 2 if self.kind == "cosine" else 1 - progress
        return self.minimum_lr + (self.lr - self.minimum_lr) * share
