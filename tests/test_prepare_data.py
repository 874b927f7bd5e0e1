"""tools/prepare_data.py: every source of shards, what it refuses, and what verification finds."""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import itertools
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from tools import prepare_data
from tools.prepare_data import DEMO_NAME, DEMO_TOKENIZER, write_shard
from train_gpt import BOS_ID, DataError, load_tokenizer, read_shard, token_bytes

TOOL = Path(prepare_data.__file__)
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
ADVERSARIAL = [
    "na\u00efve caf\u00e9, \u6771\u4eac, \u2248\u221a and \uff26\uff55\uff4c\uff4c width",
    "\U0001f469\u200d\U0001f467 \U0001f1ea\U0001f1fa \u0301x \u200d",  # joined, flag, combining
    f"a literal {SPACE} mark, tabs\t\tand\n\nnew lines",
    f"{SPACE} begins with the mark",
    "0123456789 and \U0010fffd and \x00 \x07 control",
]


def run(*arguments: object) -> int:
    return prepare_data.main([str(argument) for argument in arguments])


def words(seed: int, count: int) -> str:
    """English-looking text that no other seed gives."""
    generator = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlu"))
    return " ".join("".join(generator.choice(letters, 4)) for _ in range(count))


def write_jsonl(path: Path, texts: list[str]) -> Path:
    data = "".join(json.dumps({"text": text, "src": "test"}) + "\n" for text in texts).encode()
    if path.suffix == ".xz":
        data = lzma.compress(data)
    elif path.suffix == ".gz":
        data = gzip.compress(data)
    path.write_bytes(data)
    return path


def documents_of(folder: Path, split: str) -> list[list[int]]:
    """Token ids of every document of a split, without BOS."""
    shards = [read_shard(path) for path in prepare_data.find_shards(folder, split)]
    return [document[1:].tolist() for document in prepare_data.split_documents(shards)]


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with the demo dataset, built once even by several test processes."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with (base / "prepare_data.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run("demo", "--data-dir", base / "demo") == 0
    return base / "demo"


@pytest.fixture(scope="session")
def model(demo: Path) -> Path:
    return demo / "tokenizers" / DEMO_TOKENIZER


@pytest.fixture
def small(tmp_path: Path, model: Path) -> Path:
    """A dataset of a few documents, several shards and the demo tokenizer, to be damaged."""
    train = write_jsonl(tmp_path / "train.jsonl", [words(seed, 300) for seed in range(20)])
    val = write_jsonl(tmp_path / "val.jsonl", [words(seed, 200) for seed in range(50, 54)])
    options = ["--tokenizer", model, "--name", "small", "--data-dir", tmp_path]
    sizes = ["--shard-tokens", 9000, "--workers", 1]
    assert run("jsonl", train, "--val", val, *options, *sizes) == 0
    return tmp_path / "datasets" / "small"


# --------------------------------------------------------------------------------------------------
# demo
# --------------------------------------------------------------------------------------------------


def test_demo_corpus_has_the_promised_sizes(demo: Path) -> None:
    folder = demo / "datasets" / DEMO_NAME
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["train_raw_bytes"] + manifest["val_raw_bytes"] >= 2_000_000
    assert 60_000 <= manifest["val_raw_bytes"] <= 80_000
    for split in ("train", "val"):
        documents = documents_of(folder, split)
        assert len(documents) == manifest[f"{split}_documents"]
        assert sum(map(len, documents)) + len(documents) == manifest[f"{split}_tokens"]
    assert manifest["train_shards"] >= 2
    assert sys.version.split()[0] in manifest["source"]


def test_demo_documents_are_bos_and_text_pieces_only(demo: Path, model: Path) -> None:
    tokenizer = load_tokenizer(model, 1024)
    for split in ("train", "val"):
        for document in documents_of(demo / "datasets" / DEMO_NAME, split):
            assert min(document) > 3  # neither padding, BOS, EOS nor unknown
            text = tokenizer.decode(document)
            assert 190 <= len(text) <= 4100
            assert text == " ".join(text.split())


