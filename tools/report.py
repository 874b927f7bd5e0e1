#!/usr/bin/env python3
"""Draws runs: one HTML page that needs nothing else, README blocks, and a view of a live run.

    python tools/report.py RUN... [--out PAGE.html] [--figures DIR] [--png] [--tensorboard DIR]
    python tools/report.py readme README.md [--check]      rewrite its generated blocks from logs/
    python tools/report.py watch RUN [--html [PORT]]       follow a run in the terminal or browser

RUN is a run id in logs/, or a path to one of a run's files or to any published text log. Several
runs are laid over each other; two are also compared line by line.

Exit status: 0 done, 1 README out of date (--check) or a block that cannot be written, 2 a run or
file that cannot be read, 3 a missing optional package or program.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from tools import figures, readme_blocks
from tools.command import number_between
from tools.runs import CAP_BYTES, EventReader, Run, RunError, combine, load_run
from tools.svg import INK, SOFT, colour, escape

MAX_PAGE_BYTES = 2_000_000
# Nothing may be loaded from anywhere, whatever a log contains.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
STYLE = f"""
:root {{ color-scheme: light; }}
body {{ margin: 0; background: #f4f5f7; color: {INK};
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }}
main {{ max-width: 1500px; margin: 0 auto; padding: 24px 28px 60px; }}
h1 {{ font-size: 24px; margin: 0 0 4px; }}
h2 {{ font-size: 18px; margin: 34px 0 10px; }}
p.note {{ color: {SOFT}; margin: 2px 0 14px; }}
.cards {{ display: flex; flex-wrap: wrap; gap: 12px; margin: 18px 0; }}
.card {{ background: #fff; border: 1px solid #dfe3e8; border-radius: 8px; padding: 10px 16px; }}
.card b {{ display: block; font-size: 22px; font-variant-numeric: tabular-nums; }}
.card span {{ color: {SOFT}; font-size: 13px; }}
.grid {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(560px, 1fr)); gap: 16px;
  align-items: start; }}
figure {{ margin: 0; background: #fff; border: 1px solid #dfe3e8; border-radius: 8px;
  padding: 8px; }}
