"""Writes the generated blocks of a Markdown file from logs, so that no number in it is typed.

A block begins with `<!-- generated:NAME ARGUMENTS -->` and ends with `<!-- /generated -->`; what
stands between is replaced. Runs are named by their id in logs/ beside the Markdown file, files by
their path from its folder.

    headline RUN...     one sentence with score, bytes, clocks and hardware
    result RUN...       table of evaluations: BPB, nats per token, seconds
    runs [PATTERN]      table of all runs in logs/
    systems PATTERN     parameters, speed, bytes and scores of runs, side by side
    versus RUNS RUNS    two systems, each as RUN,RUN,... of equal seeds, and their difference
    recipe JSON         what tools/bench_recipe.py found: gain, noise and price by technique
    bytes RUN           where the bytes of the cap go
    speed BENCH_JSON... name, value, unit, floor, ratio
    scaling RANKS_JSON  what tools/bench_ranks.py found: speed by number of ranks, agreement
    curve CURVE_JSON    quantiser curve, with docs/quantiser_curve.svg
    adaptation JSON     what learning from documents gains, by the seconds that it takes
    plot RUN...         docs/loss.svg
    path PRESET         from a fresh pod to a records folder: commands, minutes, dollars

headline, result, bytes and plot without a RUN speak of the runs in submission.json.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tools import figures, svg, welch
from tools.runs import (
    CAP_BYTES,
    Evaluation,
    Json,
    Run,
    RunError,
    as_number,
    as_numbers,
    find_runs,
    load_run,
    sha256_of,
)
from tools.runs import read_json as read_mapping

OPENING, CLOSING = "<!-- generated:", "<!-- /generated -->"


class BlockError(Exception):
    """A block that cannot be written; the message names the block and what is wrong."""


@dataclass(slots=True)
class Sources:
    """Where blocks read from, and the files they want written."""

    root: Path
    files: dict[Path, str] = field(default_factory=dict)

    @property
    def logs(self) -> Path:
        """Folder of the runs."""
        return self.root / "logs"

    def run(self, name: str) -> Run:
        """A run with a result file. Raises: RunError naming it, if it is not in the logs."""
        run = load_run(name, self.logs)
        if "result" not in run.files:
            raise RunError(f"run {name!r} has no result file in {self.logs}")
        return run

    def some_runs(self, names: Sequence[str]) -> list[Run]:
        """Runs by name, or those of submission.json.

        Raises: BlockError if none is named there either, RunError if one is missing.
        """
        if not names:
            path = self.root / "submission.json"
            listed = read_mapping(path).get("logs") if path.is_file() else None
            names = [str(name) for name in listed] if isinstance(listed, list) else []
        if not names:
            raise BlockError("names no run, and no submission.json lists any")
        return [self.run(name) for name in names]

    def matching_runs(self, patterns: Sequence[str]) -> list[Run]:
        """Runs whose ids match the first pattern, all without one, oldest first.

        Raises: BlockError if there are none.
        """
        pattern = patterns[0] if patterns else "*"
        runs = [run for run in find_runs(self.logs) if fnmatch.fnmatch(run.run_id, pattern)]
        if not runs:
            raise BlockError(f"no run in {self.logs} matches {pattern!r}")
        return runs


# ------------------------------------------------------------------------------------- formatting


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Markdown table; the first `left` columns are aligned left, the others right."""
    rule = ["---" if i < left else "---:" for i in range(len(header))]
    lines = [header, rule, *rows]
    return "\n".join("| " + " | ".join(cell(text) for text in line) + " |" for line in lines)


def cell(text: str) -> str:
    """Text that cannot break out of a table cell or become HTML."""
    clean = " ".join(text.split()).replace("|", "\\|")
    return clean.replace("<", "&lt;") if not clean.startswith("![") else clean


def shown(value: float | None, form: str, absent: str = "not run") -> str:
    """A number in a format, or the word for its absence."""
    return absent if value is None else format(value, form)


def log_link(run: Run, text: str) -> str:
    """Link from the README to the text log of a run, which may lie in a folder of the logs.

    Raises: BlockError if it lies elsewhere.
    """
    path = run.files["result"].with_name(f"{run.run_id}.txt")
    logs = next((folder for folder in path.parents if folder.name == "logs"), None)
    if logs is None:
        raise BlockError(f"{path}: a run outside any folder of logs")
    return f"[{text}]({path.relative_to(logs.parent).as_posix()})"


