"""How far a network's function has moved, against what is known of it from the outputs alone."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from phasewatch import hessian_spectrum, split_off_misfit
from phasewatch.objective import ConstantOutputsError, NoOutputsError, Objective, start
from phasewatch.objective.program import Program

Batch = tuple[Tensor, Tensor]
SIZES = (12, 5, 13)


def cross_entropy(module: nn.Module, batch: Batch) -> Tensor:
    return functional.cross_entropy(module(batch[0]), batch[1])


def half_squared_error(module: nn.Module, batch: Batch) -> Tensor:
    return 0.5 * (module(batch[0]) - batch[1]).square().sum(1).mean()


def network(seed: int = 0, dtype: torch.dtype = torch.float64, width: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, width)).to(dtype)


def in_batches(*columns: Tensor) -> list[Any]:
    return list(zip(*(column.split(SIZES) for column in columns), strict=True))


def data(dtype: torch.dtype = torch.float64) -> Batch:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(sum(SIZES), 5, generator=generator, dtype=torch.float64)
    return inputs.to(dtype), torch.randint(3, (sum(SIZES),), generator=generator)


def classifier(dtype: torch.dtype = torch.float64) -> Objective:
    return Objective(network(dtype=dtype), in_batches(*data(dtype)), loss_fn=cross_entropy)


def regression() -> Objective:
    inputs, labels = data()
    return Objective(network(), in_batches(inputs, functional.one_hot(labels, 3).double()), loss_fn=half_squared_error)


def outputs_at(objective: Objective, place: Tensor) -> Tensor:
    inputs = torch.cat([batch[0] for batch in objective.batches])
    found: Tensor = torch.func.functional_call(objective.module, objective.tensors_at(place), (inputs,))
    return found


def relative_entropy(objective: Objective, place: Tensor) -> Tensor:
    before, after = (outputs_at(objective, w).log_softmax(1) for w in (objective.parameters, place))
    return (before.exp() * (before - after)).sum(1).mean()


def half_squared_distance(objective: Objective, place: Tensor) -> Tensor:
    return 0.5 * (outputs_at(objective, place) - outputs_at(objective, objective.parameters)).square().sum(1).mean()


@pytest.mark.parametrize(("make", "expected"), [(classifier, relative_entropy), (regression, half_squared_distance)])
def test_it_is_the_divergence_that_belongs_to_the_loss(
    make: Callable[[], Objective], expected: Callable[[Objective, Tensor], Tensor]
) -> None:
    """Over batches of unequal sizes, of some of the parameters, with gradients, in one call for several places."""
    objective = make()
    moved = objective.behavioral()
    places = objective.parameters + 0.4 * torch.randn(3, objective.num_parameters, dtype=torch.float64)
    values, gradients = moved.losses_and_gradients(places)
    for place, value, gradient in zip(places, values, gradients, strict=True):
        vector = place.clone().requires_grad_()
        exact = expected(objective, vector)
        (slope,) = torch.autograd.grad(exact, vector)
        assert float(value) == pytest.approx(exact.item(), rel=1e-10)
        torch.testing.assert_close(gradient, slope, rtol=1e-9, atol=1e-13)
    assert float(moved.loss()) == 0.0 and float(moved.gradient().abs().max()) < 1e-15
    for part in (moved.restricted_to("2"), objective.restricted_to("2").behavioral()):
        whole = objective.parameters.clone()
        whole[-part.num_parameters :] += 0.3
        assert float(part.loss(part.parameters + 0.3)) == pytest.approx(expected(objective, whole).item(), rel=1e-10)


def test_single_precision_resolves_small_divergences() -> None:
    """The loss itself, as a difference of losses, is off by more than 1e-3 there."""
    objective = classifier(torch.float32)
    moved, exact = objective.behavioral(), objective.to(torch.float64).behavioral()
    torch.manual_seed(3)
    direction = torch.randn(4, objective.num_parameters)
    for size in (1e-1, 1e-2, 1e-3):
        places = objective.parameters + size * direction
        values, gradients = moved.losses_and_gradients(places)
        expected, slopes = exact.losses_and_gradients(places.double())
        assert gradients.dtype == torch.float32
        # outputs of size one have a rounding of 1e-7, and have moved by as much as the parameters
        torch.testing.assert_close(values.double(), expected, rtol=1e-6 + 1e-6 / size, atol=0.0)
        torch.testing.assert_close(gradients.double(), slopes, rtol=0.0, atol=2e-6 / size * float(slopes.abs().max()))
    assert float(moved.to(torch.float64).loss(places[0].double())) == pytest.approx(expected[0].item(), rel=1e-10)


@pytest.mark.parametrize("metric", ["loss", "outputs"])
def test_one_program_serves_all_evaluations(metric: Any) -> None:
    moved = classifier(torch.float32).behavioral(metric)
    moved.losses_and_gradients(moved.parameters + torch.zeros(4, 1), 0)
    assert [type(program) for program in moved._vectorized._programs.values()] == [Program]


def test_what_a_unit_of_the_loss_means_can_be_given() -> None:
    """Half a squared error with noise of standard deviation .5 is four times as many nats."""
    objective = regression()
    place = objective.parameters + 0.2
    four = objective.behavioral(nats_per_loss=4.0)
    assert float(four.loss(place)) == pytest.approx(4 * half_squared_distance(objective, place).item(), rel=1e-12)
    assert float(four.to(torch.float32).loss(place.float())) == pytest.approx(float(four.loss(place)), rel=1e-5)
    for wrong in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="nats_per_loss"):
            objective.behavioral(nats_per_loss=wrong)
    with pytest.raises(ValueError, match="no meaning"):
        objective.behavioral("outputs", nats_per_loss=2.0)
    with pytest.raises(ValueError, match="expected 'loss' or 'outputs'"):
        objective.behavioral("logits")  # type: ignore[arg-type]


# In the outputs


def in_units_of_variance(before: Tensor, after: Tensor, *, centred: bool) -> Tensor:
    """Written down directly; shape (samples and positions, outputs)."""
    if centred:
        before, after = (x - x.mean(1, keepdim=True) for x in (before, after))
    return 0.5 * ((after - before).square().sum(1) / before.var(0, correction=0).mean()).mean()


@pytest.mark.parametrize("make", [classifier, regression])
def test_distance_of_the_outputs(make: Callable[[], Objective]) -> None:
    """A shift of all logits is no distance for a classifier, and is one for a regression."""
    objective = make()
    moved = objective.behavioral("outputs")
    place = objective.parameters + 0.2 * torch.randn(objective.num_parameters, dtype=torch.float64)
    before, after = (outputs_at(objective, w) for w in (objective.parameters, place))
    expected = in_units_of_variance(before, after, centred=make is classifier)
    assert float(moved.loss(place)) == pytest.approx(expected.item(), rel=1e-10)
    shifted = objective.parameters.clone()
    shifted[-3:] += 0.7
    assert (float(moved.loss(shifted)) < 1e-20) == (make is classifier)
    part = moved.restricted_to("0")
    assert float(part.loss(part.parameters + 0.1)) > 0
    single = moved.to(torch.float32)
    assert float(single.loss(place.float())) == pytest.approx(expected.item(), rel=1e-5)


def test_more_confidence_is_no_other_function() -> None:
    """Logits times 16, at w* and everywhere: the distance is the same, while the divergence of the loss is not."""
    plain = classifier()
    confident = network()
    with torch.no_grad():
        for tensor in confident[2].parameters():
            tensor.mul_(16)
    loud = Objective(confident, plain.batches, loss_fn=cross_entropy)
    change = torch.zeros_like(plain.parameters)
    change[:24] = 0.1
    found = [[float(o.behavioral(m).loss(o.parameters + change)) for o in (plain, loud)] for m in ("outputs", "loss")]  # type: ignore[arg-type]
    assert found[0][1] == pytest.approx(found[0][0], rel=1e-10)
    assert not 0.5 < found[1][1] / found[1][0] < 2


class Tagger(nn.Module):
    """Logits for each position of a sequence, with the classes last or in the middle, and something beside them."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.hidden, self.head, self.transposed = nn.Linear(5, 6), nn.Linear(6, 7), transposed

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.hidden(inputs))
        logits = self.head(hidden)
        return logits.transpose(1, 2) if self.transposed else logits, hidden


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("saturated", [False, True])
def test_positions_that_the_loss_ignores_are_left_out(transposed: bool, saturated: bool) -> None:
    """Not those that are right to the last digit, and not what is returned beside the logits."""
    tagger = Tagger(transposed).double()
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(30, 4, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(7, (30, 4), generator=generator)
    if saturated:
        with torch.no_grad():
            tagger.head.weight.mul_(1e4)
            logits = tagger(inputs)[0]
            labels = (logits if transposed else logits.transpose(1, 2)).argmax(1)
    labels[::2, 2:] = -100

    def loss_fn(module: nn.Module, batch: Batch) -> Tensor:
        logits, _ = module(batch[0])
        return functional.cross_entropy(logits if transposed else logits.transpose(1, 2), batch[1])

    objective = Objective(tagger, [(inputs, labels)], loss_fn=loss_fn)
    place = objective.parameters * 1.05
    seen = labels != -100
    before, after = (
        torch.func.functional_call(tagger, objective.unflatten(w), (inputs,))[0] for w in (objective.parameters, place)
    )
    if transposed:
        before, after = before.transpose(1, 2), after.transpose(1, 2)
    expected = in_units_of_variance(before[seen], after[seen], centred=True)
    assert float(objective.behavioral("outputs").loss(place)) == pytest.approx(expected.item(), rel=1e-9)


def test_outputs_that_are_alike_have_no_distance_yet() -> None:
    """A head that starts at zero; the divergence is there."""
    module = network()
    nn.init.zeros_(module[2].weight)
    nn.init.zeros_(module[2].bias)
    objective = Objective(module, in_batches(*data()), loss_fn=cross_entropy)
    with pytest.raises(ConstantOutputsError, match="the same for every sample"):
        objective.behavioral("outputs")
    place = objective.parameters + 0.2
    place[-1] += 1
    moved = objective.behavioral()
    assert not moved.doubts
    assert float(moved.loss(place)) == pytest.approx(relative_entropy(objective, place).item(), rel=1e-10)


# Larger than memory


@pytest.mark.parametrize("read", ["loss", "outputs", "misfit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_that_are_not_held_give_the_same(
    read: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = classifier(dtype)
    places = objective.parameters + 0.3 * torch.randn(3, objective.num_parameters, dtype=dtype)

    def found() -> list[Tensor]:
        moved = split_off_misfit(objective) if read == "misfit" else (objective.behavioral(read),)
        return [
            tensor
            for m in moved
            for part in [m.restricted_to("2")]
            for tensor in (
                *m.losses_and_gradients(places, 1),
                m.losses(places),
                m.loss(places[0]),
                *part.loss_and_gradient(part.parameters + 0.1),
                m.to(torch.float64).loss(places[0].double()),
            )
        ]

    held = found()
    monkeypatch.setattr(start, "LARGEST_OUTPUTS", 0)
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    for one, other in zip(held, found(), strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance)


def test_nothing_that_is_held_grows_with_the_number_of_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    def live(batches: int, limit: int) -> int:
        monkeypatch.setattr(start, "LARGEST_OUTPUTS", limit)
        generator = torch.Generator().manual_seed(6)
        given = [(torch.randn(8, 5, generator=generator).double(), torch.arange(8)) for _ in range(batches)]
        objective = Objective(network(width=37), given, loss_fn=cross_entropy)
        kept = [objective.behavioral(), objective.behavioral("outputs"), *split_off_misfit(objective)]
        for moved in kept if not limit else []:
            moved.losses_and_gradients(moved.parameters + torch.zeros(2, 1))
        gc.collect()
        return sum(type(found) is Tensor and found.shape == (8, 37) for found in gc.get_objects())

    assert live(9, 0) == live(3, 0)
    assert live(9, 2**20) > live(3, 2**20)


# Losses that are made inside of the network


@dataclass
class Returned:
    loss: Tensor
    logits: Tensor


class Inside(nn.Module):
    """Makes the loss itself, and returns it beside the logits, or alone."""

    def __init__(self, alone: bool, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Sequential(nn.Linear(5, 4), nn.Tanh()), nn.Linear(4, 3)
        self.alone, self.tied = alone, tied

    def logits(self, inputs: Tensor) -> Tensor:
        hidden: Tensor = self.body(inputs)
        if self.tied:
            return functional.linear(hidden, self.head.weight, self.head.bias)
        return self.head(hidden)  # type: ignore[no-any-return]

    def forward(self, inputs: Tensor, labels: Tensor) -> Any:
        logits = self.logits(inputs)
        loss = functional.cross_entropy(logits, labels)
        return loss if self.alone else Returned(loss, logits)


def its_loss(module: nn.Module, batch: Batch) -> Tensor:
    found = module(*batch)
    return found if isinstance(found, Tensor) else found.loss  # type: ignore[no-any-return]


@pytest.mark.parametrize("alone", [True, False])
def test_a_loss_made_inside_is_cut_at_the_head(alone: bool) -> None:
    plain = classifier()
    inside = Objective(Inside(alone).double(), plain.batches, loss_fn=its_loss)
    places = plain.parameters + 0.3 * torch.randn(3, plain.num_parameters, dtype=torch.float64)
    for metric in ("loss", "outputs"):
        one, other = (objective.behavioral(metric) for objective in (plain, inside))  # type: ignore[arg-type]
        torch.testing.assert_close(one.losses(places), other.losses(places), rtol=1e-10, atol=0.0)
    ours, theirs = (hessian_spectrum(objective, "gauss-newton").eigenvalues for objective in (inside, plain))
    assert ours == pytest.approx(theirs, abs=1e-10)
    part = inside.restricted_to("body").behavioral()
    assert float(part.loss(part.parameters + 0.1)) > 0
    assert float(part.loss_and_gradient(part.parameters + 0.1)[1].norm()) > 0


def test_where_it_cannot_be_seen_the_outputs_can_be_given() -> None:
    """A head that is no module: the loss inside depends on it past the last call."""
    plain = classifier()
    module = Inside(alone=True, tied=True).double()
    with pytest.raises(NoOutputsError, match=r"outputs_fn\(module, batch\)"):
        Objective(module, plain.batches, loss_fn=its_loss).behavioral()
    given = Objective(
        module,
        plain.batches,
        outputs_fn=lambda module, batch: {"logits": module.logits(batch[0])},
        loss_fn=lambda outputs, batch: functional.cross_entropy(outputs["logits"], batch[1]),
    )
    places = plain.parameters + 0.3 * torch.randn(3, plain.num_parameters, dtype=torch.float64)
    torch.testing.assert_close(given.losses(places), plain.losses(places), rtol=1e-10, atol=0.0)
    for metric in ("loss", "outputs"):
        one, other = (objective.behavioral(metric) for objective in (plain, given))  # type: ignore[arg-type]
        torch.testing.assert_close(one.losses(places), other.losses(places), rtol=1e-10, atol=0.0)


# What losses there are


def mean_of(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[nn.Module, Batch], Tensor]:
    """Of the first output and a real target."""
    return lambda module, batch: function(module(batch[0])[:, 0], batch[0].sum(1)).mean()


def gaussian_with_its_variance(outputs: Tensor, targets: Tensor) -> Tensor:
    mean, logarithm = outputs[:, 0], outputs[:, 1]
    return 0.5 * (logarithm + (mean - targets).square() * (-logarithm).exp()).mean()


CONVEX: dict[str, Callable[[nn.Module, Batch], Tensor]] = {
    "cross-entropy": cross_entropy,
    "label smoothing": lambda m, b: functional.cross_entropy(m(b[0]), b[1], label_smoothing=0.1),
    "saturated": lambda m, b: functional.cross_entropy(1000 * m(b[0]), b[1]),
    "hinge": lambda m, b: functional.multi_margin_loss(m(b[0]), b[1]),
    "squared": mean_of(lambda f, y: (f - y).square()),
    "absolute": mean_of(lambda f, y: (f - y).abs()),
    "Huber": mean_of(lambda f, y: functional.huber_loss(f, y, reduction="none")),
    "binary": mean_of(lambda f, y: functional.binary_cross_entropy_with_logits(f, (y > 0).to(f), reduction="none")),
    "Poisson": mean_of(lambda f, y: functional.poisson_nll_loss(f, y.abs().round(), reduction="none")),
    "probabilities": lambda m, b: functional.binary_cross_entropy(m(b[0]).sigmoid(), (b[0][:, :3] > 0).to(b[0])),
}
NOT_CONVEX: dict[str, Callable[[nn.Module, Batch], Tensor]] = {
    "Cauchy": mean_of(lambda f, y: ((f - y) / 0.5).square().log1p()),
    "probability of an error": lambda m, b: 1 - m(b[0]).softmax(1).gather(1, b[1][:, None]).mean(),
    "variance too": lambda m, b: gaussian_with_its_variance(m(b[0]), b[0].sum(1)),
    "squared after a sigmoid": mean_of(lambda f, y: ((8 * f).sigmoid() - y.sigmoid()).square()),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [*CONVEX, *NOT_CONVEX])
def test_a_loss_that_is_not_convex_in_the_outputs_is_doubted(name: str, dtype: torch.dtype) -> None:
    loss_fn = {**CONVEX, **NOT_CONVEX}[name]
    moved = Objective(network(dtype=dtype), in_batches(*data(dtype)), loss_fn=loss_fn).behavioral()
    assert bool(moved.doubts) == (name in NOT_CONVEX)
    assert moved.restricted_to("2").doubts == moved.to(torch.float64).doubts == moved.doubts


def test_one_sample_that_bends_the_other_way_is_found() -> None:
    """Two hundred good samples and one outlier, where Tukey's loss is flat."""
    torch.manual_seed(7)
    inputs = torch.randn(201, 5, dtype=torch.float64)
    module = network(width=1)
    targets = module(inputs).detach() + 0.1 * torch.randn(201, 1, dtype=torch.float64)

    def loss_fn(module: nn.Module, batch: Batch) -> Tensor:
        return functional.tanh((module(batch[0]) - batch[1]).square()).mean()

    good = Objective(module, [(inputs[:-1], targets[:-1])], loss_fn=loss_fn)
    targets[-1] += 0.9
    assert Objective(module, [(inputs, targets)], loss_fn=loss_fn).behavioral().doubts
    assert float(good.behavioral().loss(good.parameters + 1e-3)) > 0


class LogProbabilities(nn.Sequential):
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs).log_softmax(-1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)])
def test_log_probabilities_are_taken_for_what_they_are(weight: Tensor | None) -> None:
    """Their loss is linear, and has no divergence of its own; the twin makes them of logits."""
    inputs, labels = data()
    labels[3:7] = -100
    batches = in_batches(inputs, labels)
    plain = Objective(network(), batches, loss_fn=lambda m, b: functional.cross_entropy(m(b[0]), b[1], weight=weight))
    made = Objective(
        LogProbabilities(*network()), batches, loss_fn=lambda m, b: functional.nll_loss(m(b[0]), b[1], weight=weight)
    )
    places = plain.parameters + 0.3 * torch.randn(3, plain.num_parameters, dtype=torch.float64)
    for metric in ("loss", "outputs"):
        one, other = (objective.behavioral(metric) for objective in (plain, made))  # type: ignore[arg-type]
        for expected, found in zip(one.loss_and_gradient(places[0]), other.loss_and_gradient(places[0]), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)
    assert float(made.behavioral().loss().abs()) < 1e-15


def test_a_linear_loss_of_anything_else_has_no_divergence() -> None:
    objective = Objective(network(), in_batches(*data()), loss_fn=lambda m, b: m(b[0]).mean())
    with pytest.raises(NoOutputsError, match="linear"):
        objective.behavioral()
    assert float(objective.behavioral("outputs").loss(objective.parameters + 0.1)) > 0


def test_a_first_batch_without_labels_hides_nothing() -> None:
    inputs, labels = data()
    labels[: SIZES[0]] = -100

    def loss_fn(module: nn.Module, batch: Batch) -> Tensor:
        losses = functional.cross_entropy(module(batch[0]), batch[1], reduction="sum")
        return losses / (batch[1] != -100).sum().clamp(min=1)

    objective = Objective(network(), in_batches(inputs, labels), loss_fn=loss_fn)
    part = Objective(network(), in_batches(inputs, labels)[1:], loss_fn=loss_fn)
    place = objective.parameters + 0.3
    share = part.num_samples / objective.num_samples
    for metric in ("loss", "outputs"):
        one, other = (float(o.behavioral(metric).loss(place)) for o in (objective, part))  # type: ignore[arg-type]
        assert one == pytest.approx(share * other, rel=1e-10)


def test_batches_of_one_sample_and_scripted_modules() -> None:
    inputs, labels = data()
    plain = Objective(network(), [(inputs, labels)], loss_fn=cross_entropy)
    single = list(zip(inputs.split(1), labels.split(1), strict=True))
    scripted: Any = torch.jit.script(network())
    place = plain.parameters + 0.3
    for metric in ("loss", "outputs"):
        expected = float(plain.behavioral(metric).loss(place))  # type: ignore[arg-type]
        for module, batches in ((network(), single), (scripted, plain.batches)):
            moved = Objective(module, batches, loss_fn=cross_entropy).behavioral(metric)  # type: ignore[arg-type]
            assert float(moved.loss(place)) == pytest.approx(expected, rel=1e-10)


def test_outputs_that_are_not_finite_are_refused() -> None:
    def masked(module: nn.Module, batch: Batch) -> Tensor:
        return functional.cross_entropy(module(batch[0]), batch[1])

    class Masked(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs).masked_fill(torch.arange(4) == 3, -math.inf)

    inputs, labels = data()
    objective = Objective(Masked(5, 4).double(), [(inputs, labels)], loss_fn=masked)
    with pytest.raises(ValueError, match="large negative"):
        objective.behavioral()
