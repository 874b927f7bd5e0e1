"""The audit and the ledger let honest evaluators pass and catch every broken one."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from documents import make_scorer, stream_of, text
from toy import MakeConfig, MakeEnv

import train_gpt as golf

ADAPT = {"TTT_BATCH_SIZE": 4, "TTT_CHUNK_SIZE": 16, "TTT_LORA_RANK": 4, "TTT_LORA_LR": 0.01,
         "AUDIT": 1}
Record = dict[str, dict[str, object]]


@pytest.fixture
def adapted(make_config: MakeConfig) -> golf.Config:
    return make_config(**ADAPT)


def run(config: golf.Config, kind: str, tokens: np.ndarray | None = None) -> golf.Scorer:
    """One evaluation by the program's own functions, every batch of it audited."""
    scorer = make_scorer(config, stream_of(text(500) if tokens is None else tokens))
    num_targets = scorer.stream.num_targets
    sliding = golf.sliding_windows(num_targets, 64, 16)
    if kind == "sgd":
        golf.evaluate_adapting(scorer, sliding)
    elif kind == "ttt_documents":
        golf.evaluate_documents(scorer)
    elif kind in ("documents", "mixer_documents"):
        scorer.views = 2 * kind.startswith("mixer")
        golf.evaluate(scorer, golf.document_windows(scorer.stream, 64, 16), by_document=True)
        if scorer.views:
            golf.evaluate_mixture(scorer)
    else:
        plain = golf.sliding_windows(num_targets, 64, 64)
        golf.evaluate(scorer, plain if kind == "plain" else sliding)
    return scorer


def record_of(scorer: golf.Scorer) -> Record:
    assert scorer.audit
    return scorer.audit.report(golf.World())


def failed(config: golf.Config, kind: str, tokens: np.ndarray | None = None) -> set[str]:
    """The conditions that an evaluation breaks."""
    record = record_of(run(config, kind, tokens))
    return {name for name, facts in record.items() if not facts["passed"]}


@pytest.fixture(autouse=True)
def audit_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golf, "AUDIT_EVERY", 1)
    monkeypatch.setattr(golf, "MIX_CHUNK", 64)
    monkeypatch.setattr(golf, "MIX_ROWS", 1 << 12)


KINDS = ["plain", "sliding", "documents", "sgd", "ttt_documents", "mixer_documents"]


@pytest.mark.parametrize("kind", KINDS)
def test_honest_evaluators_pass(adapted: golf.Config, kind: str) -> None:
    record = record_of(run(adapted, kind))
    wanted = set(golf.CONDITIONS) - (set() if "documents" in kind else {"documents_isolated"})
    assert set(record) == wanted
    for name, facts in record.items():
        assert facts["passed"], (name, facts)
    assert record["c1_causal"]["worst"] == 0.0
    assert record["c2_normalised"]["worst"] < 1e-5
    assert record["c4_single_pass"]["checked"] == 499 * (1 + kind.startswith("mixer"))


@pytest.mark.parametrize("kind", ["plain", "documents", "ttt_documents"])
def test_audit_moves_no_score(adapted: golf.Config, kind: str) -> None:
    found = []
    for audited in (True, False):
        scorer = make_scorer(adapted, stream_of(text(600)))
        scorer.audit = scorer.audit if audited else None
        if kind == "ttt_documents":
            score = golf.evaluate_documents(scorer)
        else:
            score = golf.evaluate(scorer, golf.document_windows(scorer.stream, 64, 16),
                                  kind == "documents")
        found.append(score.bits)
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", ["documents", "sgd", "ttt_documents"])
def test_only_sampled_batches_wait_for_the_device(adapted: golf.Config, kind: str,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """What an audit and a ledger do between two batches reads no tensor."""
    inside, read = [0], list[str]()

    def reading(name: str, honest: Callable[..., object], *inputs: object) -> object:
        read.extend([name] * inside[0])
        return honest(*inputs)

    def within(honest: Callable[..., object], *inputs: object) -> object:
        inside[0] += 1
        found = honest(*inputs)
        inside[0] -= 1
        return found

    monkeypatch.setattr(golf, "AUDIT_EVERY", 10**6)
    monkeypatch.setattr(golf, "HARM_EVERY", 10**6)
    monkeypatch.setattr(golf.Audit, "sample", lambda *_: None)
    for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__",
                 "__index__"):
        monkeypatch.setattr(torch.Tensor, name, functools.partialmethod(
            lambda self, *inputs, name, honest: reading(name, honest, self, *inputs),
            name=name, honest=getattr(torch.Tensor, name)))
    for owner, name in ((golf.Audit, "observe"), (golf.ScoreLedger, "commit"),
                        (golf.ScoreLedger, "released_nats"), (golf.LowRank, "reset"),
                        (golf.Scorer, "nats")):
        monkeypatch.setattr(owner, name, functools.partialmethod(
            lambda self, *inputs, honest: within(honest, self, *inputs),
            honest=getattr(owner, name)))
    run(adapted, kind)
    assert read == []


