"""Section 8: one flat file, whole or refused, whatever was done to it."""

from __future__ import annotations

import functools
import hashlib
import json
import struct
import sys
import tracemalloc
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import brotli
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import MakeConfig, MakeEnv, plan_named, random_model, random_tokens

import train_gpt as golf

REFUSED = golf.ArtifactError, ValueError, IndexError  # by the coder, without its file

CHECKSUM_BYTES = 16

# The smallest models: with and without a loop, all shapes of skip rows.
SMALL = golf.Config(quantiser="gptq", compressor="brotli", vocab_size=16, num_layers=2,
                    model_dim=8, num_heads=2, num_kv_heads=1, mlp_mult=2.0, rope_dims=2,
                    xsa_last_n=1, train_context="", num_loops=1, loop_start=0, loop_end=0,
                    train_seq_len=16, eval_seq_len=16, eval_stride=4, ttt_chunk_tokens=32,
                    ttt_chunk_size=8)


def fill(config: golf.Config, integers: Callable[[tuple[int, ...]], np.ndarray],
         halves: Callable[[tuple[int, ...]], np.ndarray]) -> golf.QuantisedModel:
    """A quantised model of the right shapes with any contents."""
    stacks, floats = golf.expected_shapes(config)
    return golf.QuantisedModel(
        {name: torch.from_numpy(integers(tuple(shape))) for name, shape in stacks.items()},
        {name: torch.from_numpy(halves(tuple(shape))) for name, shape in floats.items()})


def random_contents(config: golf.Config, seed: int) -> golf.QuantisedModel:
    """Every int8 and every bit pattern of float16, not-a-number included."""
    rng = np.random.default_rng(seed)
    return fill(config, lambda shape: rng.integers(-128, 128, shape, dtype=np.int8),
                lambda shape: rng.integers(0, 1 << 16, shape, dtype=np.uint16).view(np.float16))


def assert_same(found: golf.QuantisedModel, wanted: golf.QuantisedModel) -> None:
    for mine, other in zip(found, wanted, strict=True):
        assert list(mine) == list(other)
        for name, tensor in mine.items():
            assert tensor.dtype == other[name].dtype
            assert tensor.shape == other[name].shape
            assert tensor.numpy().tobytes() == other[name].numpy().tobytes(), name


@functools.cache
def encode(config: golf.Config = SMALL, seed: int = 0, plan: str = "unlooped") -> bytes:
    return golf.encode_artifact(random_contents(config, seed), config, plan_named(config, plan))


def decode(data: bytes,
           config: golf.Config = SMALL) -> tuple[golf.DepthPlan, golf.QuantisedModel]:
    return golf.decode_artifact(data, config)


def sign(body: bytes) -> bytes:
    """`body` with the checksum that belongs to it, as somebody who forges a file would write it."""
    return body + hashlib.sha256(body).digest()[:CHECKSUM_BYTES]


def take_apart(data: bytes) -> tuple[dict[str, object], list[bytes]]:
    """Header and streams of a file."""
    position, frames = len(golf.ARTIFACT_MAGIC), []
    while position < len(data) - CHECKSUM_BYTES:
        begin = position + 4
        position = begin + struct.unpack_from("<I", data, position)[0]
        frames.append(data[begin:position])
    return json.loads(frames[0]), frames[1:]


def put_together(header: object, streams: list[bytes], stretch: int = 0) -> bytes:
    """A file with a valid checksum, any header, and `stretch` added to that one's length."""
    text = json.dumps(header).encode()
    frames = [struct.pack("<I", len(text) + stretch) + text]
    frames += [struct.pack("<I", len(stream)) + stream for stream in streams]
    return sign(golf.ARTIFACT_MAGIC + b"".join(frames))


@given(seed=st.integers(0, 2**32), codec=st.sampled_from(["brotli", "ans"]),
       plan=st.sampled_from(["unlooped", "looped"]), loops=st.integers(1, 2),
       layers=st.integers(2, 5))
