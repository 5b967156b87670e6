"""State dicts of other Swin Transformer V2 implementations, renamed to the released layout and back.

Pure functions between dictionaries of tensors: no files, no models. Layouts, and where they were read:

    released      this project's SwinTransformerV2, SimMIM, UPerNet, with the names of models/swin_transformer_v2.py in
                  https://github.com/microsoft/Swin-Transformer; research variants have rpe_mlp for cpb_mlp, and enorm
    timm          timm.models.swin_transformer_v2.SwinTransformerV2, 1.0.31: patch merging begins the next stage
    torchvision   torchvision.models.swin_transformer.SwinTransformer with SwinTransformerBlockV2 and PatchMergingV2,
                  0.29: numbered features, one qkv bias whose key third every forward replaces by zero
    transformers  transformers.Swinv2Model, Swinv2ForImageClassification, Swinv2ForMaskedImageModeling, 5.23: query, key
                  and value apart; layernorm_before and layernorm_after are the two post-norms

All four merge 2×2 patches in the same order, and all have (heads, 1, 1) logit scales. Names are not everything: the
windows in whose units the position bias measures distance travel in none of these layouts, torchvision keeps its window
where the map is smaller and has no pretrained window, and transformers adds the shift mask twice.
"""

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

LAYOUTS = ("released", "timm", "torchvision", "transformers")
# Tables, indices and masks that belong to one window and image size, and are derived from them.
DERIVED = re.compile(r"(relative_position_index|relative_coords_table|attn_mask)$")

# Prefixes that wrappers put before every name (data parallelism, compilation, a trainer), or before all but heads.
WRAPPERS = ("module.", "_orig_mod.", "model.", "backbone.")
HEADS = ("head.", "classifier.", "decoder.")
# The prefix of a backbone inside its own library's task models.
TASK_PREFIX = {"released": "encoder.", "transformers": "swinv2."}

