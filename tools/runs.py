"""Reads what a run left behind into one typed `Run`: result JSON, JSONL events, text logs.

Three grammars are understood and end in the same keys (those of a result file):

* result    <run_id>.json   written at the end, the most trusted
* events    <run_id>.jsonl  one JSON object a line, written while the run lives
* text      <run_id>.txt, *.log  human lines, ours or those of a published trainer

Logs arrive damaged: cut in mid-line, coloured, with the lines of several ranks interleaved or with
a crash at the end. Nothing here raises on a damaged line; it is skipped and named in
`Run.problems`.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, TypeAlias

Json: TypeAlias = bool | int | float | str | list["Json"] | dict[str, "Json"] | None

LOG_SUFFIXES = (".txt", ".log", ".out")
# Names of files that tools write beside runs begin so; `is_result` is sure.
NOT_A_RUN = ("adaptation_curve", "bench_", "quantiser_curve", "recipe.", "recipe_", "submission",
             "manifest")
PARTS = ("code", "model", "total")
CAP_BYTES = 16_000_000
MAX_RESULT_BYTES = 256 * 2**20  # a result is kilobytes; anything near this is not one of ours


class RunError(Exception):
    """A run that cannot be found or read; the message names the file or run id."""


class TrainPoint(NamedTuple):
    """One logged training step; None is what the log does not hold."""

    step: int
    seconds: float | None  # on the training clock
    loss: float
    lr_scale: float | None = None
    tok_s: float | None = None
    plan: str | None = None
    mem_mib: float | None = None
    progress: float | None = None  # of the schedules, 0 to 1


class ValidationPoint(NamedTuple):
    """One validation pass during training, in nats per token and bits per byte."""

    step: int
    seconds: float | None
    loss: float
    bpb: float
    label: str = "val"


class PlanChange(NamedTuple):
    """The step from which another depth plan was trained."""

    step: int
    plan: str
    progress: float | None


class Phase(NamedTuple):
    """A named stretch of the run, in seconds of wall clock."""

    name: str
    seconds: float


class Evaluation(NamedTuple):
    """One score of the whole validation set."""

    name: str  # key of a result file: raw, averaged, quantised, sliding, ttt_sgd, ...
    label: str  # as the log spells it
    loss: float | None  # nats per token
    bpb: float | None
    seconds: float | None


class Crash(NamedTuple):
    """A line of a text log that says a process died."""

    line: int
    text: str
    after_score: bool


@dataclass(slots=True)
class Run:
    """Everything known about one run; `facts` has the keys of a result file, whatever was read."""

    run_id: str
    facts: dict[str, Json] = field(default_factory=dict)
    train: list[TrainPoint] = field(default_factory=list)
    validation: list[ValidationPoint] = field(default_factory=list)
    plans: list[PlanChange] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    crashes: list[Crash] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)  # said by the run
    problems: list[str] = field(default_factory=list)  # met while reading
    files: dict[str, Path] = field(default_factory=dict)  # result, events, text

    def get(self, key: str) -> Json:
        """Value at a dotted key of the facts, None where it is absent."""
        return lookup(self.facts, key)

    def number(self, key: str) -> float | None:
        """Finite number at a dotted key, else None."""
        return as_number(self.get(key))

    def text(self, key: str) -> str | None:
        """Text at a dotted key, else None; numbers are not turned into text."""
        value = self.get(key)
        return value if isinstance(value, str) and value else None

    def table(self, key: str) -> dict[str, Json]:
        """Mapping at a dotted key, empty where it is absent."""
        value = self.get(key)
        return value if isinstance(value, dict) else {}

    def rows(self, key: str) -> list[dict[str, Json]]:
        """List of mappings at a dotted key, empty where it is absent."""
        value = self.get(key)
        return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []

    @property
    def seed(self) -> int | None:
        """Seed of the run, None where no file names it."""
        value = self.number("seed")
        return None if value is None else int(value)

    @property
    def headline(self) -> str | None:
        """Name of the evaluation that counts."""
        return self.text("headline")

    @property
    def val_bpb(self) -> float | None:
        """Headline score in bits per byte."""
        return self.number("val_bpb")

    @property
    def val_loss(self) -> float | None:
        """Headline score in nats per token."""
        return self.number("val_loss")

    @property
    def name(self) -> str:
        """Short name for a legend: preset and seed where both are known, else the run id."""
        preset, seed = self.text("preset"), self.seed
        return f"{preset} seed {seed}" if preset and seed is not None else self.run_id

    @property
    def machine(self) -> str | None:
        """Hardware in words, "1x NVIDIA H200" or "2 CPU cores"; None where no file names it."""
        gpu, gpus = self.text("hardware.gpu"), self.number("hardware.gpus")
        if gpu and gpu != "none" and gpus:
            return f"{gpus:.0f}x {gpu}"
        cpus = self.number("hardware.cpu_count")
        return f"{cpus:.0f} CPU cores" if cpus else None

    def evaluation(self, name: str) -> Evaluation | None:
        """Evaluation with this name, None where it did not run."""
        return next((item for item in self.evaluations if item.name == name), None)


# ---------------------------------------------------------------------------------------- values


def lookup(tree: dict[str, Json], key: str) -> Json:
    """Value at a dotted key ("train.steps") of nested mappings, None where a level is absent."""
    value: Json = tree
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return None
        value = value[part]
    return value


def assign(tree: dict[str, Json], key: str, value: Json) -> None:
    """Set a dotted key, making levels as needed; None is never stored (absent means not run)."""
    if value is None:
        return
    *parents, last = key.split(".")
    for part in parents:
        below = tree.get(part)
        if not isinstance(below, dict):
            below = {}
            tree[part] = below
        tree = below
    tree[last] = value


def as_number(value: object) -> float | None:
    """The value as a finite float; None for booleans, text, NaN and infinities."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def as_numbers(value: object) -> list[float]:
    """The finite numbers of a list; none of anything else."""
    found = map(as_number, value if isinstance(value, list) else [])
    return [number for number in found if number is not None]


