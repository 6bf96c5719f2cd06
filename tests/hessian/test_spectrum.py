from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import at_own_outputs, cross_entropy, half_squared_error, mlp, normal, planted
from torch import Tensor, nn

from phasewatch.hessian import Density, HessianOperator, hessian_spectrum
from phasewatch.objective import Objective


def _net() -> Objective:
    """A net whose spectrum has both signs: 213 parameters, targets it does not fit."""
    module = mlp(6, 12, 9, 2)
    x, y = normal(70, 6), normal(70, 2, seed=1)
    return Objective(module, [(x[:40], y[:40]), (x[40:], y[40:])], loss_fn=half_squared_error)


@pytest.mark.parametrize("matrix", ["hessian", "gauss-newton"])
def test_lanczos_finds_what_the_dense_route_finds(matrix: str) -> None:
    """The trace is a sum of two probes: false-failure probability below 1e-4 at four standard errors."""
    objective = _net()
    dense = hessian_spectrum(objective, matrix=matrix)
    search = hessian_spectrum(objective, matrix=matrix, dense_below=0)
    assert (dense.method, search.method) == ("dense", "lanczos")
    assert search.converged
    expected = np.concatenate([dense.eigenvalues[:5], dense.eigenvalues[-5:]])
    assert np.abs(search.eigenvalues - expected).max() <= 1e-3 * dense.largest
    assert np.abs(search.eigenvalues[-5:] / expected[-5:] - 1).max() < 1e-4
    assert abs(search.trace - dense.trace) <= 4 * search.trace_standard_error
    frobenius = np.linalg.norm(dense.eigenvalues)
    assert search.trace_standard_error < 1.2 * frobenius  # two probes, two leading ends deflated
    assert search.zeros.lower <= dense.nullity <= search.zeros.upper
    assert search.products == 128


def test_dense_eigenvalues_are_those_of_the_planted_matrix() -> None:
    planted_values = [-3.0, -3.0, 0.0, 0.0, 0.0, 1e-6, 0.5, 2.0, 2.0, 2.0]
    spectrum = hessian_spectrum(planted(planted_values))
    assert np.allclose(spectrum.eigenvalues, planted_values, atol=1e-14)
    assert spectrum.eigenvalues.dtype == np.float64
    assert spectrum.trace == pytest.approx(sum(planted_values), abs=1e-13)
    assert spectrum.trace_standard_error == 0.0
    assert (spectrum.smallest, spectrum.largest) == (spectrum.eigenvalues[0], spectrum.eigenvalues[-1])
    assert spectrum.nullity == 3
    assert spectrum.zeros.resolved


def test_copies_of_leading_eigenvalues_are_found() -> None:
    """One run from one start sees each eigenvalue once; the deflated runs must find the others."""
    bulk = np.linspace(-1, 1, 400)
    spectrum = hessian_spectrum(planted([10.0, 10.0, 9.0, 9.0, 8.0, -6.0, -6.0, -5.0, *bulk]), dense_below=0)
    assert np.allclose(spectrum.eigenvalues[-5:], [8, 9, 9, 10, 10], atol=1e-2)
    assert np.allclose(spectrum.eigenvalues[:3], [-6, -6, -5], atol=1e-2)


def test_many_zeros_at_the_lower_end_do_not_hide_convergence() -> None:
    """A positive matrix with 700 zeros: its least five eigenvalues are copies of one."""
    values = [0.0] * 700 + list(np.linspace(0.1, 1, 300)) + [2.0, 3.0, 4.0, 5.0, 6.0]
    spectrum = hessian_spectrum(planted(values), dense_below=0)
    assert spectrum.converged
    assert spectrum.products == 128
    assert np.allclose(spectrum.eigenvalues, [0, 0, 0, 0, 0, 2, 3, 4, 5, 6], atol=6e-3)


def test_missed_copies_are_not_called_converged() -> None:
    """More copies than runs: four or five of the nine are found, and nothing below may pass for the rest."""
    bulk = np.linspace(-1, 1, 600)
    spectrum = hessian_spectrum(planted([10.0] * 9 + [4.0, 3.0, *bulk]), dense_below=0, num_eigenvalues=8)
    assert not spectrum.converged
    assert np.allclose(spectrum.eigenvalues[spectrum.eigenvalues > 5], 10)


@pytest.mark.parametrize("size", [1, 2, 7, 40])
def test_lanczos_exhausts_a_small_space(size: int) -> None:
    values = sorted(np.round(normal(size).numpy(), 1))
    spectrum = hessian_spectrum(planted(values), dense_below=0, num_eigenvalues=size)
    assert spectrum.converged
    assert np.allclose(spectrum.eigenvalues, values, atol=1e-12)
    assert spectrum.trace == pytest.approx(sum(values), abs=1e-11)
    assert spectrum.trace_standard_error == 0.0


