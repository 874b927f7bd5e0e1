"""Section 5: Muon and AdamW against the published formulas, in float64, one matrix at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from toy import MakeConfig, SilentLog, random_model

import train_gpt as golf

PR1493 = golf.Config.from_env({"PRESET": "pr1493"})


@pytest.mark.parametrize(("progress", "scale"), [
    (0.0, 1.0), (0.28, 1.0), (0.64, 0.5), (0.82, 0.25), (1.0, 0.0)])
def test_published_learning_rate_schedule(progress: float, scale: float) -> None:
    assert golf.lr_scale(PR1493, 0, progress) == pytest.approx(scale, abs=1e-12)


def test_learning_rate_floor() -> None:
    assert golf.lr_scale(golf.Config(min_lr=0.1), 0, 1.0) == 0.1
    assert golf.lr_scale(golf.Config(min_lr=0.1), 0, 0.99) == 0.1
    assert golf.lr_scale(golf.Config(min_lr=0.1), 0, 0.1) == 1.0


@pytest.mark.parametrize(("step", "momentum"), [
    (0, 0.92), (750, 0.955), (1500, 0.99), (20_000, 0.99)])
def test_published_momentum_schedule(step: int, momentum: float) -> None:
    assert golf.muon_momentum(step, PR1493) == pytest.approx(momentum, abs=1e-12)


def newton_schulz(g: Tensor, iterations: int) -> Tensor:
    """spec/pr1493.md section 4.2, steps 3 and 4, in float64."""
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        A = x @ x.T
        x = 3.4445 * x + (-4.7750 * A + 2.0315 * A @ A) @ x
    return x.T if g.shape[0] > g.shape[1] else x


@pytest.mark.parametrize("shape", [(16, 48), (32, 128), (8, 200)])
def test_orthogonalised_updates_have_singular_values_near_one(shape: tuple[int, int]) -> None:
    g = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0))
    x = golf.orthogonalise(g, 5)
    values = torch.linalg.svdvals(x.double())
    assert values.min() > 0.67  # the quintic has its minimum at 0.68
    assert values.max() < 1.2
    for one, each in zip(x, g, strict=True):
        wanted = newton_schulz(each.double(), 5)
        assert (one.double() - wanted).norm() < 0.02 * wanted.norm()


def test_no_iteration_only_normalises() -> None:
    g = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    x = golf.orthogonalise(g, 0).double()
    assert x.norm(dim=(1, 2)).tolist() == pytest.approx([1.0, 1.0], abs=0.01)


ROWS = {"q": (0, 32), "k": (32, 48), "v": (48, 64)}


def logical_matrices(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each of the thirty matrices of the tiny model by itself."""
    found = {}
    for layer in range(5):
        for role, (first, last) in ROWS.items():
            found[f"{role}{layer}"] = tensors["qkv"][layer, first:last]
        for role in ("out", "up", "down"):
            found[f"{role}{layer}"] = tensors[role][layer]
    return {name: matrix.detach().double().clone() for name, matrix in found.items()}


