"""Where DeepSpeed's ZeRO is changed for this project. Besides engine.py the only module that imports deepspeed.

flat_gradients   ZeRO 1 that sums gradients where they are reduced, clipped and stepped from
on_disk          ZeRO 3 whose float32 master weights lie in a file
Defragmented     ZeRO 3 with weights of more than one type
"""

import importlib
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import deepspeed.comm as dist
import deepspeed.runtime.engine
import torch
from deepspeed.runtime.utils import all_gather_dp_groups
from deepspeed.runtime.zero import stage3
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from torch import Tensor, nn

from swinv2_scale.mapped import MappedFile
from swinv2_scale.ops import adamw
from swinv2_scale.optim import FlatAdamW

ZERO_SUPPORTED_OPTIMIZERS.append(FlatAdamW)  # otherwise DeepSpeed warns of it
NORM_ELEMENTS = 2**16  # of a partial norm; a float32 sum over more loses digits


class OwnPart(NamedTuple):
    """A rank's part of a group's gradients, summed over ranks, under the name by which DeepSpeed's step asks for it."""

    flat_partition: Tensor


@dataclass
class Piece:
    """A range of a group's flat weights that one rank owns, how many parameters it touches and how many of them have
    no gradient yet, and the sum of their gradients."""

    group: int
    owner: int
    begin: int
    end: int
    parameters: int
    waiting: int
    sums: Tensor | None = None


