"""Small charts as SVG text: lines over a common axis, horizontal bars, one stacked bar.

Each chart is one self-contained element: no script, no font, nothing loaded. All text is escaped,
because run ids, tensor names and labels come from files that somebody else may have written.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

# Distinguishable with every common colour blindness, in this order.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5b5b5b",
           "#882255", "#44aa99")
INK, SOFT, GRID, PAPER = "#1f2328", "#59636e", "#e3e6ea", "#ffffff"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
MAX_POINTS = 3000  # in one chart, shared by its series, so that a page of charts stays small
FEW_POINTS = 4
WIDTH, HEIGHT = 720, 320
LEFT, RIGHT, TOP, BOTTOM = 64, 18, 40, 46
LEGEND_ROW, AXIS_LABEL = 18, 14


@dataclass(frozen=True, slots=True)
class Series:
    """One line: values of equal length; points with a NaN are left out.

    A few points with dots are not joined: what lies between them was not measured.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    dashed: bool = False
    dots: bool = False


@dataclass(frozen=True, slots=True)
class Mark:
    """A labelled vertical line at x."""

    x: float
    label: str


@dataclass(frozen=True, slots=True)
class Chart:
    """A line chart; `focus` keeps the first twentieth of x from stretching the y axis.

    With `binary_x` the x values are binary logarithms and are labelled by what they stand for.
    """

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    marks: Sequence[Mark] = field(default=())
    focus: bool = False
    from_zero: bool = False
    binary_x: bool = False


def escape(text: str) -> str:
    """Text made safe for element content and quoted attributes; control characters are dropped."""
    return html.escape("".join(c for c in text if c >= " " or c in "\n\t"), quote=True)


def colour(index: int) -> str:
    """Line colour of the index-th run or class."""
    return COLOURS[index % len(COLOURS)]


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round positions (1, 2 or 5 x a power of ten) inside [low, high], about `count` of them."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        return [low] if math.isfinite(low) else []
    raw = (high - low) / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def tick_label(value: float) -> str:
    """Shortest reading of a tick: 1.2M, 45k, 0.35, 1e-6."""
    size = abs(value)
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            scale = 1e3 if suffix == "k" else limit
            return f"{value / scale:.6g}{suffix}"
    if 0 < size < 1e-3:
        return f"{value:.3g}"
    return f"{value:.6g}"


