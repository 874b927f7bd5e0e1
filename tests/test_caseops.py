"""The case transform: bijective, and its bytes are those of the raw text, whatever the text."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from toy import toy_documents

import train_gpt as golf
from tools import caseops, prepare_data

LETTERS = st.sampled_from([*"abzABZ", *caseops.OPERATORS, " ", "  ", "\n", "é", "É", "①", "Ⅳ",
                           "\U0001f600", "\u0301", "ﬁ", "İ", "ß", "x", "U", "1"])
ADVERSARIAL = st.one_of(st.text(), st.lists(LETTERS).map("".join))


@pytest.mark.parametrize(("text", "wanted"), [
    ("the", "the"), ("The", "{T}the"), ("A", "{T}a"), ("NASA", "{C}nasa"), ("iPhone", "i{N}phone"),
    ("McDonald", "{T}mc{N}donald"), ("aBC", "a{N}b{N}c"), ("Émile ÉA", "Émile É{T}a"),
    ("\ue002ab", "{E}\ue002ab")])
def test_capitals_become_operators(text: str, wanted: str) -> None:
    names = dict(zip("TCNE", caseops.OPERATORS, strict=True))
    assert caseops.transform(text) == wanted.format(**names)


@given(ADVERSARIAL)
def test_transform_is_undone_and_leaves_no_ascii_capital(text: str) -> None:
    found = caseops.transform(text)
    assert caseops.restore(found) == text
    assert not any("A" <= letter <= "Z" for letter in found)


@given(ADVERSARIAL, ADVERSARIAL)
def test_different_texts_have_different_transforms(first: str, second: str) -> None:
    assert (first == second) == (caseops.transform(first) == caseops.transform(second))


@given(ADVERSARIAL)
def test_characters_stand_for_the_bytes_of_the_raw_text(text: str) -> None:
    assert caseops.raw_bytes(caseops.transform(text)).sum() == len(text.encode())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer trained on transformed text."""
    path = tmp_path_factory.mktemp("caseops") / "caseops.model"
    prepare_data.train_tokenizer(toy_documents(0, 200), 420, path, transformed=True)
    return path


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(model))


def test_operators_merge_into_words(tokenizer: sentencepiece.SentencePieceProcessor) -> None:
    pieces = [tokenizer.id_to_piece(i) for i in range(tokenizer.vocab_size())]
    assert {*caseops.OPERATORS} <= {*pieces}
    assert any(re.search(caseops.TITLE + "[a-z]", piece) for piece in pieces)


@given(text=ADVERSARIAL)
def test_bytes_of_tokens_add_up_to_the_raw_text(
        tokenizer: sentencepiece.SentencePieceProcessor, text: str) -> None:
    found = caseops.transform(text)
    ends = caseops.token_ends(tokenizer, found)
    counts = caseops.token_raw_bytes(found, ends)
    assert len(counts) == len(ends)
    assert (counts >= 0).all()
    assert counts.sum() == (len(text.encode()) if ends else 0)


def test_each_token_counts_its_own_bytes(tokenizer: sentencepiece.SentencePieceProcessor) -> None:
    found = caseops.transform("The café")
    ends = caseops.token_ends(tokenizer, found)
    counts = caseops.token_raw_bytes(found, ends)
    for start, stop, count in zip([0, *ends], ends, counts, strict=False):
        letters = found[start:stop].translate(dict.fromkeys(map(ord, caseops.OPERATORS)))
        assert count == len(letters.encode())


TEXTS = [*toy_documents(1, 8), "The NASA iPhone \ue001 costs ① €5\n\n  twice  ", "ÀÉ ABC aBcD"]


@pytest.fixture(scope="module")
def dataset(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a dataset with these texts for validation."""
    folder = tmp_path_factory.mktemp("transformed")
    for name, texts in {"train": toy_documents(2, 50), "val": TEXTS}.items():
        lines = [json.dumps({"text": text}) for text in texts]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    status = prepare_data.main([
        "jsonl", str(folder / "train.jsonl"), "--val", str(folder / "val.jsonl"), "--tokenizer",
        str(model), "--name", "cased", "--data-dir", str(folder), "--shard-tokens", "300",
        "--workers", "1"])
    assert status == 0
    return folder / "datasets" / "cased"


def test_sidecar_states_the_bytes_of_the_raw_text(dataset: Path) -> None:
    shards = [[golf.read_shard(path) for path in sorted(dataset.glob(f"*_{split}_0*"))]
              for split in ("val", "val_bytes")]
    tokens, counts = map(np.concatenate, shards)
    assert len(shards[0]) == len(shards[1]) > 1
    assert len(tokens) == len(counts)
    assert counts.sum() == sum(len(text.encode()) for text in TEXTS)
    assert not counts[tokens == golf.BOS_ID].any()
    starts = np.append(np.flatnonzero(tokens == golf.BOS_ID), len(tokens))
    found = [counts[a:b].sum() for a, b in itertools.pairwise(starts)]
    assert found == [len(text.encode()) for text in TEXTS]
    manifest = json.loads((dataset / "manifest.json").read_text())
    assert manifest["transform"] == "caseops"
    assert manifest["val_raw_bytes"] == counts.sum()
    assert prepare_data.main(["verify", str(dataset)]) == 0


def stream_of(dataset: Path, model: Path) -> golf.ValStream:
    return golf.ValStream.load(golf.Config.from_env({
        "DATA_PATH": str(dataset), "TOKENIZER_PATH": str(model), "VOCAB_SIZE": "420",
        "EVAL_SEQ_LEN": "16", "EVAL_STRIDE": "8", "TTT_CHUNK_SIZE": "8"}))


def test_trainer_counts_raw_bytes(dataset: Path, model: Path) -> None:
    stream = stream_of(dataset, model)
    assert stream.transformed
    assert stream.num_bytes == sum(len(text.encode()) for text in TEXTS)
    assert not stream.target_bytes[stream.tokens[1:] == golf.BOS_ID].any()


@pytest.mark.parametrize("harm", ["missing", "short", "counts a start"])
def test_trainer_refuses_transformed_shards_without_their_bytes(
        dataset: Path, model: Path, tmp_path: Path, harm: str) -> None:
    copy = shutil.copytree(dataset, tmp_path / "copy")
    first, *_ = sorted(copy.glob("*_val_bytes_*"))
    counts = golf.read_shard(first).copy()
    if harm == "missing":
        for path in copy.glob("*_val_bytes_*"):
            path.unlink()
    elif harm == "short":
        prepare_data.write_shard(first, counts[1:])
    else:
        counts[0] = 1
        prepare_data.write_shard(first, counts)
    with pytest.raises(golf.DataError, match="val_bytes"):
        stream_of(copy, model)


def test_flag_without_a_tokenizer_to_train_is_an_error(model: Path, tmp_path: Path,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "a.jsonl"
    text.write_text(json.dumps({"text": "one"}))
    assert prepare_data.main(["jsonl", str(text), "--val-fraction", "0.5", "--tokenizer",
                              str(model), "--caseops", "--name", "x", "--data-dir",
                              str(tmp_path)]) == 1
    assert "--caseops" in capsys.readouterr().err