def program_remark(sources: Sources, hashes: Iterable[object]) -> str:
    """Says which hashes are of another program than the one beside the README, if some are."""
    program = sources.root / "train_gpt.py"
    present = sha256_of(program) if program.is_file() else None
    others = [str(name)[:8] for name in dict.fromkeys(hashes)
              if name and present and name != present]
    return f"By an earlier program (source {', '.join(others)})." if others else ""


def _shared(runs: Sequence[Run], key: str) -> str:
    """Value at a key that all runs share. Raises: BlockError where they differ."""
    values = {str(run.get(key)) for run in runs}
    if len(values) > 1:
        raise BlockError(f"runs differ in {key}: {', '.join(sorted(values))}")
    return values.pop()


def _mean(runs: Sequence[Run], key: str) -> float:
    """Mean over runs. Raises: BlockError naming the run that lacks the key."""
    values = []
    for run in runs:
        value = run.number(key)
        if value is None:
            raise BlockError(f"run {run.run_id} has no {key}")
        values.append(value)
    return welch.mean(values)


# ----------------------------------------------------------------------------------------- blocks


def block_headline(sources: Sources, arguments: Sequence[str]) -> str:
    """One sentence about one run, or about the seeds of one method."""
    runs = sources.some_runs(arguments)
    for key in ("headline", "config_hash", "data.fingerprint"):
        _shared(runs, key)
    first, scores = runs[0], [_mean([run], "val_bpb") for run in runs]
    spread = f" +- {welch.deviation(scores):.4f}" if len(runs) > 1 else ""
    seeds = ", ".join(f"{run.seed}" for run in runs)
    most = max(_mean([run], "artifact.total_bytes") for run in runs)
    machine = first.machine or "unknown"
    links = ", ".join(log_link(run, f"seed {run.seed}") for run in runs)
    remark = program_remark(sources, [run.text("source_sha256") for run in runs])
    return (
        f"**{welch.mean(scores):.4f}{spread} BPB** ({_mean(runs, 'val_loss'):.4f} nats per token, "
        f"`{first.headline}`) after {_mean(runs, 'clocks.training_seconds'):.0f} s of training and "
        f"{_mean(runs, 'clocks.eval_seconds_strict'):.0f} s of evaluation on {machine}: "
        f"preset `{_shared(runs, 'preset')}`, seed{'s' if len(runs) > 1 else ''} {seeds}, "
        f"{most:,.0f} of {CAP_BYTES:,} bytes, data `{_shared(runs, 'data.name')}`, "
        f"track `{_shared(runs, 'track')}`. Logs: {links}. {remark}"
    ).rstrip()


def block_result(sources: Sources, arguments: Sequence[str]) -> str:
    """Evaluations of a run, or of several side by side."""
    runs = sources.some_runs(arguments)
    names = list(dict.fromkeys(item.name for run in runs for item in run.evaluations))
    rows = []
    for name in names:
        for run in runs:
            item = run.evaluation(name)
            if item is not None:
                rows.append(_result_row(run, item, several=len(runs) > 1))
    header = ["Evaluation", "BPB", "Nats per token", "Seconds"]
    if len(runs) > 1:
        return table(["Evaluation", "Run", *header[1:]], rows, left=2)
    return table(header, rows)


def _result_row(run: Run, item: Evaluation, *, several: bool) -> list[str]:
    """Cells of one evaluation; the one that counts is bold."""
    bold = "**" if item.name == run.headline else ""
    cells = [f"`{item.name}`", f"{bold}{shown(item.bpb, '.4f')}{bold}"]
    cells += [shown(item.loss, ".4f"), shown(item.seconds, ".1f", "not timed")]
    return [cells[0], log_link(run, run.run_id), *cells[1:]] if several else cells


