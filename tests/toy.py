"""What tests share: a toy corpus and tokenizer, tiny settings, random models, fresh processes."""

from __future__ import annotations

import fcntl
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch

import train_gpt as golf
from tools.prepare_data import write_shard

PROGRAM = Path(golf.__file__).resolve()
ROOT = PROGRAM.parent
MakeEnv = Callable[..., dict[str, str]]
MakeConfig = Callable[..., golf.Config]

# A whole run in about two seconds that still meets every branch: two shards, two micro-steps, a
# loop, serial and parallel blocks, a block without exclusive attention, a ragged last chunk.
TINY = {
    "PRESET": "demo", "VOCAB_SIZE": "384", "NUM_LAYERS": "5", "MODEL_DIM": "32", "NUM_HEADS": "4",
    "NUM_KV_HEADS": "2", "MLP_MULT": "3", "ROPE_DIMS": "4", "XSA_LAST_N": "4", "NUM_LOOPS": "1",
    "LOOP_START": "1", "LOOP_END": "2", "PARALLEL_RESIDUAL_START": "3", "TRAIN_SEQ_LEN": "64",
    "EVAL_SEQ_LEN": "64", "EVAL_STRIDE": "16", "TRAIN_BATCH_TOKENS": "768",
    "SLIDING_WINDOW_ENABLED": "1", "TTT_MODE": "sgd", "VAL_TAIL": "0",
    "MICRO_BATCH_TOKENS": "384", "VAL_BATCH_TOKENS": "8192", "TTT_CHUNK_TOKENS": "256",
    "ITERATIONS": "8", "MAX_WALLCLOCK_SECONDS": "0", "GPTQ_CALIBRATION_BATCHES": "4",
    "MUON_MOMENTUM_WARMUP_STEPS": "4", "EMA_DECAY": "0.5", "TRAIN_LOG_EVERY": "4",
    "ATTENTION": "math", "QUANTISER": "gptq", "COMPRESSOR": "brotli", "GPTQ_DAMP": "0.01",
    "MIXER": "off",
}

SUBJECTS = ["the old miller", "a grey heron", "my neighbour's cat", "Captain Brandt", "Zoë",
            "the café owner", "an honest broker", "the 3rd engineer", "Doña Inés", "der Bäcker",
            "the night train"]
VERBS = ["counts", "carries", "paints", "forgets", "measures", "sells", "hides", "weighs"]
OBJECTS = ["seven brass lamps", "a naïve melody", "12 crates of salt", "the harbour bell",
           "Ωmega clocks", "a map of the fens", "rice (米) and tea (茶)", "λ and μ",
           "two red kites \U0001fa81"]
PLACES = ["by the quay", "at dawn", "in Łódź", "under the bridge", "before the rain", "for 45 days"]


def toy_documents(seed: int, count: int) -> list[str]:
    """Invented English with accents, digits, Greek, Han and emoji."""
    rng = random.Random(seed)

    def sentence() -> str:
        return " ".join(rng.choice(words) for words in (SUBJECTS, VERBS, OBJECTS, PLACES)) + "."

    return [" ".join(sentence() for _ in range(rng.randint(3, 12))) for _ in range(count)]


def train_tokenizer(prefix: Path, documents: Iterable[str], vocab_size: int,
                    **options: bool) -> Path:
    """A SentencePiece BPE with the competition's options."""
    defaults = {
        "model_type": "bpe", "byte_fallback": True, "split_digits": True,
        "normalization_rule_name": "nmt_nfkc", "add_dummy_prefix": False, "pad_id": 0, "bos_id": 1,
        "eos_id": 2, "unk_id": 3, "hard_vocab_limit": False, "num_threads": 1, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents), model_prefix=str(prefix), vocab_size=vocab_size,
        **{**defaults, **options})  # type: ignore[arg-type]
    return prefix.with_suffix(".model")


def encode_documents(model: Path, documents: Iterable[str]) -> np.ndarray:
    """Token ids of all documents, each behind a document start."""
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(model))
    ids = [token for text in documents for token in [golf.BOS_ID, *tokenizer.encode(text)]]
    return np.array(ids, dtype=np.uint16)


