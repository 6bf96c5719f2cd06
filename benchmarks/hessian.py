"""Curvature against its peers, in units of one gradient of the same batch, all measured in one process.

Prints what each tool needs for the ten leading eigenvalues, the trace and the spectral density, with the error that it
achieved, and what the ledger of zeros costs. What is compared is run in turns, round after round, and divided within
the round, so that a load that comes and goes meets all alike. Traces are compared at equal achieved accuracy: each tool
gets the least budget of a few at which its errors over several seeds have a root mean square of 1 %. Then comes the
number of zeros of networks for which theory knows it. Both tables go to benchmarks/results/. Peers (curvlinops,
hessian-eigenthings, PyHessian) are used where they are installed: pip install -r benchmarks/requirements.txt
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import nullity
import numpy as np
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import phasewatch
from phasewatch.hessian import HessianOperator
from phasewatch.hessian.lanczos import lanczos
from phasewatch.isolation import isolated

RESULTS = Path(__file__).parent / "results"
LEADING = 10
DENSITY_STEPS = 100
ROUNDS = 5
ENOUGH = 0.0125
"""Root mean square error over as many seeds as rounds that passes for 1 %, which five seeds know to a third."""


@dataclass(frozen=True)
class Row:
    """One tool on one task: cost in gradients, error as achieved, or why there is none.

    ``phasewatch_beside`` is the time phasewatch took for the task over the time of this tool, the median over rounds;
    in the row of one product it is the time of the ledger of zeros.
    """

    model: str
    task: str
    tool: str
    gradients: float | None
    relative_error: float | None
    note: str = ""
    phasewatch_beside: float | None = None


class Transformer(nn.Module):
    """A causal language model of about 0.6 M parameters."""

    def __init__(self, vocabulary: int = 64, width: int = 128, depth: int = 3, length: int = 32) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits, shape ``(batch, vocabulary, length)``."""
        hidden = self.blocks(self.tokens(tokens) + self.positions, mask=self.mask)
        return self.head(hidden).transpose(1, 2)


def models() -> dict[str, tuple[nn.Module, tuple[Tensor, Tensor]]]:
    """The networks, each trained for a moment so that its spectrum is one of training, and a batch for it."""
    torch.manual_seed(0)
    images, labels = torch.randn(256, 1, 16, 16), torch.randint(10, (256,))
    tokens = torch.cumsum(torch.randint(1, 4, (16, 33)), 1) % 64
    convolutions = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(512, 184), nn.ReLU(), nn.Linear(184, 10),
    )  # fmt: skip
    perceptron = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    found: dict[str, tuple[nn.Module, tuple[Tensor, Tensor]]] = {
        "MLP": (perceptron, (images[:, :, ::2, ::2].contiguous(), labels)),
        "convnet": (convolutions, (images, labels)),
        "transformer": (Transformer(), (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())),
    }
    for module, batch in found.values():
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
        for _ in range(30):
            optimizer.zero_grad()
            loss_fn(module, batch).backward()
            optimizer.step()
        module.eval()
    return found


