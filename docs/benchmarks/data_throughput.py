"""Images per second of the training stream beside webdataset and ImageFolder, and of decoders alone.

    python docs/benchmarks/data_throughput.py [--workers 0 1] [--grain 2] [--rounds 5] [--seconds 4]

192-pixel crops of photographs of 500 and of 4,000 pixels, which are made of scikit-image's. The loaders take turns in
one run; each gets the same files, as a folder or in shards, and the same random resized crop, flip and normalisation.
"""

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from swinv2_scale.data.images import EncodedImage
from swinv2_scale.data.mixture import Mixture
from swinv2_scale.data.pack import pack
from swinv2_scale.data.stream import training_stream
from swinv2_scale.data.transforms import IMAGENET_MEAN, IMAGENET_STD, RandomResizedCrop, collate

BATCH = 16
SIZES = {500: (500, 375), 4000: (4000, 3000)}
CROP = {"size": 192, "scale": (0.67, 1.0)}  # as SimMIM pretraining draws it
NORMALISE = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
NAMES = ("astronaut", "coffee", "chelsea", "rocket", "retina", "hubble_deep_field")


def photographs(folder: Path, size: tuple[int, int], count: int, grain: float) -> None:
    """JPEG files of random parts of photographs in two classes; `grain` is the noise of a sensor, in levels of 255."""
    random = np.random.default_rng(0)
    sources = [Image.fromarray(getattr(skimage.data, name)()).convert("RGB") for name in NAMES]
    for number in range(count):
        source = sources[number % len(sources)]
        side = random.uniform(0.6, 0.9)
        left, top = (random.uniform(0, (1 - side) * edge) for edge in source.size)
        box = (left, top, left + side * source.width, top + side * source.height)
        pixels = np.asarray(source.resize(size, Image.Resampling.BICUBIC, box=box), dtype=np.float32)
        pixels += random.normal(0, grain, (*pixels.shape[:2], 1))
        path = folder / f"class{number % 2}" / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=88)


def ours(shards: Path, workers: int) -> Iterator[int]:
    """The stream as training opens it, without the end of an epoch."""
    data = Mixture((pack(str(shards.parent / "folder"), shards, format="imagefolder", shard_size=40, seed=0),))
    image = v2.Compose([RandomResizedCrop(**CROP), v2.RandomHorizontalFlip(), *NORMALISE])
    stream = training_stream(
        data,
        data.order(seed=0, global_batch=BATCH),
        lambda sample: {**sample, "image": image(sample["image"])},
        collate,
        micro_batch=BATCH,
        rank=0,
        world_size=1,
        workers=workers,
        start_step=0,
        stop_step=None,
        max_corrupt_share=0.0,
    )
    return (len(batch["image"]) for batch in stream)


def peers_transform() -> v2.Compose:
    """What users of PIL images write."""
    return v2.Compose([v2.RandomResizedCrop(**CROP), v2.RandomHorizontalFlip(), v2.ToImage(), *NORMALISE])


def plain_webdataset(shards: Path, workers: int) -> Iterator[int]:
    """As webdataset's documentation builds it."""
    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    samples = webdataset.WebDataset(urls, shardshuffle=False, resampled=True).shuffle(1000, initial=40).decode("pil")
    samples = samples.to_tuple("jpg", "cls").map_tuple(peers_transform(), int)
    loader = webdataset.WebLoader(samples.batched(BATCH), batch_size=None, num_workers=workers)
    return (len(batch[0]) for batch in loader)


def image_folder(shards: Path, workers: int) -> Iterator[int]:
    """torchvision's ImageFolder and torch's DataLoader."""
    folder = ImageFolder(shards.parent / "folder", transform=peers_transform())
    loader = DataLoader(folder, BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    while True:
        yield from (len(batch[0]) for batch in loader)


def rate(images: Iterator[int], seconds: float) -> float:
    """Images per second."""
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        count += next(images)
    return count / (time.perf_counter() - begin)


def decoders() -> dict[str, Callable[[bytes], Any]]:
    """From a file's bytes to uint8 (3, 192, 192)."""
    crop, scaled = v2.RandomResizedCrop(**CROP), RandomResizedCrop(**CROP)
    to_image = v2.ToImage()

    def torchvision(content: bytes) -> Any:
        return crop(decode_image(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode=ImageReadMode.RGB))

    found: dict[str, Callable[[bytes], Any]] = {
        "PIL": lambda content: to_image(crop(Image.open(io.BytesIO(content)).convert("RGB"))),
        "torchvision": torchvision,
        "ours": lambda content: scaled(EncodedImage(content)),
    }
    try:
        import simplejpeg

        found["simplejpeg"] = lambda content: crop(torch.from_numpy(simplejpeg.decode_jpeg(content)).permute(2, 0, 1))
    except ImportError:
        print("without simplejpeg, which is not installed")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--grain", type=float, default=2.0, help="the more, the larger are the files")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each loader in each round")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        for width, size in SIZES.items():
            root = Path(temporary) / str(width)
            photographs(root / "folder", size, 240 if width == 500 else 60, arguments.grain)
            contents = [path.read_bytes() for path in sorted(root.glob("folder/*/*.jpg"))]
            print(f"\n{width} pixels, {sum(map(len, contents)) / len(contents) / 1e3:.0f} kB a file")
            ways = decoders()
            times: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(arguments.rounds):
                for name, decode in ways.items():
                    begin = time.perf_counter()
                    for content in contents[:20]:
                        decode(content)
                    times[name].append((time.perf_counter() - begin) / 20 * 1e3)
            line = ", ".join(f"{name} {statistics.median(values):.2f}" for name, values in times.items())
            print(f"decode and crop, ms: {line}")
            for workers in arguments.workers:
                loaders = {"ours": ours, "webdataset": plain_webdataset, "ImageFolder": image_folder}
                rates: dict[str, list[float]] = {name: [] for name in loaders}
                for _ in range(arguments.rounds):
                    for name, loader in loaders.items():
                        images = loader(root / "shards", workers)  # each round anew: waiting workers would prefetch
                        rate(images, 1.0)
                        rates[name].append(rate(images, arguments.seconds))
                        del images
                medians = {name: statistics.median(values) for name, values in rates.items()}
                best = max(medians["webdataset"], medians["ImageFolder"])
                line = ", ".join(f"{name} {value:.1f}" for name, value in medians.items())
                print(f"{workers} workers, images/s: {line}; ours / the faster other: {medians['ours'] / best:.2f}")


if __name__ == "__main__":
    main()
