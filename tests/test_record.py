"""tools/record.py, tools/evidence.py and tools/welch.py: folders, contradictions, statistics."""

from __future__ import annotations

import bz2
import io
import json
import math
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import brotli
import pytest
import synthetic_runs as synthetic

import train_gpt
from tools import evidence, record, sweep, welch
from tools.runs import Run, RunError, find_runs, load_run

REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements.txt"
WORDS = {"author": "someone", "github_id": "someone", "name": "A run", "blurb": "What was done."}


def three_runs(logs: Path) -> list[Run]:
    """Three seeds of one method, the last run from the packed program."""
    for seed, nats in ((42, 2.800), (314, 2.801)):
        synthetic.write_run(logs, synthetic.result(seed, nats))
    content, source = synthetic.packed_run(999, 2.799)
    synthetic.write_run(logs, content, source)
    return find_runs(logs)


def order(tmp_path: Path, **changes: object) -> record.Order:
    """What `make` is asked for."""
    base = record.Order(
        "My run", "non_record", WORDS, (42, 314, 999), tmp_path / "records", REQUIREMENTS
    )
    return base._replace(**changes)


@pytest.fixture(scope="module", autouse=True)
def synthetic_packer() -> Iterator[None]:
    """Synthetic programs are packed in a form of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "pack_stripped", synthetic.pack_program)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A records folder built from three synthetic runs."""
    place = tmp_path_factory.mktemp("made")
    return record.make(three_runs(place / "logs"), order(place))


@pytest.fixture
def ours(made: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(made, tmp_path / made.name))


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A clean folder in the grammar of the published trainers."""
    return synthetic.write_published(tmp_path / "published")


def messages(folder: Path, *artifacts: Path) -> list[str]:
    """Findings that are no notes."""
    found = record.verify(folder, artifacts)
    return [f"{finding.where}: {finding.message}" for finding in found if finding.kind != "note"]


def edit_json(path: Path, **changes: object) -> None:
    """Set top-level keys of a JSON file; None removes a key."""
    content = json.loads(path.read_text())
    content |= changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def edit_text(path: Path, old: str, new: str) -> None:
    """Replace text that must be there."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


# ------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize(
    ("t", "degrees", "p"),
    [
        (0.0, 5, 0.5),
        (6.3138, 1, 0.05),
        (2.9200, 2, 0.05),
        (6.9646, 2, 0.01),
        (1.8125, 10, 0.05),
        (2.7638, 10, 0.01),
        (1.6449, 1e7, 0.05),
        (-2.9200, 2, 0.95),
    ],
)
def test_student_tail_equals_the_printed_tables(t: float, degrees: float, p: float) -> None:
    assert welch.student_tail(t, degrees) == pytest.approx(p, abs=1e-5)


@pytest.mark.parametrize(("t", "degrees"), [(11.83, 3.31), (7.73, 2.59), (0.3, 1.5), (3.4, 3.92)])
def test_student_tail_equals_the_integral_of_the_density(t: float, degrees: float) -> None:
    log_norm = (
        math.lgamma((degrees + 1) / 2)
        - math.lgamma(degrees / 2)
        - 0.5 * math.log(degrees * math.pi)
    )
    steps = 20_000  # Simpson's rule from 0 to t
    total = 0.0
    for i in range(steps + 1):
        x = t * i / steps
        weight = 1 if i in (0, steps) else 4 if i % 2 else 2
        total += weight * math.exp(log_norm - (degrees + 1) / 2 * math.log1p(x * x / degrees))
    assert welch.student_tail(t, degrees) == pytest.approx(0.5 - total * t / steps / 3, abs=1e-10)


def test_spread_of_several_groups_is_that_inside_them() -> None:
    groups = [[1.0, 3.0], [10.0], [101.0, 102.0, 106.0]]
    assert welch.pooled_deviation(groups) == pytest.approx(math.sqrt((2 + 14) / 3))
    assert welch.pooled_deviation(groups[:1]) == pytest.approx(welch.deviation(groups[0]))
    assert welch.pooled_deviation([[1.0], [2.0], []]) is None


