"""The losses of the probe's samples: kept at every measurement, and told of at a transition."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from phasewatch import Watch, load_run
from phasewatch.estimators.probe_loss import SAMPLES_KEPT
from phasewatch.measure import Probe, measure
from phasewatch.schedule import as_schedule
from phasewatch.watch import Monitor

GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(24, 3, generator=GENERATOR)
LABELS = torch.arange(24) % 3
BATCHES = [(INPUTS[:14], LABELS[:14]), (INPUTS[14:], LABELS[14:])]


def cross_entropy(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))


def test_they_are_the_losses_of_the_samples_in_the_order_of_the_probe() -> None:
    found, failures = measure(network(), [], Probe(BATCHES, cross_entropy), 0)
    with torch.no_grad():
        expected = nn.functional.cross_entropy(network()(INPUTS), LABELS, reduction="none")
    assert not failures and found.sample_losses == pytest.approx(expected.tolist(), rel=6e-4)
    assert all(float(f"{loss:.3e}") == loss for loss in found.sample_losses), "four digits"


def over_samples(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """A loss that compares samples: it is no mean of losses of each."""
    return module(batch[0]).var(dim=0).mean()


def drawn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(module, (batch[0] + 0.1 * torch.randn_like(batch[0]), batch[1]))


@pytest.mark.parametrize("loss_fn", [over_samples, drawn])
def test_where_the_loss_is_not_made_of_them_there_are_none(loss_fn: object) -> None:
    found, failures = measure(network(), [], Probe(BATCHES, loss_fn), 0)  # type: ignore[arg-type]
    assert not failures and found.sample_losses == () and found.value("loss") > 0


def test_other_data_leave_those_of_the_probe_and_a_large_probe_keeps_its_first() -> None:
    other, _ = measure(network(), [], Probe(BATCHES, cross_entropy, name="validation"), 0)
    assert other.sample_losses == ()
    large = INPUTS.repeat(200, 1), LABELS.repeat(200)
    found, _ = measure(network(), [], Probe([large], cross_entropy), 0)
    small, _ = measure(network(), [], Probe([(INPUTS, LABELS)], cross_entropy), 0)
    assert len(found.sample_losses) == SAMPLES_KEPT
    assert found.sample_losses[:24] == pytest.approx(small.sample_losses, rel=2e-3)


def test_two_monitors_record_the_samples_of_the_first_probe_alone() -> None:
    """The second measures more often, and on other samples: those would be compared with samples that they are not."""
    first = Monitor((), Probe(BATCHES, cross_entropy), as_schedule(2))
    second = Monitor((), Probe(BATCHES[1:], cross_entropy), as_schedule(1))
    watch = Watch.from_monitors(network(), [first, second], on_error="raise")
    for step in range(3):
        watch.at(step)
    watch.close()
    assert [len(m.sample_losses) for m in watch.run.measurements] == [24, 0, 24]
    assert watch.run.header["labels"] == {"kind": "class", "values": LABELS.tolist()}


def test_a_class_that_is_learnt_late_is_named(tmp_path: Path) -> None:
    """The weights jump from two classes told apart to all three, where only class 2 was wrong before."""
    module = nn.Linear(3, 3, bias=False)
    inputs = torch.eye(3)[LABELS] + 0.01 * INPUTS
    with (
        torch.no_grad(),
        Watch(
            module, [(inputs, LABELS)], loss_fn=cross_entropy, directory=tmp_path, schedule=1, estimators=[]
        ) as watch,
    ):
        for step in range(40):
            module.weight.copy_(torch.diag(torch.tensor([4.0, 4.0, 0.0 if step < 20 else 4.0])))
            module.weight.add_(0.01 * torch.randn(3, 3, generator=GENERATOR))
            watch.at(step)
    [transition] = load_run(tmp_path).transitions
    assert transition.start == 19 and transition.end == 20
    found = load_run(tmp_path).moved(transition)
    assert found is not None and found.classes[0].label == 2
    # log 3 at equal logits, log(1 + 2 exp(-4)) after.
    assert found.classes[0].change == pytest.approx(0.036 - 1.0986, abs=0.05)
    assert {one.label for one in found.samples[:8]} == {2}
