"""Section 9: every target scored once, from what came before, by probabilities that sum to 1."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy import MakeConfig, SilentLog, plan_named, random_model

import train_gpt as golf

OFFICIAL = 40_540_160


def stream_of(tokens: np.ndarray, seq_len: int = 64) -> golf.ValStream:
    """A stream in which every target is one byte."""
    table = golf.TokenBytes(np.ones(384, np.int16), np.zeros(384, bool), np.zeros(384, bool))
    return golf.ValStream(tokens.astype(np.uint16), table, seq_len)


def random_stream(sequences: int, seed: int = 0) -> golf.ValStream:
    return stream_of(np.random.default_rng(seed).integers(0, 384, 64 * sequences + 1))


def make_scorer(config: golf.Config, stream: golf.ValStream, plan: str = "looped") -> golf.Scorer:
    return golf.Scorer(random_model(config), plan_named(config, plan), stream, golf.World())


def windows_of(stream: golf.ValStream, kind: str) -> golf.Windows:
    if kind == "plain":
        return golf.sliding_windows(stream.num_targets, 64, 64)
    return golf.sliding_windows(stream.num_targets, 64, 16)


def scores(scorer: golf.Scorer, kind: str) -> torch.Tensor:
    """Nats of every target, taken by the program's own evaluation."""
    ledger = golf.ScoreLedger(scorer.stream, scorer.world)
    scorer.score(windows_of(scorer.stream, kind), ledger)
    ledger.total_nats()
    return ledger.nats


# ---- Windows ----


def test_published_sliding_windows() -> None:
    windows = golf.sliding_windows(OFFICIAL, 2048, 64)
    assert len(windows.starts) == 633_409
    assert ((windows.stops - windows.starts) == 2048).all()
    assert windows.stops[-1] == OFFICIAL
    assert windows.first_scored[0] == 0
    assert (windows.first_scored[1:] == windows.stops[:-1]).all()
    assert (windows.first_scored[1:] - windows.starts[1:] == 1984).all()


def test_published_chunks() -> None:
    windows = golf.sliding_windows(OFFICIAL, 2048, 64)
    per_chunk = np.bincount(windows.first_scored // 32_768)
    assert len(per_chunk) == 1238
    assert per_chunk[0] == 481
    assert (per_chunk[1:-1] == 512).all()
    assert per_chunk[-1] == 96
    assert OFFICIAL - 1237 * 32_768 == 6144


def test_published_plain_windows() -> None:
    windows = golf.sliding_windows(OFFICIAL, 2048, 2048)
    assert len(windows.starts) == 19_795
    assert windows.stops[-1] == OFFICIAL


@given(num_targets=st.integers(1, 400), seq_len=st.integers(1, 40), data=st.data())
def test_windows_score_every_target_once_with_enough_context(num_targets: int, seq_len: int,
                                                             data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, seq_len))
    for windows, context in ((golf.sliding_windows(num_targets, seq_len, stride), seq_len - stride),
                             (golf.sliding_windows(num_targets, seq_len, seq_len), 0)):
        counts = np.zeros(num_targets, int)
        for start, first, stop in zip(*windows, strict=True):
            assert 0 <= start <= first < stop <= start + seq_len
            assert start == 0 or first - start == context
            counts[first:stop] += 1
        assert (counts == 1).all()


def test_window_example() -> None:
    windows = golf.sliding_windows(10, 4, 2)
    assert [list(map(int, window)) for window in zip(*windows, strict=True)] == [
        [0, 0, 4], [2, 4, 6], [4, 6, 8], [6, 8, 10]]