def test_low_rank_is_found_exactly_by_lanczos() -> None:
    """A random direction that is an eigenvector of what remains: nothing else is there."""
    spectrum = hessian_spectrum(planted([0.0] * 480 + list(np.linspace(1, 5, 20))), dense_below=0)
    assert spectrum.zeros.lower == spectrum.nullity == spectrum.zeros.upper == 480
    assert spectrum.zeros.resolved
    assert spectrum.trace == pytest.approx(60, rel=1e-12)
    assert spectrum.products < 30


def test_multiple_of_the_identity() -> None:
    spectrum = hessian_spectrum(planted([2.0] * 50), dense_below=0)
    assert spectrum.products == 1
    assert spectrum.trace == pytest.approx(100)
    assert spectrum.converged
    assert (spectrum.nullity, spectrum.zeros.resolved) == (0, True)


def test_unconverged_search_says_so_and_gives_no_unconverged_values() -> None:
    values = np.linspace(0, 1, 3000)  # crowded ends: nothing to find for a dozen products
    spectrum = hessian_spectrum(planted(list(values[::3])), dense_below=0, num_steps=12)
    assert not spectrum.converged
    assert np.all(spectrum.residuals <= 1e-3)
    assert 0.9 < spectrum.largest <= 1 + 1e-12


def _searched() -> dict[str, Objective]:
    x, y, labels = normal(70, 6), normal(70, 2, seed=1), torch.arange(70) % 4
    return {
        "tanh net": Objective(mlp(6, 12, 9, 2), [(x, y)], loss_fn=half_squared_error),
        "ReLU net": Objective(mlp(6, 14, 9, 2, activation=nn.ReLU), [(x, y)], loss_fn=half_squared_error),
        "cross entropy": Objective(mlp(6, 16, 4), [(x, labels)], loss_fn=cross_entropy),
        "fitted": at_own_outputs(mlp(6, 12, 3), x),
        "zeros below": planted([0.0] * 200 + list(np.linspace(0.1, 1, 100)) + [2.0, 3.0, 4.0]),
        "crowded": planted(list(np.linspace(0, 1, 400))),
    }


@pytest.mark.parametrize("name", _searched())
def test_each_end_says_for_itself_whether_it_has_converged(name: str) -> None:
    """Against dense eigenvalues: what converged is right to the tolerance, and what is right to 1e-9 has."""
    objective = _searched()[name]
    dense = hessian_spectrum(objective)
    allowed = 1e-3 * np.abs(dense.eigenvalues).max()
    assert dense.largest_converged and dense.smallest_converged
    said = []
    for steps in (3, 5, 8, 16, 32, 64):
        search = hessian_spectrum(objective, dense_below=0, num_steps=steps)
        for error, converged in (
            (abs(search.largest - dense.largest), search.largest_converged),
            (abs(search.smallest - dense.smallest), search.smallest_converged),
        ):
            assert error <= allowed or not converged
            assert converged or error > 1e-9 * dense.largest
            said.append(converged)
    assert not said[0] or not said[1]
    assert said[-2:] == [True, True] or name == "crowded"


def test_a_crowded_lower_end_does_not_make_the_largest_eigenvalue_doubtful() -> None:
    """Three large eigenvalues, and a continuum down to zero whose end no two dozen products tell."""
    spectrum = hessian_spectrum(
        planted([*np.linspace(0, 1, 900), 30.0, 40.0, 50.0]), dense_below=0, num_steps=24, tolerance=1e-5
    )
    assert not spectrum.converged
    assert spectrum.largest == pytest.approx(50.0, rel=1e-12)
    assert spectrum.largest_converged and spectrum.largest_error < 1e-5
    assert not spectrum.smallest_converged
    assert f"(± {spectrum.smallest_error:.2g}) to 50," in repr(spectrum)


@pytest.mark.parametrize("copies", [0, 3])
def test_trace_error_is_honest(copies: int) -> None:
    """Twenty seeds: mean of the squared standardised errors has expectation 1.

    It is a mean of about 20 squared normals: outside of (0.4, 2.1) with probability below 1 %; seeds are fixed.
    """
    objective = planted([30.0] * copies + list(np.linspace(-1, 2, 500)))
    exact = 30 * copies + 250
    found = [hessian_spectrum(objective, seed=seed, dense_below=0, num_steps=24) for seed in range(20)]
    scores = [(s.trace - exact) / s.trace_standard_error for s in found]
    assert 0.4 < np.mean(np.square(scores)) < 2.1


