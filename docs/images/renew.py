"""The pictures of reports that docs/records.md shows, by a headless Chromium, of three runs.

    python docs/images/renew.py runs/demo_simmim runs/demo_classification runs/demo_resumed

The last one is a run whose rank was killed, and which went on when its command was repeated:

    deepspeed --num_accelerators 2 launch/pretrain.py experiment=demo_simmim name=demo_resumed seed=1 optim.lr=1e-3 \
        steps=80 global_batch=16 micro_batch=8 log_every=2 checkpoint_every=20
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from swinv2_scale.compare import write_comparison
from swinv2_scale.report import write_report

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync", "--hide-scrollbars"]
NARROW = 400  # which Chromium's window cannot be: the page is shown in a frame
DRAG = """
const plot = document.querySelector(".plot"), box = plot.getBoundingClientRect();
for (const [kind, share] of [["down", 0.35], ["move", 0.85], ["up", 0.85]]) {
  const place = { clientX: box.left + share * box.width, button: 0, pointerId: 1 };
  plot.dispatchEvent(new PointerEvent("pointer" + kind, place));
}
"""


def picture(page: Path, name: str, *, height: int, width: int = 1200, dark: bool = False, script: str = "") -> None:
    """Write docs/images/NAME.png, two thirds of what a window of so many pixels shows, in 256 colours."""
    with tempfile.TemporaryDirectory() as folder:
        shown, shot = Path(folder, "page.html"), Path(folder, "shot.png")
        shown.write_text(page.read_text("utf-8").replace("</script></body>", f"{script}</script></body>"), "utf-8")
        if width == NARROW:
            frame = f'<iframe src="{shown.name}" style="border:0;width:{width}px;height:{height}px"></iframe>'
            shown = Path(folder, "frame.html")
            shown.write_text(f'<!doctype html><body style="margin:0">{frame}', "utf-8")
        command = ["chromium", *FLAGS, f"--user-data-dir={folder}/profile", f"--screenshot={shot}"]
        command += [
            f"--window-size={max(width, 600)},{height}",
            f"--blink-settings=preferredColorScheme={int(not dark)}",
        ]
        subprocess.run([*command, shown.as_uri()], check=True, capture_output=True, timeout=120)
        image = Image.open(shot).convert("RGB").crop((0, 0, width, height))
    scale = 1 if width == NARROW else 2 / 3
    image = image.resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS)
    image.quantize(256).save(Path(__file__).parent / f"{name}.png", optimize=True)


def main() -> None:
    pretraining, finetuning, resumed = map(Path, sys.argv[1:])
    picture(write_report(pretraining), "report_pretraining", height=4900)
    picture(write_report(pretraining), "report_narrow", height=1900, width=NARROW)
    picture(write_report(finetuning), "report_finetuning_dark", height=4700, dark=True)
    picture(write_report(resumed), "report_resumed", height=1700, script=DRAG)
    with tempfile.TemporaryDirectory() as folder:
        comparison = write_comparison([pretraining, resumed], Path(folder, "comparison.html"))
        picture(comparison, "report_comparison", height=2900)


if __name__ == "__main__":
    main()