def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy."""
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


Work = Callable[[int], Any]
"""What a tool does in a round, given its number, which is a seed too."""


class Rounds:
    """Several works in turns, ``ROUNDS`` times, each round with a gradient and a product."""

    def __init__(self, works: dict[str, Work], gradient: Callable[[], Any], product: Callable[[], Any]) -> None:
        """Run all; a work that raises is left out from then on."""
        self.results: dict[str, list[Any]] = {name: [] for name in works}
        self.failures: dict[str, str] = {}
        self._times: dict[str, list[float]] = {name: [] for name in [*works, "gradient", "product"]}
        for number in range(ROUNDS):
            self._times["gradient"].append(statistics.median(seconds(gradient)[0] for _ in range(15)))
            self._times["product"].append(statistics.median(seconds(product)[0] for _ in range(9)))
            for name, work in works.items():
                if name in self.failures:
                    continue
                try:
                    with sdpa_kernel(SDPBackend.MATH):  # peers fail on the other kernels
                        taken, result = seconds(partial(work, number))
                except Exception as error:  # a peer that fails is a result of the comparison
                    self.failures[name] = f"{type(error).__name__}: {error}"[:80]
                    continue
                self._times[name].append(taken)
                self.results[name].append(result)

    def ratio(self, name: str, other: str) -> float:
        """Time of one over time of another, median over the rounds."""
        pairs = zip(self._times[name], self._times[other], strict=True)
        return statistics.median(one / two for one, two in pairs)


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Wall time, and the result."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def phasewatch_tools(module: nn.Module, batch: Any) -> dict[str, Work]:
    """Each task done by phasewatch; making the objective counts."""

    def objective() -> phasewatch.Objective:
        return phasewatch.Objective(module, [batch], loss_fn=loss_fn)

    return {
        "top": lambda seed: phasewatch.leading_eigenpairs(objective(), LEADING, seed=seed, tolerance=1e-3).values,
        "density": lambda seed: _density(objective(), seed),
        "ledger of zeros": lambda _: phasewatch.explain_zeros(module, objective(), dense_below=0),
    }


Trace = Callable[[int], float]
"""An estimate of the trace by seed."""


def phasewatch_traces(module: nn.Module, batch: Any) -> dict[str, Trace]:
    """The tolerance says what it needs."""

    def trace(seed: int) -> float:
        objective = phasewatch.Objective(module, [batch], loss_fn=loss_fn)
        return phasewatch.hessian_trace(objective, seed=seed, tolerance=0.01).value

    return {"tolerance 1 %": trace}


def curvlinops_traces(module: nn.Module, batch: Any) -> dict[str, Trace]:
    """XTrace with more and more products."""
    import curvlinops

    parameters = [p for p in module.parameters() if p.requires_grad]

    def trace(seed: int, products: int) -> float:
        torch.manual_seed(seed)
        operator = curvlinops.HessianLinearOperator(module, nn.CrossEntropyLoss(), parameters, [batch])
        return float(curvlinops.xtrace(operator, products))

    return {f"XTrace, {n} products": partial(trace, products=n) for n in BUDGETS}


def eigenthings_traces(module: nn.Module, batch: Any) -> dict[str, Trace]:
    """Its default, Hutch++, with more and more products."""
    import hessian_eigenthings as he

    def trace(seed: int, products: int) -> float:
        operator = he.HessianOperator(module, [batch], he.supervised_loss(nn.CrossEntropyLoss()))
        return float(he.trace(operator, num_matvecs=products, seed=seed).estimate)

    return {f"Hutch++, {n} products": partial(trace, products=n) for n in BUDGETS}


def pyhessian_traces(module: nn.Module, batch: Any) -> dict[str, Trace]:
    """Its default rule, which stops where one more vector changes the mean by less than 0.1 %; then without rule."""
    from pyhessian import hessian

    def trace(seed: int, **limits: float) -> float:
        torch.manual_seed(seed)
        return float(np.mean(hessian(module, nn.CrossEntropyLoss(), data=batch, cuda=False).trace(**limits)))

    unlimited = {f"{n} vectors": partial(trace, maxIter=n, tol=0.0) for n in BUDGETS}
    return {"its own rule": trace, **unlimited}


BUDGETS = (32, 100, 316)
"""Products that peers are given for the trace."""


def _density(objective: phasewatch.Objective, seed: int) -> tuple[np.ndarray, np.ndarray]:
    with isolated():
        start = torch.randn(objective.num_parameters, generator=torch.Generator().manual_seed(seed))
        run = lanczos(HessianOperator(objective), start, DENSITY_STEPS)
        return run.ritz_values, run.weights


def curvlinops_tools(module: nn.Module, batch: Any) -> dict[str, Work]:
    """The operator of curvlinops under SciPy's ARPACK, and its XTrace."""
    import curvlinops

    parameters = [p for p in module.parameters() if p.requires_grad]

    def operator() -> Any:
        return curvlinops.HessianLinearOperator(module, nn.CrossEntropyLoss(), parameters, [batch])

    def top(seed: int) -> np.ndarray:
        linear = operator().to_scipy()
        start = np.random.default_rng(seed).normal(size=linear.shape[0]).astype(np.float32)
        return np.asarray(eigsh(linear, k=LEADING, which="LM", tol=1e-3, v0=start, return_eigenvectors=False))

    return {"top": top}


