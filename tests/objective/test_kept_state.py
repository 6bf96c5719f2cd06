"""A module as it was, kept for later."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from phasewatch.objective.copies import KeptState


def network() -> nn.Sequential:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3), nn.Dropout(0.5))
    module[2].weight = module[0].weight
    module[0].bias.requires_grad_(False)
    module[3].eval()
    module.memory = {"last": torch.ones(2)}  # type: ignore[assignment]
    return module


def test_it_holds_everything_as_it_was_and_nothing_that_is_shared() -> None:
    module, untouched = network(), network()
    kept = KeptState(module)
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers(), module.memory["last"]]:  # type: ignore[index, list-item]
            tensor.add_(1)
    module.train()
    found = kept.module()
    assert [m.training for m in found.modules()] == [m.training for m in untouched.modules()]
    for (name, ours), (_, theirs) in zip(found.named_parameters(), untouched.named_parameters(), strict=True):
        assert torch.equal(ours, theirs) and ours.requires_grad is theirs.requires_grad, name
        assert isinstance(ours, nn.Parameter)
    assert all(torch.equal(a, b) for a, b in zip(found.buffers(), untouched.buffers(), strict=True))
    assert found[2].weight is found[0].weight  # type: ignore[index]
    assert found.memory["last"].tolist() == [1, 1]  # type: ignore[index, union-attr]
    assert not {id(t) for t in found.parameters()} & {id(t) for t in module.parameters()}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_it_waits_in_main_memory_and_comes_back_to_its_device() -> None:
    module = network().cuda()
    module.register_buffer("here", torch.zeros(2, device="cpu"))
    kept = KeptState(module)
    assert {t.device.type for t in kept._module.parameters()} == {"cpu"}
    found = kept.module()
    assert {t.device for t in found.parameters()} == {t.device for t in module.parameters()}
    assert found.here.device.type == "cpu"  # type: ignore[union-attr]
