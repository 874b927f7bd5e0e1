"""The figures of one or several runs, drawn from their logs.

Every figure names the log keys that it shows. A figure without data is left out. Breakdowns of the
score are drawn when the result file has a section `breakdown`, as tools/breakdown.py makes it, with
`document_length`, `position` or `stream`: lists of rows with `upto` (or `share`) and one BPB per
evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from tools import svg
from tools.runs import CAP_BYTES, Json, Run, TrainPoint, ValidationPoint, as_number, interpolate

NAN = float("nan")
MOST_BARS = 90


class Figure(NamedTuple):
    """A drawn figure; `name` is its file name without suffix."""

    name: str
    title: str
    keys: str  # log keys it shows
    drawing: str  # SVG element


def figures(runs: Sequence[Run]) -> list[Figure]:
    """All figures that these runs have data for, in the order of the story."""
    drawn: list[Figure] = []
    for build in BUILDERS:
        drawn += build(runs)
    return drawn


def bytes_per_target(run: Run) -> float | None:
    """Bytes of text a scored token stands for, from the data section or from any score."""
    targets, size = run.number("data.val_targets"), run.number("data.val_bytes")
    if targets and size:
        return size / targets
    for item in run.evaluations:
        if item.loss and item.bpb:
            return item.loss / (item.bpb * math.log(2))
    return None


def _number(value: float | None) -> float:
    """The value, NaN for None; charts leave NaN out."""
    return NAN if value is None else value


Reader = Callable[[TrainPoint], float | None]


def _train_lines(
    runs: Sequence[Run], y: Reader, *, x: Reader = lambda point: point.seconds
) -> list[svg.Series]:
    """One line a run over its training steps; runs without any value are left out."""
    lines = []
    for i, run in enumerate(runs):
        points = [(_number(x(point)), _number(y(point))) for point in run.train]
        kept = [(a, b) for a, b in points if not (math.isnan(a) or math.isnan(b))]
        if kept:
            lines.append(svg.Series(run.name, [a for a, _ in kept], [b for _, b in kept], i))
    return lines


def _plan_marks(runs: Sequence[Run], *, by_step: bool) -> list[svg.Mark]:
    """Where the depth plan changed; of several runs only the first one's, they would overlap."""
    for run in runs:
        marks = []
        times = [(p.step, p.seconds) for p in run.train if p.seconds is not None]
        for change in run.plans:
            seconds = interpolate(times, change.step) if times else None
            x = float(change.step) if by_step else _number(seconds)
            if change.step > 0 and not math.isnan(x):
                marks.append(svg.Mark(x, change.plan))
        if marks:
            return marks
    return []


def _line_figure(name: str, chart: svg.Chart, keys: str) -> list[Figure]:
    """The figure of a chart, or nothing if it has no line."""
    return [Figure(name, chart.title, keys, svg.line_chart(chart))] if chart.series else []


# ------------------------------------------------------------------------------------ the builders


def headline_plot(runs: Sequence[Run]) -> list[Figure]:
    """Bits per byte against seconds: training loss, validations, and the final scores as lines."""
    lines = _bpb_lines(runs)
    if not lines:  # levels over no time at all say nothing
        return []
    scores = [
        (run, item, i)
        for i, run in enumerate(runs)
        for item in run.evaluations
        if item.bpb is not None and (len(runs) == 1 or item.name == run.headline)
    ]
    end = max(max(line.x) for line in lines)
    for run, item, i in scores:
        label = f"{item.name} {item.bpb:.4f}" if len(runs) == 1 else f"{run.name}: {item.bpb:.4f}"
        colour = i + 2 + run.evaluations.index(item) if len(runs) == 1 else i
        level = _number(item.bpb)
        lines.append(svg.Series(label, [0.0, end], [level, level], colour, dashed=True))
    chart = svg.Chart(
        "Bits per byte against training time",
        "seconds of training",
        "BPB",
        lines,
        _plan_marks(runs, by_step=False),
        focus=True,
    )
    keys = "train.train_loss (as bits per byte), val.val_bpb, bpb.*"
    return _line_figure("loss", chart, keys)


def _bpb_lines(runs: Sequence[Run]) -> list[svg.Series]:
    """Training loss in bits per byte of the validation text, and validations as dots."""
    lines = []
    for i, run in enumerate(runs):
        ratio = bytes_per_target(run)
        if ratio:
            scale = 1 / (math.log(2) * ratio)
            points = [(p.seconds, p.loss * scale) for p in run.train if p.seconds is not None]
            if points:
                name = "training loss" if len(runs) == 1 else f"{run.name}, training loss"
                lines.append(svg.Series(name, [a for a, _ in points], [b for _, b in points], i))
        seen = [(p.seconds, p.bpb) for p in run.validation if p.seconds is not None]
        if len(seen) > 1:
            name = "validation" if len(runs) == 1 else f"{run.name}, validation"
            x, y = [a for a, _ in seen], [b for _, b in seen]
            lines.append(svg.Series(name, x, y, i + (len(runs) == 1), dots=True))
    return lines