def merge(base: dict[str, Json], over: dict[str, Json]) -> dict[str, Json]:
    """Nested union of two trees; where both hold a value that is no mapping, `over` wins."""
    union = dict(base)
    for key, value in over.items():
        mine = union.get(key)
        both = isinstance(mine, dict) and isinstance(value, dict)
        union[key] = merge(mine, value) if both else value  # type: ignore[arg-type]
    return union


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# --------------------------------------------------------------------------------- finding files


def load_run(name: str | Path, logs: Path = Path("logs")) -> Run:
    """One run from a file path, a path without suffix, or a run id inside `logs`.

    Files with the same stem are read together; the result file wins over events, events over text.
    Raises: RunError naming the run when no file is found or the result file is not JSON.
    """
    stem = _stem(Path(name), logs)
    run = Run(stem.name)
    text = next((p for p in (_with(stem, s) for s in LOG_SUFFIXES) if p.is_file()), None)
    if text is not None:
        run = read_text(text)
    if _with(stem, ".jsonl").is_file():
        run = combine(run, read_events(_with(stem, ".jsonl")))
    if _with(stem, ".json").is_file():
        run = combine(run, read_result(_with(stem, ".json")))
    steps, seconds = run.number("train.steps"), run.number("train.seconds")
    run.validation = [  # the last one belongs to the end, however long before a step was logged
        point._replace(seconds=seconds) if seconds and point.step == steps else point
        for point in run.validation
    ]
    return run


def find_runs(logs: Path) -> list[Run]:
    """Every run with a result file in a folder, oldest first by its `started`, then by name.

    Raises: RunError naming a file that is not a JSON mapping.
    """
    found = [load_run(path) for path in sorted(logs.glob("*.json")) if is_result(path)]
    return sorted(found, key=lambda run: (run.text("started") or "", run.run_id))


def _with(stem: Path, suffix: str) -> Path:
    """The stem with a suffix appended; run ids may hold dots, so `with_suffix` would cut them."""
    return stem.with_name(stem.name + suffix)


def _stem(path: Path, logs: Path) -> Path:
    """Path without suffix of a run's files, taken as given or else inside `logs`."""
    known = (".jsonl", ".json", *LOG_SUFFIXES)
    bare = path.with_name(path.name.removesuffix(path.suffix)) if path.suffix in known else path
    for stem in (bare, logs / bare):
        if stem.name and any(_with(stem, suffix).is_file() for suffix in known):
            return stem
    raise RunError(f"run {str(path)!r} not found: no {bare.name}{{.json,.jsonl,.txt}} in {logs}")


# ---------------------------------------------------------------------------- result and events


def read_json(path: Path) -> dict[str, Json]:
    """Mapping in a JSON file. Raises: RunError naming the file if it is none or absurdly large."""
    try:
        if path.stat().st_size > MAX_RESULT_BYTES:
            raise RunError(f"{path}: {path.stat().st_size:,} bytes, over {MAX_RESULT_BYTES:,}")
        tree: Json = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path}: not JSON: {error}") from error
    if not isinstance(tree, dict):
        raise RunError(f"{path}: a {type(tree).__name__}, not a mapping")
    return tree


def is_result(path: Path) -> bool:
    """Whether a JSON file names a run and how it ended. Raises: RunError if it is no mapping."""
    return {"run_id", "status"} <= read_json(path).keys()