@settings(max_examples=20)
def test_round_trip_of_anything(seed: int, codec: Literal["brotli", "ans"], plan: str, loops: int,
                                layers: int) -> None:
    config = replace(SMALL, compressor=codec, num_loops=loops, num_layers=layers)
    contents = random_contents(config, seed)
    data = golf.encode_artifact(contents, config, plan_named(config, plan))
    found_plan, found = decode(data, config)
    assert_same(found, contents)
    assert found_plan == plan_named(config, plan)
    header, _ = take_apart(data)
    assert (header["plan"], header["codec"], header["preset"]) == (plan, codec, config.preset)
    assert header["settings"] == {name: getattr(config, name) for name in golf.MODEL_SETTINGS}


@pytest.mark.parametrize("value", [0, 1, -128, 127])
def test_round_trip_of_constants(value: int) -> None:
    contents = fill(SMALL, lambda shape: np.full(shape, value, np.int8),
                    lambda shape: np.full(shape, value, np.float16))
    data = golf.encode_artifact(contents, SMALL, plan_named(SMALL, "looped"))
    assert_same(decode(data)[1], contents)


def test_round_trip_of_the_tiny_model(config: golf.Config, world: golf.World) -> None:
    model, hessians = random_model(config), {}
    collected = golf.Hessians(model)
    golf.collect(collected, random_tokens(4, 33), plan_named(config, "looped"))
    hessians = collected.moments
    contents = golf.quantise(model, hessians, world)
    data = golf.encode_artifact(contents, config, plan_named(config, "looped"))
    assert_same(decode(data, config)[1], contents)
    entropy = sum(golf.entropy_bits(q) for q in contents.integers.values()) / 8
    assert entropy < len(data) < 1.1 * entropy + 6000


def test_equal_models_give_equal_files() -> None:
    files = [golf.encode_artifact(random_contents(SMALL, seed), SMALL, plan_named(SMALL, "looped"))
             for seed in (0, 0, 1)]
    assert files[0] == files[1]
    assert files[0] != files[2]


def test_file_knows_everything_without_which_weights_mean_something_else() -> None:
    settings_of_training = {
        "preset", "track", "seed", "run_id", "log_dir", "run_dir", "print_config", "eval_only",
        "attention", "compile", "data_dir", "data_path", "tokenizer_path", "iterations"}
    header, _ = take_apart(encode())
    found = header["settings"]
    assert isinstance(found, dict)
    assert not settings_of_training & set(found)
    model = {"vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads", "mlp_mult",
             "rope_base", "rope_dims", "ln_scale", "xsa_last_n", "parallel_residual_start",
             "logit_softcap", "num_loops", "loop_start", "loop_end"}
    assert model <= set(found)


# ---- Damage ----


def test_every_changed_byte_is_noticed() -> None:
    data = bytearray(encode())
    for position in range(len(data)):
        for change in (1, 0x80):
            data[position] ^= change
            with pytest.raises(golf.ArtifactError):
                decode(bytes(data))
            data[position] ^= change


def test_every_truncation_is_noticed() -> None:
    data = encode()
    for length in range(len(data)):
        with pytest.raises(golf.ArtifactError):
            decode(data[:length])


@pytest.mark.parametrize("extra", [b"\0", b"GOLF", b"x" * 100])
def test_trailing_and_leading_bytes_are_noticed(extra: bytes) -> None:
    for data in (encode() + extra, extra + encode()):
        with pytest.raises(golf.ArtifactError):
            decode(data)


@pytest.mark.parametrize("data", [
    b"", b"G", b"GOLF", golf.ARTIFACT_MAGIC, golf.ARTIFACT_MAGIC + b"\0" * 100, b"PK\x03\x04" * 50,
    b"\x80\x04K\x00." * 40, b"{}" * 99, sign(b"GOLF\x00\x01\r\n" + b"\0" * 90)])
def test_foreign_file_is_refused_in_one_line(data: bytes) -> None:
    with pytest.raises(golf.ArtifactError) as error:
        decode(data)
    assert "\n" not in str(error.value)


@given(position=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255),
       codec=st.sampled_from(["brotli", "ans"]))
