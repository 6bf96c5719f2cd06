"""Batches that are no plain tree of tensors, against the same data in a plain one."""

from __future__ import annotations

from collections import OrderedDict, UserDict, deque, namedtuple
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from phasewatch import Objective, estimate_llc, hessian_spectrum
from phasewatch.objective.batches import Layout, UnknownSizeError, clone_batch, count_samples, map_tensors

Named = namedtuple("Named", "inputs targets")


@dataclass
class Record:
    inputs: Tensor
    targets: Tensor
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Frozen:
    targets: Tensor
    inputs: Tensor


class OtherMapping(Mapping[str, Tensor]):
    """A mapping of another library, with what it likes in its attributes."""

    def __init__(self, **items: Tensor) -> None:
        self._items = items
        self._source = np.arange(3)

    def __getitem__(self, key: str) -> Tensor:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


class Graph:
    """Several graphs in one batch: nodes, edges, and the graph of each node."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.x, self.y = inputs.repeat_interleave(2, dim=0), targets
        self.batch = torch.arange(len(inputs)).repeat_interleave(2)
        self.edge_index = torch.zeros(2, 5, dtype=torch.long)
        self.num_graphs = len(inputs)


def data(size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 4, generator=generator), torch.randn(size, 2, generator=generator)


KINDS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], tuple[Tensor, Tensor]]]] = {
    "data class": (Record, lambda b: (b.inputs, b.targets)),
    "frozen data class": (lambda x, y: Frozen(y, x), lambda b: (b.inputs, b.targets)),
    "UserDict": (lambda x, y: UserDict(inputs=x, targets=y), lambda b: (b["inputs"], b["targets"])),
    "OrderedDict": (lambda x, y: OrderedDict(inputs=x, targets=y), lambda b: (b["inputs"], b["targets"])),
    "named tuple": (Named, lambda b: (b.inputs, b.targets)),
    "deque": (lambda x, y: deque([x, y]), lambda b: (b[0], b[1])),
    "mapping of another library": (
        lambda x, y: OtherMapping(inputs=x, targets=y),
        lambda b: (b["inputs"], b["targets"]),
    ),
    "nested": (lambda x, y: {"deep": [Record(x, y)]}, lambda b: (b["deep"][0].inputs, b["deep"][0].targets)),
    "graphs": (Graph, lambda b: (torch.zeros(b.num_graphs, 4).to(b.x).index_add(0, b.batch, b.x) / 2, b.y)),
    "list of samples": (
        lambda x, y: [{"x": a, "y": b, "id": k} for k, (a, b) in enumerate(zip(x, y, strict=True))],
        lambda b: (torch.stack([s["x"] for s in b]), torch.stack([s["y"] for s in b])),
    ),
    "packed": (
        lambda x, y: (pack_sequence([row[:, None] for row in x]), y),
        lambda b: (torch.nn.utils.rnn.pad_packed_sequence(b[0], batch_first=True)[0][..., 0], b[1]),
    ),
}


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def half_squared_error(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return 0.5 * (module(batch[0]) - batch[1]).square().sum(1).mean()


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_numbers_as_of_a_plain_batch(kind: str) -> None:
    """Samples, weights, precision and all that follows from them; batches of unequal size."""
    pack, unpack = KINDS[kind]
    batches = [data(8), data(3, 1)]
    plain = Objective(network(), batches, loss_fn=half_squared_error)
    other = Objective(
        network(), [pack(*batch) for batch in batches], loss_fn=lambda m, b: half_squared_error(m, unpack(b))
    )
    assert other.batch_sizes == [8, 3]
    torch.testing.assert_close(other.loss(), plain.loss())
    places = plain.parameters + 0.1 * torch.randn(3, plain.num_parameters)
    for one, two in zip(other.losses_and_gradients(places), plain.losses_and_gradients(places), strict=True):
        torch.testing.assert_close(one, two)
    double = other.to(torch.float64)
    assert all(t.dtype == torch.float64 for own in double.data for t in own if t.is_floating_point())
    for matrix in ("hessian", "gauss-newton"):
        found, expected = (hessian_spectrum(o, matrix) for o in (double, plain.to(torch.float64)))
        assert found.eigenvalues == pytest.approx(expected.eigenvalues, abs=1e-10 * expected.largest)
        assert (found.zeros.count, found.zeros.lower, found.zeros.upper) == (
            expected.zeros.count,
            expected.zeros.lower,
            expected.zeros.upper,
        )


@pytest.mark.parametrize("kind", KINDS)
def test_what_an_evaluation_does_to_its_batch_is_not_seen_by_the_next(kind: str) -> None:
    pack, unpack = KINDS[kind]
    given = pack(*data(8))

    def careless(module: nn.Module, batch: Any) -> Tensor:
        inputs, targets = unpack(batch)
        loss = half_squared_error(module, (inputs.clone(), targets.clone()))
        if isinstance(batch, dict) or hasattr(batch, "pop"):
            batch.pop(0) if isinstance(batch, list) else batch.pop() if isinstance(batch, deque) else batch.popitem()
        for leaf in Layout(batch).tensors:
            leaf.zero_()
        if hasattr(batch, "notes"):
            batch.notes["seen"] = batch.notes.get("seen", 0) + 1
        return loss * (1 + getattr(batch, "notes", {}).get("seen", 1))

    before = clone_batch(given)
    objective = Objective(network(), [given], loss_fn=careless)
    expected = 2 * half_squared_error(network(), data(8)).detach()
    for _ in range(3):
        torch.testing.assert_close(objective.loss().detach(), expected)
    assert all(torch.equal(a, b) for a, b in zip(Layout(given).tensors, Layout(before).tensors, strict=True))


def test_constants_that_differ_from_batch_to_batch_are_seen() -> None:
    """Also where their text is shortened: two long arrays read the same, and one trace must not serve both."""
    mask = np.ones(2000)
    masked = mask.copy()
    masked[1000] = 5.0
    assert repr(mask) == repr(masked)
    x, y = data(8)

    def loss_fn(module: nn.Module, batch: Any) -> Tensor:
        return half_squared_error(module, (batch["x"], batch["y"])) * float(batch["mask"].max())

    objective = Objective(
        network(), [{"x": x, "y": y, "mask": mask}, {"x": x, "y": y, "mask": masked}], loss_fn=loss_fn
    )
    places = objective.parameters + 0.1 * torch.randn(2, objective.num_parameters)
    one, other = (objective.losses_and_gradients(places, k)[0] for k in (0, 1))
    torch.testing.assert_close(other, 5 * one)


def images(count: int) -> list[Tensor]:
    return [torch.zeros(3, 6, 6) for _ in range(count)]


KNOWN: list[tuple[Any, int]] = [
    (torch.zeros(7, 2), 7),
    ((torch.zeros(8, 3), torch.zeros(8)), 8),
    ([torch.zeros(8, 3), torch.zeros(8, 3)], 8),
    ([torch.zeros(32, 16, dtype=torch.long)] * 4, 32),
    ((torch.zeros(8, 5, 6), torch.zeros(8, 5, 3)), 8),
    ({"x": torch.zeros(5, 2), "scale": torch.tensor(2.0), "name": "a"}, 5),
    (((torch.zeros(6, 2), torch.zeros(6, 3)), (torch.zeros(6), torch.zeros(6, 1))), 6),
    ([{"x": torch.zeros(3, 4), "y": torch.tensor(1)}] * 9, 9),
    ([(torch.zeros(3, 4), 1)] * 9, 9),
    (["a", "b", "c"], 3),
    ({"text": ["a", "b"], "y": torch.zeros(2)}, 2),
    (pack_sequence([torch.zeros(4, 2), torch.zeros(2, 2)]), 2),
    ((pack_sequence([torch.zeros(4, 2), torch.zeros(2, 2)]), torch.zeros(2)), 2),
    (Graph(*data(5)), 5),
    (torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged), 2),
]
UNKNOWN: list[Any] = [
    (torch.zeros(3), torch.zeros(64, 5), torch.zeros(64)),  # class weights first
    images(64),
    (images(4), [{"boxes": torch.zeros(2, 4)}] * 4),
    [torch.zeros(5, 2), torch.zeros(3, 2)],  # ragged, or two columns of two loaders
    [(torch.zeros(32, 2), torch.zeros(32)), (torch.zeros(64, 2), torch.zeros(64))],
    torch.tensor(1.0),
    "text",
    {"edge_index": torch.zeros(2, 9), "x": torch.zeros(12, 3), "y": torch.zeros(4)},
]


@pytest.mark.parametrize(("batch", "size"), KNOWN)
def test_samples_that_can_be_read_off(batch: Any, size: int) -> None:
    assert count_samples(batch) == size


@pytest.mark.parametrize("batch", UNKNOWN)
def test_samples_that_cannot_are_asked_for(batch: Any) -> None:
    with pytest.raises(UnknownSizeError, match=r"cannot be read off.*Give it: batch_sizes=\[\.\.\.\]"):
        count_samples(batch)


def test_given_sizes_are_taken_where_a_batch_does_not_say() -> None:
    weights = torch.tensor([1.0, 2.0, 3.0])
    batches = [(weights, *data(8)), (weights, *data(2, 1))]

    def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return half_squared_error(module, batch[1:])

    with pytest.raises(UnknownSizeError, match="lengths 3, 8"):
        Objective(network(), batches, loss_fn=loss_fn)
    objective = Objective(network(), batches, loss_fn=loss_fn, batch_sizes=[8, 2])
    plain = Objective(network(), [batch[1:] for batch in batches], loss_fn=half_squared_error)
    torch.testing.assert_close(objective.loss(), plain.loss())
    assert estimate_llc(objective, chains=2, draws=20, burn_in=20).n == 10


def test_what_cannot_be_copied_is_named() -> None:
    class Locked:
        def __init__(self) -> None:
            self.values = torch.zeros(4, 4)

        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("no copies of me")

    with pytest.raises(TypeError, match=r"batch of type Locked cannot be copied \(RuntimeError: no copies of me\)"):
        Objective(network(), [Locked()], loss_fn=lambda m, b: m(b.values).mean())


def test_clones_are_detached_and_share_nothing() -> None:
    given = [torch.ones(3, requires_grad=True) * 2, {"y": torch.zeros(7), "names": ["a"]}]
    clone = clone_batch(given)
    assert not clone[0].requires_grad and clone[0].data_ptr() != given[0].data_ptr()
    clone[1]["names"].append("b")
    assert given[1]["names"] == ["a"]
    shared = torch.ones(2)
    doubled = map_tensors(lambda t: t * 2, Record(shared, shared))
    assert doubled.inputs is doubled.targets and torch.equal(doubled.inputs, torch.full((2,), 2.0))