def eigenthings_tools(module: nn.Module, batch: Any) -> dict[str, Work]:
    """hessian-eigenthings as its README uses it."""
    import hessian_eigenthings as he

    def operator() -> Any:
        return he.HessianOperator(module, [batch], he.supervised_loss(nn.CrossEntropyLoss()))

    return {
        "top": lambda seed: he.lanczos(operator(), k=LEADING, seed=seed).eigenvalues.numpy(),
        "top, 64 steps": lambda seed: he.lanczos(operator(), k=LEADING, max_iter=64, reorthogonalize=True, seed=seed)
        .eigenvalues.numpy(),
        "density": lambda seed: he.spectral_density(operator(), num_runs=1, lanczos_steps=DENSITY_STEPS, seed=seed),
    }  # fmt: skip


def pyhessian_tools(module: nn.Module, batch: Any) -> dict[str, Work]:
    """PyHessian with its defaults."""
    from pyhessian import hessian

    def computer() -> Any:
        return hessian(module, nn.CrossEntropyLoss(), data=batch, cuda=False)

    return {
        "top": lambda _: np.array(computer().eigenvalues(top_n=LEADING)[0]),
        "density": lambda _: computer().density(iter=DENSITY_STEPS, n_v=1),
    }


Tasks = Callable[[nn.Module, Any], dict[str, Work]]
Traces = Callable[[nn.Module, Any], dict[str, Trace]]
TOOLS: dict[str, tuple[str | None, Tasks, Traces]] = {
    "phasewatch": (None, phasewatch_tools, phasewatch_traces),
    "curvlinops": ("curvlinops", curvlinops_tools, curvlinops_traces),
    "hessian-eigenthings": ("hessian_eigenthings", eigenthings_tools, eigenthings_traces),
    "PyHessian": ("pyhessian", pyhessian_tools, pyhessian_traces),
}


def measure(name: str, module: nn.Module, batch: Any) -> list[Row]:
    """All tools on all tasks of one model."""

    def gradient() -> None:
        module.zero_grad()
        loss_fn(module, batch).backward()

    objective = phasewatch.Objective(module, [batch], loss_fn=loss_fn)
    operator = HessianOperator(objective)
    vector = torch.randn(objective.num_parameters)
    run = partial(Rounds, gradient=gradient, product=lambda: operator @ vector)
    here = [tool for tool, (package, *_) in TOOLS.items() if package is None or importlib.util.find_spec(package)]
    rows = [Row(name, "-", tool, None, None, "not installed") for tool in TOOLS if tool not in here]
    tasks = {tool: TOOLS[tool][1](module, batch) for tool in here}
    exact = phasewatch.leading_eigenpairs(objective.to(torch.float64), LEADING, tolerance=1e-9).values
    for kind in ("top", "density", "ledger of zeros"):
        works = {(tool, task): work for tool in here for task, work in tasks[tool].items() if task.startswith(kind)}
        rounds = run({f"{tool}: {task}": work for (tool, task), work in works.items()})
        for tool, task in works:
            key = f"{tool}: {task}"
            if key in rounds.failures:
                rows.append(Row(name, task, tool, None, None, rounds.failures[key]))
                continue
            wrong, note = None, ""
            if kind == "top":
                errors = [_worst_error(np.asarray(found, dtype=float), exact) for found in rounds.results[key]]
                wrong, note = statistics.median(errors), f"at worst {max(errors):.2%}"
            beside = rounds.ratio(f"phasewatch: {kind}", key)
            rows.append(Row(name, task, tool, rounds.ratio(key, "gradient"), wrong, note, beside))
            print(rows[-1], flush=True)
    beside = rounds.ratio("phasewatch: ledger of zeros", "product")
    rows.append(Row(name, PRODUCT, "phasewatch", rounds.ratio("product", "gradient"), None, "", beside))
    return rows + measure_traces(
        name, {tool: TOOLS[tool][2](module, batch) for tool in here}, _exact_trace(objective), run
    )