def random_gradients(model: golf.GPT, seed: int, size: float) -> dict[str, Tensor]:
    """Gradients whose rows, columns and matrices differ in length, so that normalising shows."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def uneven(shape: torch.Size) -> Tensor:
        return size * noise(*shape) * noise(*shape[:-1], 1).exp() * noise(shape[-1]).exp()

    return {name: uneven(p.shape) for name, p in model.named_parameters()}


@pytest.mark.parametrize("clip", [0.0, 0.3])
@pytest.mark.parametrize("normalise", [0, 1])
def test_muon_equals_the_published_formulas(make_config: MakeConfig, clip: float,
                                            normalise: int) -> None:
    config = make_config(GRAD_CLIP_NORM=clip, MUON_ROW_NORMALIZE=normalise, MLP_MULT=4,
                         MATRIX_LR=0.05, MUON_WD=0.5)
    model = random_model(config)
    optimizer = golf.Optimizer(model, config, golf.World())
    start = logical_matrices(dict(model.named_parameters()))
    wanted = {name: w.clone() for name, w in start.items()}
    buffers = {name: torch.zeros_like(w) for name, w in wanted.items()}
    for step, size in enumerate((1e-3, 1.0, 1e-2)):
        gradients = random_gradients(model, step, size)
        norm = torch.cat([g.double().flatten() for g in gradients.values()]).norm()
        shrink = min(1.0, clip / (norm.item() + 1e-6)) if clip else 1.0
        momentum = 0.92 + (config.muon_momentum - 0.92) * min(step / 4, 1)
        for name, g in logical_matrices(gradients).items():
            buffers[name] = momentum * buffers[name] + shrink * g
            update = shrink * g + momentum * buffers[name]
            if normalise:
                update = update / update.norm(dim=1, keepdim=True).clamp_min(1e-7)
            update = newton_schulz(update, 5)
            factor = math.sqrt(max(1.0, g.shape[0] / g.shape[1]))
            wanted[name] *= 1 - 0.05 * 0.75 * 0.5
            wanted[name] -= 0.05 * 0.75 * factor * update
        for name, p in model.named_parameters():
            p.grad = gradients[name].clone()
        found_norm = optimizer.step(step, 0.75)
        assert found_norm.item() == pytest.approx(norm.item(), rel=1e-4)
    found = logical_matrices(dict(model.named_parameters()))
    for name, w in found.items():
        # bf16 carries three digits, and each of the three updates is about as long as the others.
        moved = (wanted[name] - start[name]).norm()
        assert (w - wanted[name]).norm() < 0.03 * moved, name


def test_tall_matrix_moves_twice_as_far_as_a_wide_one(make_config: MakeConfig) -> None:
    config = make_config(MLP_MULT=4, MUON_WD=0)
    model = random_model(config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.grad = random_gradients(model, 0, 1.0)[name]
    golf.Optimizer(model, config, golf.World()).step(0, 1.0)
    moved = {role: torch.linalg.svdvals((p - before[role])[0].detach()).median().item()
             for role, p in model.named_parameters() if role in ("up", "down")}
    assert moved["up"] / moved["down"] == pytest.approx(2.0, rel=0.15)
    assert moved["down"] == pytest.approx(config.matrix_lr, rel=0.25)


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_everything_else_is_adamw(make_config: MakeConfig, clip: float) -> None:
    config = make_config(GRAD_CLIP_NORM=clip, EMBED_WD=0.5, ADAM_WD=0.25, TIED_EMBED_LR=0.03,
                         SCALAR_LR=0.02, ADAM_EPS=1e-4)
    model = random_model(config)
    optimizer = golf.Optimizer(model, config, golf.World())
    names = ["embed", *model.vectors()]
    wanted = {name: model.get_parameter(name).detach().double().clone() for name in names}
    first = {name: torch.zeros_like(w) for name, w in wanted.items()}
    second = {name: torch.zeros_like(w) for name, w in wanted.items()}
    for step in range(1, 5):
        gradients = random_gradients(model, step, 0.01 * step)
        norm = torch.cat([g.double().flatten() for g in gradients.values()]).norm().item()
        shrink = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
        scale = 1 / step
        for name in names:
            g = shrink * gradients[name].double()
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.95 * second[name] + 0.05 * g * g
            lr = scale * (0.03 if name == "embed" else 0.02)
            wanted[name] *= 1 - lr * (0.5 if name == "embed" else 0.25)
            average, square = first[name] / (1 - 0.9**step), second[name] / (1 - 0.95**step)
            wanted[name] -= lr * average / (square.sqrt() + 1e-4)
        for name, p in model.named_parameters():
            p.grad = gradients[name].clone()
        optimizer.step(step - 1, scale)
    for name, w in wanted.items():
        torch.testing.assert_close(model.get_parameter(name).detach().double(), w, rtol=1e-4,
                                   atol=1e-5)


def test_every_weight_is_in_exactly_one_group(config: golf.Config) -> None:
    model = golf.GPT(config, golf.sdpa_attend)
    optimizer = golf.Optimizer(model, config, golf.World())
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        for group in optimizer.groups:
            for matrix in group.matrices:
                matrix.parameter.data[:, matrix.rows].add_(1)
        for adam_group in optimizer.adam.param_groups:
            for p in adam_group["params"]:
                p.add_(1)
    for name, p in model.named_parameters():
        assert bool((p == 1).all()), name
    in_muon = sum(p.numel() for name, p in model.named_parameters()
                  if name in ("qkv", "out", "up", "down"))
    assert in_muon == golf.count_parameters(model)["matrix"][1]


def test_parameter_without_a_group_cannot_be(config: golf.Config) -> None:
    """What is neither matrix nor table trains with the scalars, and is stored with them."""
    model = golf.GPT(config, golf.sdpa_attend)
    model.extra = torch.nn.Parameter(torch.zeros(3))
    optimizer = golf.Optimizer(model, config, golf.World())
    assert any(p is model.extra for p in optimizer.adam.param_groups[1]["params"])
    assert any(p is model.extra for p in optimizer.replicated)
    assert model.vectors()["extra"] is model.extra


def test_gradients_are_cleared_and_a_zero_rate_changes_nothing(config: golf.Config) -> None:
    model = random_model(config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.grad = random_gradients(model, 0, 1.0)[name]
    golf.Optimizer(model, config, golf.World()).step(0, 0.0)
    for name, p in model.named_parameters():
        assert p.grad is None
        assert torch.equal(p, before[name])


def test_average_follows_its_formula(config: golf.Config, log: SilentLog) -> None:
    trainer = golf.Trainer(config, golf.World(), log, golf.sdpa_attend)
    model = trainer.model
    shadow = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    for step in range(4):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.add_(random_gradients(model, step, 0.1)[name])
                shadow[name] = 0.75 * shadow[name] + 0.25 * p.double()
        trainer.update_average(0.25)
    for name, found in zip(shadow, trainer.shadow, strict=True):
        torch.testing.assert_close(found.double(), shadow[name], rtol=1e-5, atol=1e-6)
