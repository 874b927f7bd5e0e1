"""What the record adds to the reference system: each a setting, to be had alone or not at all.

Formulas of gates and activation stand in test_model, that of the optimizer in test_optimizer.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_model import one_head
from toy import MakeConfig, MakeEnv, plan_named, random_model, random_tokens, read_result

import train_gpt as golf

RECORD, PR1493 = (golf.Config.from_env({"PRESET": name}) for name in ("record", "pr1493"))
SWITCHES: dict[str, object] = {
    "leaky_slope": 0.3, "smear_gate": True, "attn_gate": 0.5, "muon_momentum": 0.97,
    "muon_backend": "polar_express", "min_lr": 0.1}
ALL = {"DOCUMENT_MASK": 1, "LEAKY_SLOPE": 0.3, "SMEAR_GATE": 1, "ATTN_GATE": 0.5,
       "MUON_BACKEND": "polar_express", "MIN_LR": 0.1}


# ---- Presets ----


def test_the_record_has_every_technique_and_the_others_have_none() -> None:
    assert {name: getattr(RECORD, name) for name in SWITCHES} == SWITCHES
    for name in set(golf.PRESETS) - {"record"}:
        config = golf.Config.from_env({"PRESET": name})
        assert (config.leaky_slope, config.attn_gate, config.min_lr) == (0.5, 0.0, 0.0)
        assert not config.smear_gate and not config.document_mask
        assert config.muon_backend == "newton_schulz"


def test_published_parameter_count_of_the_gates() -> None:
    with torch.device("meta"):
        model = golf.GPT(RECORD, golf.sdpa_attend)
    total = sum(p.numel() for p in model.parameters())
    assert total == 35_944_536 + 13 + 11 * 8 * 12
    assert sum(count for _, count in golf.count_parameters(model).values()) == total
    stored = golf.expected_shapes(RECORD)[1]
    assert [stored[name].numel() for name in ("smear_scale", "smear_gate", "attn_gate")] == [
        1, 12, 1056]


def test_the_record_starts_at_the_uniform_loss() -> None:
    model = golf.GPT(replace(RECORD, compile=False), golf.sdpa_attend)
    model.initialise(0)
    rows = random_tokens(2, 65, vocab_size=8192)
    with torch.no_grad():
        nats = model(rows[:, :-1], rows[:, 1:], plan_named(RECORD, "looped"))
    assert nats.mean().item() == pytest.approx(math.log(8192), abs=0.02)


@pytest.mark.parametrize("residual", ["two_lane_drop", "two_lane_attn", "two_lane_both"])
def test_two_lanes_fit_the_record(make_config: MakeConfig, residual: str) -> None:
    assert replace(RECORD, residual=residual, max_skips=8).residual == residual
    config = make_config(**ALL, RESIDUAL=residual)
    model, rows, plan = random_model(config), random_tokens(2, 33), golf.depth_plans(config)[-1]
    model(rows[:, :-1], rows[:, 1:], plan, None, *golf.document_bounds(rows, config)
          ).mean().backward()
    assert sum(visit.skip_row >= 0 for visit in plan.visits) == 3
    assert all(p.grad is not None for p in model.parameters())


# ---- Gates at the start, and who trains them ----


def new_models(config: golf.Config, **settings: object) -> tuple[golf.GPT, golf.GPT]:
    """Two models of equal weights, one with further settings whose parameters are as initialised.
    """
    plain, changed = random_model(config), golf.GPT(replace(config, **settings), golf.sdpa_attend)
    changed.initialise(0)
    changed.load_state_dict(plain.state_dict(), strict=False)
    return plain, changed


def test_a_new_smear_gate_changes_no_bit(config: golf.Config) -> None:
    plain, changed = new_models(config, smear_gate=True)
    ids, plan = random_tokens(2, 33), plan_named(config, "looped")
    assert torch.equal(plain.hidden(ids, plan), changed.hidden(ids, plan))


def test_a_new_attention_gate_halves_what_heads_put_out(config: golf.Config) -> None:
    plain, changed = new_models(config, attn_gate=0.5)
    ids, plan = random_tokens(2, 33), plan_named(config, "looped")
    with torch.no_grad():
        plain.out.mul_(0.5)
    torch.testing.assert_close(plain.hidden(ids, plan), changed.hidden(ids, plan))


def test_gates_train_with_the_scalars_and_every_parameter_learns(make_config: MakeConfig) -> None:
    config = make_config(**ALL)
    model, rows = random_model(config), random_tokens(4, 65)
    optimizer = golf.Optimizer(model, config, golf.World())
    scalars = [id(p) for p in optimizer.adam.param_groups[1]["params"]]
    assert {id(p) for p in model.named("smear_scale", "smear_gate", "attn_gate").values()} <= {
        *scalars}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(rows[:, :-1], rows[:, 1:], plan_named(config, "looped"), None,
          *golf.document_bounds(rows, config)).mean().backward()
    optimizer.step(0, 1.0)
    for name, p in model.named_parameters():
        assert not torch.equal(p, before[name]), name


def test_embeddings_are_not_smeared_into_the_next_document(make_config: MakeConfig) -> None:
    model, ids = random_model(make_config(SMEAR_GATE=1)), random_tokens(1, 12)
    ids[0, 5] = golf.BOS_ID
    changed = ids.clone()
    changed[0, :5] = 77
    smear = model.smear_scale, model.smear_gate
    one, other = (golf.embed_tokens(t, model.embed, torch.float32, smear) for t in (ids, changed))
    assert torch.equal(one[:, 5:], other[:, 5:])
    alone = golf.embed_tokens(ids, model.embed, torch.float32)
    assert torch.equal(one[:, [0, 5]], alone[:, [0, 5]])
    assert (one != alone).any(2)[0].tolist() == [t not in (0, 5) for t in range(12)]


# ---- Documents ----


def test_bounds_are_where_rows_and_documents_begin(make_config: MakeConfig) -> None:
    rows = torch.tensor([[9, 1, 8, 7], [5, 4, 1, 3], [1, 6, 6, 1]], dtype=torch.int32)
    found, = golf.document_bounds(rows, make_config(DOCUMENT_MASK=1))
    assert (found.dtype, found.tolist()) == (torch.int32, [0, 1, 3, 5, 6, 9])
    assert not list(golf.document_bounds(rows, make_config()))


@pytest.mark.parametrize("bounds", [[0, 12, 24], [0, 1, 5, 12, 13, 24], [0, 12, 12, 23, 24, 24]])
def test_attention_within_bounds_equals_the_formula(bounds: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 12, n, 8, generator=generator) for n in (4, 2, 2))
    found = golf.sdpa_attend(q, k, v, torch.tensor(bounds, dtype=torch.int32)).flatten(0, 1)
    flat_q, flat_k, flat_v = (t.flatten(0, 1).double() for t in (q, k, v))
    for first, last in itertools.pairwise(bounds):
        for h in range(4 if last > first else 0):
            wanted = one_head(flat_q[first:last, h], flat_k[first:last, h // 2],
                              flat_v[first:last, h // 2], False)
            torch.testing.assert_close(found[first:last, h].double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [ALL, {"DOCUMENT_MASK": 1}])
def test_packed_documents_score_as_if_each_were_alone(make_config: MakeConfig,
                                                      settings: dict[str, object]) -> None:
    config = make_config(**settings)
    model, rows, plan = random_model(config), random_tokens(2, 42), plan_named(config, "looped")
    rows[rows == golf.BOS_ID] = 2
    for row, place in ((0, 0), (0, 17), (0, 18), (1, 5)):
        rows[row, place] = golf.BOS_ID
    bounds, = golf.document_bounds(rows, config)
    with torch.no_grad():
        packed = model(rows[:, :-1], rows[:, 1:], plan, None, bounds).flatten()
        ids, targets = rows[:, :-1].flatten(), rows[:, 1:].flatten()
        alone = torch.cat([model(ids[None, first:last], targets[None, first:last], plan)[0]
                           for first, last in itertools.pairwise(bounds.tolist())])
        crossing = model(rows[:, :-1], rows[:, 1:], plan).flatten()
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)
    assert (packed - crossing).abs().max() > 0.01


def test_a_kernel_that_looks_past_bounds_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def blind(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
              bounds: torch.Tensor | None = None) -> torch.Tensor:
        return golf.sdpa_attend(q, k, v)

    monkeypatch.setattr(golf, "load_fa3", lambda device: blind)
    assert golf.choose_attention("auto", torch.device("cpu")).name == "fa3"
    backend = golf.choose_attention("auto", torch.device("cpu"), masked=True)
    assert backend.name == "math"
    assert "float32" in backend.rejected["fa3"]


def test_batches_carry_the_bounds_of_their_own_rows(make_config: MakeConfig) -> None:
    config = make_config(DOCUMENT_MASK=1)
    tokens = np.tile(np.array([1, *range(2, 42)], dtype=np.uint16), 60)
    loader = golf.TrainLoader([tokens], config)
    stream = golf.batch_stream(loader, golf.batch_shape(config, 1), golf.World())
    batches = next(stream)
    stream.close()
    for rows, bounds in batches:
        assert torch.equal(bounds, *golf.document_bounds(rows, config))
        assert len(bounds) > len(rows) + 1


def test_one_graph_serves_every_number_of_documents(make_config: MakeConfig,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = functools.partial(torch.compile, fullgraph=True, dynamic=False, backend="eager")
    monkeypatch.setattr(golf, "maybe_compile", lambda function, config: compiled(function))
    config = make_config(**ALL)
    torch._dynamo.reset()
    model, plan = random_model(config), golf.depth_plans(config)[-1]
    for number, documents in enumerate((3, 1, 9, 20)):
        rows = random_tokens(2, 42, seed=number)
        rows[rows == golf.BOS_ID] = 2
        rows[1, 1:1 + documents] = golf.BOS_ID
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            model(rows[:, :-1], rows[:, 1:], plan, None, *golf.document_bounds(rows, config)
                  ).mean().backward()
    torch._dynamo.reset()


# ---- A whole run ----


@pytest.mark.parametrize("mode", ["documents", "sgd"])
def test_a_run_with_everything_on_passes_the_audit(make_env: MakeEnv, tmp_path: Path,
                                                   mode: str) -> None:
    golf.main(make_env(**ALL, AUDIT=1, TTT_MODE=mode, RESIDUAL="two_lane_both", QUANTISER="rate",
                       COMPRESSOR="ans"))
    result = read_result(tmp_path)
    assert result["status"] == "complete"
    assert all(facts["passed"] for facts in result["audit"].values())  # type: ignore[index]
