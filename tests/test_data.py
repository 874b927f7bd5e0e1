"""Section 3: shards, training windows in the order of the seed, the validation stream."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import struct
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy import MakeConfig

import train_gpt as golf
from tools.prepare_data import write_shard

SEQ_LEN = 16


def shards_of(*lengths: int) -> list[np.ndarray]:
    """Shards in which every token is its position, so that a window tells where it is from."""
    return np.split(np.arange(sum(lengths), dtype=np.uint16), np.cumsum(lengths)[:-1])


def make_loader(*lengths: int, seed: int = 0) -> golf.TrainLoader:
    config = golf.Config(vocab_size=65_535, train_seq_len=SEQ_LEN, train_context="", seed=seed)
    return golf.TrainLoader(shards_of(*lengths), config)


def write_raw(path: Path, header: tuple[int, ...], payload: bytes) -> Path:
    path.write_bytes(struct.pack("<256i", *header, *[0] * (256 - len(header))) + payload)
    return path


@given(st.lists(st.integers(0, 65_535), max_size=300))
def test_shard_round_trip(tmp_path_factory: pytest.TempPathFactory, tokens: list[int]) -> None:
    path = tmp_path_factory.mktemp("shard") / "x.bin"
    write_shard(path, np.array(tokens, dtype=np.uint16))
    assert path.read_bytes() == (struct.pack("<256i", 20240520, 1, len(tokens), *[0] * 253)
                                 + struct.pack(f"<{len(tokens)}H", *tokens))
    found = golf.read_shard(path)
    assert found.dtype == np.uint16
    assert found.tolist() == tokens


@pytest.mark.parametrize(("header", "payload", "said"), [
    ((20240520, 1, 4), b"\0" * 6, r"1, 4\], .* 1, 3\]"), ((20240520, 1, 4), b"\0" * 9, "read"),
    ((20240521, 1, 4), b"\0" * 8, "20240521"), ((20240520, 7, 4), b"\0" * 8, r"20240520, 7, 4\]"),
    ((20240520, 1, -4), b"", r"1, -4\], .* 1, 0\]"), ((20240520, 1, 0), b"\0\0", r" 1, 1\]")])
def test_damaged_shard_is_named(tmp_path: Path, header: tuple[int, ...], payload: bytes,
                                said: str) -> None:
    path = write_raw(tmp_path / "fineweb_train_000000.bin", header, payload)
    with pytest.raises(golf.DataError, match=said) as error:
        golf.read_shard(path)
    assert str(error.value).startswith(f"{path}: ")


def test_missing_and_headless_shards_are_named(tmp_path: Path) -> None:
    with pytest.raises(golf.DataError, match=r"none\.bin"):
        golf.read_shard(tmp_path / "none.bin")
    (tmp_path / "short.bin").write_bytes(b"\0" * 1023)
    with pytest.raises(golf.DataError, match=r"short\.bin: cannot be read"):
        golf.read_shard(tmp_path / "short.bin")


def test_token_id_at_the_vocabulary_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    write_shard(path, np.array([1, 383, 384], dtype=np.uint16))
    assert golf.read_shard(path, 385).size == 3
    with pytest.raises(golf.DataError, match=r"x\.bin: token id 384 .*384"):
        golf.read_shard(path, 384)


def test_shards_are_found_in_order_and_their_absence_is_named(tmp_path: Path) -> None:
    for name in ("b_train_000010.bin", "b_train_000002.bin", "b_val_000000.bin",
                 "b_train_000001.bin.partial"):
        (tmp_path / name).touch()
    found = [path.name for path in golf.find_shards(tmp_path, "train")]
    assert found == ["b_train_000002.bin", "b_train_000010.bin"]
    with pytest.raises(golf.DataError, match=str(tmp_path / "none")):
        golf.find_shards(tmp_path / "none", "train")


@given(st.lists(st.integers(0, 150), min_size=1, max_size=4).filter(lambda n: max(n) > SEQ_LEN),
       st.integers(0, 9))
def test_windows_of_one_pass_lie_inside_shards_and_share_no_target(lengths: list[int],
                                                                   seed: int) -> None:
    loader = make_loader(*lengths, seed=seed)
    windows = loader.read(0, len(loader.starts))
    assert (np.diff(windows, axis=1) == 1).all()
    edges = np.cumsum([0, *lengths])
    first, last = (np.searchsorted(edges, windows[:, k], "right") for k in (0, -1))
    assert (first == last).all()
    targets = windows[:, 1:].ravel()
    assert np.unique(targets).size == targets.size


def test_one_pass_uses_every_shard_but_for_less_than_a_window_at_each_end() -> None:
    lengths = (1000, 17, 533, 300)
    windows = make_loader(*lengths).read(0, len(make_loader(*lengths).starts))
    edges = np.cumsum([0, *lengths])
    for first, last in itertools.pairwise(edges):
        inside = windows[(windows[:, 0] >= first) & (windows[:, 0] < last)]
        assert inside.min() - first < SEQ_LEN
        assert last - 1 - inside.max() < SEQ_LEN
        assert len(inside) * SEQ_LEN + 1 == inside.max() - inside.min() + 1


def test_window_order_depends_on_the_seed_alone() -> None:
    same, again, other = (make_loader(500, 400, seed=seed).read(0, 50) for seed in (3, 3, 4))
    assert (same == again).all()
    assert (same != other).any()
    assert (np.sort(same[:, 0]) != same[:, 0]).any()


def test_windows_of_all_shards_are_mixed() -> None:
    first_half = make_loader(2000, 2000).read(0, 100)[:, 0]
    assert 25 < (first_half < 2000).sum() < 75


def test_second_pass_has_new_boundaries_and_a_new_order() -> None:
    loader = make_loader(5000)
    count = len(loader.starts)
    first, second = loader.read(0, count), loader.read(count, count)
    assert set(first[:, 0] % SEQ_LEN) != set(second[:, 0] % SEQ_LEN)
    assert (np.argsort(first[:, 0]) != np.argsort(second[:, 0])[:count]).any()


def test_window_is_a_function_of_its_number() -> None:
    loader = make_loader(300, 200)
    wanted = make_loader(300, 200).read(0, 200)
    for number in (170, 3, 100, 0, 199, 29):
        assert (loader.read(number, 1)[0] == wanted[number]).all()


@pytest.mark.parametrize("lengths", [(SEQ_LEN,), (3, 0, SEQ_LEN), (0,)])
def test_training_data_without_a_whole_window_is_refused(lengths: tuple[int, ...]) -> None:
    with pytest.raises(golf.DataError, match=r"TRAIN_SEQ_LEN \(16\)"):
        make_loader(*lengths)


def test_shortest_possible_shard_is_one_window() -> None:
    assert make_loader(SEQ_LEN + 1).read(0, 3).tolist() == [list(range(SEQ_LEN + 1))] * 3


def test_bad_id_in_training_data_is_refused_when_read() -> None:
    tokens = np.array([1] * 40 + [384] + [1] * 40, dtype=np.uint16)
    config = golf.Config(vocab_size=384, train_seq_len=SEQ_LEN, train_context="")
    loader = golf.TrainLoader([tokens], config)
    with pytest.raises(golf.DataError, match=r"token id 384 .*VOCAB_SIZE \(384\)"):
        loader.read(0, len(loader.starts))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 8])
def test_published_batch_divides_over_ranks(world_size: int) -> None:
    config = golf.Config.from_env({"PRESET": "pr1493"})
    shape = golf.batch_shape(config, world_size)
    assert world_size * shape.micro_steps * shape.sequences * config.train_seq_len == 786_432
    assert shape.sequences * config.train_seq_len <= config.micro_batch_tokens


@pytest.mark.parametrize("world_size", [5, 7])
def test_world_size_that_does_not_divide_lists_those_that_do(world_size: int) -> None:
    with pytest.raises(golf.ConfigError, match="1, 2, 3, 4, 6, 8") as error:
        golf.batch_shape(golf.Config.from_env({"PRESET": "pr1493"}), world_size)
    assert f"WORLD_SIZE={world_size}" in str(error.value)


def test_published_batch_on_one_gpu_is_eight_micro_steps() -> None:
    assert golf.batch_shape(golf.Config.from_env({"PRESET": "pr1493"}), 1) == (8, 48)


def step_rows(config: golf.Config, rank: int, size: int, steps: int,
              first_step: int = 0) -> list[torch.Tensor]:
    """What one rank sees, one tensor a step."""
    loader = golf.TrainLoader(shards_of(3000, 2000), replace(config, vocab_size=65_535))
    shape, world = golf.batch_shape(config, size), golf.World(rank, size)
    stream = golf.batch_stream(loader, shape, world, first_step)
    try:
        return [torch.cat([*next(stream)]) for _ in range(steps)]
    finally:
        stream.close()


@pytest.mark.parametrize("size", [2, 3, 4, 6])
def test_ranks_together_read_what_one_rank_reads(config: golf.Config, size: int) -> None:
    alone = step_rows(config, 0, 1, 8)
    parts = [step_rows(config, rank, size, 8) for rank in range(size)]
    for step, rows in enumerate(alone):
        assert torch.equal(rows, torch.cat([part[step] for part in parts]))


def test_stream_resumes_from_a_step(config: golf.Config) -> None:
    assert torch.equal(step_rows(config, 0, 1, 5)[3], step_rows(config, 0, 1, 1, first_step=3)[0])


def test_stream_gives_micro_batches_of_the_configured_size(config: golf.Config) -> None:
    loader = golf.TrainLoader(shards_of(3000), replace(config, vocab_size=65_535))
    stream = golf.batch_stream(loader, golf.batch_shape(config, 1), golf.World())
    batches = list(next(stream))
    stream.close()
    assert [tuple(rows.shape) for rows in batches] == [(6, 65), (6, 65)]
    assert all(rows.dtype == torch.int32 for rows in batches)


def test_stream_hands_a_reading_error_to_the_trainer(config: golf.Config) -> None:
    tokens = np.full(2000, 5, dtype=np.uint16)
    tokens[700:] = 400
    loader = golf.TrainLoader([tokens], config)
    stream = golf.batch_stream(loader, golf.batch_shape(config, 1), golf.World())
    with pytest.raises(golf.DataError, match="token id 400"):
        for _ in range(3):
            next(stream)
    stream.close()


def test_closed_stream_leaves_no_thread(config: golf.Config) -> None:
    before = threading.active_count()
    step_rows(config, 0, 1, 1)
    assert threading.active_count() == before


def test_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(golf.DataError, match=r"none\.model.*TOKENIZER_PATH"):
        golf.load_tokenizer(tmp_path / "none.model", 384)


def test_file_that_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "junk.model").write_bytes(b"not a model at all")
    with pytest.raises(golf.DataError, match=r"junk\.model"):
        golf.load_tokenizer(tmp_path / "junk.model", 384)


def test_tokenizer_of_another_size_is_refused(config: golf.Config) -> None:
    with pytest.raises(golf.DataError, match=r"384 pieces.*VOCAB_SIZE=512"):
        golf.load_tokenizer(config.tokenizer_file, 512)


def test_validation_stream_is_whole_sequences_of_all_shards(config: golf.Config) -> None:
    stream = golf.ValStream.load(config)
    paths = golf.find_shards(config.dataset_dir, "val")
    tokens = np.concatenate([golf.read_shard(path) for path in paths])
    assert tokens.size == 1900
    assert stream.num_targets == 29 * 64
    assert stream.tokens.tolist() == tokens[:29 * 64 + 1].tolist()
    assert stream.num_documents == int((tokens[:29 * 64 + 1] == 1).sum())
    assert stream.num_bytes == int(stream.target_bytes.sum())


def test_published_validation_length_is_cut_to_whole_sequences() -> None:
    table = golf.TokenBytes(np.ones(4, np.int16), np.zeros(4, bool), np.zeros(4, bool))
    tokens = np.full(100_000, 3, dtype=np.uint16)
    assert golf.ValStream(tokens, table, 2048).num_targets == (100_000 - 1) // 2048 * 2048


@pytest.mark.parametrize("count", [0, 1, 64])
def test_validation_shorter_than_a_sequence_is_refused(count: int) -> None:
    table = golf.TokenBytes(np.ones(4, np.int16), np.zeros(4, bool), np.zeros(4, bool))
    with pytest.raises(golf.DataError, match=rf"{count} tokens.*EVAL_SEQ_LEN \(64\)"):
        golf.ValStream(np.full(count, 3, dtype=np.uint16), table, 64)


def test_validation_without_text_is_refused() -> None:
    table = golf.TokenBytes(np.zeros(4, np.int16), np.zeros(4, bool), np.ones(4, bool))
    with pytest.raises(golf.DataError, match="not 0 bytes"):
        golf.ValStream(np.full(65, 3, dtype=np.uint16), table, 64)


@pytest.mark.parametrize("raw_bytes", [None, 12_345])
def test_result_says_which_data_it_scored(make_config: MakeConfig, data_dir: Path, tmp_path: Path,
                                          raw_bytes: int | None) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(data_dir / "datasets" / "fineweb10B_sp384", folder)
    if raw_bytes:
        (folder / "manifest.json").write_text(json.dumps({"val_raw_bytes": raw_bytes}))
    config = make_config(DATA_PATH=folder)
    stream = golf.ValStream.load(config)
    data = golf.data_facts(config, stream)
    tokenizer = config.tokenizer_file.read_bytes()
    assert data["name"] == "copy"
    assert data["tokenizer_sha256"] == hashlib.sha256(tokenizer).hexdigest()
    assert (data["val_targets"], data["val_bytes"]) == (stream.num_targets, stream.num_bytes)
    assert data["val_documents"] == stream.num_documents
    assert data.get("val_raw_bytes") == raw_bytes


def test_fingerprint_sees_one_changed_token(config: golf.Config) -> None:
    stream = golf.ValStream.load(config)
    before = golf.data_facts(config, stream)["fingerprint"]
    stream.tokens[-1] ^= 1
    assert golf.data_facts(config, stream)["fingerprint"] != before


def test_manifest_that_is_no_json_is_named(make_config: MakeConfig, data_dir: Path,
                                           tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(data_dir / "datasets" / "fineweb10B_sp384", folder)
    (folder / "manifest.json").write_text("{half")
    config = make_config(DATA_PATH=folder)
    with pytest.raises(golf.DataError, match=r"manifest\.json"):
        golf.data_facts(config, golf.ValStream.load(config))


@pytest.mark.parametrize(("num_bytes", "right"), [
    (151_078_222, True), (153_078_222, False), (120_000_000, False)])
def test_official_tokens_stand_for_the_published_bytes(config: golf.Config, num_bytes: int,
                                                       right: bool) -> None:
    """Another tokenizer of the same size gives another denominator for the same tokens."""
    stream = golf.ValStream.load(config)
    stream.num_targets, stream.num_bytes = 40_540_160, num_bytes
    if right:
        assert golf.data_facts(config, stream)["val_bytes"] == num_bytes
    else:
        with pytest.raises(golf.DataError, match=str(num_bytes)):
            golf.data_facts(config, stream)
