"""Memory of thick-restart Lanczos: never more than the basis and eight vectors beside the graph."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs the peak memory that Linux keeps")
@pytest.mark.parametrize(("basis", "products"), [(16, 40), (16, 12)])
def test_memory_is_bounded_by_the_basis(basis: int, products: int) -> None:
    """Whether it restarts or not, where it ends included; vectors so long that what is freed is given back at once."""
    script = Path(__file__).with_name("memory_of_eigenpairs.py")
    arguments = [sys.executable, str(script), "9000000", str(basis), str(products)]
    run = subprocess.run(arguments, capture_output=True, text=True, check=True)
    taken, _, graph, peak = run.stdout.split()
    assert int(taken) == products
    assert float(peak) - float(graph) <= min(basis, products) + 8, run.stdout