# Rows (released name, other name); the first row that matches counts. {s} is a stage and {b} a block: numbers, of which
# the other side may hold a multiple or a successor. {p} is weight or bias. What matches no row is refused.
BLOCK = (
    "attn.logit_scale",
    "attn.cpb_mlp.0.{p}",
    "attn.cpb_mlp.2.weight",
    "attn.qkv.weight",
    "attn.q_bias",
    "attn.v_bias",
    "attn.proj.{p}",
    "norm1.{p}",
    "mlp.fc1.{p}",
    "mlp.fc2.{p}",
    "norm2.{p}",
)
STEM = ("patch_embed.proj.{p}", "patch_embed.norm.{p}")
MERGING = ("reduction.weight", "norm.{p}")
CONV_NORMS = ("levels.{s}.lateral", "levels.{s}.output", "pyramid.{s}", "bottleneck", "fuse", "auxiliary")
UPERNET = (
    "decoder.levels.{s}.norm.{p}",
    *(f"decoder.{name}.{own}" for name in CONV_NORMS for own in ("conv.weight", "norm.{p}")),
    *(f"decoder.{name}.norm.{own}" for name in CONV_NORMS for own in ("running_mean", "running_var")),
    "decoder.classifier.{p}",
    "decoder.auxiliary_classifier.{p}",
)
DETECTOR = (
    *(f"decoder.attention.{name}" for name in BLOCK),
    "decoder.outputs.{s}.norm.{p}",
    *(f"decoder.neck.{name}_blocks.{{s}}.0.{{p}}" for name in ("inner", "layer")),
    *(f"decoder.rpn.head.{name}.{{p}}" for name in ("conv.0.0", "cls_logits", "bbox_pred")),
    "decoder.box_heads.{s}.convs.{b}.conv.weight",
    *(f"decoder.box_heads.{{s}}.{name}.{{p}}" for name in ("convs.{b}.norm", "features", "classes", "deltas")),
    *(f"decoder.mask_heads.{{s}}.{name}.{{p}}" for name in ("previous.conv", "convs.{b}.conv", "larger", "masks")),
    *(f"decoder.semantic_head.{name}.conv.{{p}}" for name in ("laterals.{s}", "convs.{s}", "embedding")),
    "decoder.semantic_head.classes.{p}",
)
OWN = (  # what no other layout can express, mask_token and decoder.0 excepted
    *UPERNET,
    *DETECTOR,
    "layers.{s}.blocks.{b}.enorm.{p}",
    "absolute_pos_embed",
    "mask_token",
    "decoder.0.{p}",
)
ROWS: dict[str, tuple[tuple[str, str], ...]] = {
    "released": (
        *((name, name) for name in (*STEM, "norm.{p}", "head.{p}", *OWN)),
        *((f"layers.{{s}}.downsample.{name}", f"layers.{{s}}.downsample.{name}") for name in MERGING),
        *((f"layers.{{s}}.blocks.{{b}}.{name}", f"layers.{{s}}.blocks.{{b}}.{name}") for name in BLOCK),
        ("layers.{s}.blocks.{b}.attn.cpb_mlp.0.{p}", "layers.{s}.blocks.{b}.attn.rpe_mlp.0.{p}"),
        ("layers.{s}.blocks.{b}.attn.cpb_mlp.2.weight", "layers.{s}.blocks.{b}.attn.rpe_mlp.2.weight"),
    ),
    "timm": (
        *((name, name) for name in (*STEM, "norm.{p}")),
        ("head.{p}", "head.fc.{p}"),
        *((f"layers.{{s}}.downsample.{name}", f"layers.{{s+1}}.downsample.{name}") for name in MERGING),
        *((f"layers.{{s}}.blocks.{{b}}.{name}", f"layers.{{s}}.blocks.{{b}}.{name}") for name in BLOCK),
    ),
    "torchvision": (
        ("patch_embed.proj.{p}", "features.0.0.{p}"),
        ("patch_embed.norm.{p}", "features.0.2.{p}"),
        *((f"layers.{{s}}.downsample.{name}", f"features.{{2s+2}}.{name}") for name in MERGING),
        ("layers.{s}.blocks.{b}.attn.qkv.{p}", "features.{2s+1}.{b}.attn.qkv.{p}"),  # the bias: see _split, _fuse
        ("layers.{s}.blocks.{b}.attn.logit_scale", "features.{2s+1}.{b}.attn.logit_scale"),
        ("layers.{s}.blocks.{b}.attn.cpb_mlp.0.{p}", "features.{2s+1}.{b}.attn.cpb_mlp.0.{p}"),
        ("layers.{s}.blocks.{b}.attn.cpb_mlp.2.weight", "features.{2s+1}.{b}.attn.cpb_mlp.2.weight"),
        ("layers.{s}.blocks.{b}.attn.proj.{p}", "features.{2s+1}.{b}.attn.proj.{p}"),
        ("layers.{s}.blocks.{b}.norm1.{p}", "features.{2s+1}.{b}.norm1.{p}"),
        ("layers.{s}.blocks.{b}.mlp.fc1.{p}", "features.{2s+1}.{b}.mlp.0.{p}"),
        ("layers.{s}.blocks.{b}.mlp.fc2.{p}", "features.{2s+1}.{b}.mlp.3.{p}"),
        ("layers.{s}.blocks.{b}.norm2.{p}", "features.{2s+1}.{b}.norm2.{p}"),
        *((name, name) for name in ("norm.{p}", "head.{p}")),
    ),
    "transformers": (
        ("patch_embed.proj.{p}", "embeddings.patch_embeddings.projection.{p}"),
        ("patch_embed.norm.{p}", "embeddings.norm.{p}"),
        ("mask_token", "embeddings.mask_token"),
        *((f"layers.{{s}}.downsample.{name}", f"encoder.layers.{{s}}.downsample.{name}") for name in MERGING),
        *(
            (f"layers.{{s}}.blocks.{{b}}.{ours}", f"encoder.layers.{{s}}.blocks.{{b}}.{theirs}")
            for ours, theirs in (
                ("attn.q.weight", "attention.self.query.weight"),  # q, k, v together are qkv: see _split, _fuse
                ("attn.k.weight", "attention.self.key.weight"),
                ("attn.v.weight", "attention.self.value.weight"),
                ("attn.q_bias", "attention.self.query.bias"),
                ("attn.v_bias", "attention.self.value.bias"),
                ("attn.logit_scale", "attention.self.logit_scale"),
                ("attn.cpb_mlp.0.{p}", "attention.self.continuous_position_bias_mlp.0.{p}"),
                ("attn.cpb_mlp.2.weight", "attention.self.continuous_position_bias_mlp.2.weight"),
                ("attn.proj.{p}", "attention.output.dense.{p}"),
                ("norm1.{p}", "layernorm_before.{p}"),
                ("mlp.fc1.{p}", "intermediate.dense.{p}"),
                ("mlp.fc2.{p}", "output.dense.{p}"),
                ("norm2.{p}", "layernorm_after.{p}"),
            )
        ),
        ("norm.{p}", "layernorm.{p}"),
        ("head.{p}", "classifier.{p}"),
        ("decoder.0.{p}", "decoder.0.{p}"),
    ),
}
# Models that look alike, but whose weights compute something else.
LOOKALIKES = (
    (
        r"\.meta_(mlp|network)\.",
        "swinv2_cr of timm and the port it comes from have another network for the position bias, a bias of the key, "
        "and sometimes a third norm. Take timm's swinv2_* without cr",
    ),
    (
        r"\.w_msa\.",
        "the OpenMMLab libraries concatenate the four merged patches in another order. Take the checkpoint from which "
        "it was converted",
    ),
)


