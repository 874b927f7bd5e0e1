"""Runs as train_gpt.py leaves them, and records folders as people publish them; all made up."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import math
import zipfile
from pathlib import Path

TARGETS, BYTES = 2_000_000, 7_450_000
LN2 = math.log(2)

# A stand-in for train_gpt.py that does what record.py asks of it: `pack OUT` and PRINT_CONFIG.
PROGRAM = '''"""A program that packs itself and prints its settings."""
import ast
import io
import os
import sys
import zipfile
from pathlib import Path


def pack(source):
    """Deterministic zip of the program without docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef)):
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = node.body[1:] or [ast.Pass()]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo("__main__.py"), ast.unparse(tree) + "\\n")
    return buffer.getvalue()


if sys.argv[1:2] == ["pack"]:
    Path(sys.argv[2]).write_bytes(pack(Path(__file__).read_text()))
elif os.environ.get("PRINT_CONFIG") == "1":
    print("config hash:", "c0ffee" if os.environ.get("MATRIX_LR") == "0.03" else "unlike")
'''


def pack_program(source: str = PROGRAM) -> bytes:
    """What the program's own packer makes of it."""
    scope: dict[str, object] = {"__name__": "packer", "__file__": ""}
    text = source.split("\n\nif sys.argv", maxsplit=1)[0]
    exec(compile(text, "packer", "exec"), scope)
    return bytes(scope["pack"](source))  # type: ignore[operator]


def unpack(program: bytes) -> str:
    """Source inside a packed program."""
    with zipfile.ZipFile(io.BytesIO(program)) as archive:
        return archive.read("__main__.py").decode()


def bpb(nats: float) -> float:
    """Bits per byte of the synthetic stream."""
    return nats * TARGETS / (LN2 * BYTES)


def result(seed: int = 42, nats: float = 2.80, **changes: object) -> dict:
    """A result file's content; `changes` are dotted keys with `__` for the dots."""
    packed = pack_program()
    scores = {
        "raw": nats + 0.07, "averaged": nats + 0.06, "quantised": nats + 0.09,
        "sliding": nats + 0.02, "ttt_sgd": nats,
    }
    model = 15_900_000 + seed
    content = {
        "run_id": f"pr1493-{seed}-20261123T101500", "track": "non_record", "status": "complete",
        "exit_reason": "finished", "preset": "pr1493", "seed": seed, "world_size": 1,
        "config_hash": "c0ffee", "started": f"2026-11-23T10:{seed % 60:02d}:00Z",
        "finished": "2026-11-23T10:40:00Z", "headline": "ttt_sgd", "val_loss": nats,
        "val_bpb": bpb(nats), "source_sha256": hashlib.sha256(PROGRAM.encode()).hexdigest(),
        "packed_sha256": hashlib.sha256(packed).hexdigest(),
        "config": {"preset": "pr1493", "seed": seed, "matrix_lr": 0.03, "warmdown_frac": 0.72},
        "differs": {"matrix_lr": 0.03},
        "hardware": {"gpu": "NVIDIA H200", "gpus": 1, "cpu_count": 16, "driver": "580.1"},
        "versions": {
            "python": "3.12.3", "torch": "2.11.0+cu130", "cuda": "13.0", "attention_backend": "fa3",
        },
        "data": {
            "name": "english_sp8192", "tokenizer_sha256": "ab" * 32, "train_tokens": 40_000_000,
            "train_shards": 1, "passes": 2.1, "val_documents": 900, "val_targets": TARGETS,
            "val_bytes": BYTES, "val_raw_bytes": BYTES + 900, "fingerprint": "f00d",
        },
        "model": {"parameters": 35_944_536},
        "train": {
            "steps": 400, "seconds": 300.0, "tokens": 400 * 98_304, "ms_per_step": 750.0,
            "tok_s": 131_072, "tok_s_by_plan": {"unlooped": 150_000, "looped": 110_000},
            "peak_mib": 39_045, "loop_enabled_step": 140, "startup_seconds": 61.0,
        },
        "bpb": {name: bpb(value) for name, value in scores.items()},
        "nats": scores,
        "eval_seconds": {
            "raw": 4.0, "averaged": 4.1, "quantised": 5.2, "sliding": 60.0, "ttt_sgd": 130.5,
        },
        "artifact": {
            "code_bytes": len(packed), "model_bytes": model, "total_bytes": len(packed) + model,
            "cap_bytes": 16_000_000, "unused_bytes": 16_000_000 - len(packed) - model,
            "sha256": f"{seed:064x}", "codec": "brotli",
        },
        "quantisation": {
            "gap_bpb": bpb(0.03), "bits_per_weight": 3.55, "seconds_hessians": 9.0,
            "by_tensor": [
                {"name": f"{kind}_{i}", "bits": 3.3 + 0.01 * i, "error": 0.01 * (i + 1)}
                for i in range(6)
                for kind in ("qkv", "up", "down")
            ],
        },
        "clocks": {
            "training_seconds": 299.5, "training_budget_seconds": 300.0,
            "train_to_artifact_seconds": 340.0, "eval_seconds_strict": 201.0,
            "eval_seconds_lenient": 130.5, "eval_budget_seconds": 600.0,
        },
        "audit": {
            name: {
                "passed": True,
                # quantised, sliding and ttt_sgd
                "checked": 3 * TARGETS if name == "c4_single_pass" else 64, "worst": 0.0,
            }
            for name in (
                "c1_causal",
                "c2_normalised",
                "c3_score_first",
                "c4_single_pass",
                "documents_isolated",
            )
        },
    }
    for key, value in changes.items():
        *parents, last = key.split("__")
        place = content
        for part in parents:
            place = place.setdefault(part, {})
        if value is None:
            place.pop(last, None)
        else:
            place[last] = value
    return copy.deepcopy(content)


LABELS = {
    "raw": "raw weights", "averaged": "pre-quantization post-ema", "quantised": "quantized",
    "sliding": "quantized_sliding_window", "ttt_sgd": "quantized_ttt",
    "ttt_documents": "quantized_ttt",
}


def events(content: dict) -> list[dict]:
    """Events of a run with this result."""
    steps, lines = (
        content["train"]["steps"],
        [{"event": "start", "t": 0.1, "run_id": content["run_id"]}],
    )
    for step in [*range(1, 6), *range(20, steps + 1, 20)]:
        looped = step >= content["train"]["loop_enabled_step"]
        progress = step / steps
        lines.append(
            {
                "event": "train", "t": 60 + 0.75 * step, "step": step, "train_seconds": 0.75 * step,
                "train_loss": 2.9 + 6 / step**0.5 + 0.02 * math.sin(step + content["seed"]),
                "lr_scale": min(1.0, (1 - progress) / 0.72),
                "tok_s": 110_000 if looped else 150_000, "plan": "looped" if looped else "unlooped",
                "mem_mib": 38_000 + looped * 900, "progress": progress,
            }
        )
        if step % 100 == 0:
            nats = content["nats"]["raw"] + 3 / step**0.5
            lines.append(
                {
                    "event": "val", "t": 60 + 0.75 * step, "step": step, "val_loss": nats,
                    "val_bpb": bpb(nats), "label": "val",
                }
            )
    lines.append(
        {
            "event": "plan", "t": 165.0, "step": content["train"]["loop_enabled_step"],
            "plan": "looped", "progress": 0.35,
        }
    )
    lines.append({"event": "phase", "t": 375.0, "phase": "calibration", "seconds": 9.0})
    for name, nats in content["nats"].items():
        lines.append(
            {
                "event": "eval", "t": 400.0, "label": name, "val_loss": nats,
                "val_bpb": content["bpb"][name], "seconds": content["eval_seconds"].get(name),
            }
        )
    lines.append({"event": "result", "t": 600.0, "status": content["status"], "reason": "finished"})
    return lines


def text_log(content: dict, source: str = PROGRAM) -> str:
    """Text log of a run with this result."""
    lines = [
        source,
        f"run {content['run_id']}: PRESET={content['preset']}, differs from preset: nothing",
        "train_shards: 1 | train_tokens: 40,000,000 | val_tokens: 2000000 (predictions) | "
        "val_bytes: 7450000 | model_params:35944536",
    ]
    for event in events(content):
        if event["event"] == "train":
            lines.append(
                f"{event['step']}/20000 train_loss: {event['train_loss']:.4f} "
                f"step_time: 750.0ms tok/s: {event['tok_s']}"
            )
    artifact = content["artifact"]
    lines.append(
        f"training: {content['train']['steps']} steps, 299.5s, 131072 tok/s, micro-steps only"
    )
    lines.append(
        f"artifact_bytes = {artifact['code_bytes']:,} code + {artifact['model_bytes']:,} model = "
        f"{artifact['total_bytes']:,} / 16,000,000"
    )
    for name, nats in content["nats"].items():
        lines.append(
            f"{LABELS[name]} val_loss:{nats:.8f} val_bpb:{content['bpb'][name]:.8f} "
            f"eval_time:{1e3 * content['eval_seconds'][name]:.0f}ms"
        )
    return "\n".join(lines) + "\n"


def write_run(folder: Path, content: dict, source: str = PROGRAM) -> Path:
    """Write the three files of a run; the result file's path."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / content["run_id"]
    path = stem.with_name(stem.name + ".json")
    path.write_text(json.dumps(content, indent=1))
    lines = "".join(json.dumps(event) + "\n" for event in events(content))
    stem.with_name(stem.name + ".jsonl").write_text(lines)
    stem.with_name(stem.name + ".txt").write_text(text_log(content, source))
    return path


def packed_run(seed: int, nats: float) -> tuple[dict, str]:
    """Result and source of a run that was started from the packed program."""
    source = unpack(pack_program())
    return result(seed, nats, source_sha256=hashlib.sha256(source.encode()).hexdigest()), source


# ----------------------------------------------------------------- a folder as people publish them

PUBLISHED = {  # seed: steps, seconds, pre-quant, quantised, sliding (bpb and nats), model bytes
    42: (5102, 590.087, 1.09504795, 1.10710196, 1.08846912, 2.50459726, 15_806_848),
    1337: (5105, 590.119, 1.09593552, 1.10808224, 1.08936490, 2.50665849, 15_805_164),
    2024: (5104, 590.051, 1.09541834, 1.10748700, 1.08877858, 2.50530935, 15_812_142),
}
SHIPPED = "import math\n\nLEARNING_RATE = 0.022\nprint(math.pi)\n"


def published_log(
    seed: int, *, code: str = SHIPPED, settings: dict | None = None, tail: str = ""
) -> str:
    """Text log of a published trainer."""
    steps, seconds, before, after, sliding, nats, model = PUBLISHED[seed]
    size = len(code.encode())
    shown = {
        "iterations": 20000, "matrix_lr": 0.022, "recur_start_step": 2000, "seed": seed,
        "train_batch_tokens": 786432, "warmdown_frac": 0.72, "world_size": 8,
    } | (settings or {})
    lines = [
        code + "=" * 100,
        "Hyperparameters:",
        *(f"  {k}: {v}" for k, v in shown.items()),
        "=" * 100,
        "PyTorch 2.9.1+cu128",
        "|   0  NVIDIA H100 80GB HBM3          On  |   00000000:19:00.0 Off |               0 |",
        "train_shards: 143",
        "val_tokens: 45508608",
        "model_params:34401372",
        "0/20000 val_loss: 8.3172 val_bpb: 3.6140",
        "500/20000 train_loss: 3.1123 train_time: 0.8m tok/s: 7940012",
        f"{steps}/20000 val_loss: 2.5229 val_bpb: 1.0963",
        f"stopping_early: wallclock_cap train_time: {1000 * seconds:.0f}ms step: {steps}/20000",
        "peak memory allocated: 32292 MiB reserved: 33000 MiB",
        f"pre-quantization post-ema val_loss:{2.52:.8f} val_bpb:{before:.8f} eval_time:2011ms",
        "Serialized model: 130432585 bytes",
        f"Code size: {size} bytes",
        "GPTQ:collected 66 Hessians in 9.4s",
        f"Serialized model int6+brotli: {model} bytes",
        f"Total submission size int6+brotli: {model + size} bytes",
        f"final_int6_roundtrip val_loss:2.5475 val_bpb:{after:.4f} eval_time:8600ms",
        f"final_int6_roundtrip_exact val_loss:{2.54752:.8f} val_bpb:{after:.8f}",
        f"final_int6_sliding_window val_loss:{nats:.4f} val_bpb:{sliding:.4f} eval_time:81000ms",
        f"final_int6_sliding_window_exact val_loss:{nats:.8f} val_bpb:{sliding:.8f}",
        tail,
    ]
    return "\n".join(lines) + "\n"


def published_submission() -> dict:
    """A submission.json without contradictions."""
    rows = PUBLISHED
    code = len(SHIPPED.encode())
    totals = {seed: row[6] + code for seed, row in rows.items()}
    mean = sum(row[4] for row in rows.values()) / 3
    spread = math.sqrt(sum((row[4] - mean) ** 2 for row in rows.values()) / 2)
    return {
        "author": "someone", "github_id": "someone", "name": "A run", "date": "2026-04-08",
        "track": "10min_16mb", "blurb": "Three seeds.", "val_bpb": round(mean, 8),
        "val_loss": round(sum(row[5] for row in rows.values()) / 3, 8),
        "val_bpb_std": round(spread, 6), "bytes_total": max(totals.values()), "bytes_code": code,
        "seeds": list(rows),
        "seed_results": {
            str(seed): {
                "val_bpb": row[4], "val_loss": row[5], "artifact_bytes": totals[seed],
                "steps": row[0], "pre_quant_val_bpb": row[2], "quantized_val_bpb": row[3],
            }
            for seed, row in rows.items()
        },
        "hardware": "8xH100 80GB SXM", "pytorch_version": "2.9.1+cu128",
        "compliance": {
            "artifact_under_16mb": True, "train_under_600s": True, "eval_under_600s": True,
            "three_seeds": True,
        },
    }


def published_readme() -> str:
    """A README without contradictions."""
    code = len(SHIPPED.encode())
    lines = [
        "# A run",
        "",
        "val_bpb 1.0889 | 3 seeds",
        "",
        "Zero selective pruning was needed.",
        "",
        "| Seed | Steps | Pre-quant BPB | **Sliding BPB** | val_loss (nats) | Artifact |",
        "|---|---|---|---|---|---|",
    ]
    for seed, row in PUBLISHED.items():
        scores = f"{row[2]:.4f} | **{row[4]:.4f}** | {row[5]:.4f}"
        lines.append(f"| {seed} | {row[0]:,} | {scores} | {row[6] + code:,} |")
    return "\n".join([*lines, "| **Mean** | | | **1.0889** | | |", ""])


def write_published(folder: Path) -> Path:
    """A published folder without contradictions, with three logs in the older grammar."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train_gpt.py").write_text(SHIPPED)
    (folder / "requirements.txt").write_text("torch==2.9.1\nsentencepiece\n")
    (folder / "submission.json").write_text(json.dumps(published_submission(), indent=2))
    (folder / "README.md").write_text(published_readme())
    for seed in PUBLISHED:
        (folder / f"train_seed{seed}.log").write_text(published_log(seed))
    return folder