def test_welch_reproduces_the_published_test_of_2135_against_2014() -> None:
    mean, spread = 1.05651, 0.00036  # three values with exactly this mean and deviation
    better = [mean - spread, mean, mean + spread]
    before = [1.05740567, 1.05730104, 1.05807084]
    outcome = welch.welch(better, before)
    assert outcome is not None
    assert outcome.p == pytest.approx(0.014, abs=0.0005)


def test_welch_reproduces_a_published_t_and_its_degrees() -> None:
    outcome = welch.welch([1.8751, 1.8731, 1.8762], [1.8828, 1.8816, 1.8821])
    assert outcome is not None
    assert outcome.t == pytest.approx(7.73, abs=0.2)  # the page's t comes from unrounded losses
    assert outcome.degrees == pytest.approx(2.59, abs=0.05)


def test_paired_test_and_margin() -> None:
    a, b = [2.30, 2.31, 2.29], [2.31, 2.322, 2.302]
    outcome = welch.paired(a, b, 0.005)
    assert outcome is not None
    gains = [0.010, 0.012, 0.012]
    error = welch.deviation(gains) / math.sqrt(3)
    assert outcome.t == pytest.approx((sum(gains) / 3 - 0.005) / error)
    assert outcome.p < 0.01 < 0.05
    assert welch.paired(a[:1], b[:1]) is None
    assert welch.welch(a, b[:1]) is None


def test_tests_without_noise_are_certain() -> None:
    assert welch.welch([1.0, 1.0], [2.0, 2.0]) == (1.0, 0.0, math.inf, 2.0, 0.0)
    assert welch.paired([1.0, 2.0], [1.0, 2.0]) == (0.0, 0.0, 0.0, 1.0, 0.5)


def test_seeds_needed_is_the_first_number_that_passes() -> None:
    a, b = [2.300, 2.303, 2.306], [2.310, 2.312, 2.309, 2.311, 2.310, 2.308]
    need = welch.seeds_needed(a, b, 0.0)
    assert need is not None
    assert need > 3
    spread, part_b = welch.variance(a), welch.variance(b) / len(b)
    for count, passes in ((need, True), (need - 1, False)):
        total = spread / count + part_b
        degrees = total**2 / ((spread / count) ** 2 / (count - 1) + part_b**2 / (len(b) - 1))
        t = (welch.mean(b) - welch.mean(a)) / math.sqrt(total)
        assert (welch.student_tail(t, degrees) < 0.01) == passes
    assert welch.seeds_needed(a, b, 1.0) is None
    assert welch.pairs_needed([0.01, 0.02], 0.05) is None


# ----------------------------------------------------------------------------- planted, published


def test_clean_published_folder_has_no_findings(published: Path) -> None:
    assert messages(published) == []


def plant_mean_seed_mixed(folder: Path) -> None:
    edit_json(folder / "submission.json", val_loss=synthetic.PUBLISHED[1337][5])


def plant_bytes_of_one_seed(folder: Path) -> None:
    size = len(synthetic.SHIPPED.encode())
    edit_json(folder / "submission.json", bytes_total=synthetic.PUBLISHED[42][6] + size)


def plant_bytes_code_missing(folder: Path) -> None:
    edit_json(folder / "submission.json", bytes_code=None)


def plant_pruning(folder: Path) -> None:
    edit_text(
        folder / "README.md", "Zero selective pruning was needed.", "134-186K values were pruned."
    )


def plant_other_source(folder: Path) -> None:
    (folder / "train_gpt.py").write_text(synthetic.SHIPPED.replace("0.022", "0.026"))


def plant_blank_cell(folder: Path) -> None:
    size = len(synthetic.SHIPPED.encode())
    edit_text(folder / "README.md", f"{synthetic.PUBLISHED[1337][6] + size:,}", "")