def loss_by_step(runs: Sequence[Run]) -> list[Figure]:
    """Training loss against steps."""
    lines = _train_lines(runs, lambda point: point.loss, x=lambda point: float(point.step))
    marks = _plan_marks(runs, by_step=True)
    chart = svg.Chart("Training loss by step", "step", "nats per token", lines, marks, focus=True)
    return _line_figure("loss_by_step", chart, "train.step, train.train_loss")


def loss_by_time(runs: Sequence[Run]) -> list[Figure]:
    """Training loss against seconds, with validations as dots."""
    lines = _train_lines(runs, lambda point: point.loss)
    for i, run in enumerate(runs):
        seen = [(p.seconds, p.loss) for p in run.validation if p.seconds is not None]
        if seen:
            x, y = [a for a, _ in seen], [b for _, b in seen]
            lines.append(svg.Series(f"{run.name}, validation", x, y, i, dashed=True, dots=True))
    marks = _plan_marks(runs, by_step=False)
    label = "nats per token"
    chart = svg.Chart("Loss by time", "seconds of training", label, lines, marks, focus=True)
    return _line_figure(
        "loss_by_time", chart, "train.train_seconds, train.train_loss, val.val_loss"
    )


def bpb_by_step(runs: Sequence[Run]) -> list[Figure]:
    """Validation BPB against steps."""
    lines = []
    for i, run in enumerate(runs):
        points: list[ValidationPoint] = run.validation
        if points:
            steps = [float(point.step) for point in points]
            lines.append(svg.Series(run.name, steps, [p.bpb for p in points], i, dots=True))
    chart = svg.Chart("Validation BPB by step", "step", "BPB", lines, focus=True)
    return _line_figure("bpb_by_step", chart, "val.step, val.val_bpb")


def learning_rate(runs: Sequence[Run]) -> list[Figure]:
    """Learning-rate multiplier and the depth plan."""
    lines = _train_lines(runs, lambda point: point.lr_scale)
    marks = _plan_marks(runs, by_step=False)
    title = "Learning rate and depth plan"
    chart = svg.Chart(title, "seconds of training", "multiplier", lines, marks, from_zero=True)
    return _line_figure("learning_rate", chart, "train.lr_scale, plan.plan")


def throughput(runs: Sequence[Run]) -> list[Figure]:
    """Tokens per second of each logged step."""
    lines = _train_lines(runs, lambda point: point.tok_s)
    marks = _plan_marks(runs, by_step=False)
    title = "Throughput"
    chart = svg.Chart(title, "seconds of training", "tokens per s", lines, marks, from_zero=True)
    return _line_figure("throughput", chart, "train.tok_s")


def memory(runs: Sequence[Run]) -> list[Figure]:
    """Device memory between steps and the most there was; runs on a CPU log none."""
    lines = _train_lines(runs, lambda point: point.mem_mib or None)
    for i, run in enumerate(runs):
        peak, ends = run.number("train.peak_mib"), [p.seconds for p in run.train if p.seconds]
        if peak and ends:
            label = f"{run.name}, peak"
            lines.append(svg.Series(label, [ends[0], ends[-1]], [peak, peak], i, dashed=True))
    chart = svg.Chart("Device memory", "seconds of training", "MiB", lines, from_zero=True)
    return _line_figure("memory", chart, "train.mem_mib (between steps), train.peak_mib")


def quantisation(runs: Sequence[Run]) -> list[Figure]:
    """Relative error and bits per weight of every quantised tensor, of the first run with them."""
    drawn: list[Figure] = []
    for key, title, unit in (
        ("error", "Quantisation error by tensor", "|W - Q| / |W|"),
        ("bits", "Bits per weight by tensor", "entropy in bits"),
    ):
        run = next((run for run in runs if run.rows("quantisation.by_tensor")), None)
        if run is None:
            continue
        rows = []
        classes: dict[str, int] = {}
        for row in run.rows("quantisation.by_tensor"):
            value, name = as_number(row.get(key)), str(row.get("name"))
            kind = name.rstrip("0123456789").rstrip("._[")
            if value is not None:
                rows.append((name, value, classes.setdefault(kind, len(classes))))
        if len(rows) > MOST_BARS:
            rows = sorted(rows, key=lambda item: -item[1])[:MOST_BARS]
        if rows:
            full = title if len(runs) == 1 else f"{title}: {run.name}"
            drawing = svg.bar_chart(full, unit, rows)
            drawn.append(Figure(f"tensor_{key}", full, f"quantisation.by_tensor.{key}", drawing))
    return drawn


