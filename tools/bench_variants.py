#!/usr/bin/env python3
"""What a kernel or an option is worth: micro-steps of variants of the program, in turns.

    PRESET=pr1493 python tools/bench_variants.py "ATTENTION=cudnn" "ATTENTION=fa3"
    PRESET=pr1493 python tools/bench_variants.py "" "coordinate_descent_tuning=True" "blas=cublaslt"
    PRESET=pr1493 python tools/bench_variants.py "" "program=/tmp/train_gpt.py LEAKY_SLOPE=0.3"

A variant is a text of NAME=VALUE words: in capitals a setting of the program, over those of the
environment; `program=` another train_gpt.py; `blas=` the library of matrix products; any other
name an option of torch.compile's inductor, whose value is a Python literal. All are compared with
the first one that runs.

Cards differ by more than kernels do, so all variants are compiled first, one after another, and
then take turns, several rounds, on one device. Models are new and tokens random. Times are medians
of device events on a GPU, of the wall clock on a CPU. A variant that fails is said and left out.

Writes LOG_DIR/bench_variants_<gpu>_<date>.json. Exit status: 0 done, 1 a variant failed or it could
not run, 2 bad arguments.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import linecache
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import train_gpt as golf
from tools import bench
from tools.command import exit_status, number_between
from tools.sweep import setting_names

LIBRARIES = "cublas", "cublaslt"


class Variant(NamedTuple):
    """One way to run the micro-step."""

    text: str
    settings: dict[str, str]
    options: dict[str, object]  # of the compiler
    program: Path
    library: str


def parse_variant(text: str) -> Variant:
    """The variant that a text describes. Raises: ConfigError."""
    variant = Variant(text, {}, {}, REPOSITORY / "train_gpt.py", LIBRARIES[0])
    known = setting_names()
    for word in text.split():
        name, equals, value = word.partition("=")
        if name == "program" and Path(value).is_file():
            variant = variant._replace(program=Path(value).resolve())
        elif name == "blas" and value in LIBRARIES:
            variant = variant._replace(library=value)
        elif name in known and equals:
            variant.settings[name] = value
        elif name in compiler_options():
            variant.options[name] = literal(word, value)
        else:
            raise golf.ConfigError(
                f"variant {word!r} must be a setting, program=FILE, blas={'|'.join(LIBRARIES)}, or "
                "an option of torch._inductor.config, each as NAME=VALUE")
    return variant


def compiler_options() -> set[str]:
    """Names of all options that inductor has."""
    import torch._inductor

    return set(torch._inductor.list_options())


def literal(word: str, text: str) -> object:
    """The Python value of a text. Raises: ConfigError."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise golf.ConfigError(f"variant {word!r}: {text!r} must be a Python literal") from None


def load_program(path: Path, number: int) -> ModuleType:
    """A program as a module of its own, with operators of its own, so that no variant meets what
    another one compiled or registered. Raises: ConfigError."""
    name = f"variant_{number}"
    try:
        text = path.read_text(encoding="utf-8").replace("golf::", f"golf_{name}::")
        code = compile(text, f"<{name} {path}>", "exec")
    except (OSError, ValueError, SyntaxError) as error:
        raise golf.ConfigError(f"program={path} must be a Python file: {error}") from None
    lines = text.splitlines(keepends=True)
    linecache.cache[code.co_filename] = len(text), None, lines, code.co_filename  # for Triton
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module
    exec(code, vars(module))
    return module


class Prepared:
    """A variant's model, ready to take micro-steps."""

    def __init__(self, variant: Variant, number: int, env: Mapping[str, str],
                 device: torch.device) -> None:
        self.variant, self.device = variant, device
        self.program = program = load_program(variant.program, number)
        self.config = config = program.Config.from_env({**env, **variant.settings})
        self.backend = program.choose_attention(config.attention, device)
        self.model = program.GPT(config, self.backend.attend, program.compute_dtype(device))
        self.model.initialise(config.seed)
        self.model.to(device)
        self.tokens = bench.micro_tokens(config)
        shape = self.tokens // config.train_seq_len, config.train_seq_len + 1
        self.rows = torch.randint(config.vocab_size, shape, device=device)
        self.plans = program.depth_plans(config)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """A block in which the process is set up for this variant; no gradients are left of it."""
        if self.device.type == "cuda":
            torch.backends.cuda.preferred_blas_library(self.variant.library)
        if self.backend.name != "fa3":
            self.program.load_sdpa(self.device, self.backend.name)
        with torch._inductor.config.patch(self.variant.options):
            yield
        self.model.zero_grad()  # their memory is the next one's

    def step(self, plan: golf.DepthPlan) -> None:
        """One micro-step, forward and backward; the first one compiles."""
        self.model.zero_grad()
        self.model(self.rows[:, :-1], self.rows[:, 1:], plan).mean().backward()