def plant_changed_schedule(folder: Path) -> None:
    log = synthetic.published_log(2024, settings={"warmdown_frac": 0.667})
    (folder / "train_seed2024.log").write_text(log)


def plant_crash_after_score(folder: Path) -> None:
    tail = "[rank3]: Traceback (most recent call last):\n[rank3]:   File 'train_gpt.py', line 9"
    (folder / "train_seed42.log").write_text(synthetic.published_log(42, tail=tail))


def plant_wrong_readme_number(folder: Path) -> None:
    edit_text(folder / "README.md", "| **1.0894** |", "| **1.0884** |")


def plant_score_of_another_evaluation(folder: Path) -> None:
    content = synthetic.published_submission()
    content["seed_results"]["42"]["val_bpb"] = synthetic.PUBLISHED[42][3]
    (folder / "submission.json").write_text(json.dumps(content))


def plant_seed_without_log(folder: Path) -> None:
    (folder / "train_seed42.log").unlink()


def plant_late_calibration(folder: Path) -> None:
    edit_text(folder / "train_seed42.log", "Hessians in 9.4s", "Hessians in 10.4s")


def plant_torch_pin(folder: Path) -> None:
    edit_text(folder / "requirements.txt", "torch==2.9.1", "torch==2.11.0")


def plant_null_field(folder: Path) -> None:
    content = synthetic.published_submission() | {"attribution": None}
    (folder / "submission.json").write_text(json.dumps(content))


def plant_over_the_cap(folder: Path) -> None:
    model = synthetic.PUBLISHED[2024][6]
    edit_text(
        folder / "train_seed2024.log", f"int6+brotli: {model} bytes", "int6+brotli: 16042632 bytes"
    )
    size = len(synthetic.SHIPPED.encode())
    edit_text(
        folder / "train_seed2024.log",
        f"brotli: {model + size} bytes",
        f"brotli: {16042632 + size} bytes",
    )


PLANTED = {
    plant_mean_seed_mixed: "that is seed 1337 alone",
    plant_bytes_of_one_seed: "seed 42's alone",
    plant_bytes_code_missing: "bytes_code is missing",
    plant_pruning: "pruning is claimed but no log holds it",
    plant_other_source: "the program in the log is not the one that is shipped",
    plant_blank_cell: "seed 1337: 'Artifact' is blank",
    plant_changed_schedule: "warmdown_frac is 0.667",
    plant_crash_after_score: "a rank crashed after the score",
    plant_wrong_readme_number: "seed 1337: SlidingBPB 1.0884, the log says 1.0893649",
    plant_score_of_another_evaluation: "it equals the log's 'quantised'",
    plant_seed_without_log: "seed 42 has no log",
    plant_late_calibration: "train_under_600s: seed 42: 600.5 s",
    plant_torch_pin: "pins torch 2.11.0",
    plant_null_field: "attribution is blank",
    plant_over_the_cap: "over the cap",
}


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_planted_contradiction_is_found(published: Path, plant) -> None:
    plant(published)
    found = messages(published)
    assert any(PLANTED[plant] in message for message in found), found


def test_broken_submission_is_a_finding_and_no_crash(published: Path) -> None:
    (published / "submission.json").write_text('{"val_bpb": 1.08')
    assert any("not JSON" in message for message in messages(published))


def test_missing_files_are_named(tmp_path: Path) -> None:
    found = messages(tmp_path)
    for name in ("README.md", "submission.json", "train_gpt.py", "logs"):
        assert any(message.startswith(name) for message in found)
    with pytest.raises(RunError, match="no such folder"):
        record.verify(tmp_path / "absent", [])


# ---------------------------------------------------------------------------------- make, ours


def test_made_folder_is_complete_and_in_order(made: Path) -> None:
    names = {path.name for path in made.iterdir()}
    assert {"README.md", "submission.json", "requirements.txt", "train_gpt.py"} <= names
    assert len(names) == 4 + 9
    assert messages(made) == []
    assert (made / "train_gpt.py").read_bytes() == synthetic.pack_program()


