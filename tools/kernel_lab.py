#!/usr/bin/env python3
"""Candidate Triton kernels for the trainer, beside the PyTorch they would replace.

    PRESET=pr1493 python tools/kernel_lab.py          checks, then times on the GPU; one table
    python tools/kernel_lab.py --check                checks only; on a CPU in Triton's interpreter
    python tools/kernel_lab.py --predict              bytes, floors and gains from shapes alone
    python tools/kernel_lab.py --json FILE --only qk,xsa

A kernel moves into train_gpt.py only after this table shows that it makes the micro-step faster.

Correct means: the error against float32 is at most twice that of the same mathematics in bf16, for
outputs and gradients, at odd sizes and with non-contiguous input. Times are medians of graph
replays on the device; the reference is what torch.compile makes of the trainer's own functions.
The `block` rows run a whole block, forward and backward, with kernels switched on one by one:
they count, because the compiler fuses across the borders that the isolated rows draw.

Exit status: 0 all correct, 1 an error too large, 2 bad arguments or no triton.

    N rows (B*T)   D model width   H query heads   G key/value heads   K head width   F MLP width
    V vocabulary
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError as problem:
    sys.exit(f"error: triton is missing ({problem}): pip install triton")

import train_gpt as golf
from tools.bench import Timer, copy_rate

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NORM_EPS = golf.NORM_EPS
MOST_ELEMENTS = 2**31  # of a tensor addressed with 32-bit offsets
# What a kernel sees of a tensor or of a descriptor: arguments are read by the compiler alone.
Pointer: TypeAlias = tl.tensor

# ==================================================================================================
# Launching
# ==================================================================================================


class Tile(NamedTuple):
    """What one program of a memory-bound kernel takes."""

    items: int  # rows, heads of a row, or elements, at a time
    warps: int


class MatrixTile(NamedTuple):
    """What one program of a matrix product takes."""

    rows: int
    columns: int
    depth: int
    stages: int
    warps: int


# The first of each list is the default; `tune` tries all on the device and keeps the fastest.
CHOICES: dict[str, list[Tile]] = {
    "mix_norm_forward": [Tile(4, 4), Tile(2, 2), Tile(8, 8)],
    "mix_norm_backward": [Tile(4, 8), Tile(4, 4), Tile(2, 2)],
    "qk_forward": [Tile(32, 4), Tile(64, 4), Tile(128, 8)],
    "qk_backward": [Tile(32, 4), Tile(16, 2), Tile(64, 8)],
    "xsa_forward": [Tile(16, 4), Tile(32, 4)],
    "xsa_backward": [Tile(16, 4), Tile(32, 4)],
    "square_forward": [Tile(4096, 4), Tile(2048, 4)],
    "square_backward": [Tile(2048, 4), Tile(4096, 4)],
    "nll_forward": [Tile(1, 16), Tile(1, 8)],
    "nll_backward": [Tile(1, 8), Tile(1, 16)],
}
MATRIX_CHOICES: dict[str, list[MatrixTile]] = {
    "up_square": [MatrixTile(128, 256, 64, 3, 8), MatrixTile(128, 128, 64, 4, 8),
                  MatrixTile(128, 128, 64, 3, 4), MatrixTile(256, 128, 64, 3, 8)],
    "down_gradient": [MatrixTile(128, 128, 64, 3, 8), MatrixTile(128, 256, 64, 3, 8),
                      MatrixTile(256, 128, 64, 3, 8), MatrixTile(128, 128, 64, 4, 4)],
}
Choice = TypeVar("Choice", Tile, MatrixTile)
RESOURCES: dict[str, str] = {}  # registers and spills of what ran on a GPU


def tile(name: str) -> Tile:
    """The tile in force for a memory-bound kernel."""
    return CHOICES[name][0]


def matrix_tile(name: str, *, small: bool) -> MatrixTile:
    """The tile in force for a matrix product; a small one for checks."""
    return MatrixTile(64, 64, 32, 2, 4) if small else MATRIX_CHOICES[name][0]


class Compiled(Protocol):
    """What a launch on a GPU returns."""

    n_regs: int
    n_spills: int


def note(name: str, compiled: Compiled | None) -> None:
    """Remembers what the compiler made of a kernel; the interpreter makes nothing."""
    if compiled is not None and name not in RESOURCES:
        RESOURCES[name] = f"{compiled.n_regs} registers, {compiled.n_spills} spills"


def num_programs(device: torch.device, per_processor: int) -> int:
    """Programs of a kernel that loops over its work."""
    if device.type != "cuda":
        return 3
    return per_processor * int(torch.cuda.get_device_properties(device).multi_processor_count)


def dense(*tensors: Tensor) -> list[Tensor]:
    """The tensors as the kernels read them. Raises: ValueError if one is too long to address."""
    for tensor in tensors:
        if tensor.numel() >= MOST_ELEMENTS:
            raise ValueError(f"{tensor.numel()} elements, fewer than {MOST_ELEMENTS} can be "
                             "addressed")
    return [tensor.contiguous() for tensor in tensors]


def blocks(count: int, size: int) -> int:
    """Tiles that cover `count`."""
    return -(-count // size)


Saved = torch.autograd.function.FunctionCtx


def saved(ctx: Saved) -> tuple[Tensor, ...]:
    """The tensors that an operator kept for its backward pass."""
    return ctx.saved_tensors  # type: ignore[attr-defined]


# ==================================================================================================
# Mix and norm: x, x0 (N, D), mix (2, D) float32, scale -> u = mix0 x + mix1 x0, z = norm(u) scale
#
# Rows stay in registers: a warp holds whole rows, 16 bytes a thread and access. The backward pass
# rebuilds u from x and x0 instead of reading it, and sums the gradients of mix on the way; programs
# loop over rows so that few partial sums leave the chip. Also the sum and norm in the middle of a
# serial block: x the stream, x0 the attention output, mix (1, scale).
# Tolerance: twice the bf16 error. D is any number; lanes past it idle.
# ==================================================================================================


@triton.jit
def mix_norm_forward(x: Pointer, x0: Pointer, mix: Pointer, scale: Pointer,  # noqa: PLR0913
                     u: Pointer, z: Pointer, N: int, EPS: tl.constexpr, D: tl.constexpr,
                     WIDTH: tl.constexpr, ROWS: tl.constexpr) -> None:
    """One tile of rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    place, inside = row * D + column, (row < N) & (column < D)
    first = tl.load(mix + column, mask=column < D, other=0.0)
    second = tl.load(mix + D + column, mask=column < D, other=0.0)
    mixed = first * tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    mixed += second * tl.load(x0 + place, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(mixed * mixed, axis=1) / D + EPS) * tl.load(scale)
    tl.store(u + place, mixed, mask=inside)
    tl.store(z + place, mixed * inverse[:, None], mask=inside)