def test_demo_tokenizer_has_the_competitions_settings(model: Path) -> None:
    tokenizer = load_tokenizer(model, 1024)
    assert [tokenizer.id_to_piece(i) for i in range(4)] == ["<pad>", "<s>", "</s>", "<unk>"]
    assert [tokenizer.is_byte(i) for i in range(3, 261)] == [False] + [True] * 256 + [False]
    assert not tokenizer.is_unknown(tokenizer.piece_to_id(SPACE))
    assert tokenizer.encode("the", out_type=str)[0][0] == "t"  # no dummy prefix
    assert tokenizer.encode("1984", out_type=str) == list("1984")
    assert tokenizer.decode(tokenizer.encode("\ufb01ne  \uff21")) == "fine A"


def test_complete_demo_is_left_alone(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = demo / "datasets" / DEMO_NAME
    before = folder.stat().st_ino
    assert run("demo", "--data-dir", demo) == 0
    assert "is complete" in capsys.readouterr().out
    assert folder.stat().st_ino == before


def test_damaged_demo_is_rebuilt_to_the_same_bytes(demo: Path, tmp_path: Path) -> None:
    copy = tmp_path / "data"
    shutil.copytree(demo, copy)
    damaged = copy / "datasets" / DEMO_NAME / "fineweb_train_000001.bin"
    damaged.write_bytes(damaged.read_bytes()[:-2])
    command = [sys.executable, str(TOOL), "demo", "--data-dir", "data"]
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    subprocess.run(command, check=True, cwd=tmp_path, env=environment, capture_output=True)
    assert sorted(path.name for path in copy.iterdir()) == ["datasets", "tokenizers"]
    for path in (path for path in demo.rglob("*") if path.is_file()):
        assert (copy / path.relative_to(demo)).read_bytes() == path.read_bytes(), path


def test_modules_are_read_and_never_run(tmp_path: Path) -> None:
    source = '''"""Module text."""
raise SystemExit("was imported")
class A:
    """Class text."""
    def f(self):
        """Function text."""
# First comment line
# and its second one.
'''
    (tmp_path / "module.py").write_text(source)
    (tmp_path / "broken.py").write_text("def (")
    texts = prepare_data.texts_of_module(tmp_path / "module.py")
    found = [" ".join(text.split()) for text in texts]
    assert found == [
        "Module text.",
        "Class text.",
        "Function text.",
        "First comment line and its second one.",
    ]
    assert list(prepare_data.texts_of_module(tmp_path / "broken.py")) == []


def test_paragraphs_keep_prose_and_drop_sessions_tables_and_rules() -> None:
    text = "Plain  words\nhere.\n\n>>> f(1)\n2\n\n1 2 3 | 4 5 6\n\n=====\nMore words."
    assert list(prepare_data.paragraphs_of(text)) == ["Plain words here.", "More words."]


def test_repeated_paragraphs_and_phrases_are_dropped() -> None:
    first, second = words(1, 30), words(2, 30)
    overlap = " ".join([*first.split()[5:], "and", "more"])
    seen: set[int] = set()
    kept = list(prepare_data.drop_repeats([first, "Short.", overlap, "Short.", second], seen))
    assert kept == [first, "Short.", second]


@given(st.lists(st.integers(1, 3000), max_size=30))
def test_packed_documents_keep_order_and_bounds(sizes: list[int]) -> None:
    paragraphs = [chr(97 + i % 26) * size for i, size in enumerate(sizes)]
    documents = list(prepare_data.pack_documents(paragraphs))
    assert all(200 <= len(document) <= 4000 for document in documents)
    packed = " ".join(documents).split()
    rest = iter(paragraphs)
    assert all(paragraph in rest for paragraph in packed)
    assert sum(map(len, paragraphs)) - sum(map(len, packed)) <= 200 * (len(documents) + 1)


def test_too_little_documentation_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text(f'"""{words(1, 100)}"""\n')
    with pytest.raises(DataError, match=r"at least 2,000,000 B"):
        prepare_data.harvest_documents(tmp_path)


# --------------------------------------------------------------------------------------------------
# jsonl
# --------------------------------------------------------------------------------------------------


def test_jsonl_keeps_order_across_files_formats_processes_and_shards(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_data, "CHARS_PER_BATCH", 5000)
    texts = [words(seed, 40 + seed % 400) for seed in range(60)] + ADVERSARIAL
    files = [
        write_jsonl(tmp_path / "a.jsonl.xz", texts[:20]),
        write_jsonl(tmp_path / "b.jsonl", [*texts[20:40], " \n "]),
        write_jsonl(tmp_path / "c.jsonl.gz", texts[40:]),
    ]
    val = write_jsonl(tmp_path / "val.jsonl", [words(99, 50)])
    for name, workers in (("one", 1), ("two", 2)):
        options = ["--name", name, "--workers", workers, "--shard-tokens", 5000]
        where = ["--tokenizer", model, "--data-dir", tmp_path / "data"]
        assert run("jsonl", *files, "--val", val, *options, *where) == 0
    one, two = (tmp_path / "data" / "datasets" / name for name in ("one", "two"))
    manifest = json.loads((two / "manifest.json").read_text())
    assert manifest["files"] == json.loads((one / "manifest.json").read_text())["files"]
    assert manifest["train_shards"] > 2
    assert manifest["train_raw_bytes"] == sum(len(text.encode()) for text in texts)
    assert documents_of(two, "train") == load_tokenizer(model, 1024).encode(texts)
    assert (tmp_path / "data" / "tokenizers" / model.name).read_bytes() == model.read_bytes()


def test_only_a_few_batches_are_read_ahead(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_data, "CHARS_PER_BATCH", 1)
    taken: list[int] = []

    def texts() -> Iterator[str]:
        for seed in range(1000):
            taken.append(seed)
            yield f"text {seed}"

    results = prepare_data.encode_texts(texts(), model, 2)
    next(results)
    assert len(taken) <= 2 * prepare_data.BATCHES_PER_WORKER + 1


@pytest.mark.parametrize("tokenizer", ["given", "trained"])
def test_validation_document_in_train_is_refused_and_nothing_is_left(
    tokenizer: str, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", ["first one", "same  text\nhere", "last"])
    val = write_jsonl(tmp_path / "val.jsonl", ["other", "same text here "])
    chosen = ["--tokenizer", model] if tokenizer == "given" else ["--train-tokenizer", 300]
    place = ["--name", "n", "--data-dir", tmp_path / "data", "--workers", 1]
    assert run("jsonl", train, "--val", val, *chosen, *place) == 1
    assert f"error: {train}:2: this document is also a validation" in capsys.readouterr().err
    assert [path for path in (tmp_path / "data").rglob("*") if path.is_file()] == []


def test_hash_split_is_disjoint_complete_and_sends_equal_texts_to_one_side(
    tmp_path: Path, model: Path
) -> None:
    texts = [words(seed, 30) for seed in range(200)]
    copies = [text.replace(" ", "\n") for text in texts[:50]]
    source = write_jsonl(tmp_path / "all.jsonl", texts + copies)
    options = ["--val-fraction", 0.2, "--tokenizer", model, "--name", "split", "--workers", 1]
    assert run("jsonl", source, *options, "--data-dir", tmp_path) == 0
    folder = tmp_path / "datasets" / "split"
    train, val = ({tuple(d) for d in documents_of(folder, split)} for split in ("train", "val"))
    assert train.isdisjoint(val)
    assert len(train | val) == 200
    assert 20 <= len(val) <= 60
    assert run("verify", folder) == 0


def test_trained_tokenizer_is_the_same_every_time_and_ignores_validation_text(
    tmp_path: Path,
) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", [words(seed, 2000) for seed in range(5)])
    models = []
    for name, text in (("a", "zebra " * 50), ("b", "quiz " * 50)):
        val = write_jsonl(tmp_path / f"{name}.jsonl", [text])
        options = ["--val", val, "--train-tokenizer", 400, "--name", name, "--workers", 1]
        assert run("jsonl", train, *options, "--data-dir", tmp_path) == 0
        models.append(tmp_path / "tokenizers" / f"{name}_bpe.model")
    assert models[0].read_bytes() == models[1].read_bytes()
    token_bytes(load_tokenizer(models[0], 400))


def test_too_little_text_for_the_vocabulary_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", ["few words"])
    options = ["--val-fraction", 0.0001, "--train-tokenizer", 1024, "--name", "n"]
    assert run("jsonl", train, *options, "--data-dir", tmp_path / "data") == 1
    assert "tokenizer of 1024 pieces: the text yields only 2" in capsys.readouterr().err


def test_tokenizer_with_another_bos_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stem = tmp_path / "odd"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([words(seed, 300) for seed in range(9)]),
        model_prefix=str(stem), model_type="bpe", vocab_size=300, hard_vocab_limit=False, bos_id=2,
        eos_id=1, minloglevel=2,
    )
    train = write_jsonl(tmp_path / "train.jsonl", ["some text"])
    options = ["--val-fraction", 0.5, "--tokenizer", f"{stem}.model", "--name", "n"]
    assert run("jsonl", train, *options, "--data-dir", tmp_path) == 1
    assert "BOS is id 2, it must be 1" in capsys.readouterr().err


BAD_INPUT = {
    "not_json": ("bad.jsonl", b'{"text": "fine"}\n{"text": \n', "bad.jsonl:2: not a JSON object"),
    "no_text": ("bad.jsonl", b'{"body": "fine"}\n', "bad.jsonl:1: .*KeyError"),
    "text_is_a_number": ("bad.jsonl", b'{"text": 5}\n', "bad.jsonl:1: .*AttributeError"),
    "half_a_surrogate": ("bad.jsonl", b'{"text": "\\ud800"}\n', "bad.jsonl:1: .*surrogate"),
    "not_utf8": ("bad.jsonl", b'{"text": "\xff"}\n', "bad.jsonl:1: .*UnicodeDecodeError"),
    "cut_xz": ("bad.jsonl.xz", lzma.compress(b'{"text": "abc"}\n' * 9)[:-9], "damaged after line"),
    "not_xz": ("bad.jsonl.xz", b"plain text", "bad.jsonl.xz: damaged after line 0"),
    "cut_gz": ("bad.jsonl.gz", gzip.compress(b'{"text": "abc"}\n' * 9)[:-9], "damaged after line"),
    "not_gz": ("bad.jsonl.gz", b"plain text", "bad.jsonl.gz: damaged after line 0"),
    "no_documents": ("bad.jsonl", b"\n\n", "no train documents, at least 1"),
    "suffix": ("bad.txt", b"text", "bad.txt: name must end in"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_jsonl_names_file_and_line(
    case: str, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, data, message = BAD_INPUT[case]
    (tmp_path / name).write_bytes(data)
    val = write_jsonl(tmp_path / "val.jsonl", ["validation"])
    options = ["--val", val, "--tokenizer", model, "--name", "n", "--workers", 1]
    assert run("jsonl", tmp_path / name, *options, "--data-dir", tmp_path / "data") == 1
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    assert re.search(message, errors[0])


def test_existing_data_is_replaced_only_when_told(
    small: Path, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (small / "manifest.json").read_bytes()
    command = ["jsonl", tmp_path / "train.jsonl", "--val", tmp_path / "val.jsonl", "--workers", 1]
    command += ["--tokenizer", model, "--name", "small", "--data-dir", tmp_path]
    assert run(*command) == 1
    assert "--force replaces it" in capsys.readouterr().err
    assert (small / "manifest.json").read_bytes() == before
    assert run(*command, "--force") == 0  # without --shard-tokens: one shard instead of several
    assert len(prepare_data.find_shards(small, "train")) == 1
    (tmp_path / "tokenizers" / model.name).write_bytes(b"another one")
    assert run(*command, "--force") == 1
    assert "rename one of them" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# verify
# --------------------------------------------------------------------------------------------------


def test_verify_passes_what_the_tool_builds(
    demo: Path, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (demo / "datasets" / DEMO_NAME, small):
        assert run("verify", folder) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        assert "ok" in captured.out.splitlines()[-1]


def alter_shard(folder: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    tokens = np.array(read_shard(folder / name))
    write_shard(folder / name, change(tokens))


def set_token(position: int, value: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(tokens: np.ndarray) -> np.ndarray:
        tokens[position] = value
        return tokens

    return change


def break_magic(folder: Path) -> None:
    path = folder / "fineweb_train_000001.bin"
    path.write_bytes(b"\x00" + path.read_bytes()[1:])


def break_length(folder: Path) -> None:
    path = folder / "fineweb_val_000000.bin"
    path.write_bytes(path.read_bytes()[:-2])


def break_token_id(folder: Path) -> None:
    alter_shard(folder, "fineweb_train_000000.bin", set_token(5, 1024))


def break_first_token(folder: Path) -> None:
    alter_shard(folder, "fineweb_val_000000.bin", set_token(0, 300))


def break_documents(folder: Path) -> None:
    alter_shard(folder, "fineweb_train_000001.bin", lambda tokens: np.where(tokens == 1, 9, tokens))


def break_one_token(folder: Path) -> None:
    alter_shard(folder, "fineweb_train_000000.bin", set_token(5, 400))


def break_disjointness(folder: Path) -> None:
    val = documents_of(folder, "val")[1]
    alter_shard(
        folder,
        "fineweb_train_000000.bin",
        lambda tokens: np.concatenate([[BOS_ID], val, tokens]).astype(np.uint16),
    )


def break_manifest_count(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"val_bytes": 7}))


def break_by_removing(folder: Path) -> None:
    prepare_data.find_shards(folder, "train")[-1].unlink()


def break_by_adding(folder: Path) -> None:
    write_shard(folder / "fineweb_train_000099.bin", np.array([BOS_ID, 300], dtype=np.uint16))


def break_tokenizer(folder: Path) -> None:
    texts = [words(seed, 20_000) for seed in range(2)]
    place = folder.parent.parent / "tokenizers" / DEMO_TOKENIZER
    prepare_data.train_tokenizer(texts, 1024, place)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (break_magic, "fineweb_train_000001.bin: magic"),
        (break_length, r"fineweb_val_000000.bin: magic, version and tokens"),
        (break_token_id, "token id 1024"),
        (break_first_token, "begins with id 300, not with BOS"),
        (break_documents, "fineweb_train_000001.bin: no document begins here"),
        (break_one_token, "fineweb_train_000000.bin: size or SHA-256 differs"),
        (break_disjointness, "1 of 4 distinct validation documents occur in train"),
        (break_manifest_count, "val_bytes is 7, the files hold"),
        (break_by_removing, "missing, the manifest lists it"),
        (break_by_adding, "fineweb_train_000099.bin: not in the manifest"),
        (break_tokenizer, "not the tokenizer of"),
    ],
)
def test_verify_finds_damage(
    break_it: Callable[[Path], None],
    message: str,
    small: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    break_it(small)
    assert run("verify", small) == 1
    captured = capsys.readouterr()
    assert re.search(f"error: .*{message}", captured.err)
    assert captured.out.strip().endswith("FAILED")


def test_verify_warns_of_shared_phrases_and_counts_their_share(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (small / "manifest.json").unlink()
    half = documents_of(small, "val")[0][: len(documents_of(small, "val")[0]) // 2]
    alter_shard(
        small,
        "fineweb_train_000000.bin",
        lambda tokens: np.concatenate([[BOS_ID], half, tokens]).astype(np.uint16),
    )
    tokenizer = ["--tokenizer", small.parent.parent / "tokenizers" / DEMO_TOKENIZER]
    assert run("verify", small, *tokenizer, "--shingle-tokens", 0) == 0
    captured = capsys.readouterr()
    assert "manifest.json: missing" in captured.err
    shares = re.findall(r"warning: ([\d.]+)% of the validation 20-word", captured.err)
    assert [8 < float(share) < 13 for share in shares] == [True]  # half of one document in four


def test_verify_needs_to_know_the_tokenizer(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (small / "manifest.json").unlink()
    assert run("verify", small) == 1
    assert "give --tokenizer" in capsys.readouterr().err


def test_verify_reads_the_side_car(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = np.array(read_shard(small / "fineweb_val_000000.bin"))
    (small / "manifest.json").unlink()
    counts = np.where(tokens == BOS_ID, 0, 2).astype(np.uint16)
    command = ["verify", small, "--tokenizer"]
    command.append(small.parent.parent / "tokenizers" / DEMO_TOKENIZER)
    write_shard(small / "fineweb_val_bytes_000000.bin", counts)
    assert run(*command) == 0
    assert f"val raw bytes     {counts.sum():,}" in capsys.readouterr().out
    write_shard(small / "fineweb_val_bytes_000000.bin", counts + np.uint16(1))
    assert run(*command) == 1
    assert "counts bytes for BOS" in capsys.readouterr().err
    write_shard(small / "fineweb_val_bytes_000000.bin", counts[:-1])
    assert run(*command) == 1
    assert "counts," in capsys.readouterr().err


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.lists(st.integers(0, 40)))
def test_documents_do_not_depend_on_where_shards_end(tokens: list[int], cuts: list[int]) -> None:
    stream = np.array(tokens, dtype=np.uint16)
    shards = np.split(stream, sorted(min(cut, len(stream)) for cut in cuts))
    documents = [document.tolist() for document in prepare_data.split_documents(shards)]
    assert list(itertools.chain.from_iterable(documents)) == tokens
    assert all(1 not in document[1:] for document in documents)
    assert all(document[0] == 1 for document in documents[1:])


def test_shingles_equal_a_plain_search() -> None:
    val, train = [words(1, 60), words(2, 19)], [words(3, 90), words(1, 60)[40:200]]
    shingles = [
        {tuple(part[i : i + 20]) for text in texts for part in [text.split()]
         for i in range(len(part) - 19)}
        for texts in (val, train)
    ]  # fmt: skip
    known = np.unique(prepare_data.shingle_hashes(val))
    assert len(known) == len(shingles[0]) == 41
    expected = len(shingles[0] & shingles[1]) / len(shingles[0])
    assert prepare_data.share_of_shingles(known, [train[:1], train[1:]], 2) == expected > 0


@given(st.lists(st.text(max_size=60), min_size=1, max_size=5))
def test_counted_bytes_are_those_of_the_decoded_text(demo: Path, texts: list[str]) -> None:
    path = demo / "tokenizers" / DEMO_TOKENIZER
    encoded = prepare_data.encode_batch([*texts, *ADVERSARIAL], str(path))
    tokenizer = load_tokenizer(path, 1024)
    decoded = prepare_data.decode_documents(
        prepare_data.split_documents([encoded.tokens]), tokenizer
    )
    expected = sum(len(text.encode()) for batch in decoded for text in batch)
    assert prepare_data.count_bytes([encoded.tokens], token_bytes(tokenizer)) == expected
    cut = len(encoded.tokens) // 2
    halves = [encoded.tokens[:cut], encoded.tokens[cut:]]
    assert prepare_data.count_bytes(halves, token_bytes(tokenizer)) == expected


# --------------------------------------------------------------------------------------------------
# download
# --------------------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PREFIX = "datasets/datasets/fineweb10B_sp1024"


class FakeHub(ThreadingHTTPServer):
    """A dataset repository that speaks the hub's protocol on loopback."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FakeHubHandler)
        self.files: dict[str, bytes] = {}
        self.wrong_hashes: set[str] = set()
        self.cut_once: set[str] = set()
        self.requests: list[tuple[str, str | None]] = []  # file, Range header

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def sha256(self, name: str) -> str:
        digest = hashlib.sha256(self.files[name]).hexdigest()
        return digest[::-1] if name in self.wrong_hashes else digest


class FakeHubHandler(BaseHTTPRequestHandler):
    """Repository listing, file metadata and file contents with ranges."""

    protocol_version = "HTTP/1.1"
    server: FakeHub

    def log_message(self, format: str, *arguments: object) -> None:
        """Keeps test output clean."""

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def answer(self, *, with_body: bool) -> None:
        path = self.path.split("?")[0]
        resolve = f"/datasets/willdepueoai/parameter-golf/resolve/{COMMIT}/"
        if path in (
            "/api/datasets/willdepueoai/parameter-golf/revision/main",
            "/api/datasets/willdepueoai/parameter-golf",
        ):
            self.send_listing()
        elif path.startswith(resolve) and path.removeprefix(resolve) in self.server.files:
            self.send_content(path.removeprefix(resolve), with_body=with_body)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RevisionNotFound")
            self.send_header("X-Error-Message", "no such revision")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def send_listing(self) -> None:
        siblings = []
        for name, data in self.server.files.items():
            lfs = {"sha256": self.server.sha256(name), "size": len(data), "pointerSize": 130}
            siblings.append({"rfilename": name, "size": len(data), "blobId": "0" * 40, "lfs": lfs})
        body = json.dumps({"id": "r", "sha": COMMIT, "siblings": siblings}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_content(self, name: str, *, with_body: bool) -> None:
        data, wanted = self.server.files[name], self.headers.get("Range")
        if with_body:
            self.server.requests.append((Path(name).name, wanted))
        begin = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        self.send_header("ETag", f'"{self.server.sha256(name)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(data) - begin))
        self.end_headers()
        if not with_body:
            return
        if name in self.server.cut_once:
            self.server.cut_once.remove(name)
            self.wfile.write(data[begin : len(data) // 2])
            self.close_connection = True
            return
        self.wfile.write(data[begin:])


@pytest.fixture
def hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with three training shards of the variant sp1024."""
    pytest.importorskip("huggingface_hub")
    server = FakeHub()
    server.files["datasets/tokenizers/fineweb_1024_bpe.model"] = model.read_bytes()
    server.files["README.md"] = b"not part of the data"
    folder = tmp_path / "published"
    folder.mkdir()
    for number, name in enumerate(["val_000000", *(f"train_{i:06d}" for i in range(3))]):
        texts = [words(100 * number + i, 100) for i in range(8)]
        path = folder / f"fineweb_{name}.bin"
        write_shard(path, prepare_data.encode_batch(texts, str(model)).tokens)
        server.files[f"{PREFIX}/{path.name}"] = path.read_bytes()
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_download_fetches_verifies_describes_and_goes_on(
    hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["download", "sp1024", "--data-dir", tmp_path / "data"]
    assert run(*command, "--train-shards", 1) == 0
    assert f"main is commit {COMMIT}" in capsys.readouterr().out
    folder = tmp_path / "data" / "datasets" / "fineweb10B_sp1024"
    assert len(list(folder.glob("*.bin"))) == 2
    hub.requests.clear()
    assert run(*command) == 0
    assert sorted(name for name, _ in hub.requests) == [
        "fineweb_train_000001.bin",
        "fineweb_train_000002.bin",
    ]
    for name, data in hub.files.items():
        if name.startswith(PREFIX):
            assert (folder / Path(name).name).read_bytes() == data
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["revision"] == COMMIT
    assert (manifest["train_shards"], manifest["train_documents"]) == (3, 24)
    assert manifest["source"].endswith("willdepueoai/parameter-golf")
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["datasets", "tokenizers"]
    assert run("verify", folder) == 0


def test_broken_transfer_goes_on_in_the_middle_of_the_file(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient = types.SimpleNamespace(sleep=lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.file_download.time", patient)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 512)
    name = "fineweb_train_000000.bin"
    hub.cut_once.add(f"{PREFIX}/{name}")
    assert run("download", "sp1024", "--data-dir", tmp_path, "--train-shards", 1) == 0
    ranges = [wanted or "" for requested, wanted in hub.requests if requested == name]
    assert ranges[0] == ""
    assert re.fullmatch(r"bytes=[1-9]\d+-\d*", ranges[1])
    assert run("verify", tmp_path / "datasets" / "fineweb10B_sp1024") == 0


def test_interrupted_download_keeps_finished_files(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    command = ["download", "sp1024", "--data-dir", tmp_path]
    name = "fineweb_train_000002.bin"
    hub.cut_once.add(f"{PREFIX}/{name}")
    monkeypatch.setattr(prepare_data, "DOWNLOADS_AT_ONCE", 1)
    with monkeypatch.context() as patch:  # the client's pause after a broken transfer
        patch.setattr("huggingface_hub.file_download.time", types.SimpleNamespace(sleep=interrupt))
        assert run(*command) == 130
    assert not list(tmp_path.rglob("manifest.json"))
    assert len(list((tmp_path / "datasets" / "fineweb10B_sp1024").glob("*.bin"))) >= 2
    before = len(hub.requests)
    assert run(*command) == 0
    assert name in [requested for requested, _ in hub.requests[before:]]
    assert len(hub.requests) == 6  # five files, one of them twice
    assert not list(tmp_path.glob(".downloading*"))


def test_download_repairs_damaged_files_and_replaces_nothing_else(
    hub: FakeHub, tmp_path: Path
) -> None:
    command = ["download", "sp1024", "--data-dir", tmp_path / "data"]
    assert run(*command) == 0
    folder = tmp_path / "data" / "datasets" / "fineweb10B_sp1024"
    alter_shard(folder, "fineweb_train_000001.bin", set_token(9, 500))
    hub.requests.clear()
    assert run(*command, "--train-shards", 1) == 0
    assert [name for name, _ in hub.requests] == ["fineweb_train_000001.bin"]
    assert run("verify", folder) == 0


def test_download_refuses_what_is_not_as_announced(
    hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["download", "sp1024", "--data-dir", tmp_path / "data"]
    name = "fineweb_train_000002.bin"
    hub.wrong_hashes.add(f"{PREFIX}/{name}")
    assert run(*command) == 1
    assert f"{name}: SHA-256 is not the hub's" in capsys.readouterr().err
    assert not (tmp_path / "data" / "datasets" / "fineweb10B_sp1024" / name).exists()
    hub.wrong_hashes.clear()
    hub.files[f"{PREFIX}/{name}"] = b"\x00" * 2048
    assert run(*command) == 1
    assert f"{name}: magic, version and tokens are [0, 0, 0]" in capsys.readouterr().err
    assert not list((tmp_path / "data").rglob("manifest.json"))


def test_download_says_what_the_repository_lacks(
    hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["download", "sp1024", "--data-dir", tmp_path / "data"]
    assert run(*command, "--train-shards", 4) == 1
    assert "--train-shards 4: the repository holds 3" in capsys.readouterr().err
    assert run(*command, "--revision", "nothing") == 1
    assert "RevisionNotFound" in capsys.readouterr().err
    foreign = tmp_path / "data" / "datasets" / "fineweb10B_sp1024" / "fineweb_train_000007.bin"
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(b"")
    assert run(*command) == 1
    assert "not part of the published export" in capsys.readouterr().err
    del hub.files["datasets/tokenizers/fineweb_1024_bpe.model"]
    assert run(*command) == 1
    assert "no fineweb_1024_bpe.model" in capsys.readouterr().err
    assert hub.requests == []


def test_download_checks_disk_space_first(
    hub: FakeHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert run("download", "sp1024", "--data-dir", tmp_path / "data") == 1
    assert "the download needs" in capsys.readouterr().err
    assert hub.requests == []


def test_download_offline_is_one_clear_line(
    hub: FakeHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    assert run("download", "sp8192", "--data-dir", tmp_path) == 1
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("error: kevclark/parameter-golf: ConnectError")


def test_download_without_the_package_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert run("download", "sp1024", "--data-dir", tmp_path) == 1
    assert "pip install huggingface_hub" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# command line
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["demo", "jsonl", "download", "verify"])
def test_help_tells_exit_codes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(command, "--help")
    assert stop.value.code == 0
    assert "Exit codes: 0 done" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["jsonl", "a.jsonl", "--name", "n", "--tokenizer", "t"],
        ["jsonl", "a.jsonl", "--name", "n", "--tokenizer", "t", "--val-fraction", "1.5"],
        ["jsonl", "a.jsonl", "--name", "../n", "--tokenizer", "t", "--val-fraction", "0.1"],
        ["jsonl", "a.jsonl", "--name", "n", "--val-fraction", "0.1", "--train-tokenizer", "100"],
        ["download", "sp2048"],
        ["download", "sp1024", "--train-shards", "0"],
        ["verify"],
    ],
)
def test_wrong_usage_exits_with_two(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2


def test_unwritable_data_folder_is_one_line(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    val = write_jsonl(tmp_path / "val.jsonl", ["text"])
    options = ["--val-fraction", 0.5, "--tokenizer", model, "--name", "n"]
    assert run("jsonl", val, *options, "--data-dir", tmp_path / "file") == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_progress_prints_lines_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prepare_data.Progress, "SECONDS_BETWEEN_LINES", -1.0)
    assert list(prepare_data.track(["a", "b"], "work", "files")) == ["a", "b"]
    assert capsys.readouterr().err == "work: 50 % of 2 files\nwork: 100 % of 2 files\n"
