"""What the checks at the start must refuse, and what they must let pass: ordinary networks, however written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from phasewatch import Objective, estimate_llc


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 4, generator=generator), torch.randn(8, 1, generator=generator)


def squared_error(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (module(batch[0]) - batch[1]).square().mean()


class Counting(nn.Module):
    """Adds what depends on how often it was called, or on all that it has said."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.way, self.calls = nn.Linear(4, 1), way, 0
        self.total, self.nested = torch.zeros(()), {"seen": []}

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        outputs = self.linear(inputs)
        self.total = self.total + outputs.detach().mean()
        self.nested["seen"].append(outputs)
        if self.way == "every fiftieth":
            return outputs + 5.0 if self.calls % 50 == 0 else outputs
        return outputs + 1e-5 * self.calls if self.way == "slowly" else outputs


@pytest.mark.parametrize("way", ["every fiftieth", "slowly", "no matter"])
def test_what_is_counted_and_collected_starts_anew_each_time(way: str) -> None:
    objective = Objective(Counting(way), [data()], loss_fn=squared_error)
    place = objective.parameters + 0.1
    assert len({float(objective.loss(place)) for _ in range(120)}) == 1
    places = torch.stack([place, place + 0.1])
    for _ in range(3):
        objective.losses_and_gradients(places)
        assert len(objective.module.nested["seen"]) <= 1  # type: ignore[index, arg-type, union-attr]
    assert estimate_llc(objective, n=100, chains=2, draws=30, burn_in=30).n == 100


def test_memory_that_only_later_batches_have() -> None:
    """Truncated back-propagation through time: the first batch of a sequence starts anew, the others go on."""

    class Truncated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.cell, self.hidden = nn.GRUCell(4, 1), torch.zeros(8, 1)

        def forward(self, batch: tuple[Tensor, Tensor, bool]) -> Tensor:
            if batch[2]:
                self.hidden = torch.zeros_like(self.hidden)
            out = self.cell(batch[0], self.hidden)
            self.hidden = out.detach()
            return out

    batches = [(*data(k), k == 0) for k in range(4)]
    objective = Objective(
        Truncated(), batches, loss_fn=lambda m, b: (m(b) - b[1]).square().mean(), batch_sizes=[8, 8, 8, 8]
    )
    found = set()
    for before in range(4):
        objective.loss(batch=before)
        found.add(float(objective.loss(batch=2)))
    assert len(found) == 1


