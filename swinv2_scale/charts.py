"""Charts of a page that stands alone: curves over steps or over blocks, and a map of all blocks over steps.

The curves are SVG stretched to the width of the page, the labels are HTML laid over it: text keeps its size on every
screen. Without a script they show the whole run; report.js.template lets a reader look closer.
"""

import math
import statistics
from collections.abc import Sequence
from html import escape

Series = dict[int, float]  # step -> value
Span = tuple[int, int]  # first and last step, or block, on a horizontal axis

_COLUMNS = 600  # pixel columns of a chart; each keeps its lowest and its highest value
_CELLS, _SHADES = 80, 20  # steps in a map of all blocks, and shades of its colour,
_FACTOR = 4  # which span at least this factor: what hardly differs is not to look as if it did


def number(value: float) -> str:
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


def finite(points: Series) -> list[tuple[int, float]]:
    """In order of the step."""
    return sorted((step, value) for step, value in points.items() if math.isfinite(value))


def _thin(points: Series) -> list[tuple[int, float]]:
    """A long series keeps the lowest and the highest value of each pixel column, and both ends."""
    ordered = finite(points)
    if len(ordered) <= 2 * _COLUMNS:
        return ordered
    kept = {ordered[0], ordered[-1]}
    for column in range(_COLUMNS):
        chunk = ordered[column * len(ordered) // _COLUMNS : (column + 1) * len(ordered) // _COLUMNS]
        kept |= {min(chunk, key=lambda point: point[1]), max(chunk, key=lambda point: point[1])}
    return sorted(kept)


def smooth(points: Series) -> Series:
    """Mean over a thirtieth of the series, centred so that it does not lag, at some 200 places."""
    ordered = finite(points)
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
    title: str,
    lines: Sequence[tuple[str, str, Series]],
    span: Span,
    *,
    marks: Sequence[int] = (),
    zero: bool = False,
    wide: bool = False,
    unit: str = "step",
) -> str:
    """A figure of several lines (label, CSS classes, points); "dots" among the classes marks every point.

    The horizontal axis is that of steps, or of another unit, over `span`, with a dashed line at each of `marks`; the
    vertical one begins at zero if asked to. Charts over steps can be zoomed into, all together.
    """
    drawn = [(label, css, thin) for label, css, points in lines if (thin := _thin(points))]
    if not drawn:
        return ""
    start, stop = span = span[0], max(span[1], span[0] + 1)
    low, high, ticks, log = _axis([value for _, _, points in drawn for _, value in points], zero)

    def x(step: float) -> float:
        return round(1000 * (step - start) / (stop - start), 2)

    def y(value: float) -> float:  # of the axis: an exponent if it is logarithmic
        return round(100 * (high - value) / (high - low), 3)

    curves, readout = "", f"<span>{unit} <b>{drawn[0][2][-1][0]:,}</b></span>"
    for label, css, points in drawn:
        places = [(x(step), y(math.log10(value) if log else value)) for step, value in points]
        curves += f'<polyline class="{css}" points="{" ".join(f"{a:g},{b:g}" for a, b in places)}"/>'
        if len(places) == 1 or ("dots" in css and len(places) <= 80):
            curves += f'<path class="dot {css}" d="{"".join(f"M{a:g} {b:g}h0" for a, b in places)}"/>'
        data, last = " ".join(f"{step}:{number(value)}" for step, value in points), number(points[-1][1])
        readout += f'<span class="{css}" data-points="{data}">{escape(label)} <b>{last}</b></span>'
    grid = "".join(f"M0 {y(tick):g}H1000" for tick in ticks)
    labels = "".join(f'<i class="y" style="top:{y(t):g}%">{_short(10.0**t if log else t)}</i>' for t in ticks)
    labels += _labels_below(span)
    lost = sum(not math.isfinite(value) for _, _, points in lines for value in points.values())
    notes = ", ".join(["logarithmic"] * log + [f"not finite, not drawn: {lost:,}"] * (lost > 0))
    drawing = f'<path class="grid" d="{grid}"/><path class="mark" d="{_dashes(marks, span)}"/>{curves}'
    data = f'data-{unit}s="{start} {stop}" data-axis="{low:.6g} {high:.6g} {"log" * log}"'
    return _figure(title, notes, drawing, labels, readout, data, wide)