def block_evaluations(sources: Sources, arguments: Sequence[str]) -> str:
    """Evaluations of one artifact by several runs: score, clocks, and what the live audit found."""
    runs = sources.some_runs(arguments)
    _shared(runs, "bpb.quantised")  # else they evaluated different artifacts
    items = {item.name: (run, item) for run in reversed(runs) for item in run.evaluations}
    rows = []
    for name, (run, item) in sorted(items.items(), key=lambda pair: -(pair[1][1].bpb or 0)):
        whole_run = ["", "", ""]
        if name == run.headline:  # strict clock and audit run through all evaluations to this one
            whole_run = [
                shown(run.number(f"clocks.{key}"), ".0f")
                for key in ("eval_seconds_strict", "projected_full_eval_seconds_8gpu")
            ]
            whole_run.append(_audited(run))
        seconds = shown(item.seconds, ".1f", "not timed")
        cells = [f"`{name}`", log_link(run, run.run_id), shown(item.bpb, ".5f"), seconds]
        rows.append([*cells, *whole_run])
    header = ["Evaluation", "Run", "BPB", "Lenient s", "Strict s", "8 GPUs, official: s", "Audit"]
    return table(header, rows, left=2)


def _audited(run: Run) -> str:
    """The conditions that a run's audit checked, and how often."""
    found = []
    for name, facts in run.table("audit").items():
        if isinstance(facts, dict):
            verdict = "" if facts.get("passed") else "FAILED "
            checked = facts.get("checked")
            count = f"{checked:,}" if isinstance(checked, int) else "unknown"
            found.append(f"{verdict}{name.split('_')[0]} {count}")
    return ", ".join(found) or "none"


def block_runs(sources: Sources, arguments: Sequence[str]) -> str:
    """All runs in the logs, oldest first; a pattern narrows them."""
    rows = []
    for run in sources.matching_runs(arguments):
        complete = run.text("status") == "complete"
        score = shown(run.val_bpb, ".4f", "none") if complete else f"{run.text('status')}"
        by_plan = run.table("train").get("tok_s_by_plan", {})
        found = by_plan.values() if isinstance(by_plan, dict) else []
        rates = [rate for rate in found if isinstance(rate, int | float)]
        rows.append(
            [
                log_link(run, run.run_id),
                run.text("preset") or "unknown",
                f"{run.seed}",
                run.machine or "unknown",
                shown(run.number("clocks.training_seconds"), ".0f"),
                shown(run.number("train.steps"), ",.0f"),
                " / ".join(f"{rate / 1e6:.3f}" for rate in rates) or "none",
                shown(run.number("bpb.averaged"), ".4f"),
                shown(run.number("bpb.quantised"), ".4f"),
                score,
                f"`{run.headline}`" if run.headline else "none",
                shown(run.number("artifact.total_bytes"), ",.0f"),
            ]
        )
    header = ["Run", "Preset", "Seed", "Hardware", "Training s", "Steps", "M tok/s", "Averaged BPB"]
    header += ["Quantised BPB", "Final BPB", "Evaluation", "Bytes"]
    return table(header, rows, left=2)


def block_systems(sources: Sources, arguments: Sequence[str]) -> str:
    """Runs of several systems; the published mixture's number apart, as it is no score."""
    runs = sources.matching_runs(arguments)
    mixtures, rows = any(run.table("hedge1453") for run in runs), []
    for run in runs:
        mass = as_number(run.table("hedge1453").get("mass"))
        rows.append(
            [
                log_link(run, run.text("preset") or "unknown"),
                shown(run.number("model.parameters"), ",.0f"),
                shown(run.number("clocks.training_seconds"), ".0f"),
                shown(run.number("train.steps"), ",.0f"),
                shown(run.number("train.ms_per_step"), ".1f"),
                shown(run.number("artifact.model_bytes"), ",.0f"),
                shown(run.number("artifact.total_bytes"), ",.0f"),
                shown(run.number("bpb.averaged"), ".4f"),
                shown(run.number("bpb.quantised"), ".4f"),
                shown(run.val_bpb, ".4f"),
                f"`{run.headline}`",
                shown(run.val_loss, ".4f"),
            ]
        )
        if mixtures:
            nats = shown(run.number("hedge1453.nats"), ".4f")
            rows[-1].append(nats if mass is None else f"{nats}, mass {mass:.1f}: no distribution")
    header = ["Preset", "Parameters", "Training s", "Steps", "ms a step", "Model file"]
    header += ["With program", "Averaged BPB", "Quantised BPB", "Score, BPB", "Evaluation", "Nats"]
    return table(header + ["Published mixture, \"nats\""] * mixtures, rows, left=1)


