"""The report of a run: what it shows is what the record says, and the page stands alone."""

import base64
import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from swinv2_scale.compare import write_comparison
from swinv2_scale.report import headline, write_report

PIXEL = base64.b64decode(  # a PNG of one pixel
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
VERSIONS = {"torch": "2.14.1"}
DATA = {"train": {"samples": 1437, "hash": "b1946ac9"}}


def start(step: int = 0, **more: Any) -> dict[str, Any]:
    facts = {"attempt": 0, "world_size": 2, "device": "cpu", "parameters": 2345678, "precision": "bf16"}
    return {"event": "start", "step": step, "time": 1000.0, **facts, "versions": VERSIONS, "data": DATA, **more}


def train(step: int, loss: float, **more: Any) -> dict[str, Any]:
    return {"event": "train", "step": step, "time": 1000.0 + step, "loss": loss, **more}


def evaluation(step: int, **metrics: float) -> dict[str, Any]:
    return {"event": "evaluation", "step": step, "time": 1000.0 + step, "samples": 360, **metrics}


def make_run(run_dir: Path, lines: list[dict[str, Any]], tail: str = "") -> Path:
    (run_dir / "config.yaml").write_text("name: digits\noptim:\n  learning_rate: 0.0008\n")
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return run_dir


def page_of(run_dir: Path) -> str:
    return write_report(run_dir).read_text(encoding="utf-8")


def text_of(page: str) -> str:
    """What a reader sees: no tags, style or script."""
    page = re.sub(r"<(style|script)>.*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", page)).split())


def points_of(page: str, title: str) -> list[list[tuple[int, float]]]:
    """(step, value) of every line of the chart of this title."""
    figure = page.partition(f"<figcaption>{title} ")[2].partition("</figure>")[0]
    lines = [[point.split(":") for point in line.split()] for line in re.findall(r'data-points="([^"]*)"', figure)]
    return [[(int(step), float(value.replace(",", ""))) for step, value in line] for line in lines]


def test_the_page_shows_the_numbers_of_the_record(tmp_path: Path) -> None:
    speed = {
        "images_per_second": 250.5,
        "data_wait": 0.031,
        "gradient_norm": None,
        "skipped": False,
        "weight_decay": 0.05,
    }
    lines = [
        start(),
        evaluation(0, loss=0.982, top1=0.1),
        train(10, 0.9, learning_rate=0.0008, epoch=0.5, loss_scale=65536.0, **speed),
        train(20, 0.5, learning_rate=0.0004, epoch=1.25, loss_scale=32768.0, **speed),
        evaluation(20, loss=0.431, top1=0.981),
        {"event": "end", "step": 20, "time": 1200.0, "reason": "finished", "seconds": 123.4},
    ]
    page = page_of(make_run(tmp_path, lines))
    text = text_of(page)
    for shown in (
        "digits finished",
        "held-out top-1 98.1 % from 10.0 %, +88.1 points",
        "held-out loss 0.431 from 0.982, 56.1 % lower",
        "steps 20 1.25 epochs",
        "images/s 250.5 median",
        "waiting for data 3.1 % of the time",
        "duration 2.1 min",
        "world size 2 cpu, bf16",
        "parameters 2.346 M 2,345,678",
        "train samples 1437",
        "torch 2.14.1",
        "learning_rate: 0.0008",
    ):
        assert shown in text, shown
    assert points_of(page, "Loss") == [[(10, 0.9), (20, 0.5)], [(0, 0.982), (20, 0.431)]]
    assert points_of(page, "Learning rate") == [[(10, 0.0008), (20, 0.0004)]]
    assert points_of(page, "Waiting for data (% of the time)") == [[(10, 3.1), (20, 3.1)]]
    assert points_of(page, "Loss scale") == [[(10, 65536), (20, 32768)]], "an unknown metric gets a chart"
    assert points_of(page, "Weight decay") == [] and "Always the same: weight decay 0.05." in text
    assert "Gradient norm" not in text, "a metric without values gets none"
    assert "Skipped" not in text, "what is not a number gets none"
    assert headline(tmp_path).splitlines() == [
        "digits: step 20, finished, 2.1 min",
        "held-out top-1 10.0 % -> 98.1 % (+88.1 points), held-out loss 0.982 -> 0.431 (56.1 % lower)",
        f"report: {tmp_path / 'report.html'}",
    ]


