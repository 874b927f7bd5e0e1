"""tools/bench_recipe.py with the small trainer of test_sweep: pairs, gains, noise and cost."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import pytest
from test_sweep import TRAINER
from test_sweep import trainer as trainer  # a fixture

from tools import bench_recipe, readme_blocks, sweep

# What it is passed, it records.
SCORED = TRAINER.replace('"val_loss": 2.5,', (
    '"val_loss": 2.5, "bpb": {"averaged": 1 + config["matrix_lr"] / 2},')).replace(
    '"train": {"steps": steps}', '"train": {"steps": steps, "ms_per_step": 100 + config["seed"]}'
).replace("config = {", "config = {**{name.lower(): value for name, value in env.items()}, ")


def bench(trainer: Path, *arguments: str) -> int:
    out = str(trainer.parent / "recipe")
    trainer.write_text(SCORED)
    return bench_recipe.main([
        "--out", out, "--only", "", "--trainer", str(trainer), "--gpus", "", "--nproc", "1",
        "--poll-seconds", "0.02", *arguments])


@pytest.mark.parametrize("mode", [[], ["--leave-out"]])
def test_gain_is_the_paired_difference_in_favour_of_the_technique(
        trainer: Path, capsys: pytest.CaptureFixture[str], mode: list[str]) -> None:
    arguments = ["--seeds", "1,2,3", "--variant", "rate: MATRIX_LR=0.02/0.022", *mode]
    assert bench(trainer, *arguments) == 0
    row, = json.loads((trainer.parent / "recipe" / "recipe.json").read_text())["rows"]
    assert (row["technique"], row["pairs"], row["lines"]) == ("rate", 3, None)
    assert row["gain"] == pytest.approx(0.002, abs=1e-9)
    assert row["pre-quantisation"] == pytest.approx(0.001, abs=1e-9)
    assert row["gain noise"] == pytest.approx(0, abs=1e-9)
    assert row["ms per step"] == 102
    assert row["slower"] == 0
    text = (trainer.parent / "recipe" / "recipe.md").read_text()
    assert "| rate | 3 | +2.00 ± 0.00 | +1.00 ± 0.00 | 102.0 (+0.0%) | - | - |" in text
    assert text in capsys.readouterr().out
    assert bench(trainer, *arguments) == 0
    assert "6 runs, 6 already settled" in capsys.readouterr().out


def test_of_one_pair_the_noise_is_unknown_and_of_none_everything(
        trainer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAILS", "2")
    variant = ["--variant", "rate: MATRIX_LR=0.02/0.022"]
    assert bench(trainer, "--seeds", "1,2", *variant) == 1
    assert "| rate | 1 | +2.00 ± - |" in (trainer.parent / "recipe" / "recipe.md").read_text()
    assert bench(trainer, "--seeds", "2", *variant) == 1
    assert "| rate | 0 | - ± - | - ± - | - (-) |" in (
        trainer.parent / "recipe" / "recipe.md").read_text()


def test_noise_is_by_the_spread_of_all_techniques(tmp_path: Path) -> None:
    ledger = sweep.Ledger(tmp_path / "ledger.jsonl")
    techniques = [bench_recipe.parse_technique(text)
                  for text in ("rate: MATRIX_LR=0.02/0.022", "floor: MIN_LR=0.1/0")]
    pairs = bench_recipe.plan_pairs(techniques, "1,2", {}, leave_out=False)
    scores = {"": (1.10, 1.20), "rate": (1.08, 1.16), "floor": (1.05,)}
    for name, values in scores.items():
        for run, score in zip(pairs[name], values, strict=False):
            path = tmp_path / f"{run.label}.json"
            path.write_text(json.dumps({"run_id": run.label, "val_bpb": score}))
            ledger.add(event="end", key=run.key, status="complete", result=path.name)
    rate, floor = bench_recipe.compare(pairs, ledger, {}, leave_out=False)
    spread = 0.02 / 2**0.5  # of gains 0.02 and 0.04
    assert (rate["pairs"], floor["pairs"]) == (2, 1)
    assert (rate["gain"], floor["gain"]) == pytest.approx((0.03, 0.05))
    assert (rate["gain noise"], floor["gain noise"]) == pytest.approx((spread / 2**0.5, spread))


def test_runs_of_equal_steps_take_their_times_from_others(
        trainer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    variant = ["--seeds", "1,2", "--variant", "rate: MATRIX_LR=0.02/0.022"]
    times = tmp_path / "times.json"
    times.write_text(json.dumps({"rows": [
        {"technique": "rate", "ms per step": 91.25, "slower": 0.02}, {"technique": "other"}]}))
    assert bench(trainer, *variant, "--steps", "3", "--times", str(times)) == 0
    out = trainer.parent / "recipe"
    row, = json.loads((out / "recipe.json").read_text())["rows"]
    assert (row["ms per step"], row["slower"]) == (91.25, 0.02)
    settings = [json.loads(line).get("settings", {})
                for line in (out / "ledger.jsonl").read_text().splitlines()]
    assert {(s["ITERATIONS"], s["MAX_WALLCLOCK_SECONDS"]) for s in settings if s} == {("3", "0")}
    before = (out / "ledger.jsonl").read_bytes()
    for text, words in (("[]", "a list, not a mapping"), ("{", "not JSON"),
                        ('{"rows": [{"name": 1}]}', "holds no row of a technique"),
                        ('{"rows": [{"variant": "", "ms": []}]}', "holds no row of a technique"),
                        ('{"rows": [{"variant": "", "ms": ["x"]}]}', "holds no row of a")):
        times.write_text(text)
        assert bench(trainer, *variant, "--times", str(times)) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: --times {times}: {words}") and error.count("\n") == 1
    assert (out / "ledger.jsonl").read_bytes() == before


@pytest.mark.parametrize("leave_out", [False, True])
def test_times_come_from_variants_that_took_turns(tmp_path: Path, leave_out: bool) -> None:
    techniques = [bench_recipe.parse_technique(text) for text in (
        "gates: SMEAR_GATE=1/0 ATTN_GATE=0.5/0", "floor: MIN_LR=0.1/0", "rate: MATRIX_LR=.03/.02")]
    changed = "ATTENTION=math ATTN_GATE=0 SMEAR_GATE=0" if leave_out else (
        "ATTENTION=math SMEAR_GATE=1 ATTN_GATE=0.5")
    same = "ATTENTION=math MIN_LR=0" if leave_out else "MIN_LR=0.1 ATTENTION=math"
    times = {"ATTENTION=math": [70, 90, 80], changed: [40, 40, 41], same: [80, 80, 80]}
    path = tmp_path / "variants.json"
    path.write_text(json.dumps({"rows": [
        {"variant": variant, "plan": plan, "ms": ms if plan == "looped" else [1, 2, 3]}
        for variant, ms in times.items() for plan in ("unlooped", "looped")]}))
    having, lacking = (80, 40) if leave_out else (40, 80)
    assert bench_recipe.read_times(path, techniques, leave_out) == {
        "gates": {"ms per step": having, "slower": having / lacking - 1},
        "floor": {"ms per step": 80, "slower": 0}}


def test_times_of_runs_that_shared_a_gpu_are_left_out(tmp_path: Path) -> None:
    ledger = sweep.Ledger(tmp_path / "ledger.jsonl")
    technique = bench_recipe.parse_technique("rate: MATRIX_LR=0.02/0.022")
    pairs = bench_recipe.plan_pairs([technique], "1,2,3", {}, leave_out=False)
    both = [run for pair in zip(pairs[""], pairs["rate"], strict=True) for run in pair]
    ends = []
    for number, run in enumerate(both):
        path = tmp_path / f"{run.label}.json"
        ms = 100.0 * (1 + (run.label[:4] == "rate")) + number
        path.write_text(json.dumps({"run_id": run.label, "val_bpb": 1.0,
                                    "train": {"ms_per_step": ms}}))
        start = {"event": "start", "key": run.key, "label": run.label, "run_id": run.label}
        ends.append({"event": "end", "key": run.key, "run_id": run.label, "status": "complete",
                     "result": path.name})
        ledger.add(**start, gpus="1" if number == 1 else "0")
        if number in (0, 2):  # the second pair's first run goes on beside its second one
            continue
        for end in ends:
            ledger.add(**end)
        ends = []
    assert bench_recipe.crowded(ledger) == {run.label for run in both[2:4]}
    row, = bench_recipe.compare(pairs, ledger, {}, leave_out=False)
    assert row["pairs"] == 3
    assert row["ms per step"] == pytest.approx((201 + 205) / 2)
    assert row["slower"] == pytest.approx((201 + 205) / (100 + 104) - 1)


def test_runs_that_a_killed_sweep_left_share_no_gpu_with_later_ones(tmp_path: Path) -> None:
    ledger = sweep.Ledger(tmp_path / "ledger.jsonl")
    for name in ("a", "b"):
        ledger.add(event="plan", seeds=["1"])
        ledger.add(event="start", key=name, label=name, run_id=name, gpus="0")
    assert bench_recipe.crowded(ledger) == set()


def test_table_of_what_is_complete_starts_nothing(
        trainer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, variant = trainer.parent / "recipe", ["--variant", "rate: MATRIX_LR=0.02/0.022"]
    assert bench(trainer, "--seeds", "1", *variant, "--table") == 2
    assert f"error: --table --out {out}: no ledger there" in capsys.readouterr().err
    assert bench(trainer, "--seeds", "1", *variant) == 0
    before = (out / "ledger.jsonl").read_bytes()
    (out / "recipe.json").unlink()
    assert bench(trainer, "--seeds", "1,2", *variant, "--table") == 0
    assert (out / "ledger.jsonl").read_bytes() == before
    row, = json.loads((out / "recipe.json").read_text())["rows"]
    assert row["pairs"] == 1


@pytest.mark.parametrize(("mode", "sentence"), [
    (["--seconds", "60"], "Runs of 60 s in steps of 98,304 tokens, seeds 1, 2, each with one "
     "technique against runs with none; also `SCHEDULE_STEPS=4500`, `VAL_LOSS_EVERY=0`."),
    (["--steps", "1450", "--leave-out", "--set", "EMA_DECAY=0.99"],
     "Runs of 1,450 steps of 98,304 tokens, seeds 1, 2, each without one technique against runs "
     "with all; also `EMA_DECAY=0.99`, `SCHEDULE_STEPS=4500`, `VAL_LOSS_EVERY=0`."),
])
def test_file_says_which_runs_were_compared_and_readme_says_it_in_words(
        trainer: Path, monkeypatch: pytest.MonkeyPatch, mode: list[str], sentence: str) -> None:
    monkeypatch.setenv("DATA_PATH", "somewhere")
    assert bench(trainer, "--seeds", "1,2", "--variant", "rate: MATRIX_LR=0.02/0.022", *mode) == 0
    path = trainer.parent / "recipe" / "recipe.json"
    content = json.loads(path.read_text())
    assert content["source_sha256"] == hashlib.sha256(trainer.read_bytes()).hexdigest()
    assert (content["seeds"], content["settings"]["DATA_PATH"]) == ([1, 2], "somewhere")
    for pair in content["rows"][0]["runs"]:
        rates = [json.loads(next(path.parent.glob(f"*/logs/{run_id}.json")).read_text())["config"][
            "matrix_lr"] for run_id in pair]
        assert rates == [0.02, 0.022]
    sources = readme_blocks.Sources(trainer.parent)
    text = readme_blocks.block_recipe(sources, ["recipe/recipe.json"])
    assert text.startswith(sentence + "\n\n| Technique |")
    path.write_text(json.dumps({"rows": content["rows"]}))
    assert readme_blocks.block_recipe(sources, ["recipe/recipe.json"]).startswith("| Technique |")


@pytest.mark.parametrize("row", [{"pairs": 1}, {"technique": "x"}, {"technique": "x", "pairs": ""}])
def test_readme_refuses_a_row_without_technique_or_pairs(
        tmp_path: Path, row: dict[str, object]) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps({"rows": [row]}))
    with pytest.raises(readme_blocks.BlockError, match=r"recipe\.json: a row lacks"):
        readme_blocks.block_recipe(readme_blocks.Sources(tmp_path), ["recipe.json"])


def test_setting_without_effect_is_no_pair(
        trainer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_IGNORES", "val_loss_every")
    assert bench(trainer, "--only", "smear gate") == 3
    row = json.loads((trainer.parent / "recipe" / "ledger.jsonl").read_text().splitlines()[-1])
    assert (row["status"], row["reason"]) == (
        "mismatch", "VAL_LOSS_EVERY=0 was asked for, 0.5 was used")


def test_command_line_is_over_the_shell_and_the_shell_over_what_all_runs_have(
        monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("TRAIN_BATCH_TOKENS", "8192"), ("VAL_LOSS_EVERY", "7"), ("SEED", "1"),
                        ("MAX_WALLCLOCK_SECONDS", "9"), ("ITERATIONS", "5")):
        monkeypatch.setenv(name, value)
    options = bench_recipe.build_parser().parse_args(["--set", "VAL_LOSS_EVERY=9"])
    common = bench_recipe.common_settings(options)
    assert "SEED" not in common and common.items() >= {
        "TRAIN_BATCH_TOKENS": "8192", "SCHEDULE_STEPS": "4500", "VAL_LOSS_EVERY": "9",
        "MAX_WALLCLOCK_SECONDS": "150", "ITERATIONS": "5"}.items()


def test_built_in_techniques_run_with_their_settings(trainer: Path) -> None:
    assert bench(trainer, "--seeds", "1", "--only", "smear gate, short rows early") == 0
    rows = [json.loads(line)
            for line in (trainer.parent / "recipe" / "ledger.jsonl").read_text().splitlines()]
    started = {row["label"]: row["settings"] for row in rows if row["event"] == "start"}
    assert [(s["SMEAR_GATE"], s["TRAIN_CONTEXT"]) for s in started.values()] == [
        ("0", ""), ("1", ""), ("0", "0.35:512,0.7:1024")]
    assert all(settings.items() >= bench_recipe.COMMON.items() for settings in started.values())


def test_dry_run_and_status_start_nothing(
        trainer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--seeds", "1", "--variant", "rate: MATRIX_LR=0.02/0.022"]
    assert bench(trainer, *arguments, "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [f"MATRIX_LR={rate}" in line for line, rate in zip(lines, ("0.022", "0.02"),
                                                             strict=True)] == [True, True]
    assert not (trainer.parent / "recipe").exists()
    assert bench(trainer, *arguments, "--status") == 2
    assert "no ledger there" in capsys.readouterr().err
    assert bench(trainer, *arguments) == 0
    capsys.readouterr()
    (trainer.parent / "recipe" / "recipe.md").unlink()
    assert bench(trainer, *arguments, "--status") == 0
    assert "rate-seed1 " in capsys.readouterr().out
    assert not (trainer.parent / "recipe" / "recipe.md").exists()


@pytest.mark.parametrize("leave_out", [False, True])
def test_sides_of_a_pair_differ_in_the_technique_alone(leave_out: bool) -> None:
    techniques = bench_recipe.choose(None, ["mine: BETA2=0.99/0.95 MIN_LR=0.2/0"])
    pairs = bench_recipe.plan_pairs(techniques, "7,8", {"PRESET": "record"}, leave_out)
    assert [run.settings["SEED"] for run in pairs[""]] == ["7", "8"]
    sweep.check_settings([run for group in pairs.values() for run in group])
    for technique in techniques:
        for base, run in zip(pairs[""], pairs[technique.name], strict=True):
            changed = {k: v for k, v in run.settings.items() if base.settings[k] != v}
            side = technique.absent if leave_out else technique.present
            assert changed == side
    labels = {run.label for group in pairs.values() for run in group}
    assert len(labels) == 2 * (1 + len(techniques))


def test_built_in_techniques_can_be_chosen_and_name_values_of_the_record() -> None:
    import train_gpt as golf

    assert [t.name for t in bench_recipe.choose("smear gate, rate floor", [])] == [
        "smear gate", "rate floor"]
    for technique in bench_recipe.choose(None, []):
        for side in (technique.present, technique.absent):
            golf.Config.from_env(side)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--variant", "no settings"], "--variant 'no settings': expected"),
    (["--variant", "x: MATRIX_LR=1"], "--variant 'x: MATRIX_LR=1': expected"),
    (["--only", "unheard of"], "--only unheard of: one of leaky slope, "),
    (["--variant", "momentum: MIN_LR=0/1"], "--variant momentum: another technique"),
    (["--variant", "x: MIN_LR=0/1", "--variant", "x: MIN_LR=0/0.1"], "--variant x: another"),
    (["--set", "MATRIX_LR"], "--set MATRIX_LR: expected"),
    (["--set", "ITERATIONS=3"], "--set ITERATIONS: give --seeds, --steps or --seconds"),
    (["--out", __file__], f"--out {__file__}: no folder to write to: "),
    (["--variant", "x: MIN_LR=0/1", "--cost", "x=no-such-commit"],
     "--cost no-such-commit: fatal: "),
    (["--variant", "x: MIN_LR=0/1", "--cost", "y=HEAD"],
     "--cost y=HEAD: expected NAME=COMMIT, NAME one of x"),
    (["--variant", "x: MIN_LR=0/1", "--cost", "x"], "--cost x: expected NAME=COMMIT"),
    (["--times", "none.json"], "--times none.json: No such file or directory"),
    (["--seeds", "a"], "SEED=a: a whole number"),
    (["--detach"], "--detach: "),
])
def test_bad_arguments_exit_2_with_one_line(
        trainer: Path, capsys: pytest.CaptureFixture[str], arguments: list[str],
        message: str) -> None:
    assert bench(trainer, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
    assert not (trainer.parent / "recipe").exists()


@pytest.mark.parametrize("packed", [[], ["--packed"]])
@pytest.mark.parametrize(("arguments", "message"), [
    (["--set", "NOPE=1"], "none-seed42: NOPE is no setting of train_gpt.py"),
    (["--variant", "x: MIN_LR=.0/0"], "x-seed42: the same settings as none-seed42"),
])
def test_settings_that_our_program_refuses_start_nothing(
        tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str,
        packed: list[str]) -> None:
    out = tmp_path / "recipe"
    assert bench_recipe.main(["--out", str(out), "--only", "", "--gpus", "", *arguments,
                              *packed]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert not out.exists()


def test_cost_is_what_a_commit_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_recipe, "REPOSITORY", tmp_path)
    texts = [f"print({'q' * number!r}, {number ** 9})\n" for number in range(12)]
    for number, text in enumerate((texts[0], "".join(texts))):
        (tmp_path / "train_gpt.py").write_text(text)
        for command in (["init", "-q"], ["add", "."],
                        ["-c", "user.name=x", "-c", "user.email=x", "commit", "-qm", str(number)]):
            subprocess.run(["git", *command], cwd=tmp_path, check=True)
    lines, packed = bench_recipe.cost_of("HEAD")
    assert lines == 11
    assert 20 < packed < 300
    row = {"technique": "x", "pairs": 0, "lines": lines, "packed bytes": packed}
    assert f"| x | 0 | - ± - | - ± - | - (-) | {lines} | {packed} |" in bench_recipe.table([row])


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench_recipe.main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("--seconds", "--leave-out", "--cost", "sweep.py"))