VERSUS = {
    "Steps": ("train.steps", ",.0f"), "Step, ms": ("train.ms_per_step", ".1f"),
    "Program and model, bytes": ("artifact.total_bytes", ",.0f"),
    "Targets scored": ("data.val_targets", ",.0f"),
    "Averaged weights, BPB": ("bpb.averaged", ".4f"), "Quantised, BPB": ("bpb.quantised", ".4f"),
    "Own best evaluation, BPB": ("val_bpb", ".4f")}


def block_versus(sources: Sources, arguments: Sequence[str]) -> str:
    """Two systems side by side, by equal seeds of one source on one kind of machine.

    Both trained for equal seconds, or for equal steps: then their speed is no part of it.
    """
    if len(arguments) != 2:
        raise BlockError("takes two groups of runs, each as RUN,RUN,...")
    groups = [[sources.run(name) for name in group.split(",")] for group in arguments]
    both = [run for group in groups for run in group]
    # The tail that fills no sequence is scored by some presets and not by others: see the targets.
    for key in ("source_sha256", "data.train_ends_sha256", "data.tokenizer_sha256",
                "data.val_documents", "hardware.gpu", "versions.attention_backend",
                "config.train_batch_tokens", "config.artifact_cap_bytes"):
        _shared(both, key)
    equal_steps = len({run.get("train.steps") for run in both}) == 1
    if not equal_steps:
        _shared(both, "config.max_wallclock_seconds")
    seeds = [[run.seed for run in group] for group in groups]
    if seeds[0] != seeds[1]:
        raise BlockError(f"seeds {seeds[0]} against {seeds[1]}")
    rows = []
    for label, (key, form) in VERSUS.items():
        if equal_steps and key == "train.ms_per_step":  # such runs may have shared a GPU
            continue
        first, second = ([_mean([run], key) for run in group] for group in groups)
        test, gap = welch.paired(first, second), welch.mean(first) - welch.mean(second)
        noise = f" ± {format(test.standard_error, form)}" if test else ""
        rows.append([label, format(welch.mean(first), form), format(welch.mean(second), form),
                     f"{format(gap, '+' + form)}{noise}"])
    evaluations = [", ".join(dict.fromkeys(f"`{run.headline}`" for run in group))
                   for group in groups]
    rows.append(["Its name", *evaluations, ""])
    rows.append(["Logs", *(", ".join(log_link(run, f"seed {run.seed}") for run in group)
                           for group in groups), ""])
    presets = [f"`{_shared(group, 'preset')}`" for group in groups]
    return table(["Mean over seeds", *presets, "Difference"], rows)


def block_recipe(sources: Sources, arguments: Sequence[str]) -> str:
    """Techniques by pairs of runs with and without them."""
    if not arguments:
        raise BlockError("names no file of tools/bench_recipe.py")
    content, rows = read_mapping(sources.root / arguments[0]), []
    for row in _rows(content, arguments[0]):
        technique, pairs = row.get("technique"), as_number(row.get("pairs"))
        if not isinstance(technique, str) or pairs is None:
            raise BlockError(f"{arguments[0]}: a row lacks its technique or its number of pairs")
        cells = [technique, f"{pairs:.0f}"]
        for column in ("gain", "pre-quantisation"):
            gain, noise = as_number(row.get(column)), as_number(row.get(f"{column} noise"))
            cells.append(shown(gain, "+.4f") + (f" ± {noise:.4f}" if noise is not None else ""))
        cells.append(shown(as_number(row.get("ms per step")), ".1f"))
        cells.append(shown(as_number(row.get("slower")), "+.1%"))
        cells += [shown(as_number(row.get(key)), ",.0f", "") for key in ("lines", "packed bytes")]
        rows.append(cells)
    header = ["Technique", "Pairs", "Gain, BPB", "Before quantisation", "Step, ms", "Slower"]
    return recipe_runs(content) + table([*header, "Lines", "Packed bytes"], rows)