def thin(x: Sequence[float], y: Sequence[float], limit: int) -> list[tuple[float, float]]:
    """At most `limit` of the points: of every stretch the lowest and the highest, in order of x."""
    points = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)]
    if len(points) <= max(limit, 4):
        return points
    buckets = max(2, limit // 2)
    kept = {0, len(points) - 1}
    for i in range(buckets):
        begin, end = i * len(points) // buckets, (i + 1) * len(points) // buckets
        stretch = range(begin, end)
        kept |= {min(stretch, key=lambda j: points[j][1]), max(stretch, key=lambda j: points[j][1])}
    return [points[i] for i in sorted(kept)]


def line_chart(chart: Chart) -> str:
    """SVG element of a line chart; a chart without a single point says so instead of failing."""
    limit = MAX_POINTS // max(1, len(chart.series))
    lines = [(series, thin(series.x, series.y, limit)) for series in chart.series]
    lines = [(series, points) for series, points in lines if points]
    if not lines:
        return _frame(chart.title, HEIGHT, [_text(WIDTH / 2, HEIGHT / 2, "no data", "middle")])
    rows = _legend_rows([series.name for series, _ in lines])
    height = HEIGHT + LEGEND_ROW * len(rows)
    top = TOP + LEGEND_ROW * len(rows) + AXIS_LABEL
    (x0, x1), (y0, y1) = _ranges(chart, [points for _, points in lines])
    plot_w, plot_h = WIDTH - LEFT - RIGHT, height - top - BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        """Canvas position of a data point."""
        return LEFT + (x - x0) / (x1 - x0) * plot_w, top + (y1 - y) / (y1 - y0) * plot_h

    body = _legend(lines, rows)
    for value in ticks(y0, y1):
        _, y = at(x0, value)
        body.append(_line(LEFT, y, WIDTH - RIGHT, y, GRID))
        body.append(_text(LEFT - 8, y + 4, tick_label(value), "end", SOFT))
    for value in _x_ticks(chart, x0, x1):
        x, _ = at(value, y0)
        label = tick_label(2.0**value if chart.binary_x else value)
        body.append(_line(x, height - BOTTOM, x, height - BOTTOM + 4, SOFT))
        body.append(_text(x, height - BOTTOM + 18, label, "middle", SOFT))
    body.append(_line(LEFT, height - BOTTOM, WIDTH - RIGHT, height - BOTTOM, SOFT))
    for mark in chart.marks:
        if x0 <= mark.x <= x1:
            x, _ = at(mark.x, y0)
            body.append(_line(x, top, x, height - BOTTOM, SOFT, dashed=True))
            body.append(_text(x + 4, top + 12, mark.label, "start", SOFT))
    # An inner element cuts off what lies outside the axes; dots on them keep their other half.
    edge, far = 4, 9 * plot_h
    box = f"{LEFT - edge} {top - edge} {plot_w + 2 * edge} {plot_h + 2 * edge}"
    left, upper, width, tall = box.split()
    place = f'x="{left}" y="{upper}" width="{width}" height="{tall}"'
    body.append(f'<svg {place} viewBox="{box}">')
    for series, points in lines:
        spots = [at(a, b) for a, b in points]
        body.append(_polyline(series, [(x, min(max(y, -far), far)) for x, y in spots]))
    body.append("</svg>")
    middle = LEFT + plot_w / 2
    body.append(_text(middle, height - 8, chart.x_label, "middle", SOFT))
    body.append(_text(LEFT - 44, top - 8, chart.y_label, "start", SOFT))
    return _frame(chart.title, height, body)


def _x_ticks(chart: Chart, x0: float, x1: float) -> list[float]:
    """Tick positions of the x axis: whole powers of two on a binary axis."""
    if not chart.binary_x:
        return ticks(x0, x1, 8)
    first, last = math.ceil(x0), math.floor(x1)
    return [float(i) for i in range(first, last + 1, max(1, (last - first) // 10 + 1))]


def _ranges(
    chart: Chart, lines: Sequence[Sequence[tuple[float, float]]]
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Axis limits with a little air; never of zero length."""
    xs = [x for points in lines for x, _ in points]
    x0, x1 = min(xs), max(xs)
    focus = chart.focus and max(map(len, lines)) >= FEW_POINTS
    after = x0 + (x1 - x0) * 0.05 if focus else x0
    ys = [y for points in lines for x, y in points if x >= after]
    ys = ys or [y for points in lines for _, y in points]
    y0, y1 = (0.0 if chart.from_zero else min(ys)), max(ys)
    pad = (y1 - y0) * 0.05 or abs(y1) * 0.05 or 1.0
    return (x0, x1 if x1 > x0 else x0 + 1.0), (y0 if chart.from_zero else y0 - pad, y1 + pad)


def bar_chart(title: str, label: str, rows: Sequence[tuple[str, float, int]]) -> str:
    """SVG element with one horizontal bar a row of (name, value, colour), in the order given."""
    if not rows:
        return _frame(title, 120, [_text(WIDTH / 2, 70, "no data", "middle")])
    pitch = 17
    left = 34 + 6.6 * min(38, max(len(name) for name, _, _ in rows))
    height = TOP + pitch * len(rows) + 34
    most = max((value for _, value, _ in rows if math.isfinite(value)), default=0.0) or 1.0
    body = []
    for i, (name, value, index) in enumerate(rows):
        y = TOP + pitch * i
        length = max(0.0, value) / most * (WIDTH - left - 90)
        body.append(_text(left - 8, y + 11, _shorten(name, 38), "end", INK, 11))
        body.append(
            f'<rect x="{left}" y="{y + 2:.1f}" width="{length:.1f}" height="{pitch - 5}" rx="2" '
            f'fill="{colour(index)}"><title>{escape(name)}: {value:.6g}</title></rect>'
        )
        body.append(_text(left + length + 5, y + 11, f"{value:.4g}", "start", SOFT, 11))
    body.append(_text(left, height - 12, label, "start", SOFT))
    return _frame(title, height, body)


def stacked_bar(title: str, parts: Sequence[tuple[str, float]], total: float) -> str:
    """SVG element of one bar of length `total`, cut into named parts, with their shares below."""
    row, height = 20, TOP + 56 + 20 * len(parts) + 14
    scale, x = (WIDTH - 40) / total if total > 0 else 0.0, 20.0
    body = []
    for i, (name, value) in enumerate(parts):
        width, share = max(0.0, value) * scale, value / total if total > 0 else 0.0
        # The unused rest is an outline: it is room, not content.
        last = name == "unused"
        paint = f'fill="{PAPER}" stroke="{SOFT}"' if last else f'fill="{colour(i)}"'
        body.append(
            f'<rect x="{x:.2f}" y="{TOP}" width="{width:.2f}" height="36" {paint}>'
            f"<title>{escape(name)}: {value:,.0f}</title></rect>"
        )
        y = TOP + 62 + row * i
        body.append(f'<rect x="20" y="{y - 10}" width="11" height="11" rx="2" {paint}/>')
        body.append(_text(38, y, name, "start", INK))
        body.append(_text(430, y, f"{value:,.0f}", "end", INK))
        body.append(_text(510, y, f"{100 * share:.3f} %", "end", SOFT))
        x += width
    return _frame(title, height, body)


def _frame(title: str, height: float, body: Sequence[str]) -> str:
    """The outer element with background and title."""
    head = _text(20, 22, title, "start", INK, 15, bold=True)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" '
        f'width="{WIDTH}" height="{height:.0f}" role="img" aria-label="{escape(title)}" '
        f'font-family="{escape(FONT)}">'
        f'<rect width="{WIDTH}" height="{height:.0f}" fill="{PAPER}"/>{head}{"".join(body)}</svg>'
    )


def _text(
    x: float,
    y: float,
    text: str,
    anchor: str,
    fill: str = INK,
    size: int = 12,
    *,
    bold: bool = False,
) -> str:
    """A text element."""
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}" '
        f'font-size="{size}"{weight}>{escape(text)}</text>'
    )


def _line(x0: float, y0: float, x1: float, y1: float, stroke: str, *, dashed: bool = False) -> str:
    """A straight line element."""
    dash = ' stroke-dasharray="3 3"' if dashed else ""
    return (
        f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" stroke="{stroke}"{dash}/>'
    )


def _polyline(series: Series, points: Sequence[tuple[float, float]]) -> str:
    """The line of a series, with dots where asked or where there is a single point."""
    stroke = colour(series.colour)
    dash = ' stroke-dasharray="6 4"' if series.dashed else ""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    width = 0 if series.dots and len(points) < FEW_POINTS else 1.6
    shape = (
        f'<polyline points="{path}" fill="none" stroke="{stroke}" stroke-width="{width}" '
        f'stroke-linejoin="round"{dash}><title>{escape(series.name)}</title></polyline>'
    )
    if series.dots or len(points) == 1:
        shape += "".join(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{stroke}"/>' for x, y in points
        )
    return shape


def _legend_rows(names: Sequence[str]) -> list[list[int]]:
    """Indices of the names, laid out in rows that fit the width; one lone name needs no legend."""
    if len(names) < 2:
        return []
    rows: list[list[int]] = [[]]
    used = 0.0
    for i, name in enumerate(names):
        width = 34 + 6.8 * min(len(name), 44)
        if rows[-1] and used + width > WIDTH - LEFT - RIGHT:
            rows.append([])
            used = 0.0
        rows[-1].append(i)
        used += width
    return rows


def _legend(
    lines: Sequence[tuple[Series, list[tuple[float, float]]]], rows: list[list[int]]
) -> list[str]:
    """Legend elements under the title."""
    body = []
    for row, indices in enumerate(rows):
        x, y = float(LEFT), 40 + LEGEND_ROW * row
        for i in indices:
            series = lines[i][0]
            dash = ' stroke-dasharray="6 4"' if series.dashed else ""
            body.append(
                f'<line x1="{x:.1f}" y1="{y - 4}" x2="{x + 18:.1f}" y2="{y - 4}" '
                f'stroke="{colour(series.colour)}" stroke-width="2.5"{dash}/>'
            )
            name = _shorten(series.name, 44)
            body.append(_text(x + 23, y, name, "start", INK))
            x += 34 + 6.8 * len(name)
    return body


def _shorten(text: str, limit: int) -> str:
    """Text of at most `limit` characters; the end, which tells tensors apart, is kept."""
    return text if len(text) <= limit else f"...{text[-(limit - 3) :]}"
