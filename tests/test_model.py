"""Section 4: one forward pass, checked against a slow re-derivation in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from toy import MakeConfig, blocks_of, plan_named, random_model, random_tokens

import train_gpt as golf

PR1493 = golf.Config.from_env({"PRESET": "pr1493"})


# ---- The reference: spec/pr1493.md section 3, one sequence, one head, one position at a time ----


def rms(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1.1920929e-07)


def rotated(x_TK: Tensor, dims: int, base: float) -> Tensor:
    rows = []
    for position, row in enumerate(x_TK):
        row, half = row.clone(), dims // 2
        for i in range(half):
            angle = position * base ** (-2 * i / dims)
            a, b = float(row[i]), float(row[i + half])
            row[i] = a * math.cos(angle) + b * math.sin(angle)
            row[i + half] = -a * math.sin(angle) + b * math.cos(angle)
        rows.append(row)
    return torch.stack(rows)


def one_head(q_TK: Tensor, k_TK: Tensor, v_TK: Tensor, exclusive: bool) -> Tensor:
    rows = []
    for t in range(len(q_TK)):
        scores = q_TK[t] @ k_TK[:t + 1].T / math.sqrt(q_TK.shape[1])
        weights = torch.exp(scores - scores.max())
        y = (weights / weights.sum()) @ v_TK[:t + 1]
        if exclusive:
            direction = v_TK[t] / v_TK[t].norm()
            y = y - (y @ direction) * direction
        rows.append(y)
    return torch.stack(rows)


def reference_block(model: golf.GPT, x: Tensor, x0: Tensor, layer: int) -> Tensor:
    c = model.config
    H, G, K = c.num_heads, c.num_kv_heads, c.model_dim // c.num_heads
    w = {name: p.detach().double() for name, p in model.named_parameters()}
    w_q, w_k, w_v = w["qkv"][layer].split([H * K, G * K, G * K])
    depth_scale = 1 / math.sqrt(layer + 1) if c.ln_scale else 1.0
    dims = c.rope_dims or K

    def attend(z: Tensor) -> Tensor:
        heads = []
        for h in range(H):
            g = h // (H // G)
            q, k, v = (z @ m[i * K:(i + 1) * K].T for m, i in ((w_q, h), (w_k, g), (w_v, g)))
            q = rotated(rms(q), dims, c.rope_base) * w["q_gain"][layer, h]
            exclusive = layer >= c.num_layers - c.xsa_last_n
            y = one_head(q, rotated(rms(k), dims, c.rope_base), v, exclusive)
            if c.attn_gate:
                y = y * torch.sigmoid(c.attn_gate * z[:, :12] @ w["attn_gate"][layer, h])[:, None]
            heads.append(y)
        return torch.cat(heads, dim=1) @ w["out"][layer].T

    def feed(z: Tensor) -> Tensor:
        t = z @ w["up"][layer].T
        return torch.where(t > 0, t * t, (c.leaky_slope * t) ** 2) @ w["down"][layer].T

    u = w["resid_mix"][layer, 0] * x + w["resid_mix"][layer, 1] * x0
    a = w["attn_scale"][layer] * attend(rms(u) * depth_scale)
    if 0 <= c.parallel_residual_start <= layer:
        return u + a + w["mlp_scale"][layer] * feed(rms(u) * depth_scale)
    h = u + a
    return h + w["mlp_scale"][layer] * feed(rms(h) * depth_scale)


def reference_nats(model: golf.GPT, row: Tensor, order: list[int]) -> Tensor:
    """Nats of row[1:] given row[:-1], float64, with `order` walked as encoder and decoder."""
    embed = model.embed.detach().double()
    gates, weights = torch.sigmoid(model.skip_gates.detach().double()), model.skip_weights.double()
    e = embed[row[:-1].long()]
    if model.config.smear_gate:
        before, gate = e.clone(), model.smear_gate[0].detach().double()
        for t in range(1, len(e)):
            if row[t] != 1:
                share = model.smear_scale.item() * torch.sigmoid(gate @ before[t, :12])
                e[t] = before[t] + share * before[t - 1]
    x = x0 = rms(e)
    half, stack = len(order) // 2, []
    for layer in order[:half]:
        x = reference_block(model, x, x0, layer)
        stack.append(x)
    for j, layer in enumerate(order[half:]):
        if stack:
            x = (1 - gates[j]) * (weights[j].detach() * stack.pop()) + gates[j] * x
        x = reference_block(model, x, x0, layer)
    cap = model.config.logit_softcap
    logits = cap * torch.tanh(rms(x) @ embed.T / cap)
    return torch.logsumexp(logits, -1) - logits.gather(-1, row[1:, None].long())[:, 0]


def test_a_saved_model_is_its_parameters_alone(config: golf.Config) -> None:
    """What follows from settings, as rotary tables by EVAL_SEQ_LEN, is made anew."""
    model = random_model(config)
    assert model.state_dict().keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("plan", ["unlooped", "looped"])
@pytest.mark.parametrize("settings", [
    {}, {"PARALLEL_RESIDUAL_START": -1}, {"PARALLEL_RESIDUAL_START": 0}, {"XSA_LAST_N": 0},
    {"XSA_LAST_N": 5}, {"ROPE_DIMS": 0}, {"LN_SCALE": 0}, {"NUM_KV_HEADS": 1, "LOGIT_SOFTCAP": 5},
    {"LEAKY_SLOPE": 0.3}, {"SMEAR_GATE": 1}, {"ATTN_GATE": 0.5},
    {"LEAKY_SLOPE": 0, "SMEAR_GATE": 1, "ATTN_GATE": 2, "XSA_LAST_N": 2},
    {"NUM_LAYERS": 4, "NUM_LOOPS": 3, "LOOP_START": 0, "LOOP_END": 1, "MLP_MULT": 4}])
def test_forward_equals_the_published_formulas(make_config: MakeConfig, plan: str,
                                               settings: dict[str, float]) -> None:
    config = make_config(**settings)
    blocks, first, last = list(range(config.num_layers)), config.loop_start, config.loop_end + 1
    loops = 1 + (config.num_loops if plan == "looped" else 0)
    order = blocks[:first] + blocks[first:last] * loops + blocks[last:]
    model, rows = random_model(config), random_tokens(2, 21)
    rows[0, 0] = rows[1, 7] = golf.BOS_ID
    found = model(rows[:, :-1], rows[:, 1:], plan_named(config, plan))
    wanted = torch.stack([reference_nats(model, row, order) for row in rows])
    assert wanted.std() > 0.5
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


# ---- Fixtures of spec/pr1493.md section 0 ----


def test_published_parameter_counts() -> None:
    with torch.device("meta"):
        model = golf.GPT(PR1493, golf.sdpa_attend)
    groups = golf.count_parameters(model)
    assert groups == {"embedding": (1, 4_194_304), "matrix": (66, 31_719_424),
                      "vector": (46, 30_808)}
    assert sum(tensors for tensors, _ in groups.values()) == 113
    assert sum(p.numel() for p in model.parameters()) == 35_944_536


def test_published_matrix_shapes() -> None:
    with torch.device("meta"):
        model = golf.GPT(PR1493, golf.sdpa_attend)
    shapes = {m.role: tuple(m.parameter[:, m.rows].shape) for m in model.matrices()}
    assert shapes == {"q": (11, 512, 512), "k": (11, 256, 512), "v": (11, 256, 512),
                      "out": (11, 512, 512), "up": (11, 2048, 512), "down": (11, 512, 2048)}


def skips_of(plan: golf.DepthPlan) -> list[tuple[int, int, int]]:
    """(visit, visit that it takes from, row of the skip weights)."""
    return [(n, v.skip_from, v.skip_row) for n, v in enumerate(plan.visits) if v.skip_row >= 0]


def test_published_orders_and_skip_pairs() -> None:
    unlooped, looped = golf.depth_plans(PR1493)
    assert blocks_of(unlooped) == list(range(11))
    assert skips_of(unlooped) == [(5, 4, 0), (6, 3, 1), (7, 2, 2), (8, 1, 3), (9, 0, 4)]
    assert blocks_of(looped) == [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10]
    assert skips_of(looped) == [(8 + j, 7 - j, j) for j in range(8)]
    passes = [v.pass_number for v in looped.visits]
    assert passes == [0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 0, 0, 0, 0]
    assert looped.describe() == ("encoder:[0, 1, 2, 3, 4, 5, 3, 4] "
                                 "decoder:[5, 3, 4, 5, 6, 7, 8, 9, 10]")


@pytest.mark.parametrize(("progress", "name"), [
    (0.0, "unlooped"), (0.3499, "unlooped"), (0.35, "looped"), (1.0, "looped")])
def test_progress_decides_the_plan(progress: float, name: str) -> None:
    assert golf.plan_at(PR1493, progress).name == name


def test_no_loops_means_one_plan() -> None:
    config = replace(PR1493, num_loops=0)
    assert [plan.name for plan in golf.depth_plans(config)] == ["unlooped"]
    assert golf.plan_at(config, 0.9).name == "unlooped"


@pytest.mark.parametrize("preset", ["pr1493", "record"])
def test_system_starts_at_the_uniform_loss(preset: str) -> None:
    config = golf.Config.from_env({"PRESET": preset, "COMPILE": "0"})
    model = golf.GPT(config, golf.sdpa_attend)
    model.initialise(0)
    rows = random_tokens(2, 65, vocab_size=8192)
    with torch.no_grad():
        nats = model(rows[:, :-1], rows[:, 1:], plan_named(config, "looped"))
    assert nats.mean().item() == pytest.approx(math.log(8192), abs=0.02)
    assert nats.std() > 0


def test_published_work_per_token() -> None:
    unlooped, looped = (golf.flops_per_token(PR1493, plan) for plan in golf.depth_plans(PR1493))
    assert unlooped == pytest.approx(0.30e9, rel=0.03)
    assert looped == pytest.approx(0.44e9, rel=0.03)


# ---- Properties ----


def test_new_model_is_its_embedding(config: golf.Config) -> None:
    """Output matrices are zero, so every block passes its input on and skips mix equal halves."""
    model, ids = golf.GPT(config, golf.sdpa_attend), random_tokens(1, 9)
    model.initialise(3)
    for plan in golf.depth_plans(config):
        torch.testing.assert_close(model.hidden(ids, plan), rms(rms(model.embed[ids.long()])))


def test_initial_values(config: golf.Config) -> None:
    model, again, other = (golf.GPT(config, golf.sdpa_attend) for _ in range(3))
    for each, seed in ((model, 5), (again, 5), (other, 6)):
        each.initialise(seed)
    for name, p in model.named_parameters():
        assert torch.equal(p, again.get_parameter(name))
    assert model.embed.std().item() == pytest.approx(0.005, rel=0.05)
    assert not model.out.any()
    assert not model.down.any()
    for matrix in model.matrices():
        if matrix.role in ("out", "down"):
            continue
        view = matrix.parameter[:, matrix.rows]
        same = other.get_parameter("up" if matrix.role == "up" else "qkv")
        assert not torch.equal(view, same[:, matrix.rows])
        for w in view.double():
            small = w if w.shape[0] <= w.shape[1] else w.T
            torch.testing.assert_close(small @ small.T, torch.eye(len(small)).double(), atol=1e-5,
                                       rtol=0)
    values = {name: (v.min().item(), v.max().item()) for name, v in model.vectors().items()}
    assert values == {"attn_scale": (1, 1), "mlp_scale": (1, 1), "resid_mix": (0, 1),
                      "q_gain": (5.25, 5.25), "skip_weights": (1, 1), "skip_gates": (0, 0)}
    assert bool((model.resid_mix[:, 0] == 1).all())


@pytest.mark.parametrize("plan", ["unlooped", "looped"])
def test_no_score_depends_on_later_tokens(config: golf.Config, plan: str) -> None:
    model, rows = random_model(config), random_tokens(2, 41)
    changed = rows.clone()
    changed[:, 25:] = random_tokens(2, 16, seed=1)
    with torch.no_grad():
        before, after = (model(r[:, :-1], r[:, 1:], plan_named(config, plan))
                         for r in (rows, changed))
    assert torch.equal(before[:, :24], after[:, :24])
    assert (before[:, 25:] != after[:, 25:]).float().mean() > 0.9


class ZeroLowRank:
    """An adapter with zero output, and a record of what it saw."""

    def __init__(self, scale: float = 0.0) -> None:
        self.seen: list[tuple[int, int, str]] = []
        self.scale = scale

    def __call__(self, visit: int, block: int, site: str, x: Tensor, y: Tensor) -> Tensor:
        self.seen.append((visit, block, site))
        rank_two = torch.ones(x.shape[-1], 2)
        return y + (x @ rank_two) @ (self.scale * torch.ones(2, y.shape[-1]))


@pytest.mark.parametrize("plan", ["unlooped", "looped"])
def test_adapter_of_zeros_changes_no_bit(config: golf.Config, plan: str) -> None:
    model, rows, depth = random_model(config), random_tokens(2, 33), plan_named(config, plan)
    adapter = ZeroLowRank()
    with torch.no_grad():
        plain = model(rows[:, :-1], rows[:, 1:], depth)
        adapted = model(rows[:, :-1], rows[:, 1:], depth, adapter)
        changed = model(rows[:, :-1], rows[:, 1:], depth, ZeroLowRank(0.01))
    assert torch.equal(plain, adapted)
    assert not torch.allclose(plain, changed, atol=1e-3)
    wanted = [(n, block, site) for n, block in enumerate(blocks_of(depth))
              for site in ("qkv", "out", "up", "down")]
    assert adapter.seen == [*wanted, (-1, -1, "head")]


@pytest.mark.parametrize("first", [0, 1, 20, 31])
def test_scoring_a_part_equals_the_part_of_scoring_all(config: golf.Config, first: int) -> None:
    model, rows, plan = random_model(config), random_tokens(2, 33), golf.depth_plans(config)[-1]
    with torch.no_grad():
        whole = model(rows[:, :-1], rows[:, 1:], plan)
        logits = model.logits(model.hidden(rows[:, :-1], plan)[:, first:])
        part = model.target_nats(logits, rows[:, 1 + first:].flatten().long()).view(2, -1)
    assert part.shape == (2, 32 - first)
    torch.testing.assert_close(part, whole[:, first:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("plan", "unused"), [("unlooped", 1), ("looped", 0)])
def test_every_parameter_that_the_plan_uses_gets_a_gradient(config: golf.Config, plan: str,
                                                            unused: int) -> None:
    model, rows = random_model(config), random_tokens(2, 33)
    model(rows[:, :-1], rows[:, 1:], plan_named(config, plan)).mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        used = p.grad[:-unused] if unused and name.startswith("skip") else p.grad
        assert (used.flatten(1) != 0).any(1).all() or name == "embed", name
        if unused and name.startswith("skip"):
            assert not p.grad[-unused:].any()


def test_bfloat16_stays_near_float32(config: golf.Config) -> None:
    model, rows, plan = random_model(config), random_tokens(4, 65), golf.depth_plans(config)[-1]
    rounded = golf.GPT(config, golf.sdpa_attend, torch.bfloat16)
    rounded.load_state_dict(model.state_dict())
    with torch.no_grad():
        wanted, found = (m(rows[:, :-1], rows[:, 1:], plan) for m in (model, rounded))
    assert found.dtype == torch.float32
    assert float((found - wanted).abs().mean()) < 0.1 * float(wanted.std())


def test_rotation_has_a_row_for_every_position() -> None:
    tables = golf.rotary_tables(2048, 16, 10_000.0)
    assert torch.unique(torch.cat([*tables], dim=1), dim=0).shape[0] == 2048
    for position in (0, 1, 257, 2047):
        for i in range(8):
            angle = position * 10_000.0 ** (-2 * i / 16)
            assert tables[0, position, i].item() == pytest.approx(math.cos(angle), abs=1e-6)
            assert tables[1, position, i].item() == pytest.approx(math.sin(angle), abs=1e-6)


def test_rotation_keeps_length_and_depends_on_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    turned = [golf.rotate(x.expand(1, 64, 1, 16), golf.rotary_tables(64, 8, 100.0))[0, :, 0]
              for x in (q, k)]
    torch.testing.assert_close(turned[0].norm(dim=1), q.norm().expand(64))
    products = turned[0] @ turned[1].T
    for distance in (0, 1, 30):
        line = torch.diagonal(products, -distance)
        torch.testing.assert_close(line, line[:1].expand_as(line), rtol=1e-4, atol=1e-5)
    assert products[:, 0].std() > 0.1
    assert torch.equal(turned[0][:, 8:], q[0, 0, 0, 8:].expand(64, 8))


def test_exclusive_attention_is_orthogonal_to_the_own_value() -> None:
    generator = torch.Generator().manual_seed(0)
    y, v = (torch.randn(2, 7, heads, 8, generator=generator) for heads in (6, 3))
    own = v.repeat_interleave(2, dim=2)
    out = golf.exclude_self(y, v)
    assert float((out * own).sum(-1).abs().max()) < 1e-5
    torch.testing.assert_close(out + ((y * own).sum(-1) / own.square().sum(-1))[..., None] * own, y)
    assert torch.equal(golf.exclude_self(y, torch.zeros_like(v)), y)


def test_soft_cap_bounds_logits() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [1.0, 2.0, 3.0]])
    nats = golf.softcapped_nll(logits, torch.tensor([1, 2]), 30.0)
    capped = [[30 * math.tanh(x / 30) for x in row] for row in logits.tolist()]
    wanted = [math.log(sum(map(math.exp, row))) - row[t]
              for row, t in zip(capped, (1, 2), strict=True)]
    assert nats.tolist() == pytest.approx(wanted, rel=1e-5)
    assert nats[0] == pytest.approx(60.0, abs=1e-3)


# ---- Back-ends ----


def test_laptop_uses_plain_attention_and_says_why() -> None:
    backend = golf.choose_attention("auto", torch.device("cpu"))
    assert backend.name == "math"
    assert list(backend.rejected) == ["fa3", "cudnn", "flash"]
    assert all(backend.rejected.values())


@pytest.mark.parametrize("name", ["fa3", "cudnn", "flash"])
def test_chosen_attention_that_cannot_run_is_an_error(name: str) -> None:
    with pytest.raises(golf.ConfigError, match=f"ATTENTION={name}") as error:
        golf.choose_attention(name, torch.device("cpu"))
    assert "\n" not in str(error.value)


def forgets_causality(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    return y.transpose(1, 2)


def gives_nan(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return golf.sdpa_attend(q, k, v) * float("nan")


def has_a_wrong_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return golf.sdpa_attend(q, k * 0.5 + k.detach() * 0.5, v)


@pytest.mark.parametrize("wrong", [forgets_causality, gives_nan, has_a_wrong_gradient])
def test_attention_that_computes_something_else_is_passed_over(
        monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    monkeypatch.setattr(golf, "load_fa3", lambda device: wrong)
    backend = golf.choose_attention("auto", torch.device("cpu"))
    assert backend.name == "math"
    assert "float32" in backend.rejected["fa3"]


def test_attention_that_works_wins_over_later_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golf, "load_fa3", lambda device: golf.sdpa_attend)
    backend = golf.choose_attention("auto", torch.device("cpu"))
    assert (backend.name, backend.rejected) == ("fa3", {})


def test_compiled_code_never_asks_for_the_truth_of_a_tap(config: golf.Config) -> None:
    """PyTorch 2.11 cannot trace that of a partial function which holds tensors, as adapters do."""
    class Tap:
        def __call__(self, site: golf.Site, x: Tensor, y: Tensor) -> Tensor:
            return y

        def __bool__(self) -> bool:
            raise AssertionError("asked for its truth")

    model, ids, plan = random_model(config), random_tokens(2, 33), plan_named(config, "looped")

    def run(stream: golf.Stream, *others: object) -> tuple[Tensor, ...]:
        return golf.run_block(stream, *others[:-1], Tap())  # type: ignore[arg-type]

    wanted = model.hidden(ids, plan)
    assert torch.equal(model.hidden(ids, plan, lambda *key: key[-1], run), wanted)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_fan_gives_every_reader_the_tensor_and_adds_their_gradients_once(count: int) -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    sums: list[int] = []

    def add(*parts: Tensor) -> Tensor:
        sums.append(len(parts))
        return torch.stack(parts).sum(0)

    readers = golf.Fan.apply(x, count, add)
    assert len(readers) == count
    assert all(torch.equal(reader, x) for reader in readers)
    weights = torch.arange(1.0, 1 + count).tolist()
    sum((w * reader.square()).sum() for w, reader in zip(weights, readers, strict=True)).backward()
    torch.testing.assert_close(x.grad, 2 * sum(weights) * x.detach())
    assert sums == [count]


def test_one_pass_adds_what_the_first_embedding_gets(config: golf.Config) -> None:
    """Its gradient is that of autograd's own additions."""
    rows, plan = random_tokens(2, 33), plan_named(config, "looped")
    gradients = []
    for fan in (golf.Fan.apply, lambda x, count, add: (x,) * count):
        model = random_model(config).double()
        model.dtype = torch.float64
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(golf.Fan, "apply", fan)
            model(rows[:, :-1], rows[:, 1:], plan).mean().backward()
        gradients.append(model.embed.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)  # norms are float32