figure svg {{ width: 100%; height: auto; display: block; }}
figcaption {{ color: {SOFT}; font-size: 12px; padding: 2px 12px 6px; }}
.wide {{ overflow-x: auto; background: #fff; border: 1px solid #dfe3e8; border-radius: 8px;
  width: fit-content; min-width: min(560px, 100%); max-width: 100%; }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 5px 12px; text-align: right; border-bottom: 1px solid #edf0f3;
  white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
th {{ background: #f9fafb; font-weight: 600; }}
tr:last-child td {{ border-bottom: 0; }}
i.dot {{ display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 6px; }}
ul {{ margin: 6px 0; }}
"""


class ReportError(Exception):
    """Something optional that is not installed; the message names what to install."""


# ----------------------------------------------------------------------------------------- the page

# Rows of the table of facts: label, log key, number format ("" for text).
FACTS: tuple[tuple[str, str, str], ...] = (
    ("Status", "status", ""),
    ("Track", "track", ""),
    ("Preset", "preset", ""),
    ("Seed", "seed", ".0f"),
    ("Headline BPB", "val_bpb", ".5f"),
    ("Headline nats per token", "val_loss", ".5f"),
    ("Headline evaluation", "headline", ""),
    ("GPU", "hardware.gpu", ""),
    ("GPUs", "hardware.gpus", ".0f"),
    ("Attention", "versions.attention_backend", ""),
    ("torch", "versions.torch", ""),
    ("Data", "data.name", ""),
    ("Validation targets", "data.val_targets", ",.0f"),
    ("Validation bytes", "data.val_bytes", ",.0f"),
    ("Passes over the data", "data.passes", ".2f"),
    ("Parameters", "model.parameters", ",.0f"),
    ("Steps", "train.steps", ",.0f"),
    ("Tokens", "train.tokens", ",.0f"),
    ("ms per step", "train.ms_per_step", ".1f"),
    ("Tokens per s", "train.tok_s", ",.0f"),
    ("Peak memory, MiB", "train.peak_mib", ",.0f"),
    ("Start-up s", "train.startup_seconds", ".1f"),
    ("Training s", "clocks.training_seconds", ".1f"),
    ("Training to artifact s", "clocks.train_to_artifact_seconds", ".1f"),
    ("Evaluation s, strict", "clocks.eval_seconds_strict", ".1f"),
    ("Evaluation s, lenient", "clocks.eval_seconds_lenient", ".1f"),
    ("Full evaluation on 8 GPUs s", "clocks.projected_full_eval_seconds_8gpu", ".0f"),
    ("Quantisation gap BPB", "quantisation.gap_bpb", ".5f"),
    ("Bits per weight", "quantisation.bits_per_weight", ".3f"),
    ("Program bytes", "artifact.code_bytes", ",.0f"),
    ("Model bytes", "artifact.model_bytes", ",.0f"),
    ("Total bytes", "artifact.total_bytes", ",.0f"),
    ("Unused bytes", "artifact.unused_bytes", ",.0f"),
    ("Config hash", "config_hash", ""),
    ("Source sha256", "source_sha256", ""),
)
CARDS = (
    ("BPB", "val_bpb", ".4f"),
    ("nats per token", "val_loss", ".4f"),
    ("bytes in all", "artifact.total_bytes", ",.0f"),
    ("s of training", "clocks.training_seconds", ".0f"),
    ("s of evaluation", "clocks.eval_seconds_strict", ".0f"),
    ("steps", "train.steps", ",.0f"),
)


def page(runs: Sequence[Run], *, refresh_seconds: int = 0) -> str:
    """One self-contained HTML page about some runs. Raises: RunError above 2 MB."""
    drawn = figures.figures(runs)
    title = runs[0].run_id if len(runs) == 1 else f"{len(runs)} runs"
    again = f'<meta http-equiv="refresh" content="{refresh_seconds}">' if refresh_seconds else ""
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">{again}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
    )
    body = [f"<h1>{escape(title)}</h1>", _subtitle(runs), _cards(runs)]
    body += [_section("Evaluations", _evaluations(runs)), _figures(drawn)]
    body += [_section("Facts", _facts(runs)), _section("Settings", _settings(runs))]
    body += [_section("Audit", _audit(runs)), _section("Phases", _phases(runs)), _remarks(runs)]
    text = head + "".join(body) + "</main></body></html>\n"
    if len(text.encode()) > MAX_PAGE_BYTES:
        size = len(text.encode())
        raise RunError(
            f"the page would be {size:,} bytes, over {MAX_PAGE_BYTES:,}: name fewer runs"
        )
    return text


def _subtitle(runs: Sequence[Run]) -> str:
    """One line under the title."""
    if len(runs) > 1:
        return f'<p class="note">{escape(", ".join(run.run_id for run in runs))}</p>'
    run = runs[0]
    parts = [run.text(key) or "" for key in ("preset", "track", "hardware.gpu", "data.name")]
    parts += [run.text("status") or "live or unfinished", run.text("started") or ""]
    return f'<p class="note">{escape(", ".join(part for part in parts if part))}</p>'


def _cards(runs: Sequence[Run]) -> str:
    """The figures that matter most, for a single run."""
    if len(runs) != 1:
        return ""
    cards = []
    for label, key, form in CARDS:
        value = runs[0].number(key)
        if value is not None:
            text = f"{value:{form}}"
            cards.append(f'<div class="card"><b>{text}</b><span>{escape(label)}</span></div>')
    return f'<div class="cards">{"".join(cards)}</div>'


def _section(title: str, content: str) -> str:
    """A titled part of the page, nothing without content."""
    return f"<h2>{escape(title)}</h2>{content}" if content else ""


def _figures(drawn: Sequence[figures.Figure]) -> str:
    """All figures in a grid."""
    cells = [
        f"<figure>{item.drawing}<figcaption>{escape(item.keys)}</figcaption></figure>"
        for item in drawn
    ]
    return _section("Figures", f'<div class="grid">{"".join(cells)}</div>' if cells else "")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], dots: bool = False) -> str:
    """HTML table of escaped cells; with `dots`, columns after the first carry the run's colour."""
    if not rows:
        return ""

    def dot(i: int) -> str:
        """Coloured mark of the i-th column."""
        mark = f'<i class="dot" style="background:{colour(i - 1)}"></i>'
        return mark if dots and 0 < i <= len(header) and header[i] != "Difference" else ""

    head = "".join(f"<th>{dot(i)}{escape(text)}</th>" for i, text in enumerate(header))
    lines = ["".join(f"<td>{escape(text)}</td>" for text in row) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _names(runs: Sequence[Run]) -> list[str]:
    """Column titles: short names, with run ids where these would be equal."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [run.run_id for run in runs]


def _facts(runs: Sequence[Run]) -> str:
    """Table of facts, a column for each run; for two runs also the difference."""
    rows = []
    for label, key, form in FACTS:
        values = [run.number(key) if form else run.text(key) for run in runs]
        if all(value is None for value in values):
            continue
        cells = ["" if v is None else f"{v:{form}}" if form else str(v)[:24] for v in values]
        rows.append([label, *cells, *_difference(values, form, len(runs))])
    header = ["", *_names(runs), *(["Difference"] if len(runs) == 2 else [])]
    return _table(header, rows, dots=len(runs) > 1)


def _difference(values: Sequence[float | str | None], form: str, count: int) -> list[str]:
    """Second value minus first, as one cell, where two runs are shown."""
    if count != 2:
        return []
    first, second = values
    if form and None in values:
        return [""]
    if isinstance(first, float) and isinstance(second, float):
        return [f"{second - first:+{form}}" if second != first else "equal"]
    return ["equal" if first == second else "differs"]


def _evaluations(runs: Sequence[Run]) -> str:
    """BPB and seconds of every evaluation."""
    names = list(dict.fromkeys(item.name for run in runs for item in run.evaluations))
    rows = []
    for name in names:
        cells, scores = [], []
        for run in runs:
            item = run.evaluation(name)
            scores.append(item.bpb if item else None)
            known = item is not None and item.bpb is not None
            seconds = f" ({item.seconds:.1f} s)" if item and item.seconds is not None else ""
            mark = " *" if name == run.headline else ""
            cells.append(f"{item.bpb:.5f}{mark}{seconds}" if item and known else "not run")
        rows.append([name, *cells, *_difference(scores, ".5f", len(runs))])
    header = ["BPB", *_names(runs), *(["Difference"] if len(runs) == 2 else [])]
    marked = any(run.headline in names for run in runs)
    note = '<p class="note">* the evaluation that counts</p>' if marked else ""
    return _table(header, rows, dots=len(runs) > 1) + note


def _settings(runs: Sequence[Run]) -> str:
    """Of one run, what differs from its preset; of several, every setting that differs."""
    if len(runs) == 1:
        changed = runs[0].table("differs")
        rows = [[name, str(value)] for name, value in changed.items()]
        return _table(["Unlike the preset", "Value"], rows)
    tables = [run.table("config") for run in runs]
    names = dict.fromkeys(name for config in tables for name in config)
    rows = []
    for name in names:
        values = [str(config[name]) if name in config else "absent" for config in tables]
        if len(set(values)) > 1:
            rows.append([name, *(value[:60] for value in values)])
    return _table(["Setting", *_names(runs)], rows, dots=True)


def _audit(runs: Sequence[Run]) -> str:
    """Legality proofs of the evaluation."""
    proofs = dict.fromkeys(proof for run in runs for proof in run.table("audit"))
    rows = []
    for proof in proofs:
        cells = []
        for run in runs:
            passed, worst = run.get(f"audit.{proof}.passed"), run.number(f"audit.{proof}.worst")
            checked = run.number(f"audit.{proof}.checked")
            word = {True: "passed", False: "FAILED"}.get(passed is True, "")
            detail = f", {checked:,.0f} checked" if checked is not None else ""
            detail += f", worst {worst:.3g}" if worst is not None else ""
            cells.append(word + detail if proof in run.table("audit") else "not run")
        rows.append([proof, *cells])
    return _table(["Condition", *_names(runs)], rows, dots=len(runs) > 1)


def _phases(runs: Sequence[Run]) -> str:
    """Seconds of the named stretches."""
    names = dict.fromkeys(phase.name for run in runs for phase in run.phases)
    rows = []
    for name in names:
        totals = [sum(p.seconds for p in run.phases if p.name == name) for run in runs]
        rows.append([name, *(f"{total:.1f}" if total else "not run" for total in totals)])
    return _table(["Seconds", *_names(runs)], rows, dots=len(runs) > 1)


def _remarks(runs: Sequence[Run]) -> str:
    """Warnings of the runs, crashes, and damage met while reading."""
    lines = []
    for run in runs:
        lines += [f"{run.run_id}: warning: {text}" for text in run.warnings]
        lines += [f"{run.run_id}: line {crash.line}: {crash.text}" for crash in run.crashes]
        lines += [f"{run.run_id}: {text}" for text in run.problems]
    shown = lines[:200] + ([f"and {len(lines) - 200} more"] if len(lines) > 200 else [])
    items = "".join(f"<li>{escape(line[:500])}</li>" for line in shown)
    return _section("Remarks", f"<ul>{items}</ul>" if items else "")


# --------------------------------------------------------------------------- figures, tensorboard


def write_figures(runs: Sequence[Run], folder: Path, *, png: bool) -> list[Path]:
    """Write every figure as SVG, and as PNG where asked for; the paths written.

    Raises: ReportError if no program that converts SVG is installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for item in figures.figures(runs):
        path = folder / f"{item.name}.svg"
        path.write_text(item.drawing + "\n", encoding="utf-8")
        paths.append(path)
    if png:
        convert = png_converter()
        for path in list(paths):
            convert(path, path.with_suffix(".png"))
            paths.append(path.with_suffix(".png"))
    return paths


def png_converter() -> Callable[[Path, Path], None]:
    """A function from SVG file to PNG file. Raises: ReportError if nothing can convert."""
    commands: tuple[tuple[str, Callable[[Path, Path], list[str]]], ...] = (
        ("rsvg-convert", lambda s, p: ["--zoom=2", "-o", str(p), str(s)]),
        ("inkscape", lambda s, p: [str(s), f"--export-filename={p}"]),
        ("magick", lambda s, p: [str(s), str(p)]),
        ("chromium", _chromium_arguments),
        ("google-chrome", _chromium_arguments),
    )
    for program, arguments in commands:
        found = shutil.which(program)
        if found:
            return lambda s, p: _convert([found, *arguments(s, p)], p)
    if importlib.util.find_spec("cairosvg"):
        module = importlib.import_module("cairosvg")
        return lambda s, p: module.svg2png(url=str(s), write_to=str(p), scale=2)
    raise ReportError("--png: install librsvg2-bin (rsvg-convert), inkscape or cairosvg")


def _chromium_arguments(source: Path, target: Path) -> list[str]:
    """Arguments with which a browser prints an SVG file."""
    text = source.read_text(encoding="utf-8")
    height = text.split(' height="', 1)[1].split('"', 1)[0]
    size = [f"--window-size=720,{height}", "--force-device-scale-factor=2", "--hide-scrollbars"]
    shot = [f"--screenshot={target.resolve()}", source.resolve().as_uri()]
    return ["--headless", "--no-sandbox", "--disable-gpu", *size, *shot]


def _convert(command: list[str], target: Path) -> None:
    """Run a converter. Raises: ReportError if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode != 0 or not target.is_file():
        raise ReportError(f"{Path(command[0]).name} failed: {done.stderr.strip()[-200:]}")


def export_tensorboard(runs: Sequence[Run], folder: Path) -> None:
    """Write the series of every run as TensorBoard scalars. Raises: ReportError without it."""
    try:
        module = importlib.import_module("torch.utils.tensorboard")
    except ImportError as error:
        raise ReportError("--tensorboard: not installed: pip install tensorboard") from error
    for run in runs:
        writer = module.SummaryWriter(str(folder / run.run_id))
        for point in run.train:
            scalars = {"loss": point.loss, "lr_scale": point.lr_scale, "tok_s": point.tok_s}
            for name, value in (scalars | {"mem_mib": point.mem_mib}).items():
                if value is not None:
                    writer.add_scalar(f"train/{name}", value, point.step)
        for seen in run.validation:
            writer.add_scalar("val/loss", seen.loss, seen.step)
            writer.add_scalar("val/bpb", seen.bpb, seen.step)
        last = run.train[-1].step if run.train else 0
        for item in run.evaluations:
            if item.bpb is not None:
                writer.add_scalar(f"final_bpb/{item.name}", item.bpb, last)
        writer.close()


# ------------------------------------------------------------------------------------------- watch


def status_lines(run: Run) -> list[tuple[str, str]]:
    """What a watcher wants to know, as (label, text) pairs."""
    lines = [("run", run.run_id)]
    if run.phases:
        lines.append(("last phase", f"{run.phases[-1].name}, {run.phases[-1].seconds:.1f} s"))
    if run.train:
        lines += _train_status(run)
    if run.validation:
        seen = run.validation[-1]
        text = f"{seen.bpb:.4f} BPB, {seen.loss:.4f} nats at step {seen.step}"
        lines.append(("validation", text))
    for item in run.evaluations:
        took = f", {item.seconds:.1f} s" if item.seconds is not None else ""
        if item.bpb is not None:
            lines.append((item.name, f"{item.bpb:.5f} BPB{took}"))
    total = run.number("artifact.total_bytes")
    if total is not None:
        lines.append(("artifact", f"{total:,.0f} of {CAP_BYTES:,} bytes"))
    if run.warnings:
        lines.append(("warning", run.warnings[-1]))
    if run.text("status"):
        lines.append(("status", f"{run.text('status')}: {run.text('exit_reason') or ''}"))
    return lines


def _train_status(run: Run) -> list[tuple[str, str]]:
    """Progress of training with the time that is left."""
    point = run.train[-1]
    recent = [p.loss for p in run.train[-10:]]
    parts = [f"step {point.step:,}", f"loss {point.loss:.4f}"]
    parts += [f"mean of {len(recent)}: {sum(recent) / len(recent):.4f}"] if len(recent) > 1 else []
    parts += [f"{point.tok_s:,.0f} tok/s"] if point.tok_s else []
    parts += [f"lr x{point.lr_scale:.3f}"] if point.lr_scale is not None else []
    parts += [point.plan] if point.plan else []
    parts += [f"{point.mem_mib:,.0f} MiB"] if point.mem_mib else []
    lines = [("training", ", ".join(parts))]
    if point.progress and not run.evaluations:
        width = 30
        full = min(width, int(width * point.progress))
        left = ""
        if point.seconds and point.progress < 1:
            left = f", {point.seconds / point.progress - point.seconds:.0f} s left"
        bar = f"[{'#' * full}{'.' * (width - full)}] {100 * point.progress:.0f} %{left}"
        lines.append(("progress", bar))
    return lines


def is_finished(run: Run) -> bool:
    """Whether the run has said how it ended."""
    return run.text("status") is not None


class Follower:
    """A run that is being written; `run()` is its present state."""

    def __init__(self, name: str, logs: Path) -> None:
        first = load_run(name, logs)
        path = first.files.get("events")
        if path is None:
            raise RunError(f"run {name!r} has no .jsonl file to follow")
        self.reader, self.result = EventReader(path), first.files.get("result")
        self.lock = threading.Lock()

    def run(self) -> Run:
        """The run as far as it is written; with its result once there is one."""
        with self.lock:
            self.reader.poll()
            result = self.reader.path.with_name(f"{self.reader.run.run_id}.json")
            if result.is_file():
                with contextlib.suppress(RunError):
                    return combine(self.reader.run, load_run(result))
            return self.reader.run


def watch_terminal(follower: Follower, interval: float, *, once: bool) -> None:
    """Show the run until it ends; a live panel with rich on a terminal, else lines that change."""
    if not once and sys.stdout.isatty() and importlib.util.find_spec("rich"):
        _watch_rich(follower, interval)
        return
    shown: list[tuple[str, str]] = []
    while True:
        run = follower.run()
        lines = status_lines(run)
        for label, text in lines:
            if (label, text) not in shown:
                print(f"{_printable(label):<12} {_printable(text)}", flush=True)
        shown = lines
        if once or is_finished(run):
            return
        time.sleep(interval)


def _printable(text: str) -> str:
    """Text without control characters, which a log could use to write over the terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _watch_rich(follower: Follower, interval: float) -> None:
    """Live table in the terminal."""
    live, table, text = (importlib.import_module(f"rich.{n}") for n in ("live", "table", "text"))

    def draw(run: Run) -> object:
        """Table of the present state."""
        grid = table.Table.grid(padding=(0, 2))
        for label, line in status_lines(run):
            grid.add_row(text.Text(_printable(label), style="bold"), text.Text(_printable(line)))
        return grid

    run = follower.run()
    with live.Live(draw(run), refresh_per_second=4) as view:
        while not is_finished(run):
            time.sleep(interval)
            run = follower.run()
            view.update(draw(run))


def page_server(follower: Follower, port: int, refresh_seconds: int) -> ThreadingHTTPServer:
    """A server on 127.0.0.1 whose only page shows the run as it is now."""

    class Handler(BaseHTTPRequestHandler):
        """Answers `/` and nothing else."""

        def do_GET(self) -> None:
            """Send the page, unless the request came through another host's name."""
            host = (self.headers.get("Host") or "").rsplit(":", 1)[0]
            if self.path != "/" or host not in ("127.0.0.1", "localhost"):
                self.send_error(404)
                return
            run = follower.run()
            again = 0 if is_finished(run) else refresh_seconds
            data = page([run], refresh_seconds=again).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            """Requests are not worth a line."""

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


# ------------------------------------------------------------------------------------ command line


def command_page(arguments: Sequence[str]) -> int:
    """Write the page."""
    parser = page_parser()
    options = parser.parse_args(arguments)
    if options.png and not options.figures:
        parser.error("--png: only with --figures DIR")
    runs = [load_run(name, options.logs) for name in options.runs]
    if options.tensorboard:
        export_tensorboard(runs, options.tensorboard)
        print(f"{options.tensorboard}: tensorboard --logdir {options.tensorboard}")
    out = options.out / "report.html" if options.out.is_dir() else options.out
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(runs), encoding="utf-8")
    print(f"{out}: {out.stat().st_size:,} bytes, {len(runs)} run(s)")
    if options.figures:
        paths = write_figures(runs, options.figures, png=options.png)
        print(f"{options.figures}: {', '.join(path.name for path in paths)}")
    return 0


def command_readme(arguments: Sequence[str]) -> int:
    """Rewrite or check the generated blocks of a Markdown file."""
    parser = argparse.ArgumentParser(
        prog="report.py readme", description=readme_blocks.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--check", action="store_true", help="fail if the file is out of date")
    options = parser.parse_args(arguments)
    if options.check:
        found = readme_blocks.stale(options.file)
        for line in found:
            print(f"error: {line}", file=sys.stderr)
        if found:
            command = f"python tools/report.py readme {options.file}"
            print(f"error: {options.file} is out of date: {command}", file=sys.stderr)
        return 1 if found else 0
    for path in readme_blocks.update(options.file):
        print(f"{path}: written")
    return 0


def command_watch(arguments: Sequence[str]) -> int:
    """Follow a live run."""
    parser = argparse.ArgumentParser(prog="report.py watch", description="follow a live run")
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--logs", type=Path, default=REPOSITORY / "logs")
    parser.add_argument("--interval", type=number_between(float, 0.1, 3600.0), default=2.0,
                        metavar="SECONDS", help="between looks")
    parser.add_argument("--once", action="store_true", help="print the present state and end")
    parser.add_argument(
        "--html", nargs="?", type=number_between(int, 0, 65535), const=8765, metavar="PORT",
        help="also serve a refreshing page on 127.0.0.1 (0: any free port)",
    )
    options = parser.parse_args(arguments)
    follower = Follower(options.run, options.logs)
    server = None
    if options.html is not None:
        server = page_server(follower, options.html, max(1, round(options.interval)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(f"http://127.0.0.1:{server.server_address[1]}/", flush=True)
    try:
        watch_terminal(follower, options.interval, once=options.once)
    except KeyboardInterrupt:
        print()
    finally:
        if server:
            server.shutdown()
            server.server_close()
    return 0


def page_parser() -> argparse.ArgumentParser:
    """Command line of the page."""
    parser = argparse.ArgumentParser(
        prog="report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--logs", type=Path, default=REPOSITORY / "logs", help="folder of runs")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "runs" / "report.html",
                        help="the page, or a folder for report.html")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="write figures as SVG files")
    parser.add_argument("--png", action="store_true", help="with --figures: PNG files as well")
    parser.add_argument("--tensorboard", type=Path, metavar="DIR", help="write TensorBoard events")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    commands = {"readme": command_readme, "watch": command_watch}
    try:
        if given and given[0] in commands:
            return commands[given[0]](given[1:])
        return command_page(given)
    except readme_blocks.BlockError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3


if __name__ == "__main__":
    sys.exit(main())
