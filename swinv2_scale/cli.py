"""The command line: `swinv2-scale data|checkpoint|embed|plan|report|log|doctor`.

Each command is one `_add_…` function that declares its arguments, and one `_…` function that runs it and returns the
exit code. Heavy modules are imported where they are used, so that `--help` answers at once. A ValueError or an OSError
(a file, a disk, a network) is the user's to solve: it becomes one line on standard error and exit code 2.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command `argv` (default: the process's arguments) and returns its exit code."""
    parser = argparse.ArgumentParser(prog="swinv2-scale", description="Tools around training Swin Transformer V2.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_data(commands)
    _add_checkpoint(commands)
    _add_embed(commands)
    _add_plan(commands)
    _add_report(commands)
    _add_log(commands)
    _add_doctor(commands)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        return int(arguments.run(arguments))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


_PACK_SOURCE = """by --format:
imagefolder  SOURCE/class/name.jpg
csv          table with a column path, and label (number) or class (name) or neither
coco         ROOT/annotations/instances_SPLIT.json, with the images in ROOT/SPLIT
ade20k       ADEChallengeData2016/images/SPLIT
kinetics     SOURCE/class/name.mp4, or a table SPLIT.csv, or a list of lines "path label", above the videos
demo         photographs/train, photographs/validation, digits/train, digits/validation"""


def _add_data(commands: Any) -> None:
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
    pack.add_argument("--jobs", type=int, help="processes; the shards do not depend on it; default: one per CPU")
    pack.set_defaults(run=_data_pack)

    scenes = actions.add_parser("scenes", help="write photographs with digits on them, as ADE20K's and as COCO's files")
    scenes.add_argument("directory", type=Path, help="to create; then: data pack DIRECTORY/images/training …")
    scenes.set_defaults(run=_data_scenes)

    motions = actions.add_parser("motions", help="write videos of photographs and digits in motion, as Kinetics' files")
    motions.add_argument("directory", type=Path, help="to create; then: data pack DIRECTORY/training.csv …")
    motions.set_defaults(run=_data_motions)

    index = actions.add_parser("index", help="write the manifest of tar shards that have none, from .idx files if any")
    index.add_argument("directory", type=Path)
    index.set_defaults(run=_data_index)

    verify = actions.add_parser("verify", help="hash every shard and decode every sample; exit code 1 if any is wrong")
    verify.add_argument("manifest", help="manifest.json, its directory, or tar files")
    verify.set_defaults(run=_data_verify)

    stats = actions.add_parser("stats", help="counts and sizes as JSON")
    stats.add_argument("manifest", help="manifest.json, its directory, or tar files")
    stats.add_argument("--open-shards", type=int, default=64, help="as data.open_shards; default: 64")
    stats.set_defaults(run=_data_stats)

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
    order.set_defaults(run=_data_order)


def _data_pack(arguments: argparse.Namespace) -> int:
    from swinv2_scale.data.pack import pack

    manifest = pack(
        arguments.source,
        arguments.destination,
        format=arguments.format,
        shard_size=arguments.shard_size,
        seed=arguments.seed,
        jobs=arguments.jobs,
    )
    named = f"{len(manifest.classes)} classes"
    unnamed = "no classes" if manifest.highest_label is None else "classes: numbered"
    classes = named if manifest.classes else unnamed
    print(f"{len(manifest)} samples in {len(manifest.shards)} shard(s), {classes}: {manifest.root}")
    return 0


def _data_scenes(arguments: argparse.Namespace) -> int:
    from swinv2_scale.data.scenes import COUNTS, write_tree

    write_tree(arguments.directory)
    print(f"{' and '.join(f'{number} for {split}' for split, number in COUNTS.items())}: {arguments.directory}")
    return 0


def _data_motions(arguments: argparse.Namespace) -> int:
    from swinv2_scale.data.motions import COUNTS, write_tree

    write_tree(arguments.directory)
    print(f"{' and '.join(f'{number} for {split}' for split, number in COUNTS.items())}: {arguments.directory}")
    return 0


def _data_index(arguments: argparse.Namespace) -> int:
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


def _data_verify(arguments: argparse.Namespace) -> int:
    from swinv2_scale.data.shards import verify

    manifest = _open_manifest(arguments.manifest)
    problems = verify(manifest)
    for problem in problems:
        print(problem)
    print(f"{len(manifest)} samples in {len(manifest.shards)} shard(s): {len(problems)} problem(s)")
    return 1 if problems else 0


def _data_stats(arguments: argparse.Namespace) -> int:
    from swinv2_scale.data.shards import stats

    manifest = _open_manifest(arguments.manifest)
    print(json.dumps(stats(manifest, open_shards=arguments.open_shards), indent=1, ensure_ascii=False))
    return 0


def _data_order(arguments: argparse.Namespace) -> int:
    from swinv2_scale.data.mixture import Mixture
    from swinv2_scale.data.stream import training_stream

    weights = None if arguments.weights is None else tuple(arguments.weights)
    data = Mixture(tuple(map(_open_manifest, arguments.manifests)), weights, arguments.open_shards)
    order = data.order(seed=arguments.seed, global_batch=arguments.global_batch)
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


def _add_checkpoint(commands: Any) -> None:
    checkpoint = commands.add_parser("checkpoint", help="look into files of weights, and convert them")
    actions = checkpoint.add_subparsers(metavar="ACTION", required=True)

    inspect = actions.add_parser("inspect", help="layout and model of a file, and what it leaves open, as JSON")
    inspect.add_argument("file", help="a file of weights, a checkpoint, or a run directory")
    inspect.set_defaults(run=_checkpoint_inspect)

    verify = actions.add_parser("verify", help="compare checkpoints with their hashes; exit code 1 if any is damaged")
    verify.add_argument("path", type=Path, help="a checkpoint, or a run directory: all of its checkpoints")
    verify.set_defaults(run=_checkpoint_verify)

    convert = actions.add_parser("convert", help="write weights under the names of another library")
    convert.add_argument("file", help="a file of weights, a checkpoint, or a run directory")
    convert.add_argument("destination", type=Path, help="safetensors file to write")
    convert.add_argument("--to", required=True, choices=("released", "timm", "torchvision", "transformers"))
    convert.set_defaults(run=_checkpoint_convert)
    _add_export(actions)


def _checkpoint_inspect(arguments: argparse.Namespace) -> int:
    from swinv2_scale.checkpoint import weights_file
    from swinv2_scale.models.convert import describe

    model, found = describe(weights_file(arguments.file))
    facts = {
        "file": str(found.path),
        "layout": found.layout,
        "tensors": found.tensors,
        "parameters": found.parameters,
        "derived": len(found.dropped),
        "model": model.arguments,
        "head_width": model.arguments["embed_dim"] // model.arguments["num_heads"][0],
        "pretrained_windows": found.pretrained_windows,
        "open": model.ambiguous,
        "classes": found.classes,
    }
    print(json.dumps(facts, indent=1))
    return 0


def _checkpoint_verify(arguments: argparse.Namespace) -> int:
    from swinv2_scale.checkpoint import checkpoints, verify

    found = checkpoints(arguments.path)
    if not found:
        raise ValueError(f"{arguments.path} is no checkpoint, and no run directory that holds one: correct the path")
    problems = {path: verify(path) for path in found}
    for path, problem in problems.items():
        print(f"{path}: {problem or 'intact'}")
    return 1 if any(problems.values()) else 0


def _checkpoint_convert(arguments: argparse.Namespace) -> int:
    from safetensors.torch import save_file

    from swinv2_scale.checkpoint import weights_file
    from swinv2_scale.models.convert import for_model, read_released
    from swinv2_scale.models.layouts import from_released

    tensors, metadata, found = read_released(weights_file(arguments.file))
    if arguments.destination.exists():
        raise ValueError(f"{arguments.destination} exists: remove it or choose another name")
    if arguments.to in ("timm", "torchvision"):  # which have no SimMIM
        tensors = for_model(tensors, False, found)
        if found.dropped:
            print(f"left out: {', '.join(found.dropped)}")
    # Only the released layout can say in which window's units its position bias measures.
    header = {"format": "pt"}
    if arguments.to == "released":
        header |= metadata
        if found.pretrained_windows:
            header["pretrained_windows"] = json.dumps(found.pretrained_windows)
    save_file(from_released(tensors, arguments.to), arguments.destination, header)
    print(f"{found.path} ({found.layout} layout, {len(tensors)} tensors) -> {arguments.destination} ({arguments.to})")
    references = found.pretrained_windows
    if arguments.to != "released" and references:
        setting = {
            "timm": f"pretrained_window_sizes={[max(pair) for pair in references]}",
            "transformers": f"Swinv2Config(pretrained_window_sizes={[max(pair) for pair in references]})",
            "torchvision": f"window_size={references[0]}; it has no pretrained window: no other gives these numbers",
        }
        print(f"the position bias measures in windows of {references}: load with {setting[arguments.to]}")
    return 0


def _add_export(actions: Any) -> None:
    export = actions.add_parser(
        "export", help="write weights with their configuration, or a graph for torch.export or ONNX"
    )
    export.add_argument("file", help="a file of weights, a checkpoint, or a run directory; of a SimMIM, its encoder")
    export.add_argument("destination", type=Path, help="file to write: .safetensors, .pt2 (torch.export) or .onnx")
    export.add_argument("settings", nargs="*", metavar="key=value", help="arguments of the model: window_size=16")
    export.add_argument("--format", choices=("safetensors", "torch-export", "onnx"), help="default: by the suffix")
    export.add_argument("--model", help="size (t, s, …) of a file that does not say its window and image size")
    export.add_argument("--image-size", help="of a graph, in pixels: 256, or rows x columns, 256x320; default: trained")
    export.add_argument("--opset", type=int, help="of ONNX; default: PyTorch's")
    export.set_defaults(run=_checkpoint_export)


def _checkpoint_export(arguments: argparse.Namespace) -> int:
    from swinv2_scale.checkpoint import weights_file
    from swinv2_scale.export import export, format_of, model_of, settings, size_in_pixels

    destination = arguments.destination
    if arguments.format not in (None, format_of(destination)):
        raise ValueError(f"{destination} is no name for {arguments.format}: end it in .safetensors, .pt2 or .onnx")
    size = None if arguments.image_size is None else size_in_pixels(arguments.image_size)
    file = weights_file(arguments.file)
    loaded = model_of(file, arguments.model, **settings(arguments.settings))
    difference = export(loaded, destination, image_size=size, opset=arguments.opset)
    checked = "" if difference is None else f", outputs equal to {difference:.1e} at 1 and 3 images"
    print(f"{file} -> {destination} ({destination.stat().st_size / 1e6:.1f} MB{checked})")
    return 0


def _add_embed(commands: Any) -> None:
    embed = commands.add_parser("embed", help="write embeddings of pictures to a Parquet file")
    embed.add_argument("checkpoint", help="a file of weights, a checkpoint, or a run directory")
    embed.add_argument("data", help="manifest.json, its directory, tar files, or a folder of pictures")
    embed.add_argument("destination", type=Path, help="Parquet file to write: key, label, embedding")
    embed.add_argument("settings", nargs="*", metavar="key=value", help="arguments of the model: window_size=16")
    embed.add_argument("--model", help="size (t, s, …) of a file that does not say its window and image size")
    embed.add_argument("--image-size", type=int, help="pixels; default: the model's")
    embed.add_argument("--layer", default="pooled", help="pooled: after the last norm; stage1, …: that map's mean")
    embed.add_argument("--batch", type=int, default=32)
    embed.add_argument("--workers", type=int, default=2, help="processes that decode; 0: this one")
    embed.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    embed.add_argument("--skip-corrupt", action="store_true", help="leave out pictures that do not decode")
    embed.set_defaults(run=_embed)


def _embed(arguments: argparse.Namespace) -> int:
    from swinv2_scale.checkpoint import weights_file
    from swinv2_scale.embed import embed
    from swinv2_scale.export import model_of, settings

    file = weights_file(arguments.checkpoint)
    rows = embed(
        model_of(file, arguments.model, **settings(arguments.settings)),
        arguments.data,
        arguments.destination,
        checkpoint=file,
        layer=arguments.layer,
        image_size=arguments.image_size,
        batch=arguments.batch,
        workers=arguments.workers,
        precision=arguments.precision,
        skip_corrupt=arguments.skip_corrupt,
    )
    print(f"{rows} embeddings of {arguments.data}: {arguments.destination}")
    return 0


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser(
        "plan", help="memory, operations and time of a training before it runs; 1 if it is too big"
    )
    plan.add_argument("settings", nargs="*", help="[pretrain|finetune] key=value …, also of conf/plan.yaml: nodes, gpu")
    plan.add_argument("--search", action="store_true", help="memory policies and micro-batches that fit, fastest first")
    plan.add_argument("--html", type=Path, metavar="FILE", help="also write a page")
    plan.add_argument("--json", action="store_true", help="print one JSON object")
    plan.set_defaults(run=_plan)


def _plan(arguments: argparse.Namespace) -> int:
    from swinv2_scale.plan_report import run

    return run(arguments.settings, html=arguments.html, as_json=arguments.json, search=arguments.search)


def _add_report(commands: Any) -> None:
    report = commands.add_parser("report", help="write report.html of finished or running runs")
    report.add_argument("run_dir", type=Path, nargs="+")
    report.add_argument("--compare", type=Path, metavar="PAGE", help="also write a page that compares two to four runs")
    report.set_defaults(run=_report)


def _report(arguments: argparse.Namespace) -> int:
    from swinv2_scale.report import headline, write_report

    for run_dir in arguments.run_dir:
        write_report(run_dir)
        print(headline(run_dir))
    if arguments.compare:
        from swinv2_scale.compare import write_comparison

        print(f"comparison: {write_comparison(arguments.run_dir, arguments.compare)}")
    return 0


def _add_log(commands: Any) -> None:
    log = commands.add_parser("log", help="bring the record of a run to wandb")
    actions = log.add_subparsers(metavar="ACTION", required=True)
    upload = actions.add_parser("upload", help="replay metrics.jsonl and pictures into one wandb run")
    upload.add_argument("run_dir", type=Path, nargs="+")
    upload.add_argument("--project", default="swinv2-scale")
    upload.add_argument("--offline", action="store_true", help="write RUN_DIR/wandb only, for `wandb sync`")
    upload.set_defaults(run=_log_upload)
    dashboard = actions.add_parser("dashboard", help="create the workspaces for pretraining and fine-tuning in wandb")
    dashboard.add_argument("--entity", required=True, help="wandb's user or team")
    dashboard.add_argument("--project", default="swinv2-scale")
    dashboard.add_argument("--folder", type=Path, default=Path(), help="for their files where wandb is out of reach")
    dashboard.set_defaults(run=_log_dashboard)


def _log_upload(arguments: argparse.Namespace) -> int:
    from swinv2_scale.telemetry import upload

    for run_dir in arguments.run_dir:
        lines = upload(run_dir, mode="offline" if arguments.offline else "online", project=arguments.project)
        print(f"{run_dir}: {lines} lines")
    return 0


def _log_dashboard(arguments: argparse.Namespace) -> int:
    from swinv2_scale.dashboard import publish

    print(*publish(entity=arguments.entity, project=arguments.project, folder=arguments.folder), sep="\n")
    return 0


def _add_doctor(commands: Any) -> None:
    doctor = commands.add_parser("doctor", help="check this installation; exit code 1 if something does not work")
    doctor.add_argument("--quick", action="store_true", help="a short self-check of the kernel, and no timing")
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.add_argument("--device", choices=("cpu", "cuda"), help="whose kernel is checked; default: that of training")
    hosts = doctor.add_argument_group("hosts of a run", "started as the run is, by srun, torchrun or deepspeed")
    hosts.add_argument("--distributed", action="store_true", help="examine every rank's host; 1 if any is suspect")
    hosts.add_argument("--run-dir", type=Path, help="a directory to write to and read from")
    hosts.add_argument("--data", help="shards to read a sample of")
    hosts.add_argument("--factor", type=float, default=3.0, help="slow: so many times the median; default %(default)s")
    hosts.add_argument("--suspects", type=Path, help="a file that the names of suspect hosts are added to")
    hosts.add_argument("--timeout-minutes", type=float, default=5.0, help="that a rank is waited for")
    doctor.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    if arguments.distributed:
        return _preflight(arguments)
    from swinv2_scale.doctor import doctor

    return doctor(arguments.device, quick=arguments.quick, as_json=arguments.json)


def _preflight(arguments: argparse.Namespace) -> int:
    from swinv2_scale import distributed
    from swinv2_scale.preflight import preflight

    with distributed.process_group(arguments.timeout_minutes):
        code = preflight(
            arguments.run_dir,
            arguments.data,
            factor=arguments.factor,
            suspects=arguments.suspects,
            as_json=arguments.json,
        )
    distributed.end_process(code)


if __name__ == "__main__":
    sys.exit(main())
