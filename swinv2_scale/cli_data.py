"""The commands `swinv2-scale data …`, in the manner of cli.py."""

import argparse
import json
from pathlib import Path
from typing import Any

_PACK_SOURCE = """by --format:
imagefolder  SOURCE/class/name.jpg
csv          table with a column path, and label (number) or class (name) or neither
coco         ROOT/annotations/instances_SPLIT.json, with the images in ROOT/SPLIT
ade20k       ADEChallengeData2016/images/SPLIT
kinetics     SOURCE/class/name.mp4, or a table SPLIT.csv, or a list of lines "path label", above the videos
demo         photographs/train, photographs/validation, digits/train, digits/validation"""


def add(commands: Any) -> None:
    data = commands.add_parser("data", help="pack, check and list data sets of shards")
    actions = data.add_subparsers(metavar="ACTION", required=True)

    pack = actions.add_parser(
        "pack", help="pack images or videos into shards with a manifest", formatter_class=argparse.RawTextHelpFormatter
    )
    pack.add_argument("source", help=_PACK_SOURCE)
    pack.add_argument("destination", type=Path, help="directory to create; interrupted, the same command goes on")
    pack.add_argument("--format", default="imagefolder", help="default: %(default)s")
    pack.add_argument("--shard-size", default="256MB", help="bytes such as 256MB, or a number of samples")
    pack.add_argument("--seed", type=int, default=0, help="of the shuffle before packing")
    pack.add_argument("--stuff", type=Path, metavar="DIR", help="with --format coco: maps of COCO-Stuff, NAME.png")
    pack.add_argument("--jobs", type=int, help="processes; the shards do not depend on it; default: one per CPU")
    pack.set_defaults(run=_pack)

    scenes = actions.add_parser("scenes", help="write photographs with digits on them, as ADE20K's and as COCO's files")
    scenes.add_argument("directory", type=Path, help="to create; then: data pack DIRECTORY/images/training …")
    scenes.set_defaults(run=_scenes)

    motions = actions.add_parser("motions", help="write videos of photographs and digits in motion, as Kinetics' files")
    motions.add_argument("directory", type=Path, help="to create; then: data pack DIRECTORY/training.csv …")
    motions.set_defaults(run=_motions)

    index = actions.add_parser("index", help="write the manifest of tar shards that have none, from .idx files if any")
    index.add_argument("directory", type=Path)
    index.set_defaults(run=_index)

    verify = actions.add_parser("verify", help="hash every shard and decode every sample; exit code 1 if any is wrong")
    verify.add_argument("manifest", help="manifest.json, its directory, or tar files")
    verify.set_defaults(run=_verify)

    stats = actions.add_parser("stats", help="counts and sizes as JSON")
    stats.add_argument("manifest", help="manifest.json, its directory, or tar files")
    stats.add_argument("--open-shards", type=int, default=64, help="as data.open_shards; default: 64")
    stats.set_defaults(run=_stats)

    order = actions.add_parser("order", help="list the samples that a rank reads in each step, one JSON line a step")
    order.add_argument("manifests", nargs="+", metavar="MANIFEST", help="manifest.json, its directory, or tar files")
    order.add_argument("--weights", type=float, nargs="+", help="of several manifests; default: their sizes")
    order.add_argument("--open-shards", type=int, default=64, help="as data.open_shards; default: 64")
    order.add_argument("--seed", type=int, default=0)
    order.add_argument("--global-batch", type=int, required=True)
    order.add_argument("--micro-batch", type=int, help="default: one pass, global batch / world")
    order.add_argument("--world", type=int, default=1)
    order.add_argument("--rank", type=int, default=0)
    order.add_argument("--workers", type=int, default=0, help="of the loader, which make no difference")
    order.add_argument("--epoch", type=int, default=0)
    order.add_argument("--start-step", type=int, default=0, help="counted from the start of the epoch")
    order.add_argument("--steps", type=int, help="default: to the end of the epoch")
    order.set_defaults(run=_order)


def _pack(arguments: argparse.Namespace) -> int:
    from swinv2_scale.data.pack import pack

    manifest = pack(
        arguments.source,
        arguments.destination,
        format=arguments.format,
        shard_size=arguments.shard_size,
        seed=arguments.seed,
        jobs=arguments.jobs,
        stuff=arguments.stuff,
    )
    named = f"{len(manifest.classes)} classes"
    unnamed = "no classes" if manifest.highest_label is None else "classes: numbered"
    classes = named if manifest.classes else unnamed
    print(f"{len(manifest)} samples in {len(manifest.shards)} shard(s), {classes}: {manifest.root}")
    return 0