def earlier_rows(path: Path, facts: Mapping[str, object]) -> list[dict]:
    """Rows of equal facts in a file that a tool adds rows to, none if it is not there yet.

    Raises: RunError if it is another file, OSError if its folder cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = read_json(path) if path.exists() else {"rows": []}
    rows = content.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise RunError(f"{path}: not a file of this tool: it has no list of rows")
    same = all(content.get(name) == value for name, value in facts.items())
    return [row for row in rows if isinstance(row, dict)] if same else []


def read_result(path: Path) -> Run:
    """Run from a result file. Raises: RunError if it is not a JSON mapping."""
    facts = read_json(path)
    name = facts.get("run_id")
    run = Run(name if isinstance(name, str) else path.stem, facts, files={"result": path})
    bits, nats, seconds = run.table("bpb"), run.table("nats"), run.table("eval_seconds")
    for label in dict.fromkeys([*bits, *nats]):
        loss, bpb, took = (as_number(table.get(label)) for table in (nats, bits, seconds))
        run.evaluations.append(Evaluation(label, label, loss, bpb, took))
    return run


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """No garbage collection inside: a million points hold no cycles, searching them doubles the
    time of reading a log."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def read_events(path: Path) -> Run:
    """Run from a JSONL file; unreadable lines are counted in `problems`, never raised."""
    reader = EventReader(path)
    reader.poll(finished=True)
    return reader.run