PRODUCT = "one product, graph kept"


def measure_traces(
    name: str, traces: dict[str, dict[str, Trace]], exact: float, run: Callable[[dict[str, Work]], Rounds]
) -> list[Row]:
    """Budget after budget for each tool, until one is enough, each time beside phasewatch's own."""
    rows: list[Row] = []
    ((own_budget, own),) = traces.pop("phasewatch").items()
    left = {tool: list(budgets.items()) for tool, budgets in traces.items()}
    first = True
    while first or any(left.values()):
        works = {tool: budgets[0] for tool, budgets in left.items() if budgets}
        with_own = {"phasewatch": (own_budget, own), **works}
        rounds = run({tool: trace for tool, (_, trace) in with_own.items()})
        for tool, (budget, _) in with_own.items() if first else works.items():
            if tool in rounds.failures:
                rows.append(Row(name, "trace", tool, None, None, rounds.failures[tool]))
                left[tool] = []
                continue
            wrong = float(np.sqrt(np.mean(np.square(np.array(rounds.results[tool]) / exact - 1))))
            cost, beside = rounds.ratio(tool, "gradient"), rounds.ratio("phasewatch", tool)
            rows.append(Row(name, "trace", tool, cost, wrong, f"rms of {ROUNDS}, {budget}", beside))
            print(rows[-1], flush=True)
            if tool in left:
                left[tool] = [] if wrong <= ENOUGH else left[tool][1:]
        first = False
    return rows


def _exact_trace(objective: phasewatch.Objective) -> float:
    double = objective.to(torch.float64)
    if objective.num_parameters <= 6000:
        return float(HessianOperator(double).dense().trace())
    return phasewatch.hessian_trace(double, tolerance=0.003, seed=99, max_products=4000).value


def _worst_error(found: np.ndarray, exact: np.ndarray) -> float:
    found = found[np.argsort(-np.abs(found))][: len(exact)]
    if len(found) < len(exact):
        return float("inf")
    return float((np.abs(np.sort(found) - np.sort(exact)) / np.abs(np.sort(exact))).max())


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=["MLP", "convnet", "transformer"], help="measure these anew, keep the others' rows"
    )
    parser.add_argument("--seed", type=int, default=0, help="draws the sizes and weights of the nullity table")
    arguments = parser.parse_args()
    only = arguments.only
    rows: list[Row] = []
    load = os.getloadavg()[0]
    for name, (module, batch) in models().items():
        if only is None or name in only:
            size = sum(p.numel() for p in module.parameters())
            rows += measure(f"{name}, {size:,} parameters", module, batch)
    if only is not None and (RESULTS / "hessian.json").exists():
        before = [Row(**row) for row in json.loads((RESULTS / "hessian.json").read_text())["rows"]]
        rows += [row for row in before if row.model.split(",")[0] not in only]
    table = as_table(rows)
    print(table)
    zeros, _ = nullity.table(arguments.seed)
    print(zeros)
    setting = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "processors": os.cpu_count(),
        "load before and after": [round(load, 1), round(os.getloadavg()[0], 1)],
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "hessian.json").write_text(json.dumps({"setting": setting, "rows": [asdict(r) for r in rows]}, indent=1))
    (RESULTS / "hessian.md").write_text(as_page(rows, setting, zeros))


