"""The sibling systems as presets: topology, optimizer, schedules, data order, quantiser, a run."""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_model import one_head, rms, rotated
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from toy import MakeConfig, MakeEnv, SilentLog, blocks_of, random_model, random_tokens, read_result

import train_gpt as golf

SIBLINGS = ["pr1445", "pr1471", "pr1395", "pr1453", "pr895"]
PARAMETERS = dict(zip(SIBLINGS, [34_401_372, 37_022_812, 34_401_372, 23_662_344, 17_150_040],
                      strict=True))

# Laptop size: heads of 18 want padding to 24, and every mechanism of each preset stays on.
SMALL = {"VOCAB_SIZE": 384, "NUM_HEADS": 4, "NUM_KV_HEADS": 2, "TRAIN_SEQ_LEN": 64,
         "EVAL_SEQ_LEN": 64, "EVAL_STRIDE": 32, "TRAIN_BATCH_TOKENS": 768, "COMPILE": 0,
         "MICRO_BATCH_TOKENS": 384, "VAL_BATCH_TOKENS": 8192, "ITERATIONS": 6, "WARMUP_STEPS": 1,
         "MAX_WALLCLOCK_SECONDS": 0, "VAL_LOSS_EVERY": 0, "ATTENTION": "math"}
STACK = {**SMALL, "MODEL_DIM": 32, "ROPE_DIMS": 4, "GPTQ_CALIBRATION_BATCHES": 2}
SHARED = {**SMALL, "MODEL_DIM": 72, "SWA_EVERY": 1, "SCHEDULE_STEPS": 4342}


def small(preset: str, **overrides: object) -> dict[str, object]:
    shared = preset in ("pr1453", "pr895")
    return {"PRESET": preset, **(SHARED if shared else STACK), **overrides}


@pytest.fixture
def build(make_env: MakeEnv) -> MakeConfig:
    """A preset at laptop size: `make_env` without the settings of the demo."""
    def make(preset: str, **overrides: object) -> golf.Config:
        return golf.Config.from_env(sibling_env(make_env, preset, **overrides))
    return make


def sibling_env(make_env: MakeEnv, preset: str, **overrides: object) -> dict[str, str]:
    paths = ("DATA_PATH", "TOKENIZER_PATH", "LOG_DIR", "RUN_DIR", "RUN_ID")
    found = {name: value for name, value in make_env().items() if name in paths}
    return found | {name: str(value) for name, value in small(preset, **overrides).items()}


# ---- Topology ----

ORDERS = {  # spec/other_systems.md 2.1: order, and for each skip (visit, visit it takes from, row)
    "pr1445": [(list(range(11)), [(5, 4, 0), (6, 3, 1), (7, 2, 2)]),
               ([0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10],
                [(7, 6, 0), (8, 5, 1), (9, 4, 2), (10, 3, 3)])],
    "pr1395": [(list(range(11)), [(5, 4, 0), (6, 3, 1), (7, 2, 2), (8, 1, 3), (9, 0, 4)]),
               ([0, 1, 2, 3, 4, 5, 4, 5, 6, 7, 8, 9, 10],
                [(6, 5, 0), (7, 4, 1), (8, 3, 2), (9, 2, 3), (10, 1, 4)])],
    "pr1453": [([0, 1, 2] * repeats, []) for repeats in (2, 3, 4)],
    "pr895": [([0, 1, 2] * repeats, []) for repeats in (2, 3, 4, 5)]}
ORDERS["pr1471"] = ORDERS["pr1445"]


def preset(name: str) -> golf.Config:
    return golf.Config.from_env({"PRESET": name})


@pytest.mark.parametrize("name", SIBLINGS)
def test_published_parameter_count(name: str) -> None:
    with torch.device("meta"):
        model = golf.GPT(preset(name), golf.sdpa_attend)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert sum(count for _, count in golf.count_parameters(model).values()) == PARAMETERS[name]


@pytest.mark.parametrize("name", SIBLINGS)
def test_published_orders_and_skip_pairs(name: str) -> None:
    plans = golf.depth_plans(preset(name))
    found = [(blocks_of(plan), [(number, v.skip_from, v.skip_row) for number, v
                                in enumerate(plan.visits) if v.skip_row >= 0]) for plan in plans]
    assert found == ORDERS[name]


@pytest.mark.parametrize(("name", "switches"), [
    ("pr1445", [(0.0, 11), (0.391, 11), (0.392, 14), (1.0, 14)]),
    ("pr1471", [(0.402, 11), (0.403, 14)]), ("pr1395", [(0.554, 11), (0.555, 13)]),
    ("pr1453", [(0.0, 6), (0.299, 6), (0.3, 9), (0.499, 9), (0.5, 12), (1.0, 12)]),
    ("pr895", [(0.299, 6), (0.3, 9), (0.5, 12), (0.749, 12), (0.75, 15), (1.0, 15)])])
def test_published_depths(name: str, switches: list[tuple[float, int]]) -> None:
    found = [(progress, len(golf.plan_at(preset(name), progress).visits))
             for progress, _ in switches]
    assert found == switches


