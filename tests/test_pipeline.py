"""Section 11: the whole story, twice, in pieces, in fresh processes and with bad input."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from toy import (
    PROGRAM,
    MakeEnv,
    encode_documents,
    random_model,
    read_result,
    run_program,
    tiny_env,
    toy_documents,
    train_tokenizer,
)

import train_gpt as golf
from tools.prepare_data import write_shard

NUMBERS = ("bpb", "nats", "headline", "val_bpb", "val_loss", "status")

# spec/results.md, without what needs a GPU, a compiler or a later evaluation.
KEYS = {
    "": "run_id track preset seed world_size config_hash source_sha256 started finished status "
        "exit_reason config differs hardware versions data train bpb nats headline val_bpb "
        "val_loss artifact quantisation clocks",
    "hardware": "gpu gpus cpu_count", "versions": "python torch attention_backend",
    "data": "name tokenizer_sha256 train_tokens train_shards passes val_documents val_targets "
            "val_bytes fingerprint",
    "train": "steps seconds tokens ms_per_step tok_s tok_s_by_plan startup_seconds "
             "loop_enabled_step",
    "bpb": "averaged quantised sliding ttt_sgd", "nats": "averaged quantised sliding ttt_sgd",
    "artifact": "code_bytes model_bytes total_bytes cap_bytes unused_bytes sha256 codec",
    "quantisation": "gap_bpb seconds_hessians seconds_solve seconds_encode bits_per_weight "
                    "by_tensor",
    "clocks": "training_seconds training_budget_seconds train_to_artifact_seconds "
              "eval_seconds_strict eval_seconds_lenient eval_budget_seconds "
              "projected_full_eval_seconds_8gpu",
}


def copy_data(data_dir: Path, folder: Path) -> Path:
    """A dataset of one's own to damage."""
    return shutil.copytree(data_dir / "datasets" / "fineweb10B_sp384", folder)


# ---- What a run leaves behind ----


@pytest.mark.parametrize("section", KEYS)
def test_result_has_the_agreed_keys(trained_run: Path, section: str) -> None:
    result = read_result(trained_run)
    found = result[section] if section else result
    assert not set(KEYS[section].split()) - set(found)


def test_result_describes_the_run(trained_run: Path, data_dir: Path) -> None:
    result = read_result(trained_run)
    config = golf.Config.from_env(tiny_env(data_dir, trained_run))
    assert result["status"] == "complete"
    assert (result["run_id"], result["track"], result["preset"]) == ("toy", "non_record", "demo")
    assert result["config_hash"] == config.config_hash
    assert result["config"]["model_dim"] == 32
    assert result["differs"]["model_dim"] == 32
    assert "matrix_lr" not in result["differs"]
    assert (result["data"]["val_targets"], result["data"]["train_shards"]) == (1856, 2)
    assert result["train"]["steps"] == 8
    assert result["headline"] == "ttt_sgd"
    assert result["val_bpb"] == result["bpb"]["ttt_sgd"]
    assert result["val_loss"] == result["nats"]["ttt_sgd"]
    assert (trained_run / "runs" / "toy" / "artifact.bin").stat().st_size == (
        result["artifact"]["model_bytes"])


def test_scores_are_consistent(trained_run: Path) -> None:
    result = read_result(trained_run)
    bpb, nats, data = result["bpb"], result["nats"], result["data"]
    tokens_per_byte = data["val_targets"] / data["val_bytes"]
    for key, bits in bpb.items():
        assert bits == pytest.approx(nats[key] * tokens_per_byte / math.log(2), rel=1e-9)
        assert nats[key] < math.log(384) - 0.5
    assert 0 < abs(bpb["quantised"] - bpb["averaged"]) < 0.05
    assert result["quantisation"]["gap_bpb"] == pytest.approx(bpb["quantised"] - bpb["averaged"])


