"""tools/bench_variants.py: variants of the micro-step in turns."""

from __future__ import annotations

import inspect
import itertools
import json
import shutil
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
import torch
from toy import PROGRAM, MakeEnv

import train_gpt as golf
from tools import bench_variants, readme_blocks

FEW = "--rounds", "2", "--repeats", "1"


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Another program."""
    return Path(shutil.copy(golf.__file__, tmp_path / "other.py"))


def test_variants_take_turns_and_are_compared_with_the_first(
    make_env: MakeEnv, other: Path, tmp_path: Path
) -> None:
    variants = "", "MLP_MULT=1", f"program={other} blas=cublaslt"
    assert bench_variants.main([*variants, *FEW], make_env()) == 0
    path, = (tmp_path / "logs").glob("bench_variants_cpu_*.json")
    content = json.loads(path.read_text())
    rows = {(row["variant"], row["plan"]): row for row in content["rows"]}
    assert list(rows) == list(itertools.product(variants, ("unlooped", "looped")))
    for (_, plan), row in rows.items():
        assert len(row["ms"]) == 2
        middle, tokens = sum(row["ms"]) / 2, content["tokens_per_micro_step"]
        assert row["tok_s"] == pytest.approx(1e3 * tokens / middle, rel=1e-2)
        assert row["faster"] == pytest.approx(sum(rows["", plan]["ms"]) / 2 / middle - 1, abs=1e-2)
        assert row["source_sha256"] == golf.digest(golf.program_source())
    assert content["failed"] == {}
    page = tmp_path / "page.md"
    page.write_text(f"<!-- generated:variants logs/{path.name} -->\n<!-- /generated -->\n")
    text, _ = readme_blocks.regenerate(page)
    assert "| `as it is` | math | `looped` |" in text
    assert f"| `program={other.name} blas=cublaslt` | math | `looped` |" in text


def test_options_reach_the_compiler(make_env: MakeEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    load = bench_variants.load_program

    def load_watched(path: Path, number: int) -> ModuleType:
        program = load(path, number)
        forward = program.GPT.forward

        def watched(*arguments: object) -> object:
            seen.append(torch._inductor.config.coordinate_descent_tuning)
            return forward(*arguments)

        program.GPT.forward = watched
        return program

    monkeypatch.setattr(bench_variants, "load_program", load_watched)
    text = "coordinate_descent_tuning=True"
    assert bench_variants.main(["", text, "--rounds", "1", "--repeats", "1"], make_env()) == 0
    assert seen == [False] * 2 + [True] * 2 + [False] * 4 + [True] * 4


def test_a_variant_that_fails_is_said_and_the_others_are_measured(
    make_env: MakeEnv, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_variants.main(["ATTENTION=fa3", "", *FEW], make_env()) == 1
    assert "error: ATTENTION=fa3: ConfigError: ATTENTION=fa3: fa3: " in capsys.readouterr().err
    path, = (tmp_path / "logs").glob("bench_variants_cpu_*.json")
    content = json.loads(path.read_text())
    assert list(content["failed"]) == ["ATTENTION=fa3"]
    assert {(row["variant"], row["faster"]) for row in content["rows"]} == {("", 0.0)}
    with pytest.raises(golf.GolfError, match="no variant"):
        bench_variants.main(["ATTENTION=fa3", *FEW], make_env())


@pytest.mark.parametrize("text", [
    "NOPE=1", "no_such_option=1", "MATRIX_LR", "program=/no/such/file", "blas=mkl",
    "coordinate_descent_tuning=maybe"])
def test_what_is_no_variant_is_named(text: str) -> None:
    with pytest.raises(golf.ConfigError, match=r"^variant ") as raised:
        bench_variants.parse_variant(f"MATRIX_LR=0.1 {text}")
    assert text in str(raised.value)


def test_equal_variants_are_a_usage_error() -> None:
    with pytest.raises(SystemExit):
        bench_variants.main(["", ""])


def test_programs_have_operators_of_their_own(tmp_path: Path) -> None:
    """Registered under one name, the last program's would serve all of them."""
    modules = []
    for number, (factor, name) in enumerate([(2, '"golf::times"'), (3, "'golf::times'")]):
        path = tmp_path / f"program_{number}.py"
        path.write_text(PROGRAM.read_text() + "\n" + textwrap.dedent(f"""
            @torch.library.custom_op({name}, mutates_args=(), schema="(Tensor x) -> Tensor")
            def times(x):
                return {factor} * x
        """))
        modules.append(bench_variants.load_program(path, number))
    assert [module.times(torch.ones(())).item() for module in modules] == [2, 3]
    assert modules[0].program_source() != modules[1].program_source()
    assert "def orthogonalise" in inspect.getsource(modules[0].orthogonalise)


def test_what_is_no_program_is_named(tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text("def (")
    with pytest.raises(golf.ConfigError, match=f"program={path} must be a Python file"):
        bench_variants.load_program(path, 0)
