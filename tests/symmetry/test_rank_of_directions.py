"""The dimension of spans, from their structure, against singular values of all directions written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse

from phasewatch.symmetry.directions import Added, Columns, Form, Mixed, Sparse
from phasewatch.symmetry.linear_algebra import singular_values, svd
from phasewatch.symmetry.span import Group, Lines, _parameters_first, added_dimensions

SIZE = 700
WIDTHS = ((6, 9), (6, 9), (9, 7), (7, 8))


def _matrices() -> list[np.ndarray]:
    starts = np.cumsum([0, *(n * f for n, f in WIDTHS)])
    return [start + np.arange(n * f).reshape(n, f) for start, (n, f) in zip(starts, WIDTHS, strict=False)]


def _columns(form: Form) -> np.ndarray:
    rows, columns, values = form.entries()
    return scipy.sparse.coo_matrix((values, (rows, columns)), shape=(SIZE, form.count)).toarray()


def _written_out(rng: np.random.Generator, count: int, entries: int) -> Sparse:
    columns = Columns()
    for number in range(count):
        columns.add(number, rng.choice(SIZE, entries, replace=False), rng.standard_normal(entries))
    return columns.form()


def _network(seed: int) -> tuple[list[Group], list[np.ndarray]]:
    """What a network's ledger is made of: attention, rescalings, unseen inputs, units without effect, dead ones."""
    rng = np.random.default_rng(seed)
    first, second, third, fourth = matrices = _matrices()
    parameters = rng.standard_normal(SIZE)
    heads = [
        Mixed(first[part], parameters[first[part]], second[part], parameters[second[part]])
        for part in (slice(0, 3), slice(3, 6))
    ]
    rescaling = Columns()
    for unit in range(7):
        rescaling.add(unit, third.T[unit], parameters[third.T[unit]])
        rescaling.add(unit, fourth[unit], -parameters[fourth[unit]])
    shifts = Columns()
    for unit in range(6):
        shifts.add(unit, np.append(first[unit, -1], fourth[:, 2]), rng.standard_normal(8))
    centred = Added(np.vstack([first, second]), rng.standard_normal((1, 9)))
    unseen = rng.standard_normal((2, 9))
    groups = [
        Group("a", tuple(heads), True),
        Group("b", (rescaling.form(), shifts.form()), True),
        Group("a", (centred,), True),
        Group("c", (Added(third.T[:, :2].reshape(-1, 1), np.ones((1, 1))),), False),
        Group("c", (Added(fourth.T, rng.standard_normal((2, 7))),), False),
        Group("a", (Added(first, np.vstack([unseen, unseen[:1] + unseen[1:]])), Added(first[2:3], np.eye(9))), False),
        Group("d", (_written_out(rng, 5, 40), Added(third, rng.standard_normal((1, 7)))), False),
    ]
    return groups, matrices


@pytest.mark.parametrize("seed", range(6))
def test_structure_gives_the_rank(seed: int) -> None:
    groups, matrices = _network(seed)
    stacked = [np.hstack([_columns(f) for group in groups[:end] for f in group.forms]) for end in range(1, 8)]
    ranks = [int(np.linalg.matrix_rank(m)) for m in stacked]
    lines, rng = Lines(SIZE, matrices), np.random.default_rng(0)
    exact, _ = added_dimensions(groups, lines, rng)
    assert exact == np.diff(ranks, prepend=0).tolist()
    found, left_out = added_dimensions(groups, lines, rng, most_dense=4)
    assert not left_out
    assert sum(found[:3]) == ranks[2]
    assert sum(found) <= ranks[-1]
    assert sum(found) >= ranks[-1] - 7  # rescalings of what is also mixed: not seen from the fourth matrix


def _drawn(rng: np.random.Generator) -> tuple[list[Group], list[np.ndarray]]:
    """Anything, of low rank where that is likely to deceive."""
    matrices = _matrices()
    parameters = rng.standard_normal(SIZE)
    forms: list[Form] = []
    for _ in range(rng.integers(2, 9)):
        indices = matrices[rng.integers(4)]
        indices = indices[np.sort(rng.choice(len(indices), rng.integers(1, len(indices) + 1), replace=False))]
        kind = rng.integers(5)
        if kind == 0:
            vectors = rng.standard_normal((rng.integers(1, 4), indices.shape[1]))
            vectors[:, rng.random(indices.shape[1]) < 0.3] = 0.0
            forms.append(Added(indices, vectors))
        elif kind == 1:
            forms.append(Added(indices.T, rng.standard_normal((rng.integers(1, 3), len(indices)))))
        elif kind == 2:
            forms.append(Added(indices.reshape(-1, 1), np.ones((1, 1))))
        elif kind == 3:
            other = matrices[rng.integers(4)]
            other = other if len(other) >= len(indices) else other.T
            if len(other) < len(indices) or np.intersect1d(other[: len(indices)], indices).size:
                continue
            parameters[indices] = rng.standard_normal((len(indices), 2)) @ rng.standard_normal((2, indices.shape[1]))
            other = other[: len(indices)]
            forms.append(Mixed(indices, parameters[indices], other, parameters[other]))
        else:
            forms.append(_written_out(rng, int(rng.integers(1, 6)), int(rng.integers(1, 12))))
    middle = len(forms) // 2
    return [Group("a", tuple(forms[:middle]), True), Group("b", tuple(forms[middle:]), False)], matrices


def test_structure_never_gives_more_than_the_rank() -> None:
    reached = 0
    for seed in range(300):
        groups, matrices = _drawn(np.random.default_rng(seed))
        stacked = np.hstack([np.zeros((SIZE, 1)), *(_columns(f) for group in groups for f in group.forms)])
        rank = int(np.linalg.matrix_rank(stacked))
        rng = np.random.default_rng(0)
        found, _ = added_dimensions(groups, Lines(SIZE, matrices), rng, most_dense=0)
        assert sum(found) <= rank, seed
        reached += sum(found) == rank
    assert reached >= 200


def test_singular_values_where_the_first_way_does_not_converge(monkeypatch: pytest.MonkeyPatch) -> None:
    def stuck(*_: Any, **__: Any) -> Any:
        raise np.linalg.LinAlgError("SVD did not converge")

    matrix = np.random.default_rng(0).standard_normal((30, 4)) @ np.random.default_rng(1).standard_normal((4, 12))
    expected = np.linalg.svd(matrix, full_matrices=False)[1]
    monkeypatch.setattr(np.linalg, "svd", stuck)
    left, values, right = svd(matrix)
    np.testing.assert_allclose(values, expected, atol=1e-12)
    np.testing.assert_allclose(singular_values(matrix), expected, atol=1e-12)
    np.testing.assert_allclose(left @ np.diag(values) @ right, matrix, atol=1e-12)


def test_single_parameters_are_credited_as_a_decomposition_would() -> None:
    """Directions of four groups, single parameters among them that lie in what the others span and next to it."""
    rng = np.random.default_rng(0)
    columns, owner = [], []
    for group in range(4):
        dense = rng.standard_normal((12, 2)) * (rng.random((12, 1)) < 0.5)
        single = np.eye(12)[:, rng.integers(12, size=2)]
        columns += [dense, single, dense[:, :1] + single[:, :1]]
        owner += [group] * 5
    matrix, owners = np.hstack(columns), np.array(owner)
    expected = [
        np.linalg.matrix_rank(matrix[:, owners <= g]) - (np.linalg.matrix_rank(matrix[:, owners < g]) if g else 0)
        for g in range(4)
    ]
    assert [number for _, number in _parameters_first(matrix, owners)] == expected