def test_submission_keeps_means_and_seeds_apart(made: Path) -> None:
    content = json.loads((made / "submission.json").read_text())
    assert content["val_loss"] == pytest.approx(2.8)
    assert content["val_bpb"] == pytest.approx(synthetic.bpb(2.8))
    assert content["seed_results"]["999"]["val_loss"] == 2.799
    sizes = [row["artifact_bytes"] for row in content["seed_results"].values()]
    assert content["bytes_total"] == max(sizes)
    assert content["bytes_code"] + content["bytes_model"] == content["bytes_total"]
    assert set(content["sources"]) == set(content) - {"sources"}
    assert content["track"] == "non_record"
    assert any("not 8x H100" in reason for reason in content["non_record_because"])
    assert content["compliance"]["official_validation"] is False
    assert content["compliance"]["score_before_update"] is True


def test_folder_of_ours_with_an_edited_number_is_found(ours: Path) -> None:
    edit_json(ours / "submission.json", val_bpb=1.0823)
    assert any("val_bpb is 1.0823, the mean of 3 logs" in message for message in messages(ours))
    edit_json(ours / "submission.json", hardware="8xH100 80GB SXM")
    assert any("ran on NVIDIA H200" in message for message in messages(ours))


def test_other_program_in_our_folder_is_found(ours: Path) -> None:
    (ours / "train_gpt.py").write_bytes(synthetic.pack_program() + b" ")
    found = messages(ours)
    assert any("packed_sha256" in message for message in found)
    assert any("bytes are shipped" in message for message in found)


def test_text_inside_our_packed_program_is_compared(tmp_path: Path) -> None:
    program = train_gpt.packed_program()
    (tmp_path / "train_gpt.py").write_bytes(program)
    inside = train_gpt.unpack_program(tmp_path / "train_gpt.py")
    assert evidence.same_program(inside, program) is True
    assert evidence.same_program(inside.replace("786432", "786433"), program) is False
    assert evidence.same_program(train_gpt.program_source(), program) is None
    assert evidence.same_program(inside, program[:-200]) is False


def test_result_that_disagrees_with_its_text_log_is_found(ours: Path) -> None:
    path = next(ours.glob("*-42-*.txt"))
    edit_text(path, f"val_bpb:{synthetic.bpb(2.8):.8f}", "val_bpb:1.07000000")
    assert any("the text log says 1.07" in message for message in messages(ours))


def test_artifact_is_checked_by_hash_and_size(tmp_path: Path) -> None:
    import hashlib

    artifact = tmp_path / "artifact.bin"
    artifact.write_bytes(b"model" * 1000)
    content, source = synthetic.packed_run(42, 2.8)
    code = content["artifact"]["code_bytes"]
    digest = hashlib.sha256(artifact.read_bytes()).hexdigest()
    content["artifact"] |= {
        "sha256": digest, "model_bytes": 5000, "total_bytes": code + 5000,
        "unused_bytes": 16_000_000 - code - 5000,
    }
    synthetic.write_run(tmp_path / "logs", content, source)
    folder = record.make(find_runs(tmp_path / "logs"), order(tmp_path, seeds=(42,)))
    assert messages(folder, artifact) == []
    artifact.write_bytes(b"model" * 999 + b"MODEL")
    assert any("is in no log" in message for message in messages(folder, artifact))
    assert any("no such artifact" in message for message in messages(folder, tmp_path / "absent"))


def mutate(**changes: object) -> dict:
    """The second seed's result, changed."""
    return synthetic.result(314, 2.801, **changes)