def test_of_cocos_numbers_six_are_in_the_headline_and_the_rest_in_a_table(tmp_path: Path) -> None:
    names = [
        f"{kind}_{name}" for kind in ("box", "mask") for name in ("ap", "ap50", "ap75", "ap_small", "ar1", "ar_large")
    ]
    lines = [start(), *(evaluation(step, **dict.fromkeys(names, step / 100), images=9) for step in (10, 20))]
    page = page_of(make_run(tmp_path, lines))
    shown = headline(tmp_path).splitlines()[1].split(", ")
    labels = ("box ap", "mask ap", "box ap50", "box ap75", "mask ap50", "mask ap75")
    assert shown == [f"held-out {label} 0.1 -> 0.2 (100.0 % higher)" for label in labels]
    assert points_of(page, "Held-out box ap75") == [[(10, 0.1), (20, 0.2)]]
    assert "Held-out box ar1" not in text_of(page), "a detail gets no chart"
    table = text_of(page).partition("Further held-out values first last change")[2]
    assert table.startswith(" box ap small 0.1 0.2 100.0 % higher box ar1 0.1 0.2")
    assert "mask ar large 0.1 0.2 100.0 % higher images 9 9" in table


def test_missing_pieces_leave_their_section_out(tmp_path: Path) -> None:
    text = text_of(page_of(make_run(tmp_path, [start(), train(1, 0.9)])))
    assert "running or interrupted" in text
    for section in ("Held-out", "Reconstructions", "Predictions", "Unreadable", "Dashed", "Optimisation"):
        assert section not in text
    assert len(headline(tmp_path).splitlines()) == 2
    text = text_of(page_of(make_run(tmp_path, [])))
    assert "Training" not in text
    assert "Configuration" in text


def test_of_a_resumed_run_the_later_lines_win(tmp_path: Path) -> None:
    first = [
        start(),
        *(train(step, 1.0) for step in (10, 20, 30, 40)),
        evaluation(20, loss=3.0),
        evaluation(40, loss=2.0),
    ]
    second = [start(20, attempt=1, time=5000.0), *(train(step, 0.5, time=5000.0 + step) for step in (30,))]
    page = page_of(make_run(tmp_path, first + second))
    assert points_of(page, "Loss") == [[(10, 1.0), (20, 1.0), (30, 0.5)], [(20, 3.0)]], "void work is not shown"
    assert "Dashed lines: the run was resumed." in page
    assert 'class="mark" d="M500 0V100"' in page
    assert "duration 1.2 min in 2 attempts" in text_of(page), "40 s and 30 s; the pause between them does not count"
    last = [train(40, 0.4, time=5040.0), evaluation(40, loss=1.0, time=5041.0)]
    page = page_of(make_run(tmp_path, first + second + last))
    assert points_of(page, "Loss") == [[(10, 1.0), (20, 1.0), (30, 0.5), (40, 0.4)], [(20, 3.0), (40, 1.0)]]
    assert "held-out loss 3 -> 1 (66.7 % lower)" in headline(tmp_path)


def test_a_cut_off_last_line_is_ignored(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, [start(), train(10, 0.9)], tail='{"event":"train","step":20,"lo')
    assert points_of(page_of(run_dir), "Loss") == [[(10, 0.9)]]