@pytest.mark.parametrize("name", ["pr1453", "pr895"])
def test_exclusive_attention_follows_the_last_four_visits(name: str) -> None:
    for plan in golf.depth_plans(preset(name)):
        flags = ["xsa" in visit.form for visit in plan.visits]
        assert flags == [False] * (len(flags) - 4) + [True] * 4


@pytest.mark.parametrize("name", SIBLINGS)
def test_print_config_shows_what_enters_every_visit(name: str,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    golf.main({"PRESET": name, "PRINT_CONFIG": "1"})
    text = capsys.readouterr().out
    visits = re.findall(r"visit +\d+: block (\d+) pass (\d) ([a-z_]+)(.*)", text)
    assert len(visits) == sum(len(order) for order, _ in ORDERS[name])
    assert f"total: {PARAMETERS[name]:,} parameters" in text
    for block, again, residual, rest in visits:
        if name in ("pr1453", "pr895"):
            assert (residual == "serial") and "2 value tables" in rest and "loop embed" in rest
            assert ("its last output" in rest) == (again != "0")
        else:
            assert residual.startswith("two_lane") == (int(block) >= 7)
            assert ("value embedding" in rest) == (block in ("9", "10"))


# ---- Forward: spec/other_systems.md sections 2.1-2.3 and 6.1, in float64 ----


class Reference:
    """One sequence, one head, one position at a time."""

    def __init__(self, model: golf.GPT, row: Tensor) -> None:
        self.c, self.row = model.config, row
        self.w = {name: p.detach().double() for name, p in model.named_parameters()}
        self.x0 = rms(self.w["embed"][row[:-1].long()])

    def normed(self, x: Tensor, layer: int) -> Tensor:
        """RMSNorm, times 1/sqrt(l+1) where the system has it."""
        return rms(x) / (math.sqrt(layer + 1) if self.c.ln_scale else 1.0)

    def attend(self, z: Tensor, layer: int, exclusive: bool, value: Tensor | float = 0.0) -> Tensor:
        """alpha * Attn(z), with what joins the values of all value heads."""
        c, K = self.c, self.c.model_dim // self.c.num_heads
        q_rows, kv_rows = c.num_heads * K, c.num_kv_heads * K
        w_q, w_k, w_v = self.w["qkv"][layer].split([q_rows, kv_rows, kv_rows])
        values, dims, heads = z @ w_v.T + value, c.rope_dims or K, []
        for h in range(c.num_heads):
            g = slice(h * c.num_kv_heads // c.num_heads * K, None)
            q = rotated(rms(z @ w_q[h * K:(h + 1) * K].T), dims, c.rope_base)
            k = rotated(rms(z @ w_k[g][:K].T), dims, c.rope_base)
            q = q * self.w["q_gain"][layer, h]
            heads.append(one_head(q, k, values[:, g][:, :K], exclusive))
        return self.w["attn_scale"][layer] * (torch.cat(heads, 1) @ self.w["out"][layer].T)

    def feed(self, z: Tensor, layer: int) -> Tensor:
        """beta * MLP(z)."""
        t = z @ self.w["up"][layer].T
        hidden = torch.where(t > 0, t * t, t * t / 4)
        return self.w["mlp_scale"][layer] * (hidden @ self.w["down"][layer].T)

    def nats(self, x: Tensor) -> Tensor:
        """Nats of the targets."""
        logits = 30 * torch.tanh(rms(x) @ self.w["embed"].T / 30)
        return torch.logsumexp(logits, -1) - logits.gather(-1, self.row[1:, None].long())[:, 0]

    def mixed(self, x: Tensor, layer: int) -> Tensor:
        """The block's mix with the embedding."""
        return self.w["resid_mix"][layer, 0] * x + self.w["resid_mix"][layer, 1] * self.x0

    def stack(self, order: list[int], lane_skip: str) -> Tensor:
        """Eleven blocks with recurrence, five skips, two lanes from block 7, values in 9 and 10."""
        table = self.w["ve_table"][0][self.row[:-1].long()] @ self.w["ve_proj"][0].T
        value = {9 + i: self.w["ve_scale"][0, 0] * self.w["ve_scale"][1 + i, 0] * table
                 for i in range(2)}
        half, saved, x, lanes = len(order) // 2, [], self.x0, None
        for layer in order[:half]:
            x = self.block(x, layer)
            saved.append(x)
        for j, layer in enumerate(order[half:]):
            source = saved[-1 - j] if j < min(5, len(saved)) else None
            mix = functools.partial(self.skipped, j, source)
            if layer < 7:
                x = self.block(mix(x), layer)
                continue
            if lanes is None:
                lanes = mix(x), mix(x)
            elif lane_skip != "drop":
                lanes = mix(lanes[0]), mix(lanes[1]) if lane_skip == "both" else lanes[1]
            a, b = lanes
            u = self.mixed(a, layer)
            lanes = (u + self.attend(self.normed(u, layer), layer, True, value.get(layer, 0.0)),
                     b + self.feed(self.normed(b, layer), layer))
        assert lanes is not None
        share = self.w["lane_mix"][0]
        return self.nats(share * lanes[0] + (1 - share) * lanes[1])

    def skipped(self, j: int, source: Tensor | None, x: Tensor) -> Tensor:
        """The gated mix with a skip."""
        if source is None:
            return x
        gate = torch.sigmoid(self.w["skip_gates"][j])
        return gate * x + (1 - gate) * self.w["skip_weights"][j] * source

    def block(self, x: Tensor, layer: int, exclusive: bool = True) -> Tensor:
        """A serial block."""
        x = self.mixed(x, layer)
        x = x + self.attend(self.normed(x, layer), layer, exclusive)
        return x + self.feed(self.normed(x, layer), layer)

    def shared(self, repeats: int) -> Tensor:
        """Three blocks, repeated."""
        x, before, ids = self.x0, {}, self.row[:-1].long()
        for number in range(3 * repeats):
            r, b = divmod(number, 3)
            x = x + self.w["visit_scales"][number, 0]
            for e in range(2):
                x = x + self.w["visit_scales"][number, 1 + e] * self.w["value_tables"][e][ids]
            if r:
                x = x + self.w["cross_repeat_scales"][b, r - 1] * before[b]
            before[b] = x = self.block(x, b, exclusive=number >= 3 * repeats - 4)
        return self.nats(x)


def outcome(config: golf.Config, plan: golf.DepthPlan) -> tuple[golf.GPT, Tensor, Tensor]:
    model, rows = random_model(config), random_tokens(2, 14)
    with torch.no_grad():
        nats = model(rows[:, :-1], rows[:, 1:], plan)
    return model, rows, nats.double()


@pytest.mark.parametrize("name", ["pr1445", "pr1395"])
@pytest.mark.parametrize("lane_skip", ["drop", "attn", "both"])
def test_two_lane_stack_equals_the_published_formulas(build: MakeConfig, name: str,
                                                      lane_skip: str) -> None:
    config = build(name, RESIDUAL=f"two_lane_{lane_skip}")
    for plan in golf.depth_plans(config):
        model, rows, found = outcome(config, plan)
        order = blocks_of(plan)
        wanted = torch.stack([Reference(model, row).stack(order, lane_skip) for row in rows])
        assert wanted.std() > 0.5
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["pr1453", "pr895"])
def test_shared_blocks_equal_the_published_formulas(build: MakeConfig, name: str) -> None:
    config = build(name)
    assert config.head_dim == 18  # padded to 24
    for plan in golf.depth_plans(config):
        model, rows, found = outcome(config, plan)
        repeats = len(plan.visits) // 3
        wanted = torch.stack([Reference(model, row).shared(repeats) for row in rows])
        assert wanted.std() > 0.5
        torch.testing.assert_close(found, wanted, rtol=2e-4, atol=2e-4)


def test_padded_heads_keep_the_scale_of_their_own_width() -> None:
    """Kernels divide scores by the root of the width that they see."""
    seen: list[tuple[int, ...]] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append(tuple(q.shape))
        return golf.sdpa_attend(q, k, v)

    generator = torch.Generator().manual_seed(0)
    x, w_qkv = (torch.randn(*shape, generator=generator) for shape in ((1, 9, 220), (660, 220)))
    weights = golf.BlockWeights(w_qkv / 15, torch.eye(220), torch.empty(0), torch.empty(0),
                                torch.empty(0), torch.tensor([1.5, 2.0]), torch.ones(()))
    rotary = golf.rotary_tables(9, 110, 1e4)
    found = golf.attention(x, weights, "serial", rotary, attend, None)
    assert seen == [(1, 9, 2, 112)]
    for h, gain in enumerate((1.5, 2.0)):
        q, k, v = ((x[0].double() @ (w_qkv / 15).double()[i * 220 + h * 110:][:110].T)
                   for i in range(3))
        wanted = one_head(rotated(rms(q), 110, 1e4) * gain, rotated(rms(k), 110, 1e4), v, False)
        torch.testing.assert_close(found[0, :, h * 110:][:, :110].double(), wanted, rtol=1e-4,
                                   atol=1e-5)


@pytest.mark.parametrize("name", SIBLINGS)
def test_new_model_scores_like_chance_at_every_depth(build: MakeConfig, name: str) -> None:
    vocab_size = preset(name).vocab_size
    config = build(name, VOCAB_SIZE=vocab_size)
    model, rows = golf.GPT(config, golf.sdpa_attend), random_tokens(2, 65, vocab_size=vocab_size)
    model.initialise(0)
    for plan in golf.depth_plans(config):
        with torch.no_grad():
            nats = model(rows[:, :-1], rows[:, 1:], plan)
        assert nats.mean().item() == pytest.approx(math.log(vocab_size), abs=0.02)
        assert nats.std() > 0


def test_published_initial_values(build: MakeConfig) -> None:
    model = golf.GPT(build("pr1445"), golf.sdpa_attend)
    model.initialise(1)
    projection = model.ve_proj[0].detach()
    wide = projection if projection.shape[0] <= projection.shape[1] else projection.T
    torch.testing.assert_close(wide @ wide.T, torch.eye(len(wide)), atol=1e-5, rtol=0)
    assert model.ve_table.std().item() == pytest.approx(0.01, rel=0.05)
    assert model.ve_scale.flatten().tolist() == pytest.approx([0.1, 1.0, 1.0])
    assert model.lane_mix.item() == 0.5
    model = golf.GPT(build("pr1453"), golf.sdpa_attend)
    model.initialise(1)
    assert model.value_tables.std().item() == pytest.approx(1.0, rel=0.05)
    for matrix in model.matrices():
        assert matrix.parameter[:, matrix.rows].any() == (matrix.role not in ("out", "down"))
    assert not model.visit_scales.any() and not model.cross_repeat_scales.any()


@pytest.mark.parametrize("name", SIBLINGS)
def test_every_parameter_trains_at_every_depth(build: MakeConfig, name: str) -> None:
    """DDP would refuse the published systems at one repeat; here a gradient must exist."""
    config = build(name)
    model, rows = random_model(config), random_tokens(2, 33)
    for plan in golf.depth_plans(config):
        model(rows[:, :-1], rows[:, 1:], plan).mean().backward()
        assert all(p.grad is not None for p in model.parameters())
        model.zero_grad()
    model(rows[:, :-1], rows[:, 1:], plan).mean().backward()
    unused = {"pr1445": 1, "pr1471": 1}.get(name, 0)  # a skip that the lanes drop
    for parameter_name, p in model.named_parameters():
        if parameter_name not in ("embed", "ve_table", "value_tables"):  # of ids that occur
            used = p.grad[:len(p) - unused * parameter_name.startswith("skip")]
            assert (used.reshape(len(used), -1) != 0).any(1).all(), parameter_name


@pytest.mark.parametrize("name", SIBLINGS)
def test_optimizer_of_every_parameter(build: MakeConfig, name: str) -> None:
    """Sections 2.3 and 6.1: matrices in Muon, tables at the token rate, the rest alike."""
    config = build(name)
    model = golf.GPT(config, golf.sdpa_attend)
    optimizer = golf.Optimizer(model, config, golf.World())
    groups = {"muon": {id(m.parameter) for group in optimizer.groups for m in group.matrices}}
    for kind, group in zip(("tables", "scalars"), optimizer.adam.param_groups, strict=True):
        groups[kind] = {id(p) for p in group["params"]}
    tables, scalars = optimizer.adam.param_groups
    assert (tables["base"], tables["weight_decay"]) == (config.tied_embed_lr, config.embed_wd)
    assert (scalars["base"], scalars["weight_decay"]) == (config.scalar_lr, config.adam_wd)
    for parameter_name, p in model.named_parameters():
        wanted = ("muon" if parameter_name in ("qkv", "out", "up", "down", "ve_proj") else
                  "tables" if parameter_name in ("embed", "ve_table", "value_tables") else
                  "scalars")
        assert [kind for kind, members in groups.items() if id(p) in members] == [wanted]


@pytest.mark.parametrize(("name", "forms"), [("pr1395", 6), ("pr1453", 4)])
def test_one_graph_per_form_of_a_block(build: MakeConfig, name: str, forms: int,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """Serial; with a skip; where lanes part; one lane's skip; none; with a value embedding. Or:
    exclusive or not, with what the pass before put out or without."""
    compiler = CompileCounter()
    monkeypatch.setattr(golf, "maybe_compile", lambda function, _: torch.compile(
        function, fullgraph=True, dynamic=False, backend=compiler))
    torch._dynamo.reset()
    config = build(name)
    model, rows = random_model(config), random_tokens(2, 33)
    plans = golf.depth_plans(config)
    for plan in plans * 2:
        model(rows[:, :-1], rows[:, 1:], plan).mean().backward()
    # Embedding, norm and loss; and for each number of visits what adds their gradients.
    assert compiler.frame_count == forms + 3 + len(plans)


@pytest.mark.parametrize("name", ["pr1395", "pr1453"])
def test_adapters_enter_every_form_of_block(build: MakeConfig, name: str) -> None:
    config = build(name, TTT_BATCH_SIZE=2, TTT_LORA_RANK=4)
    model, rows = random_model(config), random_tokens(2, 33)
    plan = golf.depth_plans(config)[-1]
    plain = model(rows[:, :-1], rows[:, 1:], plan)
    adapters = golf.LowRank(model, plan)
    adapters.reset()
    x_BTD = model.hidden(rows[:, :-1], plan, adapters, adapters.run_block)
    logits = model.logits(x_BTD, adapters)
    nats = model.target_nats(logits, rows[:, 1:].flatten().long())
    torch.testing.assert_close(nats, plain.flatten())
    adapters.learn(nats.mean())
    assert all(b.any() for _, b in adapters.pairs)


# ---- Schedules, averages, data order ----


@pytest.mark.parametrize(("step", "progress", "scale"), [
    (0, 0.0, 1.0), (1851, 0.3, 1.0), (3000, 0.6, 2 / 3), (2000, 0.5, 2 / 3), (4342, 1.0, 0.0),
    (4000, 0.9, 0.1 * 4000 / 0.9 / 3000)])
def test_warmdown_in_steps_of_the_mean_time_so_far(step: int, progress: float,
                                                   scale: float) -> None:
    """spec/other_systems.md 2.5: min(1, remaining time / (iterations * mean step time))."""
    config = preset("pr1453")
    assert golf.lr_scale(config, step, progress) == pytest.approx(scale, abs=1e-9)


def test_settings_in_steps_become_shares_of_a_short_run(
        build: MakeConfig, log: SilentLog, monkeypatch: pytest.MonkeyPatch) -> None:
    published = preset("pr1453")
    config = build("pr1453", SCHEDULE_STEPS=4342, WARMDOWN_ITERS=3000)
    trainer, seen = golf.Trainer(config, golf.World(), log, golf.sdpa_attend), []
    honest = trainer.optimizer.step

    def step(at: float, scale: float) -> torch.Tensor:
        seen.append((at, scale))
        return honest(at, scale)

    monkeypatch.setattr(trainer.optimizer, "step", step)
    stream = golf.batch_stream(trainer.loader, trainer.shape, trainer.world)
    for progress in (0.01, 0.1, 0.5, 0.9):
        trainer.take_step(golf.plan_at(config, progress), progress, next(stream))
        at, scale = seen.pop()
        assert at == pytest.approx(progress * 4342)
        assert scale == pytest.approx(min(1.0, (1 - progress) * 4342 / 3000))
        assert golf.muon_momentum(at, replace(published, schedule_steps=4342)) == pytest.approx(
            golf.muon_momentum(progress * 4342, published))


def averaged_shares(config: golf.Config, scales: list[float], full: list[bool]) -> list[float]:
    state = golf.TrainState({})
    shares = []
    for step, (scale, is_full) in enumerate(zip(scales, full, strict=True)):
        in_swa = is_full and scale < config.swa_start_frac
        shares.append(state.average_share(config, step + 1, in_swa))
        state.step += 1
    return shares


def test_exponential_average_warms_up(build: MakeConfig) -> None:
    shares = averaged_shares(preset("pr1395"), [1.0] * 5000, [True] * 5000)
    for step in (0, 1, 9, 100, 4999):
        assert 1 - shares[step] == pytest.approx(min(0.997, (step + 1) / (step + 10)))
    assert set(averaged_shares(preset("pr1445"), [1.0] * 9, [True] * 9)) == {1 - 0.9965}


def test_snapshots_are_averaged_with_equal_weights_and_the_final_weights() -> None:
    """Section 6.3: at full depth, below the scale, every thirtieth step; and the last weights."""
    config = replace(preset("pr1453"), swa_every=3)
    scales, full = [1.0] * 4 + [0.5] * 8, [True] * 6 + [False] * 2 + [True] * 4
    shares = averaged_shares(config, scales, full)
    assert [step + 1 for step, share in enumerate(shares) if share] == [6, 9, 12]
    average, values = 0.0, [float(step + 1) for step in range(12)]
    for share, value in zip([*shares, 1 / 4], [*values, 100.0], strict=True):
        average += share * (value - average)
    assert average == pytest.approx((6 + 9 + 12 + 100) / 4)


@pytest.mark.parametrize("name", ["pr1453", "pr1395"])
def test_averages_end_up_in_the_weights(build: MakeConfig, name: str) -> None:
    config = build(name, ITERATIONS=5)
    trainer = golf.Trainer(config, golf.World(), SilentLog(config), golf.sdpa_attend)
    seen: list[tuple[Tensor, float]] = []
    honest = trainer.update_average

    def update(share: float) -> None:
        seen.append((trainer.model.embed.detach().clone(), share))
        honest(share)

    wanted = trainer.model.embed.detach().clone()
    trainer.update_average = update  # type: ignore[method-assign]
    trainer.run(lambda *_: None)
    for weights, share in seen:
        wanted += share * (weights - wanted)
    assert any(share for _, share in seen)
    torch.testing.assert_close(trainer.model.embed.detach(), wanted)


def shards_of(*lengths: int, first: int = 0) -> list[np.ndarray]:
    ends = np.cumsum([first, *lengths])
    return [np.arange(*pair, dtype=np.uint16) for pair in itertools.pairwise(ends)]


def loader_of(shards: list[np.ndarray], **settings: object) -> golf.TrainLoader:
    return golf.TrainLoader(shards, replace(golf.Config(vocab_size=65_535), **{
        "train_seq_len": 16, "train_context": "", "train_batch_tokens": 160,
        "train_order": "coprime", **settings}))


def test_sequential_order_is_the_text_in_order() -> None:
    windows = loader_of(shards_of(100, 50), train_order="sequential").read(0, 9)
    assert (windows[:, 0] == [0, 16, 32, 48, 64, 80, 100, 116, 132]).all()


def test_coprime_order_visits_every_window_of_a_shard_before_one_twice() -> None:
    loader = loader_of(shards_of(1000, 400, 90, 7))
    counts = Counter(loader.read(0, 10 * 40)[:, 0].tolist())
    for first, last in ((0, 1000), (1000, 1400), (1400, 1490)):
        inside = sorted((n for start, n in counts.items() if first <= start < last), reverse=True)
        number = (last - first - 1) // 16
        passes, _ = divmod(sum(inside), number)
        assert len(inside) >= number and passes >= 1
    assert not any(start >= 1490 for start in counts)
    one = loader_of(shards_of(1000)).read(0, 62)[:, 0]
    assert len(set(one.tolist())) == 62
    steps = set((np.diff(one) % (62 * 16)).tolist())
    assert len(steps) == 1 and math.gcd(steps.pop() // 16, 62) == 1


def test_coprime_order_depends_on_seed_and_contents_alone() -> None:
    shards = shards_of(1000, 400)
    base = loader_of(shards).read(0, 50)
    assert (loader_of(shards, data_dir="/elsewhere").read(0, 50) == base).all()
    assert (loader_of(shards, seed=1).read(0, 50) != base).any()
    moved = loader_of(shards_of(1000, 400, first=5)).read(0, 50) - 5
    assert (moved != base).any()
    loader = loader_of(shards)
    late = loader.read(40, 10)
    assert (late == base[40:]).all() and (loader.read(3, 4) == base[3:7]).all()


def test_coprime_batches_draw_shards_by_what_is_left_in_them() -> None:
    starts = loader_of(shards_of(30_000, 3000, 3000), train_batch_tokens=1600).read(0, 500)[:, 0]
    shares = np.bincount(np.searchsorted([30_000, 33_000], starts, "right")) / 500
    assert 0.6 < shares[0] < 0.9 and min(shares[1:]) > 0.05


# ---- Quantiser ----


def found_integers(config: golf.Config) -> tuple[golf.GPT, dict[str, Tensor], golf.QuantisedModel]:
    model = random_model(config)
    hessians = golf.Hessians(model)
    golf.collect(hessians, random_tokens(8, 65), golf.depth_plans(config)[-1])
    return model, hessians.moments, golf.quantise(model, hessians.moments, golf.World())


CLASSES = {  # largest integer of attention, MLP and tables, and what stays floating-point
    "pr1445": (31, 31, 127), "pr1471": (31, 31, 127), "pr1395": (31, 31, 127),
    "pr1453": (63, 16, 63), "pr895": (127, 127, 127)}


@pytest.mark.parametrize("name", SIBLINGS)
def test_export_types_and_level_counts(build: MakeConfig, name: str) -> None:
    config = build(name, CLIP_FLOOR=0)
    model, _, found = found_integers(config)
    attention, mlp, tables = CLASSES[name]
    wanted = {"embed": tables, "qkv": attention, "out": attention, "up": mlp, "down": mlp}
    wanted |= {"value_tables": tables} if config.num_value_embeds else {"ve_table": tables}
    assert {n: golf.quant_rule(config, n).qmax for n in found.integers} == wanted
    for stack, qmax in wanted.items():
        q = found.integers[stack]
        assert q.dtype == torch.int8
        assert int(q.abs().max()) <= qmax
    if name != "pr1471":  # clips so wide leave the largest integers unused
        assert int(found.integers["qkv"].abs().max()) == attention
    assert all(value.dtype == torch.float16 for value in found.floats.values())
    kept = {n for n in found.floats if not n.endswith((".scale", ".column"))}
    assert kept == {n for n, _ in model.named_parameters()} - set(wanted)
    rows = {str(row["name"]): row for row in golf.tensor_report(model, found)}
    for stack, qmax in wanted.items():
        assert rows[stack]["qmax"] == qmax
        assert rows[stack]["range_bits"] == pytest.approx(math.log2(2 * qmax + 1))


def nearest(w: Tensor, scale_R: Tensor, qmax: int) -> Tensor:
    return torch.round(w / scale_R.double()[:, None]).clamp(-qmax, qmax)


@pytest.mark.parametrize("name", ["pr1453", "pr895"])
def test_nearest_takes_the_best_of_five_quantiles_row_by_row(build: MakeConfig, name: str) -> None:
    model, _, found = found_integers(build(name))
    quantiles = (0.9999, 0.99995, 0.99999, 0.999995, 0.999999)
    for stack, block in (("up", 1), ("qkv", 2), ("value_tables", 0)):
        qmax = golf.quant_rule(model.config, stack).qmax
        w = model.get_parameter(stack)[block].detach().double()
        tried = []
        for quantile in quantiles:
            scale = torch.quantile(w.abs(), quantile, dim=1) / qmax
            q = nearest(w, scale, qmax)
            tried.append(((q * scale[:, None] - w) ** 2).sum(1))
        least = torch.stack(tried).min(0).values
        q, scale = found.integers[stack][block], found.floats[f"{stack}.scale"][block].double()
        error = ((q.double() * scale[:, None] - w) ** 2).sum(1)
        torch.testing.assert_close(error, least, rtol=0.05, atol=1e-8)
        assert torch.equal(q.double(), nearest(w, scale, qmax))


def test_gptq_search_keeps_the_quantile_of_least_weight_error(build: MakeConfig) -> None:
    config = build("pr1445")
    model, hessians, found = found_integers(config)
    quantiles = (0.999, 0.9995, 0.9999, 0.99999, 1.0)
    for stack in ("qkv", "up", "down"):
        errors, alone = [], []
        for quantile in quantiles:
            one = replace(config, matrix_clip_sigmas=str(quantile))
            model.config = one
            alone.append(golf.quantise(model, hessians, golf.World()))
            errors.append((golf.stored_weights(alone[-1], stack)
                           - model.get_parameter(stack).detach()).square().sum((1, 2)))
        for block, best in enumerate(torch.stack(errors).argmin(0).tolist()):
            assert torch.equal(found.integers[stack][block], alone[best].integers[stack][block])
    model.config = config


def test_hidden_floor_is_a_setting(build: MakeConfig) -> None:
    floored, free = (found_integers(build("pr1471", CLIP_FLOOR=floor))[2] for floor in (1, 0))
    for stack, qmax in (("up", 31), ("embed", 127)):
        scales = floored.floats[f"{stack}.scale"], free.floats[f"{stack}.scale"]
        least = torch.tensor(1 / qmax).half()
        assert torch.equal(scales[0], torch.maximum(scales[1], least))
    assert (floored.floats["out.scale"] != free.floats["out.scale"]).any() or \
        (floored.floats["up.scale"] != free.floats["up.scale"]).any()


def test_pruning_removes_ones_of_the_finest_rows_first(build: MakeConfig) -> None:
    _, _, found = found_integers(build("pr1395", CLIP_FLOOR=0))
    before, after = {n: q.clone() for n, q in found.integers.items()}, found.integers
    assert golf.prune_ones(found, 0.0) == 0
    count = golf.prune_ones(found, 0.5)
    gone = {n: (before[n] != after[n]) for n in before}
    assert count == sum(int(g.sum()) for g in gone.values()) > 0
    assert not gone["embed"].any() and not gone["ve_table"].any()
    scales = {n: found.floats[f"{n}.scale"] for n in ("qkv", "out", "up", "down")}
    touched = torch.cat([scales[n][gone[n].any(-1)] for n in scales])
    ones = {n: (before[n].abs() == 1).any(-1) & ~gone[n].any(-1) for n in scales}
    spared = torch.cat([scales[n][ones[n]] for n in scales])
    assert touched.max() <= spared.min()
    for n in scales:
        assert not after[n][gone[n]].any()
        assert bool((before[n][gone[n]].abs() == 1).all())


@pytest.mark.parametrize("share", [0.97, 0.9])
def test_pruning_stops_where_the_file_fits(build: MakeConfig, share: float) -> None:
    config = build("pr1395", ATTN_QMAX=1, MLP_QMAX=1, MATRIX_CLIP_SIGMAS=1.5, CLIP_FLOOR=0)
    model, hessians, found = found_integers(config)
    plan = golf.depth_plans(config)[-1]
    program, whole = len(golf.packed_program()), len(golf.encode_artifact(found, config, plan))
    model.config = replace(config, artifact_cap_bytes=program + int(share * whole))
    log = SilentLog(config)
    kept, blob = golf.fit_to_cap(model, hessians, plan, golf.World(), log)
    room = model.config.artifact_cap_bytes - program - len(blob)
    assert 0 <= room < 1000
    assert log.result["quantisation"]["pruned"] == sum(
        int((kept.integers[n] != q).sum()) for n, q in found.integers.items()) > 0
    assert any("pruned ones" in line for line in log.lines if line.startswith("warning"))
    model.config = replace(config, artifact_cap_bytes=program + whole // 3)
    with pytest.raises(golf.ArtifactError, match="pruned ones"):
        golf.fit_to_cap(model, hessians, plan, golf.World(), log)


def test_codec_that_is_not_installed_gives_way_and_the_file_says_so(
        build: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = build("pr1453")
    monkeypatch.setattr(golf.importlib.util, "find_spec", lambda name: None)
    _, _, found = found_integers(config)
    blob = golf.encode_artifact(found, config, golf.depth_plans(config)[-1])
    assert b'"codec":"brotli"' in blob
    plan, again = golf.decode_artifact(blob, config)
    assert plan == golf.depth_plans(config)[-1]
    assert all(torch.equal(q, again.integers[n]) for n, q in found.integers.items())


def test_zstd_round_trip_and_damage(build: MakeConfig) -> None:
    pytest.importorskip("zstandard")
    config = build("pr1453")
    _, _, found = found_integers(config)
    blob = golf.encode_artifact(found, config, golf.depth_plans(config)[-1])
    assert b'"codec":"zstd"' in blob
    _, again = golf.decode_artifact(blob, config)
    assert all(torch.equal(q, again.integers[n]) for n, q in found.integers.items())
    stream = golf.compress(bytes(1000), codec="zstd")
    for data, shape in ((stream, (999,)), (stream, (1001,)), (stream[:-3], (1000,)), (b"", (1,))):
        with pytest.raises(golf.ArtifactError, match="zstd"):
            golf.decompress(data, shape, codec="zstd")


# ---- Bad input ----


@pytest.mark.parametrize(("name", "settings", "both"), [
    ("pr1445", {"LOOP_END": 11}, ("LOOP_END=11", "NUM_LAYERS (11)")),
    ("pr1445", {"LOOP_END": 8}, ("LOOP_END=8", "PARALLEL_RESIDUAL_START (7)")),
    ("pr1445", {"PARALLEL_RESIDUAL_START": -1}, ("LOOP_END=5", "PARALLEL_RESIDUAL_START (-1)")),
    ("pr1445", {"VE_LAYERS": "9,11"}, ("VE_LAYERS='9,11'", "NUM_LAYERS (11)")),
    ("pr1445", {"VE_LAYERS": "9;10"}, ("VE_LAYERS='9;10'", "must be a number")),
    ("pr1445", {"VE_LAYERS": "9:10"}, ("VE_LAYERS='9:10'", "must be a number")),
    ("pr1445", {"VE_LAYERS": "9.0"}, ("VE_LAYERS='9.0'", "must be a number")),
    ("pr1453", {"PROG_DEPTH": "0.3:2,1:3"}, ("PROG_DEPTH='0.3:2,1:3'", "NUM_LOOPS (3)")),
    ("pr1453", {"NUM_LOOPS": 4}, ("PROG_DEPTH=", "NUM_LOOPS (4)")),
    ("pr1453", {"PROG_DEPTH": "0.3:1,1:4"}, ("PROG_DEPTH='0.3:1,1:4'", "CROSS_REPEAT=1")),
    ("pr1453", {"PROG_DEPTH": "0.5:2,0.3:3,1:4"}, ("PROG_DEPTH=", "rise")),
    ("pr1453", {"PROG_DEPTH": "5"}, ("PROG_DEPTH='5'", "rise")),
    ("pr1453", {"PROG_DEPTH": ""}, ("PROG_DEPTH=", "CROSS_REPEAT=1")),
    ("pr1493", {"CROSS_REPEAT": 1}, ("PROG_DEPTH=", "CROSS_REPEAT=1")),
    ("pr1453", {"QUANTISER": "gptq"}, ("GPTQ_CALIBRATION_BATCHES=0", "QUANTISER=gptq")),
    ("pr1445", {"MATRIX_CLIP_SIGMAS": "0.9,0"}, ("MATRIX_CLIP_SIGMAS=0.9,0", "between 1e-06"))])
def test_contradiction_names_both_settings(name: str, settings: dict[str, object],
                                           both: tuple[str, str]) -> None:
    with pytest.raises(golf.ConfigError) as error:
        golf.Config.from_env({"PRESET": name} | {k: str(v) for k, v in settings.items()})
    assert all(words in str(error.value) for words in both), str(error.value)
    assert "\n" not in str(error.value)


def test_tables_larger_than_memory_are_refused_before_any_file(make_env: MakeEnv,
                                                               tmp_path: Path) -> None:
    env = sibling_env(make_env, "pr1453", NUM_VALUE_EMBEDS=8, MODEL_DIM=16_384, VOCAB_SIZE=65_535)
    with pytest.raises(golf.ConfigError, match=r"NUM_VALUE_EMBEDS=8.*MODEL_DIM \(16384\)"):
        golf.main(env)
    assert not list(tmp_path.iterdir())


# ---- The whole story ----


@pytest.mark.parametrize("name", SIBLINGS)
def test_preset_runs_from_end_to_end(make_env: MakeEnv, name: str, tmp_path: Path) -> None:
    found = golf.main(sibling_env(make_env, name, EMA_DECAY=0.5, CLIP_FLOOR=0))
    result = read_result(tmp_path)
    assert result["status"] == "complete" and result["headline"] == "sliding"
    assert found["val_bpb"] == result["bpb"]["sliding"] < 4.0
    assert abs(result["quantisation"]["gap_bpb"]) < 0.05
    deepest = golf.depth_plans(preset(name))[-1]
    events = [json.loads(line) for line in (tmp_path / "logs/toy.jsonl").read_text().splitlines()]
    switches = [(e["step"], round(e["progress"], 3)) for e in events if e["event"] == "plan"]
    shared = name in ("pr1453", "pr895")
    assert switches[-1][1] == {"pr895": 0.833, "pr1395": 0.667}.get(name, 0.5)
    assert len(switches) == len(golf.depth_plans(preset(name))) - 1
    assert deepest.name == "looped"
    assert result["artifact"]["codec"] == golf.codec_of(preset(name))
    if shared:
        assert result["quantisation"]["seconds_hessians"] < 1
