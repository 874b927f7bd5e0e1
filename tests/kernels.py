"""Compares the kernel of train_gpt.py with its PyTorch reference; prints one JSON line a tensor.

    TRITON_INTERPRET=1 python tests/kernels.py cpu      float32, in Triton's interpreter
    python tests/kernels.py cuda                        bf16, as the trainer runs it

A process of its own: Triton reads the switch for its interpreter when it is first imported.
"""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_gpt as golf

SLOPE = 0.3
SHAPES = (2, 37, 64, 96), (1, 300, 72, 264)  # B, T, D, F: rows and columns that fill no tile


def reference(x_BTD: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor:
    """The MLP as the model computes it where no kernel runs."""
    empty = up_FD.new_empty(0)
    weights = golf.BlockWeights(empty, empty, up_FD, down_DF, empty, empty, empty, slope=SLOPE)
    return golf.mlp(x_BTD, weights, None)


def fused(x_BTD: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor:
    """The same by the kernel."""
    return golf.FusedMLP.apply(x_BTD, up_FD, down_DF, SLOPE)


def inputs(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> list[Tensor]:
    """Input and matrices; the input is not contiguous."""
    B, T, D, F = shape
    generator = torch.Generator().manual_seed(0)
    sizes, scales = ((B, T, 2 * D), (F, D), (D, F)), (1.0, D**-0.5, F**-0.5)
    x, up, down = (scale * torch.randn(*size, generator=generator)
                   for size, scale in zip(sizes, scales, strict=True))
    return [t.to(device, dtype) for t in (x[..., :D], up, down)]


def results(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """Output and gradients of all inputs for a fixed gradient of the output."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def error(found: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm; not a number where the kernel wrote none."""
    return float((found.double() - exact).norm() / exact.norm())


def pretend_to_have_processors() -> None:
    """Tells the kernel's launcher how many programs to start where there is no GPU."""
    properties = types.SimpleNamespace(multi_processor_count=3)
    torch.cuda.get_device_properties = lambda device: properties


def main(device: str) -> None:
    """Checks all shapes on a device."""
    if device == "cpu":
        pretend_to_have_processors()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    names = "output", "input gradient", "up gradient", "down gradient"
    for shape in SHAPES:
        tensors = inputs(shape, device, dtype)
        exact = results(reference, [t.double() for t in tensors])
        found = zip(names, exact, results(reference, tensors), results(fused, tensors), strict=True)
        for name, right, plain, ours in found:
            print(json.dumps({"shape": shape, "tensor": name, "error": error(ours, right),
                              "reference_error": error(plain, right)}))


if __name__ == "__main__":
    main(sys.argv[1])
