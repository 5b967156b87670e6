"""One order of samples: the same over ranks, workers, accumulation and interruptions; nothing corrupt passes unseen."""

import io
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from swinv2_scale.data.folder import one_file
from swinv2_scale.data.manifest import Manifest
from swinv2_scale.data.mixture import Mixture
from swinv2_scale.data.order import shuffled
from swinv2_scale.data.pack import write_shards
from swinv2_scale.data.shards import read_sample
from swinv2_scale.data.stream import CorruptCounter, draw, evaluation_stream, training_stream
from swinv2_scale.data.transforms import ClassificationTransform, Mix, SimMIMEvaluationTransform, collate

SAMPLES = 26
MakeManifest = Callable[..., Manifest]


@pytest.fixture
def make(tmp_path: Path) -> MakeManifest:
    """Packs 26 small images; those in `broken` do not decode."""

    def build(broken: tuple[int, ...] = ()) -> Manifest:
        random = np.random.default_rng(0)
        items = []
        for i in range(SAMPLES):
            buffer = io.BytesIO()
            Image.fromarray(random.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(buffer, "PNG")
            items.append(one_file(f"k{i:02d}", "png", i % 4, b"broken" if i in broken else buffer.getvalue()))
        return write_shards(items, tmp_path, classes=list("abcd"), shard_size=9, seed=0, origin={})

    return build


def classification() -> ClassificationTransform:
    return ClassificationTransform(
        image_size=16,
        crop_scale=(0.3, 1.0),
        crop_ratio=(0.75, 4 / 3),
        flip=0.5,
        interpolation="bicubic",
        randaugment_ops=2,
        randaugment_magnitude=9,
        erase_probability=0.5,
    )


def mix() -> Mix:
    return Mix(
        mixup_alpha=0.8, cutmix_alpha=1.0, probability=0.8, switch_probability=0.5, label_smoothing=0.1, num_classes=4
    )


def train(manifest: Manifest, **changes: Any) -> list[dict[str, Any]]:
    """All micro-batches of one rank."""
    data = Mixture((manifest,), open_shards=2)  # of three
    order = data.order(seed=3, global_batch=8)
    settings = {
        "micro_batch": 8,
        "rank": 0,
        "world_size": 1,
        "workers": 0,
        "start_step": 0,
        "stop_step": 7,
        "max_corrupt_share": 1.0,
    }
    return list(training_stream(data, order, classification(), mix(), **{**settings, **changes}))


def global_batches(manifest: Manifest, world_size: int, micro_batch: int, workers: int) -> list[dict[str, Any]]:
    """The micro-batches of all ranks, put together again as [step][accumulation][world][micro]."""
    ranks = [
        train(manifest, world_size=world_size, rank=rank, micro_batch=micro_batch, workers=workers)
        for rank in range(world_size)
    ]
    accumulation = 8 // (world_size * micro_batch)
    assert all(len(batches) == 7 * accumulation for batches in ranks)
    steps = []
    for step in range(7):
        parts = [ranks[r][step * accumulation + a] for a in range(accumulation) for r in range(world_size)]
        steps.append(
            {
                "key": [key for part in parts for key in part["key"]],
                "image": torch.cat([part["image"] for part in parts]),
                "target": torch.cat([part["target"] for part in parts]),
            }
        )
    return steps


@pytest.mark.parametrize(
    ("world_size", "micro_batch", "workers"), [(1, 8, 1), (1, 2, 2), (2, 4, 0), (2, 2, 1), (4, 2, 0), (4, 2, 2)]
)
def test_global_batches_do_not_depend_on_ranks_workers_or_accumulation(make, world_size, micro_batch, workers):
    """Keys, augmented and mixed pixels, and targets, bit for bit, over two epochs' boundaries."""
    manifest = make()
    expected = global_batches(manifest, world_size=1, micro_batch=8, workers=0)
    found = global_batches(manifest, world_size, micro_batch, workers)
    for one, other in zip(expected, found, strict=True):
        assert one["key"] == other["key"]
        assert torch.equal(one["image"], other["image"])
        assert torch.equal(one["target"], other["target"])


def test_the_stream_follows_the_order(make):
    manifest = make()
    order = Mixture((manifest,), open_shards=2).order(seed=3, global_batch=8)
    for step, batch in enumerate(train(manifest)):
        _, indices = order.global_batch_of(step)
        assert batch["key"] == [read_sample(manifest, index)[0] for index in indices.tolist()]


@pytest.mark.parametrize(("world_size", "micro_batch", "workers", "start"), [(1, 8, 0, 0), (2, 2, 1, 0), (4, 2, 0, 3)])
def test_chances_reach_the_transform_whoever_loads(make, world_size, micro_batch, workers, start):
    data = Mixture((make(),), open_shards=2)
    order = data.order(seed=3, global_batch=8)
    ranks = [
        list(
            training_stream(
                data,
                order,
                lambda sample: {**sample, "told": sample["chance"]},
                lambda samples: (
                    {name: [one[name] for one in samples] for name in ("key", "told")}
                    | {"corrupt": [], "reads": [], "left": "chance" in samples[0]}
                ),
                micro_batch=micro_batch,
                rank=rank,
                world_size=world_size,
                workers=workers,
                start_step=start,
                stop_step=7,
                max_corrupt_share=1.0,
            )
        )
        for rank in range(world_size)
    ]
    batches = [part for parts in zip(*ranks, strict=True) for part in parts]  # [step][accumulation][world]
    told = [chance for batch in batches for chance in batch["told"]]
    assert told == [chance for step in range(start, 7) for chance in order.chances(step).tolist()]
    assert not any(batch["left"] for batch in batches)


@pytest.mark.parametrize(("start", "workers"), [(2, 0), (3, 0), (5, 2)])
def test_resuming_at_a_step_gives_the_tail(make, start, workers):
    manifest = make()
    expected = train(manifest)[start:]
    found = train(manifest, start_step=start, workers=workers)
    assert [batch["key"] for batch in found] == [batch["key"] for batch in expected]
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(expected, found, strict=True))


