"""The packed program: deterministic, small, and the same program."""

from __future__ import annotations

import ast
import builtins
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


def shapes_of(node: object, names: list[str]) -> object:
    """A tree without its names, which are listed in the order of reading."""
    if isinstance(node, ast.Name | ast.arg):
        names.append(node.id if isinstance(node, ast.Name) else node.arg)
        rest = [shapes_of(child, names) for child in ast.iter_child_nodes(node)]
        return [type(node).__name__, rest]
    if isinstance(node, ast.AST):
        return [type(node).__name__, *(shapes_of(v, names) for _, v in ast.iter_fields(node))]
    return [shapes_of(child, names) for child in node] if isinstance(node, list) else repr(node)


def scopes(source: str) -> list[ast.stmt]:
    """The statements of a program and of its classes, without what packing may drop."""
    tree = Bare().visit(ast.parse(source))
    return [inner for outer in tree.body
            for inner in (outer.body if isinstance(outer, ast.ClassDef) else [outer])]


def test_packed_source_is_the_program_but_for_docstrings_and_names(program: Path) -> None:
    """Renaming is one to one in every function, and touches nothing that lives outside of it."""
    source, found = PROGRAM.read_text(), golf.unpack_program(program)
    public = {word for word in dir(golf)} | set(dir(builtins))
    pairs = list(zip(scopes(source), scopes(found), strict=True))
    assert len(pairs) > 300
    for plain, packed_form in pairs:
        old: list[str] = []
        new: list[str] = []
        same = shapes_of(plain, old) == shapes_of(packed_form, new)
        assert same, ast.unparse(plain)[:200]
        assert len(set(zip(old, new, strict=True))) == len(set(old)) == len(set(new))
        renamed = {a for a, b in zip(old, new, strict=True) if a != b}
        bound = {n.id for n in ast.walk(plain)
                 if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        bound |= {n.arg for n in ast.walk(plain) if isinstance(n, ast.arg)}
        assert renamed <= bound
        assert not {b for a, b in zip(old, new, strict=True) if a != b} & public
    assert '"""' not in found
    assert "#" not in "".join(line for line in found.splitlines() if line.strip().startswith("#"))


def signatures(source: str) -> dict[str, str]:
    """Operators and kernels with the types of their arguments."""
    return {node.name: str([a.annotation and ast.unparse(a.annotation) for a in node.args.args])
            for node in ast.walk(ast.parse(source))
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