def test_density_moments_are_those_of_the_spectrum() -> None:
    """Mean and second moment over two probes of 500 dimensions: within 15 % with probability above 99 %."""
    values = np.concatenate([np.zeros(200), np.linspace(0.5, 2, 300)])
    for dense_below, tolerance in ((1000, 1e-12), (0, 0.15)):
        density = hessian_spectrum(planted(list(values)), dense_below=dense_below).density
        assert isinstance(density, Density)
        assert density.weights.sum() == pytest.approx(1, abs=1e-12)
        assert np.all(np.diff(density.nodes) >= 0)
        for power in (1, 2):
            moment = (density.weights * density.nodes**power).sum()
            assert moment == pytest.approx((values**power).mean(), rel=tolerance)


def test_same_seed_same_numbers_and_global_streams_untouched() -> None:
    objective = _net()
    before = torch.get_rng_state()
    first, again, other = (hessian_spectrum(objective, seed=seed, dense_below=0) for seed in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(first.eigenvalues, again.eigenvalues)
    assert (first.trace, first.zeros) == (again.trace, again.zeros)
    assert first.trace != other.trace


class SinglePrecision(nn.Module):
    """A module whose code fixes float32, so that it cannot run in double precision."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(normal(12, 3).float())

    def forward(self, x: Tensor) -> Tensor:
        if self.w.dtype != torch.float32:
            raise AssertionError("this kernel takes float32 only")
        return torch.tanh(x @ self.w)


class RoundsToSinglePrecision(SinglePrecision):
    """A module that runs in double precision, but whose code rounds to single precision on the way."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x.float() @ self.w.float()).double()


@pytest.mark.parametrize("module", [SinglePrecision(), RoundsToSinglePrecision()])
def test_single_precision_is_measured_with_its_own_noise(module: nn.Module) -> None:
    """Rank 2 inputs in 12 dimensions: 10 zeros for each of 3 outputs, in float32 noise."""
    inputs = (normal(50, 2) @ normal(2, 12, seed=1)).float()
    objective = Objective(module, [(inputs, normal(50, 3, seed=2).float())], loss_fn=half_squared_error)
    spectrum = hessian_spectrum(objective)
    assert spectrum.nullity == 30
    assert 1e-8 < spectrum.zeros.threshold / np.abs(spectrum.eigenvalues).max() < 1e-4
    search = hessian_spectrum(objective, dense_below=0)
    assert search.zeros.lower <= 30 <= search.zeros.upper
    assert 1e-8 < search.zeros.threshold / np.abs(spectrum.eigenvalues).max() < 1e-4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"matrix": "fisher"}, r"'fisher'; expected one of 'hessian', 'gauss-newton'"),
        ({"num_eigenvalues": 0}, r"num_eigenvalues is 0; expected at least 1"),
        ({"num_eigenvalues": 14}, r"num_eigenvalues is 14; .* number of parameters, 13"),
        ({"num_steps": 0}, r"num_steps is 0; expected at least 1"),
        ({"num_probes": 0}, r"num_probes is 0; expected at least 1"),
        ({"tolerance": 0.0}, r"tolerance is 0.0; expected a number between 0 and 1"),
    ],
)
def test_bad_arguments_are_errors(settings: dict, message: str) -> None:
    objective = at_own_outputs(mlp(2, 3, 1), normal(5, 2))
    with pytest.raises(ValueError, match=message):
        hessian_spectrum(objective, **settings)


def test_repr_gives_the_headline_numbers() -> None:
    text = repr(hessian_spectrum(planted([0.0, 0.0, 1.0, 2.0])))
    assert text.startswith("Spectrum(hessian, 4 parameters, dense: eigenvalues ")
    assert "to 2, trace 3, ZeroCount(2 at |λ| <= " in text


def test_ends_say_how_far_they_are_those_of_the_samples() -> None:
    """Beside the quotients of the exact eigenvectors on half of the samples; none are asked for where none is given."""
    objective = _net()
    half = objective.on_half()
    assert half is not None
    found = hessian_spectrum(objective, dense_below=0, tolerance=1e-6, half=half)
    matrix, of_half = (HessianOperator(o).dense() for o in (objective, half))
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    for number, difference in ((-1, found.largest_by_samples), (0, found.smallest_by_samples)):
        vector = vectors[:, number]
        expected = abs(float(vector @ of_half @ vector - values[number]))
        assert difference == pytest.approx(expected, rel=1e-3) and expected > 0
    assert np.isnan(hessian_spectrum(objective, dense_below=0).largest_by_samples)
