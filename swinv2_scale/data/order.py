"""The order of samples, a pure function: which samples make up the global batch of each step.

It depends on the shards' numbers of samples, the seed, the global batch and two settings of the data, and on nothing
else: ranks and workers only share a batch out, and whoever resumes at step k asks for the batches from k on.

    an epoch of a source   all of its shards in a new order, cut into blocks of at most `open_shards`; the samples of a
                           block in a new order. Reading stays within one block's shards, and knowing any part of an
                           epoch takes the permutation of its block only
    one source             every epoch is cut into global batches; the remainder, another one in each epoch, is dropped
    several                each goes on through epochs of its own, at the pace of its weight; nothing is dropped
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np

_CHANCES = 2**32 - 1  # in place of a source's number, which none has
OPEN_SHARDS = 64  # of 256 MB they are 16 GB, and neighbours are of one shard in one case of 64


def shuffled(samples: int, *seeds: int) -> np.ndarray:
    """int64 (samples,): a permutation that depends on its arguments only.

    Sorts the raw output of a bit generator, whose stream NumPy keeps for ever; `Generator.permutation` may change with
    NumPy's version (NEP 19), and an order of samples would then change in the middle of a run.
    """
    bits = np.random.Philox(np.random.SeedSequence(seeds)).random_raw(samples)
    return np.argsort(bits, kind="stable")


class Order:
    """Global batches of samples; steps count over the whole run, from 0.

    shard_samples   for each source, the numbers of samples of its shards
    weights         for each source, its share of the samples, in any unit; None: as many as it has

    A sample is given by the epoch it is met in and its index, which counts through the sources one after another.

    Raises ValueError for a seed, weights or open_shards that cannot be, and for fewer samples than a global batch.
    """

    def __init__(
        self,
        shard_samples: Sequence[Sequence[int]],
        *,
        seed: int,
        global_batch: int,
        open_shards: int,
        weights: Sequence[float] | None = None,
    ) -> None:
        if seed < 0:
            raise ValueError(f"seed {seed} is negative; choose 0 or more")
        sizes = [sum(samples) for samples in shard_samples]
        if not 0 < global_batch <= sum(sizes):
            raise ValueError(
                f"a global batch of {global_batch} cannot be drawn from {sum(sizes)} samples without repeating some; "
                f"choose a global batch of 1 to {sum(sizes)}"
            )
        weights = sizes if weights is None else weights
        if len(weights) != len(sizes) or not all(0 < weight < float("inf") for weight in weights):
            raise ValueError(
                f"data.weights is {list(weights)} for {len(sizes)} sources; give a positive number for each source"
            )
        self.seed, self.global_batch = seed, global_batch
        self.steps_per_epoch = sum(sizes) // global_batch
        self._weights = [Fraction(str(weight)) for weight in weights]
        self._first = np.cumsum([0, *sizes])
        self._sources = [_Source(samples, (seed, n), open_shards) for n, samples in enumerate(shard_samples)]

    def epoch(self, step: int) -> int:
        """The epoch that `step` belongs to: of several sources, as many steps as would show each sample once."""
        return step // self.steps_per_epoch

    def global_batch_of(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Epochs and indices, int64 (global_batch,) each, of the samples of `step`."""
        if len(self._sources) == 1:
            epoch, position = divmod(step, self.steps_per_epoch)
            begin = position * self.global_batch
            return np.full(self.global_batch, epoch), self._sources[0].take(epoch, begin, begin + self.global_batch)
        begins, ends = (self._shares(end * self.global_batch) for end in (step, step + 1))
        parts = [source.endless(begin, end) for source, begin, end in zip(self._sources, begins, ends, strict=True)]
        epochs = np.concatenate([part[0] for part in parts])
        indices = np.concatenate([part[1] + first for part, first in zip(parts, self._first[:-1], strict=True)])
        mixed = shuffled(self.global_batch, self.seed, len(self._sources), step)
        return epochs[mixed], indices[mixed]

    def chances(self, step: int) -> np.ndarray:
        """float64 (global_batch,): a random number of 0 … 1 for each sample of `step`, in rising order.

        A sample's place in its global batch is random, and so is its number. But neighbours have similar ones: a size
        that is drawn by them (see boxes.py) differs little within a micro-batch, and between ranks of one pass.
        """
        bits = np.random.Philox(np.random.SeedSequence((self.seed, _CHANCES, step))).random_raw(self.global_batch)
        return np.sort(bits) / 2.0**64

    def micro_batches(
        self, step: int, rank: int, world_size: int, micro_batch: int
    ) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """This rank's share of `step`: epochs, indices and chances, (micro_batch,) each, for each accumulated pass.

        The global batch is laid out as [accumulation][world][micro].
        """
        assert self.global_batch % (world_size * micro_batch) == 0, (self.global_batch, world_size, micro_batch)
        whole = (*self.global_batch_of(step), self.chances(step))
        epochs, indices, chances = (part.reshape(-1, world_size, micro_batch)[:, rank] for part in whole)
        return list(zip(epochs, indices, chances, strict=True))

    def _shares(self, samples: int) -> list[int]:
        """How many of the run's first `samples` samples come from each source: within one of its weight's share.

        Each source takes its share of what those before it left, rounded down. Both the share and what it leaves never
        shrink as `samples` grows, so that shares of consecutive steps join.
        """
        shares, rest, weight = [], samples, sum(self._weights, Fraction())
        for own in self._weights:
            share = int(rest * own / weight) if own != weight else rest
            shares.append(share)
            rest, weight = rest - share, weight - own
        return shares


