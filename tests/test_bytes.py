"""Section 3: the byte count that every score divides by, on text made to break it."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor as Tokenizer
from toy import encode_documents, toy_documents, train_tokenizer

import train_gpt as golf

MARK = "\N{LOWER ONE EIGHTH BLOCK}"
ZERO_WIDTH = "\u200b\u200d\ufeff\u2060"
SPACES = " \t\n\r\u00a0\u3000\u2028"
COMPOSED = "\u0301\u0308\ufb01\u2460\u00bd\uff21\u0130\u1e9e"
SCRIPTS = "\U0001fa81\U0001f468\u200d\U0001f469\u7c73\u0627\u05d0\u0e01"
ADVERSARIAL = MARK + ZERO_WIDTH + SPACES + COMPOSED + SCRIPTS + "\x00\x01\x7f\ufffd"
letters = st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(ADVERSARIAL),
                    st.sampled_from("the cat sat "))
texts = st.text(letters, max_size=60)


@pytest.fixture(scope="module")
def tokenizer(data_dir: Path) -> Tokenizer:
    return golf.load_tokenizer(data_dir / "tokenizers" / "fineweb_384_bpe.model", 384)


@pytest.fixture(scope="module")
def table(tokenizer: Tokenizer) -> golf.TokenBytes:
    return golf.token_bytes(tokenizer)


def count_bytes(ids: list[int], table: golf.TokenBytes) -> int:
    """Bytes of all targets of a stream whose first token is no target."""
    tokens = np.array(ids)
    return int(golf.bytes_of_targets(tokens[:-1], tokens[1:], table).sum())


@given(text=texts)
@example(text="")
@example(text=MARK)
@example(text=f"a{MARK}{MARK} b")
@example(text=" leading and  double ")
@example(text="\U0001f468\u200d\U0001f469\u200d\U0001f467 fam\u0301ille \ufb01n")
def test_bytes_of_a_document_are_those_of_its_decoded_text(
        tokenizer: Tokenizer, table: golf.TokenBytes, text: str) -> None:
    ids = tokenizer.encode(text)
    assert count_bytes([golf.BOS_ID, *ids], table) == len(tokenizer.decode(ids).encode())


@given(documents=st.lists(texts, min_size=1, max_size=5))
def test_bytes_of_a_stream_are_those_of_its_documents(
        tokenizer: Tokenizer, table: golf.TokenBytes, documents: list[str]) -> None:
    encoded = [tokenizer.encode(text) for text in documents]
    stream = [token for ids in encoded for token in [golf.BOS_ID, *ids]]
    assert count_bytes(stream, table) == sum(len(tokenizer.decode(ids).encode()) for ids in encoded)


@given(ids=st.lists(st.integers(0, 383), min_size=2, max_size=80))
def test_any_token_sequence_counts_the_bytes_of_its_pieces(
        tokenizer: Tokenizer, table: golf.TokenBytes, ids: list[int]) -> None:
    """Also where the bytes are no valid UTF-8, which no encoder produces but a shard may hold."""
    def is_special(token: int) -> bool:
        return any(kind(token) for kind in (tokenizer.is_control, tokenizer.is_unknown,
                                            tokenizer.is_unused))

    def piece_bytes(previous: int, token: int) -> bytes:
        if is_special(token):
            return b""
        piece = tokenizer.id_to_piece(token)
        if tokenizer.is_byte(token):
            return bytes([int(piece[3:5], 16)])
        hidden = piece[0] == MARK and is_special(previous)
        return (piece[1:] if hidden else piece).replace(MARK, " ").encode()

    wanted = b"".join(piece_bytes(a, b) for a, b in itertools.pairwise(ids))
    assert count_bytes(ids, table) == len(wanted)


def test_every_target_has_the_bytes_of_its_piece(tokenizer: Tokenizer,
                                                 table: golf.TokenBytes) -> None:
    def one(piece: str, previous: str) -> int:
        tokens = [tokenizer.piece_to_id(p) for p in (previous, piece)]
        return int(golf.bytes_of_targets(np.array(tokens[:1]), np.array(tokens[1:]), table)[0])

    pieces = [tokenizer.id_to_piece(token) for token in range(260, 384)]
    word = next(piece for piece in pieces if piece[0] == MARK and len(piece) > 2)
    letters = len(word.encode()) - len(MARK.encode())
    assert one(word, "a") == letters + 1
    assert one(word, "<0xC3>") == letters + 1
    assert one(word, "<s>") == letters
    assert one(MARK, "a") == 1
    assert one(MARK, "<s>") == 0
    assert one("<0xC3>", "a") == 1
    assert one("<s>", "a") == 0
    assert one("<unk>", "a") == 0


def test_whole_validation_stream_equals_its_decoded_documents(data_dir: Path,
                                                              table: golf.TokenBytes) -> None:
    model = data_dir / "tokenizers" / "fineweb_384_bpe.model"
    documents = toy_documents(11, 30)
    stream = golf.ValStream(encode_documents(model, documents), table, 1)
    assert stream.num_documents == 30
    # This text survives normalisation, so decoded and raw bytes agree.
    assert stream.num_bytes == sum(len(text.encode()) for text in documents)


@pytest.mark.parametrize("byte_fallback", [True, False])
def test_tokenizer_without_the_space_mark_is_refused(tmp_path: Path, byte_fallback: bool) -> None:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=12)) for _ in range(200)]
    size = 300 if byte_fallback else 40
    path = train_tokenizer(tmp_path / "none", words, size, byte_fallback=byte_fallback)
    loaded = Tokenizer(model_file=str(path))
    assert loaded.is_unknown(loaded.piece_to_id(MARK))
    with pytest.raises(golf.DataError, match=r"U\+2581"):
        golf.token_bytes(loaded)


def test_tokenizer_with_an_inner_space_mark_is_refused(tmp_path: Path) -> None:
    documents = ["out of the blue and out of the way"] * 50
    path = train_tokenizer(tmp_path / "inner", documents, 320, split_by_whitespace=False)
    loaded = Tokenizer(model_file=str(path))
    pieces = [loaded.id_to_piece(token) for token in range(loaded.vocab_size())]
    assert any(MARK in piece[1:] for piece in pieces)
    with pytest.raises(golf.DataError, match=r"U\+2581"):
        golf.token_bytes(loaded)
