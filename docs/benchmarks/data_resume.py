"""How soon the first batch comes when a run resumes late in an epoch of a million samples.

    python docs/benchmarks/data_resume.py [--directory /tmp/million]

1,000 shards of 1,000 samples: real tars where the first batches read, elsewhere files of that size without contents.
Prints seconds from opening the manifest to the first batch of 256 (decoded, cropped, collated).
"""

import argparse
import io
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from webdataset import TarWriter

from swinv2_scale.data.manifest import Shard, index_shards, write_manifest
from swinv2_scale.data.mixture import Mixture, open_mixture
from swinv2_scale.data.stream import training_stream
from swinv2_scale.data.transforms import SimMIMTransform, collate

SHARDS, SAMPLES, BATCH = 1000, 1000, 256
STEPS = {0: "the first sample", 900_000 // BATCH: "sample 900,000"}


def write_shard(path: Path, content: bytes) -> None:
    with TarWriter(str(path), mtime=0) as writer:
        for number in range(SAMPLES):
            writer.write({"__key__": f"{path.stem}-{number:04d}", "jpg": content, "cls": b"0"})


def make(directory: Path) -> None:
    """The data set, with contents in the shards that the measured steps read."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "JPEG")
    write_shard(directory / "shard-0000.tar", buffer.getvalue())
    _, (first,), offsets = index_shards([directory / "shard-0000.tar"], hashes=False)
    shards = [Shard(f"shard-{number:04d}.tar", first.bytes, "", SAMPLES) for number in range(SHARDS)]
    for shard in shards[1:]:
        with (directory / shard.name).open("wb") as file:
            file.truncate(first.bytes)
    manifest = write_manifest(directory, shards, np.tile(offsets, SHARDS), classes=["all"], origin={})
    order = Mixture((manifest,)).order(seed=0, global_batch=BATCH)
    read = {
        index // SAMPLES for step in STEPS for k in range(8) for index in order.global_batch_of(step + k)[1].tolist()
    }
    for number in sorted(read - {0}):
        write_shard(directory / shards[number].name, buffer.getvalue())


def measure(directory: Path, step: int, workers: int) -> float:
    """Seconds until the first batch."""
    transform = SimMIMTransform(
        image_size=192, crop_scale=(0.67, 1.0), crop_ratio=(0.75, 4 / 3), flip=0.5, mask_unit=32, mask_ratio=0.6
    )
    begin = time.perf_counter()
    data = open_mixture(directory)
    order = data.order(seed=0, global_batch=BATCH)
    settings = {"micro_batch": BATCH, "rank": 0, "world_size": 1, "workers": workers, "max_corrupt_share": 0.0}
    stream = training_stream(data, order, transform, collate, start_step=step, stop_step=step + 4, **settings)
    batch = next(iter(stream))
    assert len(set(batch["key"])) == BATCH
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="keep the data here and use it again")
    directory = parser.parse_args().directory
    with tempfile.TemporaryDirectory() as temporary:
        place = directory or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        if not (place / "manifest.json").exists():
            make(place)
        for workers in (0, 2):
            for step, name in STEPS.items():
                seconds = min(measure(place, step, workers) for _ in range(3))
                print(f"workers={workers}, resuming at {name}: {seconds:.2f} s to the first batch")


if __name__ == "__main__":
    main()