REFUSED = {
    "config hash": (mutate(config_hash="beef"), "config_hash differs"),
    "program": (mutate(packed_sha256="00" * 32), "packed_sha256 differs"),
    "data": (mutate(data__fingerprint="dead"), "data.fingerprint differs"),
    "world size": (mutate(world_size=2), "world_size differs"),
    "same seed": (synthetic.result(42, 2.801, run_id="again"), "seed 42 is given 2 times"),
    "partial": (mutate(status="partial"), "status is partial"),
    "over the cap": (mutate(artifact__cap_bytes=15_000_000), "over the cap"),
    "training budget": (mutate(clocks__training_seconds=300.5), "training took 300.5 s of 300.0 s"),
    "evaluation budget": (
        mutate(clocks__eval_seconds_strict=601.0),
        "evaluation took 601.0 s of 600.0 s",
    ),
    "no audit": (mutate(audit=None), "audit absent"),
    "audit failed": (
        mutate(audit__c1_causal={"passed": False, "checked": 9, "worst": 0.1}),
        "did not pass",
    ),
    "validation": (
        mutate(audit__c4_single_pass__checked=1000),
        "covers 1,000 of 2,000,000 targets",
    ),
    "bytes": (mutate(artifact__total_bytes=15_000_000), "model is not 15,000,000"),
    "score": (mutate(val_bpb=1.0), "val_bpb is 1.0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_runs_that_are_refused(tmp_path: Path, name: str) -> None:
    content, reason = REFUSED[name]
    runs = three_runs(tmp_path / "logs")
    other = load_run(synthetic.write_run(tmp_path / "other", content))
    with pytest.raises(record.RecordError, match=reason):
        record.make([runs[-1], other], order(tmp_path, seeds=()))
    assert not (tmp_path / "records").exists()


@pytest.mark.parametrize("codec", [bz2.compress, brotli.compress])
def test_text_inside_programs_of_earlier_packers_is_found(codec: Callable[[bytes], bytes]) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("source", codec(b"print(1)\n"))
        archive.writestr("__main__.py", "whatever runs it")
    assert evidence.packed_source(buffer.getvalue()) == "print(1)\n"
    assert evidence.packed_source(buffer.getvalue()[:-30]) is None
    assert evidence.packed_source(bz2.compress(b"print(1)\n")) is None  # no archive follows


def test_missing_seeds_tracks_and_packed_runs_are_refused(tmp_path: Path) -> None:
    runs = three_runs(tmp_path / "logs")
    with pytest.raises(record.RecordError, match=r"announced but not given: \[7\]"):
        record.make(runs, order(tmp_path, seeds=(42, 7)))
    with pytest.raises(record.RecordError, match="not 8x H100"):
        record.make(runs, order(tmp_path, track="10min_16mb"))
    plain = [run for run in runs if run.seed != 999]
    with pytest.raises(record.RecordError, match="no run used the packed program"):
        record.make(plain, order(tmp_path, seeds=()))
    edit_text(plain[0].files["text"], "Deterministic zip", "Some zip")
    with pytest.raises(record.RecordError, match="no program text with sha256"):
        record.make(runs, order(tmp_path))


def test_run_command_repeats_the_settings_without_machine_paths() -> None:
    differs = {
        "ttt_enabled": False, "data_path": "/mnt/x/sp8192", "run_id": "r", "seed": 42, "a": "b c",
    }
    content = synthetic.result(differs=differs, world_size=8)
    command = record.run_command(Run("r", content))
    assert command == (
        "PRESET=pr1493 SEED=42 TTT_ENABLED=0 DATA_PATH=data/datasets/sp8192 A='b c' "
        "torchrun --standalone --nproc_per_node=8 train_gpt.py"
    )


def test_blank_cell_is_refused_by_key(tmp_path: Path) -> None:
    synthetic.write_run(tmp_path, synthetic.result(clocks__eval_seconds_strict=None))
    with pytest.raises(record.RecordError, match=r"clocks\.eval_seconds_strict is absent"):
        record.build_submission(find_runs(tmp_path), WORDS)
    synthetic.write_run(tmp_path, synthetic.result())
    with pytest.raises(record.RecordError, match="blurb is blank"):
        record.build_submission(find_runs(tmp_path), WORDS | {"blurb": ""})


def test_program_that_does_not_run_by_itself_is_refused(tmp_path: Path) -> None:
    content, source = synthetic.packed_run(42, 2.8)
    content |= {"differs": {"matrix_lr": 0.04}}
    synthetic.write_run(tmp_path / "logs", content, source)
    with pytest.raises(record.RecordError, match="does not give config hash c0ffee"):
        record.make(find_runs(tmp_path / "logs"), order(tmp_path, seeds=()))
    assert list((tmp_path / "records").iterdir()) == []


# -------------------------------------------------------------------------------- command line


def test_submission_command_and_its_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    synthetic.write_run(tmp_path, synthetic.result(audit=None))
    run_id, out = synthetic.result()["run_id"], tmp_path / "out" / "submission.json"
    out.parent.mkdir()
    base = ["submission", run_id, "--logs", str(tmp_path), "--out", str(out)]
    assert record.main(base) == 1  # no author yet
    words = ["--author", "a", "--github-id", "g", "--name", "n", "--blurb", "b"]
    assert record.main([*base, *words]) == 0
    content = json.loads(out.read_text())
    assert "score_before_update" in content["compliance_not_measured"]
    assert "val_bpb_std" not in content
    assert record.main([*base, "--check"]) == 0  # words are taken from the file
    edit_json(out, val_bpb=1.0)
    capsys.readouterr()
    assert record.main([*base, "--check"]) == 1
    assert "val_bpb is not what the logs give" in capsys.readouterr().err
    assert record.main(["submission", "absent", "--logs", str(tmp_path)]) == 2
    assert "'absent' not found" in capsys.readouterr().err


def test_compare_runs_and_folders(
    made: Path, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = tmp_path / "logs"
    ids = [
        synthetic.write_run(logs, synthetic.result(seed, nats, run_id=f"better-{seed}")).stem
        for seed, nats in ((42, 2.780), (314, 2.7812), (999, 2.7791))
    ]
    assert record.main(["compare", ",".join(ids), str(made), "--logs", str(logs)]) == 0
    out = capsys.readouterr().out
    assert "gain of A over B: +0.01990 nats per token" in out
    assert "paired, margin 0.005" in out
    assert "is shown at p < 0.01" in out
    assert record.main(["compare", str(made), ",".join(ids), "--logs", str(logs)]) == 0
    assert "is not shown" in capsys.readouterr().out
    assert record.main(["compare", str(published), str(published)]) == 0
    assert "+0.00000 nats per token" in capsys.readouterr().out


def test_compare_converts_tokenizers_and_refuses_other_texts(tmp_path: Path) -> None:
    def side(name: str, ratio: float, bpb: float, size: float | None = None) -> record.Side:
        values = {seed: bpb + seed / 1e6 for seed in (1, 2, 3)}
        nats = {seed: value * math.log(2) * ratio for seed, value in values.items()}
        return record.Side(name, nats, values, ratio, size)

    coarse, fine = side("coarse", 3.9, 1.08), side("fine", 3.7, 1.09)
    converted = record.in_nats(coarse, fine, None)
    assert converted[1] == pytest.approx((1.08 + 1e-6) * math.log(2) * 3.7)
    with pytest.raises(record.RecordError, match="different texts"):
        record.compare(side("a", 3.7, 1.0, 7e6), side("b", 3.7, 1.0, 8e6), 0.005, 0.01, None)
    bare = tmp_path / "submission.json"
    bare.write_text(json.dumps({"seed_results": {"1": {"val_bpb": 1.1}, "2": {"val_bpb": 1.2}}}))
    loaded = record.load_side(str(bare), tmp_path)
    with pytest.raises(record.RecordError, match="--bytes-per-token"):
        record.compare(loaded, loaded, 0.005, 0.01, None)
    assert record.compare(loaded, loaded, 0.005, 0.01, 3.7)
    assert record.main(["compare", str(bare), str(tmp_path / "absent")]) == 2


def test_folder_of_a_sweep_stands_for_all_its_runs(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "sweep"
    ledger = sweep.Ledger(folder / "ledger.jsonl")
    ledger.announce([sweep.Run(f"seed{s}", {"SEED": s}, s) for s in ("42", "7")])
    content, source = synthetic.packed_run(42, 2.8)
    path = synthetic.write_run(folder / "seed42" / "logs", content, source)
    ledger.add(event="end", key="a", status="failed", result=None)
    ledger.add(event="end", key="a", status="complete", result=str(path.relative_to(folder)))
    command = ["make", str(folder), "--out", str(tmp_path / "records"), "--name", "A run",
               "--author", "someone", "--github-id", "someone", "--blurb", "Two seeds."]
    assert record.main(command) == 1
    assert "seeds announced but not given: [7]" in capsys.readouterr().err
    content, source = synthetic.packed_run(7, 2.81)
    path = synthetic.write_run(folder / "seed7" / "logs", content, source)
    ledger.add(event="end", key="b", status="complete", result=str(path.relative_to(folder)))
    assert record.main(command) == 0
    assert record.main(["compare", str(folder), str(next((tmp_path / "records").iterdir()))]) == 0
    assert "gain of A over B: +0.00000 nats" in capsys.readouterr().out


def test_verify_command_counts_bad_folders(
    made: Path, published: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert record.main(["verify", str(made)]) == 0
    assert "in order" in capsys.readouterr().out
    plant_bytes_code_missing(published)
    assert record.main(["verify", str(made), str(published)]) == 1
    assert (
        "published: contradiction: submission.json: bytes_code is missing"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(("arguments", "message"), [
    ("make a --name n --seeds 42,abc", "'42,abc' must be whole numbers"),
    ("compare a b --level 0", "0 must be above 0 and below 1"),
    ("compare a b --level 1", "1 must be above 0 and below 1"),
    ("compare a b --level nan", "nan must be above 0 and below 1"),
])
def test_wrong_arguments_are_usage_errors(
    capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        record.main(arguments.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_only_the_author_of_other_runs_carries_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    three_runs(tmp_path / "logs")
    other = {"author": "A", "github_id": "a", "blurb": "old", "technique_summary": "PRESET=demo"}
    (tmp_path / "submission.json").write_text(json.dumps(other))
    shutil.copy(record.REPOSITORY / "requirements.txt", tmp_path)
    monkeypatch.setattr(record, "REPOSITORY", tmp_path)
    runs = sorted(str(path) for path in (tmp_path / "logs").glob("*.json"))
    arguments = ["make", *runs, "--name", "new", "--out", str(tmp_path), "--seeds", "42,314,999"]
    assert record.main([*arguments, "--blurb", "now"]) == 0
    [path] = tmp_path.glob("*_new/submission.json")
    found = json.loads(path.read_text())
    assert [found[name] for name in other] == ["A", "a", "now", "PRESET=pr1493"]


def test_submission_of_this_repository_is_what_the_logs_give() -> None:
    path = record.REPOSITORY / "submission.json"
    if path.is_file():
        assert record.main(["submission", "--check"]) == 0


RECORDS = sorted(path for path in (record.REPOSITORY / "records").glob("*/*") if path.is_dir())


@pytest.mark.parametrize("folder", RECORDS, ids=lambda path: path.name)
def test_folder_under_records_is_in_order(folder: Path) -> None:
    assert messages(folder) == []


def test_records_holds_a_folder() -> None:
    assert RECORDS


def test_tolerance_follows_the_printed_digits() -> None:
    assert evidence.agrees(1.081, 1.08103)
    assert not evidence.agrees(1.0810, 1.08103, "1.08100")
    assert evidence.agrees(15_991_930, 15_991_930)
    assert not evidence.agrees(15_991_930, 15_991_931)