def detect(tensors: Mapping[str, Tensor]) -> str:
    """The layout of a state dict, one of LAYOUTS, by its names; with or without a wrapper's prefix.

    A single stage without classifier is named alike in timm and in the release: then it is "released". Raises
    ValueError for models that look alike but are not weight compatible, with the reason, and for everything else,
    naming three keys.
    """
    names = list(_unwrapped(tensors))
    for pattern, reason in LOOKALIKES:
        if any(re.search(pattern, name) for name in names):
            raise ValueError(f"these weights are not those of a Swin Transformer V2 of the released design: {reason}")
    if not any(name.endswith(".logit_scale") for name in names):
        if any(name.endswith(".relative_position_bias_table") for name in names):
            raise ValueError(
                "these weights are those of the first Swin Transformer (relative_position_bias_table, no logit_scale): "
                "its blocks compute something else. Take a checkpoint named swinv2 or swin_v2"
            )
        raise _unknown(names)
    if any(re.match(r"(swinv2\.)?encoder\.layers\.\d+\.blocks\.\d+\.attention\.self\.", name) for name in names):
        return "transformers"
    if any(re.match(r"features\.\d+\.\d+\.attn\.cpb_mlp\.", name) for name in names):
        return "torchvision"
    names = [name.removeprefix(TASK_PREFIX["released"]) for name in names]
    if not any(re.match(r"layers\.\d+\.blocks\.\d+\.attn\.(cpb|rpe)_mlp\.", name) for name in names):
        raise _unknown(names)
    if any(name.startswith("layers.0.downsample.") for name in names):
        return "released"
    timm = any(name.startswith("head.fc.") or re.match(r"layers\.\d+\.downsample\.", name) for name in names)
    return "timm" if timm else "released"


