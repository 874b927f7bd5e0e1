"""One rank equals several: collectives, optimizer, calibration, integers, scores, whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch
from ranks import Measured
from torch import Tensor
from toy import random_model, read_result

import train_gpt as golf


def part(measured: Measured, name: str) -> Measured:
    """A nested measurement."""
    return cast(Measured, measured[name])


def tensors(measured: Measured, section: str, name: str) -> list[Tensor]:
    """A measured list of tensors, or of the values of a mapping in order."""
    value = part(measured, section)[name]
    return list(value.values()) if isinstance(value, dict) else cast("list[Tensor]", value)


def test_collectives(ranks: list[Measured]) -> None:
    size = len(ranks)
    whole = size * (size + 1) / 2
    mean = whole / size
    for rank, measured in enumerate(ranks):
        found = part(measured, "collectives")
        assert cast(Tensor, found["sum"]).tolist() == [whole, 2.0 * size]
        first, second = cast("list[Tensor]", found["sum_all"])
        assert first.tolist() == [[whole / 2] * 2] * 2
        assert second.tolist() == [whole * 5] * 3
        share = [[mean * row] * 3 for row in (2 * rank, 2 * rank + 1)]
        torch.testing.assert_close(found["share"], torch.tensor(share))
        assert cast(Tensor, found["gather"]).flatten().tolist() == [
            float(r + 1) for r in range(size) for _ in range(2)]
        assert found["decide"] == (1.0, 7.0)
        assert cast(Tensor, found["largest"]).item() == size


def test_a_world_of_one_changes_nothing() -> None:
    world, x = golf.World(), torch.arange(6.0).view(3, 2)
    assert world.combine(x) is x
    assert world.scatter_mean(x) is x
    assert world.gather(x) is x
    assert world.decide(1.5, 2.0) == (1.5, 2.0)


def test_optimizer_steps_equal_one_rank(ranks: list[Measured], alone: Measured,
                                        config: golf.Config) -> None:
    for measured in ranks:
        norms, wanted_norms = (cast(Tensor, part(m, "optimizer")["norms"])
                               for m in (measured, alone))
        torch.testing.assert_close(norms[0], wanted_norms[0], rtol=1e-5, atol=0)
        torch.testing.assert_close(norms, wanted_norms, rtol=1e-3, atol=0)
        start = random_model(config).parameters()
        triples = zip(tensors(measured, "optimizer", "weights"),
                      tensors(alone, "optimizer", "weights"), start, strict=True)
        for found, wanted, first in triples:
            # Newton-Schulz rounds to bf16, so a last-bit difference of gradients grows a little.
            assert (found - wanted).norm() < 0.03 * (wanted - first).norm()


def test_all_ranks_hold_the_same_weights_to_the_bit(ranks: list[Measured]) -> None:
    for section, name in (("optimizer", "weights"), ("scores", "adapted")):
        for measured in ranks[1:]:
            for mine, first in zip(tensors(measured, section, name),
                                   tensors(ranks[0], section, name), strict=True):
                assert torch.equal(mine, first)


def test_calibration_reads_the_same_windows(ranks: list[Measured], alone: Measured) -> None:
    for measured in ranks:
        found = cast("dict[str, Tensor]", part(measured, "calibration")["hessians"])
        wanted = cast("dict[str, Tensor]", part(alone, "calibration")["hessians"])
        assert found.keys() == wanted.keys()
        for name, hessian in found.items():
            torch.testing.assert_close(hessian, wanted[name], rtol=1e-3, atol=1e-3)


def test_integers_do_not_depend_on_the_world_size(ranks: list[Measured], alone: Measured) -> None:
    wanted = cast("dict[str, dict[str, Tensor]]", part(alone, "calibration")["quantised"])
    for measured in ranks:
        found = cast("dict[str, dict[str, Tensor]]", part(measured, "calibration")["quantised"])
        for kind in ("integers", "floats"):
            assert found[kind].keys() == wanted[kind].keys()
            for name, tensor in found[kind].items():
                assert torch.equal(tensor, wanted[kind][name]), (kind, name)


@pytest.mark.parametrize(("name", "tolerance"), [
    ("plain", 1e-6), ("sliding", 1e-6), ("adapting", 1e-4)])
def test_scores_equal_one_rank(ranks: list[Measured], alone: Measured, name: str,
                               tolerance: float) -> None:
    wanted = cast(float, part(alone, "scores")[name])
    for measured in ranks:
        assert part(measured, "scores")[name] == pytest.approx(wanted, abs=tolerance)


def test_learning_ends_where_one_rank_ends(ranks: list[Measured], alone: Measured) -> None:
    for found, wanted in zip(tensors(ranks[-1], "scores", "adapted"),
                             tensors(alone, "scores", "adapted"), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_target_scored_by_two_ranks_is_refused_on_all(ranks: list[Measured],
                                                      alone: Measured) -> None:
    assert alone["double"] == ""
    assert all("two ranks" in cast(str, measured["double"]) for measured in ranks)


def test_the_first_clock_decides_for_all(ranks: list[Measured]) -> None:
    decisions = cast("list[tuple[float, bool]]", ranks[0]["clock"])
    assert all(measured["clock"] == decisions for measured in ranks)
    # Rank 1 believes that 2 of its 2.5 seconds are gone, the last rank of three all of them.
    assert all(progress < 0.6 and not stop for progress, stop in decisions)


def test_whole_run_equals_one_rank(ranks: list[Measured], trained_run: Path) -> None:
    wanted = read_result(trained_run)
    for measured in ranks:
        found = part(measured, "result")
        assert found["world_size"] == len(ranks)
        for name, bits in cast("dict[str, float]", found["bpb"]).items():
            assert bits == pytest.approx(wanted["bpb"][name], abs=0.01), name
