"""Section 10: adapters of each document learn from its scored past, and from nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from documents import hurried_chunk, make_scorer, measure_all, nats_of, stream_of, text
from toy import (
    MakeConfig,
    plan_named,
    random_model,
    random_tokens,
    run_ranks,
    shared_once,
    tiny_env,
)

import train_gpt as golf

ADAPT = {"TTT_BATCH_SIZE": 4, "TTT_CHUNK_SIZE": 16, "TTT_LORA_RANK": 4, "TTT_LORA_ALPHA": 8,
         "TTT_LORA_LR": 0.01, "AUDIT": 1}


@pytest.fixture
def adapted(make_config: MakeConfig) -> golf.Config:
    return make_config(**ADAPT)


def adapt(config: golf.Config, tokens: np.ndarray) -> torch.Tensor:
    """Nats of every target of an adapting evaluation, with a clean audit."""
    scorer, ledgers = make_scorer(config, stream_of(tokens)), list[golf.ScoreLedger]()
    finish = golf.finish_score

    def keep(scorer: golf.Scorer, ledger: golf.ScoreLedger) -> golf.Score:
        ledgers.append(ledger)
        return finish(scorer, ledger)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(golf, "finish_score", keep)
        golf.evaluate_documents(scorer)
    assert scorer.audit
    assert all(facts["passed"] for facts in scorer.audit.report(golf.World()).values())
    return ledgers[0].nats


def perturb(adapters: golf.LowRank) -> None:
    """Makes every factor matter."""
    with torch.no_grad():
        for factor in adapters.parameters:
            factor.add_(0.1 * torch.randn(factor.shape, generator=torch.Generator().manual_seed(1)))


def test_fresh_adapters_change_no_bit(adapted: golf.Config) -> None:
    model, plan = random_model(adapted), plan_named(adapted, "looped")
    rows = random_tokens(4, 33)
    plain = model(rows[:, :-1], rows[:, 1:], plan)
    adapters = golf.LowRank(model, plan)
    adapters.reset()

    def nats(runner: Callable[..., torch.Tensor]) -> torch.Tensor:
        x = model.hidden(rows[:, :-1], plan, adapters, runner)
        target = rows[:, 1:].flatten().long()
        return model.target_nats(model.logits(x, adapters), target).view(plain.shape)

    for runner in (golf.run_block, adapters.run_block):
        assert torch.equal(plain, nats(runner))
    perturb(adapters)
    found = [nats(runner) for runner in (golf.run_block, adapters.run_block)]
    assert torch.equal(found[0], found[1])
    assert not torch.isclose(plain, found[0]).any()


def test_without_a_rate_it_is_the_plain_model(make_config: MakeConfig) -> None:
    """The same passes, scored by a model without adapters."""
    config = make_config(**{**ADAPT, "TTT_LORA_LR": 0})
    found = adapt(config, text(500))
    scorer = make_scorer(config, stream_of(text(500)))
    ledger = golf.ScoreLedger(scorer.stream, scorer.world)
    stream = scorer.stream
    for passes in golf.document_passes(stream.document_starts, stream.document_stops, config):
        for windows, width in passes:
            with torch.no_grad():
                ledger.commit(windows, scorer.predict(windows, (4, width), ledger))
    assert torch.equal(found, ledger.nats)


@pytest.mark.parametrize("site", golf.SITES)
def test_each_site_can_be_adapted_alone(make_config: MakeConfig, site: golf.Site) -> None:
    config = make_config(**{**ADAPT, "TTT_LORA_SITES": site})
    model, plan = random_model(config), plan_named(config, "looped")
    adapters = golf.LowRank(model, plan)
    assert len(adapters.pairs) == (1 if site == "head" else len(plan.visits))
    assert all(set(factors) <= {site} for factors in adapters.factors.values())
    rows = random_tokens(4, 33)
    adapters.reset()
    plain = model(rows[:, :-1], rows[:, 1:], plan, adapters)
    plain.sum().backward()
    assert all(b.grad is not None and b.grad.abs().sum() > 0 for _, b in adapters.pairs)


def test_unknown_site_is_refused(make_config: MakeConfig) -> None:
    with pytest.raises(golf.ConfigError, match="TTT_LORA_SITES='qkv,mlp' must be some of"):
        make_config(TTT_LORA_SITES="qkv,mlp")


def test_model_itself_stays_as_it_is(adapted: golf.Config) -> None:
    scorer, before = make_scorer(adapted, stream_of(text(300))), random_model(adapted)
    golf.evaluate_documents(scorer)
    for found, wanted in zip(scorer.model.parameters(), before.parameters(), strict=True):
        assert torch.equal(found, wanted)


def test_rows_learn_alone(adapted: golf.Config) -> None:
    """A row's factors after a step are those it would have beside any other row."""
    found = []
    for seed in (0, 1):
        model, plan = random_model(adapted), plan_named(adapted, "looped")
        adapters, rows = golf.LowRank(model, plan), random_tokens(4, 33)
        rows[1:] = random_tokens(3, 33, seed=seed)
        adapters.reset()
        for _ in range(3):
            adapters.learn(model(rows[:, :-1], rows[:, 1:], plan, adapters).sum())
        found.append([b.detach().clone() for _, b in adapters.pairs])
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first[0], second[0])
        assert not torch.allclose(first[1], second[1])


