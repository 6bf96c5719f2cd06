"""A loss in two parts, against what theory says of each."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from phasewatch.hessian import hessian_spectrum
from phasewatch.objective import NoOutputsError, Objective, split_off_misfit


def _classifier(seed: int, penalty: float = 0.0) -> Objective:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    inputs, labels = torch.randn(30, 5, dtype=torch.float64), torch.randint(3, (30,))

    def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = functional.cross_entropy(module(batch[0]), batch[1])
        return loss + penalty * sum(p.square().sum() for p in module.parameters()) if penalty else loss

    return Objective(network, list(zip(inputs.split(12), labels.split(12), strict=True)), loss_fn=loss_fn)


@pytest.mark.parametrize("penalty", [0.0, 0.1])
def test_the_parts_add_up(penalty: float) -> None:
    """Losses and gradients, for one place and for several at once, past the outputs too."""
    objective = _classifier(0, penalty)
    divergence, misfit = split_off_misfit(objective)
    places = objective.parameters + torch.randn(4, objective.num_parameters, dtype=torch.float64)
    for batch in range(objective.num_batches):
        whole, gradients = objective.losses_and_gradients(places, batch)
        parts = [part.losses_and_gradients(places, batch) for part in (divergence, misfit)]
        assert torch.allclose(parts[0][0] + parts[1][0], whole - objective.batch_losses[batch], atol=1e-12)
        assert torch.allclose(parts[0][1] + parts[1][1], gradients, atol=1e-12)
        assert torch.allclose(misfit.losses(places, batch), parts[1][0], atol=1e-12)


def test_divergence_of_a_classifier_is_kullback_leibler() -> None:
    """From the predictions at w* to those elsewhere, written down directly."""
    objective = _classifier(1)
    divergence, _ = split_off_misfit(objective)
    place = objective.parameters + 0.5
    network, inputs = objective.module, torch.cat([batch[0] for batch in objective.batches])
    logits = [
        torch.func.functional_call(network, objective.unflatten(w), (inputs,)) for w in (objective.parameters, place)
    ]
    expected = functional.kl_div(logits[1].log_softmax(1), logits[0].softmax(1), reduction="batchmean")
    assert divergence.loss(place).item() == pytest.approx(expected.item(), rel=1e-10)


def test_hessian_of_the_divergence_is_the_gauss_newton_matrix() -> None:
    """Two independent ways to the same eigenvalues."""
    objective = _classifier(2)
    divergence, _ = split_off_misfit(objective)
    ours = hessian_spectrum(divergence).eigenvalues
    theirs = hessian_spectrum(objective, "gauss-newton").eigenvalues
    assert ours is not None
    assert theirs is not None
    assert ours == pytest.approx(theirs, abs=1e-8 * float(theirs.max()))


def test_a_loss_made_inside_the_module_has_no_outputs() -> None:
    """There is nothing to see."""

    class Scalar(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).square().mean()

    objective = Objective(Scalar(2, 1), [torch.randn(4, 2)], loss_fn=lambda module, batch: module(batch))
    with pytest.raises(NoOutputsError, match="the loss itself"):
        split_off_misfit(objective)