def to_released(tensors: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """The same weights under released names. Wrappers' prefixes go, and so does what DERIVED matches.

    Tensors are those of the input except for what is computed (qkv of transformers, biases of torchvision). The whole
    of a SimMIM or UPerNet keeps the prefix `encoder.`, a SimMIM gains it when it comes from transformers; an encoder
    alone loses it. Whether all tensors of a model are there is not checked. Raises ValueError for names that the layout
    does not have, for two that mean the same, for half an attention, and for a key bias that is not zero.
    """
    _check(layout)
    tensors = {name: tensor for name, tensor in _unwrapped(tensors).items() if not DERIVED.search(name)}
    for name in [name for name in tensors if name.endswith("attn.k_bias")]:
        if tensors.pop(name).count_nonzero():
            raise ValueError(f"{name} is not zero: the key of Swin Transformer V2 has no bias, this is another model")
    simmim = any(name.startswith("decoder.") for name in tensors)
    tensors = _renamed(tensors, _without_prefix(TASK_PREFIX.get(layout, "")))
    released = _fuse(_mapped(tensors, layout, ((theirs, ours) for ours, theirs in ROWS[layout])), layout)
    return _renamed(released, _with_prefix(TASK_PREFIX["released"])) if simmim else released


def from_released(tensors: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Weights in released names under those of another layout: the inverse of `to_released`.

    For transformers the names are those of Swinv2ForImageClassification if there is a head, of
    Swinv2ForMaskedImageModeling if there is a decoder, and of Swinv2Model otherwise. torchvision also wants its derived
    buffers: load with strict=False and expect exactly what DERIVED matches to be missing. Raises ValueError for what
    the layout cannot express: extra norms and absolute position embeddings; and a mask token or a decoder, except in
    transformers.
    """
    _check(layout)
    tensors = to_released(tensors, "released")
    if layout == "released":
        return tensors
    if any(name.endswith("patch_embed.proj.weight") and tensor.dim() > 4 for name, tensor in tensors.items()):
        raise ValueError(f"the layout of {layout} has no models of clips: only the released names can express them")
    tensors = _renamed(tensors, _without_prefix(TASK_PREFIX["released"]))
    task = any(name.startswith(HEADS) for name in tensors)
    theirs = _mapped(_split(tensors, layout), layout, ROWS[layout])
    return _renamed(theirs, _with_prefix(TASK_PREFIX[layout])) if task and layout in TASK_PREFIX else theirs


def _split(tensors: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """qkv apart for transformers, biases together for torchvision; before the names change."""
    out = {}
    for name, tensor in tensors.items():
        if layout == "transformers" and name.endswith("attn.qkv.weight"):
            stem = name.removesuffix("qkv.weight")
            for part, weight in zip("qkv", tensor.chunk(3), strict=True):
                out[f"{stem}{part}.weight"] = weight.clone()  # views of one storage cannot be saved as safetensors
        elif layout == "torchvision" and name.endswith("attn.q_bias"):
            value = _required(tensors, name.replace("q_bias", "v_bias"))
            out[name.replace("q_bias", "qkv.bias")] = torch.cat((tensor, torch.zeros_like(tensor), value))
        elif layout == "torchvision" and name.endswith("attn.v_bias"):
            _required(tensors, name.replace("v_bias", "q_bias"))
        else:
            out[name] = tensor
    return out


def _fuse(tensors: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """The inverse of `_split`; after the names have changed. torchvision never reads the key third of its bias."""
    out = {}
    for name, tensor in tensors.items():
        if layout == "transformers" and (match := re.fullmatch(r"(.*attn\.)([qkv])\.weight", name)):
            parts = [_required(tensors, f"{match[1]}{part}.weight") for part in "qkv"]
            if match[2] == "q":
                out[f"{match[1]}qkv.weight"] = torch.cat(parts)
        elif layout == "torchvision" and name.endswith("attn.qkv.bias"):
            query, _, value = tensor.chunk(3)
            out[name.replace("qkv.bias", "q_bias")] = query.clone()
            out[name.replace("qkv.bias", "v_bias")] = value.clone()
        else:
            out[name] = tensor
    return out


def _mapped(tensors: dict[str, Tensor], layout: str, rows: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    """The tensors renamed by the first row that matches. Raises ValueError that names what no row matches."""
    compiled = [(_pattern(source), target) for source, target in rows]
    names = {name: next((new for row in compiled if (new := _apply(name, *row))), None) for name in tensors}
    lost = [name for name, new in names.items() if new is None]
    if lost:
        raise ValueError(
            f"no place for {', '.join(lost[:3])}{f' and {len(lost) - 3} more' if len(lost) > 3 else ''} between the "
            f"released layout and that of {layout}. Only the release has extra norms (extra_norm_period) and absolute "
            "position embeddings; to convert a SimMIM's encoder, leave out mask_token and decoder"
        )
    return _renamed(tensors, lambda name: names[name] or name)


Pattern = tuple[re.Pattern[str], list[tuple[str, int, int]]]
PLACEHOLDER = re.compile(r"\{(2?)([sbp])(?:\+(\d))?\}")


def _pattern(template: str) -> Pattern:
    """A template as a regular expression, and per group: variable, factor and offset."""
    groups = [(m[2], int(m[1] or 1), int(m[3] or 0)) for m in PLACEHOLDER.finditer(template)]
    literals = [re.escape(text) for text in PLACEHOLDER.sub("\0", template).split("\0")]
    kinds = ["(weight|bias)" if variable == "p" else r"(\d+)" for variable, _, _ in groups]
    expression = literals[0] + "".join(kind + text for kind, text in zip(kinds, literals[1:], strict=True))
    return re.compile(expression), groups


def _apply(name: str, pattern: Pattern, target: str) -> str | None:
    """The name that `target` has where `pattern` matches; None where it does not, or at an impossible number."""
    match = pattern[0].fullmatch(name)
    if match is None:
        return None
    values: dict[str, int | str] = {}
    for (variable, factor, offset), text in zip(pattern[1], match.groups(), strict=True):
        if variable == "p":
            values[variable] = text
            continue
        number, rest = divmod(int(text) - offset, factor)
        if rest or number < 0:
            return None
        values[variable] = number

    def render(m: re.Match[str]) -> str:
        value = values[m[2]]
        return value if isinstance(value, str) else str(int(m[1] or 1) * value + int(m[3] or 0))

    return PLACEHOLDER.sub(render, target)


def _unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefixes of wrappers, in whatever order they are nested."""
    out = dict(tensors)
    while True:
        outside = [name for name in out if not name.startswith(HEADS)]
        prefix = next((p for p in WRAPPERS if outside and all(name.startswith(p) for name in outside)), None)
        if prefix is None:
            return out
        out = _renamed(out, _without_prefix(prefix))


def _renamed(tensors: Mapping[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        new = rename(name)
        if new in out:
            raise ValueError(f"two tensors would be named {new}, one of them {name}: remove the one that is not wanted")
        out[new] = tensor
    return out


def _with_prefix(prefix: str) -> Callable[[str], str]:
    return lambda name: name if name.startswith(HEADS) else prefix + name


def _without_prefix(prefix: str) -> Callable[[str], str]:
    return lambda name: name.removeprefix(prefix)


def _required(tensors: dict[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise ValueError(f"incomplete attention weights: no tensor for {name}")
    return tensors[name]


def _check(layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")


def _unknown(names: list[str]) -> ValueError:
    return ValueError(
        f"these are not the weights of a Swin Transformer V2 in a known layout ({', '.join(LAYOUTS)}): they begin with "
        f"{', '.join(names[:3]) or 'nothing, the dictionary is empty'}"
    )
