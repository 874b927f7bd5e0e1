"""The packed program: deterministic, small, and the same program."""

from __future__ import annotations

import ast
import builtins
import hashlib
import io
import subprocess
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
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        names.append(node.name)
    if isinstance(node, ast.Name | ast.arg):
        names.append(node.id if isinstance(node, ast.Name) else node.arg)
        rest = [shapes_of(child, names) for child in ast.iter_child_nodes(node)]
        return [type(node).__name__, rest]
    if isinstance(node, ast.AST):
        inner = [shapes_of(v, names) for field, v in ast.iter_fields(node) if field != "name"]
        return [type(node).__name__, *inner]
    return [shapes_of(child, names) for child in node] if isinstance(node, list) else repr(node)


def statements(source: str) -> list[ast.stmt]:
    """The statements of a program without what packing may drop from each."""
    return list(Bare().visit(ast.parse(source)).body)


def kept_statements(plain: list[ast.stmt], found: list[ast.stmt]) -> list[ast.stmt]:
    """Those of the plain program that the packed one still has, which keeps their order."""
    kept, rest = [], iter(plain)
    for node in found:
        wanted = shapes_of(node, [])
        kept.append(next((n for n in rest if shapes_of(n, []) == wanted), ast.Pass()))
    return kept


def defined(node: ast.stmt) -> set[str]:
    """The names that a statement of the module binds."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    return {n.id for n in ast.walk(node)
            if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


PACKER = {"pack_program", "strip_source", "SIGNS", "shorten_names", "PACKED_STUB"}


def test_only_what_nothing_needs_is_left_out(packed: bytes, program: Path) -> None:
    plain = statements(PROGRAM.read_text())
    kept = kept_statements(plain, statements(golf.unpack_program(program)))
    dropped = {name for node in plain if node not in kept for name in defined(node)}
    assert dropped >= PACKER
    users = [node for node in kept if defined(node) != {"packed_program"}]
    mentioned = {n.id for node in users for n in ast.walk(node) if isinstance(n, ast.Name)}
    assert not mentioned & dropped


def test_packed_source_is_the_program_but_for_names(program: Path) -> None:
    """Renaming is one to one in every function, and the same everywhere for what they share."""
    found = statements(golf.unpack_program(program))
    plain = kept_statements(statements(PROGRAM.read_text()), found)
    assert len(plain) > 200
    defined_names = {name for node in plain for name in defined(node)}
    shared: set[tuple[str, str]] = set()
    for outer, outer_packed in zip(plain, found, strict=True):
        body = outer.body if isinstance(outer, ast.ClassDef) else [outer]
        is_class = isinstance(outer_packed, ast.ClassDef)
        body_packed = outer_packed.body if is_class else [outer_packed]
        shared.add((getattr(outer, "name", ""), getattr(outer_packed, "name", "")))
        for node, packed_form in zip(body, body_packed, strict=True):
            old: list[str] = []
            new: list[str] = []
            same = shapes_of(node, old) == shapes_of(packed_form, new)
            assert same, ast.unparse(node)[:200]
            pairs = set(zip(old, new, strict=True))
            assert len(pairs) == len(set(old)) == len(set(new))
            bound = {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
            if isinstance(node, ast.FunctionDef):
                bound |= defined(ast.Module(node.body, []))  # type: ignore[arg-type]
            shared |= {pair for pair in pairs if pair[0] not in bound}
    assert len(shared) == len({a for a, _ in shared}) == len({b for _, b in shared})
    renamed = {a for a, b in shared if a != b}
    assert len(renamed) > 150
    assert renamed <= defined_names
    shown = {"Config", *(name for name in dir(golf) if name.endswith("Error"))}
    assert not renamed & shown
    given = {b for a, b in shared if a != b}
    assert not given & ({*dir(builtins), *dir(golf)} - renamed)


def test_calls_name_only_arguments_that_keep_their_names() -> None:
    """Positional arguments of functions and methods get short names, those behind a star do not."""
    tree = ast.parse(PROGRAM.read_text())
    bodies = [tree.body, *(n.body for n in tree.body if isinstance(n, ast.ClassDef))]
    functions = [n for body in bodies for n in body if isinstance(n, ast.FunctionDef)]
    renamed = {(f.name, a.arg) for f in functions for a in f.args.posonlyargs + f.args.args}
    classes = {n.name: f for n in tree.body if isinstance(n, ast.ClassDef)
               for f in n.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"}
    renamed |= {(name, a.arg) for name, f in classes.items() for a in f.args.args}
    behind_a_star = {a.arg for f in functions for a in f.args.kwonlyargs}
    named = set()
    for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call) and n.keywords):
        called, given = ast.unparse(call.func).split(".")[-1], {k.arg for k in call.keywords}
        assert not renamed & {(called, name) for name in given}, ast.unparse(call)
        if called == "partial":  # of whichever function
            assert given <= {*behind_a_star, "requires_grad"}, ast.unparse(call)
        named |= given
    assert behind_a_star <= named


def test_packed_source_has_neither_comments_nor_docstrings(program: Path) -> None:
    found = golf.unpack_program(program)
    assert '"""' not in found
    assert not [line for line in found.splitlines() if line.strip().startswith("#")]


def test_packing_what_was_packed_changes_nothing(program: Path, packed: bytes) -> None:
    same = golf.pack_program(golf.unpack_program(program)) == packed
    assert same


@pytest.mark.parametrize("version", ["3.12", "3.13"])
def test_other_pythons_strip_to_the_same_text(version: str, program: Path) -> None:
    """Runs the packer's own statements alone: another Python has no torch here."""
    packer = [node for node in ast.parse(PROGRAM.read_text()).body
              if isinstance(node, ast.FunctionDef | ast.Assign)
              and defined(node) & {"NAMED", "SIGNS", "strip_source", "named_nodes", "names_in",
                                   "definitions", "rename", "shorten_names"}]
    text = "\n".join(["from __future__ import annotations", "import ast, re, sys",
                      "from collections import Counter", *map(ast.unparse, packer),
                      "sys.stdout.write(strip_source(sys.stdin.read()))"])
    try:
        process = subprocess.run([f"python{version}", "-c", text], input=PROGRAM.read_text(),
                                 capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        if "Traceback" in str(getattr(error, "stderr", "")):
            raise
        pytest.skip(f"no Python {version} here")
    same = process.stdout == golf.unpack_program(program)
    assert same


def test_settings_keep_the_types_by_which_they_are_read(program: Path) -> None:
    fields = [[[ast.unparse(part) for part in (field.target, field.annotation)]
               for field in node.body if isinstance(field, ast.AnnAssign)]
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