class FlatGradients(deepspeed.runtime.engine.DeepSpeedZeroOptimizer):
    """ZeRO 1 that sums gradients where the optimiser reads them.

    DeepSpeed's moves each gradient through a float32 copy, a bucket, its flattened copy and the rank's partition, and
    adds, divides and scales them on the way: 100 bytes of memory traffic a parameter, of which AdamW's are 28. Here
    backward adds a gradient to the sums of its piece of the weights; a piece is summed over ranks into its owner's,
    with overlap_comm as soon as it is complete; and the optimiser reads the pieces of its rank where they lie, one
    after the other in one buffer: 44 bytes. Without overlap_comm a GPU's piece is the whole group, and a reduce-scatter
    sums it; in any case half of what DeepSpeed's all-reduce sends. With FlatAdamW the step is ours too, one pass over
    the weights and no copies.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._world = dist.get_world_size(group=self.dp_process_group)
        self._rank = dist.get_rank(group=self.dp_process_group)
        self._on_cpu = torch.device(self.device).type == "cpu"
        self._own: dict[int, Tensor] = {}  # the sums of this rank's pieces, by group
        self._places: dict[nn.Parameter, list[tuple[Tensor, slice | None]]] = {}  # where its gradient is added
        self._summed: set[nn.Parameter] = set()  # have a gradient in this step
        self._reducing: list[tuple[Any, Tensor]] = []
        self._divide()

    def _divide(self) -> None:
        """Divide the weights of each group into pieces."""
        self._scatters = not (self._on_cpu or self.overlap_comm) and self.gradient_accumulation_dtype == torch.float32
        self._pieces: list[Piece] = []
        self._pieces_of: dict[nn.Parameter, list[Piece]] = defaultdict(list)
        for group, parameters in enumerate(self.bit16_groups):
            size, most = int(self.partition_size[group]), int(self.reduce_bucket_size)
            pieces = [
                Piece(group, owner, owner * size + begin, owner * size + min(begin + most, size), 0, 0)
                for owner in range(self._world)
                for begin in range(0, size, most)
            ]
            for piece in [Piece(group, self._rank, 0, self._world * size, 0, 0)] if self._scatters else pieces:
                for parameter in parameters:
                    start = parameter.data.storage_offset()
                    if piece.begin < start + parameter.numel() and start < piece.end:
                        self._pieces_of[parameter].append(piece)
                        piece.parameters += 1
                piece.waiting = piece.parameters
                self._pieces.append(piece)

    def setup_buckets(self) -> None:
        """There are none."""

    def process_gradients(self, param: nn.Parameter, i: int) -> None:
        """Backward has made a gradient: add it, and reduce the pieces that it completes."""
        self._add(param, param.grad)
        param.grad = None
        if self.overlap_comm and self.is_gradient_accumulation_boundary():
            for piece in self._pieces_of[param]:
                piece.waiting -= 1
                if piece.waiting == 0:
                    self._reduce(piece)

    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """Backward of a step's last micro-batch is through: what is not reduced is, and each rank gets its part."""
        for parameter in self._pieces_of:
            if parameter not in self._summed:
                self._add(parameter, None)
        for piece in self._pieces:
            if piece.waiting:
                self._reduce(piece)
            if piece.owner == self._rank:
                self._memory(piece)  # of one that is padding throughout, too
            piece.waiting = piece.parameters
        for work, _ in self._reducing:
            work.wait()
        for group, own in self._own.items():
            self.averaged_gradients[group] = OwnPart(own if self._world == 1 else own.div_(self._world))
        self._reducing.clear()
        self._summed.clear()

    def scaled_global_norm(self, norm_type: int = 2) -> Tensor:
        """Norm of all gradients, -1 if it is not finite."""
        squares = torch.stack([_square_of_norm(own.flat_partition) for own in self.averaged_gradients.values()]).sum()
        dist.all_reduce(squares, group=self.dp_process_group)
        norm = squares.sqrt()
        return torch.where(norm.isfinite(), norm, -1.0)

    def unscale_and_clip_grads(self, grad_groups_flat: list[Tensor], total_norm: Tensor) -> None:
        """Unless there is nothing to scale and to clip."""
        if self.loss_scale != 1.0 or not float(total_norm) < self.clip_grad:
            super().unscale_and_clip_grads(grad_groups_flat, total_norm)

    def step(self, closure: None = None) -> None:
        """The optimiser's step. The sums are given back before the next step's activations need memory, but on a CPU,
        where the pages of new buffers cost as much as AdamW."""
        if isinstance(self.optimizer, FlatAdamW):
            self._flat_step(self.optimizer)
        else:
            super().step()
        if not self._on_cpu:
            self._own.clear()
            for piece in self._pieces:
                piece.sums = None

    def _flat_step(self, optimizer: FlatAdamW) -> None:
        """What DeepSpeed's step does, without its copies of the gradients and of the weights."""
        norm = float(self.scaled_global_norm())
        self.overflow = norm < 0
        if self.overflow:
            return
        self._global_grad_norm = norm / self.loss_scale
        clip = max(1.0, (self._global_grad_norm + 1e-6) / self.clip_grad) if self.clip_grad else 1.0
        for group, own in self.averaged_gradients.items():
            trained = self.parallel_partitioned_bit16_groups[group][self._rank]
            gradient, scale = own.flat_partition, 1 / (clip * self.loss_scale)
            optimizer.update(optimizer.param_groups[group], trained, gradient, scale)
        all_gather_dp_groups(
            self.bit16_groups_flat,
            self.parallel_partitioned_bit16_groups,
            self.real_dp_process_group,
            self.nccl_start_alignment_factor,
            self.allgather_bucket_size,
        )

    def _add(self, parameter: nn.Parameter, gradient: Tensor | None) -> None:
        """Add a gradient to the sums of its pieces; the first of a step takes their place, None is zero."""
        for place, part in self._places.get(parameter) or self._places_of(parameter):
            if gradient is None:
                place.zero_()
                continue
            some = gradient if part is None else gradient.flatten()[part]
            if parameter in self._summed:
                place.add_(some)
            else:
                place.copy_(some)
        self._summed.add(parameter)

    def _places_of(self, parameter: nn.Parameter) -> list[tuple[Tensor, slice | None]]:
        """In the sums of each of its pieces, and which part of it belongs there; None: all, in the same shape."""
        places: list[tuple[Tensor, slice | None]] = []
        start = parameter.data.storage_offset()
        for piece in self._pieces_of[parameter]:
            begin, end = max(piece.begin, start), min(piece.end, start + parameter.numel())
            place = self._memory(piece)[begin - piece.begin : end - piece.begin]
            whole = len(place) == parameter.numel()
            places.append((place.view_as(parameter), None) if whole else (place, slice(begin - start, end - start)))
        if self._on_cpu:  # whose sums stay where they are
            self._places[parameter] = places
        return places

    def _memory(self, piece: Piece) -> Tensor:
        """The sums of a piece; beyond the last parameter they are zero."""
        if piece.sums is None:
            weights, size = self.bit16_groups_flat[piece.group], int(self.partition_size[piece.group])
            terms = self._world * self.gradient_accumulation_steps  # of one, the sum is the gradient in its own type
            dtype = torch.promote_types(weights.dtype, self.gradient_accumulation_dtype) if terms > 1 else weights.dtype
            if self._scatters:
                piece.sums = weights.new_empty(len(weights), dtype=dtype)
                self._own[piece.group] = piece.sums.narrow(0, self._rank * size, size)
            elif piece.owner == self._rank:
                if piece.group not in self._own:
                    self._own[piece.group] = weights.new_empty(size, dtype=dtype)
                begin = piece.begin - self._rank * size
                piece.sums = self._own[piece.group][begin : begin + piece.end - piece.begin]
            else:
                piece.sums = weights.new_empty(piece.end - piece.begin, dtype=dtype)
            used = sum(parameter.numel() for parameter in self.bit16_groups[piece.group])
            piece.sums[max(0, used - piece.begin) :].zero_()
        return piece.sums

    def _reduce(self, piece: Piece) -> None:
        """Sum a piece over ranks into its owner's, in float32; where the sums are float32, by the end of backward."""
        piece.waiting = 0
        if self._world == 1:
            return
        self._reducing = [one for one in self._reducing if not one[0].is_completed()]  # and so give back their memory
        sums = self._memory(piece)
        if self._scatters:
            dist.reduce_scatter_fn(self._own[piece.group], sums, group=self.dp_process_group)
            return
        exchanged = sums.float()
        owner = dist.get_global_rank(self.dp_process_group, piece.owner)
        work = dist.reduce(exchanged, owner, group=self.dp_process_group, async_op=True)
        if exchanged is sums:
            self._reducing.append((work, sums))
        else:
            work.wait()
            sums.copy_(exchanged)
        if piece.owner != self._rank and not self._on_cpu:
            piece.sums = None


