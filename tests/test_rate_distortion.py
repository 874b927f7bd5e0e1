"""Balanced steps and the search for a size: less error at equal bytes, and never over the cap."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import train_gpt as golf

torch.set_num_threads(1)
PROGRAM_BYTES = len(golf.packed_program())


class Log:
    """Takes what the search reports."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.values: dict[str, object] = {}

    def line(self, text: str, console: bool = True) -> None:
        self.lines.append(text)

    def warn(self, text: str) -> None:
        self.lines.append(f"warning: {text}")

    def put(self, section: str, **values: object) -> None:
        self.values |= values


def demo(**settings: object) -> golf.Config:
    """The demo's shapes with balanced steps."""
    return golf.Config(**{**golf.PRESETS["demo"], "preset": "demo",  # type: ignore[arg-type]
                          "compressor": "ans", "quantiser": "rate", **settings})


def small(**settings: object) -> golf.Config:
    """The same in a tenth of the time."""
    shapes = {"vocab_size": 512, "num_layers": 3, "loop_end": 1, "model_dim": 64,
              "parallel_residual_start": 2}
    return demo(**{**shapes, **settings})


def random_model(config: golf.Config) -> golf.GPT:
    """Weights of trained size whose rows and columns differ, as after training."""
    model = golf.GPT(config, golf.sdpa_attend)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.stacks().values():
            shape = parameter.shape
            rows, columns = torch.randn(*shape[:-1], 1, generator=generator), torch.randn(
                *shape[:-2], 1, shape[-1], generator=generator)
            size = (0.3 * rows + 0.2 * columns).exp() / math.sqrt(shape[-1])
            parameter.copy_(torch.randn(shape, generator=generator) * size)
    return model


def measured(model: golf.GPT, sequences: int = 16) -> dict[str, Tensor]:
    """Hessians and gradients on random tokens."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(model.config.vocab_size, (sequences, 65), generator=generator)
    hessians = golf.Hessians(model)
    golf.collect(hessians, rows.int(), golf.depth_plans(model.config)[-1])
    return hessians.moments


@pytest.fixture(scope="module")
def model() -> golf.GPT:
    return random_model(small())


@pytest.fixture(scope="module")
def hessians(model: golf.GPT) -> dict[str, Tensor]:
    return measured(model)


def correlated(columns: int, seed: int = 0) -> Tensor:
    """A Hessian of inputs near a subspace, with unequal columns."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1500, columns // 4, generator=generator) @ torch.randn(
        columns // 4, columns, generator=generator)
    x += 0.3 * torch.randn(1500, columns, generator=generator)
    x *= (0.7 * torch.randn(columns, generator=generator)).exp()
    return x.T @ x / 1500


def output_error(w: Tensor, stored: Tensor, hessian: Tensor) -> float:
    """trace((W-Q) H (W-Q)^T) in float64."""
    d = (w - stored).double()
    return float(torch.einsum("rc,cd,rd->", d, hessian.double(), d))


def solve_balanced(w: Tensor, hessian: Tensor, unit: float, cost: float) -> tuple[Tensor, Tensor]:
    """Integers, and the weights that they stand for."""
    known = {"head": torch.eye(len(hessian)), "up.0": hessian, "up.0.rows": torch.ones(1, len(w))}
    order, factor = golf.prepare_solver(hessian, 0.01)
    scale, column = golf.balanced_steps(w, known, "up.0", (order, factor), unit)
    steps = (w / scale[:, None] / column).T[order]
    solved = golf.gptq(steps[None], (factor / column[order])[None], 127, cost)[0]
    q = torch.empty_like(w, dtype=torch.int8)
    q[:, order] = solved.T.to(torch.int8)
    return q, q * scale[:, None].float() * column


def coded_bits(q: Tensor) -> float:
    """Bits per level of the coder."""
    return 8 * len(golf.encode_levels(q.numpy()[None])) / q.numel()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("unit", [100.0, 400.0])
def test_error_is_far_below_rounding_at_equal_rate(seed: int, unit: float) -> None:
    w = torch.randn(384, 192, generator=torch.Generator().manual_seed(seed + 5))
    hessian = correlated(192, seed)
    q, stored = solve_balanced(w, hessian, unit, 0.04)
    wanted, low, high = coded_bits(q), 0.001, 8.0
    for _ in range(14):  # the step at which rounding to nearest needs as many bits, or a few more
        step = math.sqrt(low * high)
        nearest = (w / step).round().clamp(-127, 127)
        low, high = (low, step) if coded_bits(nearest.to(torch.int8)) < wanted else (step, high)
    nearest = (w / low).round().clamp(-127, 127)
    assert coded_bits(nearest.to(torch.int8)) >= wanted - 0.01
    assert output_error(w, stored, hessian) < 0.5 * output_error(w, nearest * low, hessian)


