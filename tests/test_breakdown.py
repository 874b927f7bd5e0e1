"""tools/breakdown.py: classes of targets add up to the score, parts to the file."""

from __future__ import annotations

from pathlib import Path

import pytest
from toy import MakeEnv, read_result, tiny_env

import train_gpt as golf
from tools import breakdown, figures
from tools.runs import load_run


@pytest.fixture(scope="module")
def evaluated(data_dir: Path, trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run in which the artifact of the toy run was broken down."""
    folder = tmp_path_factory.mktemp("breakdown")
    artifact = trained_run / "runs" / "toy" / "artifact.bin"
    assert breakdown.main([str(artifact)], tiny_env(data_dir, folder, RUN_ID="again")) == 0
    return folder


def test_scores_are_those_of_the_run_and_nothing_stays_wrapped(
    evaluated: Path, trained_run: Path,
) -> None:
    again, before = read_result(evaluated, "again"), read_result(trained_run)
    for name in ("quantised", "sliding", "ttt_sgd"):
        assert again["bpb"][name] == before["bpb"][name]
    assert "breakdown" not in str(golf.finish_score) + str(golf.log_score)


@pytest.mark.parametrize("key", ["document_length", "position", "stream"])
def test_classes_add_up_to_the_score(evaluated: Path, val_stream: golf.ValStream, key: str) -> None:
    result = read_result(evaluated, "again")
    rows = result["breakdown"][key]
    assert len(rows) > 1
    assert sum(row["bytes"] for row in rows) == val_stream.num_bytes
    for name, score in result["bpb"].items():
        mean = sum(row[name] * row["bytes"] for row in rows) / val_stream.num_bytes
        assert mean == pytest.approx(score, rel=1e-9)


def test_parts_add_up_to_the_file_and_all_is_drawn(evaluated: Path, trained_run: Path) -> None:
    run = load_run("again", evaluated / "logs")
    parts = run.table("artifact.parts")
    assert {"embed", "qkv", "vectors and scales"} <= set(parts)
    assert sum(parts.values()) == (trained_run / "runs" / "toy" / "artifact.bin").stat().st_size
    names = {item.name for item in figures.figures([run])}
    assert {"bpb_by_document_length", "bpb_by_position", "bpb_by_stream", "adaptation_gain",
            "bytes"} <= names


def test_file_that_is_no_artifact_is_refused(make_env: MakeEnv, capsys, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"not one")
    assert breakdown.main([str(tmp_path / "other")], make_env()) == 1
    assert "not an artifact" in capsys.readouterr().err