def recipe_runs(content: Mapping[str, Json]) -> str:
    """One sentence on the runs that techniques are compared by; empty if the file lacks a part."""
    seeds, settings = content.get("seeds"), content.get("settings")
    steps, seconds = as_number(content.get("steps")), as_number(content.get("seconds"))
    if not isinstance(seeds, list) or not isinstance(settings, dict) or not (steps or seconds):
        return ""
    length = f"{steps:,.0f} steps" if steps else f"{seconds:g} s in steps"
    tokens = str(settings.get("TRAIN_BATCH_TOKENS"))
    batch = f" of {int(tokens):,} tokens" if tokens.isdecimal() else ""
    sides = "without one technique against runs with all" if content.get("leave_out") else (
        "with one technique against runs with none")
    told = "ITERATIONS", "MAX_WALLCLOCK_SECONDS", "TRAIN_BATCH_TOKENS"
    also = ", ".join(f"`{name}={value}`" for name, value in sorted(settings.items())
                     if name not in told and not name.endswith(("_DIR", "_PATH")))
    return (f"Runs of {length}{batch}, seeds {', '.join(map(str, seeds))}, each {sides}"
            f"{also and f'; also {also}'}.\n\n")


def block_adaptation(sources: Sources, arguments: Sequence[str]) -> str:
    """Gain of test-time training by document against its seconds, cheapest first."""
    name = arguments[0] if arguments else "logs/adaptation_curve.json"
    content = read_mapping(sources.root / name)
    rows, preset = _rows(content, name), content.get("preset")
    columns = "plain_bpb", "adapted_bpb", "gain_bpb", "seconds", "projected_seconds"
    body = []
    for row in sorted(rows, key=lambda row: as_number(row.get("projected_seconds")) or 0.0):
        label = f"`{row['settings']}`" if row.get("settings") else f"as in `{preset}`"
        values = [as_number(row.get(column)) for column in columns]
        body.append([label, *(shown(value, ".5f") for value in values[:3]),
                     *(shown(value, ".0f") for value in values[3:])])
    header = ["Settings", "Documents alone, BPB", "Adapted, BPB", "Gain", "Seconds"]
    count = f"First {content['documents']}" if content.get("documents") else "All"
    title = f"{count} documents of `{content.get('data')}`, {content.get('device')}:\n\n"
    measured = table([*header, "8 GPUs, official: s"], body, left=1)
    remark = program_remark(sources, [content.get("source_sha256")])
    return f"{title}{measured}\n\n{remark}".rstrip()


def block_bytes(sources: Sources, arguments: Sequence[str]) -> str:
    """Parts of the artifact."""
    run = sources.some_runs(arguments[:1])[0]
    parts = figures.byte_parts(run)
    if not parts:
        raise BlockError(f"run {run.run_id} has no artifact")
    total = sum(value for _, value in parts)
    rows = [[name, f"{value:,.0f}", f"{100 * value / total:.2f} %"] for name, value in parts]
    shares = table(["Part", "Bytes", "Share"], [*rows, ["cap", f"{total:,.0f}", "100 %"]])
    return f"{shares}\n\n{program_remark(sources, [run.text('source_sha256')])}".rstrip()


CEILINGS = ("copy", "product ", "attention ")  # rows that time the machine, not the program


def block_speed(sources: Sources, arguments: Sequence[str]) -> str:
    """Rows of benchmark files side by side; the floor, and the ratio to it, of the last one."""
    if not arguments:
        raise BlockError("names no benchmark file")
    files = [{str(row.get("name")): row for row in _rows(read_mapping(sources.root / name), name)}
             for name in arguments]
    body = []
    for name, row in files[-1].items():
        if name.startswith(CEILINGS):
            continue
        values = [number_text(file.get(name, {}).get("value")) for file in files]
        ratio = shown(as_number(row.get("ratio_to_floor")), ".2f", "none")
        body.append([name, *values, str(row.get("unit") or ""),
                     number_text(row.get("floor")), ratio])
    links = [f"[{Path(name).stem}]({name})" for name in arguments]
    header = ["What", *(links if len(links) > 1 else ["Measured"])]
    return table([*header, "Unit", "Floor", "Ratio to floor"], body, left=1)