class EventReader:
    """Follows a JSONL file that still grows; `run` holds what was read so far."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run = Run(path.stem, files={"events": path})
        self.offset = 0
        self.clock_begin: float | None = None  # of training, in seconds since the program's start

    @collector_paused()
    def poll(self, *, finished: bool = False) -> bool:
        """Take the lines added since the last call; whether there were any.

        A last line without its end is left for the next call, unless the file is `finished`.
        """
        broken, cut, before = 0, False, self.offset
        with self.path.open("rb") as stream:
            stream.seek(self.offset)
            for line in stream:
                cut = not line.endswith(b"\n")
                if cut and not finished:
                    break
                self.offset += len(line)
                broken += not self._take(line)
        if broken:
            tail = ", the last line is cut" if cut else ""
            self.run.problems.append(f"{self.path.name}: {broken} unreadable line(s){tail}")
        return self.offset > before

    def _take(self, line: bytes) -> bool:
        """Add one line to the run; False if it is unreadable."""
        try:
            event: Json = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            return False
        if isinstance(event, dict):
            if event.get("event") == "train" and "train_seconds" not in event:
                now = as_number(event.get("t"))
                begin = self.clock_begin if self.clock_begin is not None else now
                self.clock_begin = begin
                event["train_seconds"] = None if now is None or begin is None else now - begin
            _take_event(self.run, event)
        return True


def _take_event(run: Run, event: dict[str, Json]) -> None:
    """Add one event to the run."""
    handler = EVENT_HANDLERS.get(str(event.get("event")))
    if handler is not None:
        handler(run, event)


def _event_start(run: Run, event: dict[str, Json]) -> None:
    facts = {key: value for key, value in event.items() if key not in ("event", "t", "reason")}
    run.facts = merge(run.facts, facts)
    assign(run.facts, "exit_reason", event.get("reason"))


def _event_train(run: Run, event: dict[str, Json]) -> None:
    step, loss = as_number(event.get("step")), as_number(event.get("train_loss"))
    if step is None or loss is None:
        run.problems.append(f"step {event.get('step')}: train_loss {event.get('train_loss')!r}")
        return
    plan = event.get("plan")
    run.train.append(
        TrainPoint(
            int(step),
            as_number(event.get("train_seconds")),
            loss,
            as_number(event.get("lr_scale")),
            as_number(event.get("tok_s")),
            plan if isinstance(plan, str) else None,
            as_number(event.get("mem_mib")),
            as_number(event.get("progress")),
        )
    )


def _event_val(run: Run, event: dict[str, Json]) -> None:
    loss, bpb = as_number(event.get("val_loss")), as_number(event.get("val_bpb"))
    step, seconds = as_number(event.get("step")), as_number(event.get("train_seconds"))
    if loss is None or bpb is None or step is None:
        return
    if seconds is None:  # a validation stops the training clock: the last step's time is its own
        seconds = run.train[-1].seconds if run.train else 0.0
    label = str(event.get("label") or "val")
    run.validation.append(ValidationPoint(int(step), seconds, loss, bpb, label))


def _event_eval(run: Run, event: dict[str, Json]) -> None:
    label = str(event.get("label") or "")
    loss, bpb = as_number(event.get("val_loss")), as_number(event.get("val_bpb"))
    seconds = as_number(event.get("seconds"))
    if label and (loss is not None or bpb is not None):
        run.evaluations.append(Evaluation(canonical(label), label, loss, bpb, seconds))


def _event_plan(run: Run, event: dict[str, Json]) -> None:
    step = as_number(event.get("step"))
    if step is not None:
        plan, progress = str(event.get("plan") or "?"), as_number(event.get("progress"))
        run.plans.append(PlanChange(int(step), plan, progress))


def _event_phase(run: Run, event: dict[str, Json]) -> None:
    seconds = as_number(event.get("seconds"))
    if seconds is not None:
        run.phases.append(Phase(str(event.get("phase") or event.get("name") or "?"), seconds))


def _event_warning(run: Run, event: dict[str, Json]) -> None:
    run.warnings.append(str(event.get("message") or ""))


def _event_artifact(run: Run, event: dict[str, Json]) -> None:
    for key, value in event.items():
        if key not in ("event", "t"):
            assign(run.facts, f"artifact.{key}", value)


EVENT_HANDLERS: dict[str, Callable[[Run, dict[str, Json]], None]] = {
    "start": _event_start,
    "result": _event_start,
    "train": _event_train,
    "val": _event_val,
    "eval": _event_eval,
    "plan": _event_plan,
    "phase": _event_phase,
    "warning": _event_warning,
    "artifact": _event_artifact,
}


def same_score(one: Evaluation, other: Evaluation) -> bool:
    """Whether two readings hold one score, as far as a text log prints it."""
    if one.bpb is None or other.bpb is None or one.loss is None or other.loss is None:
        return False
    return abs(one.bpb - other.bpb) < 6e-9 and abs(one.loss - other.loss) < 6e-9


def _with_names_of(run: Run, evaluations: Sequence[Evaluation]) -> Run:
    """The run, its evaluations called as those with the same scores are called."""
    names = {
        item.name: twin.name for item in run.evaluations
        for twin in evaluations if same_score(item, twin)
    }
    facts = dict(run.facts)
    for key in ("bpb", "nats"):
        if key in facts:
            facts[key] = {names.get(name, name): value for name, value in run.table(key).items()}
    if run.headline in names:
        facts["headline"] = names[run.headline]
    renamed = [item._replace(name=names.get(item.name, item.name)) for item in run.evaluations]
    return replace(run, facts=facts, evaluations=renamed)


def combine(base: Run, over: Run) -> Run:
    """One run of two readings of the same run; `over` is the more trusted.

    Series are taken whole from `over` where it has them. Evaluations are matched by score, for the
    text log calls all test-time training alike, then by name: the more trusted one is kept and gets
    the other's seconds.
    """
    base = _with_names_of(base, over.evaluations)
    seconds = {item.name: item.seconds for item in base.evaluations}
    mine = [
        item if item.seconds is not None else item._replace(seconds=seconds.get(item.name))
        for item in over.evaluations
    ]
    names = {item.name for item in mine}
    return Run(
        over.run_id,
        merge(base.facts, over.facts),
        over.train or base.train,
        over.validation or base.validation,
        over.plans or base.plans,
        over.phases or base.phases,
        mine + [item for item in base.evaluations if item.name not in names],
        base.crashes + over.crashes,
        over.warnings or base.warnings,
        base.problems + over.problems,
        {**base.files, **over.files},
    )


# ------------------------------------------------------------------------------------ text logs

NUMBER = r"([-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)"
ANSI = re.compile(rb"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
RANK = re.compile(r"^\s*\[?(?:rank|default|worker)[ _]?(\d+)\]?\s*[:|]\s*|^\s*\[(\d+)\]\s*:?\s+")
TRAIN = re.compile(rf"(\d+)\s*/\s*(\d+)[ ,|]+(?:\S+\s+)*?train_loss\s*[:=]?\s*{NUMBER}")
VAL = re.compile(
    rf"(\d+)\s*/\s*(\d+)[ ,|]+val_loss\s*[:=]?\s*{NUMBER}[ ,|]+val_bpb\s*[:=]?\s*{NUMBER}"
)
EVAL = re.compile(
    r"^(?P<label>[A-Za-z][\w+\-. ]*?)[ :]+(?:stride[:=]\d+ )?"
    rf"val_loss\s*[:=]\s*{NUMBER}[ ,|]+val_bpb\s*[:=]\s*{NUMBER}"
)
CLOCK = re.compile(rf"train_time\s*[:=]\s*{NUMBER}\s*(ms|s|m)\b")
EVAL_TIME = re.compile(rf"eval_time\s*[:=]\s*{NUMBER}\s*(ms|s|m)?\b")
TOK_S = re.compile(rf"tok/s\s*[:=]\s*{NUMBER}")
STEP_AVG = re.compile(rf"step_avg\s*[:=]\s*{NUMBER}\s*ms")
BYTES = re.compile(r"^(?P<what>[A-Za-z][^:=]*?)\s*[:=]\s*(?P<n>[\d,_]+)\s*bytes\b")
STOP = re.compile(r"step\s*[:=]\s*(\d+)\s*/\s*(\d+)")
LOOP = re.compile(rf"layer_loop\s*:\s*enabled step\s*:\s*(\d+)(?: frac\s*:\s*{NUMBER})?")
PEAK = re.compile(r"peak memory(?: allocated)?\s*[:=]\s*(\d+) MiB")
HESSIANS = re.compile(rf"Hessians in {NUMBER}\s*s")
PRUNED = re.compile(r"prun\w*[^\d\n]{0,40}?(\d[\d,]*)\s*(?:values|weights|params|/|of\b)", re.I)
FACT = re.compile(r"\b([a-z_]+)\s*[:=]\s*(\d[\d,]*)(?![\w.])")
SETTING = re.compile(r"^  ([a-z][a-z0-9_]*): ?(.*)$")
CRASH = re.compile(
    r"^Traceback \(most recent call last\)|ChildFailedError|exitcode\s*:\s*-?[1-9]"
    r"|^(?:torch\.)?\w*(?:OutOfMemory|Runtime|Distributed|NCCL)\w*Error\b|Segmentation fault"
    r"|Watchdog caught collective operation timeout"
)
GPU = re.compile(r"NVIDIA ([A-Z][\w.-]*(?: [\w.-]+){0,4}?)(?:\s{2,}|\s+(?:On|Off)\b|\s*[|,;]|\s*$)")
UNIT_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, None: 0.001}
# What ends the program text at the head of a log: a rule, or the line that names our run.
RULE = re.compile(rb"^[=-]{50,}\s*$|^run \S+[ :|]+PRESET=|^Hyperparameters:\s*$")
CODE = re.compile(rb'^(?:#!|"""|import |from \w)')
ARTIFACT = re.compile(r"artifact_bytes = ([\d,]+) code \+ ([\d,]+) model = ([\d,]+)")
EVAL_TOTAL = re.compile(rf"total_eval_time\s*[:=]\s*{NUMBER}\s*s")
TORCH = re.compile(r"^(?!.*import).*\b(?:PyTorch|torch)(?: version)?\s*[:= ]\s*v?(\d+\.\d+[\w.+]*)")
TRAINED = re.compile(rf"^training: (\d+) steps, {NUMBER}s")

