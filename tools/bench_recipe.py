#!/usr/bin/env python3
"""What each technique of the recipe is worth: pairs of runs of train_gpt.py with equal seeds.

    python tools/bench_recipe.py --seeds 42,314                   each technique added to none
    python tools/bench_recipe.py --seeds 42 --leave-out           each taken away from all
    python tools/bench_recipe.py --variant "rate: MATRIX_LR=.028/.022" --only "" --seconds 60
    python tools/bench_recipe.py --seeds 42,314,999 --leave-out --steps 600 --gpus 0,0,0 --nproc 1

A technique is a text `name: SETTING=with/without`, with several settings if need be. Runs, their
ledger and further options (--nproc, --gpus, --trainer, --packed, --dry-run, --status, ...; not
--detach) are those of tools/sweep.py: what is complete is not run again, and all GPUs are used. The
table goes to `<out>/recipe.md`, its numbers to `<out>/recipe.json`. A gain is positive where the
technique lowers BPB; its noise is the standard error over pairs, by the spread within all
techniques together: that of two or three pairs alone would be mostly noise.

Runs of equal steps can share a GPU: what one of them waits for, another uses. Their times mean
nothing then and are left out; --times takes those columns from the recipe.json of runs that had a
GPU each, or from a file of tools/bench_variants.py, whose first variant has or lacks all as the
base of the pairs does, and each further one differs in one technique: micro-steps of the deepest
plan. --table writes the table of what is complete so far, and runs nothing.

Exit status: that of the sweep; 2 bad arguments."""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import train_gpt as golf
from tools import runs, sweep, welch

TECHNIQUES = (
    "leaky slope: LEAKY_SLOPE=0.3/0.5", "smear gate: SMEAR_GATE=1/0",
    "attention gate: ATTN_GATE=0.5/0", "short rows early: TRAIN_CONTEXT=0.35:512,0.7:1024/",
    "momentum: MUON_MOMENTUM=0.97/0.99", "rate floor: MIN_LR=0.1/0",
    "rates: MATRIX_LR=0.026/0.022 BETA2=0.99/0.95 WARMDOWN_FRAC=0.85/0.72")

# One GPU's share of a full run's batch; what a full run counts in steps keeps its share of the run.
COMMON = {"TRAIN_BATCH_TOKENS": "98304", "SCHEDULE_STEPS": "4500", "VAL_LOSS_EVERY": "0"}
SCORES = {"gain": "val_bpb", "pre-quantisation": "bpb.averaged"}  # by column
TIMES = "ms per step", "slower"


class Technique(NamedTuple):
    """Settings with it and without it."""

    name: str
    present: dict[str, str]
    absent: dict[str, str]


def parse_technique(text: str) -> Technique:
    """The technique that a text describes. Raises: SweepError."""
    name, _, rest = text.partition(":")
    matches = [re.fullmatch(r"([A-Z][A-Z0-9_]*)=([^/]*)/([^/]*)", word) for word in rest.split()]
    found = [match.groups() for match in matches if match]
    if not name.strip() or not found or len(found) < len(matches):
        raise sweep.SweepError(f"--variant {text!r}: expected 'name: SETTING=with/without ...'")
    return Technique(name.strip(), {setting: value for setting, value, _ in found},
                     {setting: value for setting, _, value in found})


def choose(only: str | None, variants: Sequence[str]) -> list[Technique]:
    """The built-in techniques that are asked for, then the given ones. Raises: SweepError."""
    known = {technique.name: technique for technique in map(parse_technique, TECHNIQUES)}
    names = list(known) if only is None else [name.strip() for name in only.split(",") if name]
    if unknown := [name for name in names if name not in known]:
        raise sweep.SweepError(f"--only {unknown[0]}: one of {', '.join(known)}")
    given = [parse_technique(text) for text in variants]
    taken = [*known, *(technique.name for technique in given)]
    if twice := [technique.name for technique in given if taken.count(technique.name) > 1]:
        raise sweep.SweepError(f"--variant {twice[0]}: another technique has this name")
    return [known[name] for name in names] + given