def test_text_log_has_the_source_and_the_published_labels(trained_run: Path) -> None:
    text = (trained_run / "logs" / "toy.txt").read_text()
    _, found, tail = text.partition(PROGRAM.read_text())
    assert bool(found)
    bpb = read_result(trained_run)["bpb"]
    for label, key in (("pre-quantization post-ema", "averaged"), ("quantized", "quantised"),
                       ("quantized_sliding_window", "sliding"), ("quantized_ttt", "ttt_sgd")):
        scores = re.findall(rf"^{label} val_loss:(\d+\.\d{{8}}) val_bpb:(\d+\.\d{{8}}) "
                           r"eval_time:\d+ms$", tail, re.MULTILINE)
        assert len(scores) == 1, label
        assert float(scores[0][1]) == pytest.approx(bpb[key], abs=1e-8)
    result = read_result(trained_run)
    assert f"model_params:{result['model']['parameters']}" in tail
    assert f"source_sha256: {result['source_sha256']}" in tail
    assert re.search(r"^8/8 train_loss: \d\.\d{4} ", tail, re.MULTILINE)


def test_events_are_json_lines_with_a_clock(trained_run: Path) -> None:
    lines = (trained_run / "logs" / "toy.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    assert events[0]["event"] == "start"
    assert events[-1]["event"] == "result"
    assert {"train", "plan", "phase", "artifact", "eval"} <= {e["event"] for e in events}
    times = [e["t"] for e in events]
    assert times == sorted(times)
    assert [e["label"] for e in events if e["event"] == "eval"] == [
        "averaged", "quantised", "sliding", "ttt_sgd"]


def test_nothing_half_written_stays(trained_run: Path) -> None:
    assert not list(trained_run.rglob("*.partial"))


# ---- Twice, and in other ways ----


def test_second_run_equals_the_first(trained_run: Path, make_env: MakeEnv, tmp_path: Path) -> None:
    again, first = golf.main(make_env()), read_result(trained_run)
    for key in NUMBERS:
        assert again[key] == first[key], key
    artifacts = [(folder / "runs" / "toy" / "artifact.bin").read_bytes()
                 for folder in (trained_run, tmp_path)]
    assert artifacts[0] == artifacts[1]


def test_artifact_scores_the_same_in_a_fresh_process(trained_run: Path, make_env: MakeEnv,
                                                     tmp_path: Path) -> None:
    artifact = trained_run / "runs" / "toy" / "artifact.bin"
    process = run_program(PROGRAM, make_env(EVAL_ONLY=artifact, RUN_ID="again"))
    assert process.returncode == 0, process.stderr
    found, first = read_result(tmp_path, "again"), read_result(trained_run)
    for key in ("quantised", "sliding", "ttt_sgd"):
        assert found["bpb"][key] == first["bpb"][key]
    assert found["headline"] == "ttt_sgd"
    assert found["artifact"]["sha256"] == first["artifact"]["sha256"]
    assert found["data"]["val_bytes"] == first["data"]["val_bytes"]
    assert "averaged" not in found["bpb"]
    assert "train" not in found
    assert not list((tmp_path / "runs").rglob("artifact.bin"))


def test_loop_that_never_began_is_not_forced_on(make_env: MakeEnv, tmp_path: Path) -> None:
    env = make_env(ENABLE_LOOPING_AT=1, ITERATIONS=5, TTT_ENABLED=0)
    bpb, config, world = golf.main(env)["bpb"], golf.Config.from_env(env), golf.World()
    assert isinstance(bpb, dict)
    path, stream = tmp_path / "runs" / "toy" / "artifact.bin", golf.ValStream.load(config)
    model, plan = golf.load_artifact(path, config, world, golf.sdpa_attend)
    assert plan.name == "unlooped"
    windows = golf.sliding_windows(stream.num_targets, 64, 64)
    scores = [golf.evaluate(golf.Scorer(model, each, stream, world), windows).bits
              for each in golf.depth_plans(config)]
    assert scores[0] == bpb["quantised"] != scores[1]


def test_only_the_configured_evaluations_run(make_env: MakeEnv, trained_run: Path) -> None:
    artifact = trained_run / "runs" / "toy" / "artifact.bin"
    result = golf.main(make_env(TTT_ENABLED=0, SLIDING_WINDOW_ENABLED=0, EVAL_ONLY=artifact))
    bpb = result["bpb"]
    assert isinstance(bpb, dict)
    assert set(bpb) == {"quantised"}
    assert result["headline"] == "quantised"


def test_intermediate_validation_is_logged(make_env: MakeEnv, tmp_path: Path) -> None:
    result = golf.main(make_env(VAL_LOSS_EVERY=3, ITERATIONS=4, TTT_ENABLED=0))
    lines = (tmp_path / "logs" / "toy.jsonl").read_text().splitlines()
    steps = [e["step"] for e in map(json.loads, lines) if e["event"] == "val"]
    assert steps == [0, 3, 4]
    assert isinstance(result["bpb"], dict)
    assert set(result["bpb"]) == {"raw", "averaged", "quantised", "sliding"}
    text = (tmp_path / "logs" / "toy.txt").read_text()
    assert re.search(r"^0/4 val_loss: 5\.9\d+ val_bpb: \d\.\d{4}$", text, re.MULTILINE)


def test_codec_changes_the_size_alone(make_env: MakeEnv, trained_run: Path) -> None:
    result, first = golf.main(make_env(COMPRESSOR="ans", TTT_ENABLED=0)), read_result(trained_run)
    bpb, artifact = result["bpb"], result["artifact"]
    assert isinstance(bpb, dict)
    assert isinstance(artifact, dict)
    assert bpb["sliding"] == first["bpb"]["sliding"]
    assert artifact["codec"] == "ans"
    assert artifact["model_bytes"] != first["artifact"]["model_bytes"]


# ---- Bad input ----


def truncate_shard(data: Path) -> None:
    path = data / "fineweb_train_000001.bin"
    path.write_bytes(path.read_bytes()[:-2])


def wrong_magic(data: Path) -> None:
    path = data / "fineweb_val_000000.bin"
    path.write_bytes(b"\1" + path.read_bytes()[1:])


def no_train_shards(data: Path) -> None:
    for path in data.glob("*train*"):
        path.unlink()


def no_val_shards(data: Path) -> None:
    for path in data.glob("*val*"):
        path.unlink()


def bad_val_token(data: Path) -> None:
    write_shard(data / "fineweb_val_000000.bin", np.full(900, 384, dtype=np.uint16))


def short_val(data: Path) -> None:
    (data / "fineweb_val_000001.bin").unlink()
    write_shard(data / "fineweb_val_000000.bin", np.full(64, 5, dtype=np.uint16))


def short_train(data: Path) -> None:
    for path in data.glob("*train*"):
        write_shard(path, np.full(64, 5, dtype=np.uint16))


@pytest.mark.parametrize(("damage", "said"), [
    (truncate_shard, r"fineweb_train_000001\.bin: magic, version and tokens"),
    (wrong_magic, r"fineweb_val_000000\.bin: magic"), (no_train_shards, r"data: no .*train"),
    (no_val_shards, r"data: no .*val"), (short_val, r"64 tokens.*EVAL_SEQ_LEN \(64\)"),
    (bad_val_token, r"fineweb_val_000000\.bin: token id 384 .*VOCAB_SIZE \(384\)"),
    (short_train, r"TRAIN_SEQ_LEN \(64\)")])
def test_damaged_data_is_named_before_anything_is_spent(
        make_env: MakeEnv, data_dir: Path, tmp_path: Path, damage: Callable[[Path], None],
        said: str) -> None:
    data = copy_data(data_dir, tmp_path / "data")
    damage(data)
    with pytest.raises(golf.DataError, match=said) as error:
        golf.main(make_env(DATA_PATH=data))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "logs").exists()