def block_variants(sources: Sources, arguments: Sequence[str]) -> str:
    """Micro-steps of variants that took turns, from a file of tools/bench_variants.py."""
    if len(arguments) != 1:
        raise BlockError("names no file of tools/bench_variants.py")
    content, body = read_mapping(sources.root / arguments[0]), []
    for row in _rows(content, arguments[0]):
        rounds = [f"{value:.2f}" for value in as_numbers(row.get("ms"))]
        name = re.sub(r"(?<=program=)\S*/", "", str(row.get("variant") or "as it is"))
        body.append([f"`{name}`", str(row.get("attention")),
                     f"`{row.get('plan')}`", ", ".join(rounds), number_text(row.get("tok_s")),
                     shown(as_number(row.get("faster")), "+.1%")])
    header = ["Variant", "Attention", "Plan", "Rounds, ms", "Tok/s", "Faster"]
    return (f"{content.get('gpu')}, `{content.get('preset')}`, "
            f"{number_text(content.get('tokens_per_micro_step'))} tokens a micro-step:\n\n"
            + table(header, body, left=3))


def block_scaling(sources: Sources, arguments: Sequence[str]) -> str:
    """Speed by number of GPUs, and whether ranks agree, from a file of tools/bench_ranks.py.

    Runs that it started whole may follow.
    """
    if not arguments:
        raise BlockError("names no file of tools/bench_ranks.py")
    content = read_mapping(sources.root / arguments[0])
    body = []
    for row in _rows(content, arguments[0]):
        numbers = [as_number(row.get(name)) for name in (
            "tok_s", "speed_up", "ms_per_step", "optimizer_ms", "collectives_ms", "overlapped")]
        forms = ",.0f", ".3f", ".2f", ".2f", ".2f", ".0%"
        body.append([f"{row.get('world_size')}", str(row.get("batch")), f"`{row.get('plan')}`",
                     number_text(row.get("batch_tokens")),
                     *(shown(n, form) for n, form in zip(numbers, forms, strict=True))])
    header = ["Ranks", "Batch", "Plan", "Tokens a step", "Tok/s", "Speed-up", "Step, ms",
              "Optimizer, ms", "Collectives, ms", "Overlapped"]
    agreement = content.get("agreement")
    lines = [agreement_line(row, arguments[0])
             for row in (agreement if isinstance(agreement, list) else [])
             if isinstance(row, dict) and row.get("world_size") != 1]
    for run in map(sources.run, arguments[1:]):
        equal = run.get("train.equal_weights")
        if not isinstance(equal, bool):
            raise BlockError(f"run {run.run_id} was not started by bench_ranks --whole-run")
        lines.append(f"* {log_link(run, run.run_id)}: weights {'equal' if equal else 'DIFFER'} on "
                     f"all {run.number('world_size'):.0f} ranks when training ended.")
    return "\n".join([f"{content.get('gpu')}, `{content.get('preset')}`:\n",
                      table(header, body, left=3), "", *lines]).rstrip()


def agreement_line(row: Mapping[str, Json], name: str) -> str:
    """Whether the ranks of one world size agree. Raises: BlockError naming what the row lacks."""
    found = {key: as_number(row.get(key)) for key in ("steps", "loss_gap", "mean_loss_gap")}
    equal = row.get("equal_weights")
    lacking = [key for key, value in {**found, "equal_weights": equal}.items() if value is None]
    if lacking:
        raise BlockError(f"{name}: agreement {dict(row)} lacks {', '.join(lacking)}")
    steps, gap, mean = found.values()
    return (f"* {row.get('world_size')} ranks: weights {'equal' if equal else 'DIFFER'} on all "
            f"ranks after {steps:.0f} steps, whose losses are at most {gap:.1e} from those of one "
            f"rank (mean {mean:.1e}).")


def _rows(content: Mapping[str, Json], name: str) -> list[dict[str, Json]]:
    """List of mappings under `rows`. Raises: BlockError naming the file if there are none."""
    rows = content.get("rows")
    found = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    if not found:
        raise BlockError(f"{name} has no rows")
    return found


def number_text(value: Json) -> str:
    """A measured number with four digits, or the word for its absence."""
    number = as_number(value)
    if number is None:
        return "none"
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.4g}"


