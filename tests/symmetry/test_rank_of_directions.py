"""The dimension of spans, taken apart, against singular values of the whole."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse

from phasewatch.symmetry.directions import added_dimensions


def _groups(seed: int) -> list[list[scipy.sparse.csc_matrix]]:
    """Sets on rows of their own, single coordinates, and columns that link and partly repeat them."""
    rng = np.random.default_rng(seed)
    size = 120
    blocks = []
    for start in (0, 40, 80):
        block = np.zeros((size, 12))
        block[start : start + 25] = rng.standard_normal((25, 8)) @ rng.standard_normal((8, 12))  # rank 8
        blocks.append(block)
    coordinates = np.eye(size)[:, [3, 3, 50, 119]]
    links = rng.standard_normal((size, 6))
    repeated = np.hstack([links[:, :2] + blocks[0][:, :2], blocks[1][:, :3]])
    groups = [[links], [blocks[0], blocks[1]], [coordinates], [repeated, blocks[2]]]
    return [[scipy.sparse.csc_matrix(m / np.linalg.norm(m, axis=0)) for m in group] for group in groups]


@pytest.mark.parametrize("generic", [0, 1, 2, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_elimination_gives_the_rank(seed: int, generic: int) -> None:
    groups = _groups(seed)
    stacked = [np.hstack([m.toarray() for group in groups[:end] for m in group]) for end in range(1, 5)]
    ranks = [int(np.linalg.matrix_rank(m)) for m in stacked]
    exact, _ = added_dimensions(groups, generic, np.random.default_rng(0))
    assert exact == np.diff(ranks, prepend=0).tolist()
    found, left_out = added_dimensions(groups, generic, np.random.default_rng(0), most_dense=4)
    assert not left_out
    assert sum(found) == ranks[-1]
    assert sum(found[:generic]) == (ranks[generic - 1] if generic else 0)