def test_missing_folder_and_tokenizer_are_named(make_env: MakeEnv, tmp_path: Path) -> None:
    for variable in ("DATA_PATH", "TOKENIZER_PATH"):
        with pytest.raises(golf.DataError, match=str(tmp_path / "none")):
            golf.main(make_env(**{variable: tmp_path / "none"}))
    assert not list(tmp_path.iterdir())


def test_tokenizer_of_another_size_is_refused(make_env: MakeEnv, tmp_path: Path) -> None:
    other = train_tokenizer(tmp_path / "other", toy_documents(5, 100), 400)
    with pytest.raises(golf.DataError, match=r"other\.model: 400 pieces, but VOCAB_SIZE=384"):
        golf.main(make_env(TOKENIZER_PATH=other))


def test_tokenizer_that_did_not_write_the_shards_is_noticed(make_env: MakeEnv, data_dir: Path,
                                                            tmp_path: Path) -> None:
    """Same size, other pieces: the manifest that stands beside the shards knows the right one."""
    other = train_tokenizer(tmp_path / "other", toy_documents(5, 100)[::-1], 384)
    data = copy_data(data_dir, tmp_path / "data")
    (data / "manifest.json").write_text(json.dumps({"tokenizer_sha256": "0" * 64}))
    with pytest.raises(golf.DataError, match=r"other\.model"):
        golf.main(make_env(TOKENIZER_PATH=other, DATA_PATH=data))