def block_curve(sources: Sources, arguments: Sequence[str]) -> str:
    """Quantisation gap against bytes: table and figure."""
    name = arguments[0] if arguments else "logs/quantiser_curve.json"
    rows = _rows(read_mapping(sources.root / name), name)
    methods: dict[str, dict[float, float]] = {}
    caps: dict[float, dict[str, float]] = {}
    for row in rows:
        size, gap = as_number(row.get("total_bytes")), as_number(row.get("gap_bpb"))
        if size is None or gap is None:
            raise BlockError(f"{name}: row {row} lacks total_bytes or gap_bpb")
        method = str(row.get("method"))
        methods.setdefault(method, {})[size] = gap
        caps.setdefault(as_number(row.get("cap_bytes")) or size, {})[method] = gap
    lines = [
        svg.Series(
            method,
            [size / 1e6 for size in sorted(points)],
            [points[size] for size in sorted(points)],
            i,
            dots=True,
        )
        for i, (method, points) in enumerate(methods.items())
    ]
    chart = svg.Chart("Quantisation gap against bytes", "artifact, million bytes", "BPB", lines)
    sources.files[sources.root / "docs" / "quantiser_curve.svg"] = svg.line_chart(chart)
    body = []
    for cap in sorted(caps):
        gaps, base = caps[cap], caps[cap].get("reference")
        cells = [f"{gaps[m]:.5f}" + (f" ({gaps[m] / base:.2f}x)" if base else "") if m in gaps
                 else "none" for m in methods]
        body.append([f"{cap:,.0f}", *cells])
    picture = "![Quantisation gap against bytes](docs/quantiser_curve.svg)"
    return picture + "\n\n" + table(["Bytes at most", *methods], body)


def block_plot(sources: Sources, arguments: Sequence[str]) -> str:
    """The main figure, as docs/loss.svg."""
    runs = sources.some_runs(arguments)
    drawn = figures.headline_plot(runs)
    if not drawn:
        raise BlockError(f"run {runs[0].run_id} has nothing to plot")
    sources.files[sources.root / "docs" / "loss.svg"] = drawn[0].drawing
    names = ", ".join(run.name for run in runs)
    return f"![Bits per byte against training time: {names}](docs/loss.svg)"


class Step(NamedTuple):
    """A command on the way to a records folder, the seconds it takes, and how they are known."""

    command: str
    seconds: float
    source: str


RECORD_PATH_SEEDS = (42, 314, 999)
NETWORK_BYTES_PER_SECOND = 1e8  # of a rented pod, assumed
INSTALL_BYTES = 5e9  # torch with its CUDA libraries
DATA_BYTES = 129 * 2e8  # the published SP8192 shards: 128 of training, one of validation
DOCTOR_SECONDS = 60.0  # its speed check takes half of them
FOLDER_SECONDS = 60.0  # packing, verifying and trying the program


def record_path(preset: str, logs: Path) -> list[Step]:
    """The way from a fresh pod of eight GPUs to a folder with three seeds.

    Raises: BlockError when no run of the preset was logged on a GPU, evaluation included, and
    when there is no such preset.
    """
    from tools import doctor
    from train_gpt import Config, ConfigError

    try:
        found = doctor.project(Config.from_env({"PRESET": preset}), logs)
    except ConfigError as error:
        raise BlockError(str(error)) from error
    if found is None or found.evaluation is None:
        raise BlockError(f"no run in {logs} tells how long PRESET={preset} takes on GPUs")
    seeds, rate = ",".join(map(str, RECORD_PATH_SEEDS)), NETWORK_BYTES_PER_SECOND
    names = dict.fromkeys(log_link(run, run.run_id) for run in (found.speed, found.evaluation))
    assumed = f"at {rate / 1e6:.0f} MB/s, assumed"
    return [
        Step("pip install -r requirements.txt huggingface_hub", INSTALL_BYTES / rate,
             f"{INSTALL_BYTES / 1e9:.0f} GB {assumed}"),
        Step("python tools/prepare_data.py download sp8192", DATA_BYTES / rate,
             f"{DATA_BYTES / 1e9:.0f} GB {assumed}"),
        Step(f"PRESET={preset} python tools/doctor.py", DOCTOR_SECONDS, "its bound"),
        Step(f"PRESET={preset} AUDIT=1 python tools/sweep.py --packed --seeds {seeds} "
             "--out runs/sweeps/mine", len(RECORD_PATH_SEEDS) * found.seconds,
             f"{len(RECORD_PATH_SEEDS)} x {found.seconds:,.0f} s, by {', '.join(names)}"),
        Step('python tools/record.py make runs/sweeps/mine --name "My run" --author "My name" '
             '--github-id me --blurb "What was done."', FOLDER_SECONDS, "its bound"),
    ]


