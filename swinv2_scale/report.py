"""report.html of a run: one self-contained page, and its headline for the console.

Reads config.yaml, metrics.jsonl and pictures/ of a run directory; needs neither a plotting library nor a network.
The page around what is said here is report.html.template, its script report.js.template.
"""

import base64
import json
import math
import mimetypes
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import yaml

from swinv2_scale.charts import Series, Span, chart, finite, map_of_blocks, number, smooth

_LISTED = 200  # unreadable samples named on the page
_NOT_METRICS = {"step", "time", "epoch", "samples", "seconds", "model_teraflops"}
SHARE = re.compile(r"top\d+|accuracy")  # held-out metrics in 0..1, shown in per cent
_DETAIL = re.compile(r"(box|mask)_(ap_|ar).*|images")  # of COCO's two dozen numbers those that only a table shows
CHARTS = {  # key of a train line -> section, title with unit, factor to that unit
    "learning_rate": ("Optimisation", "Learning rate", 1),
    "gradient_norm": ("Optimisation", "Gradient norm", 1),
    "images_per_second": ("Speed", "Throughput (images/s)", 1),
    "utilisation": ("Speed", "Utilisation (% of the rate of matrix products)", 100),
    "data_wait": ("Speed", "Waiting for data (% of the time)", 100),
    "step_seconds": ("Speed", "Time of a step (s)", 1),
    "forward_seconds_max": ("Speed", "Forward passes of a step, slowest rank (s)", 1),
    "memory_gigabytes": ("Speed", "Memory (GB)", 1),
}
_BESIDE = {  # key of a chart -> what its line is called, another key for the same chart, what that is called
    "data_wait": ("mean of the ranks", "data_wait_max", "largest of the ranks"),
    "forward_seconds_max": ("slowest rank", "forward_seconds_min", "fastest rank"),
}
_NO_CHART = {"slowest_rank", *(key for _, key, _ in _BESIDE.values())}  # which are shown in other ways
_BLOCK_CHARTS = {  # key of a blocks line -> title
    "amplitude": "Amplitude of each block's output, by depth (root mean square)",
    "logit_scale_mean": "Logit scale of each block, by depth (mean over heads)",
    "logit_scale_max": "Logit scale of each block, by depth (largest head)",
}
ZOOM = "Drag over a chart to look closer, in all of them; double-click to see the whole again."
_CAPTIONS = {
    "reconstructions": "Each picture is a triptych: original | masked | reconstruction.",
    "detections": "Prediction | truth; of the first held-out images those with most mistakes, the worst first.",
    "segmentations": "Prediction | truth; of the first held-out images those with most wrong pixels, the worst first.",
}


@dataclass
class Record:
    """What a run directory says, with work that was redone after a resume counted once."""

    run_dir: Path
    name: str
    config: str
    starts: list[dict[str, Any]] = field(default_factory=list)
    train: dict[str, Series] = field(default_factory=dict)
    held_out: dict[str, Series] = field(default_factory=dict)
    blocks: dict[int, dict[str, Any]] = field(default_factory=dict)  # step -> a list for each kind of number
    pictures: dict[str, dict[str, Any]] = field(default_factory=dict)
    corrupt: Counter[str] = field(default_factory=Counter)
    state: str = "running or interrupted"
    epoch: float | None = None
    seconds: float = 0.0
    last_time: float | None = None

    def add_numbers(self, line: dict[str, Any], first_of_attempt: bool) -> None:
        """Take in a "train" or "evaluation" line; of one step, the later line wins."""
        step = line["step"]
        if first_of_attempt:  # the attempt continues from a checkpoint: what an earlier one did beyond it is void
            for table in (self.train, self.held_out):
                table.update({key: {at: v for at, v in old.items() if at <= step} for key, old in table.items()})
            self.blocks = {at: kinds for at, kinds in self.blocks.items() if at <= step}
        self.epoch = line.get("epoch", self.epoch)
        table = self.train if line["event"] == "train" else self.held_out
        for key, value in line.items():
            if type(value) in (int, float) and key not in _NOT_METRICS:
                table.setdefault(key, {})[step] = float(value)

    def steps(self) -> Span:
        """First and last step on the axes; (0, 0) before the first line with numbers."""
        found = [step for series in (*self.train.values(), *self.held_out.values()) for step in series]
        return min(found, default=0), max(found, default=0)

    def resumes(self) -> list[int]:
        return [start["step"] for start in self.starts[1:]]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The record's lines; an incomplete last line (the run was killed while writing it) is left out."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            try:
                line = json.loads(raw)
                if not (isinstance(line, dict) and "event" in line and isinstance(line.get("step"), int)):
                    raise ValueError('expected an object with "event" and an integer "step"')
            except ValueError as error:
                if not raw.endswith(b"\n"):
                    return
                text = raw[:80].decode(errors="replace").strip()
                raise ValueError(f"{path}, line {number}: {text!r}: {error}. Repair or delete this line.") from None
            yield line


