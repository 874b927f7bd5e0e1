"""tools/published_mixture.py: it is the published formula, and says that this is no score."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from documents import make_scorer, stream_of, text
from toy import MakeConfig, read_result, tiny_env

import train_gpt as golf
from tools import published_mixture


def published(tokens: list[int], nats: list[float], entropy: list[float]) -> tuple[float, float]:
    """Number and mean mass of the formula, target by target, with batches of 100 from 300 on."""
    size, weights = 384, [2.0, 0.0, 0.0, 0.0, 0.0]
    seen: dict[tuple[object, ...], float] = {}
    total, masses = 0.0, []

    def keys(t: int) -> list[tuple[object, ...]]:
        a, b = tokens[t - 1] if t else 0, tokens[t]
        return [("one",), ("two", b), ("three", ((36313 * a) ^ (27191 * b)) & 0xFFFF)]

    def credits(t: int, y: int, neural: float) -> list[float]:
        found = [neural]
        for key, (add, least) in zip(keys(t), ((0.1, 0), (0.1, 0), (0.01, 1)), strict=True):
            found.append((seen.get((*key, y), 0) + add)
                         / (max(seen.get(key, 0), least) + add * size))
        return [*found, math.exp(-entropy[t])]

    for first in range(0, len(nats), 100):
        batch, costs = range(first, min(first + 100, len(nats))), [0.0] * 5
        share = [math.exp(w) / sum(map(math.exp, weights)) for w in weights]
        for t in batch:
            each = credits(t, tokens[t + 1], math.exp(-nats[t]))
            costs = [cost - math.log(p) for cost, p in zip(costs, each, strict=True)]
            mixed = -math.log(sum(w * p for w, p in zip(share, each, strict=True)))
            total += mixed if first >= 300 else nats[t]
        if first >= 300:
            masses.append(sum(w * p for y in range(size) for w, p in
                              zip(share, credits(first, y, 1 / size), strict=True)))
            weights = [w - 0.1 * c / len(batch) for w, c in zip(weights, costs, strict=True)]
        for t in batch:
            for key in keys(t):
                seen[key] = seen.get(key, 0) + 1
                seen[(*key, tokens[t + 1])] = seen.get((*key, tokens[t + 1]), 0) + 1
    return total / len(nats), sum(masses) / len(masses)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published_mixture, "BATCH", 100)
    monkeypatch.setattr(published_mixture, "START", 300)


def test_it_is_its_formula_and_no_distribution(make_config: MakeConfig) -> None:
    tokens = np.tile(text(150), 5)
    plain = make_scorer(make_config(), stream_of(tokens))
    scorer = published_mixture.EntropyScorer(plain.model, plain.plan, plain.stream, plain.world)
    found, mass = published_mixture.published_mixture(scorer)
    nats, entropy = scorer.last.kept.tolist()
    with torch.no_grad():
        row = torch.from_numpy(scorer.stream.tokens)[None, :64]
        logits = 30 * torch.tanh(scorer.model.logits(scorer.model.hidden(row, scorer.plan)) / 30)
    wanted = torch.distributions.Categorical(logits=logits.view(64, -1)).entropy()
    torch.testing.assert_close(torch.tensor(entropy[:64]), wanted, rtol=1e-4, atol=1e-4)
    assert (found, mass) == pytest.approx(published(tokens.tolist(), nats, entropy), rel=1e-5)
    assert abs(mass - 1) > 0.01


def test_tool_says_both_numbers_and_which_is_valid(
    data_dir: Path, trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    artifact, out = trained_run / "runs" / "toy" / "artifact.bin", tmp_path / "mixture.json"
    env = tiny_env(data_dir, tmp_path, SLIDING_WINDOW_ENABLED=1, TTT_ENABLED=0, EVAL_ONLY=artifact,
                   RUN_ID="again")
    assert published_mixture.main([str(artifact), "--out", str(out)], env) == 0
    golf.main(env)
    found = json.loads(out.read_text())
    sliding = read_result(tmp_path, "again")["nats"]["sliding"]
    assert found["sliding_nats"] == pytest.approx(sliding, abs=1e-5)
    assert abs(found["hedge1453"]["mass"] - 1) > 0.01
    assert "NOT A DISTRIBUTION, no score" in capsys.readouterr().out
    assert found["artifact_sha256"] == golf.digest(artifact.read_bytes())


def test_no_artifact_is_an_error(data_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(golf.ArtifactError, match=r"none\.bin"):
        published_mixture.main([str(tmp_path / "none.bin")], tiny_env(data_dir, tmp_path))
