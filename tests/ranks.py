"""What tests compare between world sizes. As a script: one rank, which writes rank<r>.pt."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from toy import SilentLog, plan_named, random_model, random_tokens

import train_gpt as golf

Measured = dict[str, object]


def measure_collectives(world: golf.World) -> Measured:
    """Every collective, on numbers that differ by rank."""
    mine = float(world.rank + 1)
    flat = [torch.full((2, 2), mine), torch.full((3,), 10 * mine)]
    world.sum_all_(flat, 0.5)
    stack = mine * torch.arange(2.0 * world.size)[:, None].expand(-1, 3).clone()
    return {"sum": world.combine(torch.tensor([mine, 2.0])), "sum_all": flat,
            "share": world.scatter_mean(stack), "gather": world.gather(torch.full((2, 1), mine)),
            "decide": world.decide(mine, 7.0 * mine),
            "largest": world.combine(torch.tensor(mine), dist.ReduceOp.MAX)}


def measure_optimizer(config: golf.Config, world: golf.World) -> Measured:
    """Weights and gradient norms after three steps on a batch that the ranks share out."""
    model, plan = random_model(config), plan_named(config, "looped")
    optimizer, norms = golf.Optimizer(model, config, world), []
    for step in range(3):
        rows = random_tokens(6, 33, seed=step).chunk(world.size)[world.rank]
        model(rows[:, :-1], rows[:, 1:], plan).mean().backward()
        norms.append(optimizer.step(step, 0.5))
    return {"weights": [p.detach() for p in model.parameters()], "norms": torch.stack(norms)}


def measure_calibration(config: golf.Config, world: golf.World) -> Measured:
    """Hessians of the calibration windows, and the integers that they lead to."""
    trainer = golf.Trainer(config, world, SilentLog(config), golf.sdpa_attend)
    trainer.model = random_model(config)
    hessians = trainer.calibrate(plan_named(config, "looped"))
    same = {name: torch.eye(len(h)) + h[0, 0] * 0.1 for name, h in measure_identity(config).items()}
    return {"hessians": hessians, "quantised": golf.quantise(trainer.model, same, world)._asdict()}


def measure_identity(config: golf.Config) -> dict[str, torch.Tensor]:
    """Second moments that do not depend on the world, for integers that must not either."""
    model = random_model(config)
    hessians = golf.Hessians(model)
    golf.collect(hessians, random_tokens(4, 33), plan_named(config, "looped"))
    return hessians.moments


def measure_scores(config: golf.Config, world: golf.World) -> Measured:
    """All evaluations of one model."""
    stream = golf.ValStream.load(config)
    scorer = golf.Scorer(random_model(config), plan_named(config, "looped"), stream, world)
    sliding = golf.sliding_windows(stream.num_targets, config.eval_seq_len, config.eval_stride)
    plain = golf.sliding_windows(stream.num_targets, config.eval_seq_len, config.eval_seq_len)
    scores = {"plain": golf.evaluate(scorer, plain).bits,
              "sliding": golf.evaluate(scorer, sliding).bits,
              "adapting": golf.evaluate_adapting(scorer, sliding).bits}
    return {**scores, "adapted": [p.detach() for p in scorer.model.parameters()]}


def measure_double_scoring(config: golf.Config, world: golf.World) -> str:
    """What the ledger says when two ranks score one target."""
    ledger = golf.ScoreLedger(golf.ValStream.load(config), world)
    start = np.array([5 * world.rank])
    ledger.commit(golf.Windows(start, start, start + 6), torch.ones(1, 6))
    try:
        ledger.released(5, 6)
    except golf.LegalityError as error:
        return str(error)
    return ""


def measure_clock(config: golf.Config, world: golf.World) -> list[tuple[float, bool]]:
    """Decisions of clocks that were started at different times."""
    clock = golf.TrainingClock(config, world, 1.0)
    clock.begin -= 2.0 * world.rank
    return [clock.next_step(step, 0) for step in range(3)]


def measure(config: golf.Config, world: golf.World) -> Measured:
    """Everything above, for one rank of a connected world."""
    return {"collectives": measure_collectives(world),
            "optimizer": measure_optimizer(config, world),
            "calibration": measure_calibration(config, world),
            "scores": measure_scores(config, world),
            "double": measure_double_scoring(config, world)}


def main(out: Path) -> None:
    """One rank: the pieces, then a whole run over the same port plus one."""
    torch.set_num_threads(1)
    config, world = golf.Config.from_env(os.environ), golf.World.from_env(os.environ)
    timed = golf.Config.from_env({**os.environ, "MAX_WALLCLOCK_SECONDS": "3.5"})
    with world.process_group():
        found = measure(config, world)
        found["clock"] = measure_clock(timed, world)
    os.environ["MASTER_PORT"] = os.environ["SECOND_PORT"]
    found["result"] = json.loads(json.dumps(golf.main(os.environ)))
    torch.save(found, out / f"rank{world.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