def test_resuming_decodes_nothing_that_is_skipped(make, monkeypatch):
    from swinv2_scale.data import stream

    read = []
    original = stream.read_sample
    monkeypatch.setattr(stream, "read_sample", lambda manifest, index: read.append(index) or original(manifest, index))
    train(make(), start_step=5)
    assert len(read) == 16


def test_randomness_is_pinned():
    """A change here would change the augmentation in the middle of everybody's runs."""
    assert draw(3, 1, "n01440764/a") == 6325152185690106682


def test_a_stream_without_end_goes_on_past_epochs(make):
    data = Mixture((make(),))
    order = data.order(seed=3, global_batch=13)
    settings = {"micro_batch": 13, "rank": 0, "world_size": 1, "workers": 0, "max_corrupt_share": 1.0}
    stream = training_stream(data, order, classification(), collate, start_step=0, stop_step=None, **settings)
    keys = [batch["key"] for batch, _ in zip(stream, range(6), strict=False)]
    assert all(len(set(keys[2 * epoch] + keys[2 * epoch + 1])) == SAMPLES for epoch in range(3))
    with pytest.raises(TypeError, match="has no length"):
        len(stream)


def test_several_sources_are_mixed_by_weight_and_substituted_within(make, tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (20, 24)).save(buffer, "PNG")
    others = [one_file(f"other{i}", "png", 0, b"broken" if i == 1 else buffer.getvalue()) for i in range(3)]
    (tmp_path / "other").mkdir()
    other = write_shards(others, tmp_path / "other", classes=list("abcd"), shard_size=9, seed=0, origin={})
    data = Mixture((make(), other), weights=(3, 1))
    order = data.order(seed=3, global_batch=8)
    settings = {"micro_batch": 4, "world_size": 2, "workers": 0, "max_corrupt_share": 1.0}
    found = []
    for rank in (0, 1):
        stream = training_stream(
            data, order, classification(), collate, rank=rank, start_step=0, stop_step=9, **settings
        )
        found.append(list(stream))
    for one, two in zip(*found, strict=True):
        assert sum(key.startswith("other") for key in one["key"] + two["key"]) == 2
    replaced = [name for batches in found for batch in batches for name in batch["corrupt"]]
    assert len(replaced) == 6 and all(":other1:" in name for name in replaced)  # each of 18 / 3 epochs of the source
    assert {key for batches in found for b in batches for key in b["key"] if key[0] == "o"} == {"other0", "other2"}