def common_settings(options: argparse.Namespace) -> dict[str, str]:
    """Settings of all runs: COMMON, over it the shell's, over them those of the command line.

    Raises: SweepError.
    """
    names = sweep.setting_names() - {*sweep.RESERVED, "SEED"}
    common = COMMON | {name: value for name, value in os.environ.items() if name in names}
    if options.steps:  # progress is then counted in steps
        common |= {"ITERATIONS": str(options.steps), "MAX_WALLCLOCK_SECONDS": "0"}
    else:
        common["MAX_WALLCLOCK_SECONDS"] = f"{options.seconds:g}"
    given = {name: ",".join(values) for name, values in map(sweep.parse_axis, options.common)}
    for name in ("SEED", "ITERATIONS", "MAX_WALLCLOCK_SECONDS"):
        if name in given:
            raise sweep.SweepError(f"--set {name}: give --seeds, --steps or --seconds instead")
    return common | given


def plan_pairs(techniques: Sequence[Technique], seeds: str, common: dict[str, str],
               leave_out: bool) -> dict[str, list[sweep.Run]]:
    """Runs in the order of seeds, by technique, those of the base first and under no name.

    The base has all techniques or none; the other runs have one less, or that one alone.
    """
    base = dict(common)
    for technique in techniques:
        base |= technique.present if leave_out else technique.absent

    def runs_of(name: str, settings: dict[str, str]) -> list[sweep.Run]:
        label = re.sub(r"[^A-Za-z0-9._]+", "_", name)
        return [run._replace(label=f"{label}-{run.label}")
                for run in sweep.plan_runs(sweep.parse_axes(seeds, []), settings)]

    return {"": runs_of("all" if leave_out else "none", base)} | {
        t.name: runs_of(f"without {t.name}" if leave_out else t.name,
                        base | (t.absent if leave_out else t.present)) for t in techniques}