def test_first_chunk_of_a_document_scores_as_without_learning(adapted: golf.Config) -> None:
    tokens = text(700)
    found, scorer = adapt(adapted, tokens), make_scorer(adapted, stream_of(tokens))
    plain = nats_of(scorer, golf.document_windows(scorer.stream, 64, 64))
    starts, stops = scorer.stream.document_starts, scorer.stream.document_stops
    first = np.concatenate([np.arange(a, min(a + 8, b))
                            for a, b in zip(starts, stops, strict=True)])
    torch.testing.assert_close(found[first], plain[first], rtol=1e-5, atol=1e-5)
    later = np.setdiff1d(np.arange(700 - 1), np.concatenate(
        [np.arange(a, min(a + 16, b)) for a, b in zip(starts, stops, strict=True)]))
    assert not torch.isclose(found[later], plain[later], atol=1e-3).all()


@pytest.mark.parametrize("position", [3, 150, 420])
def test_future_and_target_move_no_score(adapted: golf.Config, position: int) -> None:
    """Documents keep their bounds, as the batches that they form are decided by lengths."""
    tokens = text(600)
    changed = tokens.copy()
    noise = np.random.default_rng(9).integers(5, 384, 600)
    later = (np.arange(600) >= position) & (tokens != golf.BOS_ID)
    changed[later] = noise[later]
    before, after = adapt(adapted, tokens), adapt(adapted, changed)
    assert torch.equal(before[:position - 1], after[:position - 1])
    assert not torch.equal(before[position - 1:], after[position - 1:])


def test_documents_are_isolated(adapted: golf.Config) -> None:
    tokens = text(600)
    bounds = np.flatnonzero(tokens == golf.BOS_ID)
    changed = tokens.copy()
    changed[bounds[2] + 1:bounds[3]] = 9
    other = torch.ones(599, dtype=torch.bool)
    other[bounds[2]:bounds[3]] = False
    before, after = adapt(adapted, tokens), adapt(adapted, changed)
    assert not torch.equal(before[~other], after[~other])
    assert torch.equal(before[other], after[other])


def test_learning_helps_on_documents_that_repeat(make_config: MakeConfig) -> None:
    config = make_config(**{**ADAPT, "TTT_LORA_LR": 0.02, "TTT_LORA_RANK": 8})
    phrase = np.random.default_rng(0).integers(5, 384, 16)
    tokens = np.concatenate([np.append(golf.BOS_ID, np.tile(phrase, 12)) for _ in range(3)])
    scorer = make_scorer(config, stream_of(tokens))
    plain = nats_of(scorer, golf.document_windows(scorer.stream, 64, 16))
    assert adapt(config, tokens).mean() < plain.mean() - 0.2


