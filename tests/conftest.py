"""What holds for all tests."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(autouse=True, scope="module")
def nothing_old_is_garbage() -> None:
    """What is there before a file of tests is passed over by the collector.

    By then that is millions of objects of torch, Lightning and transformers, and looking through them takes a second
    each time that a measurement frees memory.
    """
    gc.collect()
    gc.freeze()