class _Source:
    """The epochs of one source, by seeds of its own."""

    def __init__(self, shard_samples: Sequence[int], seeds: tuple[int, int], open_shards: int) -> None:
        if open_shards < 1:
            raise ValueError(f"data.open_shards is {open_shards}; choose 1 or more, such as {OPEN_SHARDS}")
        self.samples = np.asarray(shard_samples, dtype=np.int64)
        self.first = np.cumsum(self.samples) - self.samples
        self.size = int(self.samples.sum())
        self.seeds = seeds
        # Blocks of nearly equal numbers of shards: a last one of few shards would hardly be mixed.
        count = -(-len(self.samples) // open_shards)
        self.cuts = np.linspace(0, len(self.samples), count + 1).round().astype(np.int64)
        self._shards = lru_cache(2)(self._shards)  # type: ignore[method-assign]  # two, for a step across a border
        self._block = lru_cache(2)(self._block)  # type: ignore[method-assign]

    def take(self, epoch: int, begin: int, end: int) -> np.ndarray:
        """int64 (end - begin,): the indices at the positions from `begin` to `end` of an epoch."""
        block_ends = np.cumsum(self.samples[self._shards(epoch)])[self.cuts[1:] - 1]
        parts = [np.empty(0, np.int64)]
        block = int(np.searchsorted(block_ends, begin, side="right"))
        while begin < end:
            stop = min(end, int(block_ends[block]))
            start = int(block_ends[block - 1]) if block else 0
            parts.append(self._block(epoch, block)[begin - start : stop - start])
            begin, block = stop, block + 1
        return np.concatenate(parts)

    def endless(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Epochs and indices at the positions from `begin` to `end` of all epochs, one after another."""
        epochs, indices = [], []
        for epoch in range(begin // self.size, -(-end // self.size)):
            start = epoch * self.size
            indices.append(self.take(epoch, max(begin - start, 0), min(end - start, self.size)))
            epochs.append(np.full(len(indices[-1]), epoch))
        return np.concatenate([*epochs, np.empty(0, np.int64)]), np.concatenate([*indices, np.empty(0, np.int64)])

    def _shards(self, epoch: int) -> np.ndarray:
        """The order of the shards in an epoch."""
        return shuffled(len(self.samples), *self.seeds, epoch)

    def _block(self, epoch: int, block: int) -> np.ndarray:
        """The indices of a block's samples in their order."""
        shards = self._shards(epoch)[self.cuts[block] : self.cuts[block + 1]]
        indices = np.concatenate([np.arange(self.first[n], self.first[n] + self.samples[n]) for n in shards])
        return indices[shuffled(len(indices), *self.seeds, epoch, block + 1)]  # trailing zeros would be no other seeds


def mixing(
    shard_samples: Sequence[int], *, open_shards: int, seed: int = 0, looked_at: int = 1_000_000
) -> dict[str, float]:
    """How often a sample's predecessor lies in the same shard: as stored, in this order, and in a perfect shuffle.

    Where shards hold one class each, as when they were packed class by class, that is how often neighbours are of one
    class. Looks at the first samples of one epoch.
    """
    source = _Source(shard_samples, (seed, 0), open_shards)
    pairs = max(source.size - 1, 1)
    order = source.take(0, 0, min(looked_at, source.size))
    shards = np.searchsorted(source.first + source.samples, order, side="right")
    same = np.count_nonzero(shards[1:] == shards[:-1])
    return {
        "stored": float(np.maximum(source.samples - 1, 0).sum() / pairs),
        "shuffled": int(same) / max(len(order) - 1, 1),
        "perfect": float((source.samples * (source.samples - 1)).sum() / (source.size * pairs)),
    }