def mixing_scorer(config: golf.Config, tokens: np.ndarray) -> golf.Scorer:
    """A scorer that keeps what a mixture wants."""
    scorer = make_scorer(config, stream_of(tokens))
    scorer.views = 2
    return scorer


def test_interrupted_evaluation_goes_on_to_the_same_scores(
        adapted: golf.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golf, "SAVE_SECONDS", 0.0)
    tokens, ledgers, resets = text(700), list[golf.ScoreLedger](), [0, 0]
    finish, reset = golf.finish_score, golf.LowRank.reset

    def keep(scorer: golf.Scorer, ledger: golf.ScoreLedger) -> golf.Score:
        ledgers.append(ledger)
        return finish(scorer, ledger)

    def stop_in_the_third_group(adapters: golf.LowRank) -> None:
        resets[0] += 1
        if resets[0] == 3:
            raise KeyboardInterrupt
        reset(adapters)

    def count(adapters: golf.LowRank) -> None:
        resets[1] += 1
        reset(adapters)

    monkeypatch.setattr(golf, "finish_score", keep)
    golf.evaluate_documents(mixing_scorer(adapted, tokens))
    monkeypatch.setattr(golf.LowRank, "reset", stop_in_the_third_group)
    with pytest.raises(KeyboardInterrupt):
        golf.evaluate_documents(mixing_scorer(adapted, tokens), str(tmp_path / "ledger"))
    monkeypatch.setattr(golf.LowRank, "reset", count)
    scorer = mixing_scorer(adapted, tokens)
    score = golf.evaluate_documents(scorer, str(tmp_path / "ledger"))
    assert len(ledgers[0].kept) == 3
    assert torch.equal(ledgers[0].kept, ledgers[1].kept)
    assert 0 < scorer.earlier_seconds < score.seconds
    groups = len(golf.document_passes(scorer.stream.document_starts, scorer.stream.document_stops,
                                      adapted))
    assert resets[1] == groups - 2
    assert scorer.audit
    assert all(facts["passed"] for facts in scorer.audit.report(golf.World()).values())


# ---- World sizes ----


@pytest.fixture(scope="module")
def two_ranks(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """What each of two ranks measured."""
    def launch(folder: Path) -> None:
        env = tiny_env(data_dir, folder, **ADAPT)
        run_ranks(Path(__file__).with_name("documents.py"), 2, folder, env)
    folder = shared_once(tmp_path_factory, "document_ranks", launch)
    return [torch.load(folder / f"rank{r}.pt", weights_only=True) for r in range(2)]


def test_two_ranks_score_like_one(two_ranks: list[dict[str, object]], adapted: golf.Config) -> None:
    alone = measure_all(adapted, golf.World())
    for name, wanted in alone.items():
        if name != "audit":
            tolerance = 1e-4 if name.startswith("ttt") else 1e-6
            for rank in two_ranks:
                assert rank[name] == pytest.approx(wanted, abs=tolerance), name


def test_two_ranks_share_one_clean_audit(two_ranks: list[dict[str, object]]) -> None:
    first, second = (rank["audit"] for rank in two_ranks)
    assert first == second
    assert isinstance(first, dict)
    assert set(first) == set(golf.CONDITIONS)
    assert all(facts["passed"] for facts in first.values())
    assert first["c4_single_pass"]["checked"] == 6 * 899


def test_the_slowest_rank_decides_how_long_chunks_get(two_ranks: list[dict[str, object]],
                                                      adapted: golf.Config) -> None:
    assert hurried_chunk(adapted, golf.World()) == adapted.ttt_chunk_size
    first, second = (rank["hurried_chunk"] for rank in two_ranks)
    assert first == second == 27


def test_every_rank_mixes_to_the_same_bits(two_ranks: list[dict[str, object]]) -> None:
    first, second = (rank["ttt_mixture"] for rank in two_ranks)
    assert first == second
