"""Section 10: the model learns from a chunk after, and only after, all of it was scored."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from toy import MakeConfig, plan_named, random_model

import train_gpt as golf

CHUNK = 256


@pytest.fixture
def ledgers(monkeypatch: pytest.MonkeyPatch) -> list[golf.ScoreLedger]:
    """Every ledger that the program opens."""
    opened: list[golf.ScoreLedger] = []

    class Kept(golf.ScoreLedger):
        """A ledger that stays within reach of the test."""

        def __init__(self, *inputs: object) -> None:
            super().__init__(*inputs)  # type: ignore[arg-type]
            opened.append(self)

    monkeypatch.setattr(golf, "ScoreLedger", Kept)
    return opened


def stream_of(tokens: np.ndarray) -> golf.ValStream:
    table = golf.TokenBytes(np.ones(384, np.int16), np.zeros(384, bool), np.zeros(384, bool))
    return golf.ValStream(tokens.astype(np.uint16), table, 64)


def random_stream(seed: int = 0, sequences: int = 17) -> golf.ValStream:
    """Four whole chunks and a last one of a single sequence."""
    return stream_of(np.random.default_rng(seed).integers(0, 384, 64 * sequences + 1))


def run(config: golf.Config, stream: golf.ValStream, adapting: bool = True) -> golf.Score:
    """One evaluation, on a fresh model, by the program's own functions."""
    scorer = golf.Scorer(random_model(config), plan_named(config, "looped"), stream, golf.World())
    windows = golf.sliding_windows(stream.num_targets, 64, config.eval_stride)
    return golf.evaluate_adapting(scorer, windows) if adapting else golf.evaluate(scorer, windows)


def test_first_chunk_scores_as_without_learning(config: golf.Config,
                                                ledgers: list[golf.ScoreLedger]) -> None:
    stream = random_stream()
    run(config, stream, adapting=False)
    run(config, stream)
    plain, adapting = (ledger.nats for ledger in ledgers)
    torch.testing.assert_close(plain[:CHUNK], adapting[:CHUNK], rtol=1e-5, atol=1e-5)
    assert not torch.isclose(plain[CHUNK:], adapting[CHUNK:], atol=1e-3).all()


@pytest.mark.parametrize("override", [{"TTT_EPOCHS": 0}, {"TTT_LR": 0}])
def test_without_epochs_or_rate_it_is_plain_sliding(make_config: MakeConfig,
                                                    ledgers: list[golf.ScoreLedger],
                                                    override: dict[str, int]) -> None:
    config, stream = make_config(**override), random_stream()
    scores = [run(config, stream, adapting) for adapting in (False, True)]
    torch.testing.assert_close(ledgers[0].nats, ledgers[1].nats, rtol=1e-5, atol=1e-5)
    assert scores[0].bits == pytest.approx(scores[1].bits, abs=1e-6)


@pytest.mark.parametrize("chunk", [0, 1, 3, 4])
def test_no_score_depends_on_tokens_of_later_chunks(config: golf.Config, chunk: int,
                                                    ledgers: list[golf.ScoreLedger]) -> None:
    stream = random_stream()
    changed = stream.tokens.copy()
    first = CHUNK * chunk + 1  # target t is token t + 1
    changed[first:] = np.random.default_rng(7).integers(0, 384, len(changed) - first)
    run(config, stream)
    run(config, stream_of(changed))
    before, after = (ledger.nats for ledger in ledgers)
    assert torch.equal(before[:CHUNK * chunk], after[:CHUNK * chunk])
    assert (before[CHUNK * chunk:] != after[CHUNK * chunk:]).float().mean() > 0.9


def test_no_score_depends_on_later_tokens_of_its_own_chunk(
        config: golf.Config, ledgers: list[golf.ScoreLedger]) -> None:
    stream = random_stream()
    changed = stream.tokens.copy()
    changed[400:CHUNK * 2] = 7
    run(config, stream)
    run(config, stream_of(changed))
    before, after = (ledger.nats for ledger in ledgers)
    assert torch.equal(before[:399], after[:399])
    assert (before[399:] != after[399:]).float().mean() > 0.5


def test_chunks_far_behind_are_remembered(config: golf.Config,
                                          ledgers: list[golf.ScoreLedger]) -> None:
    """The first chunk is out of every later window's sight, so only learning can carry it on."""
    stream = random_stream()
    changed = stream.tokens.copy()
    changed[10] = (changed[10] + 1) % 384
    run(config, stream)
    run(config, stream_of(changed))
    before, after = (ledger.nats[3 * CHUNK:] for ledger in ledgers)
    assert (before != after).any()


def test_learning_helps_on_text_that_repeats(make_config: MakeConfig) -> None:
    text = np.tile(np.random.default_rng(0).integers(0, 384, 64), 17)
    stream, config = stream_of(np.append(text, text[0])), make_config(TTT_LR=0.02)
    assert run(config, stream).nats < run(config, stream, adapting=False).nats - 0.2