def test_cost_of_bits_lowers_the_rate_for_little_error() -> None:
    """Six decibels buy a bit; a moved threshold may not cost much more than that."""
    w, hessian = torch.randn(512, 128, generator=torch.Generator().manual_seed(0)), correlated(128)
    plain, cheap = (solve_balanced(w, hessian, 700.0, cost) for cost in (0.0, 0.04))
    saved = coded_bits(plain[0]) - coded_bits(cheap[0])
    assert saved > 0
    assert output_error(w, cheap[1], hessian) < 1.03 * 4**saved * output_error(w, plain[1], hessian)


def test_steps_are_coarse_floats_that_follow_gradient_and_pivot() -> None:
    w, hessian = torch.randn(96, 64, generator=torch.Generator().manual_seed(0)), torch.eye(64)
    hessian[7, 7], gradient = 16.0, torch.ones(1, 96)
    gradient[0, 5] = 81.0
    known = {"head": torch.eye(64), "up.0": hessian, "up.0.rows": gradient}
    scale, column = golf.balanced_steps(
        w, known, "up.0", golf.prepare_solver(hessian, 1e-6), 500.0)
    assert scale.dtype == column.dtype == torch.float16
    assert not (scale.view(torch.int16) & 127).any()
    assert not (column.view(torch.int16) & 255).any()
    assert float(column[7] / column[8]) == pytest.approx(1 / 4, rel=0.15)
    ratio = ((81 + 0.1 * 1.83) / (1 + 0.1 * 1.83)) ** -0.25
    assert float(scale[5] / scale[6]) == pytest.approx(ratio, rel=0.15)


def test_no_level_is_clipped_however_fine_the_step() -> None:
    w, hessian = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)), correlated(64)
    w[3] *= 1e4
    _, stored = solve_balanced(w, hessian, 1e-6, 0.0)
    assert ((w - stored).abs().amax(1) / w.abs().amax(1)).max() < 0.15
    zero, stored = solve_balanced(torch.zeros(4, 64), hessian, 1.0, 0.04)
    assert not zero.any() and bool(torch.isfinite(stored).all())


def test_gradients_are_means_over_tokens_and_visits(model: golf.GPT,
                                                    hessians: dict[str, Tensor]) -> None:
    tokens = float(hessians["head"].trace()) / model.config.model_dim
    assert tokens == pytest.approx(16 * 64, rel=1e-3)
    for name, parameter in model.stacks().items():
        rows = hessians[golf.hessian_name(name, 0) + ".rows"]
        assert rows.shape == (1, parameter.shape[-2])
        assert bool(torch.isfinite(rows).all()) and bool((rows >= 0).all()) and bool(rows.any())
    assert all(p.grad is None for p in model.parameters())


def fit(model: golf.GPT, hessians: dict[str, Tensor],
        config: golf.Config) -> tuple[golf.QuantisedModel, bytes, Log]:
    log, before = Log(), model.config
    model.config = config
    plan = golf.depth_plans(config)[-1]
    try:
        return *golf.fit_to_cap(model, hessians, plan, golf.World(), log), log  # type: ignore[arg-type]
    finally:
        model.config = before


@pytest.mark.parametrize("model_bytes", [60_000, 25_000])
def test_search_lands_just_under_the_cap(model: golf.GPT, hessians: dict[str, Tensor],
                                         model_bytes: int) -> None:
    config = small(artifact_cap_bytes=PROGRAM_BYTES + model_bytes)
    quantised, blob, log = fit(model, hessians, config)
    unused = config.artifact_cap_bytes - PROGRAM_BYTES - len(blob)
    assert 0 <= unused <= 0.005 * config.artifact_cap_bytes
    assert len([line for line in log.lines if line.startswith("fit:")]) <= 8
    found = golf.decode_artifact(blob, config)[1]
    assert found.floats.keys() == quantised.floats.keys()
    for name, q in quantised.integers.items():
        assert torch.equal(found.integers[name], q)
        assert torch.equal(golf.stored_weights(found, name), golf.stored_weights(quantised, name))