def costs_of(texts: Sequence[str], names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """What techniques cost, from `NAME=COMMIT`. Raises: SweepError, also for other names."""
    costs = {}
    for text in texts:
        name, _, commit = text.rpartition("=")
        if name not in names:
            raise sweep.SweepError(f"--cost {text}: expected NAME=COMMIT, NAME one of "
                                   + ", ".join(names))
        costs[name] = cost_of(commit)
    return costs


def cost_of(commit: str) -> tuple[int, int]:
    """Lines and packed bytes that a commit added to train_gpt.py. Raises: SweepError."""
    answers = [subprocess.run(["git", "show", f"{commit}{back}:train_gpt.py"], cwd=REPOSITORY,
                              capture_output=True, text=True, check=False) for back in ("~1", "")]
    if error := answers[0].stderr + answers[1].stderr:
        raise sweep.SweepError(f"--cost {commit}: {error.splitlines()[0]}")
    (lines, packed), (more_lines, more_packed) = (
        (len(a.stdout.splitlines()), len(golf.pack_program(a.stdout))) for a in answers)
    return more_lines - lines, more_packed - packed


def crowded(ledger: sweep.Ledger) -> set[str]:
    """Names of runs that shared their GPU with another one for a while."""
    gpus: dict[str, object] = {}  # of the runs that go on
    found: set[str] = set()
    for row in ledger.rows:
        name, event = str(row.get("run_id")), row.get("event")
        if event == "start":
            others = {other for other, gpu in gpus.items() if gpu == row.get("gpus")}
            found |= others | {name} if others else set()
            gpus[name] = row.get("gpus")
        elif event == "end":
            gpus.pop(name, None)
        elif event == "plan":  # a sweep begins: what went on before is lost
            gpus.clear()
    return found


def compare(pairs: dict[str, list[sweep.Run]], ledger: sweep.Ledger,
            costs: dict[str, tuple[int, int]], leave_out: bool) -> list[dict[str, object]]:
    """A row for each technique: gains, their noise and the price, over pairs that are complete.

    Their runs are named with it first, without it second.
    """
    def read(run: sweep.Run) -> runs.Run | None:
        end = ledger.last_end(run.key)
        whole = end is not None and end.get("status") == "complete"
        return runs.read_result(ledger.path.parent / str(end["result"])) if end and whole else None

    rows, gains = [], dict[str, list[list[float]]]((column, []) for column in SCORES)
    shared = crowded(ledger)
    for name in [*pairs][1:]:
        both = [(read(a), read(b)) for a, b in zip(pairs[""], pairs[name], strict=True)]
        with_without = [(a, b) if leave_out else (b, a) for a, b in both if a and b]
        row: dict[str, object] = {"technique": name, "pairs": len(with_without),
                                  "runs": [(a.run_id, b.run_id) for a, b in with_without]}
        for column, key in {**SCORES, "ms per step": "train.ms_per_step"}.items():
            values = [(x, y) for a, b in with_without
                      if (x := a.number(key)) is not None and (y := b.number(key)) is not None
                      and (column in SCORES or not {a.run_id, b.run_id} & shared)]
            if not values:
                continue
            having, lacking = zip(*values, strict=True)
            if column in SCORES:
                gains[column].append([y - x for x, y in values])
                row[column] = welch.mean(gains[column][-1])
            else:
                row |= {column: welch.mean(having),
                        "slower": welch.mean(having) / welch.mean(lacking) - 1}
        row["lines"], row["packed bytes"] = costs.get(name, (None, None))
        rows.append(row)
    for column, groups in gains.items():
        spread = welch.pooled_deviation(groups)
        for row, group in zip([row for row in rows if column in row], groups, strict=True):
            row[f"{column} noise"] = None if spread is None else spread / len(group) ** 0.5
    return rows


def read_times(path: Path, techniques: Sequence[Technique], leave_out: bool
               ) -> Mapping[str, Mapping[str, object]]:
    """Times by technique, from either kind of file. Raises: SweepError if it holds none."""
    try:
        rows = runs.read_result(path).rows("rows")
    except runs.RunError as error:
        raise sweep.SweepError(f"--times {error}") from error
    times = ({str(row["technique"]): row for row in rows if "technique" in row}
             or times_of_variants(rows, techniques, leave_out))
    if not times:
        raise sweep.SweepError(f"--times {path}: holds no row of a technique")
    return times


def times_of_variants(rows: Sequence[Mapping[str, runs.Json]], techniques: Sequence[Technique],
                      leave_out: bool) -> dict[str, dict[str, object]]:
    """What techniques cost, from rows of tools/bench_variants.py; the deepest plan is the last."""
    medians: dict[frozenset[str], float] = {}
    for row in rows:
        ms = runs.as_numbers(row.get("ms"))
        if ms and row.get("plan") == rows[-1].get("plan"):
            medians[frozenset(str(row.get("variant")).split())] = statistics.median(ms)
    base = next(iter(medians), frozenset())
    times: dict[str, dict[str, object]] = {}
    for technique in techniques:
        settings = technique.absent if leave_out else technique.present
        words = base | {f"{name}={value}" for name, value in settings.items()}
        if words in medians:
            having, lacking = (base, words) if leave_out else (words, base)
            values = medians[having], medians[having] / medians[lacking] - 1
            times[technique.name] = dict(zip(TIMES, values, strict=True))
    return times


def table(rows: Sequence[dict[str, object]]) -> str:
    """The rows as Markdown; gains in thousandths of a bit per byte."""
    def show(value: object, form: str, factor: float = 1.0) -> str:
        return format(factor * value, form) if isinstance(value, int | float) else "-"

    lines = ["| technique | pairs | gain, mBPB | pre-quantisation, mBPB | ms per step | lines "
             "| packed bytes |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        gains = [f"{show(row.get(column), '+.2f', 1e3)} ± "
                 f"{show(row.get(f'{column} noise'), '.2f', 1e3)}" for column in SCORES]
        speed = f"{show(row.get('ms per step'), '.1f')} ({show(row.get('slower'), '+.1%')})"
        lines.append(" | ".join([f"| {row['technique']}", str(row["pairs"]), *gains, speed,
                                 show(row["lines"], ".0f"), show(row["packed bytes"], ".0f")])
                     + " |")
    return "\n".join(lines) + "\n"


def build_parser() -> argparse.ArgumentParser:
    """The command line; what it does not know goes to the sweep's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=sweep.HelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--seeds", default="42", help="comma-separated; every one is a pair")
    parser.add_argument("--seconds", type=float, default=150.0, help="of training, of every run")
    parser.add_argument("--steps", type=int, default=0, metavar="N", help="of every run, instead")
    parser.add_argument("--times", type=Path, metavar="JSON", help="take times from there")
    parser.add_argument("--out", type=Path, default=Path("runs/recipe"), help="folder of the runs")
    parser.add_argument("--only", help="names of built-in techniques; default: all")
    parser.add_argument("--variant", action="append", default=[], help="a technique of your own")
    parser.add_argument("--set", action="append", default=[], dest="common", metavar="NAME=VALUE",
                        help="a setting of all runs, over the shell's; these are over "
                             + " ".join(f"{name}={value}" for name, value in COMMON.items()))
    parser.add_argument("--table", action="store_true", help="of what is complete; runs nothing")
    parser.add_argument("--leave-out", action="store_true", help="take each away from all")
    parser.add_argument("--cost", action="append", default=[], metavar="NAME=COMMIT",
                        help="the commit that brought a technique: its lines and packed bytes")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Exit status; see the module's text."""
    options, further = build_parser().parse_known_args(arguments)
    try:
        of_sweep = sweep.build_parser().parse_args(["--out", str(options.out), *further])
        if of_sweep.detach:
            raise sweep.SweepError("--detach: the table is written here, after the last run")
        if of_sweep.status:
            return sweep.show_status(of_sweep.out)
        common = common_settings(options)
        techniques = choose(options.only, options.variant)
        costs = costs_of(options.cost, [technique.name for technique in techniques])
        times = (read_times(options.times, techniques, options.leave_out) if options.times
                 else {})
        pairs = plan_pairs(techniques, options.seeds, common, options.leave_out)
        # A seed's base first: every pair is whole before the next seed's.
        plan = [run for group in zip(*pairs.values(), strict=True) for run in group]
        settings = sweep.settings_from(of_sweep)
        if settings.ours:
            sweep.check_settings(plan)
        if of_sweep.dry_run:
            return sweep.show_plan(plan, settings)
        status = 0 if options.table else sweep.run_sweep(plan, settings)
        ledger = sweep.existing_ledger(settings.out, "--table --out")
        rows = compare(pairs, ledger, costs, options.leave_out)
        for row in rows if times else []:
            row |= {name: times.get(str(row["technique"]), {}).get(name) for name in TIMES}
    except sweep.SweepError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    (settings.out / "recipe.md").write_text(table(rows))
    digests = [row["trainer_sha256"] for row in ledger.rows if "trainer_sha256" in row]
    content = {
        "packed_sha256" if settings.packed else "source_sha256": digests[0] if digests else None,
        "seeds": [int(run.settings["SEED"]) for run in pairs[""]], "leave_out": options.leave_out,
        **({"steps": options.steps} if options.steps else {"seconds": options.seconds}),
        "settings": common, "rows": rows}
    (settings.out / "recipe.json").write_text(json.dumps(content, indent=1) + "\n")
    print(table(rows), end="")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