def _square_of_norm(values: Tensor) -> Tensor:
    if adamw.takes(values):
        return adamw.sum_of_squares(values).float()
    whole = values.numel() // NORM_ELEMENTS * NORM_ELEMENTS
    rows = torch.linalg.vector_norm(values[:whole].view(-1, NORM_ELEMENTS), dim=1, dtype=torch.float32)
    return rows.square().sum() + torch.linalg.vector_norm(values[whole:], dtype=torch.float32).square()


@contextmanager
def flat_gradients(used: bool) -> Iterator[None]:
    """Within it, if `used`, DeepSpeed makes FlatGradients of ZeRO 1."""
    usual = deepspeed.runtime.engine.DeepSpeedZeroOptimizer
    if used:
        deepspeed.runtime.engine.DeepSpeedZeroOptimizer = FlatGradients
    try:
        yield
    finally:
        deepspeed.runtime.engine.DeepSpeedZeroOptimizer = usual


@contextmanager
def on_disk(disk: MappedFile | None) -> Iterator[None]:
    """Within it DeepSpeed makes a ZeRO 3 whose float32 master weights lie in a file."""
    if disk is None:
        yield
        return
    usual, file = stage3.DeepSpeedZeroOptimizer_Stage3, disk

    class OnDisk(usual):  # type: ignore[valid-type,misc]
        def _create_fp32_partitions(self) -> None:
            for weights in self.fp16_partitioned_groups_flat:
                # Those that train in float32 are their own master weights, as with DeepSpeed.
                master: Any = weights if weights.dtype == torch.float32 else file.take(weights.numel())
                master.ds_id = len(self.fp32_partitioned_groups_flat)
                master.requires_grad = True
                self.fp32_partitioned_groups_flat.append(master)
            for group in self.optimizer.param_groups:
                group["params"] = []  # the step puts its sub-groups there, one after the other

        def _release_sub_group(self, *arguments: Any) -> None:
            super()._release_sub_group(*arguments)
            file.release()

    stage3.DeepSpeedZeroOptimizer_Stage3 = OnDisk
    try:
        yield
    finally:
        stage3.DeepSpeedZeroOptimizer_Stage3 = usual


class Defragmented:
    """ZeRO 3's one buffer of all parameters, as one for each of their types, which come one after the other."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._buffers = []
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            self._buffers.append(_defragment([tensor for tensor in tensors if tensor.dtype == dtype]))

    def narrow(self, dim: int, start: int, length: int) -> Tensor:
        for buffer in self._buffers:
            if start < buffer.numel():
                return buffer.narrow(dim, start, length)
            start -= buffer.numel()
        raise IndexError(start)


_defragment = stage3.defragment
stage3.defragment = Defragmented  # DeepSpeed's own asserts that there is one type


def _import_muon() -> None:
    """DeepSpeed imports the module of an optimiser that is never used here, and that compiles functions when it is
    imported: which loads inductor, seconds of every start."""
    usual = torch.compile
    torch.compile = lambda *functions, **_: functions[0] if functions else lambda function: function  # type: ignore
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    except ImportError:
        pass  # a version without it
    finally:
        torch.compile = usual


_import_muon()