def prepare(variant: Variant, number: int, env: Mapping[str, str],
            timer: bench.Timer) -> tuple[Prepared, float]:
    """A variant after a step of every plan, and the seconds that those took."""
    prepared = Prepared(variant, number, env, timer.device)
    begin = time.perf_counter()
    with prepared.turn():
        for plan in prepared.plans:
            prepared.step(plan)
        timer.synchronize()
    return prepared, time.perf_counter() - begin


def take_turns(all_prepared: Sequence[Prepared], timer: bench.Timer,
               rounds: int) -> dict[tuple[str, str], list[float]]:
    """Milliseconds of a micro-step, one of every round, by variant and plan."""
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        for prepared in all_prepared:
            with prepared.turn():
                for plan in prepared.plans:
                    seconds = timer.median(functools.partial(prepared.step, plan))
                    times.setdefault((prepared.variant.text, plan.name), []).append(1e3 * seconds)
    return times


def rows_of(all_prepared: Sequence[Prepared], seconds: Mapping[str, float],
            times: Mapping[tuple[str, str], list[float]]) -> list[dict[str, object]]:
    """A row for each variant and plan; `faster` is by the first variant's median."""
    rows: list[dict[str, object]] = []
    for prepared in all_prepared:
        name = prepared.variant.text
        for plan in prepared.plans:
            ms, first = times[name, plan.name], times.get((all_prepared[0].variant.text, plan.name))
            middle = statistics.median(ms)
            rows.append({
                "variant": name, "plan": plan.name, "attention": prepared.backend.name,
                "ms": [round(value, 3) for value in ms],
                "tok_s": round(1e3 * prepared.tokens / middle),
                "faster": statistics.median(first) / middle - 1 if first else None,
                "first_steps_seconds": round(seconds[name], 1),
                "source_sha256": golf.digest(prepared.variant.program.read_bytes())})
    return rows


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """The rows as text."""
    lines = [f"{'variant':<48} {'plan':<10} {'tok/s':>11} {'faster':>8}  ms of every round"]
    for row in rows:
        faster = f"{row['faster']:+.2%}" if row["faster"] is not None else "-"
        lines.append(f"{row['variant'] or '(as it is)'!s:<48} {row['plan']!s:<10} "
                     f"{row['tok_s']:>11,} {faster:>8}  {row['ms']}")
    return "\n".join(lines)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+", metavar="VARIANT", help="NAME=VALUE ..., or ''")
    parser.add_argument("--rounds", type=number_between(int, 1, 1000), default=3, metavar="N",
                        help="turns of every variant (default %(default)s)")
    parser.add_argument("--repeats", type=number_between(int, 1, 1000), default=12, metavar="N",
                        help="micro-steps of a turn and plan (default %(default)s)")
    options = parser.parse_args(arguments)
    if len(set(options.variants)) < len(options.variants):
        parser.error("every variant once; for two of the same, add a setting at its default")
    return options


def main(arguments: Sequence[str] | None = None, env: Mapping[str, str] = os.environ) -> int:
    """Compiles, measures, prints the table and writes the file; the exit status.

    Raises: GolfError, OSError.
    """
    options, env = parse_arguments(arguments), dict(env)  # inductor adds to the process's own
    variants = [parse_variant(text) for text in options.variants]
    config, world = golf.Config.from_env(env), golf.World.from_env({})
    Path(config.log_dir).mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    timer = bench.Timer(world.device, options.repeats, 1)
    ready: list[Prepared] = []
    seconds, failed = dict[str, float](), dict[str, str]()
    for number, variant in enumerate(variants):
        try:
            prepared, seconds[variant.text] = prepare(variant, number, env, timer)
            ready.append(prepared)
            print(f"{variant.text or '(as it is)'}: first steps {seconds[variant.text]:.1f} s",
                  flush=True)
        except Exception as error:  # whatever another program, a compiler or a library raises
            failed[variant.text] = f"{type(error).__name__}: {error}".split("\n")[0][:200]
            print(f"error: {variant.text}: {failed[variant.text]}", file=sys.stderr)
    if not ready:
        raise golf.GolfError("no variant could be prepared")
    rows = rows_of(ready, seconds, take_turns(ready, timer, options.rounds))
    facts = golf.environment_facts(world)
    gpu = torch.cuda.get_device_name(world.device) if world.is_cuda else "cpu"
    print(table(rows))
    path = bench.write_new(Path(config.log_dir), f"bench_variants_{gpu}", {
        "gpu": gpu, **facts, "preset": config.preset, "differs": config.differs(),
        "tokens_per_micro_step": bench.micro_tokens(config), "failed": failed, "rows": rows})
    print(f"result: {path}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(exit_status(main, golf.GolfError))
