"""Section 2: who the ranks are, and files that are complete or absent."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

import pytest
from toy import PROGRAM, MakeConfig

import train_gpt as golf


def test_world_of_one_without_torchrun() -> None:
    world = golf.World.from_env({})
    assert (world.rank, world.size, world.is_main) == (0, 1, True)


def test_world_that_torchrun_describes() -> None:
    world = golf.World.from_env({"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "0"})
    assert (world.rank, world.size, world.is_main) == (2, 3, False)


@pytest.mark.parametrize(("env", "named"), [
    ({"RANK": "0"}, "WORLD_SIZE"), ({"WORLD_SIZE": "8"}, "LOCAL_RANK"),
    ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK"),
    ({"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK"),
    ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK=2"),
    ({"RANK": "-1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK=-1"),
    ({"RANK": "0", "WORLD_SIZE": "0", "LOCAL_RANK": "0"}, "WORLD_SIZE")])
def test_incomplete_or_impossible_ranks_are_refused(env: dict[str, str], named: str) -> None:
    with pytest.raises(golf.ConfigError, match=named):
        golf.World.from_env(env)


def test_log_writes_text_events_and_result(
        make_config: MakeConfig, world: golf.World, tmp_path: Path,
        capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config()
    log = golf.RunLog(config, world)
    log.line("seen by people")
    log.line("only in the file", console=False)
    log.event("train", step=3, train_loss=2.5)
    log.warn("careful")
    log.put("train", steps=3)
    log.put("train", seconds=1.5)
    log.write_result("complete", "finished")
    assert capsys.readouterr().out == "seen by people\nwarning: careful\n"
    text = (tmp_path / "logs" / "toy.txt").read_text().splitlines()
    assert text == ["seen by people", "only in the file", "warning: careful"]
    lines = (tmp_path / "logs" / "toy.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    assert [event["event"] for event in events] == ["train", "warning", "result"]
    assert all(event["t"] >= 0 for event in events)
    assert (events[0]["step"], events[0]["train_loss"]) == (3, 2.5)
    assert events[1]["message"] == "careful"
    result = json.loads((tmp_path / "logs" / "toy.json").read_text())
    assert result["train"] == {"steps": 3, "seconds": 1.5}
    assert (result["status"], result["exit_reason"]) == ("complete", "finished")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", result["finished"])


def test_events_are_on_disk_before_the_run_ends(make_config: MakeConfig, world: golf.World,
                                                tmp_path: Path) -> None:
    log = golf.RunLog(make_config(), world)
    log.line("a")
    log.event("b")
    assert (tmp_path / "logs" / "toy.txt").read_text() == "a\n"
    assert json.loads((tmp_path / "logs" / "toy.jsonl").read_text())["event"] == "b"


def test_other_ranks_write_and_print_nothing(make_config: MakeConfig, tmp_path: Path,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    log = golf.RunLog(make_config(), golf.World(rank=1, size=2))
    log.line("a")
    log.event("b")
    log.warn("c")
    log.write_result("complete", "finished")
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


def test_run_id_is_never_used_twice(make_config: MakeConfig, world: golf.World,
                                    tmp_path: Path) -> None:
    first = golf.RunLog(make_config(), world)
    first.line("precious")
    first.write_result("complete", "finished")
    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    before = contents()
    with pytest.raises(golf.ConfigError, match="RUN_ID=toy"):
        golf.RunLog(make_config(), world)
    assert contents() == before


def test_artifact_of_an_earlier_run_is_never_overwritten(
        make_config: MakeConfig, world: golf.World, tmp_path: Path) -> None:
    artifact = golf.RunLog(make_config(), world).folder / "artifact.bin"
    artifact.write_bytes(b"precious")
    with pytest.raises(golf.ConfigError, match=r"RUN_ID|RUN_DIR"):
        golf.RunLog(make_config(LOG_DIR=tmp_path / "elsewhere"), world)


@pytest.mark.parametrize("run_id", ["../outside", "a/b", ".hidden", "a b", "a\nb", "é", "a:b"])
def test_run_id_that_is_no_file_name_is_refused(make_config: MakeConfig, world: golf.World,
                                                run_id: str) -> None:
    with pytest.raises(golf.ConfigError, match="RUN_ID"):
        golf.RunLog(make_config(RUN_ID=run_id), world)


@pytest.mark.parametrize("variable", ["LOG_DIR", "RUN_DIR"])
@pytest.mark.parametrize("below", [True, False])
def test_unwritable_folder_is_named(make_config: MakeConfig, world: golf.World, tmp_path: Path,
                                    variable: str, below: bool) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    with pytest.raises(golf.ConfigError) as error:
        golf.RunLog(make_config(**{variable: file / "sub" if below else file}), world)
    assert str(file) in str(error.value)


def test_default_run_id_is_preset_seed_and_time(make_config: MakeConfig, world: golf.World) -> None:
    log = golf.RunLog(make_config(RUN_ID="", SEED=7), world)
    assert re.fullmatch(r"demo-7-\d{8}T\d{6}", log.run_id)


def test_interrupted_write_leaves_the_old_file(tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    golf.write_atomically(path, b"old")

    def crash(descriptor: int) -> None:
        raise OSError(f"no space for {descriptor}")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="no space"):
        golf.write_atomically(path, b"new and longer")
    assert path.read_bytes() == b"old"


def test_written_file_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    path, reader = tmp_path / "result.json", tmp_path / "as_seen_by_a_reader"
    golf.write_atomically(path, b"old")
    os.link(path, reader)
    golf.write_atomically(path, b"new")
    assert (path.read_bytes(), reader.read_bytes()) == (b"new", b"old")
    assert sorted(tmp_path.iterdir()) == sorted([path, reader])


def test_program_source_is_the_file() -> None:
    assert golf.program_source() == PROGRAM.read_text(encoding="utf-8")


def test_pack_command_writes_what_counts(tmp_path: Path,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "packed.py"
    assert golf.command_line(["pack", str(out)]) == 0
    packed = out.read_bytes()
    assert packed == golf.packed_program()
    text = capsys.readouterr().out
    assert f"{len(packed):,} bytes" in text
    assert hashlib.sha256(packed).hexdigest() in text


@pytest.mark.parametrize("arguments", [["unpack"], ["pack"], ["pack", "a", "b"], ["--help"]])
def test_unknown_command_explains_the_program(arguments: list[str],
                                              capsys: pytest.CaptureFixture[str]) -> None:
    assert golf.command_line(arguments) == 1
    assert "pack OUT" in capsys.readouterr().err


def test_pack_into_a_missing_folder_is_one_line(tmp_path: Path,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    assert golf.command_line(["pack", str(tmp_path / "missing" / "packed.py")]) == 1
    assert re.fullmatch(r"error: .*missing.*\n", capsys.readouterr().err)


def test_error_is_one_line_and_a_failing_exit_code(monkeypatch: pytest.MonkeyPatch,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise golf.DataError("x.bin: broken")

    monkeypatch.setattr(golf, "main", fail)
    assert golf.command_line([]) == 1
    assert capsys.readouterr().err == "error: x.bin: broken\n"


def test_ranks_agree_on_the_default_run_id_whenever_they_get_to_it(
        make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config, names = make_config(RUN_ID=""), []
    for seconds in (1_700_000_000.9, 1_700_000_001.1):  # the clock goes on between two ranks
        monkeypatch.setattr(golf.time, "time", lambda seconds=seconds: seconds)
        names.append(golf.RunLog(config, golf.World(rank=1, size=2), 1_700_000_000.9).run_id)
    assert len(set(names)) == 1
    assert golf.RunLog(config, golf.World(rank=1, size=2)).run_id != names[0]
