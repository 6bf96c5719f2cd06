"""What holds for all tests."""

from __future__ import annotations

import gc
import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "callbacks"))


@pytest.fixture(autouse=True, scope="session")
def ctrl_c_raises() -> None:
    """In the background of a shell Ctrl-C is ignored from the start, and Python then leaves it so."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="module")
def nothing_old_is_garbage() -> None:
    """What is there before a file of tests is passed over by the collector.

    By then that is millions of objects of torch, Lightning and transformers, and looking through them takes a second
    each time that a measurement frees memory.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def drawn_alike_in_any_order() -> None:
    """What a test draws without a seed of its own does not depend on which tests ran before it in its process."""
    torch.manual_seed(0)
