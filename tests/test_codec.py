"""The adaptive coder of integers: exact, wary of damage, close to what an oracle needs."""

from __future__ import annotations

import struct
import tracemalloc

import constriction
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as golf

REFUSED = golf.ArtifactError, ValueError, IndexError  # by the coder, without its file

CONTENTS = ("bell", "anything", "constant", "zero", "sparse", "rows", "columns")


def levels(shape: tuple[int, int, int], content: str, seed: int) -> np.ndarray:
    """An int8 stack of one of the kinds above."""
    rng = np.random.default_rng(seed)
    blocks, rows, columns = shape
    bell = rng.standard_normal(shape) * 2.4
    if content == "anything":
        return rng.integers(-128, 128, shape).astype(np.int8)
    if content == "constant":
        return np.full(shape, rng.integers(-128, 128), np.int8)
    if content == "zero":
        return np.zeros(shape, np.int8)
    if content == "sparse":
        bell *= rng.random(shape) < 0.02
    if content == "rows":
        bell *= np.exp(2 * rng.standard_normal((blocks, rows, 1)))
    if content == "columns":
        bell *= np.exp(rng.standard_normal((blocks, 1, columns)))
    return np.clip(np.round(bell), -127, 127).astype(np.int8)


@given(blocks=st.integers(1, 3), rows=st.integers(1, 90), columns=st.integers(1, 90),
       content=st.sampled_from(CONTENTS), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_round_trip(blocks: int, rows: int, columns: int, content: str, seed: int) -> None:
    stack = levels((blocks, rows, columns), content, seed)
    before = stack.copy()
    stream = golf.encode_levels(stack)
    found = golf.decode_levels(stream, stack.shape)
    assert found.dtype == np.int8
    assert np.array_equal(found, before)
    assert np.array_equal(stack, before)  # the encoder leaves its input alone
    assert stream == golf.encode_levels(stack)


@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 1, 7), (1, 1, 5000), (1, 5000, 1), (2, 700, 64)])
@pytest.mark.parametrize("content", CONTENTS)
def test_round_trip_of_odd_shapes(shape: tuple[int, int, int], content: str) -> None:
    stack = levels(shape, content, 3)
    assert np.array_equal(golf.decode_levels(golf.encode_levels(stack), shape), stack)


def test_extreme_outlier_beside_zeros() -> None:
    stack = np.zeros((2, 300, 64), np.int8)
    stack[1, 299, 63], stack[0, 0, 0] = 127, -128
    stream = golf.encode_levels(stack)
    assert np.array_equal(golf.decode_levels(stream, stack.shape), stack)
    assert len(stream) < 1200  # of 38,400 levels


@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=60, deadline=None)
def test_changed_bit_is_refused_or_decodes_to_something_else(position: float, bit: int) -> None:
    """Without the file's checksum: the coder's own ending catches what can be caught."""
    stack = levels((1, 40, 64), "bell", 0)
    stream = bytearray(golf.encode_levels(stack))
    stream[int(position * len(stream))] ^= 1 << bit
    try:
        found = golf.decode_levels(bytes(stream), stack.shape)
    except REFUSED as error:
        assert "\n" not in str(error)
    else:
        assert found.shape == stack.shape


def test_most_changed_bits_and_every_truncation_are_refused() -> None:
    stack = levels((1, 40, 64), "bell", 0)
    stream, refused = golf.encode_levels(stack), 0
    places = range(0, 8 * len(stream), 31)
    for place in places:
        damaged = bytearray(stream)
        damaged[place // 8] ^= 1 << place % 8
        try:
            same = np.array_equal(golf.decode_levels(bytes(damaged), stack.shape), stack)
            assert not same or place // 8 < 6  # only facts may be looser than they need to be
        except REFUSED:
            refused += 1
    assert refused > 0.98 * len(places)
    for length in range(0, len(stream), 29):
        with pytest.raises(REFUSED):
            golf.decode_levels(stream[:length], stack.shape)
    for more in (b"\0", b"\0\0", stream):
        with pytest.raises(REFUSED):
            golf.decode_levels(stream + more, stack.shape)


@given(data=st.binary(min_size=0, max_size=400))
@settings(max_examples=60, deadline=None)
def test_noise_never_crashes_the_decoder(data: bytes) -> None:
    try:
        golf.decode_levels(data, (1, 20, 16))
    except REFUSED as error:
        assert "\n" not in str(error)


def test_decoder_takes_no_more_memory_than_its_tables_and_the_stack() -> None:
    shape = (1, 1000, 500)
    stream = golf.encode_levels(levels(shape, "bell", 1))
    for data in (stream, struct.pack("2b", -128, 127) + stream[2:], stream[:-2]):
        tracemalloc.start()
        try:
            golf.decode_levels(data, shape)
        except REFUSED:
            assert data is not stream
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2 * 500_000 + 40_000_000  # tables, and a million keys not yet counted


def oracle_bytes(stack: np.ndarray) -> int:
    """A range coder of independent origin, with the exact histogram of every matrix for nothing."""
    total = 0
    for matrix in stack:
        symbols = (matrix.ravel().astype(np.int32) - int(matrix.min()))
        share = np.bincount(symbols) / len(symbols)
        encoder = constriction.stream.queue.RangeEncoder()
        encoder.encode(symbols, constriction.stream.model.Categorical(share, perfect=False))
        total += 4 * len(encoder.get_compressed())
    return total


def test_size_without_structure_is_the_oracles() -> None:
    stack = levels((4, 512, 512), "bell", 2)
    assert len(golf.encode_levels(stack)) < 1.003 * oracle_bytes(stack)


@pytest.mark.parametrize(("content", "share"), [("rows", 0.8), ("columns", 0.95)])
def test_structure_of_rows_and_columns_pays(content: str, share: float) -> None:
    stack = levels((2, 512, 512), content, 2)
    assert len(golf.encode_levels(stack)) < share * oracle_bytes(stack)