@pytest.mark.parametrize("size", [5, 7, 8])
def test_world_size_that_does_not_divide_is_refused(make_env: MakeEnv, size: int) -> None:
    ranks = {"RANK": "0", "WORLD_SIZE": str(size), "LOCAL_RANK": "0"}
    with pytest.raises(golf.ConfigError, match=r"\[1, 2, 3, 4, 6\]") as error:
        golf.describe_config(golf.Config.from_env(make_env()), golf.World.from_env(ranks))
    assert f"WORLD_SIZE={size}" in str(error.value)


def test_cap_below_the_program_is_noticed_before_training(make_env: MakeEnv,
                                                          tmp_path: Path) -> None:
    with pytest.raises(golf.GolfError, match="ARTIFACT_CAP_BYTES=2000"):
        golf.main(make_env(ARTIFACT_CAP_BYTES=2000))
    assert not (tmp_path / "logs").exists()


def test_artifact_over_its_cap_ends_the_run_and_keeps_the_log(make_env: MakeEnv,
                                                              tmp_path: Path) -> None:
    cap = len(golf.packed_program()) + 15_000
    with pytest.raises(golf.ArtifactError, match=f"{cap:,}"):
        golf.main(make_env(ARTIFACT_CAP_BYTES=cap, FIT=0, ITERATIONS=3))
    result = read_result(tmp_path)
    assert result["status"] == "partial"
    assert "ARTIFACT_CAP_BYTES" in str(result["exit_reason"])
    assert result["train"]["steps"] == 3
    assert not list(tmp_path.rglob("artifact.bin"))


def test_artifact_of_other_settings_is_refused(make_env: MakeEnv, trained_run: Path,
                                               tmp_path: Path) -> None:
    artifact = trained_run / "runs" / "toy" / "artifact.bin"
    with pytest.raises(golf.ArtifactError, match=r"NUM_LAYERS=5.* 6; PRESET=demo"):
        golf.main(make_env(EVAL_ONLY=artifact, NUM_LAYERS=6))
    with pytest.raises(golf.ArtifactError, match="PRESET="):  # before what other data would lack
        golf.main(make_env(EVAL_ONLY=artifact, NUM_LAYERS=6, DATA_PATH=tmp_path / "nowhere"))


