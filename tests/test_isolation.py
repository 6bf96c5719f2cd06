"""What a measurement is kept from: other processes, which would have to take part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from phasewatch.isolation import CollectiveError, isolated, seed_everything
from phasewatch.watch import Watch


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A group of this process alone, which is told that it has two."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    yield
    monkeypatch.undo()
    dist.destroy_process_group()


COLLECTIVES: dict[str, Callable[[], Any]] = {
    "all_reduce": lambda: dist.all_reduce(torch.ones(2)),
    "all_reduce of a group given": lambda: dist.all_reduce(torch.ones(2), group=dist.group.WORLD),
    "all_gather": lambda: dist.all_gather([torch.empty(2)], torch.ones(2)),
    "all_gather_object": lambda: dist.all_gather_object([None], 3),
    "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(torch.empty(2), torch.ones(2)),
    "broadcast": lambda: dist.broadcast(torch.ones(2), 0),
    "broadcast_object_list": lambda: dist.broadcast_object_list([3], 0),
    "barrier": lambda: dist.barrier(),
    "with gradients": lambda: torch.distributed.nn.functional.all_reduce(torch.ones(2, requires_grad=True)),
}


@pytest.mark.parametrize("name", COLLECTIVES)
def test_what_waits_for_other_processes_is_refused_in_a_measurement_alone(name: str, group: None) -> None:
    call = COLLECTIVES[name]
    call()
    with pytest.raises(CollectiveError, match="waits for other processes"), isolated():
        call()
    call()


def test_a_loss_that_gathers_is_refused_before_training(group: None) -> None:
    def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        outputs = module(batch[0])
        gathered = [torch.empty_like(outputs)]
        dist.all_gather(gathered, outputs)
        return (outputs - batch[1]).square().mean() + gathered[0].mean()

    with pytest.raises(CollectiveError, match="one process alone measures it; give one that does without"):
        Watch(nn.Linear(3, 1), [(torch.randn(8, 3), torch.randn(8, 1))], loss_fn=loss_fn)


def test_what_the_user_has_seeded_for_cuda_before_it_is_initialised_stays() -> None:
    """``torch.manual_seed`` puts the seed off until CUDA is initialised, and the last one put off is taken."""
    with isolated():  # the CPU's stream is put back after the test
        torch.manual_seed(42)
        put_off = torch.cuda._lazy_seed_tracker.manual_seed_all_cb  # type: ignore[attr-defined]
        seed_everything(1)
        assert torch.initial_seed() == 1
        assert torch.cuda._lazy_seed_tracker.manual_seed_all_cb is put_off  # type: ignore[attr-defined]