def _dashes(marks: Sequence[int], span: Span) -> str:
    """Path of a vertical line at each mark."""
    start, stop = span
    return "".join(f"M{1000 * (at - start) / (stop - start):g} 0V100" for at in marks if start <= at <= stop)


def _figure(title: str, notes: str, drawing: str, labels: str, readout: str, data: str, wide: bool) -> str:
    """A chart from its parts: text, SVG within 1000 x 100, HTML over it, HTML below it, attributes for the script."""
    return f"""<figure class="chart{" wide" * wide}" {data}>
<figcaption>{escape(title)} <small>{notes}</small></figcaption>
<div class="plot"><svg viewBox="0 0 1000 100" preserveAspectRatio="none" role="img" aria-label="{escape(title)}">
{drawing}</svg>{labels}<i class="cursor"></i><i class="chosen"></i></div>
<p class="readout">{readout}</p></figure>"""


def map_of_blocks(
    title: str, name: str, rows: dict[int, Sequence[float | None]], span: Span, marks: Sequence[int]
) -> str:
    """A figure of a number of every block (`rows`: step -> blocks): columns are steps, the first block is below.

    Shades are of the logarithm. Empty with fewer than two steps, or without a number above zero.
    """
    steps = sorted(rows)
    if len(steps) > _CELLS:  # with the first and the last
        steps = [steps[column * (len(steps) - 1) // (_CELLS - 1)] for column in range(_CELLS)]
    values = [value for step in steps for value in rows[step] if value]
    if len(steps) < 2 or not values:
        return ""
    start, stop = span = span[0], max(span[1], span[0] + 1)
    low, high, depth = min(values), max(values), max(len(rows[step]) for step in steps)
    cells: dict[str, str] = {}  # attributes of a shade -> path
    columns, left = [], 0.0
    for step in steps:
        right = 1000 * (step - start) / (stop - start)  # a cell reaches back to the one before
        for block, value in enumerate(rows[step]):
            shade = 'class="cell lost"' if value is None else f'class="cell" opacity="{_opacity(value, low, high):.2f}"'
            top, bottom = (100 * (depth - edge) / depth for edge in (block + 1, block))
            cells[shade] = f"{cells.get(shade, '')}M{left:.2f} {top:.2f}H{right:.2f}V{bottom:.2f}H{left:.2f}z"
        columns.append(f"{step}:" + ",".join("not finite" if value is None else f"{value:.4g}" for value in rows[step]))
        left = right
    drawing = "".join(f'<path {shade} d="{path}"/>' for shade, path in cells.items())
    drawing += f'<path class="mark" d="{_dashes(marks, span)}"/>'
    ticks = [int(tick) for tick in _ticks(1, max(depth, 2), 6) if tick == int(tick)]
    labels = "".join(f'<i class="y" style="top:{100 * (depth - tick + 0.5) / depth:g}%">{tick}</i>' for tick in ticks)
    labels += _labels_below(span)
    readout = f"<span>step <b>{steps[-1]:,}</b></span><span>block <b>{depth}</b></span>"
    readout += f'<span class="a">{name} <b>{columns[-1].rpartition(",")[2]}</b></span>'
    readout += f"<span>all: {number(low)} to {number(high)}</span>"
    data = f'data-steps="{start} {stop}" data-cells="{";".join(columns)}"'
    return _figure(title, "a stronger colour is larger; logarithmic", drawing, labels, readout, data, wide=True)


def _opacity(value: float, low: float, high: float) -> float:
    """Up to 1 for `high`, by the logarithm, in steps."""
    low = min(low, high / _FACTOR)
    share = math.log(max(value, low) / low) / math.log(high / low)
    return 0.05 + 0.95 * round(share * (_SHADES - 1)) / (_SHADES - 1)


def _labels_below(span: Span) -> str:
    """HTML of the labels of the horizontal axis."""
    start, stop = span
    whole = [tick for tick in _ticks(start, stop, 6) if tick == round(tick)]
    return "".join(
        f'<i class="x" style="left:{100 * (tick - start) / (stop - start):g}%">{_short(tick)}</i>' for tick in whole
    )
