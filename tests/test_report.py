"""tools/report.py, tools/readme_blocks.py, tools/figures.py and tools/svg.py."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import subprocess
import sys
import threading
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
import synthetic_runs as synthetic
from hypothesis import given, settings
from hypothesis import strategies as st

from tools import figures, readme_blocks, report, svg
from tools.runs import Run, TrainPoint, load_run

HOSTILE = "<script>alert(1)</script>\"'&<img src=http://evil/x>"
BREAKDOWN = {
    "document_length": [
        {"upto": 2**k, "bytes": 5, "quantised": 1.3, "documents": 1.3 - k / 50} for k in range(6)
    ],
    "position": [{"upto": 64, "sliding": 1.2}, {"upto": 128, "sliding": 1.1}],
    "stream": [{"share": i / 4, "ttt_sgd": 1.1 - i / 100} for i in range(1, 5)],
}


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    """A logs folder with two seeds of one method and one run of another."""
    folder = tmp_path / "logs"
    synthetic.write_run(folder, synthetic.result(42, 2.80, breakdown=BREAKDOWN))
    synthetic.write_run(folder, synthetic.result(314, 2.801))
    other = synthetic.result(7, 2.78, run_id="record-7", preset="record", config_hash="beef")
    other["config"]["matrix_lr"] = 0.05
    synthetic.write_run(folder, other)
    return folder


SEED_42 = "pr1493-42-20261123T101500"
SEED_314 = "pr1493-314-20261123T101500"


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def is_self_contained(text: str) -> bool:
    """Whether a page loads nothing and runs nothing."""
    page = Page(text)
    loading = {"script", "link", "img", "iframe", "object", "embed", "base", "image", "use"}
    outside = [
        value
        for name, value in page.attributes
        if name in ("src", "href", "action", "xlink:href", "data")
        or "url(" in value
        or name.startswith("on")
    ]
    return not loading & set(page.tags) and not outside and "@import" not in text


# ------------------------------------------------------------------------------------------- page


def test_page_of_one_run(logs: Path) -> None:
    text = report.page([load_run(SEED_42, logs)])
    assert is_self_contained(text)
    assert "default-src 'none'" in text
    assert len(text.encode()) < 2_000_000
    page = Page(text)
    assert page.tags.count("figure") == 13
    assert {"quantised", "documents"} <= set(page.texts)  # lines of one chart, named in its legend
    for words in (
        "1.0844",
        "15,900,982",
        "ttt_sgd",
        "c4_single_pass",
        "Where the 16,000,000 bytes go",
    ):
        assert any(words in part for part in page.texts), words


def test_page_of_two_runs_shows_differences(logs: Path) -> None:
    page = Page(report.page([load_run(SEED_42, logs), load_run("record-7", logs)]))
    assert "Difference" in page.texts
    assert "-0.02000" in page.texts  # nats
    assert {"matrix_lr", "0.03", "0.05"} <= set(page.texts)  # the setting that differs
    assert "warmdown_frac" not in page.texts


def test_page_of_seeds_overlays_them(logs: Path) -> None:
    drawn = figures.figures([load_run(SEED_42, logs), load_run(SEED_314, logs)])
    loss = next(item for item in drawn if item.name == "loss_by_step").drawing
    assert "pr1493 seed 42" in loss
    assert "pr1493 seed 314" in loss
    assert loss.count("<polyline") == 2


def test_foreign_text_is_escaped_everywhere(tmp_path: Path) -> None:
    content = synthetic.result(
        42,
        run_id="odd", preset=HOSTILE, differs={HOSTILE: HOSTILE}, exit_reason=HOSTILE,
        breakdown={"position": [{"upto": 8, HOSTILE: 1.0}]},
    )
    content["quantisation"]["by_tensor"][0]["name"] = HOSTILE
    content["audit"][HOSTILE] = {"passed": True, "checked": 1, "worst": 0}
    content["data"]["name"] = HOSTILE
    path = synthetic.write_run(tmp_path, content)
    with path.with_suffix(".jsonl").open("a") as stream:
        stream.write(json.dumps({"event": "warning", "message": HOSTILE}) + "\n")
        stream.write(json.dumps({"event": "plan", "step": 5, "plan": HOSTILE}) + "\n")
        stream.write(json.dumps({"event": "phase", "phase": HOSTILE, "seconds": 1}) + "\n")
    run = load_run(path)
    run.run_id = HOSTILE
    text = report.page([run, run])
    assert is_self_contained(text)
    assert is_self_contained(report.page([run]))
    for item in figures.figures([run]):
        ElementTree.fromstring(item.drawing)
    assert "<script" not in readme_blocks.cell(HOSTILE)


def test_published_text_log_can_be_drawn(tmp_path: Path) -> None:
    folder = synthetic.write_published(tmp_path)
    text = report.page([load_run(folder / f"train_seed{seed}.log") for seed in synthetic.PUBLISHED])
    assert is_self_contained(text)
    assert "1.08847" in text


def test_run_that_just_began_can_be_drawn(tmp_path: Path) -> None:
    (tmp_path / "new.jsonl").write_text('{"event": "start", "t": 0.1, "run_id": "new"}\n')
    text = report.page([load_run("new", tmp_path)])
    assert "live or unfinished" in text


def test_page_stays_small_with_long_and_many_runs() -> None:
    points = [
        TrainPoint(i, i * 0.1, 3 + 1 / i, 0.5, 1e5, "looped", 1e4, 0.5) for i in range(1, 20_001)
    ]
    runs = [Run(f"run-{i}", {"seed": i}, train=points) for i in range(8)]
    assert len(report.page(runs).encode()) < 2_000_000


def test_command_writes_page_and_figures(logs: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    out, folder = tmp_path / "sub" / "page.html", tmp_path / "figures"
    base = [SEED_42, "--logs", str(logs), "--out", str(out)]
    assert report.main([*base, "--figures", str(folder)]) == 0
    assert out.stat().st_size < 2_000_000
    assert report.main([*base[:-1], str(tmp_path)]) == 0  # a folder
    assert (tmp_path / "report.html").read_text() == out.read_text()
    names = {path.name for path in folder.iterdir()}
    assert {"loss.svg", "bytes.svg", "tensor_error.svg", "bpb_by_position.svg"} <= names
    for path in folder.iterdir():
        ElementTree.parse(path)
    capsys.readouterr()
    assert report.main(["absent", "--logs", str(logs)]) == 2
    assert "'absent' not found" in capsys.readouterr().err
    monkeypatch.setattr(report.shutil, "which", lambda _: None)
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda _: None)
    assert report.main([*base, "--figures", str(folder), "--png"]) == 3
    assert "librsvg2-bin" in capsys.readouterr().err


def test_tensorboard_is_optional_and_gets_all_series(
    logs: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    base = [SEED_42, "--logs", str(logs), "--out", str(tmp_path / "p.html"), "--tensorboard"]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert report.main([*base, str(tmp_path / "tb")]) == 3
    assert "pip install tensorboard" in capsys.readouterr().err
    written: list[tuple[str, float, int]] = []

    class Writer:
        def __init__(self, folder: str) -> None:
            assert folder.endswith(SEED_42)

        def add_scalar(self, *values) -> None:
            written.append(values)

        def close(self) -> None:
            written.append(("closed", 0.0, 0))

    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", type("module", (), {"SummaryWriter": Writer})
    )
    assert report.main([*base, str(tmp_path / "tb")]) == 0
    names = [name for name, _, _ in written]
    assert names.count("train/loss") == 25
    assert {"train/tok_s", "val/bpb", "final_bpb/ttt_sgd", "closed"} <= set(names)


# ----------------------------------------------------------------------------------------- charts


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=40),
    focus=st.booleans(), name=st.text(max_size=60),
)
def test_any_series_gives_well_formed_svg(values: list[float], focus: bool, name: str) -> None:
    line = svg.Series(name, [float(i) for i in range(len(values))], values, dots=True)
    chart = svg.Chart(name, name, name, [line, line], [svg.Mark(1.0, name)], focus=focus)
    drawn = svg.line_chart(chart)
    ElementTree.fromstring(drawn)
    assert "nan" not in drawn.replace(svg.escape(name), "")
    bars = [(name, value, i) for i, value in enumerate(values)]
    ElementTree.fromstring(svg.bar_chart(name, name, [bar for bar in bars if bar[1] == bar[1]]))


def test_ticks_are_round_and_inside() -> None:
    assert svg.ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert svg.ticks(1.0712, 1.1093) == [1.08, 1.09, 1.1]
    assert svg.ticks(3, 3) == [3]
    assert [svg.tick_label(x) for x in (1.2e6, 45_000, 0.35, 2e-6, 0)] == [
        "1.2M",
        "45k",
        "0.35",
        "2e-06",
        "0",
    ]


def test_thinning_keeps_extremes_and_ends() -> None:
    x = [float(i) for i in range(10_000)]
    y = [0.0] * 10_000
    y[5_000], y[7_000] = 9.0, -9.0
    kept = svg.thin(x, y, 200)
    assert len(kept) <= 202
    assert {(5_000.0, 9.0), (7_000.0, -9.0)} <= set(kept)
    assert kept[0][0] == 0.0
    assert kept[-1][0] == 9_999.0


def test_parts_of_the_artifact_add_up(logs: Path) -> None:
    run = load_run(SEED_42, logs)
    assert sum(value for _, value in figures.byte_parts(run)) == 16_000_000
    run.facts["artifact"]["parts"] = {"mlp": 9_000_000, "rest": 1}
    parts = figures.byte_parts(run)
    assert [name for name, _ in parts][1:3] == ["mlp", "rest"]
    assert sum(value for _, value in parts) == 16_000_000


# ----------------------------------------------------------------------------------------- readme

README = f"""# Title

