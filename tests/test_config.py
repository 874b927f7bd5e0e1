"""Section 1: settings come from the environment complete and checked, or not at all."""

from __future__ import annotations

import re
import typing
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest
from toy import MakeEnv

import train_gpt as golf

# spec/pr1493.md section 1: every variable that the reference script read.
PUBLISHED = """
DATA_DIR SEED RUN_ID ITERATIONS WARMDOWN_FRAC WARMUP_STEPS TRAIN_BATCH_TOKENS TRAIN_SEQ_LEN
TRAIN_LOG_EVERY MAX_WALLCLOCK_SECONDS VAL_BATCH_TOKENS EVAL_SEQ_LEN VAL_LOSS_EVERY
SLIDING_WINDOW_ENABLED VOCAB_SIZE NUM_LAYERS XSA_LAST_N MODEL_DIM EMBEDDING_DIM NUM_HEADS
NUM_KV_HEADS MLP_MULT SKIP_GATES_ENABLED TIE_EMBEDDINGS LOGIT_SOFTCAP ROPE_BASE ROPE_DIMS
ROPE_TRAIN_SEQ_LEN LN_SCALE QK_GAIN_INIT NUM_LOOPS LOOP_START LOOP_END ENABLE_LOOPING_AT
PARALLEL_RESIDUAL_START MIN_LR EMBED_LR HEAD_LR TIED_EMBED_LR TIED_EMBED_INIT_STD MATRIX_LR
SCALAR_LR MUON_MOMENTUM MUON_MOMENTUM_WARMUP_START MUON_MOMENTUM_WARMUP_STEPS MUON_BACKEND_STEPS
MUON_ROW_NORMALIZE MUON_BETA2 BETA1 BETA2 ADAM_EPS GRAD_CLIP_NORM ADAM_WD MUON_WD EMBED_WD
EMA_DECAY EVAL_STRIDE TTT_ENABLED TTT_LR TTT_EPOCHS TTT_MOMENTUM TTT_CHUNK_TOKENS ETLB_ENABLED
ETLB_LR ETLB_STEPS ETLB_CLIP COMPRESSOR GPTQ_CALIBRATION_BATCHES GPTQ_RESERVE_SECONDS
MATRIX_BITS EMBED_BITS MATRIX_CLIP_SIGMAS EMBED_CLIP_SIGMAS CONTROL_TENSOR_NAME_PATTERNS
"""

# The values of the record run, same source.
RECORD_RUN = {
    "vocab_size": 8192, "train_seq_len": 2048, "train_batch_tokens": 786_432, "num_layers": 11,
    "model_dim": 512, "num_heads": 8, "num_kv_heads": 4, "mlp_mult": 4.0, "rope_base": 10_000.0,
    "rope_dims": 16, "qk_gain_init": 5.25, "ln_scale": True, "xsa_last_n": 11,
    "parallel_residual_start": 7, "logit_softcap": 30.0, "tied_embed_init_std": 0.005,
    "num_loops": 2, "loop_start": 3, "loop_end": 5, "enable_looping_at": 0.35, "matrix_lr": 0.022,
    "tied_embed_lr": 0.03, "scalar_lr": 0.02, "muon_momentum": 0.99,
    "muon_momentum_warmup_start": 0.92, "muon_momentum_warmup_steps": 1500, "muon_backend_steps": 5,
    "muon_row_normalize": True, "muon_wd": 0.095, "embed_wd": 0.085, "adam_wd": 0.02, "beta1": 0.9,
    "beta2": 0.95, "adam_eps": 1e-8, "grad_clip_norm": 0.3, "iterations": 20_000,
    "max_wallclock_seconds": 600.0, "gptq_reserve_seconds": 12.0, "warmdown_frac": 0.72,
    "min_lr": 0.0, "warmup_steps": 20, "ema_decay": 0.9965, "train_log_every": 500,
    "val_loss_every": 4000, "attn_qmax": 31, "mlp_qmax": 31, "embed_qmax": 127,
    "matrix_clip_sigmas": "12.85",
    "embed_clip_sigmas": "20", "gptq_calibration_batches": 64, "gptq_damp": 0.01,
    "compressor": "brotli", "artifact_cap_bytes": 16_000_000, "eval_seq_len": 2048,
    "val_batch_tokens": 524_288, "eval_stride": 64, "sliding_window_enabled": True,
    "ttt_enabled": True, "ttt_lr": 0.005, "ttt_epochs": 3, "ttt_momentum": 0.9,
    "ttt_chunk_tokens": 32_768, "ttt_grad_clip": 1.0,
}
COMMAND = {"SEED": "42", "QK_GAIN_INIT": "5.25", "TTT_ENABLED": "1", "TTT_LR": "0.005",
           "TTT_EPOCHS": "3", "PRESET": "pr1493"}


