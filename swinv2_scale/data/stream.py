"""The order of samples as a pure function, and the loader that follows it.

The sequence of global batches is a function of (number of samples, seed, global batch, epoch) and nothing else. A step
therefore names its samples: ranks and workers only share them out, and resuming at step k asks for the batches from k
on, without decoding what came before. The randomness of one sample (crop, flip, mask, mix) is a function of (seed,
epoch, key): `draw`.

A sample that cannot be used is replaced by the next one in the manifest that can, and is named in the batch's
"corrupt"; `CorruptCounter` ends the run when there are too many. A shard that cannot be read ends it at once.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from swinv2_scale import distributed
from swinv2_scale.data.manifest import Manifest
from swinv2_scale.data.shards import CorruptSampleError, decode_sample, read_sample, shuffled
from swinv2_scale.data.sources import ReadError
from swinv2_scale.data.transforms import Sample

Batch = dict[str, Any]
Transform = Callable[[Sample], Sample]
Collate = Callable[[list[Sample]], Batch]

_SUBSTITUTES = 100  # unusable samples in a row after which the data set, not a sample, is broken
_JUDGED_AFTER = 1000  # samples; before, one bad file among few would already be a large share


@dataclass(frozen=True)
class Order:
    """Which samples make up the global batch of each step; steps count over the whole run, from 0.

    Every epoch is one permutation of all samples, cut into global batches; the remainder, another one in each epoch, is
    dropped. `_epoch_order` is the single place that a shuffle by blocks of shards would replace.

    Raises ValueError for fewer samples than a global batch, and for a negative seed.
    """

    samples: int
    seed: int
    global_batch: int

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed {self.seed} is negative; choose 0 or more")
        if not 0 < self.global_batch <= self.samples:
            raise ValueError(
                f"a global batch of {self.global_batch} cannot be drawn from {self.samples} samples without repeating "
                f"some; choose a global batch of 1 to {self.samples}"
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.samples // self.global_batch

    def epoch(self, step: int) -> int:
        """The epoch that `step` belongs to."""
        return step // self.steps_per_epoch

    def global_batch_indices(self, step: int) -> np.ndarray:
        """int64 (global_batch,): indices of the samples of `step`."""
        epoch, position = divmod(step, self.steps_per_epoch)
        begin = position * self.global_batch
        return _epoch_order(self.samples, self.seed, epoch)[begin : begin + self.global_batch]

    def micro_batches(self, step: int, rank: int, world_size: int, micro_batch: int) -> list[np.ndarray]:
        """This rank's share of `step`, one int64 (micro_batch,) for each of the accumulated passes.

        The global batch is laid out as [accumulation][world][micro].
        """
        assert self.global_batch % (world_size * micro_batch) == 0, (self.global_batch, world_size, micro_batch)
        return list(self.global_batch_indices(step).reshape(-1, world_size, micro_batch)[:, rank])


@lru_cache(maxsize=2)  # 8 bytes a sample each; two, for a step that looks across the end of an epoch
def _epoch_order(samples: int, seed: int, epoch: int) -> np.ndarray:
    order = shuffled(samples, seed, epoch)
    order.setflags(write=False)  # slices of the cached array are handed out
    return order


def draw(seed: int, epoch: int, key: str) -> int:
    """The 63-bit integer from which all randomness of a sample in an epoch comes."""
    digest = hashlib.blake2b(f"{seed}:{epoch}:{key}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class CorruptCounter:
    """Counts samples that were replaced, and ends the run when they are more than `max_share` of those seen.

    Until 1,000 samples (or one epoch, if that is shorter) were seen, the share is taken of that number.
    """

    def __init__(self, max_share: float, samples: int) -> None:
        self.max_share = max_share
        self.minimum = min(samples, _JUDGED_AFTER)
        self.seen = 0
        self.names: list[str] = []

    @property
    def count(self) -> int:
        return len(self.names)

    def update(self, batch: Batch) -> None:
        """Counts a batch; raises ValueError when the share of corrupt samples is above the limit."""
        self.seen += len(batch["key"])
        self.names.extend(batch["corrupt"])
        if self.count > self.max_share * max(self.seen, self.minimum):
            raise ValueError(
                f"{self.count} of {self.seen} samples so far ({self.count / self.seen:.2%}) are corrupt, more than the "
                f"max_corrupt_share of {self.max_share}: {'; '.join(self.names[:3])}. "
                "List all of them with `swinv2-scale data verify`, then pack again without them, or raise the share"
            )


class Stream:
    """An iterable of micro-batches; `corrupt` counts what was replaced on the way, `reads` what sources.COUNTERS name.

    Both count what belongs to the batches given out; workers may be ahead.
    """

    def __init__(self, loader: DataLoader[Batch], corrupt: CorruptCounter) -> None:
        self.loader = loader
        self.corrupt = corrupt
        self.reads: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.loader:
            self.corrupt.update(batch)
            for counted in batch["reads"]:
                self.reads.update(counted)
            yield batch


def training_stream(
    manifest: Manifest,
    transform: Transform,
    collate: Collate,
    *,
    seed: int,
    global_batch: int,
    micro_batch: int,
    rank: int,
    world_size: int,
    workers: int,
    start_step: int,
    stop_step: int,
    max_corrupt_share: float,
) -> Stream:
    """This rank's micro-batches of the steps start_step … stop_step - 1, global_batch / (world x micro) for each step.

    One loader serves all epochs, so workers start once and prefetch across their boundaries; `workers=0` loads in this
    process. Raises ValueError as `Order` does, and, while iterating, as `CorruptCounter` does; OSError when a shard
    cannot be read.
    """
    order = Order(len(manifest), seed, global_batch)
    batches = _TrainingBatches(order, rank, world_size, micro_batch, start_step, stop_step)
    return _stream(manifest, transform, collate, batches, seed, rank, workers, max_corrupt_share)


def evaluation_stream(
    manifest: Manifest,
    transform: Transform,
    collate: Collate,
    *,
    seed: int,
    batch: int,
    rank: int,
    world_size: int,
    workers: int,
    max_corrupt_share: float,
) -> Stream:
    """This rank's share of every sample exactly once, in batches of at most `batch`; may be iterated repeatedly.

    The ranks yield equally many batches (a forward pass may be collective), whose sizes differ by one at most; with
    fewer samples than ranks the last ranks yield none. The epoch of the samples' randomness is always 0.
    """
    batches = _evaluation_batches(len(manifest), batch, rank, world_size)
    return _stream(manifest, transform, collate, batches, seed, rank, workers, max_corrupt_share)


@dataclass(frozen=True)
class _TrainingBatches:
    """The loader's batch sampler: lists of (epoch, index). Runs in the main process."""

    order: Order
    rank: int
    world_size: int
    micro_batch: int
    start_step: int
    stop_step: int

    def __len__(self) -> int:
        steps = max(0, self.stop_step - self.start_step)
        return steps * (self.order.global_batch // (self.world_size * self.micro_batch))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start_step, self.stop_step):
            epoch = self.order.epoch(step)
            for indices in self.order.micro_batches(step, self.rank, self.world_size, self.micro_batch):
                yield [(epoch, index) for index in indices.tolist()]


def _evaluation_batches(samples: int, batch: int, rank: int, world_size: int) -> list[list[tuple[int, int]]]:
    largest_share = -(-samples // world_size)
    shares = np.array_split(np.arange(rank, samples, world_size), -(-largest_share // batch))
    return [[(0, index) for index in share.tolist()] for share in shares if len(share)]


class _Samples(Dataset[Sample]):
    """Maps (epoch, index) to a transformed sample; runs in the workers."""

    def __init__(self, manifest: Manifest, transform: Transform, seed: int, rank: int) -> None:
        self.manifest, self.transform, self.seed, self.rank = manifest, transform, seed, rank

    def __getitem__(self, place: tuple[int, int]) -> Sample:
        epoch, index = place
        key, image, label, corrupt = self._load_usable(index)
        number = draw(self.seed, epoch, key)
        reader = self.manifest.reader
        reads = [counted] if reader is not None and (counted := reader.take_counters()) else []
        sample = {"image": image, "label": label, "key": key, "draw": number, "corrupt": corrupt, "reads": reads}
        # Transforms draw from torch's default generator. Without workers that is the training's own: it is put back.
        before = torch.get_rng_state()
        torch.default_generator.manual_seed(number)
        try:
            return self.transform(sample)
        finally:
            torch.set_rng_state(before)

    def _load_usable(self, index: int) -> tuple[str, torch.Tensor, int, list[str]]:
        """Key, image and label of sample `index` or its substitute, and the name of what was replaced, if it was."""
        corrupt: list[str] = []
        for attempt in range(min(_SUBSTITUTES, len(self.manifest))):
            number = (index + attempt) % len(self.manifest)
            key = f"sample {number}"
            try:
                key, members = read_sample(self.manifest, number)
                image, label = decode_sample(members, self.manifest.classes)
                return key, image, label, corrupt
            except CorruptSampleError as error:
                # Only the sample that was asked for is listed: each corrupt one is counted once an epoch.
                corrupt = corrupt or [f"{self.manifest.shard_of(number).name}:{key}: {error}"]
            except ReadError:
                raise
            except OSError as error:
                worker = get_worker_info()
                raise OSError(
                    f"rank {self.rank}, worker {worker.id if worker else 'none'} cannot read shard "
                    f"{self.manifest.locate(number)[0]}: {error}; check that the file exists and its disk is "
                    "reachable, then resume"
                ) from error
        raise ValueError(
            f"no usable sample among {min(_SUBSTITUTES, len(self.manifest))} that follow {corrupt[0]}; "
            f"check the data with `swinv2-scale data verify {self.manifest.root}`"
        )


def _stream(
    manifest: Manifest,
    transform: Transform,
    collate: Collate,
    batches: Any,
    seed: int,
    rank: int,
    workers: int,
    max_corrupt_share: float,
) -> Stream:
    loader: DataLoader[Batch] = DataLoader(
        _Samples(manifest, transform, seed, rank),
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=distributed.device().type == "cuda",
        # A loader draws its workers' seeds when an iteration begins; from torch's default generator that would change
        # the training's random state by the mere act of evaluating, or of resuming.
        generator=torch.Generator(),
    )
    return Stream(loader, CorruptCounter(max_corrupt_share, len(manifest)))
