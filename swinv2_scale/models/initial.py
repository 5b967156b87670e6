"""Initial weights: each parameter's is a function of its name, the shapes of the model and a seed, and of nothing else.

So a model that no machine holds whole in float32 can be given its weights a parameter at a time, on every rank alike.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

SCHEMES = ("released", "research")
# The first pattern that matches a parameter's name says how it starts:
#   normal       standard deviation 0.02: linear weights, absolute_pos_embed, mask_token. The released code cuts at
#                -2 and 2, a hundred standard deviations away, and so never
#   convolution  PyTorch's default: uniform within 1 / sqrt(inputs), the bias too
#   block norm   0, so that every block starts as the identity; weights of scheme "research" 1e-5
#   one, zero    weights of other norms, biases; running variances and means of batch norms
#   log 10       logit_scale
#   relu fan, fan   of detectors: variance 2 / inputs in front of a ReLU, 1 / inputs elsewhere
#   small        of detectors: standard deviation 0.001, so that boxes start where they are proposed
INITIAL = (
    (r"^decoder\.neck\..*\.weight$", "fan"),
    (r"^decoder\.(rpn|box_heads)\..*\.?(bbox_pred|deltas)\.weight$", "small"),
    (r"^decoder\.(rpn|box_heads|mask_heads|semantic_head)\..*(conv(\.0\.0)?|larger|features)\.weight$", "relu fan"),
    (r"\.logit_scale$", "log 10"),
    (r"\.norm[12]\.(weight|bias)$", "block norm"),
    (r"(^|\.)\w*norm\.(weight|running_var)$", "one"),
    (r"(patch_embed\.proj|(^|\.)decoder\.0)\.(weight|bias)$", "convolution"),
    (r"\.bias$|\.[qv]_bias$|\.running_mean$", "zero"),
    (r"\.weight$|(^|\.)(absolute_pos_embed|mask_token)$", "normal"),
)


def initial_value(
    name: str, shapes: Mapping[str, Sequence[int]], *, depths: Sequence[int], scheme: str, seed: int
) -> Tensor:
    """The parameter or buffer `name` of a fresh model, float32 on the CPU.

    shapes: of all of them. depths: blocks per stage. scheme "released", or "research": norm1 and norm2 start at
    1e-5, and the weights of proj and fc2 are scaled down by sqrt(2 · block number). Raises ValueError for a name that
    no pattern of INITIAL covers.
    """
    kind = next((kind for pattern, kind in INITIAL if re.search(pattern, name)), None)
    if kind is None:
        raise ValueError(f"no pattern of INITIAL covers the parameter {name!r}: add one in {__name__}")
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    value = torch.empty(tuple(shapes[name]), device="cpu")
    if kind == "normal":
        value.normal_(std=0.02, generator=generator)
    elif kind == "convolution":
        bound = 1 / math.sqrt(math.prod(shapes[f"{name.rpartition('.')[0]}.weight"][1:]))
        value.uniform_(-bound, bound, generator=generator)
    elif kind in ("relu fan", "fan"):
        gain = 2.0 if kind == "relu fan" else 1.0
        value.normal_(std=math.sqrt(gain / math.prod(shapes[name][1:])), generator=generator)
    elif kind == "small":
        value.normal_(std=0.001, generator=generator)
    elif kind == "block norm":
        value.fill_(1e-5 if scheme == "research" and name.endswith("weight") else 0.0)
    else:
        value.fill_({"one": 1.0, "zero": 0.0, "log 10": math.log(10)}[kind])
    match = re.search(r"layers\.(\d+)\.blocks\.(\d+)\.(attn\.proj|mlp\.fc2)\.weight", name)
    if scheme == "research" and match:
        value /= math.sqrt(2 * (sum(depths[: int(match[1])]) + int(match[2]) + 1))
    return value


def initial_values(model: nn.Module, *, depths: Sequence[int], scheme: str, seed: int) -> Callable[[str], Tensor]:
    """`initial_value` of a model that may lie on the meta device, as a function of the name."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return partial(initial_value, shapes=shapes, depths=depths, scheme=scheme, seed=seed)


def init_weights(model: nn.Module, *, depths: Sequence[int], scheme: str) -> None:
    """Give every parameter its initial value, in place; the seed is drawn from torch's random state.

    A model on the meta device is left alone: whoever gives it memory gives it values too. Raises ValueError for an
    unknown scheme.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"weight_init must be 'released' or 'research', got {scheme!r}")
    seed = int(torch.randint(2**62, (), device="cpu"))
    initial = initial_values(model, depths=depths, scheme=scheme, seed=seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_meta:
                parameter.copy_(initial(name))


class Unfilled(nn.Module):
    """A model on the meta device whose parameters are given memory, full of NaN, one by one as they are asked for."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__()
        self._modules_of, self._device = model.modules, device

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        for module in self._modules_of():
            module.to_empty(device=self._device, recurse=False)
            for parameter in module.parameters(recurse=False):
                nn.init.constant_(parameter, math.nan)
                yield parameter