@pytest.mark.parametrize("plan", ["unlooped", "looped"])
def test_forward_is_one_graph(config: golf.Config, plan: str) -> None:
    """Traced without generating code: a graph break would raise."""
    model, rows, depth = random_model(config), random_tokens(2, 33), plan_named(config, plan)

    def loss(rows: Tensor) -> Tensor:
        return model(rows[:, :-1], rows[:, 1:], depth).mean()

    traced = torch.compile(loss, fullgraph=True, dynamic=False, backend="eager")
    torch.testing.assert_close(traced(rows), loss(rows))


@pytest.mark.parametrize("layers", [2, 3])
def test_shallow_models_train(make_config: MakeConfig, layers: int) -> None:
    config = make_config(NUM_LAYERS=layers, NUM_LOOPS=0, XSA_LAST_N=1)
    model, rows = random_model(config), random_tokens(2, 17)
    plan = golf.depth_plans(config)[-1]
    assert blocks_of(plan) == list(range(layers))
    model(rows[:, :-1], rows[:, 1:], plan).mean().backward()
    norm = golf.Optimizer(model, config, golf.World()).step(0, 1.0)
    assert math.isfinite(norm.item())


def test_kernel_with_broken_gradients_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return golf.sdpa_attend(q, k, v)

        @staticmethod
        def backward(ctx: object, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            nan = torch.full((2, 256, 4, 64), torch.nan)
            return torch.zeros_like(dy), nan, nan

    monkeypatch.setattr(golf, "load_sdpa", lambda device, kernel: Broken.apply)
    with pytest.raises(golf.ConfigError, match="nan"):
        golf.choose_attention("math", torch.device("cpu"))
