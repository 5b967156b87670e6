"""The report in a browser: dragging over a chart zooms all of them, and nothing reaches beyond a narrow screen."""

import json
import re
import shutil
import subprocess
from html import escape, unescape
from typing import Any

import pytest
from test_report import evaluation, make_run, start, train

from swinv2_scale.report import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")

ACTIONS = """
const frame = document.querySelector("iframe"), out = [], charts = {};
let page;
function pointer(chart, kind, share, type) {
  const plot = charts[chart].querySelector(".plot"), box = plot.getBoundingClientRect();
  const place = { clientX: box.left + share * box.width, clientY: box.top + 0.9 * box.height };
  plot.dispatchEvent(new page.defaultView.PointerEvent(kind, { ...place, button: 0, pointerType: type, pointerId: 1 }));
}
function drag(chart, from, to, type) {
  pointer(chart, "pointerdown", from, type);
  pointer(chart, "pointermove", to, type);
  pointer(chart, "pointerup", to, type);
}
function look(name) {
  const text = (one, kind) => [...one.querySelectorAll(kind)].filter(label => !label.hidden).map(l => l.textContent);
  const seen = Object.fromEntries(Object.entries(charts).map(([title, one]) => [title, {
    box: one.querySelector("svg").getAttribute("viewBox").split(" ").map(Number),
    x: text(one, ".x"), y: text(one, ".y"), readout: one.querySelector(".readout").textContent }]));
  const { scrollWidth, clientWidth } = page.documentElement;
  out.push([name, { charts: seen, whole: !page.querySelector("#whole").hidden, beyond: scrollWidth - clientWidth }]);
}
frame.onload = () => {
  page = frame.contentDocument;
  for (const one of page.querySelectorAll(".chart")) charts[one.querySelector("svg").getAttribute("aria-label")] = one;
  look("whole");
  drag("Learning rate", 0.5, 0.515, "touch");
  look("tapped");
  drag("Loss", 0.25, 0.5, "mouse");
  look("dragged");
  pointer("Learning rate", "pointermove", 0.5, "mouse");
  look("read");
  charts["Loss"].querySelector(".plot").dispatchEvent(new page.defaultView.MouseEvent("dblclick"));
  look("double-clicked");
  drag("Learning rate", 0.75, 0.5, "touch");
  look("touched");
  page.querySelector("#whole").click();
  look("button");
  document.title = "done";
  document.querySelector("pre").textContent = JSON.stringify(Object.fromEntries(out));
};
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a browser with a screen of 400 pixels shows after each of ACTIONS."""
    folder = tmp_path_factory.mktemp("zoom")
    lines = [start(), evaluation(0, loss=2.0)]
    for step in range(0, 401, 10):
        lines.append(train(step, 2.0 - step / 400, learning_rate=1e-3 * step, gradient_norm=10 ** (-step / 100)))
        blocks = {"amplitude": [1.0, 2.0, 1.0 + step], "logit_scale_mean": [10.0] * 3, "logit_scale_max": [10.0] * 3}
        lines.append({"event": "blocks", "step": step, "time": 1000.0 + step, **blocks})
    page = write_report(make_run(folder, lines)).read_text(encoding="utf-8")
    wrapper = folder / "wrapper.html"
    frame = f'<iframe srcdoc="{escape(page)}" style="width:400px;height:2000px;border:0"></iframe>'
    wrapper.write_text(f"<!doctype html><meta charset=utf-8>{frame}<pre></pre><script>{ACTIONS}</script>", "utf-8")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--dump-dom"]
    command += ["--virtual-time-budget=10000", f"--user-data-dir={folder}/profile", wrapper.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found = re.search(r"<pre>(.+?)</pre>", done.stdout, flags=re.DOTALL)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(unescape(found[1]))


def test_a_drag_zooms_all_charts_over_steps(seen: dict[str, Any]) -> None:
    whole, dragged = seen["whole"], seen["dragged"]
    assert not whole["whole"] and dragged["whole"], "the button is there while it has something to do"
    over_steps = [title for title in whole["charts"] if "Logit" not in title and "by depth (" not in title]
    assert len(over_steps) >= 4
    for title, chart in dragged["charts"].items():
        left, _, width, _ = chart["box"]
        if title in over_steps:
            assert (left, width) == pytest.approx((250, 250), abs=2), title
            assert chart["x"] == ["100", "120", "140", "160", "180", "200"], title
        else:
            assert chart == whole["charts"][title]
    _, _, _, height = dragged["charts"]["Loss"]["box"]
    assert height < 40 and dragged["charts"]["Loss"]["y"][0] == "1.5", "the vertical axis is that of what is seen"
    assert dragged["charts"]["Learning rate"]["y"] == ["0.1", "0.15", "0.2"]
    assert dragged["charts"]["Gradient norm"]["y"] == ["0.01", "0.1"], "a logarithmic one stays so"


def test_values_are_read_where_the_pointer_is(seen: dict[str, Any]) -> None:
    assert seen["read"]["charts"]["Learning rate"]["readout"] == "step 150 0.15"


def test_a_tap_changes_nothing_and_the_whole_comes_back(seen: dict[str, Any]) -> None:
    for name in ("tapped", "double-clicked", "button"):
        assert not seen[name]["whole"]
        for title, chart in seen[name]["charts"].items():
            assert {**chart, "readout": ""} == {**seen["whole"]["charts"][title], "readout": ""}
    assert seen["touched"]["charts"]["Loss"]["box"][0] == pytest.approx(500, abs=2)


def test_a_narrow_screen_does_not_scroll_sideways(seen: dict[str, Any]) -> None:
    assert {one["beyond"] for one in seen.values()} == {0}
