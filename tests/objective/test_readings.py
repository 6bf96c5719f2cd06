"""What is read from the outputs: batch by batch, one reading of another, and past the outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from phasewatch import Objective, estimate_llc, hessian_spectrum, split_off_misfit
from phasewatch.objective import NoOutputsError

Steps = tuple[Tensor, Tensor]


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.step = nn.Linear(4 + 3, 3)

    def forward(self, inputs: Tensor, hidden: Tensor) -> Tensor:
        return torch.tanh(self.step(torch.cat([inputs, hidden], dim=1)))


class Unrolled(nn.Module):
    """Its twin: the same cells inside of one call."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = Cell()

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = inputs.new_zeros(len(inputs), 3)
        for step in inputs.unbind(1):
            hidden = self.cell(step, hidden)
        return hidden


def of_cells(module: nn.Module, batch: Steps) -> Tensor:
    hidden = batch[0].new_zeros(len(batch[0]), 3)
    for step in batch[0].unbind(1):
        hidden = module.cell(step, hidden)
    return functional.cross_entropy(hidden, batch[1])


def of_network(module: nn.Module, batch: Steps) -> Tensor:
    return functional.cross_entropy(module(batch[0]), batch[1])


def sequences(lengths: tuple[int, ...]) -> list[Steps]:
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(10, t, 4, generator=generator).double(), torch.randint(3, (10,), generator=generator))
        for t in lengths
    ]


@pytest.mark.parametrize("lengths", [(3, 1), (1, 3), (2, 2, 5)])
def test_each_batch_is_cut_at_its_own_last_call(lengths: tuple[int, ...]) -> None:
    cells, network = (
        Objective(Unrolled().double(), sequences(lengths), loss_fn=loss_fn) for loss_fn in (of_cells, of_network)
    )
    place = cells.parameters + 0.2 * torch.randn(cells.num_parameters, dtype=torch.float64)
    for part, expected in zip(split_off_misfit(cells), split_off_misfit(network), strict=True):
        torch.testing.assert_close(part.batch_losses, torch.zeros(len(lengths), dtype=torch.float64))
        for one, other in zip(part.loss_and_gradient(place), expected.loss_and_gradient(place), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(cells.behavioral().loss(place), network.behavioral().loss(place))
    settings: dict[str, Any] = {"n": 300, "chains": 2, "draws": 30, "burn_in": 20, "localization": 10.0}
    one, other = (estimate_llc(objective, **settings) for objective in (cells, network))
    assert one.learning_coefficient == pytest.approx(other.learning_coefficient, rel=1e-6)


def test_a_cut_that_depends_on_the_parameters_is_refused() -> None:
    def until_large(module: nn.Module, batch: Tensor) -> Tensor:
        hidden = batch.new_zeros(len(batch), 3)
        for _ in range(2 if float(module.cell.step.bias.detach()[0]) < 1 else 3):
            hidden = module.cell(batch, hidden)
        return hidden.square().mean()

    objective = Objective(Unrolled().double(), [torch.randn(8, 4).double()], loss_fn=until_large)
    moved, _ = split_off_misfit(objective)
    with pytest.raises(NoOutputsError, match="3 times on batch 0, and 2 times at the start"):
        moved.loss(objective.parameters + 2)


def _classifier(penalty: float = 0.0, seed: int = 0) -> Objective:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    inputs, labels = torch.randn(60, 5, dtype=torch.float64), torch.randint(3, (60,))

    def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = functional.cross_entropy(module(batch[0]), batch[1])
        return loss + penalty * sum(p.square().sum() for p in module.parameters()) if penalty else loss

    return Objective(network, list(zip(inputs.split(20), labels.split(20), strict=True)), loss_fn=loss_fn)


def test_what_was_read_is_read_again_and_not_the_loss_beneath() -> None:
    """The divergence has no misfit of its own: split once more it is all remainder."""
    moved = _classifier().behavioral()
    remainder, misfit = split_off_misfit(moved)
    places = moved.parameters + 0.3 * torch.randn(4, moved.num_parameters, dtype=torch.float64)
    torch.testing.assert_close(remainder.losses(places), moved.losses(places), rtol=1e-10, atol=1e-14)
    assert float(misfit.losses(places).abs().max()) < 1e-12
    for restricted in (moved.restricted_to("0"), remainder.restricted_to("0")):
        some = restricted.parameters + 0.1
        assert float(restricted.loss(some)) > 0


@pytest.mark.parametrize("make", [Objective.behavioral, lambda objective: split_off_misfit(objective)[0]])
def test_the_learning_coefficient_of_a_divergence_is_that_of_one_batch(make: Callable[[Objective], Objective]) -> None:
    """It is nowhere negative; λ = -4,840 was read off the loss beneath."""
    several = _classifier()
    inputs, labels = (torch.cat([batch[k] for batch in several.batches]) for k in (0, 1))
    whole = Objective(several.module, [(inputs, labels)], loss_fn=several.loss_fn)
    settings: dict[str, Any] = {"n": 1000, "chains": 4, "draws": 600, "burn_in": 250, "localization": 10.0}
    one, other = (estimate_llc(make(objective), **settings) for objective in (several, whole))
    # Five standard errors: both false failures together are rarer than 1e-5, whatever the autocorrelation estimate
    # misses by less than a factor of two at 3e-2 of that.
    error = (one.standard_error**2 + other.standard_error**2) ** 0.5
    assert other.learning_coefficient > 0
    assert abs(one.learning_coefficient - other.learning_coefficient) < 5 * error + 0.02 * other.learning_coefficient


def test_weight_decay_in_the_loss_is_no_part_of_the_divergence() -> None:
    """Its twin is the loss without it."""
    decayed, plain = _classifier(penalty=0.1), _classifier()
    places = plain.parameters + 0.5 * torch.randn(4, plain.num_parameters, dtype=torch.float64)
    moved, expected = decayed.behavioral(), plain.behavioral()
    assert moved.held and not expected.held
    assert float(moved.gradient().abs().max()) < 1e-14
    for one, other in zip(moved.losses_and_gradients(places), expected.losses_and_gradients(places), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)
    ours, theirs = (hessian_spectrum(objective).eigenvalues for objective in (moved, expected))
    assert ours == pytest.approx(theirs, abs=1e-10)


@pytest.mark.parametrize("penalty", [0.0, 0.1])
def test_in_another_precision_the_outputs_are_read_anew(penalty: float) -> None:
    """In single precision first, the divergence at the start is still exactly flat in double."""
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 4, bias=False))
    inputs = torch.randn(50, 4)

    def loss_fn(module: nn.Module, batch: Tensor) -> Tensor:
        loss = 0.5 * (module(batch) - batch).square().sum(1).mean()
        return loss + penalty * sum(p.square().sum() for p in module.parameters()) if penalty else loss

    moved = Objective(module, [inputs], loss_fn=loss_fn).behavioral().to(torch.float64)
    assert float(moved.gradient().abs().max()) < 1e-14
    assert hessian_spectrum(moved).nullity == 24 - 3 * (4 + 4 - 3)  # N - q (rk X + C - q)


