"""report.html of a run: one self-contained page, and its headline for the console.

Reads config.yaml, metrics.jsonl and pictures/ of a run directory; needs neither a plotting library nor a network.
The curves are SVG stretched to the width of the page, the labels are HTML laid over it: text keeps its size on every
screen. The page around them is report.html.template.
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
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import yaml

Series = dict[int, float]  # step -> value

_COLUMNS = 300  # pixel columns of a chart; each keeps its lowest and its highest value
_LISTED = 200  # unreadable samples named on the page
_NOT_METRICS = {"step", "time", "epoch", "samples", "seconds", "model_teraflops", "data_wait_max"}
SHARE = re.compile(r"top\d+|accuracy")  # held-out metrics in 0..1, shown in per cent
CHARTS = {  # key of a train line -> section, title with unit, factor to that unit
    "learning_rate": ("Optimisation", "Learning rate", 1),
    "gradient_norm": ("Optimisation", "Gradient norm", 1),
    "images_per_second": ("Speed", "Throughput (images/s)", 1),
    "utilisation": ("Speed", "Utilisation (% of the rate of matrix products)", 100),
    "data_wait": ("Speed", "Waiting for data (% of the time)", 100),
    "step_seconds": ("Speed", "Time of a step (s)", 1),
    "memory_gigabytes": ("Speed", "Memory (GB)", 1),
}
_BLOCK_CHARTS = {  # key of a blocks line -> title
    "amplitude": "Amplitude of each block's output, by depth (root mean square)",
    "logit_scale_mean": "Logit scale of each block, by depth (mean over heads)",
    "logit_scale_max": "Logit scale of each block, by depth (largest head)",
}
_CAPTIONS = {"reconstructions": "Each picture is a triptych: original | masked | reconstruction."}


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
        self.epoch = line.get("epoch", self.epoch)
        table = self.train if line["event"] == "train" else self.held_out
        for key, value in line.items():
            if type(value) in (int, float) and key not in _NOT_METRICS:
                table.setdefault(key, {})[step] = float(value)

    def steps(self) -> tuple[int, int]:
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


def _number(value: float) -> str:
    """Four significant digits, as people write them."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.4g}"


def _short(value: float) -> str:
    """For tick labels: 1.5M, 20k, 2e-5."""
    for least, factor, suffix in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / factor:.6g}{suffix}"
    return f"{value:.6g}".replace("e-0", "e-")


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


def held_out_rows(record: Record) -> list[tuple[str, str, str, str]]:
    """Of every held-out metric, shares first: label, first value ("" if there is but one), last value, change."""
    rows = []
    for key, series in sorted(record.held_out.items(), key=lambda item: not SHARE.fullmatch(item[0])):
        first, last, change = series[min(series)], series[max(series)], ""
        show = _percent if SHARE.fullmatch(key) else _number
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


def _finite(points: Series) -> list[tuple[int, float]]:
    """In order of the step."""
    return sorted((step, value) for step, value in points.items() if math.isfinite(value))