def as_table(rows: list[Row]) -> str:
    """The costs as Markdown."""
    lines = [
        "| model | task | tool | cost (gradients) | relative error | phasewatch beside it | |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cost = (
            "" if row.gradients is None else f"{row.gradients:.0f}" if row.gradients >= 10 else f"{row.gradients:.2f}"
        )
        error = "" if row.relative_error is None else f"{row.relative_error:.2%}"
        beside = f"{row.phasewatch_beside:.2f}" if row.phasewatch_beside and row.tool != "phasewatch" else ""
        lines.append(f"| {row.model} | {row.task} | {row.tool} | {cost} | {error} | {beside} | {row.note} |")
    return "\n".join(lines)


BARS = {"top": 0.6, "trace": 1.0, "density": 1.0}
"""Cost wanted, relative to the fastest peer that is right to 1 %."""


def verdict(rows: list[Row]) -> str:
    """Which bars are reached and which are missed."""
    lines = []
    for model in dict.fromkeys(row.model for row in rows):
        for task, bar in BARS.items():
            done = [r for r in rows if r.model == model and r.task.startswith(task) and r.gradients is not None]
            right = [r for r in done if r.tool != "phasewatch" and (r.relative_error or 0.0) <= ENOUGH]
            right = [r for r in right if r.phasewatch_beside is not None]
            own = next((r for r in done if r.tool == "phasewatch"), None)
            if own is None or not right:
                continue
            # The fastest peer is the one beside which phasewatch looks slowest.
            fastest = max(right, key=lambda r: r.phasewatch_beside or 0.0)
            ratio = fastest.phasewatch_beside or 0.0
            wrong = own.relative_error or 0.0
            said = "reached" if ratio <= bar and wrong <= ENOUGH else "**missed**"
            said += f" (off by {wrong:.1%} itself)" if wrong > ENOUGH else ""
            lines.append(f"- {model}, {task}: {ratio:.2f} x {fastest.tool}, the bar is {bar}: {said}.")
        product = next((r for r in rows if r.model == model and r.task == PRODUCT), None)
        if product is not None and product.phasewatch_beside:
            ratio = product.phasewatch_beside
            bar_of = "the bar is 20" if model.startswith("transformer") else "no bar for so small a network"
            said = (": reached" if ratio <= 20 else ": **missed**") if model.startswith("transformer") else ""
            lines.append(f"- {model}, ledger of zeros: {ratio:,.0f} products, {bar_of}{said}.")
    missing = {"MLP", "convnet", "transformer"} - {row.model.split(",")[0] for row in rows}
    lines += [f"- {name}: not measured in this run." for name in sorted(missing)]
    return "\n".join(lines)


def as_page(rows: list[Row], setting: dict[str, Any], zeros: str) -> str:
    """What is written to benchmarks/results/hessian.md."""
    return (
        "Written by `make bench-hessian`. Costs are in gradients of the same batch (the ledger runs in float64); "
        "density: 100 Lanczos steps of one probe, for all tools alike.\n\n"
        f"{as_table(rows)}\n\n{setting}\n\nTools take turns, and every figure is a median over {ROUNDS} rounds of "
        "ratios within a round; `phasewatch beside it` is the time of phasewatch over that of the tool. The "
        "trace is that of the least budget at which five seeds have errors of 1 % root mean square (1.25 % passes, as "
        "five seeds do not know it better); all budgets tried are listed. A peer that is right to 1 % nowhere is "
        "not compared.\n\n"
        f"{verdict(rows)}\n\n## Zeros that theory knows\n\n"
        "Sizes and weights are drawn by the seed. `count` is the dense one, `certified` the span of verified "
        f"directions, `unexplained` their difference; the bracket is by Lanczos.\n\n{zeros}\n"
    )


if __name__ == "__main__":
    main()
