"""What a module keeps from one call to the next must not make the loss depend on what was asked before."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from phasewatch import Objective, estimate_llc
from phasewatch.llc import Thresholds


class Cell(nn.Module):
    """A recurrent cell whose hidden state is passed in, or kept from call to call."""

    def __init__(self, keeps: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.into, self.over, self.out = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.keeps = keeps
        self.hidden: Any = {"attribute": torch.zeros(4), "list": [torch.zeros(4)]}.get(keeps, {})
        if keeps == "buffer made later":
            self.register_buffer("late", None)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.keeps == "attribute":
            before = self.hidden
        elif self.keeps == "list":
            before = self.hidden[-1]
        elif self.keeps == "buffer made later":
            before = torch.zeros(4) if self.late is None else self.late
        elif self.keeps == "in place":
            before = self.hidden.setdefault("h", torch.zeros(4)).clone()
        else:
            before = torch.zeros(4)
        hidden = torch.tanh(self.into(inputs) + self.over(before))
        if self.keeps == "attribute":
            self.hidden = hidden.mean(0).detach()
        elif self.keeps == "list":
            self.hidden.append(hidden.mean(0).detach())
        elif self.keeps == "buffer made later":
            self.late = hidden.mean(0).detach()
        elif self.keeps == "in place":
            self.hidden["h"].copy_(hidden.mean(0).detach())
        return self.out(hidden)


def half_squared_error(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return 0.5 * (module(batch[0]) - batch[1]).square().sum(1).mean()


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(12, 3, generator=generator), torch.randn(12, 2, generator=generator)) for _ in range(3)]


@pytest.mark.parametrize("keeps", ["attribute", "list", "buffer made later", "in place"])
def test_each_evaluation_starts_from_the_state_at_the_measurement(keeps: str) -> None:
    """Its twin is a cell without memory, for whom that state is zero."""
    plain = Objective(Cell("nothing"), batches(), loss_fn=half_squared_error)
    module = Cell(keeps)
    keeping = Objective(module, batches(), loss_fn=half_squared_error)
    away = plain.parameters + 0.1
    for vector in (plain.parameters, away, plain.parameters):
        assert torch.equal(keeping.loss(vector), plain.loss(vector))
        assert torch.equal(keeping.gradient(vector), plain.gradient(vector))
    assert torch.equal(keeping.batch_losses, plain.batch_losses)
    settings: dict[str, Any] = {"n": 500, "nbeta": 80.0, "chains": 2, "draws": 40, "burn_in": 30}
    settings["thresholds"] = Thresholds(descent=math.inf)
    one, other = (estimate_llc(objective, **settings) for objective in (keeping, plain))
    assert one.learning_coefficient == pytest.approx(other.learning_coefficient, rel=1e-3)
    kept = module.hidden if keeps != "list" else module.hidden[0]
    assert keeps == "in place" and kept == {} or keeps == "buffer made later" or torch.equal(kept, torch.zeros(4))


def test_values_cached_at_other_parameters_are_computed_anew() -> None:
    class Caching(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 2)
            self.cache: dict[str, Tensor] = {}

        def forward(self, inputs: Tensor) -> Tensor:
            if "scale" not in self.cache:
                self.cache["scale"] = self.weight.detach().norm()
            return super().forward(inputs) / self.cache["scale"].detach()

    # The cached factor is taken for a constant by the gradient, and is none: that much cannot be mended for the user.
    with pytest.raises(ValueError, match="gradient of the loss is not its derivative.*cached"):
        Objective(Caching(), batches(), loss_fn=half_squared_error)


def test_memory_outside_of_the_module_is_refused_with_the_mend() -> None:
    calls = [0]

    def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        calls[0] += 1
        return half_squared_error(module, batch) * (1 + 0.001 * calls[0])

    with pytest.raises(ValueError, match="same parameters and batch gave the losses .* make loss_fn.* compute"):
        Objective(Cell("nothing"), batches(), loss_fn=loss_fn)


def test_losses_that_a_module_collects_do_not_pile_up_with_their_graphs() -> None:
    """As many LightningModules do for the end of the epoch."""

    class Collecting(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 2)
            self.seen: list[Tensor] = []
            self.calls = 0

        def forward(self, inputs: Tensor) -> Tensor:
            self.calls += 1
            self.seen.append(super().forward(inputs))
            return self.seen[-1]

    module = Collecting()
    objective = Objective(module, batches(), loss_fn=half_squared_error)
    plain = nn.Linear(3, 2)
    plain.load_state_dict(module.state_dict())
    expected = Objective(plain, batches(), loss_fn=half_squared_error)
    places = expected.parameters + 0.1 * torch.randn(3, 8)
    for _ in range(3):
        for one, other in zip(
            objective.losses_and_gradients(places), expected.losses_and_gradients(places), strict=True
        ):
            torch.testing.assert_close(one, other)
        assert len(objective.module.seen) <= 1  # type: ignore[arg-type]
    assert module.seen == [] and module.calls == 0
