"""The packed program: deterministic, small, and the same program."""

from __future__ import annotations

import ast
import hashlib
import io
import zipfile
from pathlib import Path

import pytest
from toy import PROGRAM, MakeEnv, read_result, run_program

import train_gpt as golf


@pytest.fixture(scope="module")
def packed() -> bytes:
    return golf.pack_program(PROGRAM.read_text())


@pytest.fixture
def program(packed: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "packed_train_gpt.py"
    path.write_bytes(packed)
    return path


def test_packing_is_deterministic(packed: bytes) -> None:
    same = [golf.pack_program(PROGRAM.read_text()) == packed, golf.packed_program() == packed]
    assert same == [True, True]


def test_packed_program_is_within_its_budget(packed: bytes) -> None:
    assert len(packed) <= 30_000


def test_comments_and_docstrings_are_free(packed: bytes) -> None:
    source = PROGRAM.read_text()
    talkative = source.replace("\nclass ", "\n# A comment that explains everything.\nclass ")
    talkative = talkative.replace('    """The language model.', '    """Much more of a model.')
    assert talkative != source
    same = golf.pack_program(talkative) == packed
    assert same


class Bare(ast.NodeTransformer):
    """Drops docstrings and annotations; keeps everything that runs."""

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        """`node` with any type."""
        self.generic_visit(node)
        node.annotation = ast.Constant(0)
        return node

    def strip(self, node: ast.Module | ast.ClassDef | ast.FunctionDef) -> ast.AST:
        """`node` without its docstring."""
        self.generic_visit(node)
        first = node.body[0] if node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) \
                and isinstance(first.value.value, str):
            node.body = node.body[1:] or [ast.Pass()]
        if isinstance(node, ast.FunctionDef):
            node.returns = None
            arguments = node.args
            for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]:
                argument.annotation = None
            for extra in (arguments.vararg, arguments.kwarg):
                if extra is not None:
                    extra.annotation = None
        return node

    visit_Module = visit_ClassDef = visit_FunctionDef = strip  # noqa: N815


def meaning(source: str) -> str:
    return ast.dump(Bare().visit(ast.parse(source)))


def test_packed_source_is_the_program_without_docstrings(program: Path) -> None:
    found = golf.unpack_program(program)
    same = meaning(found) == meaning(PROGRAM.read_text())
    assert same  # pytest would take minutes to show how two such texts differ
    assert '"""' not in found
    assert "#" not in "".join(line for line in found.splitlines() if line.strip().startswith("#"))


def signatures(source: str) -> dict[str, str]:
    """Operators and kernels with the types of their arguments."""
    return {node.name: ast.unparse(node.args) for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.FunctionDef) and any(
                word in ast.unparse(decorator) for decorator in node.decorator_list
                for word in ("custom_op", "triton_op", "jit"))}


def test_operators_keep_the_types_that_make_their_signature(program: Path) -> None:
    found, wanted = signatures(golf.unpack_program(program)), signatures(PROGRAM.read_text())
    assert len(wanted) > 1
    assert found == wanted


def test_settings_keep_the_types_by_which_they_are_read(program: Path) -> None:
    fields = [[ast.unparse(field) for field in node.body if isinstance(field, ast.AnnAssign)]
              for source in (golf.unpack_program(program), PROGRAM.read_text())
              for node in ast.walk(ast.parse(source))
              if isinstance(node, ast.ClassDef) and node.name == "Config"]
    assert len(fields[0]) > 60
    assert fields[0] == fields[1]


def test_packed_file_is_an_ordinary_zip(packed: bytes) -> None:
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        assert archive.testzip() is None
        assert "__main__.py" in archive.namelist()
        assert {member.date_time for member in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_packed_program_gives_the_same_result(program: Path, packed: bytes, make_env: MakeEnv,
                                              tmp_path: Path, trained_run: Path) -> None:
    process = run_program(program, make_env(), cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    found, wanted = read_result(tmp_path), read_result(trained_run)
    for key in ("bpb", "nats", "val_bpb", "headline", "config_hash", "packed_sha256"):
        assert found[key] == wanted[key], key
    for key in ("code_bytes", "model_bytes", "total_bytes", "sha256"):
        assert found["artifact"][key] == wanted["artifact"][key], key
    assert found["artifact"]["code_bytes"] == program.stat().st_size == len(packed)
    assert found["packed_sha256"] == hashlib.sha256(packed).hexdigest()
    logged = golf.unpack_program(program) in (tmp_path / "logs" / "toy.txt").read_text()
    assert logged


def test_packed_program_packs_itself(program: Path, packed: bytes, tmp_path: Path) -> None:
    process = run_program(program, {}, "pack", str(tmp_path / "again.py"))
    assert process.returncode == 0, process.stderr
    same = (tmp_path / "again.py").read_bytes() == packed
    assert same


def test_errors_of_the_packed_program_are_one_line_too(program: Path) -> None:
    process = run_program(program, {"MATRIX_LR": "-1"})
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr == "error: MATRIX_LR=-1.0 must be between 0 and 10\n"