# Line facts that published trainers print as `name: value`, and the key each becomes.
LINE_FACTS = {
    "train_shards": "data.train_shards",
    "val_tokens": "data.val_targets",
    "target_tokens": "data.val_targets",
    "val_bytes": "data.val_bytes",
    "total_docs": "data.val_documents",
    "model_params": "model.parameters",
    "world_size": "world_size",
    "seed": "seed",
}


def canonical(label: str) -> str:
    """Result key for a label of any log: "final_int6_sliding_window_exact" -> "sliding".

    Unknown labels keep their own spelling in lower case, so nothing is merged by guess.
    """
    name = re.sub(r"[^a-z0-9]+", "_", label.lower()).strip("_")
    for words, key in CANONICAL_WORDS:
        if any(word in name for word in words):
            return key
    return name


# The order decides: a label that names test-time training and quantisation is a TTT score.
CANONICAL_WORDS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("ngram", "n_gram", "hedge", "mixer", "mixture", "ppm"), "mixer"),
    (("slot",), "slot"),
    (("ttt_phased", "ttt_lora", "ttt_documents", "ttt_doc"), "ttt_documents"),
    (("ttt",), "ttt_sgd"),
    (("sliding",), "sliding"),
    (("documents", "doc_masked"), "documents"),
    (("pre_quant", "prequant", "post_ema", "post_swa", "averaged"), "averaged"),
    (("roundtrip", "quantized", "quantised"), "quantised"),
    (("raw",), "raw"),
)


Handler: TypeAlias = Callable[["_Text", str], None]


