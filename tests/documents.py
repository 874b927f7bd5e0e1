"""What tests of document-wise evaluation share. As a script: one rank, writing rank<r>.pt."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from toy import plan_named, random_model

import train_gpt as golf


def text(count: int, seed: int = 0, longest: int = 150) -> np.ndarray:
    """Random tokens in documents of 2 to `longest` tokens; the last may be cut."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(5, 384, count)
    starts = np.cumsum(np.append(0, rng.integers(2, longest, count)))
    tokens[starts[starts < count - 1]] = golf.BOS_ID
    return tokens


def stream_of(tokens: np.ndarray, seq_len: int = 64, keep_tail: bool = True) -> golf.ValStream:
    """A stream in which every target is one byte."""
    table = golf.TokenBytes(np.ones(384, np.int16), np.zeros(384, bool), np.zeros(384, bool))
    return golf.ValStream(tokens.astype(np.uint16), table, seq_len, keep_tail)


def make_scorer(config: golf.Config, stream: golf.ValStream,
                world: golf.World | None = None) -> golf.Scorer:
    """An audited scorer of a model in which everything matters."""
    return golf.Scorer(random_model(config), plan_named(config, "looped"), stream,
                       world or golf.World(), golf.Audit(config.seed))


def nats_of(scorer: golf.Scorer, windows: golf.Windows) -> torch.Tensor:
    """Nats of every target, taken by the program's own evaluation."""
    ledger = golf.ScoreLedger(scorer.stream, scorer.world)
    scorer.score(windows, ledger)
    ledger.total_nats()
    return ledger.nats


def measure_all(config: golf.Config, world: golf.World) -> dict[str, object]:
    """Every evaluator's bits, and the audit of them all."""
    scorer = make_scorer(config, stream_of(text(900)), world)
    num_targets = scorer.stream.num_targets
    sliding = golf.sliding_windows(num_targets, 64, config.eval_stride)
    documents = golf.document_windows(scorer.stream, 64, config.eval_stride)
    found: dict[str, object] = {
        "plain": golf.evaluate(scorer, golf.sliding_windows(num_targets, 64, 64)).bits,
        "sliding": golf.evaluate(scorer, sliding).bits,
        "documents": golf.evaluate(scorer, documents, by_document=True).bits}
    scorer.views = 2
    found["ttt_documents"] = golf.evaluate_documents(scorer).bits
    found["ttt_mixture"] = golf.evaluate_mixture(scorer).bits
    scorer.views, scorer.fixed = 0, None  # of other windows
    scorer.model.requires_grad_(True)
    found["ttt_sgd"] = golf.evaluate_adapting(scorer, sliding).bits
    return {**found, "audit": scorer.audit.report(world)} if scorer.audit else found


def hurried_chunk(config: golf.Config, world: golf.World) -> int:
    """Targets of a chunk where a pass seems to take later ranks 100 seconds, of 1,000 allowed."""
    scorer, synchronize = make_scorer(config, stream_of(text(900)), world), world.synchronize
    world.synchronize = lambda: synchronize() + 100 * world.rank  # type: ignore[method-assign]
    golf.project_documents(scorer, time.perf_counter() + 1000)
    world.synchronize = synchronize  # type: ignore[method-assign]
    return scorer.model.config.ttt_chunk_size


def main(out: Path) -> None:
    """One rank."""
    torch.set_num_threads(1)
    config, world = golf.Config.from_env(os.environ), golf.World.from_env(os.environ)
    with world.process_group():
        found = {**measure_all(config, world), "hurried_chunk": hurried_chunk(config, world)}
        torch.save(found, out / f"rank{world.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
