"""The training engine: DeepSpeed, configured in one pure function. With zero.py the only module that imports deepspeed.

Precision. In bf16 and fp16 the large weights have 16 bits and everything that must stay exact (parallel.FLOAT32) is
float32; ZeRO keeps float32 master weights and accumulates float32 gradients for both. The cast is ours, so DeepSpeed is
told of float32: its own bf16 mode would cast logit_scale and the position bias too, which turns a scale of 100 into
98.4 or 101.6. The loss scale of fp16 is ours for the same reason.
"""

import ctypes
import importlib
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from swinv2_scale import distributed
from swinv2_scale.mapped import MappedFile
from swinv2_scale.models.initial import Unfilled
from swinv2_scale.ops import native
from swinv2_scale.optim import FlatAdamW, Lamb, LossScale
from swinv2_scale.parallel import PRECISIONS, WAITING_GROUP, cast

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed probes for accelerators, with warnings

import deepspeed
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from swinv2_scale.zero import flat_gradients, on_disk

# DeepSpeed calls collectives that torch has since renamed, and torch says so from every rank.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")


NAMES = ("adamw", "sgd", "lamb")
IMPLEMENTATIONS = ("auto", "torch", "apex", "deepspeed")


def optimizer(
    name: str, *, implementation: str, zero_stage: int, offload: str | None, betas: tuple[float, float], eps: float
) -> Callable[..., torch.optim.Optimizer]:
    """What makes the optimiser `name` of parameter groups: adamw, sgd (betas[0] is its momentum), or lamb.

    Its learning rates are those that the engine sets. implementation, of AdamW: "torch" (fused), "apex" (NVIDIA's
    FusedAdam), "deepspeed" (CPUAdam, compiled at first use, for states in host memory), or "auto": DeepSpeed's for
    states that are offloaded from a GPU or to nvme, NVIDIA's on a GPU where it is installed, this project's for states
    on the CPU under ZeRO 1 (optim.FlatAdamW, where native kernels are built), else torch's. Raises ValueError for what
    is unknown or not here; and for LAMB with ZeRO, which hands an optimiser slices of many parameters at once, while
    LAMB scales the step of each parameter by its norm.
    """
    for key, value, known in (("name", name, NAMES), ("implementation", implementation, IMPLEMENTATIONS)):
        if value not in known:
            raise ValueError(f"optim.{key}={value} is not one of {', '.join(known)}")
    if implementation in ("apex", "deepspeed") and (name != "adamw" or zero_stage == 0):
        raise ValueError(
            f"optim.implementation={implementation} is one of AdamW under ZeRO, not of {name} with "
            f"parallel.zero_stage={zero_stage}: use optim.implementation=auto"
        )
    if offload and (name != "adamw" or (offload == "nvme" and implementation not in ("auto", "deepspeed"))):
        raise ValueError(
            f"parallel.offload={offload} is not for optim.name={name} optim.implementation={implementation}: use "
            "optim.name=adamw optim.implementation=auto"
        )
    if name == "lamb" and zero_stage:
        raise ValueError(
            "optim.name=lamb needs whole parameters, which ZeRO divides: add parallel=zero0 precision=fp32"
        )
    if name != "adamw":
        lamb = partial(Lamb, lr=0.0, betas=betas, eps=eps)
        return lamb if name == "lamb" else partial(torch.optim.SGD, lr=0.0, momentum=betas[0], fused=True)
    on_gpu = distributed.device().type == "cuda"
    if implementation == "auto" and (offload == "nvme" or (offload and on_gpu)):
        implementation = "deepspeed"
    if implementation == "apex" or (implementation == "auto" and on_gpu and zero_stage):
        found = _apex_fused_adam()
        if isinstance(found, str) and implementation == "apex":
            raise ValueError(f"optim.implementation=apex: {found}, or use optim.implementation=auto")
        if not isinstance(found, str):
            return partial(found, lr=0.0, betas=betas, eps=eps, adam_w_mode=True)
    if implementation == "deepspeed":
        if on_gpu and not offload:
            raise ValueError("optim.implementation=deepspeed is of states in host memory: use auto on a GPU")
        return partial(DeepSpeedCPUAdam, lr=0.0, betas=betas, eps=eps, adamw_mode=True)
    flat = implementation == "auto" and zero_stage == 1 and not (on_gpu or offload or "cpu" in native.missing)
    return partial(FlatAdamW if flat else torch.optim.AdamW, lr=0.0, betas=betas, eps=eps, fused=True)