def block_path(sources: Sources, arguments: Sequence[str]) -> str:
    """Commands from a fresh pod to a records folder, and what each costs."""
    from tools.doctor import POD_DOLLARS_PER_HOUR, dollars

    if len(arguments) != 1:
        raise BlockError("names no preset")
    steps = record_path(arguments[0], sources.logs)
    rows = [[f"{i}", f"`{step.command.split(' --')[0]}`", f"{step.seconds / 60:.1f}",
             dollars(step.seconds), step.source] for i, step in enumerate(steps, 1)]
    total = sum(step.seconds for step in steps)
    rows.append(["", "all", f"{total / 60:.1f}", dollars(total),
                 f"8 GPUs at ${POD_DOLLARS_PER_HOUR:g} an hour"])
    commands = "\n".join(step.command for step in steps)
    return f"```bash\n{commands}\n```\n\n" + table(
        ["Step", "Command", "Minutes", "Cost", "By"], rows, left=2)


BLOCKS: dict[str, Callable[[Sources, Sequence[str]], str]] = {
    "headline": block_headline,
    "result": block_result,
    "evaluations": block_evaluations,
    "runs": block_runs,
    "systems": block_systems,
    "adaptation": block_adaptation,
    "versus": block_versus,
    "recipe": block_recipe,
    "bytes": block_bytes,
    "speed": block_speed,
    "scaling": block_scaling,
    "variants": block_variants,
    "curve": block_curve,
    "plot": block_plot,
    "path": block_path,
}


# -------------------------------------------------------------------------------------- the file


def read_lines(path: Path) -> list[str]:
    """Lines of a Markdown file. Raises: BlockError naming the line that is no UTF-8."""
    content = path.read_bytes()
    try:
        return content.decode().splitlines()
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise BlockError(f"{path.name}:{number}: not UTF-8: {error.reason}") from error


def regenerate(path: Path) -> tuple[str, dict[Path, str]]:
    """New text of a Markdown file, and the figures that belong to it.

    Lines inside code fences are left alone. Raises: BlockError or RunError naming line and block.
    """
    sources = Sources(path.resolve().parent)
    output: list[str] = []
    open_block, fenced, start = "", False, 0
    for number, line in enumerate(read_lines(path), 1):
        fenced ^= line.startswith("```") and not open_block
        if open_block:
            if line.startswith(OPENING):
                raise BlockError(f"{path.name}:{number}: block {open_block!r} is not closed")
            if line.strip() == CLOSING:
                output += [_render(sources, open_block, f"{path.name}:{start}"), line]
                open_block = ""
            continue
        output.append(line)
        if line.startswith(OPENING) and not fenced:
            open_block, start = line[len(OPENING) :].removesuffix("-->").strip(), number
    if open_block:
        raise BlockError(f"{path.name}:{start}: block {open_block!r} is not closed")
    return "\n".join(output) + "\n", sources.files


def _render(sources: Sources, block: str, where: str) -> str:
    """Text of one block. Raises: BlockError with the place of the block."""
    name, *arguments = block.split()
    if name not in BLOCKS:
        raise BlockError(f"{where}: no block {name!r}, there are {', '.join(BLOCKS)}")
    try:
        return BLOCKS[name](sources, arguments)
    except (BlockError, RunError) as error:
        raise BlockError(f"{where}: {name}: {error}") from error


def update(path: Path) -> list[Path]:
    """Write the file and its figures where they changed; the paths written."""
    text, files = regenerate(path)
    written = []
    for target, content in {path: text, **files}.items():
        if not target.is_file() or target.read_bytes() != content.encode():
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(target.name + ".partial")
            partial.write_text(content, encoding="utf-8")
            partial.replace(target)
            written.append(target)
    return written


def stale(path: Path) -> list[str]:
    """What would change, a line each: old and new text, names of figures; empty if nothing."""
    text, files = regenerate(path)
    before, after = read_lines(path), text.splitlines()
    found = [
        f"{path.name}:{number}: {old[:70]!r} would be {new[:70]!r}"
        for number, (old, new) in enumerate(zip(before, after, strict=False), 1)
        if old != new
    ][:5]
    if not found and len(before) != len(after):
        found.append(f"{path.name}: {len(before)} lines would be {len(after)}")
    for target, content in files.items():
        if not target.is_file() or target.read_bytes() != content.encode():
            found.append(f"{target.name} is not what the logs give")
    return found
