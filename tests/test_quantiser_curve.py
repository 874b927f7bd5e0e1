"""The curve of gaps: rows at equal bytes, kept one by one, from one checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toy import random_tokens, tiny_env

import train_gpt as golf
from tools import quantiser_curve
from tools.runs import RunError

CAPS = [quantiser_curve.CODE_BYTES + size for size in (24_000, 32_000)]
DEFAULT = ("reference", "coder", "rate_distortion")
ROW = {"method", "total_bytes", "gap_bpb", "checkpoint_run_id"}


@pytest.fixture(scope="module")
def env(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return tiny_env(data_dir, tmp_path_factory.mktemp("curve"), ITERATIONS=24)


@pytest.fixture(scope="module")
def checkpoint(env: dict[str, str]) -> Path:
    """Trained by the tool."""
    assert quantiser_curve.main(["--train-only"], env) == 0
    return Path(env["RUN_DIR"], "toy", "checkpoint.pt")


def measure(checkpoint: Path, env: dict[str, str], out: Path, *more: str) -> tuple[int, dict]:
    caps = ",".join(map(str, CAPS))
    status = quantiser_curve.main(
        ["--weights", str(checkpoint), "--caps", caps, "--out", str(out), *more], env)
    return status, json.loads(out.read_text())


def test_every_method_lands_just_under_every_cap(
        checkpoint: Path, env: dict[str, str], tmp_path: Path,
        capsys: pytest.CaptureFixture[str]) -> None:
    status, content = measure(checkpoint, env, tmp_path / "curve.json")
    assert status == 0
    rows = content["rows"]
    assert [(r["cap_bytes"], r["method"]) for r in rows] == [
        (cap, method) for cap in CAPS for method in DEFAULT]
    for row in rows:
        assert row.keys() >= ROW
        assert row["checkpoint_run_id"] == "toy"
        assert 0.99 * row["cap_bytes"] < row["total_bytes"] <= row["cap_bytes"]
        assert row["gap_bpb"] == row["bpb"] - content["bpb_before"]
        assert all(value >= 0 for key, value in row.items() if key.startswith("seconds_"))
    assert all(method in capsys.readouterr().out for method in ["reference"])

    # Another call repeats nothing, and measures what is missing.
    content["rows"] = [row for row in rows if row["method"] != "coder"]
    (tmp_path / "curve.json").write_text(json.dumps(content))
    again = measure(checkpoint, env, tmp_path / "curve.json")[1]["rows"]
    assert [row for row in again if row["method"] != "coder"] == content["rows"]
    assert [(r["method"], r["total_bytes"]) for r in again] == [
        (r["method"], r["total_bytes"]) for r in rows]


def test_tuning_keeps_the_integers_and_comes_closer(
        checkpoint: Path, env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantiser_curve, "TUNE_STEPS", 8)
    found = quantiser_curve.load(checkpoint, env, golf.World().device)
    config = replace(found.config, quantiser="rate", compressor="ans")
    teacher, student = (found.model(config, golf.World().device) for _ in range(2))
    quantised = golf.quantise(teacher, found.hessians, golf.World(), 20.0)
    tuned = quantiser_curve.tune(quantised, teacher, student, found)
    assert all(torch.equal(tuned.integers[name], q) for name, q in quantised.integers.items())
    assert {n: (t.dtype, t.shape) for n, t in tuned.floats.items()} == {
        n: (t.dtype, t.shape) for n, t in quantised.floats.items()}
    ids, errors = random_tokens(8, 64, seed=5), []
    with torch.no_grad():
        wanted = quantiser_curve.log_probabilities(teacher, ids, found.plan)
        for stored in (quantised, tuned):
            golf.restore_weights(student, stored)
            got = quantiser_curve.log_probabilities(student, ids, found.plan)
            errors.append(float((wanted.exp() * (wanted - got)).sum()))
    assert 0 < errors[1] < errors[0]


def test_rows_outlive_what_stops_the_tool(checkpoint: Path, env: dict[str, str], tmp_path: Path,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    impossible = str(quantiser_curve.CODE_BYTES + 100)
    out = tmp_path / "curve.json"
    status = quantiser_curve.main(
        ["--weights", str(checkpoint), "--caps", f"{CAPS[1]},{impossible}", "--out", str(out),
         "--methods", "coder"], env)
    assert status == 1
    assert "nothing under" in capsys.readouterr().err
    assert [row["cap_bytes"] for row in json.loads(out.read_text())["rows"]] == [CAPS[1]]


def test_checkpoint_serves_both_quantisers(checkpoint: Path, env: dict[str, str]) -> None:
    found = quantiser_curve.load(checkpoint, env, golf.World().device)
    assert found.config.quantiser == "gptq"
    assert {name.removesuffix(".rows") for name in found.hessians if name.endswith(".rows")} == {
        name for name in found.hessians if not name.endswith(".rows")}
    assert found.config.compile is False
    assert found.plan.name == "looped"


@pytest.mark.parametrize("arguments", [
    ["--methods", "magic"], ["--caps", "16MB"], ["--caps", "1000000,0"],
    ["--weights", "x", "--whole-run"]])
def test_wrong_arguments_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        quantiser_curve.main(arguments, {})
    assert stop.value.code == 2


def test_foreign_checkpoint_is_refused(env: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "foreign.pt"
    path.write_bytes(b"cos\nsystem\n.")  # a pickle that torch refuses in many lines
    with pytest.raises(golf.ArtifactError, match=r"foreign\.pt") as refused:
        quantiser_curve.main(["--weights", str(path)], env)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"rows": [1]}'])
def test_a_file_that_is_no_curve_is_refused_before_training(
        env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        content: str) -> None:
    monkeypatch.delattr(quantiser_curve, "train")
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(RunError, match=r"other\.json: "):
        quantiser_curve.main(["--out", str(tmp_path / "other.json")], env)
    assert (tmp_path / "other.json").read_text() == content
