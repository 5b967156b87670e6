"""The command line: `swinv2-scale data|checkpoint|embed|predict|plan|report|log|doctor`.

Each command is one `_add_…` function that declares its arguments, and one `_…` function that runs it and returns the
exit code; those of `data` are in cli_data.py. Heavy modules are imported where they are used, so that `--help` answers
at once. A ValueError or an OSError (a file, a disk, a network) is the user's to solve: it becomes one line on standard
error and exit code 2.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swinv2_scale import cli_data


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command `argv` (default: the process's arguments) and returns its exit code."""
    parser = argparse.ArgumentParser(prog="swinv2-scale", description="Tools around training Swin Transformer V2.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    cli_data.add(commands)
    _add_checkpoint(commands)
    _add_embed(commands)
    _add_predict(commands)
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


def _add_predict(commands: Any) -> None:
    predict = commands.add_parser("predict", help="draw what a trained model says of pictures")
    predict.add_argument("checkpoint", help="a run directory, a checkpoint, or a file of weights")
    predict.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="pictures, and folders of pictures")
    predict.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory for a PNG per picture")
    predict.add_argument("--json", action="store_true", help="also write DIR/predictions.json, and maps of segments")
    predict.add_argument("--score", type=float, help="from which objects are shown; default: as the task says, 0.3")
    changes = predict.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", dest="settings")
    changes.help = "what is other than in the run: task.flip=true 'task.scales=[0.75,1.0,1.25]'"
    predict.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    predict.set_defaults(run=_predict)


def _predict(arguments: argparse.Namespace) -> int:
    from swinv2_scale.predict import predict

    settings = [*arguments.settings, f"precision={arguments.precision}"]
    if arguments.score is not None:
        settings.append(f"task.shown_from={arguments.score}")
    for line in predict(
        arguments.checkpoint, arguments.images, arguments.output, settings=settings, as_json=arguments.json
    ):
        print(line, flush=True)
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