def one_line(error: pytest.ExceptionInfo[golf.GolfError]) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


def test_empty_environment_is_the_record_preset() -> None:
    assert golf.Config.from_env({}) == golf.Config() == golf.Config(preset="record")


@pytest.mark.parametrize("name", RECORD_RUN)
def test_pr1493_has_the_published_value(name: str) -> None:
    config = golf.Config.from_env({"PRESET": "pr1493"})
    assert getattr(config, name) == RECORD_RUN[name]
    assert config.differs() == {}


def test_published_command_prints_what_its_page_claims(
        capsys: pytest.CaptureFixture[str], tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert golf.main({**COMMAND, "PRINT_CONFIG": "1"}) == {}
    text = capsys.readouterr().out
    lines = text.splitlines()
    for name, value in COMMAND.items():
        assert f"{name}={value}" in lines
    for claim in ("encoder:[0, 1, 2, 3, 4] decoder:[5, 6, 7, 8, 9, 10]",
                  "encoder:[0, 1, 2, 3, 4, 5, 3, 4] decoder:[5, 3, 4, 5, 6, 7, 8, 9, 10]",
                  "total: 35,944,536 parameters", "embedding: 1 tensors, 4,194,304 parameters",
                  "matrix: 66 tensors, 31,719,424 parameters",
                  "vector: 46 tensors, 30,808 parameters", "8 micro-steps x 48 sequences"):
        assert claim in text
    assert not list(tmp_path.iterdir())


def test_print_config_describes_every_visit_of_every_plan(
        capsys: pytest.CaptureFixture[str]) -> None:
    golf.main({"PRESET": "pr1493", "PRINT_CONFIG": "1"})
    visits = re.findall(r"visit +(\d+): block (\d+) pass (\d) (serial|parallel) xsa",
                        capsys.readouterr().out)
    blocks = [int(block) for _, block, _, _ in visits]
    assert blocks == [*range(11), 0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10]
    assert all((kind == "parallel") == (int(block) >= 7) for _, block, _, kind in visits)


def test_print_config_estimates_the_artifact_near_the_published_size(
        capsys: pytest.CaptureFixture[str]) -> None:
    golf.main({"PRESET": "pr1493", "PRINT_CONFIG": "1"})
    match = re.search(r"expected artifact: ([\d,]+) of 16,000,000 bytes", capsys.readouterr().out)
    assert match
    assert int(match[1].replace(",", "")) == pytest.approx(16_019_000, rel=0.01)


@pytest.mark.parametrize("variable", PUBLISHED.split())
def test_published_variable_is_a_setting_or_names_one(variable: str) -> None:
    known = {field.name.upper() for field in fields(golf.Config)}
    if variable in known:
        return
    with pytest.raises(golf.ConfigError, match=variable) as error:
        golf.Config.from_env({variable: "1"})
    mentioned = set(re.findall(r"\b[A-Z][A-Z0-9]+(?:_[A-Z0-9]+)*\b", one_line(error)))
    assert mentioned - {variable} and mentioned - {variable} <= known


@pytest.mark.parametrize(("variable", "meant"), [
    ("MATRX_LR", "MATRIX_LR"), ("TRAIN_BATCH_TOKEN", "TRAIN_BATCH_TOKENS"),
    ("ITERATION", "ITERATIONS"), ("MAX_WALLCLOCK_SECOND", "MAX_WALLCLOCK_SECONDS"),
    ("QK_GAIN", "QK_GAIN_INIT"), ("SEEDS", "SEED"), ("NUM_LAYER", "NUM_LAYERS"),
    ("TTT_CHUNK_TOKEN", "TTT_CHUNK_TOKENS"), ("EVALONLY", "EVAL_ONLY")])
def test_misspelt_variable_gets_a_suggestion(variable: str, meant: str) -> None:
    with pytest.raises(golf.ConfigError) as error:
        golf.Config.from_env({variable: "1"})
    assert variable in one_line(error)
    assert meant in str(error.value)


@pytest.mark.parametrize("variable", ["PHASED_TTT_ENABLED", "MY_MUON_THING", "GPTQ_BLOCK", "XSA",
                                      "SWA_DECAY", "EMA_START", "FANCY_LORA_RANK"])
def test_variable_that_can_only_be_ours_is_refused(variable: str) -> None:
    with pytest.raises(golf.ConfigError, match=variable):
        golf.Config.from_env({variable: "1"})


ORDINARY = """
PATH HOME USER SHELL LANG LC_ALL TERM PWD OLDPWD SHLVL LOGNAME HOSTNAME EDITOR TMPDIR LS_COLORS
_ DISPLAY PYTHONPATH VIRTUAL_ENV CONDA_PREFIX PYTHONUNBUFFERED CUDA_VISIBLE_DEVICES CUDA_HOME
LD_LIBRARY_PATH CC CXX CFLAGS OMP_NUM_THREADS MKL_NUM_THREADS NCCL_NET NCCL_DEBUG
NCCL_SOCKET_IFNAME NCCL_NVLS_ENABLE GLOO_SOCKET_IFNAME MASTER_ADDR MASTER_PORT RANK WORLD_SIZE
LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK ROLE_RANK ROLE_NAME TORCHELASTIC_RUN_ID
TORCHELASTIC_MAX_RESTARTS TORCHELASTIC_USE_AGENT_STORE TORCH_NCCL_ASYNC_ERROR_HANDLING
TORCHINDUCTOR_CACHE_DIR TORCH_LOGS TRITON_CACHE_DIR PYTORCH_CUDA_ALLOC_CONF HF_HOME HF_ENDPOINT
HF_TOKEN WANDB_MODE SLURM_JOB_ID SLURM_NTASKS KUBERNETES_SERVICE_HOST SSH_CLIENT SSH_TTY
XDG_RUNTIME_DIR GITHUB_SHA CI PYTEST_CURRENT_TEST PYTEST_XDIST_WORKER MAKEFLAGS MAKELEVEL MFLAGS
COLUMNS LINES
"""


def test_ordinary_environments_pass() -> None:
    assert golf.Config.from_env(dict.fromkeys(ORDINARY.split(), "x")) == golf.Config()


@pytest.mark.parametrize(("variable", "text"), [
    ("SEED", "abc"), ("SEED", "1.5"), ("SEED", ""), ("ITERATIONS", "1e3"),
    ("TTT_ENABLED", "true"), ("FIT", ""), ("COMPILE", "2"), ("MATRIX_LR", "fast"),
    ("ATTENTION", "fa5"), ("COMPRESSOR", "zip"),
    ("TRACK", "10min"), ("PRESET", "pr9999"), ("PRESET", "")])
def test_malformed_value_is_named(variable: str, text: str) -> None:
    with pytest.raises(golf.ConfigError) as error:
        golf.Config.from_env({variable: text})
    assert one_line(error).startswith(f"{variable}={text!r}")


@pytest.mark.parametrize("text", ["nan", "inf", "-inf"])
def test_number_that_is_not_finite_is_out_of_range(text: str) -> None:
    with pytest.raises(golf.ConfigError, match=f"^MATRIX_LR={text} must be between 0 and 10$"):
        golf.Config.from_env({"MATRIX_LR": text})


RANGES = {field.name: field.metadata["range"] for field in fields(golf.Config)
          if "range" in field.metadata}


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("side", [0, 1])
def test_out_of_range_value_names_variable_value_and_bound(name: str, side: int) -> None:
    kind = typing.get_type_hints(golf.Config)[name]
    bound = RANGES[name][side]
    value = kind(bound + (-1 if side == 0 else max(1, abs(bound))))
    with pytest.raises(golf.ConfigError) as error:
        golf.Config.from_env({name.upper(): str(value)})
    assert one_line(error).startswith(f"{name.upper()}=")
    assert f"{bound:g}" in str(error.value)


def test_every_number_has_a_range() -> None:
    hints = typing.get_type_hints(golf.Config)
    assert {name for name, kind in hints.items() if kind in (int, float)} <= set(RANGES)


@pytest.mark.parametrize(("settings", "variable"), [
    ({"MODEL_DIM": 510}, "MODEL_DIM"), ({"NUM_KV_HEADS": 3}, "NUM_HEADS"),
    ({"ROPE_DIMS": 66}, "ROPE_DIMS"), ({"ROPE_DIMS": 15}, "ROPE_DIMS"),
    ({"LOOP_START": 6}, "LOOP_START"), ({"LOOP_END": 11}, "LOOP_END"),
    ({"NUM_LAYERS": 5}, "LOOP_END"), ({"TRAIN_BATCH_TOKENS": 786_433}, "TRAIN_BATCH_TOKENS"),
    ({"MICRO_BATCH_TOKENS": 2047}, "MICRO_BATCH_TOKENS"),
    ({"EVAL_STRIDE": 2049}, "EVAL_STRIDE"), ({"TTT_CHUNK_TOKENS": 3000}, "TTT_CHUNK_TOKENS"),
    ({"MAX_WALLCLOCK_SECONDS": 12}, "MAX_WALLCLOCK_SECONDS"),
    ({"SLIDING_WINDOW_ENABLED": 0}, "TTT_ENABLED")])
def test_contradiction_names_the_setting_to_change(settings: dict[str, int], variable: str) -> None:
    with pytest.raises(golf.ConfigError) as error:
        golf.Config.from_env({"PRESET": "pr1493"} | {k: str(v) for k, v in settings.items()})
    assert variable in one_line(error)
    assert all(str(value) in str(error.value) for value in settings.values() if value)


@pytest.mark.parametrize("preset", golf.PRESETS)
def test_preset_is_consistent_and_made_of_settings(preset: str) -> None:
    assert set(golf.PRESETS[preset]) <= {field.name for field in fields(golf.Config)}
    config = golf.Config.from_env({"PRESET": preset})
    assert config.preset == preset
    assert config.differs() == {}


def test_variable_overrides_the_preset_and_shows_as_difference() -> None:
    config = golf.Config.from_env({"PRESET": "demo", "NUM_LAYERS": "6", "COMPILE": "1",
                                   "MATRIX_LR": "0.5"})
    assert (config.num_layers, config.compile, config.matrix_lr) == (6, True, 0.5)
    assert config.differs() == {"num_layers": 6, "compile": True, "matrix_lr": 0.5}
    assert config.model_dim == golf.Config.from_env({"PRESET": "demo"}).model_dim


@pytest.mark.parametrize("settings", [
    {"SEED": "7"}, {"RUN_ID": "a"}, {"LOG_DIR": "x"}, {"RUN_DIR": "x"}, {"DATA_DIR": "x"},
    {"DATA_PATH": "x"}, {"TOKENIZER_PATH": "x"}])
def test_config_hash_ignores_what_is_not_method(settings: dict[str, str]) -> None:
    assert golf.Config.from_env(settings).config_hash == golf.Config().config_hash


@pytest.mark.parametrize("settings", [
    {"MATRIX_LR": "0.5"}, {"NUM_LOOPS": "1"}, {"TTT_ENABLED": "0"}, {"FIT": "0"},
    {"QUANTISER": "gptq"}, {"MAX_WALLCLOCK_SECONDS": "60"}])
def test_config_hash_sees_the_method(settings: dict[str, str]) -> None:
    assert golf.Config.from_env(settings).config_hash != golf.Config().config_hash


def test_config_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        golf.Config().seed = 1  # type: ignore[misc]


def test_data_dir_data_path_and_tokenizer_path() -> None:
    derived = golf.Config.from_env({"DATA_DIR": "/d", "VOCAB_SIZE": "1024"})
    assert derived.dataset_dir == Path("/d/datasets/fineweb10B_sp1024")
    assert derived.tokenizer_file == Path("/d/tokenizers/fineweb_1024_bpe.model")
    given = golf.Config.from_env({"DATA_DIR": "/d", "DATA_PATH": "/a/b",
                                  "TOKENIZER_PATH": "/t.model"})
    assert (given.dataset_dir, given.tokenizer_file) == (Path("/a/b"), Path("/t.model"))


def test_derived_widths() -> None:
    config = golf.Config.from_env({"PRESET": "pr1493"})
    assert (config.head_dim, config.kv_dim, config.mlp_dim) == (64, 256, 2048)


@pytest.mark.parametrize("name", [name for name in golf.__dict__ if name.endswith("Error")])
def test_every_error_is_one_that_the_program_reports_in_one_line(name: str) -> None:
    assert issubclass(getattr(golf, name), golf.GolfError)


def test_wrong_setting_ends_before_any_file_is_written(make_env: MakeEnv, tmp_path: Path) -> None:
    with pytest.raises(golf.ConfigError):
        golf.main(make_env(MATRIX_LR="-1"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("setting", [{"MODEL_DIM": "516"}, {"MLP_MULT": "3.3"}])
def test_widths_that_the_copy_engine_cannot_move_are_refused(setting: dict[str, str]) -> None:
    with pytest.raises(golf.ConfigError, match="must be a multiple of 8"):
        golf.Config.from_env({"PRESET": "pr1493", **setting})