class _Text:
    """State of one pass over a text log."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.line = 0  # number of the current line in the file, from 1
        self.score_line: float = math.inf
        self.rank = 0
        self.settings: dict[str, Json] = {}
        self.train: dict[int, tuple[int, TrainPoint]] = {}  # step -> (rank, point)
        self.scores: dict[tuple[float, float], str] = {}  # exact score -> label that had it first
        self.minute_clock = False
        self.rank_zero_speaks = False
        self.glued = 0

    def feed(self, line: str, handlers: Sequence[Handler]) -> None:
        """Take the current line, which holds the word of each handler; progress bars rewrite it."""
        for part in line.split("\r") if "\r" in line else (line,):
            prefix = RANK.match(part) if part[:1] in " [rdw" else None
            self.rank = int(prefix[1] or prefix[2] or 0) if prefix else 0
            rest = part[prefix.end() :] if prefix else part
            for handler in handlers:
                handler(self, rest)

    def feed_settings(self, text: str) -> None:
        """Take the indented `name: value` lines at the beginning of a text."""
        for line in text[:200_000].splitlines():
            match = SETTING.match(line)
            if match is None:
                return
            self.settings[match[1]] = match[2].strip()

    def on_train(self, line: str) -> None:
        if self.rank and self.rank_zero_speaks:
            return
        self.rank_zero_speaks |= self.rank == 0
        several = line.count("train_loss") > 1
        for match in TRAIN.finditer(line) if several else filter(None, (TRAIN.search(line),)):
            step, total, loss = int(match[1]), int(match[2]), float(match[3])
            if step > total:
                self.glued += 1
                continue
            known = self.train.get(step)
            if known is not None and self.rank >= known[0]:  # rank 0 speaks for the run
                continue
            clock, rate = CLOCK.search(line, match.end()), TOK_S.search(line, match.end())
            seconds = float(clock[1]) * UNIT_SECONDS[clock[2]] if clock else None
            self.minute_clock |= bool(clock and clock[2] == "m")
            point = TrainPoint(step, seconds, loss, tok_s=float(rate[1]) if rate else None)
            self.train[step] = (self.rank, point)
            average = STEP_AVG.search(line, match.end())
            if average:
                assign(self.run.facts, "train.ms_per_step", float(average[1]))

    def on_bpb(self, line: str) -> None:
        if self.rank:
            return
        found = False
        for match in VAL.finditer(line):
            found = True
            step, total = int(match[1]), int(match[2])
            if step > total:
                self.glued += 1
                continue
            clock = CLOCK.search(line, match.end())
            seconds = float(clock[1]) * UNIT_SECONDS[clock[2]] if clock else None
            point = ValidationPoint(step, seconds, float(match[3]), float(match[4]))
            if not self.run.validation or self.run.validation[-1].step != step:
                self.run.validation.append(point)
        if not found:
            self._score(line)

    def _score(self, line: str) -> None:
        match = EVAL.match(line)
        if match is None:
            return
        label, loss, bpb = match["label"].strip(), float(match[2]), float(match[3])
        if self.scores.setdefault((loss, bpb), label) != label:
            return  # some trainers repeat a score under a second label; the first one is right
        clock, name = EVAL_TIME.search(line, match.end()), canonical(label)
        seconds = float(clock[1]) * UNIT_SECONDS[clock[2]] if clock else None
        evaluations, old = self.run.evaluations, self.run.evaluation(name)
        if old is not None:  # the "_exact" line repeats a score with more digits
            evaluations.remove(old)
            seconds = old.seconds if seconds is None else seconds
        evaluations.append(Evaluation(name, label, loss, bpb, seconds))
        self.score_line = self.line

    def on_bytes(self, line: str) -> None:
        match = BYTES.match(line)
        if match is None:
            return
        what, size = match["what"].lower(), int(re.sub(r"\D", "", match["n"]))
        compressed = "+" in what or "quantized" in what or re.search(r"int\d", what) is not None
        key = ""
        if what.startswith("total submission size"):
            key = "artifact.total_bytes" if compressed else "artifact.uncompressed_total_bytes"
        elif what.startswith("serialized model"):
            key = "artifact.model_bytes" if compressed else "artifact.uncompressed_model_bytes"
        elif what.startswith("code size"):
            key = "artifact.source_bytes" if "uncompressed" in what else "artifact.code_bytes"
        if key:
            assign(self.run.facts, key, size)

    def on_stop(self, line: str) -> None:
        match, clock = STOP.search(line), CLOCK.search(line)
        if match:
            assign(self.run.facts, "train.steps", int(match[1]))
        if clock:
            seconds = float(clock[1]) * UNIT_SECONDS[clock[2]]
            assign(self.run.facts, "train.seconds", seconds)

    def on_loop(self, line: str) -> None:
        match = LOOP.search(line)
        if match:
            progress = float(match[2]) if match[2] else None
            self.run.plans.append(PlanChange(int(match[1]), "looped", progress))
            assign(self.run.facts, "train.loop_enabled_step", int(match[1]))

    def on_fact(self, line: str) -> None:
        if len(line) > 400 or "{" in line:
            return  # a dump, not a statement of the run
        for name, value in FACT.findall(line):
            key = LINE_FACTS.get(name)
            if key and lookup(self.run.facts, key) is None:
                assign(self.run.facts, key, int(value.replace(",", "")))

    def on_crash(self, line: str) -> None:
        seen = bool(self.run.crashes) and self.run.crashes[-1].line == self.line
        if not seen and len(self.run.crashes) < MAX_CRASHES and CRASH.search(line):
            self.run.crashes.append(Crash(self.line, line.strip()[:200], False))

    def on_gpu(self, line: str) -> None:
        match = GPU.search(line)
        if match and not any(mark in line for mark in ("NVIDIA-SMI", "{", '"')):
            self.run.facts.setdefault("hardware", {"gpu": f"NVIDIA {match[1]}"})


def takes(pattern: re.Pattern[str], kinds: dict[str, Callable[[str], Json]]) -> Handler:
    """A handler that puts the groups of a pattern under log keys, each as its kind."""

    def take(text: _Text, line: str) -> None:
        match = pattern.search(line)
        for group, (key, kind) in zip(match.groups() if match else (), kinds.items(), strict=False):
            assign(text.run.facts, key, kind(group.replace(",", "")))

    return take


# Only lines with one of these words are looked at, which keeps 100 MB of log within seconds.
TEXT_HANDLERS: tuple[tuple[str, Handler], ...] = (
    ("artifact_bytes", takes(ARTIFACT, {f"artifact.{part}_bytes": int for part in PARTS})),
    ("training:", takes(TRAINED, {"train.steps": int, "train.seconds": float})),
    ("peak memory", takes(PEAK, {"train.peak_mib": int})),
    ("Hessians in", takes(HESSIANS, {"quantisation.seconds_hessians": float})),
    ("prun", takes(PRUNED, {"quantisation.pruned_values": int})),
    ("Prun", takes(PRUNED, {"quantisation.pruned_values": int})),
    ("total_eval_time", takes(EVAL_TOTAL, {"clocks.eval_seconds_lenient": float})),
    ("train_loss", _Text.on_train),
    ("val_bpb", _Text.on_bpb),
    (" bytes", _Text.on_bytes),
    ("stopping_early", _Text.on_stop),
    ("layer_loop", _Text.on_loop),
    ("Error", _Text.on_crash),
    ("Traceback", _Text.on_crash),
    ("exitcode", _Text.on_crash),
    ("Watchdog", _Text.on_crash),
    ("Segmentation", _Text.on_crash),
    ("total_docs", _Text.on_fact),
)
# Said once, near the head of a log.
HEAD_HANDLERS: tuple[tuple[str, Handler], ...] = (
    *TEXT_HANDLERS,
    ("NVIDIA ", _Text.on_gpu),
    ("orch", takes(TORCH, {"versions.torch": str})),
    ("train_shards", _Text.on_fact),
    ("_tokens", _Text.on_fact),
    ("model_params", _Text.on_fact),
    ("world_size", _Text.on_fact),
    ("seed", _Text.on_fact),
)
SETTINGS_HEAD = re.compile(r"^(?:Hyperparameters|Settings|Config):[ \t]*\r?\n", re.M | re.I)
CHUNK_BYTES = 8 * 2**20
MAX_CRASHES = 20


@collector_paused()
def read_text(path: Path) -> Run:
    """Run from a text log of ours or of a published trainer; never raises on its content."""
    run = Run(path.stem, files={"text": path})
    parser, words, last, lines = _Text(run), HEAD_HANDLERS, "", 0
    for chunk in _chunks(path, _program_end(path)):
        head = SETTINGS_HEAD.search(chunk) if words is HEAD_HANDLERS else None
        if head:
            parser.feed_settings(chunk[head.end() :])
        before = 0
        for start, end, handlers in _interesting_lines(chunk, words):
            lines, before = lines + chunk.count("\n", before, start), start
            parser.line = lines + 1
            parser.feed(chunk[start:end], handlers)
        lines, last, words = lines + chunk.count("\n", before), chunk[-1:], TEXT_HANDLERS
    # A number at the very end may lack digits.
    if last not in ("", "\n", "\r") and (last.isdigit() or not run.evaluations):
        run.problems.append(f"{path.name}: the last line is cut")
    if parser.glued:
        run.problems.append(f"{path.name}: {parser.glued} line(s) of two ranks run into each other")
    skipped = _program_lines(path) if run.crashes else 0
    for number, crash in enumerate(run.crashes):
        after = crash.line > parser.score_line
        run.crashes[number] = crash._replace(line=crash.line + skipped, after_score=after)
    _finish_text(run, parser)
    return run


def _program_end(path: Path, limit: int = 16 * 2**20) -> int:
    """Bytes of program text at the head of a log; 0 if it does not begin with a program."""
    offset = 0
    with path.open("rb") as stream:
        for line in stream:
            if offset == 0 and not CODE.match(line):
                return 0
            if RULE.match(line):
                return offset
            offset += len(line)
            if offset > limit:
                return 0
    return 0


def _program_lines(path: Path) -> int:
    """Lines of program text at the head of a log."""
    with path.open("rb") as stream:
        return stream.read(_program_end(path)).count(b"\n")


def _chunks(path: Path, begin: int) -> Iterator[str]:
    """Text of a file from a byte offset on, in pieces that end with a line, without colours."""
    rest = b""
    with path.open("rb") as stream:
        stream.seek(begin)
        while data := stream.read(CHUNK_BYTES):
            piece = rest + data
            cut = piece.rfind(b"\n") + 1 or len(piece)
            yield _plain(piece[:cut])
            rest = piece[cut:]
    if rest:
        yield _plain(rest)


def _plain(raw: bytes) -> str:
    """Text without colour codes; bytes that are no UTF-8 are replaced."""
    if b"\x1b" in raw:
        raw = ANSI.sub(b"", raw)
    return raw.decode("utf-8", errors="replace")


def _interesting_lines(
    chunk: str, words: Sequence[tuple[str, Handler]]
) -> list[tuple[int, int, list[Handler]]]:
    """(start, end, handlers) of the lines of a chunk that hold a word, in order."""
    found: dict[int, tuple[int, list[Handler]]] = {}
    for word, handler in words:
        at = chunk.find(word)
        while at >= 0:
            start = chunk.rfind("\n", 0, at) + 1
            end = chunk.find("\n", at)
            end = len(chunk) if end < 0 else end
            found.setdefault(start, (end, []))[1].append(handler)
            at = chunk.find(word, end)
    return [(start, end, handlers) for start, (end, handlers) in sorted(found.items())]


def _finish_text(run: Run, parser: _Text) -> None:
    """Facts that follow from the whole log: series in order, headline, totals, crash positions."""
    run.train = [point for _, point in (parser.train[step] for step in sorted(parser.train))]
    for name, value in parser.settings.items():
        assign(run.facts, f"config.{name}", value)
    for name in ("seed", "world_size"):
        value = str(parser.settings.get(name, ""))
        if value.isdigit():
            assign(run.facts, name, int(value))
    if parser.minute_clock:
        _exact_clock(run, parser)
    for item in run.evaluations:
        assign(run.facts, f"bpb.{item.name}", item.bpb)
        assign(run.facts, f"nats.{item.name}", item.loss)
    if run.evaluations:
        last = run.evaluations[-1]
        run.facts |= {"headline": last.name, "val_bpb": last.bpb, "val_loss": last.loss}
    if lookup(run.facts, "train.steps") is None and run.train:
        assign(run.facts, "train.steps", max(run.train[-1].step, _last_validation(run)))


def _last_validation(run: Run) -> int:
    """Step of the last validation, 0 without one."""
    return run.validation[-1].step if run.validation else 0


def _exact_clock(run: Run, parser: _Text) -> None:
    """Replace clocks printed in tenths of a minute by step x tokens / mean rate, and the mean rate
    by the rate since the previous line."""
    tokens = parser.settings.get("train_batch_tokens")
    if not isinstance(tokens, str) or not tokens.isdigit():
        return
    batch, before, exact = int(tokens), (0, 0.0), []
    for point in run.train:
        if not point.tok_s:
            exact.append(point)
            continue
        seconds = point.step * batch / point.tok_s
        lap = seconds - before[1]
        rate = (point.step - before[0]) * batch / lap if lap > 0 else point.tok_s
        before = (point.step, seconds)
        exact.append(point._replace(seconds=seconds, tok_s=rate))
    run.train = exact
    times = [(p.step, p.seconds) for p in exact if p.seconds is not None]
    run.validation = [
        point._replace(seconds=interpolate(times, point.step)) if point.seconds is None else point
        for point in run.validation
    ]


def interpolate(times: list[tuple[int, float]], step: int) -> float | None:
    """Seconds at a step by a straight line between its neighbours; None without neighbours."""
    earlier = [item for item in [(0, 0.0), *times] if item[0] <= step]
    later = [item for item in times if item[0] >= step]
    if not later:
        (a, ta), (b, tb) = ([(0, 0.0), *times])[-2:] if times else ((0, 0.0), (0, 0.0))
        return tb + (step - b) * (tb - ta) / (b - a) if b > a else None
    (a, ta), (b, tb) = earlier[-1], later[0]
    return ta if a == b else ta + (tb - ta) * (step - a) / (b - a)


# --------------------------------------------------------------------------- source inside a log


def source_in_log(path: Path, sha256: str | None = None, limit: int = 4 * 2**20) -> str | None:
    """Program text that a log carries, None if it carries none.

    A log shows its source between two rules of at least 50 "=" or "-", or before the first one.
    With a `sha256` only a block with exactly this hash is returned; without, the longest block that
    is Python. Only the first `limit` bytes are searched.
    """
    with path.open("rb") as stream:
        head = stream.read(limit)
    blocks: list[list[bytes]] = [[]]
    for line in head.splitlines(keepends=True):
        if RULE.match(line):
            blocks.append([])
        else:
            blocks[-1].append(line)
    texts = [b"".join(block) for block in blocks]
    if sha256 is not None:
        return _head_with_hash(head, sha256) or _block_with_hash(texts, sha256)
    python = [text for text in texts if _is_program(text)]
    return max(python, key=len).decode("utf-8") if python else None


def _head_with_hash(head: bytes, sha256: str) -> str | None:
    """The first lines of a log that have this hash, with or without their last newline."""
    digest, size = hashlib.sha256(), 0
    for line in head.splitlines(keepends=True):
        bare = digest.copy()
        bare.update(line.rstrip(b"\r\n"))
        digest.update(line)
        for candidate, end in (
            (bare, size + len(line.rstrip(b"\r\n"))),
            (digest, size + len(line)),
        ):
            if candidate.hexdigest() == sha256:
                return head[:end].decode("utf-8")
        size += len(line)
    return None


def _block_with_hash(texts: Iterable[bytes], sha256: str) -> str | None:
    """The block with this hash, with or without newlines around it, None if no block has it."""
    for text in texts:
        for candidate in (text, text.removesuffix(b"\n"), text.lstrip(b"\n"), text.strip(b"\n")):
            if hashlib.sha256(candidate).hexdigest() == sha256:
                return candidate.decode("utf-8")
    return None


def _is_program(text: bytes) -> bool:
    """Whether a block is Python source of more than a few lines."""
    if text.count(b"\n") < 3 or b"import" not in text:
        return False
    try:
        ast.parse(text.decode("utf-8"))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