# ---- Broken evaluators: the five of the brief ----


def test_update_before_score_in_documents_is_caught(adapted: golf.Config,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    predict = golf.Scorer.predict

    def learn_first(scorer: golf.Scorer, windows: golf.Windows, shape: tuple[int, int],
                    ledger: golf.ScoreLedger, adapter: golf.LowRank | None = None) -> torch.Tensor:
        if adapter and windows.first_scored[0] not in scorer.stream.document_starts:
            adapter.learn(predict(scorer, windows, shape, ledger, adapter).sum())
        return predict(scorer, windows, shape, ledger, adapter)

    monkeypatch.setattr(golf.Scorer, "predict", learn_first)
    assert "c3_score_first" in failed(adapted, "ttt_documents")


def test_learning_before_commit_is_refused(adapted: golf.Config,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golf.ScoreLedger, "commit", lambda *_: None)
    with pytest.raises(golf.LegalityError, match="before its score"):
        run(adapted, "ttt_documents")


def learn_and_score(scorer: golf.Scorer, windows: golf.Windows, released: bool) -> golf.Score:
    """Chunk by chunk, but the wrong way round."""
    ledger = golf.ScoreLedger(scorer.stream, scorer.world)
    sgd = torch.optim.SGD(scorer.model.parameters())
    for first in range(0, scorer.stream.num_targets, 256):
        last = min(first + 256, scorer.stream.num_targets)
        golf.adapt(scorer, sgd, ledger.released(first, last) if released
                   else scorer.stream.tokens[first:last + 1], 0.01)
        scorer.score(windows.select(windows.first_scored // 256 == first // 256), ledger)
    return golf.finish_score(scorer, ledger)


@pytest.mark.parametrize("released", [False, True])
def test_update_before_score_in_sgd_is_caught(adapted: golf.Config, released: bool,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golf, "evaluate_adapting",
                        lambda scorer, windows: learn_and_score(scorer, windows, released))
    if released:
        with pytest.raises(golf.LegalityError, match="not scored"):
            run(adapted, "sgd")
    else:
        assert failed(adapted, "sgd") == {"c3_score_first"}


@pytest.mark.parametrize("kind", KINDS)
def test_gate_that_reads_the_target_is_caught(adapted: golf.Config, kind: str,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the target is even, another expert (here: half the states) speaks."""
    honest = golf.Scorer.nats

    def gated(scorer: golf.Scorer, rows: torch.Tensor, skip: int,
              adapter: golf.LowRank | None) -> torch.Tensor:
        targets = rows[:, 1 + skip:]
        logits = scorer.model.logits(0.5 * scorer.states(rows, skip, adapter), adapter)
        other = scorer.model.target_nats(logits, targets.flatten().long()).view(targets.shape)
        return torch.where(targets % 2 == 0, other, honest(scorer, rows, skip, adapter))

    monkeypatch.setattr(golf.Scorer, "nats", gated)
    assert "c1_causal" in failed(adapted, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_better_of_two_experts_is_caught(adapted: golf.Config, kind: str,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    honest = golf.GPT.target_nats
    monkeypatch.setattr(golf.GPT, "target_nats", lambda self, logits, target: torch.minimum(
        honest(self, logits, target), honest(self, 0.5 * logits, target)))
    assert "c2_normalised" in failed(adapted, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_unnormalised_distribution_is_caught(adapted: golf.Config, kind: str,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    honest = golf.GPT.target_nats
    monkeypatch.setattr(golf.GPT, "target_nats", lambda *inputs: honest(*inputs) - 0.01)
    assert failed(adapted, kind) == {"c2_normalised"}


@pytest.mark.parametrize("kind", KINDS)
def test_dropped_tail_is_caught(adapted: golf.Config, kind: str,
                                monkeypatch: pytest.MonkeyPatch) -> None:
    commit = golf.ScoreLedger.commit

    def forget_last(ledger: golf.ScoreLedger, windows: golf.Windows, nats: torch.Tensor) -> None:
        last = ledger.stream.num_targets - 1
        stops = np.maximum(windows.first_scored, np.minimum(windows.stops, last))
        commit(ledger, windows._replace(stops=stops), nats)

    monkeypatch.setattr(golf.ScoreLedger, "commit", forget_last)
    with pytest.raises(golf.LegalityError, match=r"1 targets between|before its score"):
        run(adapted, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_window_scored_twice_is_caught(adapted: golf.Config, kind: str,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    commit = golf.ScoreLedger.commit

    def again(*inputs: object) -> None:
        commit(*inputs)  # type: ignore[arg-type]
        commit(*inputs)  # type: ignore[arg-type]

    monkeypatch.setattr(golf.ScoreLedger, "commit", again)
    with pytest.raises(golf.LegalityError, match="scored before"):
        run(adapted, kind)


# ---- Broken mixtures: all but the weights of a class can be seen in any text ----


def repeated() -> np.ndarray:
    """Two documents that differ in a few tokens: n-grams pay from the second one on."""
    tokens = text(400)
    return np.concatenate([tokens, np.where(np.arange(400) % 11 == 5, 7, tokens)])


def spoil(monkeypatch: pytest.MonkeyPatch, change: Callable[..., golf.Mixed]) -> None:
    """Replaces what a mixture says by a `change` of it: mixture, inputs, honest answer."""
    honest = golf.Mixture.score
    monkeypatch.setattr(golf.Mixture, "score", lambda mixture, *inputs: change(
        mixture, inputs, honest(mixture, *inputs)))


def test_honest_mixture_of_repeated_text_passes(adapted: golf.Config) -> None:
    assert failed(adapted, "mixer_documents", repeated()) == set()


def test_unnormalised_expert_is_caught(adapted: golf.Config,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, lambda mixture, inputs, found: found._replace(gain=found.gain + 1e-3))
    assert failed(adapted, "mixer_documents") == {"c2_normalised"}


def test_mixture_gate_that_reads_the_target_is_caught(adapted: golf.Config,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever gives the target the higher chance may speak."""
    spoil(monkeypatch, lambda mixture, inputs, found: found._replace(
        gain=np.maximum(found.gain, 0)))
    assert failed(adapted, "mixer_documents") == {"c2_normalised"}


def test_counts_of_a_chunk_before_its_score_are_caught(adapted: golf.Config,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    honest = golf.Mixture.score

    def ahead(mixture: golf.Mixture, context: np.ndarray, target: np.ndarray,
              kept: np.ndarray) -> golf.Mixed:
        if len(target) != kept.shape[1] or (target[1:] != target[:-1] + 1).any():  # no probe
            found = honest(mixture, context, target, kept)
            mixture.learn(np.append(0, target), found, mixture.odds)
        return honest(mixture, context, target, kept)

    monkeypatch.setattr(golf.Mixture, "score", ahead)
    assert "c3_score_first" in failed(adapted, "mixer_documents", repeated())


def test_odds_that_know_the_present_target_are_caught(adapted: golf.Config,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    honest, mutant = inspect.getsource(golf.mix), dict(vars(golf))
    assert honest.count("np.append(0, found.gain)") == 1
    exec(honest.replace("np.append(0, found.gain)", "np.append(found.gain, 0)"), mutant)
    monkeypatch.setattr(golf, "mix", mutant["mix"])
    assert failed(adapted, "mixer_documents", repeated()) & {"c1_causal", "c3_score_first"}


def test_mixture_that_learns_before_its_commit_is_refused(adapted: golf.Config,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    commit = golf.ScoreLedger.commit
    monkeypatch.setattr(golf.ScoreLedger, "commit", lambda ledger, windows, nats: None if len(
        windows.starts) == 1 and nats.shape[-1] == 64 and nats.ndim == 2 else commit(
            ledger, windows, nats))
    with pytest.raises(golf.LegalityError, match="64 targets between 0 and 64 are not scored"):
        run(adapted, "mixer_documents")


# ---- And a few more ----


@pytest.mark.parametrize("kind", KINDS)
def test_attention_to_the_future_is_caught(adapted: golf.Config, kind: str,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    def peek(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, enable_gqa=True).transpose(1, 2)

    monkeypatch.setattr(golf, "sdpa_attend", peek)
    assert "c1_causal" in failed(adapted, kind)


def test_rows_that_see_each_other_are_caught(adapted: golf.Config,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    states = golf.Scorer.states

    def mixed(*inputs: object) -> torch.Tensor:
        x = states(*inputs)  # type: ignore[arg-type]
        return x + 0.1 * x.mean(0, keepdim=True)

    monkeypatch.setattr(golf.Scorer, "states", mixed)
    assert "c1_causal" in failed(adapted, "documents")


def test_context_from_another_document_is_caught(adapted: golf.Config,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golf, "document_windows", lambda stream, seq_len, stride:
                        golf.sliding_windows(stream.num_targets, seq_len, stride))
    assert failed(adapted, "documents") == {"documents_isolated"}


def test_adapters_that_outlive_their_document_are_caught(
        adapted: golf.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    reset = golf.LowRank.reset

    def once(adapters: golf.LowRank) -> None:
        if not any(bool(a.any()) for a, _ in adapters.pairs):
            reset(adapters)

    monkeypatch.setattr(golf.LowRank, "reset", once)
    assert "documents_isolated" in failed(adapted, "ttt_documents")


def test_score_that_is_no_number_is_caught(adapted: golf.Config) -> None:
    audit = golf.Audit()
    audit.note("c1_causal", 1, float("nan"))
    audit.note("c1_causal", 1, 0.0)
    assert audit.report(golf.World())["c1_causal"]["passed"] is False


# ---- The whole program ----


Break = Callable[[pytest.MonkeyPatch], None]


@pytest.mark.parametrize("mode", ["sgd", "documents"])
def test_record_is_part_of_the_result(make_env: MakeEnv, mode: str) -> None:
    env = make_env(TTT_MODE=mode, SLIDING_WINDOW_ENABLED=1, **ADAPT)
    result = golf.main(env)
    record = result["audit"]
    assert isinstance(record, dict)
    assert all(set(facts) == {"passed", "checked", "worst"} for facts in record.values())
    assert result["headline"] == f"ttt_{mode}"
    clocks = result["clocks"]
    assert isinstance(clocks, dict)
    assert clocks["eval_seconds_strict"] >= clocks["eval_seconds_lenient"]
    assert clocks["projected_full_eval_seconds_8gpu"] > 0
    path = golf.Path(env["RUN_DIR"]) / "toy" / "artifact.bin"
    again = golf.main({**env, "EVAL_ONLY": str(path), "RUN_ID": "again", "AUDIT": "0"})
    assert again["val_bpb"] == result["val_bpb"]
    assert "audit" not in again


def test_failed_audit_leaves_no_headline(make_env: MakeEnv,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    honest, env = golf.GPT.target_nats, make_env(TTT_ENABLED=0, **ADAPT)
    monkeypatch.setattr(golf.GPT, "target_nats", lambda *inputs: honest(*inputs) - 0.01)
    with pytest.raises(golf.LegalityError, match="audit: c2_normalised"):
        golf.main(env)
    result = json.loads((golf.Path(env["LOG_DIR"]) / "toy.json").read_text())
    assert result["status"] == "partial"
    assert result["audit"]["c2_normalised"]["passed"] is False
    assert not {"headline", "val_bpb", "val_loss"} & set(result)