def _scenes(arguments: argparse.Namespace) -> int:
    from swinv2_scale.data.scenes import COUNTS, write_tree

    write_tree(arguments.directory)
    print(f"{' and '.join(f'{number} for {split}' for split, number in COUNTS.items())}: {arguments.directory}")
    return 0


def _motions(arguments: argparse.Namespace) -> int:
    from swinv2_scale.data.motions import COUNTS, write_tree

    write_tree(arguments.directory)
    print(f"{' and '.join(f'{number} for {split}' for split, number in COUNTS.items())}: {arguments.directory}")
    return 0


def _index(arguments: argparse.Namespace) -> int:
    from swinv2_scale.data.idx import index

    manifest = index(arguments.directory)
    print(f"{len(manifest)} samples in {len(manifest.shards)} shard(s): {manifest.root}")
    return 0


def _open_manifest(source: str) -> Any:
    """The manifest of a path or URL, which is read as conf/data/shards.yaml says."""
    from swinv2_scale import config
    from swinv2_scale.data.manifest import open_manifest
    from swinv2_scale.data.sources import Reader, is_url

    return open_manifest(source, Reader(**config.reading(config.data_defaults())) if is_url(source) else None)


def _verify(arguments: argparse.Namespace) -> int:
    from swinv2_scale.data.shards import verify

    manifest = _open_manifest(arguments.manifest)
    problems = verify(manifest)
    for problem in problems:
        print(problem)
    print(f"{len(manifest)} samples in {len(manifest.shards)} shard(s): {len(problems)} problem(s)")
    return 1 if problems else 0


def _stats(arguments: argparse.Namespace) -> int:
    from swinv2_scale.data.shards import stats

    manifest = _open_manifest(arguments.manifest)
    print(json.dumps(stats(manifest, open_shards=arguments.open_shards), indent=1, ensure_ascii=False))
    return 0


def _order(arguments: argparse.Namespace) -> int:
    from swinv2_scale.data.mixture import Mixture
    from swinv2_scale.data.stream import training_stream

    weights = None if arguments.weights is None else tuple(arguments.weights)
    data = Mixture(tuple(map(_open_manifest, arguments.manifests)), weights, arguments.open_shards)
    order = data.order(seed=arguments.seed, global_batch=arguments.global_batch)
    if arguments.world < 1:
        raise ValueError(f"--world {arguments.world} is no number of ranks; choose 1 or more")
    micro_batch = arguments.micro_batch or arguments.global_batch // arguments.world
    if not micro_batch or arguments.global_batch % (arguments.world * micro_batch):
        raise ValueError(
            f"--global-batch {arguments.global_batch} is no multiple of --world {arguments.world} x micro-batch "
            f"{micro_batch}; choose numbers that divide it"
        )
    if not 0 <= arguments.rank < arguments.world:
        raise ValueError(f"--rank {arguments.rank} is not one of 0 to {arguments.world - 1}, the ranks of --world")
    for name in ("workers", "epoch", "start_step"):
        if (value := getattr(arguments, name)) < 0:
            raise ValueError(f"--{name.replace('_', '-')} {value} is negative; choose 0 or more")
    steps = order.steps_per_epoch - arguments.start_step if arguments.steps is None else arguments.steps
    begin = arguments.epoch * order.steps_per_epoch + arguments.start_step
    stream = training_stream(
        data,
        order,
        lambda sample: sample,
        lambda samples: {name: [sample[name] for sample in samples] for name in ("key", "corrupt", "reads")},
        micro_batch=micro_batch,
        rank=arguments.rank,
        world_size=arguments.world,
        workers=arguments.workers,
        start_step=begin,
        stop_step=begin + steps,
        max_corrupt_share=1.0,
    )
    passes = arguments.global_batch // (arguments.world * micro_batch)
    batches = iter(stream)
    for step in range(begin, begin + steps):
        keys = [key for _ in range(passes) for key in next(batches)["key"]]
        print(json.dumps({"step": step, "keys": keys}, ensure_ascii=False))
    return 0