def where_bytes_go(runs: Sequence[Run]) -> list[Figure]:
    """The 16,000,000 bytes: program, parts of the model file, and what is left."""
    drawn: list[Figure] = []
    for run in runs:
        parts = byte_parts(run)
        if parts:
            cap = run.number("artifact.cap_bytes") or float(CAP_BYTES)
            title = f"Where the {cap:,.0f} bytes go"
            title = title if len(runs) == 1 else f"{title}: {run.name}"
            drawing = svg.stacked_bar(title, parts, max(cap, sum(value for _, value in parts)))
            name = "bytes" if len(drawn) == 0 else f"bytes_{len(drawn) + 1}"
            drawn.append(Figure(name, title, "artifact.*_bytes, artifact.parts", drawing))
    return drawn[:4]


def byte_parts(run: Run) -> list[tuple[str, float]]:
    """(part, bytes) of an artifact, the unused rest last; empty without an artifact.

    `artifact.parts`, a mapping of name to bytes, divides the model file where the run logged it.
    """
    code, model = run.number("artifact.code_bytes"), run.number("artifact.model_bytes")
    if code is None or model is None:
        return []
    cap = run.number("artifact.cap_bytes") or float(CAP_BYTES)
    known = {name: as_number(value) for name, value in run.table("artifact.parts").items()}
    pieces = [(name, value) for name, value in known.items() if value is not None]
    rest = model - sum(value for _, value in pieces)
    if pieces and rest >= 0:
        model_parts = [*pieces, ("rest of the model file", rest)] if rest else pieces
    else:
        model_parts = [("model file", model)]
    return [("program (packed)", code), *model_parts, ("unused", max(0.0, cap - code - model))]


def breakdowns(runs: Sequence[Run]) -> list[Figure]:
    """BPB by document length, by position in the document, and along the stream."""
    drawn: list[Figure] = []
    for key, title, label in (
        ("document_length", "BPB by document length", "tokens in the document, up to"),
        ("position", "BPB by position in the document", "position in tokens, up to"),
        ("stream", "BPB along the validation stream", "share of the stream"),
    ):
        lines: list[svg.Series] = []
        for run in runs:
            rows = run.rows(f"breakdown.{key}")
            for column in _columns(run, key):
                points = [(_x_of(row), as_number(row.get(column))) for row in rows]
                kept = [(x, y) for x, y in points if x is not None and y is not None]
                name = column if len(runs) == 1 else f"{run.name} {column}"
                x, y = [_axis(a, key) for a, _ in kept], [b for _, b in kept]
                lines.append(svg.Series(name, x, y, len(lines), dots=True))
        chart = svg.Chart(title, label, "BPB", lines, binary_x=key != "stream")
        drawn += _line_figure(f"bpb_by_{key}", chart, f"breakdown.{key}")
    return drawn


def adaptation_gain(runs: Sequence[Run]) -> list[Figure]:
    """How much better the adapting evaluation is than the best fixed one, along the stream."""
    lines = []
    for i, run in enumerate(runs):
        columns = _columns(run, "stream")
        adapted = next((name for name in columns if name.startswith("ttt")), None)
        fixed = [n for n in ("documents", "sliding", "quantised") if n in columns]
        if adapted is None or not fixed:
            continue
        rows = run.rows("breakdown.stream")
        gains = [_value(row, fixed[0]) - _value(row, adapted) for row in rows]
        name = f"{run.name}: {fixed[0]} - {adapted}"
        lines.append(svg.Series(name, [_number(_x_of(row)) for row in rows], gains, i, dots=True))
    title = "Gain of adaptation along the validation stream"
    chart = svg.Chart(title, "share of the stream", "BPB", lines)
    return _line_figure("adaptation_gain", chart, "breakdown.stream")


def _value(row: dict[str, Json], name: str) -> float:
    """Number in a row, NaN where there is none."""
    return _number(as_number(row.get(name)))


def _columns(run: Run, key: str) -> list[str]:
    """Names of the score columns of a breakdown: all numbers that are no axis and no count."""
    aside = {"upto", "share", "bytes"}
    names: dict[str, None] = {}
    for row in run.rows(f"breakdown.{key}"):
        names |= {n: None for n, v in row.items() if n not in aside and as_number(v) is not None}
    return list(names)


def _x_of(row: dict[str, Json]) -> float | None:
    """Position of a breakdown row."""
    share = as_number(row.get("share"))
    return share if share is not None else as_number(row.get("upto"))


def _axis(value: float, key: str) -> float:
    """Lengths and positions span decades and are drawn by their binary logarithm."""
    return value if key == "stream" else math.log2(max(value, 1.0))


BUILDERS: tuple[Callable[[Sequence[Run]], list[Figure]], ...] = (
    headline_plot,
    loss_by_step,
    loss_by_time,
    bpb_by_step,
    learning_rate,
    throughput,
    memory,
    quantisation,
    where_bytes_go,
    breakdowns,
    adaptation_gain,
)
