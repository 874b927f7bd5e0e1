"""Sections 9 and 10: every document on its own, from an empty context, each of its targets once."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from documents import make_scorer, nats_of, plan_named, random_model, stream_of, text
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from toy import MakeConfig, MakeEnv

import train_gpt as golf


@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=12), seq_len=st.integers(1, 32),
       leading_bos=st.booleans(), data=st.data())
def test_windows_stay_inside_documents_and_score_every_target_once(
        lengths: list[int], seq_len: int, leading_bos: bool, data: st.DataObject) -> None:
    tokens = np.full(sum(lengths) + 1, 7)
    tokens[np.cumsum([0, *lengths])] = golf.BOS_ID
    tokens[0] = golf.BOS_ID if leading_bos else 7
    stride = data.draw(st.integers(1, seq_len))
    stream = stream_of(tokens, 1)
    windows = golf.document_windows(stream, seq_len, stride)
    counts = np.zeros(stream.num_targets, int)
    for start, first, stop in zip(*windows, strict=True):
        counts[first:stop] += 1
        assert start <= first < stop <= start + seq_len
        assert golf.BOS_ID not in tokens[start + 1:stop]
        assert tokens[start] == golf.BOS_ID or start == 0 or first - start == seq_len - stride
    assert (counts == 1).all()


@pytest.mark.parametrize("keep", [False, True])
def test_tail_is_kept_or_left_out_as_told(keep: bool) -> None:
    stream = stream_of(text(64 * 3 + 20), keep_tail=keep)
    assert stream.num_targets == (64 * 3 + 19 if keep else 64 * 3)
    assert stream.num_bytes == stream.num_targets
    assert stream.document_stops[-1] == stream.num_targets


def test_published_runs_leave_the_tail_out(make_env: MakeEnv) -> None:
    assert golf.Config.from_env({"PRESET": "pr1493"}).val_tail is False
    config = golf.Config.from_env(make_env(VAL_TAIL=1))
    assert golf.ValStream.load(config).num_targets == 1899


def test_packed_stream_scores_like_separate_documents(config: golf.Config) -> None:
    tokens = text(600)
    packed = make_scorer(config, stream_of(tokens))
    found = nats_of(packed, golf.document_windows(packed.stream, 64, 16))
    starts = np.append(np.flatnonzero(tokens[:-1] == golf.BOS_ID), 599)
    for first, stop in itertools.pairwise(starts):
        alone = make_scorer(config, stream_of(tokens[first:stop + 1], 1))
        windows = golf.sliding_windows(int(stop - first), 64, 16)
        torch.testing.assert_close(found[first:stop], nats_of(alone, windows), rtol=1e-5, atol=1e-5)


def test_other_documents_move_no_score(config: golf.Config) -> None:
    tokens = text(600)
    bounds = np.flatnonzero(tokens == golf.BOS_ID)
    changed = tokens.copy()
    changed[bounds[2] + 1:bounds[3]] = 9
    found = [nats_of(make_scorer(config, stream_of(t)), golf.document_windows(stream_of(t), 64, 16))
             for t in (tokens, changed)]
    same = torch.ones(599, dtype=torch.bool)
    same[bounds[2]:bounds[3]] = False
    assert torch.equal(found[0][same], found[1][same])
    assert not torch.equal(found[0], found[1])


def test_any_context_length(make_config: MakeConfig) -> None:
    for seq_len in (24, 64, 160):
        config = make_config(EVAL_SEQ_LEN=seq_len, TTT_CHUNK_SIZE=8, TTT_MODE="documents")
        scorer = make_scorer(config, stream_of(text(500)))
        windows = golf.document_windows(scorer.stream, seq_len, 8)
        assert math.isfinite(golf.evaluate(scorer, windows, by_document=True).bits)


# ---- Planning ----


@pytest.mark.parametrize("rows", [1, 4, 32])
def test_passes_score_every_target_once_in_few_shapes(config: golf.Config, rows: int) -> None:
    config = replace(config, eval_seq_len=256, ttt_batch_size=rows, ttt_chunk_size=40,
                     ttt_mode="documents")
    lengths = golf.official_lengths(400)
    stops = np.cumsum(lengths)
    counts, widths = np.zeros(int(stops[-1]), int), set()
    for passes in golf.document_passes(stops - lengths, stops, config):
        assert len(passes[0][0].starts) <= rows
        for windows, width in passes:
            widths.add(width)
            assert windows.skip == windows.first_scored.max() - windows.starts[0]
            for start, first, stop in zip(*windows, strict=True):
                counts[first:stop] += 1
                assert stop == first or stop - start <= width
                assert stop == first or first - start == windows.skip
    assert (counts == 1).all()
    assert widths <= set(range(16, 257, 16))


def test_longer_documents_take_longer_chunks(config: golf.Config) -> None:
    config = replace(config, eval_seq_len=2048, ttt_chunk_size=48, ttt_batch_size=1,
                     ttt_mode="documents")
    stops = np.cumsum([100, 1000, 8000, 97_000])
    groups = golf.document_passes(np.append(0, stops[:-1]), stops, config)
    chunks = [int(passes[0][0].stops[0] - passes[0][0].starts[0]) for passes in groups]
    assert chunks == [384, 187, 24, 24]


@given(costs=st.lists(st.integers(1, 1000), min_size=1, max_size=60), ranks=st.integers(1, 8))
def test_work_is_shared_whole_and_evenly(costs: list[int], ranks: int) -> None:
    owners = golf.share_out(costs, ranks)
    assert len(owners) == len(costs)
    most = np.bincount(owners, costs, ranks).max()
    assert most <= sum(costs) / ranks + max(costs)


def test_official_profile() -> None:
    lengths = golf.official_lengths()
    assert len(lengths) == 50_000
    assert lengths.mean() == pytest.approx(957, rel=0.01)
    assert lengths[lengths <= 2048].sum() / lengths.sum() == pytest.approx(0.59, abs=0.01)
    assert lengths.max() == 97_000
    assert lengths.min() > 0


def test_projection_counts_the_official_text_at_measured_steps(
        config: golf.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(golf.time, "perf_counter", lambda: float(next(clock)))
    scorer = make_scorer(config, stream_of(text(200)))
    stops = np.cumsum(golf.official_lengths())
    groups = golf.document_passes(np.append(0, stops[:-1]), stops, config)
    steps = sum(len(passes) for passes in groups)
    projected = golf.project_documents(scorer)
    assert steps / 8 <= projected <= 1.05 * steps / 8


@pytest.mark.parametrize("left", [math.inf, 1000.0, 12.0, 0.0])
def test_chunks_grow_until_the_text_would_be_done_in_time(
        config: golf.Config, monkeypatch: pytest.MonkeyPatch, left: float) -> None:
    """With passes of a second each, and a clock that stands otherwise."""
    scorer = make_scorer(replace(config, ttt_chunk_size=8), stream_of(text(800)))
    monkeypatch.setattr(scorer.world, "synchronize", lambda: 1.0)
    monkeypatch.setattr(golf.time, "perf_counter", lambda: 0.0)
    golf.project_documents(scorer, left)
    found = scorer.model.config

    def needed(chunk: int) -> int:
        groups = golf.document_passes(scorer.stream.document_starts, scorer.stream.document_stops,
                                      replace(config, ttt_chunk_size=chunk))
        return sum(map(len, groups))

    tried = [8, 11, 14, 18, 23, 29]  # up to half of the widest
    fitting = [chunk for chunk in tried if needed(chunk) <= left]
    assert found.ttt_chunk_size == (fitting or tried[-1:])[0]
    assert needed(8) > 12 > needed(29)
    assert replace(found, ttt_chunk_size=8) == replace(config, ttt_chunk_size=8)


def test_an_evaluation_short_of_time_says_so(make_env: MakeEnv,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golf, "ADAPTED_BY", 0.0)
    env = make_env(TTT_MODE="documents", TTT_LORA_RANK=4, TTT_BATCH_SIZE=4, TTT_CHUNK_SIZE=16,
                   AUDIT=1)
    result = golf.main(env)
    assert result["status"] == "complete"
    assert result["ttt_chunk_size"] == 27
    said = "warning: TTT_CHUNK_SIZE=27 instead of 16, or the evaluation would take longer than"
    assert said in (golf.Path(env["LOG_DIR"]) / "toy.txt").read_text()


@torch._dynamo.config.patch(recompile_limit=64)
def test_one_graph_per_block_form_serves_all_passes(make_config: MakeConfig,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """Serial and parallel blocks, each with and without a skip, whatever the widths."""
    FORMS, compiler = 4, CompileCounter()
    monkeypatch.setattr(golf, "maybe_compile", lambda function, _: torch.compile(
        function, fullgraph=True, dynamic=False, backend=compiler))
    scorer = make_scorer(make_config(XSA_LAST_N=5, TTT_BATCH_SIZE=4, TTT_CHUNK_SIZE=16),
                         stream_of(text(400)))
    torch._dynamo.reset()
    golf.evaluate(scorer, golf.sliding_windows(399, 64, 16))
    golf.evaluate(scorer, golf.document_windows(scorer.stream, 64, 64), by_document=True)
    assert compiler.frame_count == FORMS + 3  # embedding, norm and loss
    golf.project_documents(scorer)
    assert compiler.frame_count == 2 * FORMS + 4
    golf.evaluate_documents(scorer)
    assert compiler.frame_count == 2 * FORMS + 4
    scorer.model.requires_grad_(True)
    golf.evaluate_adapting(scorer, golf.sliding_windows(399, 64, 16))
    assert compiler.frame_count == 3 * FORMS + 7  # gradients of the first embedding are added


def test_warm_up_sees_no_validation_token(config: golf.Config) -> None:
    scorer = make_scorer(config, stream_of(text(200)))
    scorer.tokens = None  # type: ignore[assignment]
    golf.project_documents(scorer)


def test_random_model_differs_from_chance(config: golf.Config) -> None:
    """What the tests above compare would be trivial for a model that ignores its input."""
    scorer = golf.Scorer(random_model(config), plan_named(config, "looped"), stream_of(text(200)),
                         golf.World())
    nats = nats_of(scorer, golf.document_windows(scorer.stream, 64, 16))
    assert nats.std() > 0.5