def test_damaged_artifact_is_refused(make_env: MakeEnv, trained_run: Path, tmp_path: Path) -> None:
    data = bytearray((trained_run / "runs" / "toy" / "artifact.bin").read_bytes())
    data[len(data) // 2] ^= 4
    (tmp_path / "flipped.bin").write_bytes(data)
    with pytest.raises(golf.ArtifactError, match="checksum"):
        golf.main(make_env(EVAL_ONLY=tmp_path / "flipped.bin"))


@pytest.mark.parametrize("track", ["10min_16mb", "non_record"])
@pytest.mark.parametrize(("clock", "setting"), [("training_seconds", "MAX_WALLCLOCK_SECONDS"),
                                                ("eval_seconds_strict", "MAX_EVAL_SECONDS")])
def test_crossed_budget_keeps_the_result_and_fails_a_record(
        make_env: MakeEnv, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        track: str, clock: str, setting: str) -> None:
    monkeypatch.setattr(golf, "resolve_track", lambda *_: track)
    honest = golf.evaluate_artifact

    def slow(setup: golf.Setup, path: Path) -> None:
        honest(setup, path)
        setup[2].put("clocks", **{clock: 601.5})

    monkeypatch.setattr(golf, "evaluate_artifact", slow)
    artifact = trained_run / "runs" / "toy" / "artifact.bin"
    env = make_env(EVAL_ONLY=artifact, TTT_ENABLED=0, MAX_WALLCLOCK_SECONDS=600)
    if track == "10min_16mb":
        with pytest.raises(golf.GolfError, match=rf"{setting}=600.*601\.5"):
            golf.main(env)
    else:
        golf.main(env)
    result = read_result(tmp_path)
    assert result["status"] == "complete"
    assert setting in str(result["exit_reason"])
    assert result["val_bpb"] == read_result(trained_run)["bpb"]["sliding"]


def test_error_of_a_program_is_one_line_on_stderr(make_env: MakeEnv, tmp_path: Path) -> None:
    process = run_program(PROGRAM, make_env(DATA_PATH=tmp_path / "none"))
    assert process.returncode == 1
    assert re.fullmatch(r"error: .*none.*\n", process.stderr)
    assert process.stdout == ""


def test_interrupted_run_leaves_a_result(make_env: MakeEnv, tmp_path: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(golf, "evaluate_artifact", interrupt)
    with pytest.raises(KeyboardInterrupt):
        golf.main(make_env(ITERATIONS=3))
    assert read_result(tmp_path)["status"] == "partial"
    assert (tmp_path / "runs" / "toy" / "artifact.bin").stat().st_size > 0


def test_only_the_artifact_reaches_the_evaluation(make_env: MakeEnv, trained_run: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """Spoiling the trained weights right after they were written changes no later score."""
    honest = golf.evaluate_artifact
    spoiled: list[golf.GPT] = []
    keep = golf.Trainer.__init__

    def remember(trainer: golf.Trainer, *arguments: object) -> None:
        keep(trainer, *arguments)  # type: ignore[arg-type]
        spoiled.append(trainer.model)

    def spoil(setup: golf.Setup, path: Path) -> None:
        with torch.no_grad():
            for p in spoiled[0].parameters():
                p.fill_(math.nan)
        honest(setup, path)

    monkeypatch.setattr(golf.Trainer, "__init__", remember)
    monkeypatch.setattr(golf, "evaluate_artifact", spoil)
    result = golf.main(make_env())
    assert result["val_bpb"] == read_result(trained_run)["val_bpb"]


def test_documents_may_straddle_shards(make_env: MakeEnv, data_dir: Path, tmp_path: Path) -> None:
    """Where the validation stream is cut into files changes nothing."""
    data = copy_data(data_dir, tmp_path / "data")
    val = [np.array(golf.read_shard(path)) for path in golf.find_shards(data, "val")]
    for path, part in zip(golf.find_shards(data, "val"), np.split(np.concatenate(val), [33]),
                          strict=True):
        write_shard(path, part)
    streams = [golf.ValStream.load(golf.Config.from_env(make_env(**extra)))
               for extra in ({}, {"DATA_PATH": data})]
    assert streams[0].tokens.tolist() == streams[1].tokens.tolist()


def test_model_is_scored_on_the_bytes_of_its_text(make_env: MakeEnv, data_dir: Path,
                                                  tmp_path: Path) -> None:
    """From text to bits per byte with nothing of the program but its evaluation."""
    model_file = data_dir / "tokenizers" / "fineweb_384_bpe.model"
    documents = toy_documents(21, 20)
    tokens = encode_documents(model_file, documents)
    tokens = tokens[:(len(tokens) - 1) // 64 * 64 + 1]
    data = copy_data(data_dir, tmp_path / "data")
    no_val_shards(data)
    write_shard(data / "fineweb_val_000000.bin", tokens)
    config = golf.Config.from_env(make_env(DATA_PATH=data))
    stream, model = golf.ValStream.load(config), random_model(config)
    plan = golf.depth_plans(config)[-1]
    scorer = golf.Scorer(model, plan, stream, golf.World())
    score = golf.evaluate(scorer, golf.sliding_windows(stream.num_targets, 64, 64))
    rows = torch.from_numpy(np.stack([tokens[i:i + 65] for i in range(0, len(tokens) - 1, 64)])
                            .astype(np.int64))
    with torch.no_grad():
        nats = model(rows[:, :-1], rows[:, 1:], plan).double().sum().item()
    tokenizer = golf.load_tokenizer(model_file, 384)
    text = "".join(tokenizer.decode(part.tolist()) for part in np.split(
        tokens, np.flatnonzero(tokens == 1)))
    assert score.bits == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)


def test_foreign_artifact_over_the_cap_is_refused(make_env: MakeEnv, trained_run: Path) -> None:
    artifact = trained_run / "runs" / "toy" / "artifact.bin"
    total = len(golf.packed_program()) + artifact.stat().st_size
    with pytest.raises(golf.ConfigError, match=f"ARTIFACT_CAP_BYTES={total - 1} must be at least"):
        golf.main(make_env(EVAL_ONLY=artifact, ARTIFACT_CAP_BYTES=total - 1))
