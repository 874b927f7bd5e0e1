"""What the record adds to the reference system: each a setting, to be had alone or not at all.

Formulas of gates and activation stand in test_model, that of the optimizer in test_optimizer.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toy import MakeConfig, MakeEnv, plan_named, random_model, random_tokens, read_result

import train_gpt as golf

RECORD, PR1493 = (golf.Config.from_env({"PRESET": name}) for name in ("record", "pr1493"))
SWITCHES: dict[str, object] = {
    "leaky_slope": 0.3, "smear_gate": True, "attn_gate": 0.5, "muon_momentum": 0.97, "min_lr": 0.1,
    "matrix_lr": 0.026, "beta2": 0.99, "warmdown_frac": 0.85}
ALL = {"LEAKY_SLOPE": 0.3, "SMEAR_GATE": 1, "ATTN_GATE": 0.5, "MIN_LR": 0.1}
GATES = "smear_scale", "smear_gate", "attn_gate"


# ---- Presets ----


def test_the_record_has_every_technique_and_the_others_have_none() -> None:
    assert {name: getattr(RECORD, name) for name in SWITCHES} == SWITCHES
    for name in set(golf.PRESETS) - {"record"}:
        config = golf.Config.from_env({"PRESET": name})
        assert (config.leaky_slope, config.attn_gate, config.min_lr) == (0.5, 0.0, 0.0)
        assert config.matrix_lr != RECORD.matrix_lr and config.beta2 == 0.95
        assert not config.smear_gate


def test_parameter_count_of_the_gates() -> None:
    with torch.device("meta"):
        model = golf.GPT(RECORD, golf.sdpa_attend)
    total = sum(p.numel() for p in model.parameters())
    assert total == 35_944_536 + 13 + 11 * 8 * 12
    assert sum(count for _, count in golf.count_parameters(model).values()) == total
    stored = golf.expected_shapes(RECORD)[1]
    assert [stored[name].numel() for name in GATES] == [1, 12, 1056]


@pytest.mark.parametrize("residual", ["two_lane_drop", "two_lane_attn", "two_lane_both"])
def test_two_lanes_fit_the_record(make_config: MakeConfig, residual: str) -> None:
    assert replace(RECORD, residual=residual, max_skips=8).residual == residual
    config = make_config(**ALL, RESIDUAL=residual)
    model, rows, plan = random_model(config), random_tokens(2, 33), golf.depth_plans(config)[-1]
    model(rows[:, :-1], rows[:, 1:], plan).mean().backward()
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
    assert {id(p) for p in model.named(*GATES).values()} <= {*scalars}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(rows[:, :-1], rows[:, 1:], plan_named(config, "looped")).mean().backward()
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


# ---- A whole run ----


@pytest.mark.parametrize("mode", ["documents", "sgd"])
def test_a_run_with_everything_on_passes_the_audit(make_env: MakeEnv, tmp_path: Path,
                                                   mode: str) -> None:
    golf.main(make_env(**ALL, AUDIT=1, TTT_MODE=mode, RESIDUAL="two_lane_both", QUANTISER="rate",
                       COMPRESSOR="ans"))
    result = read_result(tmp_path)
    assert result["status"] == "complete"
    assert all(facts["passed"] for facts in result["audit"].values())  # type: ignore[index]
