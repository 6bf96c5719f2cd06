"""How far the prior of the function's learning coefficient reaches from w*, tensor by tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from phasewatch.isolation import isolated
from phasewatch.objective import NoOutputsError, Objective
from phasewatch.objective.behavioral import Metric

GAIN = 2.0
"""Variance of a weight times the fan-in: a layer of rectified units then hands on the size of its inputs (He et al.
2015, "Delving deep into rectifiers", eq. 10). On linear networks the learning coefficient at the fine resolution is
within 4 % of the exact one with it, with 1 within 6 %."""
RELATIVE_STEP = 1e-4
"""Factor by which tensors are rescaled to see what that does to the outputs. Chosen: in float64 the error is 1e-8."""
BIAS_VOTE = 1e-6
"""Weight of a bias in the balance: it may be next to zero, and goes along with the weights beside it. Chosen, so that
it decides only where nothing else does."""
FEW, ENOUGH = 2, 16
"""Samples of the first batch that are looked at; four times as many until they have so many outputs for each tensor.
Chosen."""
UNCHANGED = 1e-3
"""Directions of rescaling along which the outputs change by less than this share of what the tensors alone change.
Chosen, between the error of the differences and what a tensor does."""


def prior_spread(objective: Objective, metric: Metric = "loss") -> Tensor:
    """Standard deviation of the Gaussian prior around w*, one for all entries of a tensor.

    It is that of the usual initialisation, ``(2 / fan_in) ** 0.5``, whatever the weights are now: a bias has that of
    the weights beside it, a tensor of one dimension without such (the gain of a normalisation) has fan-in 1. Where
    whole tensors can be rescaled against one another without changing the outputs (a layer before a ReLU or a
    normalisation against the one after it, queries against keys), the scale is that of the balanced network, in which
    the sizes are nearest to the usual ones: rescaled networks have rescaled spreads, and the same learning coefficient.
    The rescalings are found as the null space of the outputs' derivatives in the logarithms of the tensors' sizes, in
    float64 on some samples of the first batch.

    Args:
        objective: The loss, or a function made of it.
        metric: With ``"outputs"``, in which outputs count in units of their own variance, rescaling all of them is
            of no effect either.

    Returns:
        Shape ``(num_parameters,)``.

    Example:
        >>> module = torch.nn.Linear(8, 2)
        >>> def loss_fn(module, batch):
        ...     return module(batch).square().mean()
        >>> spread = prior_spread(Objective(module, [torch.randn(5, 8)], loss_fn=loss_fn))
        >>> spread.unique().tolist()
        [0.5]
    """
    pieces = objective.unflatten(objective.parameters)
    usual = torch.tensor([(GAIN / _fan_in(name, pieces)) ** 0.5 for name in pieces], dtype=torch.float64)
    sizes = torch.stack([piece.double().square().mean().sqrt() for piece in pieces.values()]).cpu()
    votes = torch.tensor([BIAS_VOTE if name.endswith("bias") else 1.0 for name in pieces], dtype=torch.float64)
    spreads = usual * _balance(objective, (sizes / usual).log(), votes, metric).exp()
    entries = [
        torch.full_like(piece.flatten(), float(spread)) for piece, spread in zip(pieces.values(), spreads, strict=True)
    ]
    return torch.cat(entries)


def _fan_in(name: str, pieces: dict[str, Tensor]) -> float:
    """Inputs that an entry of the tensor's first dimension sums over."""
    piece = pieces[name]
    if piece.dim() < 2 and name.endswith("bias"):
        piece = pieces.get(name.removesuffix("bias") + "weight", piece)
    return max(piece.numel() / piece.shape[0], 1.0) if piece.dim() >= 2 else 1.0


def _balance(objective: Objective, logarithms: Tensor, votes: Tensor, metric: Metric) -> Tensor:
    """The part of the logarithms of the sizes that rescalings of no effect can take away; zero for zero tensors."""
    moved = logarithms.isfinite().nonzero().flatten().tolist()
    try:
        effects = _effects(objective, moved, metric)
    except (NoOutputsError, RuntimeError):  # no outputs to look at, or no float64 on this device or in this code
        return torch.zeros_like(logarithms)
    lengths = effects.norm(dim=1)
    seen = [k for k, length in enumerate(lengths.tolist()) if length > 0]
    unseen = [k for k in range(len(moved)) if k not in seen]
    directions = [torch.eye(len(moved), dtype=torch.float64)[unseen]]
    if seen:
        scaled = effects[seen] / lengths[seen, None]
        values, vectors = torch.linalg.eigh(scaled @ scaled.T)
        null = torch.zeros(int((values < UNCHANGED**2).sum()), len(moved), dtype=torch.float64)
        null[:, seen] = (vectors[:, values < UNCHANGED**2] / lengths[seen, None]).T
        directions.append(null)
    weights = votes[moved].sqrt()
    basis = torch.linalg.qr(weights[:, None] * torch.cat(directions).T).Q
    balance = torch.zeros_like(logarithms)
    balance[moved] = basis @ (basis.T @ (weights * logarithms[moved])) / weights
    return balance


def _effects(objective: Objective, moved: list[int], metric: Metric) -> Tensor:
    """Derivatives of the outputs on a few samples in the logarithms of the tensors' sizes, one row a tensor.

    Those for both metrics are from the same evaluations, which the objective remembers.
    """
    key = ("effects of sizes", tuple(objective.parameter_shapes), tuple(moved))
    if key not in objective.known:
        objective.known[key] = _effects_in_both(objective, moved)
    found: Tensor = objective.known[key][metric]
    return found


def _effects_in_both(objective: Objective, moved: list[int]) -> dict[Metric, Tensor]:
    pieces = [piece.double() for piece in objective.unflatten(objective.parameters).values()]
    rows: dict[Metric, list[Tensor]] = {"loss": [], "outputs": []}
    with isolated():
        double = _of_few_samples(objective, ENOUGH * len(moved)).cast(torch.float64)
        for k in moved:
            ends: list[list[Tensor]] = []
            for sign in (1, -1):
                vector = torch.cat([p.flatten() * (1 + sign * RELATIVE_STEP * (i == k)) for i, p in enumerate(pieces)])
                ends.append(double.outputs(vector, 0))
            for name, scaled in (("loss", ends), ("outputs", [[o / o.std() for o in outputs] for outputs in ends])):
                up, down = (torch.cat([output.flatten() for output in outputs]) for outputs in scaled)
                rows[name].append((up - down).cpu() / (2 * RELATIVE_STEP))  # type: ignore[index]
    return {name: torch.stack(several) for name, several in rows.items()}


def _of_few_samples(objective: Objective, outputs: int) -> Objective:
    """The first samples, as many as have so many outputs; all of the first batch where that has less."""
    count = FEW
    while True:
        few = objective.of_few_samples(count)
        found = sum(output.numel() for output in few.outputs(few.parameters, 0))
        if found >= outputs or few.num_samples < count or count >= objective.batch_sizes[0]:
            return few
        count *= 4