<!-- generated:headline {SEED_42} {SEED_314} -->
<!-- /generated -->
Typed text.
<!-- generated:plot {SEED_42} -->
old
<!-- /generated -->
<!-- generated:result {SEED_42} -->
<!-- /generated -->
<!-- generated:evaluations {SEED_42} -->
<!-- /generated -->
<!-- generated:runs -->
<!-- /generated -->
<!-- generated:bytes {SEED_42} -->
<!-- /generated -->
<!-- generated:speed logs/bench_h200.json -->
<!-- /generated -->
<!-- generated:speed logs/bench_before.json logs/bench_h200.json -->
<!-- /generated -->
<!-- generated:curve logs/quantiser_curve.json -->
<!-- /generated -->
<!-- generated:systems sibling* -->
<!-- /generated -->
<!-- generated:adaptation -->
<!-- /generated -->
<!-- generated:versus {SEED_42},{SEED_314} plain-42,plain-314 -->
<!-- /generated -->
<!-- generated:recipe logs/recipe.json -->
<!-- /generated -->

```
<!-- generated:runs -->
```
"""


@pytest.fixture
def readme(logs: Path) -> Path:
    """A README with every block, beside its logs."""
    bench = {
        "gpu": "NVIDIA H200",
        "rows": [
            {
                "name": "micro-step", "value": 1_072_000.4, "unit": "tok/s", "floor": 1.7e6,
                "ratio_to_floor": 0.63,
            },
            {"name": "start", "value": 61.25, "unit": "s"},
            {"name": "product up forward", "value": 600.0, "unit": "TFLOP/s"},
        ],
    }
    (logs / "bench_h200.json").write_text(json.dumps(bench))
    before = {"rows": [{"name": "micro-step", "value": 900_000, "unit": "tok/s"}]}
    (logs / "bench_before.json").write_text(json.dumps(before))
    point = {"plain_bpb": 1.2, "adapted_bpb": 1.19, "gain_bpb": 0.01, "seconds": 7.2}
    (logs / "adaptation_curve.json").write_text(json.dumps({
        "preset": "record", "documents": 9, "data": "mine", "device": "NVIDIA H200", "rows": [
        point | {"settings": "TTT_CHUNK_SIZE=24", "projected_seconds": 507.4},
        point | {"settings": "", "projected_seconds": 290.1}]}))
    sibling = json.loads((logs / f"{SEED_42}.json").read_text()) | {
        "run_id": "sibling-1", "preset": "pr1453", "hedge1453": {"nats": 1.84, "mass": 42.28}}
    (logs / "sibling-1.json").write_text(json.dumps(sibling))
    curve = {
        "rows": [
            {"method": m, "total_bytes": b, "gap_bpb": g, "checkpoint_run_id": "x"}
            for m, b, g in (
                ("reference", 16_000_000, 0.0118),
                ("coder", 14_000_000, 0.016),
                ("coder", 16_000_000, 0.0101),
            )
        ]
    }
    (logs / "quantiser_curve.json").write_text(json.dumps(curve))
    for seed, name in ((42, SEED_42), (314, SEED_314)):
        plain = json.loads((logs / f"{name}.json").read_text())
        plain |= {"run_id": f"plain-{seed}", "preset": "pr1493",
                  "val_bpb": plain["val_bpb"] + 0.03 + seed / 1e6}
        (logs / f"plain-{seed}.json").write_text(json.dumps(plain))
    (logs / "recipe.json").write_text(json.dumps({"rows": [
        {"technique": "smear gate", "pairs": 2, "gain": 0.0017, "gain noise": 0.0004,
         "ms per step": 90.25, "slower": 0.004, "lines": 15, "packed bytes": 120}]}))
    path = logs.parent / "README.md"
    path.write_text(README)
    return path


def test_readme_blocks_are_generated_and_stable(readme: Path, capsys) -> None:
    assert report.main(["readme", str(readme), "--check"]) == 1
    assert "is out of date" in capsys.readouterr().err
    assert report.main(["readme", str(readme)]) == 0
    text = readme.read_text()
    assert report.main(["readme", str(readme), "--check"]) == 0
    assert report.main(["readme", str(readme)]) == 0
    assert readme.read_text() == text
    for words in (
        "**1.0846 +- 0.0003 BPB** (2.8005 nats per token, `ttt_sgd`)",
        "1x NVIDIA H200",
        "Typed text.",
        "| `sliding` | 1.0922 | 2.8200 | 60.0 |",
        "| `ttt_sgd` | **1.0844** | 2.8000 | 130.5 |",
        "| 1.08444 | 130.5 | 201 | not run | c1 64, c2 64, c3 64, c4 6,000,000, documents 64 |",
        "| program (packed) | 940 | 0.01 % |",
        "| micro-step | 1,072,000 | tok/s | 1,700,000 | 0.63 |",
        "| micro-step | 900,000 | 1,072,000 | tok/s | 1,700,000 | 0.63 |",
        "| start | none | 61.25 | s | none | none |",
        "| `ttt_sgd` | 2.8000 | 1.8400, mass 42.3: no distribution |",
        "First 9 documents of `mine`, NVIDIA H200:",
        "| Own best evaluation, BPB | 1.0846 | 1.1148 | -0.0302 ± 0.0001 |",
        "| smear gate | 2 | +0.0017 ± 0.0004 | not run | 90.2 | +0.4% | 15 | 120 |",
        "| as in `record` | 1.20000 | 1.19000 | 0.01000 | 7 | 290 |\n| `TTT_CHUNK_SIZE=24` |",
        "| start | 61.25 | s | none | none |",
        "| 14,000,000 | none | 0.01600 |",
        "| 16,000,000 | 0.01180 (1.00x) | 0.01010 (0.86x) |",
        "](docs/loss.svg)",
        "[record-7](logs/record-7.txt) | record | 7 |",
    ):
        assert words in text, words
    assert "\nold\n" not in text
    assert "product up" not in text
    assert text.endswith("```\n<!-- generated:runs -->\n```\n")  # documentation inside a fence
    for name in ("loss.svg", "quantiser_curve.svg"):
        ElementTree.parse(readme.parent / "docs" / name)


def test_blocks_without_a_run_speak_of_the_submission(readme: Path) -> None:
    readme.write_text("<!-- generated:headline -->\n<!-- /generated -->\n")
    (readme.parent / "submission.json").write_text(json.dumps({"logs": [f"{SEED_314}.json"]}))
    readme_blocks.update(readme)
    assert "seed 314" in readme.read_text()


def test_check_sees_every_kind_of_staleness(readme: Path) -> None:
    readme_blocks.update(readme)
    assert readme_blocks.stale(readme) == []
    figure = readme.parent / "docs" / "loss.svg"
    drawing = figure.read_text()
    figure.write_text(drawing.replace("BPB", "BPP"))
    assert readme_blocks.stale(readme) == ["loss.svg is not what the logs give"]
    figure.write_text(drawing)
    result = readme.parent / "logs" / f"{SEED_42}.json"
    content = json.loads(result.read_text())
    content["bpb"]["sliding"] = 1.0
    result.write_text(json.dumps(content))
    found = readme_blocks.stale(readme)
    assert any("1.0922" in line and "1.0000" in line for line in found)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("result absent-run", "run 'absent-run' not found"),
        ("headline", "names no run"),
        ("tables x", "no block 'tables'"),
        (f"headline {SEED_42} record-7", "runs differ in config_hash"),
        ("runs nothing*", "matches 'nothing*'"),
        ("speed logs/absent.json", "absent.json"),
        ("speed logs/record-7.json", "has no rows"),
        (f"versus {SEED_42} {SEED_314}", "seeds [42] against [314]"),
        (f"versus {SEED_42}", "two groups of runs"),
        ("recipe", "names no file"),
        ("path nope", "PRESET='nope' must be one of"),
        ("scaling logs/ranks.json", "{'world_size': 2, 'steps': 9} lacks loss_gap, mean_loss_gap"),
        (f"scaling logs/sizes.json {SEED_42}", "was not started by bench_ranks --whole-run"),
        ("result {outside}", "a run outside any folder of logs"),
    ],
)
def test_block_that_cannot_be_written_is_named_with_its_line(
    logs: Path, capsys, block: str, message: str
) -> None:
    path = logs.parent / "README.md"
    incomplete = {"rows": [{}], "agreement": [{"world_size": 2, "steps": 9}]}
    (logs / "ranks.json").write_text(json.dumps(incomplete))
    (logs / "sizes.json").write_text(json.dumps({"rows": [{}]}))
    outside = shutil.copy(logs / f"{SEED_42}.json", path.parent)
    block = block.format(outside=f"{outside} {SEED_42}")
    path.write_text(f"# Title\n<!-- generated:{block} -->\n<!-- /generated -->\n")
    before = path.read_text()
    assert report.main(["readme", str(path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: README.md:2: ")
    assert message in error
    assert error.count("\n") == 1
    assert path.read_text() == before


@pytest.mark.parametrize(("changes", "refused"), [
    ({"config": {"max_wallclock_seconds": 0.0}}, ""),  # equal steps
    ({"config": {"max_wallclock_seconds": 0.0}, "train": {"steps": 399}}, "max_wallclock_seconds"),
    ({"train": {"steps": 399}}, ""),  # equal seconds
    ({"source_sha256": "another"}, "source_sha256"),
    ({"data": {"train_ends_sha256": "another"}}, "data.train_ends_sha256"),
    ({"versions": {"attention_backend": "cudnn"}}, "attention_backend"),
])
def test_two_systems_are_compared_on_equal_terms_or_not_at_all(
    logs: Path, capsys: pytest.CaptureFixture[str], changes: dict, refused: str
) -> None:
    other = json.loads((logs / f"{SEED_42}.json").read_text()) | {"run_id": "other"}
    for key, value in changes.items():
        other[key] = other[key] | value if isinstance(value, dict) else value
    (logs / "other.json").write_text(json.dumps(other))
    path = logs.parent / "README.md"
    path.write_text(f"<!-- generated:versus {SEED_42} other -->\n<!-- /generated -->\n")
    assert report.main(["readme", str(path)]) == bool(refused)
    assert refused in capsys.readouterr().err
    if not refused:  # the speed of runs of equal steps is not compared: they may share a GPU
        assert ("Step, ms" in path.read_text()) == ("train" in changes)


def test_page_that_is_no_text_is_named_with_its_line(logs: Path, capsys) -> None:
    path = logs.parent / "README.md"
    path.write_bytes(b"# Title\ncaf\xe9\n")
    assert report.main(["readme", str(path)]) == 1
    assert capsys.readouterr().err == "error: README.md:2: not UTF-8: invalid continuation byte\n"


@pytest.mark.parametrize("block", ["headline", "bytes"])
def test_another_program_than_the_one_beside_the_page_is_named(logs: Path, block: str) -> None:
    path, program = logs.parent / "README.md", logs.parent / "train_gpt.py"
    path.write_text(f"<!-- generated:{block} {SEED_42} -->\n<!-- /generated -->\n")
    source = json.loads((logs / f"{SEED_42}.json").read_text())["source_sha256"]
    for text, remarks in ((None, 0), (synthetic.PROGRAM, 0), ("other", 1)):
        if text:
            program.write_text(text)
        found = readme_blocks.regenerate(path)[0]
        assert found.count(f"By an earlier program (source {source[:8]}).") == remarks
        assert found.count("earlier program") == remarks


def test_unclosed_blocks_are_errors(logs: Path) -> None:
    path = logs.parent / "README.md"
    for text in ("<!-- generated:runs -->\n", "<!-- generated:runs -->\n<!-- generated:runs -->\n"):
        path.write_text(text)
        with pytest.raises(readme_blocks.BlockError, match="is not closed"):
            readme_blocks.regenerate(path)


def test_links_of_this_repository_lead_somewhere() -> None:
    root = Path(__file__).resolve().parent.parent
    for page in (root / "README.md", *(root / "docs").glob("*.md")):
        links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text() if page.is_file() else "")
        assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("name", ["README.md", "docs/NOTEBOOK.md", "docs/FAULTS.md"])
def test_rows_have_as_many_cells_as_their_header(name: str) -> None:
    """Markdown drops what is more."""
    path, wanted = Path(__file__).resolve().parent.parent / name, 0
    for number, line in enumerate(path.read_text().splitlines(), 1):
        bars = re.findall(r"(?<!\\)\|", re.sub("`[^`]*`", "", line))
        wanted = (wanted or len(bars)) if line.startswith("|") else 0
        assert len(bars) == wanted or not wanted, f"{name}:{number}"


def test_readme_of_this_repository_is_what_the_logs_give(tmp_path: Path) -> None:
    """Runs that a user made since, which git does not know, are not in it yet."""
    root = Path(__file__).resolve().parent.parent
    if not (root / "README.md").is_file():
        pytest.skip("no README.md")
    path = root / "README.md"
    known = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True,
                           check=False).stdout.split("\0")
    if "README.md" in known:  # else this is no checkout
        for name in filter(None, known):
            target = tmp_path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(root / name)
        path = tmp_path / "README.md"
        path.unlink()  # it is where blocks look from
        shutil.copy(root / "README.md", path)
    assert readme_blocks.stale(path) == []


# ------------------------------------------------------------------------------------------ watch


def test_watch_shows_a_growing_run(tmp_path: Path, capsys) -> None:
    content = synthetic.result(run_id="live")
    lines = [json.dumps(event) + "\n" for event in synthetic.events(content)]
    path = tmp_path / "live.jsonl"
    path.write_text("".join(lines[:20]) + lines[20][:25])
    follower = report.Follower("live", tmp_path)
    first = dict(report.status_lines(follower.run()))
    assert "step 240" in first["training"]
    assert "60 %" in first["progress"]
    assert "120 s left" in first["progress"]
    with path.open("a") as stream:
        stream.write(lines[20][25:] + "".join(lines[21:]))
    run = follower.run()
    assert run.train[-1].step == 400
    assert run.problems == []
    assert report.is_finished(run)
    assert report.main(["watch", "live", "--logs", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "ttt_sgd      1.08444 BPB, 130.5 s" in out
    assert "status       complete: finished" in out
    assert report.main(["watch", "absent", "--logs", str(tmp_path)]) == 2


@pytest.mark.parametrize(("arguments", "message"), [
    ("watch live --html 65536", "65536 is not between 0 and 65535"),
    ("watch live --interval -1", "-1.0 is not between 0.1 and 3600.0"),
    ("watch live --html -1", "-1 is not between 0 and 65535"),
    ("live --png", "--png: only with --figures DIR"),
])
def test_wrong_arguments_are_usage_errors(capsys, arguments: str, message: str) -> None:
    with pytest.raises(SystemExit) as stop:
        report.main(arguments.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_watch_does_not_pass_control_characters_on(tmp_path: Path, capsys) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_text(json.dumps({"event": "warning", "message": "\x1b[2Jgone\r"}) + "\n")
    assert report.main(["watch", "odd", "--logs", str(tmp_path), "--once"]) == 0
    assert "?[2Jgone?" in capsys.readouterr().out


def test_watch_page_is_local_and_refreshes(tmp_path: Path) -> None:
    content = synthetic.result(run_id="live")
    lines = [json.dumps(event) + "\n" for event in synthetic.events(content)]
    (tmp_path / "live.jsonl").write_text("".join(lines[:20]))
    server = report.page_server(report.Follower("live", tmp_path), 0, 3)
    assert server.server_address[0] == "127.0.0.1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:

        def get(path: str, host: str) -> tuple[int, str]:
            link = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
            link.request("GET", path, headers={"Host": host})
            answer = link.getresponse()
            return answer.status, answer.read().decode()

        status, text = get("/", "localhost:1")
        assert status == 200
        assert is_self_contained(text)
        assert 'http-equiv="refresh" content="3"' in text
        assert get("/etc/passwd", "localhost")[0] == 404
        assert get("/", "evil.example")[0] == 404
        with (tmp_path / "live.jsonl").open("a") as stream:
            stream.write("".join(lines[20:]))
        assert 'http-equiv="refresh"' not in get("/", "127.0.0.1")[1]
    finally:
        server.shutdown()
        server.server_close()
