"""Fixtures: a corpus on disk, tiny settings, one whole run, and what several ranks measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import settings
from ranks import Measured, measure
from toy import (
    MakeConfig,
    MakeEnv,
    SilentLog,
    free_port,
    run_ranks,
    shared_once,
    tiny_env,
    write_corpus,
)

import train_gpt as golf

torch.set_num_threads(1)
settings.register_profile("golf", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("golf")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU say so where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with datasets/ and tokenizers/."""
    return shared_once(tmp_path_factory, "corpus", write_corpus)


@pytest.fixture
def make_env(data_dir: Path, tmp_path: Path) -> MakeEnv:
    """Environment of a tiny run that writes below tmp_path, with overrides."""
    return lambda **overrides: tiny_env(data_dir, tmp_path, **overrides)


@pytest.fixture
def make_config(make_env: MakeEnv) -> MakeConfig:
    """The same as a Config."""
    return lambda **overrides: golf.Config.from_env(make_env(**overrides))


@pytest.fixture
def config(make_config: MakeConfig) -> golf.Config:
    """The tiny settings as they are."""
    return make_config()


@pytest.fixture
def world() -> golf.World:
    """A world of one."""
    return golf.World()


@pytest.fixture
def log(config: golf.Config) -> SilentLog:
    """A log without files."""
    return SilentLog(config)


@pytest.fixture(scope="session")
def trained_run(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with logs/ and runs/ of one whole run named toy."""
    def write_run(folder: Path) -> None:
        golf.main(tiny_env(data_dir, folder))
    return shared_once(tmp_path_factory, "trained", write_run)


@pytest.fixture(scope="session")
def val_stream(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> golf.ValStream:
    """The toy validation stream."""
    env = tiny_env(data_dir, tmp_path_factory.getbasetemp())
    return golf.ValStream.load(golf.Config.from_env(env))


@pytest.fixture(scope="session", params=[2, 3])
def ranks(request: pytest.FixtureRequest, data_dir: Path,
          tmp_path_factory: pytest.TempPathFactory) -> list[Measured]:
    """What tests/ranks.py measured, by rank, at the two world sizes."""
    size: int = request.param

    def launch(folder: Path) -> None:
        env = {**tiny_env(data_dir, folder), "SECOND_PORT": str(free_port())}
        run_ranks(Path(__file__).with_name("ranks.py"), size, folder, env)

    folder = shared_once(tmp_path_factory, f"ranks{size}", launch)
    return [torch.load(folder / f"rank{r}.pt", weights_only=True) for r in range(size)]


@pytest.fixture(scope="session")
def alone(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """The same in a world of one, in this process."""
    env = tiny_env(data_dir, tmp_path_factory.mktemp("alone"))
    return measure(golf.Config.from_env(env), golf.World())