def read(run_dir: Path) -> Record:
    path, config_path = Path(run_dir) / "metrics.jsonl", Path(run_dir) / "config.yaml"
    if not path.is_file():
        raise ValueError(
            f"{run_dir} is not a run directory: {path} does not exist. A run directory contains config.yaml (the "
            "resolved configuration), metrics.jsonl (the record) and perhaps pictures/. Name the directory of one run."
        )
    config = config_path.read_text(encoding="utf-8") if config_path.is_file() else ""
    try:
        parsed = yaml.safe_load(config)
    except yaml.YAMLError as error:
        raise ValueError(f"{config_path} is not valid YAML: {error}. Repair or delete it.") from None
    name = parsed.get("name") if isinstance(parsed, dict) else None
    record = Record(Path(run_dir), str(name or Path(run_dir).resolve().name), config)
    first_of_attempt, before = False, None
    for line in _lines(path):
        event, time = line["event"], line.get("time")
        if event == "start":
            record.starts.append(line)
            record.state, first_of_attempt, before = Record.state, True, time  # the pause before it does not count
        elif event in ("train", "evaluation"):
            record.add_numbers(line, first_of_attempt)
            first_of_attempt = False
        elif event == "blocks":
            record.blocks[line["step"]] = line
        elif event == "pictures":
            record.pictures[str(line.get("name"))] = line
        elif event == "corrupt":
            record.corrupt[str(line.get("sample"))] += 1
        elif event == "end":
            record.state = str(line.get("reason", "ended"))
        if time is not None:
            record.seconds += time - before if before is not None else 0
            record.last_time = before = time
        if event == "end" and len(record.starts) == 1:
            record.seconds = line.get("seconds") or record.seconds  # the run's own clock
    return record


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _duration(seconds: float) -> str:
    for unit, size, least in (("days", 86400, 172800), ("h", 3600, 3600), ("min", 60, 60)):
        if seconds >= least:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def _clock(time: float) -> str:
    return datetime.fromtimestamp(time, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def label_of(key: str) -> str:
    return re.sub(r"^top(\d)", r"top-\1", key).replace("_", " ")


def held_out_rows(record: Record, *, details: bool = False) -> list[tuple[str, str, str, str]]:
    """Of every held-out metric, shares and average precisions first, or of those that are details: label, first value
    ("" if there is but one), last value, change."""
    rows = []
    for key, series in sorted(
        record.held_out.items(), key=lambda item: not (SHARE.fullmatch(item[0]) or item[0].endswith("_ap"))
    ):
        if bool(_DETAIL.fullmatch(key)) != details:
            continue
        first, last, change = series[min(series)], series[max(series)], ""
        show = _percent if SHARE.fullmatch(key) else number
        if show is _percent:
            change = f"{100 * (last - first):+.1f} points"
        elif first and math.isfinite(last / first):
            change = f"{_percent(abs(last / first - 1))} {'lower' if last < first else 'higher'}"
        several = len(series) > 1
        rows.append((label_of(key), show(first) * several, show(last), change * several))
    return rows


def headline(run_dir: Path) -> str:
    """Two or three lines of plain text: name and steps, first and last held-out values, the path of the report."""
    record = read(run_dir)
    lines = [f"{record.name}: step {record.steps()[1]:,}, {record.state}, {_duration(record.seconds)}"]
    values = [
        f"held-out {label} " + (f"{first} -> {last}" if first else last) + (f" ({change})" if change else "")
        for label, first, last, change in held_out_rows(record)
    ]
    return "\n".join([*lines, *filter(None, [", ".join(values)]), f"report: {record.run_dir / 'report.html'}"])


def _curves(record: Record) -> str:
    """All charts, by section."""
    names = ("Training", "Held-out", "Optimisation", "Stability", "Speed", "Other")
    sections: dict[str, list[str]] = {name: [] for name in names}
    constant: list[str] = []
    shares: list[tuple[str, str, Series]] = []
    draw = partial(chart, span=record.steps(), marks=record.resumes())
    for key, series in record.held_out.items():
        if SHARE.fullmatch(key):
            css = f"{'bcd'[len(shares) % 3]} dots"
            shares.append((label_of(key), css, {step: 100 * value for step, value in series.items()}))
        elif not _DETAIL.fullmatch(key):
            sections["Held-out"].append(draw(f"Held-out {label_of(key)}", [("", "b dots", series)]))
    sections["Held-out"].insert(0, draw("Held-out accuracy (%)", shares))
    other = [key for key in record.train if key not in {"loss", *CHARTS, *_NO_CHART}]
    for key in ["loss", *CHARTS, *other]:
        default = ("Training" if key == "loss" else "Other", label_of(key).capitalize(), 1)
        section, title, factor = CHARTS.get(key, default)
        points = {step: factor * value for step, value in record.train.get(key, {}).items()}
        lines = [("training" if key in record.held_out else "", "a", points)]
        if key == "loss" and len(points) >= 20:  # fewer show their course by themselves
            lines = [("training", "a faint", points), ("smoothed", "a", smooth(points))]
        if key in _BESIDE:
            own, beside, name = _BESIDE[key]
            others = {step: factor * value for step, value in record.train.get(beside, {}).items()}
            if others and others != points:  # with one rank they are the same
                lines = [(own, "a", points), (name, "c", others)]
        if key in record.held_out:
            lines += [("held-out", "b dots", {step: factor * value for step, value in record.held_out[key].items()})]
        if section == "Other" and len(set(points.values())) == 1:
            constant.append(f"{label_of(key)} {number(next(iter(points.values())))}")
        elif points:
            sections[section].append(draw(title, lines, zero=key in CHARTS, wide=key == "loss"))
    sections["Stability"] = _stability(record)
    html = "".join(f'<h2>{name}</h2><div class="charts">{"".join(c)}</div>' for name, c in sections.items() if any(c))
    still = f" Always the same: {escape(', '.join(constant))}." if constant else ""
    resumed = " Dashed lines: the run was resumed." if record.resumes() else ""
    return html and f'{html}<p class="muted">Horizontal axes: optimiser step.{resumed} {ZOOM}{still}</p>'


def _stability(record: Record) -> list[str]:
    """Amplitudes over steps and depth; then amplitude and logit scales over depth, a line each of three moments: the
    beginning, the middle and the end."""
    steps = sorted(record.blocks)
    chosen = list(dict.fromkeys(steps[at] for at in (0, len(steps) // 2, -1))) if steps else []
    amplitudes = {step: kinds["amplitude"] for step, kinds in record.blocks.items() if kinds.get("amplitude")}
    title = "Amplitude of each block's output, by depth and step"
    charts = [map_of_blocks(title, "amplitude", amplitudes, record.steps(), record.resumes())]
    for kind, title in _BLOCK_CHARTS.items():
        lines = []
        for css, step in zip("bca", chosen, strict=False):
            values = record.blocks[step].get(kind) or []
            points = {block: value for block, value in enumerate(values, start=1) if value is not None}
            lines.append((f"step {step:,}", f"{css} dots", points))
        if any(points for *_, points in lines):
            span = (1, max(max(points) for *_, points in lines if points))
            charts.append(chart(title, [line for line in lines if line[2]], span, zero=True, unit="block"))
    return charts


def _cards(record: Record) -> str:
    def values(key: str) -> list[float]:
        return [value for _, value in finite(record.train.get(key, {}))]

    start = record.starts[-1] if record.starts else {}
    cards = [
        (f"held-out {label}", last, f"from {first}, {change}".strip(", ") if first else "")
        for label, first, last, change in held_out_rows(record)[:3]
    ]
    epochs = f"{number(record.epoch)} epochs" if record.epoch is not None else ""
    cards.append(("steps", f"{record.steps()[1]:,}", epochs))
    if rates := values("images_per_second"):
        cards.append(("images/s", number(statistics.median(rates)), "median"))
    if waits := values("data_wait"):
        cards.append(("waiting for data", _percent(statistics.fmean(waits)), "of the time"))
    attempts = f"in {len(record.starts)} attempts" if len(record.starts) > 1 else ""
    if slow := values("slowest_rank"):
        rank, times = Counter(slow).most_common(1)[0]
        ratios = [
            a / b for a, b in zip(values("forward_seconds_max"), values("forward_seconds_min"), strict=False) if b
        ]
        if ratios and start.get("world_size", 1) > 1:
            slower = f"forward {_percent(statistics.median(ratios) - 1)} slower"
            cards.append(("slowest rank", f"{rank:.0f}", f"most often ({100 * times / len(slow):.0f} %), {slower}"))
    cards.append(("duration", _duration(record.seconds), attempts))
    if "world_size" in start:
        kind = ", ".join(str(start[key]) for key in ("device", "precision") if key in start)
        cards.append(("world size", str(start["world_size"]), kind))
    if "parameters" in start:
        cards.append(("parameters", f"{start['parameters'] / 1e6:,.4g} M", f"{start['parameters']:,}"))
    cell = '<div class="card"><span>{}</span><strong>{}</strong><small>{}</small></div>'
    return "".join(cell.format(*(escape(text).replace(" %", "&nbsp;%") for text in card)) for card in cards)


def _pictures(record: Record) -> str:
    html = ""
    for name, line in record.pictures.items():
        html += f'<h2>{escape(name.capitalize())}</h2><p class="muted">At step {line["step"]:,}. '
        html += f'{_CAPTIONS.get(name, "")}</p><div class="pictures{" wide" * (name in _CAPTIONS)}">'
        for item in sorted(line["items"], key=lambda item: item.get("good") is not False):  # failures first
            path, caption = record.run_dir / item["file"], escape(str(item.get("caption") or ""))
            kind = mimetypes.guess_type(path.name)[0] or ""
            picture = f"<p>{escape(item['file'])} is missing or not a picture.</p>"
            if path.is_file() and kind.startswith("image/"):
                data = base64.b64encode(path.read_bytes()).decode()
                picture = f'<img alt="{caption}" src="data:{kind};base64,{data}">'
            css, mark = {True: ("good", "&#10003; "), False: ("bad", "&#10007; ")}.get(item.get("good"), ("", ""))
            html += f'<figure class="{css}">{picture}<figcaption>{mark}{caption}</figcaption></figure>'
        html += "</div>"
    return html


def table(title: str, rows: Iterable[tuple[Any, ...]], head: tuple[str, ...] = ()) -> str:
    html = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    return f'<div class="table"><h3>{title}</h3><table><tr>{top}</tr>{html}</table></div>' if html else ""


def _details(record: Record) -> str:
    """Further held-out values, unreadable samples, attempts, data, versions, configuration."""
    start = record.starts[-1] if record.starts else {}
    further = table("Further held-out values", held_out_rows(record, details=True), ("", "first", "last", "change"))
    html = f'<div class="tables">{further}</div>' if further else ""
    if record.corrupt:
        times = [f"{sample} ({count} times)" if count > 1 else sample for sample, count in record.corrupt.items()]
        items = times[:_LISTED] + [f"and {len(times) - _LISTED:,} more in metrics.jsonl"] * (len(times) > _LISTED)
        html += f"<h2>Unreadable samples</h2><details{' open' * (len(times) <= 10)}><summary>{len(times):,} left out"
        html += f"</summary><ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul></details>"
    head = ("attempt", "step", "time", "world_size", "device", "precision")
    attempts = [[_clock(a[key]) if key == "time" else a.get(key, "") for key in head] for a in record.starts]
    data = [(split, key, value) for split, facts in start.get("data", {}).items() for key, value in facts.items()]
    tables = table("Attempts", map(tuple, attempts), tuple(map(label_of, head)))
    tables += table("Data", data) + table("Versions", start.get("versions", {}).items())
    html += f'<h2>How it was run</h2><div class="tables">{tables}</div>' if tables else ""
    if record.config:
        html += f"<details><summary>Configuration (config.yaml)</summary><pre>{escape(record.config)}</pre></details>"
    return html


def write_report(run_dir: Path) -> Path:
    """Write run_dir/report.html from the record of a finished or running run, and return its path.

    Raises ValueError if run_dir has no metrics.jsonl, or if a line other than an incomplete last one is malformed.
    """
    record = read(run_dir)
    times = [f"started {_clock(start['time'])}" for start in record.starts[:1]]
    times += [f"last record {_clock(record.last_time)}"] if record.last_time is not None else []
    content = {"cards": _cards(record), "curves": _curves(record), "pictures": _pictures(record)}
    content |= {"details": _details(record), "times": " &middot; ".join(times)}
    path = record.run_dir / "report.html"
    path.write_text(page(record.name, record.state, **content), encoding="utf-8")
    return path


def page(name: str, state: str, *, times: str, cards: str, curves: str, pictures: str, details: str) -> str:
    """The whole page, from the HTML of its parts; name and state are text."""
    room = resources.files("swinv2_scale")
    template, script = (room.joinpath(f"report.{kind}.template").read_text("utf-8") for kind in ("html", "js"))
    parts = {"times": times, "cards": cards, "curves": curves, "pictures": pictures, "details": details}
    return Template(template).substitute(name=escape(name), state=escape(state), script=script, **parts)