def _apex_fused_adam() -> Any:
    """NVIDIA's FusedAdam, or what is wrong; known by its attributes, since PyPI's apex is another package."""
    try:
        module = importlib.import_module("apex.optimizers")
        importlib.import_module("amp_C")  # its compiled part
        return module.FusedAdam
    except (ImportError, AttributeError) as error:
        return (
            f"the package apex is not here, not NVIDIA's, or without its CUDA extensions ({error}); `swinv2-scale "
            "doctor` tells which. Build https://github.com/NVIDIA/apex with them"
        )


class Step(NamedTuple):
    """A step's mean loss, of this rank and on its device; whether it was applied, that is, gradients were finite; and
    whether, in fp16, the loss scale was lowered because they were not."""

    loss: Tensor
    applied: bool
    rescaled: bool = False


class Engine:
    """A model that trains: DeepSpeed's engine behind the few calls that the loop and the checkpoints need.

    Parameters and optimiser states are read and written whole, by parameter name, whatever the ZeRO stage and the
    number of ranks. Reading them is collective: every rank must take part, in the same order.

    `disk`, under ZeRO 3 on CPU ranks: where the float32 master weights and the optimiser's states live.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: list[dict[str, Any]],
        make_optimizer: Callable[..., torch.optim.Optimizer],
        ds_config: dict[str, Any],
        ema_decay: float | None = None,
        disk: MappedFile | None = None,
    ) -> None:
        _join_ranks()
        self.model = model.to(distributed.device())
        self.accumulation = ds_config["gradient_accumulation_steps"]
        self.updates = 0  # steps that were applied
        half = any(parameter.dtype == torch.float16 for parameter in model.parameters())
        self.loss_scale = LossScale(2.0**16 if half else 1.0, grows=half)
        self.stage = stage = ds_config["zero_optimization"]["stage"]
        self._clip = ds_config["gradient_clipping"]
        if stage == 0:  # DeepSpeed would clip without telling the norm: `_examine` does it
            ds_config = {**ds_config, "gradient_clipping": 0.0}
        if disk is None and distributed.device().type == "cpu":
            _keep_freed_memory()
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        own = set(self._names.values())
        self._buffers = {name: buffer for name, buffer in model.state_dict().items() if name not in own}
        self._disk = disk
        if ema_decay is not None and "nvme" in str(ds_config["zero_optimization"].get("offload_optimizer")):
            raise ValueError("optim.ema_decay is not kept with parallel.offload=nvme: set one of them to null")
        flat = stage == 1 and "offload_optimizer" not in ds_config["zero_optimization"]
        one = flat and distributed.world_size() * self.accumulation == 1  # gradient, which needs no sum
        groups = _split(groups, stage, WAITING_GROUP if one else math.inf)
        with on_disk(disk), flat_gradients(flat):
            self._deepspeed, *_ = deepspeed.initialize(model=model, optimizer=make_optimizer(groups), config=ds_config)
        self._zero = stage > 0
        self._norm: Tensor | None = None
        self._base = self._deepspeed.optimizer.optimizer if self._zero else self._deepspeed.optimizer
        self._ema_decay = ema_decay
        if self._zero:
            # Otherwise DeepSpeed applies what is not finite to bfloat16. It would look for it in every gradient, and
            # again in their norm, which is enough.
            self._deepspeed.optimizer.check_grad_overflow = True
            self._deepspeed.optimizer.check_overflow = lambda **_: None
            self._deepspeed.optimizer.custom_loss_scaler = True
        else:
            self._base.register_step_pre_hook(self._examine)
        self._allocate_optimizer_state()

    def step(
        self, micro_batches: Iterable[dict[str, Any]], loss: Callable[[Any, dict[str, Any]], Tensor], lr: float
    ) -> Step:
        """One optimiser step over `accumulation` micro-batches; gradients that are not finite change nothing.

        Whether they are finite is found of the sum over all ranks, and so is the same on all.
        """
        self.model.train()
        for group in self._base.param_groups:
            group["lr"] = lr * group["lr_scale"]
        if self._zero:
            self._deepspeed.optimizer.external_loss_scale = self.loss_scale.value
        total = torch.zeros((), device=distributed.device())
        count = 0
        for batch in micro_batches:
            value = loss(self._deepspeed, distributed.to_device(batch))
            self._deepspeed.backward(value)
            with torch.profiler.record_function("part: optimiser"):
                self._deepspeed.step()
            total += value.detach()
            count += 1
        if count != self.accumulation:
            raise RuntimeError(f"a step takes {self.accumulation} micro-batches, the stream gave {count}")
        applied = not (self._deepspeed.optimizer.overflow if self._zero else bool(self._base.found_inf))
        if applied:
            self.updates += 1
            self._norm = torch.as_tensor(self._deepspeed.get_global_grad_norm()) if self._zero else self._norm
            self._average()
        return Step(total / count, applied, self.loss_scale.after(applied))

    def gradient_norm(self) -> float | None:
        """Global norm of the gradients of the last step that was applied, before clipping; None before the first.

        Kept on the device until it is asked for.
        """
        return None if self._norm is None else float(self._norm)

    def _average(self) -> None:
        """Move the averages of the master weights by one update; in the first few dozen they follow faster."""
        if self._ema_decay is not None:
            decay = min(self._ema_decay, (1 + self.updates) / (10 + self.updates))
            for weights, state in self._base.state.items():
                state[AVERAGE].lerp_(weights.detach(), 1 - decay)

    def _examine(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Before a step without ZeRO, whose gradients are those of all ranks: clip; hold back what is not finite."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm(p.grad for p in parameters)
        optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]  # which fused AdamW obeys
        if optimizer.found_inf == 0:  # type: ignore[attr-defined]
            self._norm = norm
            if self._clip:
                nn.utils.clip_grads_with_norm_(parameters, self._clip, norm)

    def state(self) -> dict[str, float | None]:
        """What a record should say of a step: gradient norm, weight decay, loss scale. Waits for the device."""
        decay = max(group["weight_decay"] for group in self._base.param_groups)
        return {"gradient_norm": self.gradient_norm(), "weight_decay": decay, "loss_scale": self.loss_scale.value}

    @property
    def optimizer(self) -> str:
        """Which optimiser it is, such as torch.optim.adamw.AdamW, fused."""
        kind = type(self._base)
        return f"{kind.__module__}.{kind.__qualname__}" + ", fused" * bool(self._base.defaults.get("fused"))

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every trainable parameter."""
        return ((name, tuple(getattr(parameter, "ds_shape", parameter.shape))) for parameter, name in self._trainable())

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Every trainable parameter by name as float32 on the CPU: the master weights. Collective."""
        for parameter, name in self._trainable():
            value = safe_get_full_fp32_param(parameter) if self._zero else parameter.detach()
            yield name, _whole(value, parameter)
            self._release()

    def optimizer_state(self) -> Iterator[tuple[str, Tensor]]:
        """Every optimiser state as (state.name, float32 on the CPU), for example exp_avg.norm.weight. Collective."""
        for parameter, name in self._trainable():
            for key in self._state_keys:
                if key != AVERAGE:
                    yield f"{key}.{name}", self._state(parameter, key)
            self._release()

    @property
    def has_averages(self) -> bool:
        """Whether there is an EMA of the weights."""
        return self._ema_decay is not None

    def averages(self) -> Iterator[tuple[str, Tensor]]:
        """The average of every trainable parameter by name, float32 on the CPU. Collective."""
        for parameter, name in self._trainable():
            yield name, self._state(parameter, AVERAGE)

    def buffers(self) -> Iterator[tuple[str, Tensor]]:
        """What a model keeps beside its parameters (running statistics), float32 on the CPU; the same on all ranks."""
        return ((name, buffer.to("cpu", torch.float32, copy=True)) for name, buffer in self._buffers.items())

    def load(self, parameter: Callable[[str], Tensor], state: Callable[[str], Tensor] | None, step: int) -> None:
        """Set master weights, buffers and, unless state is None, optimiser states and averages, each from functions of
        their names.

        The average of norm.weight is the state ema.norm.weight. step: optimiser steps applied so far, for Adam's bias
        correction.
        """
        self.updates = step
        with torch.no_grad():
            for name, buffer in self._buffers.items():
                buffer.copy_(parameter(name))
            for target, name in self._trainable():
                self._set(target, parameter(name).to(distributed.device()), None)
                if state is not None:
                    for key in self._state_keys:
                        self._set(target, state(f"{key}.{name}").to(distributed.device()), key)
                self._release()
            for group in self._base.param_groups:
                group["step"] = step  # where NVIDIA's counts
            for weights, values in self._base.state.items():
                values["step"] = step if self._counts_in_python else values["step"].fill_(step)
                if AVERAGE in values and state is None:
                    values[AVERAGE].copy_(weights)
            if self.stage == 3:
                for group in range(len(self._deepspeed.optimizer.fp16_groups)):
                    with self._swapped_in(group):
                        self._deepspeed.optimizer._reassign_or_swap_out_partitioned_parameters(group)
                    self._release()
            elif self._zero:
                self._deepspeed.optimizer.update_lp_params()

    @contextmanager
    def whole_model(self) -> Iterator[None]:
        """Within it a rank may run the model by itself, whatever the other ranks do. Collective.

        Only ZeRO 3 needs it: every rank gathers all weights for the time being, in their training type.
        """
        if self.stage != 3:
            yield
            return
        parameters: list[Any] = list(self._names)
        with deepspeed.zero.GatheredParameters(parameters):
            for parameter in parameters:
                parameter.ds_persist = True  # or each module would give its own back when it is through
            try:
                yield
            finally:
                for parameter in parameters:
                    parameter.ds_persist = False

    @property
    def on_disk(self) -> bool:
        """Whether the states are too large for memory: a checkpoint is then written from one tensor to the next."""
        return self._disk is not None

    def _release(self) -> None:
        if self._disk is not None:
            self._disk.release()

    @contextmanager
    def _swapped_in(self, sub_group: int) -> Iterator[None]:
        """Within it the states of a sub-group of ZeRO 3 are in memory, wherever they are otherwise."""
        zero = self._deepspeed.optimizer
        swaps = self.stage == 3 and zero._swappable_optimizer_subgroup(sub_group)
        if swaps:
            zero._optimizer_states_and_gradient_swap_in(sub_group)
        yield
        if swaps:
            zero._optimizer_states_and_gradient_swap_out(sub_group)

    def _trainable(self) -> Iterator[tuple[nn.Parameter, str]]:
        return ((parameter, name) for parameter, name in self._names.items() if parameter.requires_grad)

    def _set(self, parameter: Any, value: Tensor, key: str | None) -> None:
        """Set a parameter's master weights, or its optimiser state `key`."""
        if self.stage == 3:  # DeepSpeed's function for whole values fails where the last rank's part is padded
            size = parameter.ds_tensor.ds_numel
            padded = nn.functional.pad(value.flatten(), (0, size * distributed.world_size() - value.numel()))
            own = padded.narrow(0, size * distributed.rank(), size)
            self._deepspeed.optimizer.set_local_hp_param(own, parameter, key)
        elif self._zero:
            parameter.set_full_hp_param(value, key)
        else:
            (parameter if key is None else self._base.state[parameter][key]).copy_(value)

    def _state(self, parameter: nn.Parameter, key: str) -> Tensor:
        value = safe_get_full_optimizer_state(parameter, key) if self._zero else self._base.state[parameter][key]
        return _whole(value, parameter)

    def _allocate_optimizer_state(self) -> None:
        """Create the optimiser's states now, as its first step would: so a checkpoint can be loaded into them.

        The averages are one more of them, as far as DeepSpeed knows: so they are divided among the ranks alike.
        """
        self._state_keys = STATES[type(self._base).__name__] + (AVERAGE,) * (self._ema_decay is not None)
        self._counts_in_python = isinstance(self._base, DeepSpeedCPUAdam)
        fused = self._base.defaults.get("fused")
        if self.stage == 3:
            weights = list(self._deepspeed.optimizer.fp32_partitioned_groups_flat)
        else:
            weights = [parameter for group in self._base.param_groups for parameter in group["params"]]
        for number, parameter in enumerate(weights):
            with self._swapped_in(number):
                state = self._base.state[parameter]
                state["step"] = torch.zeros((), device=parameter.device if fused else "cpu")
                if self._counts_in_python:
                    state["step"] = 0
                for key in self._state_keys:
                    state[key] = self._disk.take(parameter.numel()) if self._disk else torch.zeros_like(parameter)
                if AVERAGE in state:
                    state[AVERAGE].copy_(parameter.detach())
        if self._zero and self.stage != 3:
            self._deepspeed.optimizer._lazy_init_hp_params_optimizer_state()


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
AVERAGE = "ema"  # the exponential moving average of a parameter, kept among the optimiser's states
# Per-parameter tensors that each optimiser keeps.
STATES: dict[str, tuple[str, ...]] = {
    "AdamW": ("exp_avg", "exp_avg_sq"),
    "FlatAdamW": ("exp_avg", "exp_avg_sq"),
    "FusedAdam": ("exp_avg", "exp_avg_sq"),
    "DeepSpeedCPUAdam": ("exp_avg", "exp_avg_sq"),
    "SGD": ("momentum_buffer",),
    "Lamb": ("exp_avg", "exp_avg_sq"),
}


