"""tools/bench_ranks.py: world sizes side by side, over gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from toy import MakeConfig, tiny_env

import train_gpt as golf
from tools import bench_ranks, readme_blocks


def test_two_ranks_beside_one(data_dir: Path, tmp_path: Path,
                              monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in tiny_env(data_dir, tmp_path, OMP_NUM_THREADS=1).items():
        monkeypatch.setenv(name, value)
    assert bench_ranks.main(["--sizes", "1,2", "--losses", "4", "--repeats", "2"]) == 0
    path, = (tmp_path / "logs").glob("bench_ranks_cpu_*.json")
    content = json.loads(path.read_text())
    rows = {(r["world_size"], r["batch"], r["plan"]): r for r in content["rows"]}
    assert len(rows) == 2 * 2 * 2
    for size, kind, plan in rows:
        row = rows[size, kind, plan]
        assert row["batch_tokens"] == 384 * (2 if kind == "global" else size)
        assert row["micro_steps"] == row["batch_tokens"] // 384 // size
        assert row["tok_s"] == pytest.approx(1e3 * row["batch_tokens"] / row["ms_per_step"])
        assert row["speed_up"] == row["tok_s"] / rows[1, kind, plan]["tok_s"]
    one, two = content["agreement"]
    assert one["equal_weights"] and two["equal_weights"]
    assert two["loss_gap"] < 1e-3
    assert len(set(content["losses"]["2"])) == 4
    page = tmp_path / "page.md"
    page.write_text(f"<!-- generated:scaling logs/{path.name} -->\n<!-- /generated -->\n")
    text, _ = readme_blocks.regenerate(page)
    assert "2 ranks: weights equal on all ranks after 4 steps" in text
    assert text.count("`looped`") == 4


@pytest.mark.parametrize("spoilt", [0, 1])
def test_weights_are_compared_at_the_end_of_a_whole_run(data_dir: Path, tmp_path: Path,
                                                        spoilt: int) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(Path(golf.__file__).parent)!r})
from tools import bench_ranks
train = bench_ranks.golf.Trainer.run
def run(trainer, validate):
    found = train(trainer, validate)
    trainer.weights[0].flatten()[0] += {spoilt} * trainer.world.rank
    return found
bench_ranks.golf.Trainer.run = run
sys.exit(bench_ranks.main(["--whole-run"]))
""")
    env = os.environ | tiny_env(data_dir, tmp_path, OMP_NUM_THREADS=1, TTT_ENABLED=0, MIXER="off")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(script)]
    answer = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    result = json.loads((tmp_path / "logs" / "toy.json").read_text())
    assert (answer.returncode == 0) == (not spoilt), answer.stderr[-2000:]
    assert result["train"]["equal_weights"] == (not spoilt)
    assert result["status"] == ("partial" if spoilt else "complete")
    if spoilt:
        assert "weights of 2 ranks differ, here sha256 " in result["exit_reason"]


def test_a_failing_rank_is_an_error_with_its_reason(data_dir: Path, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    env = tiny_env(data_dir, tmp_path, OMP_NUM_THREADS=1, ATTENTION="fa3")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(golf.GolfError, match=r"^1 ranks: ATTENTION=fa3"):
        bench_ranks.main(["--sizes", "1"])


@pytest.mark.parametrize("loops", [
    {"NUM_LOOPS": 0}, {"NUM_LOOPS": 2, "PROG_DEPTH": "0.3:1,0.6:2,1:3"}])
def test_losses_go_through_all_plans_however_many(make_config: MakeConfig,
                                                  loops: dict[str, object]) -> None:
    config = make_config(**loops)
    measured = bench_ranks.RankBench(config, golf.World(), 1).measure([384], 4)
    plans = [plan.name for plan in golf.depth_plans(config)]
    assert [timing.plan for timing in measured.timings] == plans
    assert len(plans) == (3 if loops["NUM_LOOPS"] else 1)
    assert len(measured.losses) == 4


@pytest.mark.parametrize(("option", "value", "message"), [
    ("--sizes", "2,4", "1 comes first"), ("--sizes", "1,5", "5 must be one of [1, 2, 3, 4, 6, 8]"),
    ("--sizes", "1,two", "whole numbers"), ("--repeats", "0", "0 is not between 1 and"),
    ("--losses", "-1", "-1 is not between 1 and")])
def test_wrong_arguments_are_refused(capsys: pytest.CaptureFixture[str], option: str, value: str,
                                     message: str) -> None:
    with pytest.raises(SystemExit) as ended:
        bench_ranks.main([option, value])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("some", "others", "length"), [
    ([(0, 4)], [(1, 2), (3, 9)], 2), ([(0, 4), (5, 6)], [(0, 3), (2, 10)], 5), ([(0, 1)], [], 0)])
def test_overlap(some: list[bench_ranks.Interval], others: list[bench_ranks.Interval],
                 length: float) -> None:
    assert bench_ranks.overlapped_length(some, others) == length
