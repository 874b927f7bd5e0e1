"""tools/adaptation_curve.py: its points are the scores of the program's own evaluations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from toy import read_result, tiny_env

import train_gpt as golf
from tools import adaptation_curve
from tools.runs import RunError


def test_points_are_scores_of_the_artifact_and_are_not_measured_twice(
    data_dir: Path, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    artifact, out = trained_run / "runs" / "toy" / "artifact.bin", tmp_path / "curve.json"
    env = tiny_env(data_dir, tmp_path, TTT_LORA_LR=0.01, TTT_LORA_RANK=4, TTT_LORA_ALPHA=4,
                   TTT_MODE="documents", VAL_TAIL=1, EVAL_ONLY=artifact, RUN_ID="again")
    command = [str(artifact), "--documents", "0", "--out", str(out), "--point", "",
               "--point", "TTT_LORA_RANK=2"]
    assert adaptation_curve.main(command, env) == 0
    content = json.loads(out.read_text())
    first, second = content["rows"]
    golf.main(env)
    whole = read_result(tmp_path, "again")["bpb"]
    assert first["plain_bpb"] == pytest.approx(whole["documents"], abs=1e-6)
    assert first["adapted_bpb"] == pytest.approx(whole["ttt_documents"], abs=1e-5)
    assert first["gain_bpb"] == first["plain_bpb"] - first["adapted_bpb"] != 0
    assert second["plain_bpb"] == first["plain_bpb"]
    assert second["adapted_bpb"] != first["adapted_bpb"]
    assert content["artifact_sha256"] == golf.digest(artifact.read_bytes())
    monkeypatch.setattr(adaptation_curve, "measure", None)
    assert adaptation_curve.main(command, env) == 0


def test_first_documents_end_with_a_document(
    data_dir: Path, tmp_path: Path, val_stream: golf.ValStream,
) -> None:
    config = golf.Config.from_env(tiny_env(data_dir, tmp_path))
    part = adaptation_curve.first_documents(config, 3)
    stop = int(val_stream.document_stops[2])
    assert part.num_targets == stop
    assert (part.document_stops == val_stream.document_stops[:3]).all()
    assert (part.target_bytes == val_stream.target_bytes[:stop]).all()
    assert adaptation_curve.first_documents(config, 0).num_targets >= val_stream.num_targets


def test_first_documents_keep_their_bytes_of_raw_text(
    data_dir: Path, tmp_path: Path, val_stream: golf.ValStream, monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = golf.Config.from_env(tiny_env(data_dir, tmp_path))
    sidecar = np.where(val_stream.tokens == golf.BOS_ID, 0, np.arange(val_stream.tokens.size) % 7)
    whole = golf.ValStream(val_stream.tokens, golf.token_bytes(golf.load_tokenizer(
        config.tokenizer_file, config.vocab_size)), config.eval_seq_len, True, sidecar)
    monkeypatch.setattr(golf.ValStream, "load", lambda config: whole)
    part = adaptation_curve.first_documents(config, 2)
    assert part.transformed
    assert part.num_bytes == sidecar[1:part.num_targets + 1].sum()


@pytest.mark.parametrize(("point", "message"), [
    ("TTT_CHUNK_SIZE", "must be NAME=value"), ("TTT_CHUNK_SIZE=0", "between 1 and"),
    ("TTT_CHUNK_SIZES=4", "did you mean TTT_CHUNK_SIZE"),
    ("TTT_CHUNK_SIZE=4 NOPE=3", "NOPE is no setting of train_gpt.py")])
def test_a_point_that_is_no_setting_is_refused(
    data_dir: Path, tmp_path: Path, point: str, message: str,
) -> None:
    with pytest.raises(golf.ConfigError, match=message):
        adaptation_curve.main(["none.bin", "--point", point], tiny_env(data_dir, tmp_path))


def test_a_file_that_is_no_artifact_is_refused(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"not one")
    with pytest.raises(golf.ArtifactError, match="other"):
        adaptation_curve.main([str(tmp_path / "other"), "--point", ""],
                              tiny_env(data_dir, tmp_path))


def test_a_file_that_is_no_curve_is_refused(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(RunError, match=r"list\.json: a list, not a mapping"):
        adaptation_curve.main(["none.bin", "--point", "", "--out", str(tmp_path / "list.json")],
                              tiny_env(data_dir, tmp_path))


def test_fewer_than_no_documents_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        adaptation_curve.main(["none.bin", "--documents", "-1"], {})
    assert stop.value.code == 2
    assert "-1 is not between 0 and" in capsys.readouterr().err