def test_a_loss_of_several_outputs_has_no_divergence_of_the_last() -> None:
    def siamese(module: nn.Module, batch: Steps) -> Tensor:
        return (module(batch[0]) - module(batch[1])).square().mean()

    objective = Objective(nn.Linear(3, 2), [(torch.randn(8, 3), torch.randn(8, 3))], loss_fn=siamese)
    with pytest.raises(NoOutputsError, match="outputs of several calls of modules"):
        objective.behavioral()


def test_outputs_in_a_data_class_are_seen() -> None:
    from dataclasses import dataclass

    @dataclass
    class Outputs:
        logits: Tensor
        name: str

    class Named(nn.Linear):
        def forward(self, inputs: Tensor) -> Any:
            return Outputs(super().forward(inputs), "logits")

    def loss_fn(module: nn.Module, batch: Steps) -> Tensor:
        outputs = module(batch[0])
        return functional.cross_entropy(outputs.logits if isinstance(outputs, Outputs) else outputs, batch[1])

    torch.manual_seed(2)
    batch = (torch.randn(30, 4).double(), torch.randint(3, (30,)))
    plain, named = nn.Linear(4, 3).double(), Named(4, 3).double()
    named.load_state_dict(plain.state_dict())
    expected, found = (
        hessian_spectrum(Objective(module, [batch], loss_fn=loss_fn), "gauss-newton") for module in (plain, named)
    )
    assert found.eigenvalues == pytest.approx(expected.eigenvalues, abs=1e-12)