def test_writes_that_autograd_does_not_see() -> None:
    """A target network that follows, through ``.data``; and weights that are clipped in the loss."""

    class Following(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.online, self.target = nn.Linear(4, 1), nn.Linear(4, 1).requires_grad_(False)

    def loss_fn(module: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = (module.online(batch[0]) - module.target(batch[0])).square().mean()
        for follower, leader in zip(module.target.parameters(), module.online.parameters(), strict=True):
            follower.data.mul_(0.996).add_(leader.data, alpha=0.004)
        return loss

    objective = Objective(Following(), [data()], loss_fn=loss_fn)
    assert len({float(objective.loss(objective.parameters + 0.1)) for _ in range(20)}) == 1

    def clipping(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        for parameter in module.parameters():
            parameter.data.clamp_(-0.1, 0.1)
        return squared_error(module, batch)

    torch.manual_seed(0)
    module = nn.Linear(4, 1)
    kept = module.weight.clone()
    with pytest.raises(ValueError, match="gradient of the loss is not its derivative"):
        Objective(module, [data()], loss_fn=clipping)
    assert torch.equal(module.weight, kept)


@pytest.mark.parametrize("few", ["are refused", "have no slope", "are not finite"])
def test_where_few_samples_say_nothing_the_whole_batch_is_checked(few: str) -> None:
    """A gradient that is a third of what it should be, on a batch of whose first half nothing is learned."""

    def not_its_own(module: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        inputs, targets, weights = batch
        if few == "are refused" and len(inputs) < 64:
            raise RuntimeError("expected a batch of 64")
        outputs = module(inputs)
        losses = weights * (outputs + 2 * outputs.detach() - targets).square()
        return losses.sum() / weights.sum() if few == "are not finite" else losses.mean()

    inputs, targets = (torch.cat(parts) for parts in zip(*(data(k) for k in range(8)), strict=True))
    weights = torch.cat([torch.zeros(32, 1), torch.ones(32, 1)])
    if few == "are refused":
        weights = torch.ones(64, 1)
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="gradient of the loss is not its derivative"):
        Objective(nn.Linear(4, 1), [(inputs, targets, weights)], loss_fn=not_its_own)


@pytest.mark.parametrize("wrong", ["behind the first eighth", "in a fifth of all", "in one class of those in order"])
def test_what_is_wrong_for_some_samples_alone_is_refused(wrong: str) -> None:
    """A slope that is twice what it should be, which the first samples may show nothing of."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    inputs, labels = torch.randn(64, 4), torch.arange(64) * 3 // 64
    chosen = {"behind": torch.arange(64) >= 8, "in a": torch.arange(64) % 5 == 4, "in one": labels == 2}

    def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        outputs = module(batch[0])
        doubled = torch.where(batch[2][:, None], 2 * outputs - outputs.detach(), outputs)
        return nn.functional.cross_entropy(doubled, batch[1])

    batch = inputs, labels, next(mask for name, mask in chosen.items() if wrong.startswith(name))
    with pytest.raises(ValueError, match="gradient of the loss is not its derivative"):
        Objective(module, [batch], loss_fn=loss_fn)
    Objective(module, [(*batch[:2], torch.zeros(64, dtype=torch.bool))], loss_fn=loss_fn)


def test_few_samples_leave_nothing_behind_in_the_module() -> None:
    """What a whole batch does not change, and so is not given back before each evaluation."""

    class Remembering(nn.Linear):
        smallest = 64

        def forward(self, inputs: Tensor) -> Tensor:
            self.smallest = min(self.smallest, len(inputs))
            return super().forward(inputs) * self.smallest

    torch.manual_seed(0)
    inputs, targets = (torch.cat(parts) for parts in zip(*(data(k) for k in range(8)), strict=True))
    module = Remembering(4, 1)
    module.smallest = 64
    objective = Objective(module, [(inputs, targets)], loss_fn=squared_error)
    assert float(objective.loss()) == objective.mean_loss


def test_parameters_that_are_reached_past_the_module_are_refused() -> None:
    class Closure(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.head = nn.Linear(4, 4), nn.Linear(4, 1)
            self.hidden = lambda inputs: torch.tanh(self.linear(inputs))

        def forward(self, inputs: Tensor) -> Tensor:
            return self.head(self.hidden(inputs))

    with pytest.raises(ValueError, match="past the module that loss_fn.* closes over"):
        Objective(Closure(), [data()], loss_fn=squared_error)
    outer = nn.Linear(4, 1)
    with pytest.raises(ValueError, match="past the module that loss_fn"):
        Objective(outer, [data()], loss_fn=lambda m, b: squared_error(m, b) + outer.weight.square().sum())


def test_a_loss_that_takes_gradients_of_its_own() -> None:
    """As physics-informed networks and gradient penalties do, with no word of ``enable_grad``."""

    def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs = batch[0].clone().requires_grad_()
        outputs = module(inputs)
        (slope,) = torch.autograd.grad(outputs.sum(), inputs, create_graph=True)
        return (slope.square().sum(1) - 1).square().mean() + (outputs - batch[1]).square().mean()

    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
    objective = Objective(module, [data()], loss_fn=loss_fn)
    own = loss_fn(module, data())
    own.backward()
    expected = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
    torch.testing.assert_close(objective.gradient(), expected)


def test_padding_in_a_transformer_in_evaluation() -> None:
    """PyTorch's way without gradients puts zeros where the mask is; the one with gradients does not."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    module = nn.ModuleDict({"body": nn.TransformerEncoder(layer, 2), "head": nn.Linear(4, 1)})
    inputs, mask = torch.randn(8, 5, 4), torch.arange(5) >= torch.randint(2, 5, (8, 1))

    def loss_fn(module: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (module["head"](module["body"](batch[0], src_key_padding_mask=batch[1]).mean(1)) - 1).square().mean()

    objective = Objective(module, [(inputs, mask)], loss_fn=loss_fn)
    place = objective.parameters + 0.01
    with torch.no_grad():
        assert float(objective.loss(place)) == pytest.approx(float(objective.loss_and_gradient(place)[0]), rel=1e-6)


def test_a_batch_with_nothing_to_lose() -> None:
    """All of its labels are left out: its loss is a constant, and its gradient zero."""

    def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor, bool]) -> Tensor:
        return squared_error(module, batch[:2]) if batch[2] else torch.zeros(())

    torch.manual_seed(0)
    module = nn.Linear(4, 1)
    for order in ([True, False], [False, True]):
        batches = [(*data(k), some) for k, some in enumerate(order)]
        objective = Objective(module, batches, loss_fn=loss_fn)
        plain = Objective(module, [batches[order.index(True)][:2]], loss_fn=squared_error)
        torch.testing.assert_close(objective.gradient(), plain.gradient() / 2)


def test_scripted_modules() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    scripted, expected = (Objective(m, [data()], loss_fn=squared_error) for m in (torch.jit.script(plain), plain))
    place = expected.parameters + 0.1
    torch.testing.assert_close(scripted.gradient(place), expected.gradient(place))


def test_another_temperature_is_another_network_however_small_the_loss() -> None:
    """A traced program of the first must not serve the second."""

    class Tempered(nn.Linear):
        temperature = 1.0

        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs) * self.temperature

    def tiny(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return 1e-9 * squared_error(module, batch)

    torch.manual_seed(0)
    module = Tempered(4, 1)
    for temperature in (1.0, 3.0, 3.0001):
        module.temperature = temperature
        objective = Objective(module, [data()], loss_fn=tiny)
        places = objective.parameters + torch.randn(2, 5)
        together = objective.losses_and_gradients(places)
        singles = [objective.loss_and_gradient(place) for place in places]
        losses = torch.stack([loss for loss, _ in singles])
        torch.testing.assert_close(together[0].to(losses), losses, rtol=1e-5, atol=0.0)
        torch.testing.assert_close(together[1], torch.stack([slope for _, slope in singles]), rtol=1e-4, atol=1e-15)


@pytest.mark.parametrize("seed", range(4))
def test_rough_and_flat_losses_are_let_pass(seed: int) -> None:
    """Where the slope is lost in rounding, and where it holds over the shortest ways alone."""
    torch.manual_seed(seed)
    batch = data(seed)
    soft, flat = nn.Linear(4, 1), nn.Linear(4, 1)
    Objective(soft, [batch], loss_fn=lambda m, b: 1 + nn.functional.softplus(m(b[0]) - 60).mean())
    Objective(flat, [batch], loss_fn=lambda m, b: 1000 + 1e-4 * (m(b[0]).float() - b[1].float()).square().mean())
    sure = nn.Linear(4, 2)
    with torch.no_grad():
        sure.weight.mul_(0.1)
        sure.bias.copy_(torch.tensor([40.0, 0.0]))  # double precision adds nothing to one at e^-40
    Objective(sure, [batch], loss_fn=lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1].long().flatten() * 0))
    rnn = nn.RNN(4, 16, batch_first=True)
    with torch.no_grad():
        rnn.weight_hh_l0.copy_(2 * torch.linalg.qr(torch.randn(16, 16))[0])
    sequences = torch.randn(8, 60, 4)
    Objective(rnn, [sequences], loss_fn=lambda m, b: m(b)[0][:, -1].square().mean())
    lstm = nn.LSTM(4, 8, batch_first=True)
    with torch.no_grad():
        for parameter in lstm.parameters():
            parameter.mul_(10)
    Objective(lstm, [sequences], loss_fn=lambda m, b: m(b)[0][:, -1].square().mean())
