"""Compares every kernel of train_gpt.py with its PyTorch reference; prints one JSON line a tensor.

    TRITON_INTERPRET=1 python tests/kernels.py cpu      float32, in Triton's interpreter
    python tests/kernels.py cuda                        bf16, as the trainer runs them

A process of its own: Triton reads the switch for its interpreter when it is first imported, and
train_gpt.py defines kernels where Triton is already there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import triton  # noqa: F401 - see above
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_gpt as golf

Function = Callable[..., object]


def cases(device: str, dtype: torch.dtype) -> list[tuple[str, Function, Function, list[object]]]:
    """Name, operator, reference and arguments; sizes are odd, inputs are not contiguous."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        wide = scale * torch.randn(*shape[:-1], shape[-1] + 8, generator=generator)
        return wide.to(device, dtype)[..., :shape[-1]]

    B, T, H, G, ops = 2, 37, 4, 2, torch.ops.golf
    found: list[tuple[str, Function, Function, list[object]]] = []
    for K, rotated in ((64, 16), (48, 24)):
        tables = [t.to(device) for t in golf.rotary_tables(T, rotated, 1e4)]
        gain = torch.rand(H, generator=generator).to(device) + 1
        found += [("split_heads", ops.split_heads, golf.split_heads,
                   [normal(B, T, H + 2 * G, K), gain, *tables]),
                  ("exclude_self", ops.exclude_self, golf.exclude_self,
                   [normal(B, T, H, K), normal(B, T, G, K)])]
    for V in (333, 1024):
        target = torch.randint(V, (T,), generator=generator).to(device)
        found.append(("nll", ops.nll, golf.softcapped_nll,
                      [normal(T, V, scale=10.0), target, 30.0]))
    return found


def evaluate(function: Function, arguments: list[object], dtype: torch.dtype) -> list[Tensor]:
    """Results and gradients of all floating-point arguments, computed in `dtype` where given."""
    leaves = [x.detach().to(dtype if dtype == torch.float64 else x.dtype).requires_grad_()
              if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments]
    found = function(*leaves)
    results = list(found) if isinstance(found, tuple) else [found]
    changes = [torch.randn(r.shape, generator=torch.Generator().manual_seed(1)).to(r)
               for r in results]
    wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    gradients = torch.autograd.grad(results, wanted, changes, allow_unused=True)
    return [*results, *(g for g in gradients if g is not None)]


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm; not a number where the kernel wrote none."""
    return float(((found.double() - exact).norm() / exact.norm()).detach())


def main() -> None:
    """Checks all cases on the device named by the first argument."""
    device = sys.argv[1]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for name, operator, reference, arguments in cases(device, dtype):
        exact = evaluate(reference, arguments, torch.float64)
        plain, ours = (evaluate(f, arguments, dtype) for f in (reference, operator))
        for number, (e, p, o) in enumerate(zip(exact, plain, ours, strict=False)):
            print(json.dumps({"kernel": name, "tensor": number, "shape": list(o.shape),
                              "error": relative_error(o, e),
                              "reference_error": relative_error(p, e)}))


if __name__ == "__main__":
    main()