@pytest.mark.parametrize("broken", ['{"event":"train","st', '{"event":"train"}', '["train"]', "\x00\x00"])
def test_a_malformed_line_in_the_middle_is_an_error(tmp_path: Path, broken: str) -> None:
    run_dir = make_run(tmp_path, [start()], tail=broken + "\n" + json.dumps(train(20, 0.5)) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: .*Repair or delete"):
        write_report(run_dir)


def test_a_directory_without_a_record_is_an_error(tmp_path: Path) -> None:
    for call in (write_report, headline):
        with pytest.raises(ValueError, match="A run directory contains") as error:
            call(tmp_path / "nowhere")
        assert str(tmp_path / "nowhere" / "metrics.jsonl") in str(error.value)
    run_dir = make_run(tmp_path, [start()])
    (run_dir / "config.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"config\.yaml is not valid YAML"):
        write_report(run_dir)


def test_pictures_of_the_last_set_with_failures_first(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(PIXEL)

    def pictures(step: int, name: str, *items: tuple[str, bool | None]) -> dict[str, Any]:
        shown = [{"file": "pictures/a.png", "caption": caption, "good": good} for caption, good in items]
        return {"event": "pictures", "step": step, "time": 1000.0, "name": name, "items": shown}

    lost = {"event": "pictures", "step": 2, "time": 1000.0, "name": "lost", "items": [{"file": "pictures/gone.png"}]}
    run_dir = make_run(
        tmp_path,
        [
            start(),
            pictures(1, "predictions", ("early", True)),
            pictures(2, "predictions", ("right", True), ("wrong", False), ("unknown", None)),
            pictures(2, "reconstructions", ("error 0.1", None)),
            lost,
        ],
    )
    page = page_of(run_dir)
    captions = re.findall(r'<figure class="(\w*)"><img .*?<figcaption>(?:&#\d+; )?(.*?)</figcaption>', page)
    assert captions == [("bad", "wrong"), ("good", "right"), ("", "unknown"), ("", "error 0.1")]
    assert page.count(f'src="data:image/png;base64,{base64.b64encode(PIXEL).decode()}"') == 4
    assert "original | masked | reconstruction" in page
    assert "pictures/gone.png is missing" in page


def test_hostile_text_is_escaped(tmp_path: Path) -> None:
    evil = "</figcaption>\"'><script>alert(1)</script>$name"
    (tmp_path / "a.png").write_bytes(PIXEL)
    item = {"file": "a.png", "caption": evil, "good": False}
    lines = [
        start(device=evil, versions={evil: evil}, data={evil: {evil: evil}}),
        {**train(1, 0.9), evil: 1.0},
        {**evaluation(1), evil: 1.0},
        {"event": "pictures", "step": 1, "time": 1000.0, "name": evil, "items": [item, {"file": evil}]},
        {"event": "corrupt", "step": 1, "time": 1000.0, "sample": evil},
        {"event": "end", "step": 1, "time": 1000.0, "reason": evil},
    ]
    run_dir = make_run(tmp_path, lines)
    (run_dir / "config.yaml").write_text(json.dumps({"name": evil}))
    page = page_of(run_dir)
    assert page.count("<script>") == 1, "the page's own"
    assert "<script>alert" not in page
    assert evil in unescape(page)


def test_unreadable_samples_are_counted_and_listed(tmp_path: Path) -> None:
    corrupt = [{"event": "corrupt", "step": 1, "time": 1000.0, "sample": f"shard-{i % 300}.tar"} for i in range(301)]
    text = text_of(page_of(make_run(tmp_path, [start(), *corrupt])))
    assert "300 left out shard-0.tar (2 times) shard-1.tar " in text
    assert "shard-199.tar and 100 more" in text


def test_the_page_stands_alone(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path, [start(), train(1, 0.9), evaluation(1, top1=0.9)]))
    assert "<link" not in page
    assert "@import" not in page
    assert "url(" not in page
    assert not re.search(r"https?://", page)
    assert all(target.startswith("data:") for target in re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', page))


def test_long_series_are_thinned_but_keep_their_extremes(tmp_path: Path) -> None:
    lines = [train(step, 2.0 + step % 7 / 10, gradient_norm=1.0) for step in range(1, 30_001)]
    lines[12_345]["loss"], lines[23_456]["loss"], lines[7]["loss"] = 9.5, 0.25, float("nan")
    page = page_of(make_run(tmp_path, [start(), *lines]))
    loss, smoothed = points_of(page, "Loss")
    assert {(12_346, 9.5), (23_457, 0.25), (1, 2.1), (30_000, 2.5)} <= set(loss)
    assert len(loss) <= 1202
    assert loss == sorted(loss)
    assert all(abs(value - 2.3) < 0.02 for _, value in smoothed)
    assert "not finite, not drawn: 1" in page
    assert len(page) < 150_000


def test_the_axis_is_logarithmic_where_values_span_decades(tmp_path: Path) -> None:
    cosine, decay = [1e-6, 1e-3, 8e-4, 5e-4, 2e-4, 1e-6], [1e-3, 1e-3, 1e-4, 1e-5, 1e-6, 1e-6]
    for rates, logarithmic in ((cosine, False), (decay, True)):
        lines = [train(step, 1.0, learning_rate=rate) for step, rate in enumerate(rates)]
        page = page_of(make_run(tmp_path, [start(), *lines]))
        assert ("Learning rate <small>logarithmic" in page) == logarithmic
        labels = page.partition("<figcaption>Learning rate ")[2].partition("</figure>")[0]
        assert ('">1e-5</i>' in labels) == logarithmic


def test_amplitudes_are_shown_over_depth(tmp_path: Path) -> None:
    """At the first, the middle and the last step that has them."""
    lines = [start()]
    for step in (10, 20, 30, 40):
        lines.append(train(step, 1.0))
        scales = {"logit_scale_mean": [10.0, None, 12.0], "logit_scale_max": [11.0, 12.0, 13.0]}
        lines.append({"event": "blocks", "step": step, "time": 1.0, "amplitude": [step, 2.0, 3.5], **scales})
    page = page_of(make_run(tmp_path, lines))
    title = "Amplitude of each block&#x27;s output, by depth (root mean square)"
    assert points_of(page, title) == [[(1, step), (2, 2.0), (3, 3.5)] for step in (10, 30, 40)]
    assert points_of(page, "Logit scale of each block, by depth (mean over heads)")[0] == [(1, 10.0), (3, 12.0)]
    assert "step 10 3.5" in text_of(page) and "block 3" in text_of(page)


def test_amplitudes_are_shown_over_steps_and_depth(tmp_path: Path) -> None:
    """With the first and the last step; what an attempt did beyond a resume is left out, what is not finite is red."""

    def blocks(step: int, *amplitude: float | None) -> dict[str, Any]:
        return {"event": "blocks", "step": step, "time": 1.0, "amplitude": amplitude}

    lines = [start()]
    for step in range(0, 300):
        lines += [train(step, 1.0), blocks(step, 0.5 + step, 2.0)]
    lines += [start(200, attempt=1), train(201, 1.0), blocks(201, None, 3000.0)]
    page = page_of(make_run(tmp_path, lines))
    (cells,) = re.findall(r'data-cells="([^"]*)"', page)
    columns = cells.split(";")
    assert columns[0] == "0:0.5,2" and columns[-1] == "201:not finite,3000" and len(columns) == 80
    assert page.count('class="cell lost"') == 1 and "all: 0.5 to 3,000" in text_of(page)


def test_the_spread_of_the_ranks_is_shown(tmp_path: Path) -> None:
    spread = {"data_wait": 0.1, "data_wait_max": 0.2, "forward_seconds_min": 0.5, "slowest_rank": 1}
    lines = [start(), *(train(step, 1.0, forward_seconds_max=0.6, **spread) for step in (1, 2, 3))]
    page = page_of(
        make_run(tmp_path, [*lines, train(4, 1.0, forward_seconds_max=0.6, **{**spread, "slowest_rank": 0})])
    )
    steps = range(1, 5)
    assert points_of(page, "Forward passes of a step, slowest rank (s)") == [
        [(step, value) for step in steps] for value in (0.6, 0.5)
    ]
    assert points_of(page, "Waiting for data (% of the time)") == [
        [(step, value) for step in steps] for value in (10, 20)
    ]
    assert "slowest rank 1 most often (75 %), forward 20.0 % slower" in text_of(page)
    assert "Slowest rank" not in text_of(page), "it has no chart"


def test_runs_are_compared_on_one_page(tmp_path: Path) -> None:
    paths = []
    for number, rate in enumerate((0.1, 0.2)):
        path = tmp_path / f"run{number}"
        path.mkdir()
        lines = [start(), *(train(step, rate * step, gradient_norm=1.0) for step in range(1, 4 + number))]
        make_run(path, [*lines, evaluation(4, top1=rate)])
        (path / "config.yaml").write_text(f"name: r{number}\nseed: 0\noptim:\n  lr: {rate}\n  betas: [0.9, 0.95]\n")
        paths.append(path)
    page = write_comparison(paths, tmp_path / "both.html").read_text(encoding="utf-8")
    assert points_of(page, "Loss") == [[(1, 0.1), (2, 0.2), (3, 0.3)], [(1, 0.2), (2, 0.4), (3, 0.6), (4, 0.8)]]
    assert points_of(page, "Held-out top-1") == [[(4, 0.1)], [(4, 0.2)]]
    text = text_of(page)
    assert "r0 and r1 2 runs" in text and "optim.lr 0.1 0.2" in text and "betas" not in text
    assert "top-1 10.0 % 20.0 %" in text and "src=" not in page
    with pytest.raises(ValueError, match=r"1 run\(s\) to compare: name two to 4 run directories"):
        write_comparison(paths[:1], tmp_path / "one.html")
