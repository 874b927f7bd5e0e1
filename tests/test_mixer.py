"""Section 10: a mixture that is a distribution, learns from final scores and never costs much."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from documents import make_scorer, stream_of, text
from toy import MakeConfig, MakeEnv

import train_gpt as golf

WORST_BPB = 1e-5


@pytest.fixture(autouse=True)
def small_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golf, "MIX_ROWS", 1 << 14)
    monkeypatch.setattr(golf, "MIX_CHUNK", 64)


def views_of(chance_N: np.ndarray) -> np.ndarray:
    """What a scorer keeps, of a model that gives the target a chance and all others the rest."""
    rest_N = (1 - chance_N) / 383
    nats = [np.log(chance_N ** f + 383 * rest_N ** f) - f * np.log(chance_N)
            for f in (1, *golf.TEMPERED)]
    return np.stack(nats).astype(np.float32)


def bits_gained(tokens: np.ndarray, chance_N: np.ndarray) -> float:
    """Bits per byte that the mixture saves on a stream of one byte per target."""
    stream, kept_KT = stream_of(tokens, 1), views_of(chance_N)
    ledger, _ = golf.mix(stream, kept_KT, stream.num_targets, {})
    saved = kept_KT[0].sum(dtype=float) - ledger.total_nats()
    return saved / math.log(2) / stream.num_bytes


PHRASE = np.random.default_rng(0).integers(5, 384, 50)


def test_repeated_text_is_what_pays() -> None:
    assert bits_gained(np.tile(PHRASE, 20), np.full(999, 0.05)) > 3


def test_the_table_grows_with_the_text_up_to_its_bound() -> None:
    sizes = [golf.Mixture(targets).cells.size for targets in (1, 100, 47_851_520)]
    assert sizes == [1 << 5, 1 << 11, golf.MIX_ROWS]


def test_overconfidence_is_tempered() -> None:
    """A model that is sure nine times in ten and right every other time."""
    stream, kept_KT = stream_of(text(9000, longest=3000), 1), views_of(np.full(8999, 0.9))
    right = np.random.default_rng(1).random(8999) < 0.5
    for row, factor in zip(kept_KT, (1, *golf.TEMPERED), strict=True):
        row[~right] += factor * math.log(0.9 * 383 / 0.1)
    saved = kept_KT[0].sum(dtype=float) - golf.mix(stream, kept_KT, 8999, {})[0].total_nats()
    assert saved / 8999 > 0.1


def adversary(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """A stream on which an expert pays until it is trusted, and then no longer."""
    rng, count = np.random.default_rng(2), 6000
    if kind == "noise":
        return rng.integers(5, 384, count + 1), np.full(count, 0.3)
    phrases = np.tile(PHRASE, count // 50 + 1)[:count + 1]
    if kind == "once":  # repeats, then its n-grams go on in another way every time
        phrases[600:] = np.where(np.arange(600, count + 1) % 3 == 0,
                                 rng.integers(5, 384, count - 599), phrases[600:])
    elif kind == "waves":  # repeats and does not, in turns of one update
        wave = np.arange(count + 1) // 64 % 2 == 1
        phrases[wave] = rng.integers(5, 384, wave.sum())
    elif kind == "sure":  # the model knows it all; every doubt costs
        return phrases, np.full(count, 0.9999)
    return phrases, np.full(count, 0.97)


@pytest.mark.parametrize("kind", ["noise", "once", "waves", "sure"])
def test_it_never_costs_more_than_its_first_share(kind: str) -> None:
    assert bits_gained(*adversary(kind)) > -WORST_BPB


@pytest.mark.parametrize("chunk", [1, 7, 300])
def test_bound_holds_for_any_chunk(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(golf, "MIX_CHUNK", chunk)
    tokens = np.random.default_rng(3).integers(0, 384, 301)
    assert bits_gained(tokens, np.random.default_rng(4).random(300) * 0.8 + 0.1) > -WORST_BPB


def test_every_row_sums_to_one_while_it_learns() -> None:
    tokens = np.tile(PHRASE, 12)
    stream, kept_KT = stream_of(tokens, 1), views_of(np.full(599, 0.2))
    logits = np.random.default_rng(5).normal(0, 2, 384)
    row_KV = np.stack([np.log(np.exp(f * logits).sum()) - f * logits
                       for f in (1, *golf.TEMPERED)])
    probes = dict.fromkeys((0, 1, 63, 64, 65, 200, 333, 598), row_KV)
    _, rows = golf.mix(stream, kept_KT, stream.num_targets, probes)
    assert rows.keys() == probes.keys()
    for row_FV in rows.values():
        np.testing.assert_allclose(np.exp(-row_FV).sum(axis=1), 1, atol=1e-9)
    assert rows[598][0].argmin() == tokens[599]
    assert rows[0][0] == pytest.approx(row_KV[0], abs=1e-4)


def test_later_tokens_move_no_score() -> None:
    tokens = np.tile(PHRASE, 12)
    changed = tokens.copy()
    changed[301:] = 9
    kept_KT = views_of(np.full(599, 0.2))
    before, after = (golf.mix(stream_of(t, 1), kept_KT, 599, {})[0].nats for t in (tokens, changed))
    assert torch.equal(before[:300], after[:300])
    assert before[300] < after[300]


def test_views_are_tempered_copies(make_config: MakeConfig) -> None:
    scorer = make_scorer(make_config(), stream_of(text(200)))
    scorer.audit, scorer.views = None, 2
    golf.evaluate(scorer, golf.sliding_windows(199, 64, 64))
    kept, model = scorer.last.kept, scorer.model
    row = torch.from_numpy(scorer.stream.tokens)[None]
    with torch.no_grad():
        x = model.hidden(row[:, :64], scorer.plan)
        capped = 30 * torch.tanh(model.logits(x) / 30)
    for number, factor in enumerate((1, *golf.TEMPERED)):
        wanted = -(capped * factor).log_softmax(1).gather(1, row[0, 1:65, None].long())[:, 0]
        torch.testing.assert_close(kept[number, :64], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["sgd", "documents", "off"])
def test_program_scores_the_mixture_of_its_headline(make_env: MakeEnv, mode: str) -> None:
    learns = {"TTT_ENABLED": 0} if mode == "off" else {"TTT_MODE": mode, "TTT_LORA_RANK": 4,
                                                       "TTT_BATCH_SIZE": 4, "TTT_CHUNK_SIZE": 16}
    result = golf.main(make_env(MIXER="legal", AUDIT=1, **learns))
    bits, audit = result["bpb"], result["audit"]
    assert isinstance(bits, dict)
    assert isinstance(audit, dict)
    assert result["headline"] == "mixer"
    assert result["val_bpb"] == bits["mixer"]
    assert bits["mixer"] < bits["sliding" if mode == "off" else f"ttt_{mode}"] + WORST_BPB
    assert all(facts["passed"] for facts in audit.values())


# ---- Test-time training that diverges ----


@pytest.mark.parametrize("wrong", [{"TTT_MODE": "sgd", "TTT_LR": 10, "TTT_GRAD_CLIP": 0},
                                   {"TTT_MODE": "sgd", "TTT_LR": 10},
                                   {"TTT_MODE": "documents", "TTT_LORA_LR": 1}])
def test_diverged_learning_is_stopped_and_said(make_env: MakeEnv, wrong: dict[str, object]) -> None:
    env = make_env(TTT_LORA_RANK=4, TTT_BATCH_SIZE=4, TTT_CHUNK_SIZE=16, AUDIT=1, **wrong)
    result = golf.main(env)
    bits, stopped = result["bpb"], result["ttt_stopped_at"]
    assert isinstance(bits, dict)
    assert isinstance(stopped, int)
    mode = wrong["TTT_MODE"]
    assert result["headline"] == f"ttt_{mode}"
    assert 0 < stopped < 1500
    assert bits["quantised"] < bits[f"ttt_{mode}"] < 3 * bits["quantised"]
    log = (golf.Path(env["LOG_DIR"]) / "toy.txt").read_text()
    assert f"warning: test-time training made scores worse: stopped after {stopped} targets" in log


def test_scores_go_on_as_those_of_the_artifact(make_config: MakeConfig) -> None:
    """Once stopped, targets cost what they cost without any learning."""
    config = make_config(TTT_LR=10, TTT_GRAD_CLIP=0)
    scorer = make_scorer(config, stream_of(text(2000)))
    windows = golf.sliding_windows(1999, 64, 16)
    golf.evaluate(scorer, windows)
    fixed = scorer.fixed
    golf.evaluate_adapting(scorer, windows)
    assert fixed
    assert scorer.stopped_at == 512
    torch.testing.assert_close(scorer.last.nats[512:], fixed.nats[512:], rtol=1e-5, atol=1e-5)
    assert scorer.last.nats.isfinite().all()
    assert scorer.last.nats[256:512].mean() > fixed.nats[256:512].mean() + golf.MAX_HARM


def test_working_learning_goes_on(make_config: MakeConfig) -> None:
    scorer = make_scorer(make_config(), stream_of(text(1000)))
    windows = golf.sliding_windows(999, 64, 16)
    golf.evaluate(scorer, windows)
    golf.evaluate_adapting(scorer, windows)
    assert scorer.stopped_at == 0