def test_augmentation_differs_between_epochs(make):
    first, later = train(make(), stop_step=3), train(make(), start_step=3, stop_step=6)
    images = {key: image for batch in first for key, image in zip(batch["key"], batch["image"], strict=True)}
    pairs = [
        (images[key], image)
        for batch in later
        for key, image in zip(batch["key"], batch["image"], strict=True)
        if key in images
    ]
    assert len(pairs) > 10 and not any(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_training_random_state_is_not_touched(make, workers):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train(make(), workers=workers)
    assert torch.equal(torch.get_rng_state(), before)


def evaluate(manifest: Manifest, **changes: Any) -> list[dict[str, Any]]:
    settings = {"seed": 3, "batch": 4, "rank": 0, "world_size": 1, "workers": 0, "max_corrupt_share": 1.0}
    transform = SimMIMEvaluationTransform(image_size=16, mask_unit=4, mask_ratio=0.6)
    stream = evaluation_stream(manifest, transform, collate, **{**settings, **changes})
    first, second = list(stream), list(stream)
    assert len(stream) == len(first)
    for one, two in zip(first, second, strict=True):
        assert one["key"] == two["key"] and torch.equal(one["mask"], two["mask"])
    return first


@pytest.mark.parametrize(("world_size", "batch", "workers"), [(1, 4, 0), (2, 4, 0), (3, 4, 1), (3, 9, 0), (4, 6, 0)])
def test_evaluation_sees_every_sample_exactly_once(make, world_size, batch, workers):
    manifest = make()
    ranks = [evaluate(manifest, world_size=world_size, rank=r, batch=batch, workers=workers) for r in range(world_size)]
    keys = [key for batches in ranks for part in batches for key in part["key"]]
    assert sorted(keys) == [f"k{i:02d}" for i in range(SAMPLES)]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(len(part["key"]) <= batch for batches in ranks for part in batches)


def test_an_evaluation_needs_a_batch(make):
    with pytest.raises(ValueError, match="a batch of 0 samples is none: choose 1 or more"):
        evaluate(make(), batch=0)


def test_masks_of_an_evaluation_do_not_depend_on_the_world(make):
    manifest = make()

    def masks(world_size: int) -> dict[str, torch.Tensor]:
        ranks = [evaluate(manifest, world_size=world_size, rank=rank) for rank in range(world_size)]
        return {k: m for batches in ranks for b in batches for k, m in zip(b["key"], b["mask"], strict=True)}

    one, three = masks(1), masks(3)
    assert all(torch.equal(one[key], three[key]) for key in one)
    assert len({mask.numpy().tobytes() for mask in one.values()}) > 10


def test_corrupt_samples_are_replaced_by_the_next_usable_one_and_counted_once(make):
    neighbours_and_last = shuffled(SAMPLES, 0)[[4, 5, SAMPLES - 1]].tolist()  # the order in which `make` packs
    broken = [f"k{number:02d}" for number in neighbours_and_last]
    manifest = make(broken=tuple(neighbours_and_last))
    batches = evaluate(manifest)
    keys = [key for batch in batches for key in batch["key"]]
    corrupt = [name for batch in batches for name in batch["corrupt"]]
    assert sorted(name.split(":")[1] for name in corrupt) == sorted(broken)
    assert all(name.startswith("shard-00000") and "does not decode" in name for name in corrupt)
    assert len(keys) == SAMPLES and not set(broken) & set(keys)
    assert keys == [key for batch in evaluate(manifest, workers=2) for key in batch["key"]]
    intact = [key for batch in evaluate(make()) for key in batch["key"]]
    for place, (key, wanted) in enumerate(zip(keys, intact, strict=True)):
        usable = (intact[(place + k) % SAMPLES] for k in range(SAMPLES))
        assert key == wanted or key == next(name for name in usable if name not in broken)


def test_too_many_corrupt_samples_end_the_run(make):
    manifest = make(broken=(1, 2, 3))
    assert len(train(manifest, max_corrupt_share=0.2)) == 7
    with pytest.raises(ValueError, match=r"\d of \d+ samples so far .*corrupt.*0.05.*shard-0.*:k0.*data verify"):
        train(manifest, max_corrupt_share=0.05)
    with pytest.raises(ValueError, match="corrupt"):
        train(manifest, max_corrupt_share=0.0)


def test_the_counter_judges_by_an_epoch_or_a_thousand_samples():
    counter = CorruptCounter(0.01, samples=10**6)
    for _ in range(10):
        counter.update({"key": ["k"] * 8, "corrupt": ["s:k: reason"]})
    assert (counter.seen, counter.count) == (80, 10)
    with pytest.raises(ValueError, match="11 of 88 samples"):
        counter.update({"key": ["k"] * 8, "corrupt": ["s:k: reason"]})


def test_a_data_set_without_one_usable_sample(make):
    with pytest.raises(ValueError, match=r"no usable sample among 26 .*data verify"):
        train(make(broken=tuple(range(SAMPLES))))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_vanishes_names_rank_worker_and_shard(make, workers):
    manifest = make()
    for shard in manifest.shards:
        (manifest.root / shard.name).unlink()
    worker = "0" if workers else "none"
    with pytest.raises(OSError, match=rf"rank 1, worker {worker} cannot read shard .*shard-00000\d.tar"):
        train(manifest, workers=workers, rank=1, world_size=2, micro_batch=4)


def test_a_shard_that_shrinks_is_not_taken_for_a_corrupt_sample(make):
    manifest = make()
    for shard in manifest.shards:
        (manifest.root / shard.name).write_bytes(b"")
    with pytest.raises(OSError, match="was truncated"):
        train(manifest)


def test_memory_stays_flat_over_epochs(make):
    """Resident memory of the loader's processes, between the 10th and the 90th epoch: no sample leaves anything."""
    data = Mixture((make(),), open_shards=2)
    order = data.order(seed=3, global_batch=13)
    settings = {"micro_batch": 13, "rank": 0, "world_size": 1, "workers": 1, "max_corrupt_share": 1.0}
    stream = training_stream(data, order, classification(), collate, start_step=0, stop_step=180, **settings)
    own = "/proc/self"
    resident = {}
    for step, _ in enumerate(stream):
        if step in (20, 178):
            workers = [f"/proc/{process.pid}" for process in multiprocessing.active_children()]
            resident[step] = [int(Path(place, "statm").read_text().split()[1]) * 4096 for place in (own, *workers)]
    assert len(resident[20]) == len(resident[178]) >= 2
    assert max(after - before for before, after in zip(resident[20], resident[178], strict=True)) < 4e6, resident


WORKER = """
import sys
from pathlib import Path
import swinv2_scale.run
from swinv2_scale.data.manifest import open_manifest
from swinv2_scale.data.mixture import Mixture
from swinv2_scale.data.stream import training_stream
from test_data_stream import classification

data = Mixture((open_manifest(sys.argv[1]),), open_shards=2)
transform, before = classification(), set(sys.modules)

def watched(sample):
    transform(sample)
    new = (name for name in set(sys.modules) - before if not name.startswith("multiprocessing."))  # to start them
    return {**sample, "imported": sorted(new)}

def collate(samples):
    return {name: [sample[name] for sample in samples] for name in ("key", "corrupt", "reads", "imported")}

settings = {"micro_batch": 13, "rank": 0, "world_size": 1, "workers": 1, "max_corrupt_share": 1.0}
order = data.order(seed=3, global_batch=13)
stream = training_stream(data, order, watched, collate, start_step=0, stop_step=1, **settings)
print(*next(iter(stream))["imported"][-1])
"""


def test_loading_processes_import_nothing(make: MakeManifest) -> None:
    """They are forked while other threads of the run may import, whose locks nobody would release in them."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", WORKER, str(make().root)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_loading_processes_outlast_signals_but_obey_their_parent(make: MakeManifest) -> None:
    """Slurm signals them together with their rank, which needs them for its last step."""
    stream = evaluation_stream(
        make(), classification(), collate, seed=0, batch=2, rank=0, world_size=1, workers=1, max_corrupt_share=0.0
    )
    batches = iter(stream)
    next(batches)
    (worker,) = multiprocessing.active_children()
    for name in ("TERM", "USR2"):
        subprocess.run(["sh", "-c", f"kill -{name} {worker.pid}; sleep 0.2"], check=True)
    assert len(list(batches)) == SAMPLES // 2 - 1 and worker.is_alive()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGTERM)
    worker.join(timeout=5)
    assert not worker.is_alive()