@pytest.mark.parametrize("cap", [1_000_000, 4_000_000])
def test_generous_caps_of_the_demo_fit_in_few_passes(cap: int) -> None:
    config = demo(artifact_cap_bytes=cap)
    model = random_model(config)
    _, blob, log = fit(model, measured(model), config)
    assert PROGRAM_BYTES + len(blob) <= cap
    assert len([line for line in log.lines if line.startswith("fit:")]) <= 4


def test_cap_that_nothing_fits_is_refused(model: golf.GPT, hessians: dict[str, Tensor]) -> None:
    cap = PROGRAM_BYTES + 500
    with pytest.raises(golf.ArtifactError, match=rf"ARTIFACT_CAP_BYTES \({cap:,}\)"):
        fit(model, hessians, small(artifact_cap_bytes=cap))


class FakeSize:
    """Quantiser and encoder whose sizes obey a law, to watch the search alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, law: object) -> None:
        self.asked: list[tuple[float, int]] = []
        monkeypatch.setattr(golf, "quantise", self.quantise)
        monkeypatch.setattr(golf, "encode_artifact", lambda q, config, plan: bytes(q))
        self.law = law

    def quantise(self, model: object, hessians: object, world: object, widen: float,
                 known: object) -> int:
        assert callable(self.law)
        size = max(0, int(self.law(math.log2(widen))))
        self.asked.append((math.log2(widen), size))
        return size


@pytest.mark.parametrize("quantiser", ["gptq", "rate"])
@pytest.mark.parametrize("law", ["straight", "curved", "steps"])
@pytest.mark.parametrize("first", [200_000, 600_000, 2_000_000])
def test_search_terminates_between_what_is_known(
        model: golf.GPT, monkeypatch: pytest.MonkeyPatch, quantiser: str, law: str,
        first: int) -> None:
    """The bracket never widens, its ends never swap, and the last word fits."""
    laws = {"straight": lambda at: first - 100_000 * at, "curved": lambda at: first * 2**-at,
            "steps": lambda at: first - 1500 * math.floor(60 * at)}
    sizes, cap = FakeSize(monkeypatch, laws[law]), 500_000 + PROGRAM_BYTES
    _, blob, _ = fit(model, {}, small(quantiser=quantiser, artifact_cap_bytes=cap))
    assert len(blob) <= 500_000
    free = quantiser == "rate" or first > 500_000
    if free:
        assert len(blob) > 500_000 - 0.005 * cap or min(at for at, _ in sizes.asked) == -3.0
    else:
        assert [at for at, _ in sizes.asked] == [0.0]
    low, high = -math.inf, math.inf
    for at, size in sizes.asked:
        assert low < at < high
        low, high = (low, at) if size <= 500_000 else (at, high)
    assert len(sizes.asked) <= 20


class Half(golf.World):
    """One of two ranks, alone: its sums hold its own share."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank, 2)

    def combine(self, tensor: Tensor) -> Tensor:
        return tensor


def test_two_ranks_find_the_integers_of_one(model: golf.GPT, hessians: dict[str, Tensor]) -> None:
    alone = golf.quantise(model, hessians, golf.World())
    halves = [golf.quantise(model, hessians, Half(rank)) for rank in range(2)]
    for name, q in alone.integers.items():
        assert torch.equal(sum(half.integers[name] for half in halves), q)
        for key in (f"{name}.scale", f"{name}.column"):
            assert torch.equal(sum(half.floats[key] for half in halves), alone.floats[key])


def test_balanced_model_is_closer_at_equal_bytes(model: golf.GPT,
                                                 hessians: dict[str, Tensor]) -> None:
    """Loss against the loss before, on other tokens, for clips and for balanced steps."""
    config = small(artifact_cap_bytes=PROGRAM_BYTES + 50_000)
    rows = torch.from_numpy(np.random.default_rng(7).integers(0, 512, (8, 65)))
    plan = golf.depth_plans(config)[-1]

    @torch.no_grad()
    def logits(network: golf.GPT) -> Tensor:
        return network.hidden(rows[:, :-1], plan) @ network.embed.T

    wanted, errors = logits(model), {}
    for quantiser in ("gptq", "rate"):
        settings = replace(config, quantiser=quantiser)  # type: ignore[arg-type]
        quantised, blob, _ = fit(model, hessians, settings)
        assert len(blob) <= 50_000
        other = golf.GPT(settings, golf.sdpa_attend)
        golf.restore_weights(other, quantised)
        errors[quantiser] = float((logits(other) - wanted).square().mean())
    assert errors["rate"] < 0.9 * errors["gptq"]
