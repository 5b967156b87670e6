"""Several data sets as one: what a run trains on."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from swinv2_scale.data.manifest import Manifest, open_manifest
from swinv2_scale.data.order import OPEN_SHARDS, Order
from swinv2_scale.data.sources import Reader


@dataclass(frozen=True, eq=False)
class Mixture:
    """Manifests whose samples are counted through, and the order's settings: see Order. Often it is one manifest."""

    manifests: tuple[Manifest, ...]
    weights: tuple[float, ...] | None = None
    open_shards: int = OPEN_SHARDS

    def __len__(self) -> int:
        return int(self._first[-1])

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, () where they have none or the manifests differ."""
        names = {manifest.classes for manifest in self.manifests}
        return names.pop() if len(names) == 1 else ()

    @property
    def identity(self) -> dict[str, object]:
        """What an order of samples depends on, beside seed and global batch."""
        hashes = " ".join(manifest.hash[:16] for manifest in self.manifests)
        weights = list(self.weights) if self.weights else None
        return {"data": hashes, "data.weights": weights, "data.open_shards": self.open_shards}

    def order(self, *, seed: int, global_batch: int) -> Order:
        """Raises ValueError as Order does."""
        shards = [manifest.samples_of_shards for manifest in self.manifests]
        return Order(shards, seed=seed, global_batch=global_batch, open_shards=self.open_shards, weights=self.weights)

    def find(self, index: int) -> tuple[Manifest, int]:
        """The manifest that sample `index` comes from, and its index there."""
        number = int(np.searchsorted(self._first, index, side="right")) - 1
        return self.manifests[number], index - int(self._first[number])

    @cached_property
    def _first(self) -> np.ndarray:
        return np.cumsum([0, *map(len, self.manifests)])


def open_mixture(
    sources: str | os.PathLike[str] | Sequence[str],
    reader: Reader | None = None,
    *,
    weights: Sequence[float] | None = None,
    open_shards: int = OPEN_SHARDS,
) -> Mixture:
    """One source or a list of them, each as `open_manifest` takes it; raises ValueError as that does."""
    paths = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    if not paths:
        raise ValueError("data.train is an empty list; give a source, or several")
    manifests = tuple(open_manifest(path, reader) for path in paths)
    return Mixture(manifests, None if weights is None else tuple(weights), open_shards)