@triton.jit
def mix_norm_backward(du: Pointer, dz: Pointer, x: Pointer, x0: Pointer,  # noqa: PLR0913
                      mix: Pointer, scale: Pointer, dx: Pointer, dx0: Pointer, dmix: Pointer,
                      N: int, EPS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
                      ROWS: tl.constexpr) -> None:
    """Every so many tiles of rows; dmix (programs, 2, D) holds this program's sums."""
    column = tl.arange(0, WIDTH)[None, :]
    first = tl.load(mix + column, mask=column < D, other=0.0)
    second = tl.load(mix + D + column, mask=column < D, other=0.0)
    gain = tl.load(scale)
    sum_first = tl.zeros((ROWS, WIDTH), tl.float32)
    sum_second = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in tl.range(tl.program_id(0) * ROWS, N, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        place, inside = row * D + column, (row < N) & (column < D)
        a = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(x0 + place, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(dz + place, mask=inside, other=0.0).to(tl.float32)
        total = tl.load(du + place, mask=inside, other=0.0).to(tl.float32)
        mixed = first * a + second * b
        inverse = tl.rsqrt(tl.sum(mixed * mixed, axis=1) / D + EPS)[:, None]
        along = tl.sum(d * mixed, axis=1)[:, None] * inverse * inverse / D
        total += gain * inverse * (d - along * mixed)
        tl.store(dx + place, first * total, mask=inside)
        tl.store(dx0 + place, second * total, mask=inside)
        sum_first += total * a
        sum_second += total * b
    out = dmix + tl.program_id(0) * 2 * D + tl.arange(0, WIDTH)
    tl.store(out, tl.sum(sum_first, axis=0), mask=tl.arange(0, WIDTH) < D)
    tl.store(out + D, tl.sum(sum_second, axis=0), mask=tl.arange(0, WIDTH) < D)


@torch.library.custom_op("golf_lab::mix_norm", mutates_args=())
def mix_norm(x: Tensor, x0: Tensor, mix: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Mixed stream u and its scaled norm z, both like x."""
    x, x0, mix = dense(x, x0, mix)
    D, choice = x.shape[-1], tile("mix_norm_forward")
    N, u, z = x.numel() // D, torch.empty_like(x), torch.empty_like(x)
    note("mix_norm_forward", mix_norm_forward[(blocks(N, choice.items),)](
        x, x0, mix, scale, u, z, N, NORM_EPS, D, triton.next_power_of_2(D), choice.items,
        num_warps=choice.warps))
    return u, z


@torch.library.custom_op("golf_lab::mix_norm_backward", mutates_args=())
def mix_norm_gradient(du: Tensor, dz: Tensor, x: Tensor, x0: Tensor, mix: Tensor,
                      scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, x0 and mix."""
    du, dz, x, x0, mix = dense(du, dz, x, x0, mix)
    D, choice = x.shape[-1], tile("mix_norm_backward")
    N, dx, dx0 = x.numel() // D, torch.empty_like(x), torch.empty_like(x)
    # As many as fit at once: registers allow about twelve warps.
    programs = min(num_programs(x.device, max(2, 12 // choice.warps)), blocks(N, choice.items))
    partial = mix.new_empty(programs, 2, D, dtype=torch.float32)
    note("mix_norm_backward", mix_norm_backward[(programs,)](
        du, dz, x, x0, mix, scale, dx, dx0, partial, N, NORM_EPS, D, triton.next_power_of_2(D),
        choice.items, num_warps=choice.warps))
    return dx, dx0, partial.sum(0).to(mix.dtype)


@mix_norm.register_fake
def _(x: Tensor, x0: Tensor, mix: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@mix_norm_gradient.register_fake
def _(du: Tensor, dz: Tensor, x: Tensor, x0: Tensor, mix: Tensor,
      scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), mix.new_empty(mix.shape)


def mix_norm_save(ctx: Saved, inputs: tuple[Tensor, ...], output: object) -> None:
    """Keeps the inputs: u is cheaper to rebuild than to read."""
    ctx.save_for_backward(*inputs)


def mix_norm_differentiate(ctx: Saved, du: Tensor,
                           dz: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    """Gradients of the operator's arguments."""
    dx, dx0, dmix = mix_norm_gradient(du, dz, *saved(ctx))
    return dx, dx0, dmix, None


mix_norm.register_autograd(mix_norm_differentiate, setup_context=mix_norm_save)


def mix_norm_reference(x: Tensor, x0: Tensor, mix: Tensor,
                       scale: Tensor) -> tuple[Tensor, Tensor]:
    """The same in PyTorch, as the trainer's blocks do it."""
    first, second = mix.to(x.dtype)
    u = first * x + second * x0
    return u, golf.rms_norm(u) * scale.to(x.dtype)


# ==================================================================================================
# Queries and keys: qkv (B, T, H+2G, K) -> q (B, T, H, K), k and v (B, T, G, K)
#
# An item is one head of one row; in the packed buffer items lie side by side. Each is normalised,
# its first 2*HALF dimensions are rotated by cos and sin (T, HALF) float32, queries times gain (H);
# values are copied, so that the backward pass owns the whole gradient and writes it packed, without
# a concatenation. The rotated pair is loaded apart from the rest: its second load hits the cache.
# Tolerance: twice the bf16 error. K and HALF are powers of two.
# ==================================================================================================


@triton.jit
def qk_forward(qkv: Pointer, gain: Pointer, cos: Pointer, sin: Pointer,  # noqa: PLR0913
               q: Pointer, k: Pointer, v: Pointer, N: int, T: int, EPS: tl.constexpr,
               H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr,
               ITEMS: tl.constexpr) -> None:
    """One tile of items."""
    item = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)
    row, head = item // (H + 2 * G), item % (H + 2 * G)
    valid = row < N
    is_q, is_v = valid & (head < H), valid & (head >= H + G)
    is_k = valid & (head >= H) & (head < H + G)
    column, pair = tl.arange(0, K)[None, :], tl.arange(0, HALF)[None, :]
    at_q, at_k = ((row * H + head) * K)[:, None], ((row * G + head - H) * K)[:, None]
    at_v, source = ((row * G + head - H - G) * K)[:, None], (item * K)[:, None]

    x = tl.load(qkv + source + column, mask=valid[:, None], other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(x * x, axis=1) / K + EPS)
    factor *= tl.load(gain + head, mask=is_q, other=1.0)
    straight, rest = x * factor[:, None], column >= 2 * HALF
    tl.store(q + at_q + column, straight, mask=is_q[:, None] & rest)
    tl.store(k + at_k + column, straight, mask=is_k[:, None] & rest)
    tl.store(v + at_v + column, x, mask=is_v[:, None])

    turns = (is_q | is_k)[:, None]
    a = tl.load(qkv + source + pair, mask=turns, other=0.0).to(tl.float32) * factor[:, None]
    b = tl.load(qkv + source + HALF + pair, mask=turns, other=0.0).to(tl.float32)
    b *= factor[:, None]
    angle = ((row % T) * HALF)[:, None] + pair
    c = tl.load(cos + angle, mask=turns, other=0.0)
    s = tl.load(sin + angle, mask=turns, other=0.0)
    tl.store(q + at_q + pair, a * c + b * s, mask=is_q[:, None])
    tl.store(q + at_q + HALF + pair, b * c - a * s, mask=is_q[:, None])
    tl.store(k + at_k + pair, a * c + b * s, mask=is_k[:, None])
    tl.store(k + at_k + HALF + pair, b * c - a * s, mask=is_k[:, None])


@triton.jit
def qk_backward(dq: Pointer, dk: Pointer, dv: Pointer, qkv: Pointer,  # noqa: PLR0913
                gain: Pointer, cos: Pointer, sin: Pointer, dqkv: Pointer, dgain: Pointer, N: int,
                T: int, EPS: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr,
                HALF: tl.constexpr, ITEMS: tl.constexpr) -> None:
    """One tile of items; dgain (N, H) float32 is summed over rows by the caller."""
    item = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)
    row, head = item // (H + 2 * G), item % (H + 2 * G)
    valid = row < N
    is_q, is_v = valid & (head < H), valid & (head >= H + G)
    is_k = valid & (head >= H) & (head < H + G)
    column, pair = tl.arange(0, K)[None, :], tl.arange(0, HALF)[None, :]
    at_q, at_k = ((row * H + head) * K)[:, None], ((row * G + head - H) * K)[:, None]
    at_v, source = ((row * G + head - H - G) * K)[:, None], (item * K)[:, None]
    turns, rest = (is_q | is_k)[:, None], column >= 2 * HALF

    x = tl.load(qkv + source + column, mask=turns, other=0.0).to(tl.float32)
    d = tl.load(dq + at_q + column, mask=is_q[:, None] & rest, other=0.0).to(tl.float32)
    d += tl.load(dk + at_k + column, mask=is_k[:, None] & rest, other=0.0).to(tl.float32)
    d += tl.load(dv + at_v + column, mask=is_v[:, None], other=0.0).to(tl.float32)
    a = tl.load(qkv + source + pair, mask=turns, other=0.0).to(tl.float32)
    b = tl.load(qkv + source + HALF + pair, mask=turns, other=0.0).to(tl.float32)
    turned_a = tl.load(dq + at_q + pair, mask=is_q[:, None], other=0.0).to(tl.float32)
    turned_a += tl.load(dk + at_k + pair, mask=is_k[:, None], other=0.0).to(tl.float32)
    turned_b = tl.load(dq + at_q + HALF + pair, mask=is_q[:, None], other=0.0).to(tl.float32)
    turned_b += tl.load(dk + at_k + HALF + pair, mask=is_k[:, None], other=0.0).to(tl.float32)
    angle = ((row % T) * HALF)[:, None] + pair
    c = tl.load(cos + angle, mask=turns, other=0.0)
    s = tl.load(sin + angle, mask=turns, other=0.0)
    da, db = turned_a * c - turned_b * s, turned_a * s + turned_b * c

    inverse = tl.rsqrt(tl.sum(x * x, axis=1) / K + EPS)
    # Values have x = 0 here, so that nothing is taken from their gradient.
    dot = (tl.sum(d * x, axis=1) + tl.sum(da * a + db * b, axis=1)) * inverse
    tl.store(dgain + row * H + head, dot, mask=is_q)
    factor = inverse * tl.load(gain + head, mask=is_q, other=1.0)
    factor, along = tl.where(is_v, 1.0, factor)[:, None], (dot * inverse / K)[:, None]
    tl.store(dqkv + source + column, factor * (d - along * x),
             mask=(turns & rest) | is_v[:, None])
    tl.store(dqkv + source + pair, factor * (da - along * a), mask=turns)
    tl.store(dqkv + source + HALF + pair, factor * (db - along * b), mask=turns)


@torch.library.custom_op("golf_lab::qk", mutates_args=())
def qk(qkv: Tensor, gain: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a packed projection; H is the length of gain."""
    qkv, gain, cos, sin = dense(qkv, gain, cos, sin)
    B, T, heads, K = qkv.shape
    H, choice = len(gain), tile("qk_forward")
    G = (heads - H) // 2
    q, k, v = (qkv.new_empty(B, T, n, K) for n in (H, G, G))
    note("qk_forward", qk_forward[(blocks(B * T * heads, choice.items),)](
        qkv, gain, cos, sin, q, k, v, B * T, T, NORM_EPS, H, G, K, cos.shape[1], choice.items,
        num_warps=choice.warps))
    return q, k, v


@torch.library.custom_op("golf_lab::qk_backward", mutates_args=())
def qk_gradient(dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, gain: Tensor,
                rotary: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Gradients of qkv, packed, and of gain."""
    dq, dk, dv, qkv, gain, cos, sin = dense(dq, dk, dv, qkv, gain, *rotary)
    B, T, heads, K = qkv.shape
    H, choice = len(gain), tile("qk_backward")
    dqkv, dgain = torch.empty_like(qkv), gain.new_empty(B * T, H, dtype=torch.float32)
    note("qk_backward", qk_backward[(blocks(B * T * heads, choice.items),)](
        dq, dk, dv, qkv, gain, cos, sin, dqkv, dgain, B * T, T, NORM_EPS, H, (heads - H) // 2, K,
        cos.shape[1], choice.items, num_warps=choice.warps))
    return dqkv, dgain.sum(0).to(gain.dtype)


@qk.register_fake
def _(qkv: Tensor, gain: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    B, T, heads, K = qkv.shape
    H = gain.shape[0]
    G = (heads - H) // 2
    return qkv.new_empty(B, T, H, K), qkv.new_empty(B, T, G, K), qkv.new_empty(B, T, G, K)


@qk_gradient.register_fake
def _(dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, gain: Tensor,
      rotary: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), gain.new_empty(gain.shape)


def qk_save(ctx: Saved, inputs: tuple[Tensor, ...], output: object) -> None:
    """Keeps the inputs."""
    ctx.save_for_backward(*inputs)


def qk_differentiate(ctx: Saved, dq: Tensor, dk: Tensor,
                     dv: Tensor) -> tuple[Tensor, Tensor, None, None]:
    """Gradients of the operator's arguments."""
    qkv, gain, cos, sin = saved(ctx)
    dqkv, dgain = qk_gradient(dq, dk, dv, qkv, gain, [cos, sin])
    return dqkv, dgain, None, None


qk.register_autograd(qk_differentiate, setup_context=qk_save)


def qk_reference(qkv: Tensor, gain: Tensor, cos: Tensor,
                 sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same in PyTorch, as the trainer's attention does it."""
    H, G = len(gain), (qkv.shape[2] - len(gain)) // 2
    normed = golf.rotate(golf.rms_norm(qkv[:, :, :H + G].float()), golf.Rotary(cos, sin))
    q = (normed[:, :, :H] * gain[:, None]).to(qkv.dtype)
    return q, normed[:, :, H:].to(qkv.dtype), qkv[:, :, H + G:]


# ==================================================================================================
# Exclusive self attention: y (B, T, H, K), v (B, T, G, K) -> y without its component along v
#
# An item is one value head of one row and its REPEAT query heads, which lie side by side. One pass
# each way; the backward pass returns the gradient of v too.
# Tolerance: twice the bf16 error. K is a power of two.
# ==================================================================================================


@triton.jit
def xsa_forward(y: Pointer, v: Pointer, out: Pointer, N: int,
                REPEAT: tl.constexpr, K: tl.constexpr, ITEMS: tl.constexpr) -> None:
    """One tile of items; N counts them."""
    item = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)[:, None]
    column, inside = tl.arange(0, K)[None, :], item < N
    value = tl.load(v + item * K + column, mask=inside, other=0.0).to(tl.float32)
    square = tl.maximum(tl.sum(value * value, axis=1), 1e-24)[:, None]
    for r in tl.static_range(REPEAT):
        place = (item * REPEAT + r) * K + column
        head = tl.load(y + place, mask=inside, other=0.0).to(tl.float32)
        along = tl.sum(head * value, axis=1)[:, None] / square
        tl.store(out + place, head - along * value, mask=inside)


@triton.jit
def xsa_backward(d: Pointer, y: Pointer, v: Pointer, dy: Pointer, dv: Pointer,  # noqa: PLR0913
                 N: int, REPEAT: tl.constexpr, K: tl.constexpr, ITEMS: tl.constexpr) -> None:
    """One tile of items.

    With a = y.v / v.v and b = d.v / v.v: dy = d - b v, dv = sum over heads (2ab v - b y - a d).
    """
    item = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)[:, None]
    column, inside = tl.arange(0, K)[None, :], item < N
    value = tl.load(v + item * K + column, mask=inside, other=0.0).to(tl.float32)
    square = tl.maximum(tl.sum(value * value, axis=1), 1e-24)[:, None]
    total = tl.zeros((ITEMS, K), tl.float32)
    for r in tl.static_range(REPEAT):
        place = (item * REPEAT + r) * K + column
        head = tl.load(y + place, mask=inside, other=0.0).to(tl.float32)
        change = tl.load(d + place, mask=inside, other=0.0).to(tl.float32)
        a = tl.sum(head * value, axis=1)[:, None] / square
        b = tl.sum(change * value, axis=1)[:, None] / square
        tl.store(dy + place, change - b * value, mask=inside)
        total += 2.0 * a * b * value - b * head - a * change
    tl.store(dv + item * K + column, total, mask=inside)


@torch.library.custom_op("golf_lab::xsa", mutates_args=())
def xsa(y: Tensor, v: Tensor) -> Tensor:
    """The part of every query head's output that is orthogonal to its value."""
    y, v = dense(y, v)
    K, choice, out = v.shape[-1], tile("xsa_forward"), torch.empty_like(y)
    N = v.numel() // K
    note("xsa_forward", xsa_forward[(blocks(N, choice.items),)](
        y, v, out, N, y.numel() // v.numel(), K, choice.items, num_warps=choice.warps))
    return out


@torch.library.custom_op("golf_lab::xsa_backward", mutates_args=())
def xsa_gradient(d: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of y and v."""
    d, y, v = dense(d, y, v)
    K, choice, dy, dv = v.shape[-1], tile("xsa_backward"), torch.empty_like(y), torch.empty_like(v)
    N = v.numel() // K
    note("xsa_backward", xsa_backward[(blocks(N, choice.items),)](
        d, y, v, dy, dv, N, y.numel() // v.numel(), K, choice.items, num_warps=choice.warps))
    return dy, dv


@xsa.register_fake
def _(y: Tensor, v: Tensor) -> Tensor:
    return y.new_empty(y.shape)


@xsa_gradient.register_fake
def _(d: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), v.new_empty(v.shape)


def xsa_save(ctx: Saved, inputs: tuple[Tensor, ...], output: object) -> None:
    """Keeps the inputs."""
    ctx.save_for_backward(*inputs)


def xsa_differentiate(ctx: Saved, d: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the operator's arguments."""
    dy, dv = xsa_gradient(d, *saved(ctx))
    return dy, dv


xsa.register_autograd(xsa_differentiate, setup_context=xsa_save)


# ==================================================================================================
# Square of the leaky ReLU, slope 1/2: pre -> max(pre, pre/2)^2
#
# Only pre is kept. The derivative is 2 pre above zero and pre/2 below: one select, no branch.
# Tolerance: twice the bf16 error. Any shape.
# ==================================================================================================


@triton.jit
def square_forward(pre: Pointer, out: Pointer, N: int, ITEMS: tl.constexpr) -> None:
    """One tile of elements."""
    place = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)
    p = tl.load(pre + place, mask=place < N).to(tl.float32)
    p = tl.maximum(p, 0.5 * p)
    tl.store(out + place, p * p, mask=place < N)


@triton.jit
def square_backward(d: Pointer, pre: Pointer, out: Pointer, N: int, ITEMS: tl.constexpr) -> None:
    """One tile of elements."""
    place = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)
    p = tl.load(pre + place, mask=place < N).to(tl.float32)
    change = tl.load(d + place, mask=place < N).to(tl.float32)
    tl.store(out + place, change * tl.where(p > 0, 2.0 * p, 0.5 * p), mask=place < N)


@torch.library.custom_op("golf_lab::square", mutates_args=())
def square(pre: Tensor) -> Tensor:
    """The activation."""
    (pre,) = dense(pre)
    out, choice = torch.empty_like(pre), tile("square_forward")
    note("square_forward", square_forward[(blocks(pre.numel(), choice.items),)](
        pre, out, pre.numel(), choice.items, num_warps=choice.warps))
    return out


@torch.library.custom_op("golf_lab::square_backward", mutates_args=())
def square_gradient(d: Tensor, pre: Tensor) -> Tensor:
    """The gradient of pre."""
    d, pre = dense(d, pre)
    out, choice = torch.empty_like(pre), tile("square_backward")
    note("square_backward", square_backward[(blocks(pre.numel(), choice.items),)](
        d, pre, out, pre.numel(), choice.items, num_warps=choice.warps))
    return out


@square.register_fake
def _(pre: Tensor) -> Tensor:
    return pre.new_empty(pre.shape)


@square_gradient.register_fake
def _(d: Tensor, pre: Tensor) -> Tensor:
    return pre.new_empty(pre.shape)


def square_save(ctx: Saved, inputs: tuple[Tensor, ...], output: object) -> None:
    """Keeps the input."""
    ctx.save_for_backward(*inputs)


def square_differentiate(ctx: Saved, d: Tensor) -> Tensor:
    """The gradient of the operator's argument."""
    return square_gradient(d, *saved(ctx))


square.register_autograd(square_differentiate, setup_context=square_save)


def square_reference(pre: Tensor) -> Tensor:
    """The same in PyTorch."""
    return F.leaky_relu(pre, 0.5).square()


# ==================================================================================================
# MLP: x (N, D), up (F, D), down (D, F) -> y (N, D); the activation rides on the matrix products
#
# Forward: one product writes pre and its squared leaky ReLU. Backward: one product forms the
# gradient of the activation and multiplies it by the derivative before it leaves the registers. The
# other three products are cuBLAS. Persistent programs, neighbouring tiles share rows of the left
# operand; tensor descriptors let the copy engine load and clip; the tile is stored in two halves.
# Tolerance: twice the bf16 error. D and F are multiples of 8, every tensor is 16-byte aligned.
# ==================================================================================================


@triton.jit
def product_with_epilogue(left: Pointer, right: Pointer, pre: Pointer, out: Pointer,  # noqa: PLR0913
                          N: int, WIDE: tl.constexpr, DEEP: tl.constexpr, BACKWARD: tl.constexpr,
                          UPCAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                          DEPTH: tl.constexpr, PROGRAMS: tl.constexpr) -> None:
    """Forward: pre = left right^T, out = act(pre). Backward: out = (left right) act'(pre)."""
    across = tl.cdiv(WIDE, COLUMNS)
    for index in tl.range(tl.program_id(0), tl.cdiv(N, ROWS) * across, PROGRAMS, flatten=True):
        row, column = index // across * ROWS, index % across * COLUMNS
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for depth in tl.range(0, DEEP, DEPTH):
            a = left.load([row, depth])
            if BACKWARD:  # noqa: SIM108 - the two have different shapes; only one is compiled
                b = right.load([depth, column])
            else:
                b = right.load([column, depth]).T
            if UPCAST:
                a, b = a.to(tl.float32), b.to(tl.float32)
            total = tl.dot(a, b, total)
        halves = tl.permute(tl.reshape(total, (ROWS, 2, COLUMNS // 2)), (0, 2, 1))
        first, second = tl.split(halves)
        if BACKWARD:
            p = pre.load([row, column]).to(tl.float32)
            out.store([row, column], (first * tl.where(p > 0, 2.0 * p, 0.5 * p)).to(out.dtype))
            p = pre.load([row, column + COLUMNS // 2]).to(tl.float32)
            second = second * tl.where(p > 0, 2.0 * p, 0.5 * p)
            out.store([row, column + COLUMNS // 2], second.to(out.dtype))
        else:
            kept = first.to(pre.dtype)
            pre.store([row, column], kept)
            p = tl.maximum(kept.to(tl.float32), 0.5 * kept.to(tl.float32))
            out.store([row, column], (p * p).to(out.dtype))
            kept = second.to(pre.dtype)
            pre.store([row, column + COLUMNS // 2], kept)
            p = tl.maximum(kept.to(tl.float32), 0.5 * kept.to(tl.float32))
            out.store([row, column + COLUMNS // 2], (p * p).to(out.dtype))


def launch_product(left: Tensor, right: Tensor, pre: Tensor, out: Tensor, *,
                   backward: bool) -> None:
    """Fills `out` (N, F), and `pre` in the forward pass."""
    name = "down_gradient" if backward else "up_square"
    choice = matrix_tile(name, small=left.dtype != torch.bfloat16 or INTERPRETED)
    N, F = pre.shape
    half = [choice.rows, choice.columns // 2]
    block = [choice.depth, choice.columns] if backward else [choice.columns, choice.depth]
    programs = min(num_programs(left.device, 1), blocks(N, choice.rows) * blocks(F, choice.columns))
    note(name, product_with_epilogue[(programs,)](
        TensorDescriptor.from_tensor(left, [choice.rows, choice.depth]),
        TensorDescriptor.from_tensor(right, block), TensorDescriptor.from_tensor(pre, half),
        TensorDescriptor.from_tensor(out, half), N, F, left.shape[1], backward,
        INTERPRETED, choice.rows, choice.columns, choice.depth, programs,
        num_warps=choice.warps, num_stages=choice.stages))


@torch.library.custom_op("golf_lab::up_square", mutates_args=())
def up_square(x: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Activations and what precedes them, both (N, F), of x (N, D)."""
    x, up = dense(x, up)
    pre, hidden = (x.new_empty(len(x), len(up)) for _ in range(2))
    launch_product(x, up, pre, hidden, backward=False)
    return hidden, pre


@torch.library.custom_op("golf_lab::down_gradient", mutates_args=())
def down_gradient(dy: Tensor, down: Tensor, pre: Tensor) -> Tensor:
    """The gradient of pre, (N, F), from that of the MLP's output, (N, D)."""
    dy, down, pre = dense(dy, down, pre)
    out = torch.empty_like(pre)
    launch_product(dy, down, pre, out, backward=True)
    return out


@torch.library.custom_op("golf_lab::mlp", mutates_args=())
def mlp(x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output (N, D), and the activations and pre-activations that the backward pass needs."""
    hidden, pre = up_square(x, up)
    return hidden @ down.T, hidden, pre


@up_square.register_fake
def _(x: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], up.shape[0]), x.new_empty(x.shape[0], up.shape[0])


@down_gradient.register_fake
def _(dy: Tensor, down: Tensor, pre: Tensor) -> Tensor:
    return pre.new_empty(pre.shape)


@mlp.register_fake
def _(x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = (x.shape[0], up.shape[0])
    return x.new_empty(x.shape), x.new_empty(wide), x.new_empty(wide)


def mlp_save(ctx: Saved, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    """Keeps inputs, activations and pre-activations; the latter two get no gradient."""
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output[1:])


def mlp_differentiate(ctx: Saved, dy: Tensor, _: None,
                      __: None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the operator's arguments."""
    x, up, down, hidden, pre = saved(ctx)
    dpre = down_gradient(dy, down, pre)
    return dpre @ up, dpre.T @ x, dy.T @ hidden


mlp.register_autograd(mlp_differentiate, setup_context=mlp_save)


def mlp_reference(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The same in PyTorch."""
    return F.linear(square_reference(F.linear(x, up)), down)


# ==================================================================================================
# Head and loss: x (N, D), embed (V, D), target (N,) -> nats (N,) under logits in (-cap, cap)
#
# A program holds one row of logits in registers and reads it once; float32 logits never exist. The
# separate form reads them again in the backward pass. The merged form writes the gradient, for a
# loss that is the sum over rows, over the logits while they are in registers; the weights that the
# true loss gives the rows multiply two (N, D) tensors later, and a whole pass is saved.
# Tolerance: twice the bf16 error. Any V up to 32768; target below V.
# ==================================================================================================


@triton.jit
def squash(x: tl.tensor, CAP: tl.constexpr, FAST: tl.constexpr) -> tl.tensor:
    """tanh(x / CAP). FAST is one instruction with an error below half of a bf16 step."""
    if FAST:
        out = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x * (1.0 / CAP)],
                                        dtype=tl.float32, is_pure=True, pack=1)
    else:
        out = 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * 1.4426950408889634 / CAP)))
    return out


@triton.jit
def nll_forward(logits: Pointer, target: Pointer, nll: Pointer, log_sum: Pointer,  # noqa: PLR0913
                V: int, CAP: tl.constexpr, WIDTH: tl.constexpr, MERGED: tl.constexpr,
                FAST: tl.constexpr) -> None:
    """One row. MERGED: the gradient replaces the logits."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside, label = column < V, tl.load(target + row)
    x = tl.load(logits + row * V + column, mask=inside, other=0.0).to(tl.float32)
    t = squash(x, CAP, FAST)
    top = 1.0  # as good as the maximum while exp(-2 CAP) is a normal number
    if CAP > 40:
        top = tl.max(tl.where(inside, t, -1.0), axis=0)
    p = tl.where(inside, tl.exp2((t - top) * (CAP * 1.4426950408889634)), 0.0)
    total = tl.sum(p, axis=0)
    # Not a load of its own: in the merged form another thread may have replaced that logit.
    chosen = tl.sum(tl.where(column == label, t, 0.0), axis=0)
    log_total = CAP * top + tl.log2(total) * 0.6931471805599453
    tl.store(nll + row, log_total - CAP * chosen)
    tl.store(log_sum + row, log_total)
    if MERGED:
        # Once more instead of kept: p and t together would leave one program to a processor.
        change = tl.exp2(t * (CAP * 1.4426950408889634) - log_total * 1.4426950408889634)
        change -= tl.where(column == label, 1.0, 0.0)
        tl.store(logits + row * V + column, change * (1.0 - t * t), mask=inside)


@triton.jit
def nll_backward(weight: Pointer, logits: Pointer, target: Pointer, log_sum: Pointer,  # noqa: PLR0913
                 out: Pointer, V: int, CAP: tl.constexpr, WIDTH: tl.constexpr,
                 FAST: tl.constexpr) -> None:
    """One row; `weight` is the gradient of its loss."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside, label = column < V, tl.load(target + row)
    x = tl.load(logits + row * V + column, mask=inside, other=0.0).to(tl.float32)
    t = squash(x, CAP, FAST)
    log_total = tl.load(log_sum + row)
    p = tl.exp2(t * (CAP * 1.4426950408889634) - log_total * 1.4426950408889634)
    change = tl.load(weight + row) * (p - tl.where(column == label, 1.0, 0.0))
    tl.store(out + row * V + column, change * (1.0 - t * t), mask=inside)


def launch_nll(logits: Tensor, target: Tensor, cap: float, *, fast: bool,
               merged: bool) -> tuple[Tensor, Tensor]:
    """Nats and log-sums of every row; with `merged` the logits become their gradient."""
    N, V = logits.shape
    nll, log_sum = (torch.empty(N, device=logits.device) for _ in range(2))
    choice = tile("nll_forward")
    note("nll_forward_merged" if merged else "nll_forward", nll_forward[(N,)](
        logits, target.contiguous(), nll, log_sum, V, cap, triton.next_power_of_2(V), merged,
        fast and not INTERPRETED, num_warps=choice.warps))
    return nll, log_sum


@torch.library.custom_op("golf_lab::nll", mutates_args=())
def nll(logits: Tensor, target: Tensor, cap: float, fast: bool) -> tuple[Tensor, Tensor]:
    """Nats and log-sums of bf16 logits (N, V)."""
    return launch_nll(logits.contiguous(), target, cap, fast=fast, merged=False)


@torch.library.custom_op("golf_lab::nll_backward", mutates_args=())
def nll_gradient(weight: Tensor, logits: Tensor, target: Tensor, log_sum: Tensor, cap: float,
                 fast: bool) -> Tensor:
    """The gradient of the logits."""
    logits, out, V = logits.contiguous(), torch.empty_like(logits), logits.shape[1]
    choice = tile("nll_backward")
    note("nll_backward", nll_backward[(len(logits),)](
        weight.contiguous(), logits, target.contiguous(), log_sum, out, V, cap,
        triton.next_power_of_2(V), fast and not INTERPRETED, num_warps=choice.warps))
    return out


@torch.library.custom_op("golf_lab::head_nll", mutates_args=())
def head_nll(x: Tensor, embed: Tensor, target: Tensor, cap: float,
             fast: bool) -> tuple[Tensor, Tensor]:
    """Nats (N,), and the gradient of their sum with respect to the logits, (N, V)."""
    logits = x @ embed.T
    return launch_nll(logits, target, cap, fast=fast, merged=True)[0], logits


@nll.register_fake
def _(logits: Tensor, target: Tensor, cap: float, fast: bool) -> tuple[Tensor, Tensor]:
    row = logits.new_empty(logits.shape[0], dtype=torch.float32)
    return row, torch.empty_like(row)


@nll_gradient.register_fake
def _(weight: Tensor, logits: Tensor, target: Tensor, log_sum: Tensor, cap: float,
      fast: bool) -> Tensor:
    return logits.new_empty(logits.shape)


@head_nll.register_fake
def _(x: Tensor, embed: Tensor, target: Tensor, cap: float, fast: bool) -> tuple[Tensor, Tensor]:
    return (x.new_empty(x.shape[0], dtype=torch.float32),
            x.new_empty(x.shape[0], embed.shape[0]))


def nll_save(ctx: Saved, inputs: tuple[Tensor, Tensor, float, bool],
             output: tuple[Tensor, Tensor]) -> None:
    """Keeps logits, targets and log-sums; the latter get no gradient."""
    logits, target, *ctx.options = inputs  # type: ignore[attr-defined]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, target, output[1])


def nll_differentiate(ctx: Saved, weight: Tensor,
                      _: None) -> tuple[Tensor, None, None, None]:
    """The gradient of the operator's first argument."""
    options = ctx.options  # type: ignore[attr-defined]
    return nll_gradient(weight, *saved(ctx), *options), None, None, None


def head_nll_save(ctx: Saved, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keeps both operands and the unweighted gradient."""
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], inputs[1], output[1])


def head_nll_differentiate(ctx: Saved, weight: Tensor,
                           _: None) -> tuple[Tensor, Tensor, None, None, None]:
    """Gradients of both operands: the rows' weights act on the narrow side of each product."""
    x, embed, change = saved(ctx)
    # In float32: a weight common to all rows, rounded to bf16, would scale the whole gradient.
    dx, weighted = ((t * weight[:, None]).to(x.dtype) for t in (change @ embed, x))
    return dx, change.T @ weighted, None, None, None


nll.register_autograd(nll_differentiate, setup_context=nll_save)
head_nll.register_autograd(head_nll_differentiate, setup_context=head_nll_save)


def head_reference(x: Tensor, embed: Tensor, target: Tensor, cap: float) -> Tensor:
    """Head and loss in PyTorch, as the trainer does them."""
    return golf.softcapped_nll(F.linear(x, embed), target, cap)


# ==================================================================================================
# Cases: every candidate with its inputs, its traffic and its uses in a micro-step
# ==================================================================================================


class Dims(NamedTuple):
    """Sizes of a micro-step, in the letters of the module docstring; HALF of the rotated ones."""

    B: int
    T: int
    D: int
    H: int
    G: int
    K: int
    F: int
    V: int
    HALF: int

    @classmethod
    def from_config(cls, config: golf.Config) -> Dims:
        """Those of one micro-step of the settings on one rank."""
        sequences = golf.batch_shape(config, 1).sequences
        rotated = config.rope_dims or config.head_dim
        return cls(sequences, config.train_seq_len, config.model_dim, config.num_heads,
                   config.num_kv_heads, config.head_dim, config.mlp_dim, config.vocab_size,
                   rotated // 2)


class Inputs(NamedTuple):
    """Arguments of a case in order, float32: bf16 in use, float32 in use, without gradient."""

    narrow: list[Tensor]
    wide: list[Tensor]
    fixed: list[Tensor]


class Traffic(NamedTuple):
    """Values of two bytes per row that must move, and that the compiled reference should move."""

    forward: float
    backward: float
    reference_forward: float
    reference_backward: float
    forward_products: float = 0.0  # floating-point operations per row, in matrix products
    backward_products: float = 0.0


class Case(NamedTuple):
    """One candidate."""

    name: str
    reference: Callable[..., object]
    fused: Callable[..., object]
    inputs: Callable[[Dims, torch.Generator], Inputs]
    traffic: Callable[[Dims], Traffic]
    uses: Callable[[golf.Config, golf.DepthPlan], int]  # per micro-step


def normal(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    """Gaussian float32 values on the generator's device."""
    return torch.randn(shape, generator=generator, device=generator.device) * scale


def mix_norm_inputs(d: Dims, g: torch.Generator) -> Inputs:
    """x, x0; mix; scale."""
    scale = torch.tensor(0.5, device=g.device)
    stream = (d.B, d.T, d.D)
    return Inputs([normal(g, *stream, scale=2), normal(g, *stream)], [normal(g, 2, d.D)], [scale])


def qk_inputs(d: Dims, g: torch.Generator) -> Inputs:
    """qkv; gain; rotation tables."""
    rotary = golf.rotary_tables(d.T, 2 * d.HALF, 10_000.0)
    return Inputs([normal(g, d.B, d.T, d.H + 2 * d.G, d.K)], [4 + normal(g, d.H)],
                  [table.to(g.device) for table in rotary])


def xsa_inputs(d: Dims, g: torch.Generator) -> Inputs:
    """y, v."""
    return Inputs([normal(g, d.B, d.T, d.H, d.K), normal(g, d.B, d.T, d.G, d.K)], [], [])


def square_inputs(d: Dims, g: torch.Generator) -> Inputs:
    """pre."""
    return Inputs([normal(g, d.B, d.T, d.F)], [], [])


def mlp_inputs(d: Dims, g: torch.Generator) -> Inputs:
    """x, up, down."""
    return Inputs([normal(g, d.B * d.T, d.D), normal(g, d.F, d.D, scale=d.D**-0.5),
                   normal(g, d.D, d.F, scale=d.F**-0.5)], [], [])


def nll_inputs(d: Dims, g: torch.Generator) -> Inputs:
    """logits; target."""
    N = d.B * d.T
    target = torch.randint(d.V, (N,), generator=g, device=g.device)
    return Inputs([normal(g, N, d.V, scale=6)], [], [target])


def head_inputs(d: Dims, g: torch.Generator) -> Inputs:
    """x, embed; target."""
    N = d.B * d.T
    target = torch.randint(d.V, (N,), generator=g, device=g.device)
    return Inputs([normal(g, N, d.D), normal(g, d.V, d.D, scale=6 * d.D**-0.5)], [], [target])


CAP = 30.0


def every_visit(config: golf.Config, plan: golf.DepthPlan) -> int:
    """Virtual layers."""
    return len(plan.visits)


def every_norm(config: golf.Config, plan: golf.DepthPlan) -> int:
    """Virtual layers, and the serial ones once more."""
    forms = [golf.block_form(config, visit.block) for visit in plan.visits]
    return len(forms) + sum(form.residual == "serial" for form in forms)


def every_exclusive(config: golf.Config, plan: golf.DepthPlan) -> int:
    """Virtual layers with exclusive self attention."""
    return sum(golf.block_form(config, visit.block).exclusive for visit in plan.visits)


def once(config: golf.Config, plan: golf.DepthPlan) -> int:
    """The head."""
    return 1


def qk_traffic(d: Dims) -> Traffic:
    """The reference reads twice (norm, then rotation) and concatenates the packed gradient."""
    packed, turned = (d.H + 2 * d.G) * d.K, (d.H + d.G) * d.K
    return Traffic(2 * packed, 2 * packed + turned, 3 * turned,
                   5 * turned + 2 * d.H * d.K + 2 * packed)


def xsa_traffic(d: Dims) -> Traffic:
    """The reference reads its inputs once more in each direction."""
    y, v = d.H * d.K, d.G * d.K
    return Traffic(2 * y + v, 3 * y + 2 * v, 3 * y + 2 * v, 6 * y + 4 * v)


def mlp_traffic(d: Dims) -> Traffic:
    """The reference adds one pass over the hidden values forward and two backward."""
    return Traffic(2 * d.D + 3 * d.F, 4 * d.D + 5 * d.F, 2 * d.D + 4 * d.F, 4 * d.D + 7 * d.F,
                   4 * d.D * d.F, 8 * d.D * d.F)


def head_traffic(d: Dims) -> Traffic:
    """The reference reads the logits twice forward, and reads and writes them backward."""
    return Traffic(d.D + 3 * d.V, 4 * d.D + 2 * d.V, d.D + 3 * d.V, 4 * d.D + 4 * d.V,
                   2 * d.D * d.V, 4 * d.D * d.V)


def first_output(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Tensor]:
    """`function` without the outputs that only its backward pass uses."""
    return lambda *arguments: function(*arguments)[0]


CASES = (
    Case("mix_norm", mix_norm_reference, mix_norm, mix_norm_inputs,
         lambda d: Traffic(4 * d.D, 6 * d.D, 4 * d.D, 9 * d.D), every_norm),
    Case("qk", qk_reference, qk, qk_inputs, qk_traffic, every_visit),
    Case("xsa", golf.exclude_self, xsa, xsa_inputs, xsa_traffic, every_exclusive),
    Case("square", square_reference, square, square_inputs,
         lambda d: Traffic(2 * d.F, 3 * d.F, 2 * d.F, 3 * d.F), every_visit),
    Case("mlp", mlp_reference, first_output(mlp), mlp_inputs, mlp_traffic, every_visit),
    Case("nll", functools.partial(golf.softcapped_nll, cap=CAP),
         lambda logits, target: nll(logits, target, CAP, False)[0], nll_inputs,
         lambda d: Traffic(d.V, 2 * d.V, 2 * d.V, 2 * d.V), once),
    Case("nll_fast", functools.partial(golf.softcapped_nll, cap=CAP),
         lambda logits, target: nll(logits, target, CAP, True)[0], nll_inputs,
         lambda d: Traffic(d.V, 2 * d.V, 2 * d.V, 2 * d.V), once),
    Case("head", functools.partial(head_reference, cap=CAP),
         lambda x, embed, target: head_nll(x, embed, target, CAP, False)[0], head_inputs,
         head_traffic, once),
    Case("head_fast", functools.partial(head_reference, cap=CAP),
         lambda x, embed, target: head_nll(x, embed, target, CAP, True)[0], head_inputs,
         head_traffic, once),
)

# Not a kernel: the scales of a block's two outputs, multiplied into the output matrices. Without
# them, neither gradient is scaled row by row and no sum over rows is left to do.
FOLD = Case("fold", square_reference, square, square_inputs,
            lambda d: Traffic(0, 0, 0, 6 * d.D), every_visit)


# ==================================================================================================
# Correctness
# ==================================================================================================

# Rows that fill no tile, widths that are no power of two where the contract allows it.
ODD = Dims(3, 7, 72, 4, 2, 16, 136, 1003, 4)
EVEN = Dims(2, 16, 64, 4, 2, 32, 128, 512, 4)
MOST_RATIO = 2.0
LEAST_ERROR = 1e-6  # a reference may be exact


class Check(NamedTuple):
    """One output or gradient against float32."""

    case: str
    what: str
    error: float
    reference_error: float  # of the same mathematics in bf16

    @property
    def passed(self) -> bool:
        """The two-times rule; a NaN fails."""
        return self.error <= MOST_RATIO * max(self.reference_error, LEAST_ERROR)


def spread_out(tensor: Tensor) -> Tensor:
    """The same values, every second place in memory."""
    return torch.stack((tensor, tensor), dim=-1).flatten(-2)[..., ::2]


def evaluate(function: Callable[..., object], inputs: Inputs, dtype: torch.dtype, *,
             sparse: bool = False) -> list[Tensor]:
    """Outputs and gradients of `function` in float32, its narrow inputs of `dtype`."""
    narrow = [t.to(dtype) for t in inputs.narrow]
    leaves = [(spread_out(t) if sparse else t).detach().requires_grad_()
              for t in (*narrow, *inputs.wide)]
    result = function(*leaves, *inputs.fixed)
    outputs = [result] if isinstance(result, Tensor) else list(result)  # type: ignore[call-overload]
    generator = torch.Generator(device=leaves[0].device).manual_seed(1)
    changes = [normal(generator, *y.shape).to(y.dtype) for y in outputs]
    gradients = torch.autograd.grad(outputs, leaves, changes)
    return [t.detach().float() for t in (*outputs, *gradients)]


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((found - wanted).detach().norm() / wanted.detach().norm())


def check_case(case: Case, dims: Dims, device: torch.device, *, sparse: bool) -> list[Check]:
    """Every output and gradient of a case on fresh random input."""
    generator = torch.Generator(device=device).manual_seed(hash(dims) % 2**31)
    inputs = case.inputs(dims, generator)
    wanted = evaluate(case.reference, inputs, torch.float32)
    usual = evaluate(case.reference, inputs, torch.bfloat16)
    found = evaluate(case.fused, inputs, torch.bfloat16, sparse=sparse)
    outputs = len(wanted) - len(inputs.narrow) - len(inputs.wide)
    names = [f"output {n}" for n in range(outputs)]
    names += [f"gradient {n}" for n in range(len(wanted) - outputs)]
    return [Check(case.name, name, relative_error(f, w), relative_error(u, w))
            for name, f, u, w in zip(names, found, usual, wanted, strict=True)]


def check_all(cases: Sequence[Case], device: torch.device) -> list[Check]:
    """All cases at odd sizes, non-contiguous, and at even sizes."""
    checks = []
    for case in cases:
        for dims, sparse in ((ODD, False), (ODD, True), (EVEN, False)):
            try:
                checks += check_case(case, dims, device, sparse=sparse)
            except Exception as problem:  # a kernel that does not compile fails alone
                checks.append(Check(case.name, one_line(problem), math.nan, 0.0))
    return checks


def one_line(problem: Exception) -> str:
    """The gist of an error of a foreign library."""
    return f"{type(problem).__name__}: {problem}".split("\n")[0][:160]


# ==================================================================================================
# A whole block out of candidates
# ==================================================================================================

BLOCK_VARIANTS: tuple[tuple[str, ...], ...] = (
    (), ("fold",), ("mix_norm",), ("qk",), ("xsa",), ("mlp",), ("qk", "xsa"),
    ("fold", "mix_norm", "qk", "xsa"), ("fold", "mix_norm", "qk", "xsa", "mlp"))


def lab_block(x_BTD: Tensor, x0_BTD: Tensor, w: golf.BlockWeights, form: golf.BlockForm,
              rotary: golf.Rotary, attend: golf.Attend, use: Sequence[str]) -> Tensor:
    """The trainer's `run_block`, with the named candidates in place of its own mathematics."""
    out, down = w.out, w.down
    attn_scale, mlp_scale = (t.to(x_BTD.dtype) for t in (w.attn_scale, w.mlp_scale))
    if "fold" in use:
        out, down = attn_scale[:, None] * out, mlp_scale[:, None] * down
        attn_scale, mlp_scale = torch.ones_like(attn_scale), torch.ones_like(mlp_scale)
    norm = mix_norm if "mix_norm" in use else mix_norm_reference
    u, z = norm(x_BTD, x0_BTD, w.resid_mix, w.norm_scale)
    heads = form.num_heads + 2 * form.num_kv_heads
    prepare = qk if "qk" in use else qk_reference
    q, k, v = prepare(F.linear(z, w.qkv).unflatten(-1, (heads, -1)), w.q_gain,
                      *(table[:x_BTD.shape[1]] for table in rotary))
    y = attend(q, k, v)
    if form.exclusive:
        y = xsa(y, v) if "xsa" in use else golf.exclude_self(y, v)
    attended = F.linear(y.flatten(2), out)
    if "mix_norm" in use and form.residual == "serial":
        mix = torch.stack((torch.ones_like(attn_scale), attn_scale)).float()
        after, z = mix_norm(u, attended, mix, w.norm_scale)
    else:
        after = u + attended if "fold" in use else u + attn_scale * attended
        if form.residual == "serial":
            z = golf.rms_norm(after) * w.norm_scale.to(z.dtype)
    if "mlp" in use:
        change = mlp(z.flatten(0, 1), w.up, down)[0].view_as(after)
    else:
        act = square if "square" in use else square_reference
        change = F.linear(act(F.linear(z, w.up)), down)
    return after + change if "fold" in use else after + mlp_scale * change


def block_arguments(config: golf.Config, block: int, device: torch.device,
                    dtype: torch.dtype) -> tuple[golf.BlockWeights, golf.Rotary, list[Tensor]]:
    """Weights of one block as leaves, rotation tables, and the leaves themselves."""
    model = golf.GPT(config, golf.sdpa_attend, dtype).to(device)
    model.initialise(0)
    generator = torch.Generator(device=device).manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():  # nothing zero, one or symmetric
            parameter.add_(normal(generator, *parameter.shape, scale=0.05))
    leaves = [t.detach().clone().requires_grad_() for t in model.block_weights()[block][:-1]]
    weights = golf.BlockWeights._make([*leaves, model.norm_scale[block]])
    return weights, golf.Rotary(model.cos, model.sin), leaves


def check_block(config: golf.Config, device: torch.device) -> list[Check]:
    """Blocks out of candidates against the trainer's, in float32, for both residual forms."""
    checks = []
    dims = Dims.from_config(config)
    blocks_of: dict[str, int] = {}
    for number in range(config.num_layers):
        blocks_of.setdefault(golf.block_form(config, number).residual, number)
    generator = torch.Generator(device=device).manual_seed(3)
    stream = [normal(generator, dims.B, dims.T, dims.D).requires_grad_() for _ in range(2)]
    change = normal(generator, dims.B, dims.T, dims.D)
    for residual, number in blocks_of.items():
        w, rotary, leaves = block_arguments(config, number, device, torch.float32)
        form = golf.block_form(config, number)

        def run(function: Callable[..., Tensor], leaves: list[Tensor] = leaves,
                w: golf.BlockWeights = w, form: golf.BlockForm = form,
                rotary: golf.Rotary = rotary) -> list[Tensor]:
            y = function(*stream, w, form, rotary, golf.sdpa_attend)
            return [y, *torch.autograd.grad(y, [*stream, *leaves], change)]

        wanted = run(golf.run_block)
        for use in BLOCK_VARIANTS:
            found = run(functools.partial(lab_block, use=use))
            worst = max(relative_error(f, g) for f, g in zip(found, wanted, strict=True))
            checks.append(Check(f"block {residual}", "+".join(use) or "plain", worst,
                                1e-4 if device.type == "cpu" else 2e-3))  # tf32 products
    return checks


# ==================================================================================================
# Time
# ==================================================================================================

ASSUMED_COPY_RATE = 4.26e12  # bytes a second, measured on an H200; the GPU's own where there is one
ASSUMED_PRODUCT_RATE = 600e12  # operations a second, likewise, at these shapes


class Row(NamedTuple):
    """One direction of one candidate; seconds, bytes."""

    name: str
    direction: str
    floor_bytes: float
    floor_seconds: float
    predicted_gain: float  # per call
    uses: tuple[int, ...]  # calls in a micro-step, per plan
    reference_seconds: float = math.nan
    fused_seconds: float = math.nan


def predict(case: Case, config: golf.Config, copy: float) -> list[Row]:
    """Floors and expected gains of a case from shapes."""
    dims = Dims.from_config(config)
    traffic, unit = case.traffic(dims), 2 * dims.B * dims.T
    uses = tuple(case.uses(config, plan) for plan in golf.depth_plans(config))
    rows = []
    for direction, must, should, products in (
            ("forward", traffic.forward, traffic.reference_forward, traffic.forward_products),
            ("backward", traffic.backward, traffic.reference_backward, traffic.backward_products)):
        product_seconds = dims.B * dims.T * products / ASSUMED_PRODUCT_RATE
        rows.append(Row(case.name, direction, unit * must,
                        max(unit * must / copy, product_seconds),
                        unit * (should - must) / copy, uses))
    return rows


def time_both(function: Callable[..., object], inputs: Inputs, timer: Timer) -> tuple[float, float]:
    """Seconds forward and backward, narrow inputs in bf16."""
    leaves = [t.to(torch.bfloat16).requires_grad_() for t in inputs.narrow]
    leaves += [t.clone().requires_grad_() for t in inputs.wide]
    result = function(*leaves, *inputs.fixed)
    outputs = [result] if isinstance(result, Tensor) else list(result)  # type: ignore[call-overload]
    changes = [torch.randn_like(y) for y in outputs]
    del result, outputs

    def forward() -> object:
        return function(*leaves, *inputs.fixed)

    def both() -> None:
        y = forward()
        torch.autograd.grad([y] if isinstance(y, Tensor) else list(y),  # type: ignore[call-overload]
                            leaves, changes)

    first, total = timer.replayed(forward), timer.replayed(both)
    return first, total - first


def time_case(case: Case, config: golf.Config, timer: Timer, copy: float) -> list[Row]:
    """Measured rows of one case; the tile of each kernel is chosen first."""
    generator = torch.Generator(device=timer.device).manual_seed(4)
    inputs = case.inputs(Dims.from_config(config), generator)
    tune(case, inputs, timer)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *given: case.reference(*given), fullgraph=True, dynamic=False)
    reference, fused = (time_both(f, inputs, timer) for f in (compiled, case.fused))
    return [row._replace(reference_seconds=r, fused_seconds=f) for row, r, f
            in zip(predict(case, config, copy), reference, fused, strict=True)]


KERNELS_OF = {"mix_norm": ("mix_norm_forward", "mix_norm_backward"),
              "qk": ("qk_forward", "qk_backward"), "xsa": ("xsa_forward", "xsa_backward"),
              "square": ("square_forward", "square_backward"),
              "mlp": ("up_square", "down_gradient"), "nll": ("nll_forward", "nll_backward"),
              "nll_fast": ("nll_forward", "nll_backward"), "head": ("nll_forward",),
              "head_fast": ("nll_forward",)}


def tune(case: Case, inputs: Inputs, timer: Timer) -> None:
    """Puts the fastest tile of each of the case's kernels in front; one that fails goes last."""
    for name in KERNELS_OF[case.name]:
        if name in MATRIX_CHOICES:
            tune_one(name, MATRIX_CHOICES[name], case, inputs, timer)
        else:
            tune_one(name, CHOICES[name], case, inputs, timer)


def tune_one(name: str, choices: list[Choice], case: Case, inputs: Inputs, timer: Timer) -> None:
    """The same for one kernel and its list of tiles."""
    seconds: list[tuple[float, Choice]] = []
    for _ in range(len(choices)):
        try:
            seconds.append((sum(time_both(case.fused, inputs, timer)), choices[0]))
        except Exception as problem:  # too much shared memory, say: only this tile is lost
            print(f"{name} {choices[0]}: {one_line(problem)}")
            seconds.append((math.inf, choices[0]))
        choices.append(choices.pop(0))
    choices[:] = [choice for _, choice in sorted(seconds)]
    RESOURCES.pop(name, None)


def compiled_block(w: golf.BlockWeights, form: golf.BlockForm, rotary: golf.Rotary,
                   attend: golf.Attend, use: Sequence[str],
                   backend: str = "inductor") -> Callable[[Tensor, Tensor], Tensor]:
    """A block of its two streams alone, compiled to one graph."""
    def block(x_BTD: Tensor, x0_BTD: Tensor) -> Tensor:
        return lab_block(x_BTD, x0_BTD, w, form, rotary, attend, use)

    return torch.compile(block, fullgraph=True, dynamic=False, backend=backend)


def time_blocks(config: golf.Config, timer: Timer, attend: golf.Attend,
                residual: str) -> Iterator[Row]:
    """A whole block, forward and backward, with one set of candidates after the other."""
    number = next(n for n in range(config.num_layers)
                  if golf.block_form(config, n).residual == residual)
    form, dims = golf.block_form(config, number), Dims.from_config(config)
    w, rotary, weights = block_arguments(config, number, timer.device, torch.bfloat16)
    generator = torch.Generator(device=timer.device).manual_seed(5)
    stream = [normal(generator, dims.B, dims.T, dims.D).bfloat16() for _ in range(2)]
    uses = tuple(sum(golf.block_form(config, v.block).residual == residual for v in plan.visits)
                 for plan in golf.depth_plans(config))
    plain = math.nan
    for use in BLOCK_VARIANTS:
        torch._dynamo.reset()  # a compiler that sees too many variants of a function gives up
        block = compiled_block(w, form, rotary, attend, use)

        def both(block: Callable[..., Tensor] = block) -> None:
            leaves = [t.detach().requires_grad_() for t in stream]
            torch.autograd.grad(block(*leaves), [*leaves, *weights], stream[0])

        try:
            seconds = timer.replayed(both)
        except Exception as problem:  # the other variants still count
            print(f"block {'+'.join(use)}: {one_line(problem)}", flush=True)
            continue
        plain = plain if use else seconds
        yield Row(f"block {'+'.join(use) or 'plain'}", residual, math.nan, math.nan, math.nan, uses,
                  plain, seconds)


# ==================================================================================================
# Report
# ==================================================================================================


def cell(value: float, width: int, digits: int = 1) -> str:
    """A number, right-aligned; a dash for what is not known."""
    return f"{'-' if math.isnan(value) else format(value, f'.{digits}f'):>{width}}"


def table_lines(rows: Sequence[Row], plans: Sequence[str]) -> list[str]:
    """One line per row: microseconds per call, gains in milliseconds per micro-step and plan."""
    head = f"{'candidate':<32}{'pass':>10}{'MB':>8}{'floor':>8}{'torch':>8}{'ours':>8}{'GB/s':>7}"
    head += f"{'/floor':>7}" + "".join(f"{'expect ' + p:>16}{'gain ' + p:>15}" for p in plans)
    lines = [head]
    for row in rows:
        rate = row.floor_bytes / row.fused_seconds / 1e9
        line = f"{row.name:<32}{row.direction:>10}" + cell(row.floor_bytes / 1e6, 8)
        line += "".join(cell(1e6 * s, 8) for s in (row.floor_seconds, row.reference_seconds,
                                                   row.fused_seconds))
        line += cell(rate, 7, 0) + cell(row.fused_seconds / (row.floor_seconds or math.nan), 7, 2)
        gain = row.reference_seconds - row.fused_seconds
        lines.append(line + "".join(cell(1e3 * n * row.predicted_gain, 16, 2)
                                    + cell(1e3 * n * gain, 15, 2) for n in row.uses))
    return lines


def report_checks(checks: Sequence[Check]) -> bool:
    """Prints the worst check of every case; whether all passed."""
    for name in dict.fromkeys(check.case for check in checks):
        of_case = [check for check in checks if check.case == name]
        worst = max(of_case, key=lambda c: (not c.passed, c.error / max(c.reference_error,
                                                                         LEAST_ERROR)))
        verdict = "ok  " if worst.passed else "FAIL"
        print(f"{verdict} {name:<16} {worst.what:<30} error {worst.error:.2e}, "
              f"bf16 reference {worst.reference_error:.2e} (worst of {len(of_case)})")
    return all(check.passed for check in checks)


def small_config() -> golf.Config:
    """A model whose blocks fit the interpreter."""
    return golf.Config(vocab_size=64, num_layers=3, model_dim=64, num_heads=4, num_kv_heads=2,
                       mlp_mult=2.0, rope_dims=8, xsa_last_n=3, parallel_residual_start=2,
                       num_loops=0, train_seq_len=8, eval_seq_len=8, eval_stride=8,
                       train_batch_tokens=24, micro_batch_tokens=24, compile=False)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="correctness only")
    parser.add_argument("--predict", action="store_true", help="floors and expected gains only")
    parser.add_argument("--only", default="", help="cases, separated by commas; block for blocks")
    parser.add_argument("--residual", default="serial", choices=("serial", "parallel"),
                        help="form of the block that is timed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write checks and rows")
    return parser.parse_args(arguments)


def measure(cases: Sequence[Case], config: golf.Config, residual: str, *,
            with_blocks: bool) -> list[Row]:
    """Timed rows on this machine's GPU; every row is printed as soon as it is known."""
    device = torch.device("cuda", torch.cuda.current_device())
    timer = Timer(device, repeats=20)
    copy, rows = copy_rate(timer), []
    print(f"{torch.cuda.get_device_name(device)}: copy {copy / 1e12:.2f} TB/s")
    for case in cases:
        try:
            rows += time_case(case, config, timer, copy)
            print("\n".join(table_lines(rows[-2:], [])[1:]), flush=True)
        except Exception as problem:  # the others still count
            print(f"{case.name}: {one_line(problem)}", flush=True)
    if with_blocks:
        backend = golf.choose_attention(config.attention, device)
        for row in time_blocks(config, timer, backend.attend, residual):
            rows.append(row)
            print(table_lines([row], [])[1], flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks, times and reports; the exit status."""
    options = parse_arguments(arguments)
    wanted = set(filter(None, options.only.split(",")))
    unknown = wanted - {case.name for case in CASES} - {"block"}
    if unknown:
        print(f"error: --only {','.join(sorted(unknown))}: not a case; "
              f"cases: {', '.join(case.name for case in CASES)}, block", file=sys.stderr)
        return 2
    cases = [case for case in CASES if not wanted or case.name in wanted]
    config = golf.Config.from_env(os.environ)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    checks: list[Check] = []
    if not options.predict:
        checks = check_all(cases, device)
        if not wanted or "block" in wanted:
            try:
                checks += check_block(small_config(), device)
            except Exception as problem:  # as above
                checks.append(Check("block", one_line(problem), math.nan, 0.0))
    passed = report_checks(checks)
    rows: list[Row] = []
    if options.predict or (device.type != "cuda" and not options.check):
        rows = [row for case in (*cases, FOLD) for row in predict(case, config, ASSUMED_COPY_RATE)]
    elif not options.check:
        torch.set_float32_matmul_precision("high")
        rows = measure(cases, config, options.residual,
                       with_blocks=not wanted or "block" in wanted)
    if rows:
        print("\n".join(table_lines(rows, [plan.name for plan in golf.depth_plans(config)])))
    for name, text in RESOURCES.items():
        print(f"{name}: {text}, {MATRIX_CHOICES.get(name, CHOICES.get(name, ['']))[0]}")
    if options.json:
        known = [{name: value for name, value in row._asdict().items() if value == value}
                 for row in rows]  # a NaN stands for what was not measured: absent in the file
        contents = {"checks": [{**check._asdict(), "passed": check.passed} for check in checks],
                    "rows": known, "resources": RESOURCES}
        options.json.write_text(json.dumps(contents, indent=1) + "\n")
    return 0 if passed else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except golf.GolfError as problem:
        sys.exit(f"error: {problem}")
