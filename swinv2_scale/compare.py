"""A page that compares runs: their curves over each other, their results, and in what their configurations differ."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from swinv2_scale import report
from swinv2_scale.charts import chart, smooth

COLOURS = "abcd"  # of the page's style


def write_comparison(run_dirs: Sequence[Path], destination: Path) -> Path:
    """Write one self-contained page on two to four runs, and return its path.

    Raises ValueError for another number of runs, and for a directory that is none.
    """
    if not 2 <= len(run_dirs) <= len(COLOURS):
        raise ValueError(f"{len(run_dirs)} run(s) to compare: name two to {len(COLOURS)} run directories")
    records = [report.read(path) for path in run_dirs]
    names = _names(records)
    page = report.page(
        " and ".join(names),
        f"{len(records)} runs",
        times="",
        cards="",
        curves=_curves(records, names),
        pictures="",
        details=_results(records, names) + _differences(records, names),
    )
    destination.write_text(page, encoding="utf-8")
    return destination


def _names(records: Sequence[report.Record]) -> list[str]:
    """Names of the runs; their directories where two are the same."""
    names = [record.name for record in records]
    return names if len(set(names)) == len(names) else [str(record.run_dir) for record in records]


def _curves(records: Sequence[report.Record], names: Sequence[str]) -> str:
    steps = [step for record in records for step in record.steps()]
    span = (min(steps), max(steps))
    charts = []
    for table, prefix in (("train", ""), ("held_out", "Held-out ")):
        for key in dict.fromkeys(key for record in records for key in getattr(record, table)):
            if table == "train" and key not in ("loss", *report.CHARTS):
                continue
            _, title, factor = report.CHARTS.get(key, ("", prefix + report.label_of(key), 1))
            lines = []
            for css, name, record in zip(COLOURS, names, records, strict=False):
                points = {step: factor * value for step, value in getattr(record, table).get(key, {}).items()}
                many = table == "train" and key == "loss" and len(points) >= 20
                dots = " dots" * (table == "held_out")
                lines.append((name, css + dots, smooth(points) if many else points))
            title = title[:1].upper() + title[1:]
            charts.append(chart(title, lines, span, wide=key == "loss"))
    return f'<div class="charts">{"".join(charts)}</div><p class="muted">{report.ZOOM}</p>'


def _results(records: Sequence[report.Record], names: Sequence[str]) -> str:
    """The last value of every held-out metric."""
    rows_of = [report.held_out_rows(one) + report.held_out_rows(one, details=True) for one in records]
    last = [{label: value for label, _, value, _ in rows} for rows in rows_of]
    labels = dict.fromkeys(label for found in last for label in found)
    rows = [(label, *(found.get(label, "") for found in last)) for label in labels]
    rows.append(("steps", *(f"{record.steps()[1]:,}" for record in records)))
    table = report.table("Last values", rows, ("", *names))
    return f'<h2>Results</h2><div class="tables">{table}</div>'


def _differences(records: Sequence[report.Record], names: Sequence[str]) -> str:
    """The settings that are not the same in all runs."""
    found = [_flat(yaml.safe_load(record.config) or {}) for record in records]
    keys = dict.fromkeys(key for settings in found for key in settings)
    rows = [(key, *(str(settings.get(key, "–")) for settings in found)) for key in keys]
    rows = [row for row in rows if len(set(row[1:])) > 1 and row[0] not in ("name", "run_dir")]
    table = report.table("Settings that differ", rows, ("", *names)) or "<p>All settings are the same.</p>"
    return f'<h2>Configuration</h2><div class="tables">{table}</div>'


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """optim.lr: 0.1 from optim: {lr: 0.1}."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