def write_corpus(folder: Path) -> None:
    """Tokenizer and dataset as the competition lays them out: two unequal shards a split."""
    shards, models = folder / "datasets" / "fineweb10B_sp384", folder / "tokenizers"
    shards.mkdir(parents=True)
    models.mkdir()
    model = train_tokenizer(models / "fineweb_384_bpe", toy_documents(1, 400), 384)
    train, val = (encode_documents(model, toy_documents(seed, count))
                  for seed, count in ((2, 160), (3, 16)))
    cut = len(train) * 2 // 5
    write_shard(shards / "fineweb_train_000000.bin", train[:cut])
    write_shard(shards / "fineweb_train_000001.bin", train[cut:])
    write_shard(shards / "fineweb_val_000000.bin", val[:700])
    write_shard(shards / "fineweb_val_000001.bin", val[700:1900])


def shared_once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], None]) -> Path:
    """The folder that `build` filled, built once for all workers of pytest-xdist."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder, done = root / name, root / f"{name}.done"
        if not done.exists():
            folder.mkdir()
            build(folder)
            done.touch()
    return folder


def tiny_env(data: Path, out: Path, **overrides: object) -> dict[str, str]:
    """Environment of a tiny run on the corpus in `data` that writes below `out`."""
    paths = {"DATA_PATH": data / "datasets" / "fineweb10B_sp384",
             "TOKENIZER_PATH": data / "tokenizers" / "fineweb_384_bpe.model",
             "LOG_DIR": out / "logs", "RUN_DIR": out / "runs", "RUN_ID": "toy"}
    return {k: str(v) for k, v in {**TINY, **paths, **overrides}.items()}


class SilentLog(golf.RunLog):
    """A log that keeps its lines and events in memory."""

    def __init__(self, config: golf.Config) -> None:
        super().__init__(config, golf.World(rank=1, size=2))
        self.lines: list[str] = []
        self.events: list[dict[str, object]] = []

    def line(self, text: str, *, console: bool = True) -> None:
        """Keeps the line."""
        self.lines.append(text)

    def event(self, kind: str, **values: object) -> None:
        """Keeps the event."""
        self.events.append({"event": kind, **values})


def read_result(folder: Path, run_id: str = "toy") -> dict[str, dict[str, float]]:
    """The result file of a run; most of its values are sections of numbers."""
    return json.loads((folder / "logs" / f"{run_id}.json").read_text())


def random_model(config: golf.Config, seed: int = 0) -> golf.GPT:
    """A model in which every parameter matters: nothing is zero, one or symmetric."""
    model = golf.GPT(config, golf.sdpa_attend)
    model.initialise(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        model.embed.mul_(100)
        for name in ("out", "down"):
            getattr(model, name).normal_(0, 0.15, generator=generator)
        for parameter in model.vectors().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def random_tokens(*shape: int, vocab_size: int = 384, seed: int = 0) -> torch.Tensor:
    """Token ids, int32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, shape, generator=generator, dtype=torch.int32)


def blocks_of(plan: golf.DepthPlan) -> list[int]:
    """Physical blocks in order of visit."""
    return [visit.block for visit in plan.visits]


def plan_named(config: golf.Config, name: str) -> golf.DepthPlan:
    """One of the plans of a configuration."""
    return {plan.name: plan for plan in golf.depth_plans(config)}[name]


def quiet_environment(**extra: str) -> dict[str, str]:
    """The caller's environment without settings of ours, one thread a process."""
    ours = {field.name.upper() for field in fields(golf.Config)}
    ours |= {"RANK", "WORLD_SIZE", "LOCAL_RANK"}
    kept = {k: v for k, v in os.environ.items() if k not in ours}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **extra}


def run_program(program: Path, env: dict[str, str], *arguments: str,
                cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`python program arguments` in a fresh process."""
    return subprocess.run([sys.executable, str(program), *arguments], env=quiet_environment(**env),
                          cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(script: Path, size: int, out: Path, env: dict[str, str]) -> None:
    """Runs `script out` as `size` ranks. Raises: RuntimeError with what they wrote."""
    common = quiet_environment(**env, WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1",
                               MASTER_PORT=str(free_port()))
    if sys.platform == "linux":  # elsewhere the loopback interface has another name
        common["GLOO_SOCKET_IFNAME"] = "lo"
    ranks, texts = [], [out / f"rank{rank}.txt" for rank in range(size)]
    try:
        for rank, text in enumerate(texts):
            with text.open("w") as file:
                ranks.append(subprocess.Popen(
                    [sys.executable, str(script), str(out)], stdout=file, stderr=subprocess.STDOUT,
                    env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}))
        codes = [process.wait(timeout=300) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    if any(codes):
        raise RuntimeError("\n".join(text.read_text() for text in texts))