def build_engine(
    model: nn.Module,
    groups: list[dict[str, Any]],
    *,
    optimizer: Callable[..., torch.optim.Optimizer],
    precision: str,
    ds_config: dict[str, Any],
    ema_decay: float | None = None,
    initial: Callable[[str], Tensor] | None = None,
    disk: MappedFile | None = None,
) -> Engine:
    """An Engine over parameter groups that carry names, weight_decay and lr_scale; `optimizer` is made of such groups.

    The model is cast in place, and the master weights start as `initial`, a function of their names (float32); without
    it as the float32 values that the model had. One that was built on the meta device is given memory here, NaN
    throughout until it has values: so a rank holds the weights in their training type, under ZeRO 3 its part of them,
    and one float32 parameter at a time. With `ema_decay` the master weights' exponential moving average is kept beside
    them.
    """
    _join_ranks()
    on_meta = next(model.parameters()).is_meta
    if initial is None and not on_meta and precision != "fp32":
        initial = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}.__getitem__
    cast(model, precision)
    if on_meta:
        if ds_config["zero_optimization"]["stage"] == 3:
            deepspeed.zero.Init(module=Unfilled(model, distributed.device()), config_dict_or_path=ds_config)
        else:
            list(Unfilled(model, distributed.device()).parameters())
        parameters = dict(model.named_parameters())
        groups = [{**group, "params": [parameters[name] for name in group["names"]]} for group in groups]
    engine = Engine(model, groups, optimizer, ds_config, ema_decay, disk)
    if initial is not None:
        engine.load(initial, None, step=0)
    return engine