@settings(max_examples=300)
def test_forged_bytes_never_crash_the_reader(position: float, value: int,
                                             codec: Literal["brotli", "ans"]) -> None:
    """With a valid checksum, anything behind it may be wrong; only ArtifactError may come out."""
    body = bytearray(encode(replace(SMALL, compressor=codec))[:-CHECKSUM_BYTES])
    start = len(golf.ARTIFACT_MAGIC)
    body[start + int(position * (len(body) - start))] = value
    try:
        plan, _ = decode(sign(bytes(body)), replace(SMALL, compressor=codec))
    except golf.ArtifactError as error:
        assert "\n" not in str(error)
    else:
        assert plan in golf.depth_plans(SMALL)


def changed(key: str, value: object) -> Callable[[dict[str, object]], object]:
    return lambda header: {**header, key: value}


def with_setting(key: str, value: object) -> Callable[[dict[str, object]], object]:
    def change(header: dict[str, object]) -> object:
        assert isinstance(header["settings"], dict)
        return {**header, "settings": {**header["settings"], key: value}}
    return change


FORGERIES = {
    "no object": lambda header: [1, 2], "nothing": lambda header: {},
    "no settings": changed("settings", {}),
    "settings as a list": changed("settings", [1]), "plan as a number": changed("plan", 7),
    "unknown codec": changed("codec", "zip"), "other codec": changed("codec", "ans"),
    "text setting": with_setting("model_dim", "8"),
    "true setting": with_setting("num_layers", True), "fraction": with_setting("model_dim", 8.5),
    "zero": with_setting("model_dim", 0), "not a number": with_setting("mlp_mult", float("nan")),
    "contradiction": with_setting("num_heads", 3), "other shape": with_setting("vocab_size", 17),
    "other skips": with_setting("num_loops", 2), "infinite": with_setting("mlp_mult", float("inf")),
    "huge": with_setting("vocab_size", 2**70), "large": with_setting("vocab_size", 65_535),
    "deep": with_setting("num_layers", 256), "wide": with_setting("model_dim", 16_384),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_forged_header_is_refused_in_one_line(forgery: str) -> None:
    header, streams = take_apart(encode())
    with pytest.raises(golf.ArtifactError) as error:
        decode(put_together(FORGERIES[forgery](header), streams))
    assert "\n" not in str(error.value)


def test_untouched_parts_make_a_valid_file() -> None:
    """The forgeries above fail for what they change, not for how they are put together."""
    header, streams = take_apart(encode())
    assert_same(decode(put_together(header, streams))[1],
                random_contents(SMALL, 0))


@pytest.mark.parametrize("change", ["none", "fewer", "more", "shifted", "merged"])
def test_forged_streams_are_refused_in_one_line(change: str) -> None:
    header, (first, second, *rest) = take_apart(encode())
    streams = {"none": [], "fewer": [first, *rest], "more": [first, b"", second, *rest],
               "merged": [first + second, *rest],
               "shifted": [first + second[:1], second[1:], *rest]}[change]
    with pytest.raises(golf.ArtifactError) as error:
        decode(put_together(header, streams))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("stretch", [-1, 1, 2**31, 10_000])
def test_length_of_a_frame_that_is_wrong_is_refused(stretch: int) -> None:
    with pytest.raises(golf.ArtifactError):
        decode(put_together(*take_apart(encode()), stretch))


def peak_bytes(action: Callable[[], object]) -> int:
    """Most memory that Python held while `action` failed as it should."""
    tracemalloc.start()
    try:
        with pytest.raises(golf.ArtifactError):
            action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


BOMB_BYTES = 1 << 25
BOUND = BOMB_BYTES // 3


def test_stream_bomb_takes_no_memory() -> None:
    bomb = brotli.compress(b"\0" * BOMB_BYTES, quality=5)
    assert peak_bytes(lambda: golf.decompress(bomb, (1000,))) < BOUND
    header, streams = take_apart(encode())
    data = put_together(header, [bomb, *streams[1:]])
    assert peak_bytes(lambda: decode(data)) < BOUND


def test_claim_of_many_weights_takes_no_memory() -> None:
    """A header of the largest shapes with streams of nothing."""
    header, streams = take_apart(encode())
    for change in (("model_dim", 16_384), ("vocab_size", 65_535)):
        data = put_together(with_setting(*change)(header), [b""] * len(streams))
        assert peak_bytes(functools.partial(decode, data)) < BOUND


@pytest.mark.parametrize("codec", ["brotli", "ans"])
def test_artifact_of_other_settings_is_refused_before_it_is_decoded(
        codec: Literal["brotli", "ans"], world: golf.World, tmp_path: Path) -> None:
    """A small file may claim a large model, so the claim is compared before memory is taken."""
    header, streams = take_apart(encode(replace(SMALL, compressor=codec)))
    assert isinstance(header["settings"], dict)
    large = {**header["settings"], "vocab_size": 60_000, "model_dim": 1024}
    path = tmp_path / "large.bin"
    path.write_bytes(put_together({**header, "settings": large}, streams))
    load = functools.partial(golf.load_artifact, path, SMALL, world, golf.sdpa_attend)
    assert peak_bytes(load) < BOUND


@pytest.mark.parametrize("content", [b"", b"x", b"abc" * 5000])
def test_stream_gives_exactly_its_declared_size(content: bytes) -> None:
    data = golf.compress(np.frombuffer(content, np.int8))
    assert golf.decompress(data, (len(content),)).tobytes() == content
    for size in {0, 1, len(content) - 1, len(content) + 1} - {-1, len(content)}:
        with pytest.raises(golf.ArtifactError):
            golf.decompress(data, (size,))


def test_stream_with_something_behind_or_missing_is_refused() -> None:
    data = brotli.compress(b"abc" * 500)
    for wrong in (data + b"\0", data + data, data[:-1], b""):
        with pytest.raises(golf.ArtifactError):
            golf.decompress(wrong, (1500,))


# ---- The coder of levels ----

shapes = st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 40))