class Journal:
    """Notes in which order the program scores, releases and learns."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.notes: list[tuple[object, ...]] = []
        self.learnt: list[tuple[np.ndarray, float]] = []
        self.steps = 0
        score, released = golf.Scorer.score, golf.ScoreLedger.released
        adapt, step = golf.adapt, torch.optim.SGD.step

        def note_score(scorer: golf.Scorer, windows: golf.Windows,
                       ledger: golf.ScoreLedger) -> None:
            self.notes.append(("score", int(windows.first_scored.min()), int(windows.stops.max())))
            score(scorer, windows, ledger)

        def note_release(ledger: golf.ScoreLedger, first: int, last: int) -> np.ndarray:
            self.notes.append(("release", first, last))
            return released(ledger, first, last)

        def note_adapt(scorer: golf.Scorer, sgd: torch.optim.SGD, tokens: np.ndarray,
                       lr: float) -> None:
            self.notes.append(("learn",))
            self.learnt.append((tokens.copy(), lr))
            adapt(scorer, sgd, tokens, lr)

        def note_step(sgd: torch.optim.SGD) -> None:
            self.steps += 1
            step(sgd)

        monkeypatch.setattr(golf.Scorer, "score", note_score)
        monkeypatch.setattr(golf.ScoreLedger, "released", note_release)
        monkeypatch.setattr(golf, "adapt", note_adapt)
        monkeypatch.setattr(torch.optim.SGD, "step", note_step)


def test_order_is_score_release_learn(config: golf.Config,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    journal, stream = Journal(monkeypatch), random_stream()
    run(config, stream)
    wanted: list[tuple[object, ...]] = []
    for chunk in range(5):
        first, last = CHUNK * chunk, min(CHUNK * (chunk + 1), stream.num_targets)
        wanted += [("score", first, last), ("release", first, last), ("learn",)][:3 - chunk // 4]
    assert journal.notes == [*wanted, ("release", 0, stream.num_targets)]


def test_each_chunk_is_learnt_whole_at_its_published_rate(config: golf.Config,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    journal, stream = Journal(monkeypatch), random_stream()
    run(config, stream)
    assert len(journal.learnt) == 4
    for chunk, (tokens, lr) in enumerate(journal.learnt):
        assert tokens.tolist() == stream.tokens[CHUNK * chunk:CHUNK * (chunk + 1) + 1].tolist()
        assert lr == pytest.approx(0.005 * 0.5 * (1 + math.cos(math.pi * chunk / 4)))


@pytest.mark.parametrize(("rows", "batches"), [(1, 4), (3, 2), (4, 1), (32, 1)])
def test_every_epoch_runs_over_all_sequences(config: golf.Config, monkeypatch: pytest.MonkeyPatch,
                                             rows: int, batches: int) -> None:
    journal = Journal(monkeypatch)
    run(replace(config, val_batch_tokens=rows * 8 * 64), random_stream())
    assert journal.steps == 4 * 3 * batches


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_learning_is_clipped_sgd_on_the_mean(make_config: MakeConfig, momentum: float,
                                             clip: float) -> None:
    config = make_config(TTT_MOMENTUM=momentum, TTT_GRAD_CLIP=clip)
    stream, plan = random_stream(), plan_named(config, "looped")
    learnt, model = random_model(config), random_model(config)
    scorer = golf.Scorer(learnt, plan, stream, golf.World())
    sgd = torch.optim.SGD(learnt.parameters(), momentum=momentum)
    buffers = [torch.zeros_like(p) for p in model.parameters()]
    for chunk, lr in ((0, 0.02), (1, 0.01)):
        tokens = stream.tokens[CHUNK * chunk:CHUNK * (chunk + 1) + 1]
        golf.adapt(scorer, sgd, tokens, lr)
        rows = torch.stack([torch.from_numpy(tokens[64 * i:64 * i + 65]) for i in range(4)])
        for _ in range(3):
            model.zero_grad()
            model(rows[:, :-1], rows[:, 1:], plan).mean().backward()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            norm = torch.cat([g.flatten() for g in gradients]).norm()
            shrink = min(1.0, clip / float(norm + 1e-6)) if clip else 1.0
            with torch.no_grad():
                for p, g, buffer in zip(model.parameters(), gradients, buffers, strict=True):
                    buffer.mul_(momentum).add_(g * shrink)
                    p.sub_(lr * buffer)
    start = random_model(config).parameters()
    for found, wanted, first in zip(learnt.parameters(), model.parameters(), start, strict=True):
        assert (wanted - first).norm() > 0
        assert (found - wanted).norm() < 1e-3 * (wanted - first).norm() + 1e-6


def test_tail_shorter_than_a_sequence_is_not_learnt(config: golf.Config) -> None:
    stream, plan = random_stream(), plan_named(config, "looped")
    models = [random_model(config) for _ in range(3)]
    for model, length in zip(models, (129, 129 + 63, 64), strict=True):
        scorer = golf.Scorer(model, plan, stream, golf.World())
        sgd = torch.optim.SGD(model.parameters())
        golf.adapt(scorer, sgd, stream.tokens[:length], 0.01)
    assert torch.equal(models[0].up, models[1].up)
    assert torch.equal(models[2].up, random_model(config).up)


@pytest.mark.parametrize("stride", [16, 24, 64])
def test_any_stride_scores_everything_before_learning(make_config: MakeConfig, stride: int) -> None:
    """With 24, windows straddle chunks; the ledger would refuse to release what is not scored."""
    score = run(make_config(EVAL_STRIDE=stride), random_stream())
    assert math.isfinite(score.bits)


def test_single_chunk_is_scored_only(config: golf.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    journal, stream = Journal(monkeypatch), random_stream(sequences=4)
    score = run(config, stream)
    assert journal.learnt == []
    assert score.bits == pytest.approx(run(config, stream, adapting=False).bits, abs=1e-6)
