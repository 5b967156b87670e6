"""The loader: samples in the order of order.py, read, decoded, transformed and collated.

The randomness of one sample (crop, flip, mask, mix) is a function of (seed, epoch, key): `draw`.

A sample that cannot be used is replaced by the next one in the manifest that can, and is named in the batch's
"corrupt"; `CorruptCounter` ends the run when there are too many. A shard that cannot be read ends it at once.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from swinv2_scale import distributed, signals
from swinv2_scale.data.images import CorruptSampleError
from swinv2_scale.data.manifest import Manifest
from swinv2_scale.data.mixture import Mixture
from swinv2_scale.data.order import Order
from swinv2_scale.data.shards import labelled, read_sample
from swinv2_scale.data.sources import ReadError
from swinv2_scale.data.transforms import Sample

Batch = dict[str, Any]
Transform = Callable[[Sample], Sample]
Collate = Callable[[list[Sample]], Batch]
Place = tuple[int, int, float]  # epoch, index and chance of a sample, see order.py
Open = Callable[[dict[str, bytes], Sequence[str]], Sample]  # of a sample's members and the names of the classes

_SUBSTITUTES = 100  # unusable samples in a row after which the data set, not a sample, is broken
_JUDGED_AFTER = 1000  # samples; before, one bad file among few would already be a large share


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
        try:
            for batch in self.loader:
                self.corrupt.update(batch)
                for counted in batch["reads"]:
                    self.reads.update(counted)
                yield batch
        except (ValueError, OSError) as error:
            if not str(error).startswith("Caught "):
                raise
            # A worker's error carries its traceback as text, whose last line is "module.Type: message".
            raise type(error)(str(error).strip().splitlines()[-1].partition(": ")[2]) from error


def training_stream(
    data: Mixture,
    order: Order,
    transform: Transform,
    collate: Collate,
    *,
    micro_batch: int,
    rank: int,
    world_size: int,
    workers: int,
    start_step: int,
    stop_step: int | None,
    max_corrupt_share: float,
    open_sample: Open = labelled,
) -> Stream:
    """This rank's micro-batches of the steps start_step … stop_step - 1, global_batch / (world x micro) for each step.

    `order` is one of `data`; a `stop_step` of None stands for no end. One loader serves all epochs, so workers start
    once and prefetch across their boundaries; `workers=0` loads in this process.

    While iterating raises ValueError as `CorruptCounter` does, and OSError when a shard cannot be read.
    """
    batches = _TrainingBatches(order, rank, world_size, micro_batch, start_step, stop_step)
    samples = _Samples(data, open_sample, transform, order.seed, rank)
    return _stream(samples, collate, batches, workers, max_corrupt_share)


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
    open_sample: Open = labelled,
) -> Stream:
    """This rank's share of every sample exactly once, in batches of at most `batch`; may be iterated repeatedly.

    The ranks yield equally many batches (a forward pass may be collective), whose sizes differ by one at most; with
    fewer samples than ranks the last ranks yield none. The epoch of the samples' randomness is always 0.
    """
    batches = _evaluation_batches(len(manifest), batch, rank, world_size)
    samples = _Samples(Mixture((manifest,)), open_sample, transform, seed, rank)
    return _stream(samples, collate, batches, workers, max_corrupt_share)


@dataclass(frozen=True)
class _TrainingBatches:
    """The loader's batch sampler: lists of (epoch, index, chance). Runs in the main process."""

    order: Order
    rank: int
    world_size: int
    micro_batch: int
    start_step: int
    stop_step: int | None

    def __len__(self) -> int:
        if self.stop_step is None:
            raise TypeError("a stream without end has no length")
        steps = max(0, self.stop_step - self.start_step)
        return steps * (self.order.global_batch // (self.world_size * self.micro_batch))

    def __iter__(self) -> Iterator[list[Place]]:
        for step in count(self.start_step) if self.stop_step is None else range(self.start_step, self.stop_step):
            for parts in self.order.micro_batches(step, self.rank, self.world_size, self.micro_batch):
                yield list(zip(*(part.tolist() for part in parts), strict=True))


def _evaluation_batches(samples: int, batch: int, rank: int, world_size: int) -> list[list[Place]]:
    if batch < 1:
        raise ValueError(f"a batch of {batch} samples is none: choose 1 or more")
    largest_share = -(-samples // world_size)
    shares = np.array_split(np.arange(rank, samples, world_size), -(-largest_share // batch))
    return [[(0, index, 0.5) for index in share.tolist()] for share in shares if len(share)]


class _Samples(Dataset[Sample]):
    """Maps (epoch, index, chance) to a transformed sample; runs in the workers."""

    def __init__(self, data: Mixture, open_sample: Open, transform: Transform, seed: int, rank: int) -> None:
        self.data, self.open_sample, self.transform, self.seed, self.rank = data, open_sample, transform, seed, rank

    def __getitem__(self, place: Place) -> Sample:
        epoch, index, chance = place
        manifest, index = self.data.find(index)
        corrupt: list[str] = []
        for attempt in range(min(_SUBSTITUTES, len(manifest))):
            number = (index + attempt) % len(manifest)
            key = f"sample {number}"
            try:
                key, members = read_sample(manifest, number)
                sample = {**self.open_sample(members, manifest.classes), "key": key, "corrupt": corrupt}
                sample = self._transformed({**sample, "draw": draw(self.seed, epoch, key), "chance": chance})
            except CorruptSampleError as error:
                # Only the sample that was asked for is listed: each corrupt one is counted once an epoch.
                corrupt = corrupt or [f"{manifest.shard_of(number).name}:{key}: {error}"]
            except ReadError:
                raise
            except OSError as error:
                worker = get_worker_info()
                raise OSError(
                    f"rank {self.rank}, worker {worker.id if worker else 'none'} cannot read shard "
                    f"{manifest.locate(number)[0]}: {error}; check that the file exists and its disk is "
                    "reachable, then resume"
                ) from error
            else:
                counted = manifest.reader.take_counters() if manifest.reader is not None else {}
                return {**sample, "reads": [counted] if counted else []}
        raise ValueError(
            f"no usable sample among {min(_SUBSTITUTES, len(manifest))} that follow {corrupt[0]}; "
            f"check the data with `swinv2-scale data verify {manifest.root}`"
        )

    def _transformed(self, sample: Sample) -> Sample:
        """Transforms draw from torch's default generator, which without workers is the training's: it is put back."""
        before = torch.get_rng_state()
        torch.default_generator.manual_seed(sample["draw"])
        try:
            return {name: value for name, value in self.transform(sample).items() if name != "chance"}
        finally:
            torch.set_rng_state(before)


def _stream(samples: _Samples, collate: Collate, batches: Any, workers: int, max_corrupt_share: float) -> Stream:
    loader: DataLoader[Batch] = DataLoader(
        samples,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=_outlast,
        persistent_workers=workers > 0,
        pin_memory=distributed.device().type == "cuda",
        # A loader draws its workers' seeds when an iteration begins; from torch's default generator that would change
        # the training's random state by the mere act of evaluating, or of resuming.
        generator=torch.Generator(),
    )
    return Stream(loader, CorruptCounter(max_corrupt_share, len(samples.data)))


def _outlast(_: int) -> None:
    signals.outlast()