@pytest.mark.parametrize("count", [1, 5, 64, 633])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_ranks_share_all_windows_in_order(config: golf.Config, count: int, size: int,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    windows, scorer = golf.sliding_windows(count * 4, 4, 4), make_scorer(config, random_stream(1))
    monkeypatch.setattr(scorer, "predict", lambda *_: None)
    starts, lengths = list[int](), []
    for rank in range(size):
        scorer.world, ledger = golf.World(rank, size), golf.ScoreLedger(scorer.stream, golf.World())
        before = len(starts)
        monkeypatch.setattr(ledger, "commit", lambda part, _: starts.extend(part.starts))
        scorer.score(windows, ledger)
        lengths.append(len(starts) - before)
    assert starts == windows.starts.tolist()
    assert max(lengths) - min(lengths) <= 1


# ---- The ledger ----


def commit(ledger: golf.ScoreLedger, *spans: tuple[int, int]) -> None:
    """One nat for every target of every span."""
    starts, stops = (np.array(values) for values in zip(*spans, strict=True))
    longest = int((stops - starts).max())
    ledger.commit(golf.Windows(starts, starts, stops), torch.ones(len(spans) + 1, longest))


@pytest.fixture
def ledger() -> golf.ScoreLedger:
    return golf.ScoreLedger(random_stream(4), golf.World())


def test_ledger_adds_up_what_it_was_given(ledger: golf.ScoreLedger) -> None:
    nats = torch.tensor([[1.0, 2.0, 4.0, 100.0], [8.0, 16.0, 100.0, 100.0], [100.0] * 4])
    starts = np.array([0, 10])
    ledger.commit(golf.Windows(starts, starts, np.array([3, 12])), nats)
    commit(ledger, (3, 10), (12, 256))
    assert ledger.total_nats() == 31 + 7 + 244
    assert ledger.nats[:4].tolist() == [1, 2, 4, 1]
    assert ledger.nats[10:13].tolist() == [8, 16, 1]


@pytest.mark.parametrize("again", [(5, 6), (0, 10), (9, 30), (4, 5)])
def test_second_score_is_refused(ledger: golf.ScoreLedger, again: tuple[int, int]) -> None:
    commit(ledger, (0, 10))
    with pytest.raises(golf.LegalityError, match="scored before"):
        commit(ledger, again)
    assert ledger.nats[10:].sum() == 0


def test_second_score_in_one_batch_is_refused(ledger: golf.ScoreLedger) -> None:
    with pytest.raises(golf.LegalityError, match="scored before"):
        commit(ledger, (0, 10), (9, 12))


def test_score_after_release_is_refused(ledger: golf.ScoreLedger) -> None:
    commit(ledger, (0, 64))
    ledger.released(0, 64)
    with pytest.raises(golf.LegalityError, match="scored before"):
        commit(ledger, (63, 64))


def test_release_hands_out_exactly_the_scored_tokens(ledger: golf.ScoreLedger) -> None:
    commit(ledger, (0, 100))
    assert ledger.released(0, 64).tolist() == ledger.stream.tokens[:65].tolist()
    assert ledger.released(10, 20).tolist() == ledger.stream.tokens[10:21].tolist()
    with pytest.raises(golf.LegalityError, match="1 targets between 0 and 101 are not scored"):
        ledger.released(0, 101)


def test_early_release_is_refused(ledger: golf.ScoreLedger) -> None:
    with pytest.raises(golf.LegalityError, match="not scored"):
        ledger.released(0, 1)
    commit(ledger, (0, 63))
    with pytest.raises(golf.LegalityError, match="1 targets"):
        ledger.released(0, 64)


@pytest.mark.parametrize("missing", [0, 100, 255])
def test_incomplete_ledger_has_no_total(ledger: golf.ScoreLedger, missing: int) -> None:
    spans = [span for span in ((0, missing), (missing + 1, 256)) if span[0] < span[1]]
    commit(ledger, *spans)
    with pytest.raises(golf.LegalityError, match="1 targets"):
        ledger.total_nats()


def test_total_is_exact_for_many_targets() -> None:
    ledger = golf.ScoreLedger(random_stream(4000), golf.World())
    whole = golf.sliding_windows(256_000, 256_000, 1)
    ledger.commit(whole, torch.full((1, 256_000), 0.1))
    assert ledger.total_nats() == pytest.approx(float(np.float32(0.1)) * 256_000, rel=1e-12)


# ---- Scores ----


@pytest.mark.parametrize("plan", ["unlooped", "looped"])
@pytest.mark.parametrize("kind", ["plain", "sliding"])
def test_scores_are_those_of_each_window_by_itself(config: golf.Config, kind: str,
                                                   plan: str) -> None:
    scorer = make_scorer(config, random_stream(9), plan)
    found = scores(scorer, kind)
    wanted = torch.full_like(found, math.nan)
    tokens = torch.from_numpy(scorer.stream.tokens)
    for start, first, stop in zip(*windows_of(scorer.stream, kind), strict=True):
        row = tokens[start:stop + 1][None]
        with torch.no_grad():
            nats = scorer.model(row[:, :-1], row[:, 1:], scorer.plan)[0]
        wanted[first:stop] = nats[first - start:]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_score_is_total_nats_over_bytes(config: golf.Config, val_stream: golf.ValStream) -> None:
    scorer = make_scorer(config, val_stream)
    score = golf.evaluate(scorer, windows_of(val_stream, "sliding"))
    total = float(scores(scorer, "sliding").double().sum())
    assert score.nats == pytest.approx(total / val_stream.num_targets)
    assert score.bits == pytest.approx(total / math.log(2) / val_stream.num_bytes)
    assert score.seconds > 0


def test_score_of_the_published_run(config: golf.Config, ledger: golf.ScoreLedger,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """spec/pr1493.md sections 0 and 8: seed 42 after test-time training."""
    ledger.stream.num_targets, ledger.stream.num_bytes = OFFICIAL, 151_078_222
    monkeypatch.setattr(ledger, "total_nats", lambda: 2.79180 * OFFICIAL)
    score = golf.finish_score(make_scorer(config, random_stream(1)), ledger)
    assert score.nats == pytest.approx(2.79180)
    assert score.bits == pytest.approx(1.08079, abs=1e-5)


def test_longer_context_is_what_sliding_adds(config: golf.Config) -> None:
    scorer = make_scorer(config, random_stream(6))
    plain, sliding = (scores(scorer, kind) for kind in ("plain", "sliding"))
    torch.testing.assert_close(plain[:64], sliding[:64], rtol=1e-5, atol=1e-5)
    assert not torch.isclose(plain[64:80], sliding[64:80], atol=1e-3).all()


@pytest.mark.parametrize("kind", ["plain", "sliding"])
@pytest.mark.parametrize("position", [1, 70, 300, 639])
def test_future_tokens_do_not_move_past_scores(config: golf.Config, kind: str,
                                               position: int) -> None:
    stream = random_stream(10)
    changed = stream.tokens.copy()
    changed[position:] = np.random.default_rng(5).integers(0, 384, len(changed) - position)
    before = scores(make_scorer(config, stream), kind)
    after = scores(make_scorer(config, stream_of(changed)), kind)
    assert torch.equal(before[:position - 1], after[:position - 1])
    assert (before[position - 1:] != after[position - 1:]).float().mean() > 0.9


@pytest.mark.parametrize("kind", ["plain", "sliding"])
def test_one_changed_target_moves_its_own_score_and_later_ones(config: golf.Config,
                                                               kind: str) -> None:
    stream = random_stream(6)
    changed = stream.tokens.copy()
    changed[201] = (changed[201] + 1) % 384
    before = scores(make_scorer(config, stream), kind)
    after = scores(make_scorer(config, stream_of(changed)), kind)
    assert torch.equal(before[:200], after[:200])
    assert before[200] != after[200]
    assert (before[201:250] != after[201:250]).any()


def test_probabilities_of_the_whole_vocabulary_sum_to_one(config: golf.Config) -> None:
    """Window v holds the same tokens as the others, but token v as its last target but one."""
    row = np.random.default_rng(0).integers(0, 384, 64)
    tokens = np.tile(row, 384)
    tokens[63::64] = np.arange(384)
    stream = stream_of(np.append(tokens, row[0]))
    nats = scores(make_scorer(config, stream), "plain").view(384, 64)
    torch.testing.assert_close(nats[1:, :62], nats[:1, :62].expand(383, 62))
    assert nats[:, 62].std() > 0.5
    assert torch.exp(-nats[:, 62].double()).sum().item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_batch_size_does_not_matter(config: golf.Config, rows: int) -> None:
    stream = random_stream(10)
    small = replace(config, val_batch_tokens=rows * 8 * 64)
    assert small.eval_rows == rows
    for kind in ("plain", "sliding"):
        torch.testing.assert_close(scores(make_scorer(small, stream), kind),
                                   scores(make_scorer(config, stream), kind), rtol=1e-4, atol=1e-4)


def test_evaluation_can_use_longer_windows_than_training(make_config: MakeConfig) -> None:
    config = make_config(EVAL_SEQ_LEN=128, TTT_CHUNK_TOKENS=256)
    stream = random_stream(8)
    scorer = make_scorer(config, stream)
    score = golf.evaluate(scorer, golf.sliding_windows(stream.num_targets, 128, 16))
    assert math.isfinite(score.bits)


def test_scoring_leaves_the_model_alone(config: golf.Config) -> None:
    scorer = make_scorer(config, random_stream(4))
    before = [p.detach().clone() for p in scorer.model.parameters()]
    assert torch.equal(scores(scorer, "sliding"), scores(scorer, "sliding"))
    for p, first in zip(scorer.model.parameters(), before, strict=True):
        assert torch.equal(p, first)
        assert p.grad is None


def test_score_is_logged_under_its_key_and_its_published_label(config: golf.Config) -> None:
    log = SilentLog(config)
    score = golf.Score(2.5, 1.0812345678, 12.3456)
    golf.log_score(log, "sliding", "quantized_sliding_window", score)
    assert log.lines == ["quantized_sliding_window val_loss:2.50000000 val_bpb:1.08123457 "
                         "eval_time:12346ms"]
    assert log.result["bpb"] == {"sliding": 1.0812345678}
    assert log.result["nats"] == {"sliding": 2.5}
    assert log.events[0]["event"] == "eval"
    assert log.events[0]["label"] == "sliding"


# ---- The record track ----


@pytest.mark.parametrize("track", ["auto", "non_record"])
def test_laptop_run_is_no_record(config: golf.Config, val_stream: golf.ValStream,
                                 track: Literal["auto", "non_record"]) -> None:
    world, chosen = golf.World(), replace(config, track=track)
    assert golf.resolve_track(chosen, world, val_stream, "math") == "non_record"


def official_stream() -> golf.ValStream:
    stream = random_stream(1)
    stream.num_targets = OFFICIAL
    return stream


RECORD = golf.Config(track="10min_16mb")


@torch._dynamo.config.patch(disable=False)  # a monkeypatch cannot be undone there
def test_record_track_is_recognised() -> None:
    for config in (RECORD, replace(RECORD, track="auto")):
        world = golf.World(0, 8)
        assert golf.resolve_track(config, world, official_stream(), "fa3") == "10min_16mb"


@pytest.mark.parametrize(("size", "official", "changes", "attention", "named"), [
    (4, True, {}, "fa3", "WORLD_SIZE=4"), (8, False, {}, "fa3", "VAL_TARGETS"),
    (8, True, {"compile": False}, "fa3", "COMPILE"), (8, True, {}, "math", "ATTENTION=math"),
    (8, True, {"max_wallclock_seconds": 601.0}, "fa3", "MAX_WALLCLOCK_SECONDS=601"),
    (8, True, {"max_wallclock_seconds": 0.0}, "fa3", "MAX_WALLCLOCK_SECONDS=0"),
    (8, True, {"max_eval_seconds": 601.0}, "fa3", "MAX_EVAL_SECONDS=601"),
    (8, True, {"artifact_cap_bytes": 16_000_001}, "fa3", "ARTIFACT_CAP_BYTES=16000001")])
@torch._dynamo.config.patch(disable=False)
def test_false_claim_of_the_record_track_is_refused(
        size: int, official: bool, changes: dict[str, float], attention: str, named: str) -> None:
    stream = official_stream() if official else random_stream(1)
    config = replace(RECORD, **changes)  # type: ignore[arg-type]
    with pytest.raises(golf.ConfigError, match=named):
        golf.resolve_track(config, golf.World(0, size), stream, attention)


@torch._dynamo.config.patch(disable=True)
def test_disabled_compiler_is_no_record() -> None:
    """However torch was told so: TORCH_COMPILE_DISABLE=0, for one, disables nothing."""
    with pytest.raises(golf.ConfigError, match="COMPILE"):
        golf.resolve_track(RECORD, golf.World(0, 8), official_stream(), "fa3")