def _thin(points: Series) -> list[tuple[int, float]]:
    """A long series keeps the lowest and the highest value of each pixel column, and both ends."""
    ordered = _finite(points)
    if len(ordered) <= 2 * _COLUMNS:
        return ordered
    kept = {ordered[0], ordered[-1]}
    for column in range(_COLUMNS):
        chunk = ordered[column * len(ordered) // _COLUMNS : (column + 1) * len(ordered) // _COLUMNS]
        kept |= {min(chunk, key=lambda point: point[1]), max(chunk, key=lambda point: point[1])}
    return sorted(kept)


def smooth(points: Series) -> Series:
    """Mean over a thirtieth of the series, centred so that it does not lag, at some 200 places."""
    ordered = _finite(points)
    half = max(1, len(ordered) // 60)
    centres = range(half, len(ordered) - half, max(1, len(ordered) // 200))
    return {ordered[c][0]: statistics.fmean(v for _, v in ordered[c - half : c + half + 1]) for c in centres}


def _ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` multiples of 1, 2 or 5 times a power of ten in [low, high]."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for spacing in (power, 2 * power, 5 * power, 10 * power, 20 * power):
        first, last = math.ceil(low / spacing - 1e-9), math.floor(high / spacing + 1e-9)
        if last - first < most:
            break
    return [index * spacing for index in range(first, last + 1)]


def _axis(values: list[float], zero: bool) -> tuple[float, float, list[float], bool]:
    """Bounds and ticks of the vertical axis; whether it is logarithmic: bounds and ticks are then exponents of ten."""
    low, high = min(values), max(values)
    # Most values far below the highest: a spike, or a decay over decades. A cosine schedule stays linear.
    if low > 0 and high / low > 100 and statistics.median(values) < high / 10:
        low, high = math.log10(low), math.log10(high)
        digits = (1, 2, 5) if high - low < 2.5 else (1,)
        decades = range(math.floor(low), math.ceil(high) + 1, math.ceil((high - low) / 6))
        ticks = [decade + math.log10(digit) for decade in decades for digit in digits]
        return low, high, [tick for tick in ticks if low <= tick <= high], True
    if zero and low >= 0:
        low, high = 0.0, 1.06 * high or 1.0
    else:
        margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        low, high = low - margin, high + margin
    return low, high, _ticks(low, high, 5), False


def chart(
    record: Record,
    title: str,
    lines: list[tuple[str, str, Series]],
    zero: bool = False,
    wide: bool = False,
    span: tuple[int, int] | None = None,
    unit: str = "step",
) -> str:
    """A figure of several lines (label, CSS classes, points); "dots" among the classes marks every point.

    The horizontal axis is that of the record's steps, or of another unit, from the first to the last of `span`.
    """
    drawn = [(label, css, thin) for label, css, points in lines if (thin := _thin(points))]
    if not drawn:
        return ""
    start, stop = span or record.steps()
    stop = max(stop, start + 1)
    low, high, ticks, log = _axis([value for _, _, points in drawn for _, value in points], zero)

    def x(step: float) -> float:
        return round(1000 * (step - start) / (stop - start), 1)

    def y(value: float) -> float:  # of the axis: an exponent if it is logarithmic
        return round(100 * (high - value) / (high - low), 2)

    curves, readout = "", f"<span>{unit} <b>{drawn[0][2][-1][0]:,}</b></span>"
    for label, css, points in drawn:
        places = [(x(step), y(math.log10(value) if log else value)) for step, value in points]
        curves += f'<polyline class="{css}" points="{" ".join(f"{a:g},{b:g}" for a, b in places)}"/>'
        if len(places) == 1 or ("dots" in css and len(places) <= 80):
            curves += f'<path class="dot {css}" d="{"".join(f"M{a:g} {b:g}h0" for a, b in places)}"/>'
        data, last = " ".join(f"{step}:{_number(value)}" for step, value in points), _number(points[-1][1])
        readout += f'<span class="{css}" data-points="{data}">{escape(label)} <b>{last}</b></span>'
    marks = "".join(f"M{x(at):g} 0V100" for at in record.resumes() if start <= at <= stop and not span)
    grid = "".join(f"M0 {y(tick):g}H1000" for tick in ticks)
    labels = "".join(f'<i class="y" style="top:{y(t):g}%">{_short(10.0**t if log else t)}</i>' for t in ticks)
    labels += "".join(
        f'<i class="x" style="left:{x(t) / 10:g}%">{_short(t)}</i>' for t in _ticks(start, stop, 6) if t == round(t)
    )
    lost = sum(not math.isfinite(value) for _, _, points in lines for value in points.values())
    notes = ", ".join(["logarithmic"] * log + [f"not finite, not drawn: {lost:,}"] * (lost > 0))
    return f"""<figure class="chart{" wide" * wide}" data-steps="{start} {stop}">
<figcaption>{escape(title)} <small>{notes}</small></figcaption>
<div class="plot"><svg viewBox="0 0 1000 100" preserveAspectRatio="none" role="img" aria-label="{escape(title)}">
<path class="grid" d="{grid}"/><path class="mark" d="{marks}"/>{curves}</svg>{labels}<i class="cursor"></i></div>
<p class="readout">{readout}</p></figure>"""


def _curves(record: Record) -> str:
    """All charts, by section."""
    names = ("Training", "Held-out", "Optimisation", "Stability", "Speed", "Other")
    sections: dict[str, list[str]] = {name: [] for name in names}
    constant: list[str] = []
    shares: list[tuple[str, str, Series]] = []
    for key, series in record.held_out.items():
        if SHARE.fullmatch(key):
            css = f"{'bcd'[len(shares) % 3]} dots"
            shares.append((label_of(key), css, {step: 100 * value for step, value in series.items()}))
        else:
            sections["Held-out"].append(chart(record, f"Held-out {label_of(key)}", [("", "b dots", series)]))
    sections["Held-out"].insert(0, chart(record, "Held-out accuracy (%)", shares))
    other = [key for key in record.train if key not in {"loss", *CHARTS}]
    for key in ["loss", *CHARTS, *other]:
        default = ("Training" if key == "loss" else "Other", label_of(key).capitalize(), 1)
        section, title, factor = CHARTS.get(key, default)
        points = {step: factor * value for step, value in record.train.get(key, {}).items()}
        lines = [("training" if key in record.held_out else "", "a", points)]
        if key == "loss" and len(points) >= 20:  # fewer show their course by themselves
            lines = [("training", "a faint", points), ("smoothed", "a", smooth(points))]
        if key in record.held_out:
            lines += [("held-out", "b dots", {step: factor * value for step, value in record.held_out[key].items()})]
        if section == "Other" and len(set(points.values())) == 1:
            constant.append(f"{label_of(key)} {_number(next(iter(points.values())))}")
        elif points:
            sections[section].append(chart(record, title, lines, zero=key in CHARTS, wide=key == "loss"))
    sections["Stability"] = _stability(record)
    html = "".join(f'<h2>{name}</h2><div class="charts">{"".join(c)}</div>' for name, c in sections.items() if any(c))
    still = f" Always the same: {escape(', '.join(constant))}." if constant else ""
    resumed = " Dashed lines: the run was resumed." if record.resumes() else ""
    return html and f'{html}<p class="muted">Horizontal axes: optimiser step.{resumed}{still}</p>'


def _stability(record: Record) -> list[str]:
    """Amplitude and logit scales over depth, at the beginning, in the middle and at the end: one line each."""
    steps = sorted(record.blocks)
    chosen = list(dict.fromkeys(steps[at] for at in (0, len(steps) // 2, -1))) if steps else []
    charts = []
    for kind, title in _BLOCK_CHARTS.items():
        lines = []
        for css, step in zip("bca", chosen, strict=False):
            values = record.blocks[step].get(kind) or []
            points = {number: value for number, value in enumerate(values, start=1) if value is not None}
            lines.append((f"step {step:,}", f"{css} dots", points))
        if any(points for *_, points in lines):
            span = (1, max(max(points) for *_, points in lines if points))
            charts.append(chart(record, title, [line for line in lines if line[2]], zero=True, span=span, unit="block"))
    return charts


def _cards(record: Record) -> str:
    def values(key: str) -> list[float]:
        return [value for _, value in _finite(record.train.get(key, {}))]

    start = record.starts[-1] if record.starts else {}
    cards = [
        (f"held-out {label}", last, f"from {first}, {change}".strip(", ") if first else "")
        for label, first, last, change in held_out_rows(record)[:3]
    ]
    epochs = f"{_number(record.epoch)} epochs" if record.epoch is not None else ""
    cards.append(("steps", f"{record.steps()[1]:,}", epochs))
    if rates := values("images_per_second"):
        cards.append(("images/s", _number(statistics.median(rates)), "median"))
    if waits := values("data_wait"):
        cards.append(("waiting for data", _percent(statistics.fmean(waits)), "of the time"))
    attempts = f"in {len(record.starts)} attempts" if len(record.starts) > 1 else ""
    cards.append(("duration", _duration(record.seconds), attempts))
    if "world_size" in start:
        kind = ", ".join(str(start[key]) for key in ("device", "precision") if key in start)
        cards.append(("world size", str(start["world_size"]), kind))
    if "parameters" in start:
        cards.append(("parameters", f"{start['parameters'] / 1e6:,.4g} M", f"{start['parameters']:,}"))
    cell = '<div class="card"><span>{}</span><strong>{}</strong><small>{}</small></div>'
    return "".join(cell.format(*map(escape, card)) for card in cards)


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
    """Unreadable samples, attempts, data, versions, configuration."""
    html, start = "", record.starts[-1] if record.starts else {}
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
    template = resources.files("swinv2_scale").joinpath("report.html.template").read_text(encoding="utf-8")
    parts = {"times": times, "cards": cards, "curves": curves, "pictures": pictures, "details": details}
    return Template(template).substitute(name=escape(name), state=escape(state), **parts)