def _join_ranks() -> None:
    """Have DeepSpeed use the process group that is there; zero.Init, which may come first, would see a world of 1."""
    # DeepSpeed would clone the world with torch's default timeout in place of the run's.
    deepspeed.utils.groups._WORLD_GROUP = distributed.world()
    # The shared-memory collectives compile for a minute, leave 69 MB per run in /dev/shm, and are not needed.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def _keep_freed_memory() -> None:
    """Have glibc keep what is freed of blocks below 64 MiB, for the next step asks for them again and pages that are
    new cost a CPU up to a sixth of a step. MALLOC_… of the environment say otherwise."""
    if not any(name.startswith("MALLOC_") for name in os.environ) and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 64 * 2**20)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _split(groups: list[dict[str, Any]], stage: int, most: float) -> list[dict[str, Any]]:
    """Split groups by parameter type, since ZeRO flattens a group into one buffer, and into parts of `most` elements.

    DeepSpeed takes the type of the first group for that of all. Stages 1 and 3 then accumulate all gradients in float32
    if it has 16 bits; stage 2 reduces all gradients in it, so there it must be float32.
    """
    split: list[dict[str, Any]] = []
    for dtype in sorted(PRECISIONS.values(), key=lambda dtype: dtype.itemsize, reverse=stage == 2):
        for group in groups:
            room = -1.0  # in the part before; under ZeRO 3 parameters have no elements here
            for parameter, name in zip(group["params"], group["names"], strict=True):
                if parameter.dtype != dtype:
                    continue
                if parameter.numel() > room:
                    split.append({**group, "params": [], "names": []})
                    room = most
                split[-1]["params"].append(parameter)
                split[-1]["names"].append(name)
                room -= parameter.numel()
    return split


def _whole(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """A gathered value in its parameter's shape: a float32 copy on the CPU, which later steps leave alone."""
    return value.detach().reshape(getattr(parameter, "ds_shape", parameter.shape)).to("cpu", torch.float32, copy=True)
