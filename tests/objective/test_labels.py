from __future__ import annotations

from typing import Any

import pytest
import torch

from phasewatch.objective.labels import TOKENS_KEPT, integer_targets

X = torch.zeros(6, 3)
CLASSES = torch.tensor([2, 0, 0, 2, 1, 1])
TOKENS = torch.arange(120).reshape(6, 20)


@pytest.mark.parametrize(
    ("batch", "kind", "first"),
    [
        ((X, CLASSES), "class", 2),
        ({"x": X, "y": CLASSES.to(torch.uint8)}, "class", 2),
        ((TOKENS, CLASSES), "class", 2),
        # Another number for each sample: it says which sample it is, and not of which class.
        ((TOKENS, torch.arange(6)), "tokens", list(range(TOKENS_KEPT))),
        (TOKENS, "tokens", list(range(TOKENS_KEPT))),
        ({"input_ids": TOKENS + 1, "labels": TOKENS}, "tokens", list(range(TOKENS_KEPT))),
    ],
)
def test_classes_are_found_or_else_tokens(batch: Any, kind: str, first: Any) -> None:
    found = integer_targets([batch], [6])
    assert found is not None and found["kind"] == kind
    assert len(found["values"]) == 6 and found["values"][0] == first


def test_batches_follow_one_another() -> None:
    assert integer_targets([(X, CLASSES), (X[:2], CLASSES[2:4])], [6, 2]) == {
        "kind": "class",
        "values": [2, 0, 0, 2, 1, 1, 0, 2],
    }


@pytest.mark.parametrize("batch", [(X, X), (X, CLASSES > 1), (X, CLASSES[:5]), (X, torch.tensor(3)), ["a", "b"], ()])
def test_where_there_are_no_integer_targets_there_are_no_labels(batch: Any) -> None:
    assert integer_targets([batch], [6]) is None
    assert integer_targets([], []) is None


def test_batches_that_differ_in_kind_have_no_labels() -> None:
    assert integer_targets([(X, CLASSES), (X,)], [6, 6]) is None
