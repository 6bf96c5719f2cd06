"""Peak memory of leading eigenpairs in vectors of parameters beside the graph; run in a process of its own.

Usage: python memory_of_eigenpairs.py NUM_PARAMETERS BASIS_SIZE PRODUCTS
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from phasewatch.hessian import HessianOperator, leading_eigenpairs
from phasewatch.objective import Objective


class Quadratic(nn.Module):
    """``0.5 sum d w^2`` with curvatures ``d`` between 0 and 1."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(size))
        self.register_buffer("d", torch.rand(size, generator=torch.Generator().manual_seed(0)))


def loss_fn(module: nn.Module, _: Tensor) -> Tensor:
    return 0.5 * (module.d * module.w.square()).sum()


def kilobytes(what: str) -> int:
    """``VmRSS``, resident now, or ``VmHWM``, its peak."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


def main() -> None:
    size, basis, products = (int(argument) for argument in sys.argv[1:])
    objective = Objective(Quadratic(size), [torch.zeros(1)], loss_fn=loss_fn)
    operator = HessianOperator(objective)
    operator @ objective.parameters
    graph = operator.kept_bytes / (4 * size)
    del operator
    leading_eigenpairs(objective, 1, max_products=2, basis_size=3)  # what is loaded once
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = kilobytes("VmRSS")
    pairs = leading_eigenpairs(objective, 10, tolerance=1e-6, basis_size=basis, max_products=products)
    peak = (kilobytes("VmHWM") - before) * 1024 / (4 * size)
    print(f"{pairs.products} {pairs.converged} {graph:.2f} {peak:.2f}")


if __name__ == "__main__":
    main()
