#!/usr/bin/env python3
"""What PR 1453 reports as nats per target, on an artifact, and why that is no score.

    PRESET=pr1453 python tools/published_mixture.py runs/<run_id>/artifact.bin

Its mixture has the model, three n-gram orders and, as an expert, exp(-entropy) of the model for
every token alike, which is no chance: what it credits sums to far more than one over the
vocabulary. Printed: the valid nats of a sliding window, the published number, and its mean mass,
which is 1 for a distribution. `--out` writes them as JSON.

Exit status: 0 measured, 1 an error, 2 bad arguments.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_gpt as golf
from tools.command import exit_status

BATCH, START = 8192, 10_000  # targets of a step of weights; counted before the first
ROWS = 65_536  # of the table of two tokens of context, which is hashed
ADDED, LEAST = (0.1, 0.1, 0.01), (0, 0, 1)  # of each order: to counts; least sum of counts
RATE = 0.1  # of the weights, whose logarithms fall by it times the mean cost


class EntropyScorer(golf.Scorer):
    """Keeps beside the nats of each target the entropy of the distribution that it is from."""

    def judge(self, x_BSD: Tensor, target_BS: Tensor, adapter: golf.LowRank | None) -> Tensor:
        """Nats of targets and entropies, (2, B, S)."""
        logits_NV, cap = self.model.logits(x_BSD, adapter), self.model.config.logit_softcap
        capped_NV = cap * torch.tanh(logits_NV.float() / cap)
        nats_N = self.model.target_nats(logits_NV, target_BS.flatten().long())
        entropy_N = functional.cross_entropy(capped_NV, capped_NV.softmax(1), reduction="none")
        return torch.stack([nats_N, entropy_N]).view(-1, *target_BS.shape)


def published_mixture(scorer: EntropyScorer) -> tuple[float, float]:
    """What PR 1453 calls nats per target, and the mean mass over all tokens, at sampled positions.
    Weights follow the mean cost of scored targets, the published ones of their contexts too.
    Source: evaluation code of PR 1453 (BATCH, START, ROWS, ADDED, LEAST, RATE are its)."""
    config, total, masses = scorer.model.config, 0.0, list[float]()
    scorer.views = 1
    padded, size = np.pad(scorer.stream.tokens, (1, 0)), config.vocab_size
    golf.evaluate(scorer, golf.sliding_windows(
        len(padded) - 2, config.eval_seq_len, config.eval_stride))
    known_KT = scorer.last.kept.cpu().numpy().astype(np.float64)
    a, b, y = np.lib.stride_tricks.sliding_window_view(np.int64(padded), 3).T
    row_OT = np.stack([0 * b, b, (36313 * a ^ 27191 * b) % ROWS])
    counts = [np.zeros((rows, size + 1), np.int32) for rows in (1, size, ROWS)]  # and their sum
    weights = np.array([2.0, 0, 0, 0, 0])  # logarithms; of model, three n-gram orders, entropy

    def costs(known_KN: np.ndarray, row_ON: np.ndarray, target_N: np.ndarray) -> np.ndarray:
        grams = [np.log((np.maximum(n[row, size], least) + add * size) / (n[row, target_N] + add))
                 for n, row, add, least in zip(counts, row_ON, ADDED, LEAST, strict=True)]
        return np.stack([known_KN[0], *grams, known_KN[1]])

    for first in range(0, len(y), BATCH):
        part = slice(first, first + BATCH)
        cost_EN = costs(known_KT[:, part], row_OT[:, part], y[part])
        total += cost_EN[0].sum()
        if first >= START:
            share = (weights - np.logaddexp.reduce(weights))[:, None]
            total -= (np.logaddexp.reduce(share - cost_EN) + cost_EN[0]).sum()
            same = np.full(size, first)  # of the model's distribution only the sum matters
            known_KV = np.stack([np.full(size, math.log(size)), known_KT[1, same]])
            masses.append(np.exp(share - costs(known_KV, row_OT[:, same], np.arange(size))).sum())
            weights -= RATE * cost_EN.mean(1)
        for n, row in zip(counts, row_OT[:, part], strict=True):
            np.add.at(n, (row, [y[part], 0 * row + size]), 1)
    return total / len(y), float(np.mean(masses or 1.0))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, help="artifact.bin of a run with these settings")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file for what is printed")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None, env: Mapping[str, str] = os.environ) -> int:
    """Measures and prints; the exit status.

    Raises: GolfError, OSError.
    """
    options = parse_arguments(arguments)
    config, world = golf.Config.from_env(env), golf.World.from_env({})
    torch.set_float32_matmul_precision("high")
    attend = golf.choose_attention(config.attention, world.device).attend
    model, plan = golf.load_artifact(options.artifact, config, world, attend)
    scorer = EntropyScorer(model, plan, golf.ValStream.load(config), world)
    nats, mass = published_mixture(scorer)
    valid = float(scorer.last.nats.double().mean())
    print(f"valid, sliding: {valid:.4f} nats per target")
    print(f"published mixture: {nats:.4f} \"nats\", mass {mass:.3f}: NOT A DISTRIBUTION, no score")
    if options.out:
        found = {"artifact_sha256": golf.digest(options.artifact.read_bytes()),
                 "preset": config.preset, "sliding_nats": valid,
                 "hedge1453": {"nats": nats, "mass": mass}}
        golf.write_atomically(options.out, (json.dumps(found, indent=1) + "\n").encode())
        print(f"result: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main, golf.GolfError))