@given(shape=shapes, seed=st.integers(0, 2**32), spread=st.sampled_from([0, 0.3, 3, 30, 1000]),
       offset=st.sampled_from([0, -128, 127]))
def test_levels_come_back(shape: tuple[int, int, int], seed: int, spread: float,
                          offset: int) -> None:
    levels = np.random.default_rng(seed).normal(offset, spread, shape).clip(-128, 127)
    levels = levels.astype(np.int8)
    before = levels.copy()
    data = golf.encode_levels(levels)
    assert (levels == before).all()
    found = golf.decode_levels(data, shape)
    assert found.dtype == np.int8
    assert (found == levels).all()


def test_coder_of_levels_warns_about_nothing() -> None:
    levels = np.arange(-128, 128).astype(np.int8).reshape(1, 16, 16)
    with warnings.catch_warnings(action="error"):
        data = golf.encode_levels(levels)
        assert (golf.decode_levels(data, (1, 16, 16)) == levels).all()


def weights_with_structure(seed: int = 0) -> np.ndarray:
    """Levels as quantised weights have them: columns of different size, rows alike."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.normal(0, 0.5, (4, 1, 128)))
    return (rng.normal(0, 2.4, (4, 256, 128)) * sizes).round().clip(-31, 31).astype(np.int8)


def test_levels_take_about_their_entropy() -> None:
    rng = np.random.default_rng(0)
    plain = rng.normal(0, 2.4, (4, 256, 128)).round().astype(np.int8)
    even = (2 * rng.integers(-4, 5, (4, 256, 128))).astype(np.int8)  # far from a bell
    for levels, low, high in ((plain, 0.99, 1.02), (even, 0.99, 1.06),
                              (weights_with_structure(), 0.5, 0.97)):
        bits = golf.entropy_bits(torch.from_numpy(levels))
        assert low < 8 * len(golf.encode_levels(levels)) / bits < high


@pytest.mark.parametrize("change", ["cut", "extended", "flipped", "state", "fact"])
def test_damaged_levels_are_refused_even_without_a_checksum(change: str) -> None:
    levels = weights_with_structure()
    data = bytearray(golf.encode_levels(levels))
    if change == "cut":
        del data[-2:]
    elif change == "extended":
        data += b"\0\0"
    else:
        data[{"flipped": len(data) // 2, "state": 9, "fact": 3}[change]] ^= 1
    with pytest.raises(REFUSED):
        golf.decode_levels(bytes(data), levels.shape)


@pytest.mark.parametrize("length", [0, 1, 2, 5, 69, 70, 71])
def test_levels_without_words_are_refused(length: int) -> None:
    with pytest.raises(REFUSED):
        golf.decode_levels(b"\xff" * length, (1, 4, 4))


# ---- Codecs and files ----


def test_missing_brotli_is_noticed_before_training(make_env: MakeEnv, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "brotli", None)
    with pytest.raises(golf.ConfigError, match="COMPRESSOR=brotli") as error:
        golf.main(make_env())
    assert "pip install" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_old_brotli_is_noticed_before_training(config: golf.Config,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    class Decompressor:
        """Without a limit on its output."""

    monkeypatch.setattr(brotli, "Decompressor", Decompressor)
    with pytest.raises(golf.ConfigError, match=r"brotli.*1\.2"):
        golf.codec_of(config)


def write_artifact(config: golf.Config, path: Path, plan: str = "looped") -> Path:
    path.write_bytes(encode(config, plan=plan))
    return path


@pytest.mark.parametrize("plan", ["unlooped", "looped"])
def test_loaded_model_runs_the_plan_it_was_trained_with(config: golf.Config, world: golf.World,
                                                        tmp_path: Path, plan: str) -> None:
    path = write_artifact(config, tmp_path / "a.bin", plan)
    model, found = golf.load_artifact(path, config, world, golf.sdpa_attend)
    assert found == plan_named(config, plan)
    contents = random_contents(config, 0)
    for name, p in model.stacks().items():
        wanted = golf.stored_weights(contents, name)
        torch.testing.assert_close(p.detach(), wanted, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize(("override", "value"), [
    ("NUM_LAYERS", 6), ("MODEL_DIM", 64), ("ROPE_DIMS", 8), ("XSA_LAST_N", 3), ("NUM_LOOPS", 2),
    ("LOGIT_SOFTCAP", 15), ("ROPE_BASE", 500), ("LN_SCALE", 0), ("PARALLEL_RESIDUAL_START", 2)])
def test_artifact_of_another_configuration_is_refused(
        make_config: MakeConfig, world: golf.World, tmp_path: Path, override: str,
        value: int) -> None:
    path = write_artifact(make_config(), tmp_path / "a.bin")
    other = make_config(**{override: value})
    with pytest.raises(golf.ArtifactError, match=f"{override}=") as error:
        golf.load_artifact(path, other, world, golf.sdpa_attend)
    assert str(path) in str(error.value)
    assert str(getattr(other, override.lower())) in str(error.value)


def test_artifact_with_a_plan_that_the_settings_lack_is_refused(
        config: golf.Config, world: golf.World, tmp_path: Path) -> None:
    header, streams = take_apart(encode(config))
    path = tmp_path / "a.bin"
    path.write_bytes(put_together({**header, "plan": "sideways"}, streams))
    with pytest.raises(golf.ArtifactError, match=r"a\.bin.*sideways"):
        golf.load_artifact(path, config, world, golf.sdpa_attend)


@pytest.mark.parametrize("damage", ["missing", "truncated", "foreign"])
def test_unusable_file_is_named_before_anything_is_written(
        make_env: MakeEnv, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "model.bin"
    if damage != "missing":
        path.write_bytes(encode()[:-5] if damage == "truncated" else b"something else entirely")
    with pytest.raises(golf.ArtifactError, match=r"model\.bin") as error:
        golf.main(make_env(EVAL_ONLY=path))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "logs").exists()


def test_saving_reports_bytes_as_a_directory_listing_would(
        make_config: MakeConfig, world: golf.World, tmp_path: Path) -> None:
    config = make_config()
    log, model = golf.RunLog(config, world), random_model(config)
    contents, path = random_contents(config, 0), tmp_path / "artifact.bin"
    golf.save_artifact(path, encode(config), contents, model, log)
    artifact = log.result["artifact"]
    assert artifact["model_bytes"] == path.stat().st_size
    assert artifact["code_bytes"] == len(golf.packed_program())
    assert artifact["total_bytes"] == artifact["model_bytes"] + artifact["code_bytes"]
    assert artifact["unused_bytes"] == 16_000_000 - artifact["total_bytes"]
    assert artifact["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    total = f"{artifact['total_bytes']:,} / 16,000,000"
    assert total in (tmp_path / "logs" / "toy.txt").read_text()
