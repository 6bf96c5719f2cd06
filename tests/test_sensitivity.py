"""The benchmark of the samplers' constants: that it varies each of them, wherever it is read, and puts it back."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cases import Parameters, noisy_bottleneck, regression
from torch import Tensor

import phasewatch
from phasewatch import estimate_behavioral_llc, estimate_llc
from phasewatch.llc import adaptation, behavioral, chains, pilot, pilot_descent, resolved_chains
from phasewatch.objective import Objective

PACKAGE = Path(phasewatch.__file__).parent


@pytest.fixture(scope="module")
def sensitivity() -> Iterator[ModuleType]:
    folder = str(PACKAGE.parent / "benchmarks")
    sys.path.insert(0, folder)
    yield importlib.import_module("sensitivity")
    sys.path.remove(folder)


def tables(sensitivity: ModuleType) -> list[Any]:
    return [
        *(*sensitivity.OF_THE_FUNCTION, *sensitivity.CHECKS_OF_THE_FUNCTION),
        *(*sensitivity.OF_THE_LOSS, *sensitivity.OF_THE_PILOT),
    ]


def parsed(module: str) -> ast.Module:
    path = PACKAGE.joinpath(*module.split(".")[1:])
    return ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8"))


def defined(module: str) -> set[str]:
    """Names of constants of a module."""
    targets = [node.targets[0] for node in parsed(module).body if isinstance(node, ast.Assign)]
    names = {one.id for target in targets for one in ast.walk(target) if isinstance(one, ast.Name)}
    return {name for name in names if name.isupper()}


def test_every_constant_is_varied_or_said_not_to_be(sensitivity: ModuleType) -> None:
    varied: dict[str, set[str]] = {}
    for constant in tables(sensitivity):
        varied.setdefault(constant.modules[0].__name__, set()).add(constant.name)
    left_out = {name for names in sensitivity.LEFT_OUT.values() for name in names}
    assert len(varied) == 9
    for module, names in varied.items():
        assert defined(module) - left_out == names


def test_each_is_varied_in_all_modules_that_read_it(sensitivity: ModuleType) -> None:
    """One that is imported from where it is defined, or is the default of an argument, is a copy."""
    varied: dict[tuple[str, str], set[str]] = {}
    defaults: dict[tuple[str, str], set[str]] = {}
    for constant in tables(sensitivity):
        key = constant.modules[0].__name__, constant.name
        varied.setdefault(key, set()).update(module.__name__ for module in constant.modules)
        of = constant.default_of
        defaults.setdefault(key, set()).update([] if of is None else [of.__name__])
    read: dict[tuple[str, str], set[str]] = {(module, name): {module} for module, name in varied}
    as_default: dict[tuple[str, str], set[str]] = {key: set() for key in varied}
    for path in PACKAGE.rglob("*.py"):
        here = ".".join(["phasewatch", *path.relative_to(PACKAGE).with_suffix("").parts])
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                for name in node.names:
                    read.get((node.module or "", name.name), set()).add(here)
            elif isinstance(node, ast.FunctionDef):
                values = [value for value in (*node.args.defaults, *node.args.kw_defaults) if value is not None]
                for one in (one for value in values for one in ast.walk(value) if isinstance(one, ast.Name)):
                    as_default.get((here, one.id), set()).add(node.name)
    assert varied == read
    assert defaults == as_default


def test_what_is_varied_changes_the_draws_and_is_put_back(sensitivity: ModuleType) -> None:
    """The chains of the function, those of the loss, and the descent before them."""
    short: dict[str, Any] = {"chains": 2, "burn_in": 40, "draws": 64}
    function, loss = regression(4, 2, seed=0), noisy_bottleneck(4, 2, 3, seed=0, samples=400, batch_size=100)
    varied = {(c.modules[-1], c.name): c for c in tables(sensitivity)}

    def found() -> tuple[float, float]:
        of_function, of_loss = estimate_behavioral_llc(function, (0.003,), **short)[0], estimate_llc(loss, **short)
        return of_function.learning_coefficient, of_loss.learning_coefficient

    before = found()
    for module, name, changes in (
        (resolved_chains, "PATH", (True, False)),
        (resolved_chains, "THRESHOLD_DRIFT", (True, False)),
        (behavioral, "STEEPNESS", (False, False)),  # only where the energies are far from those of a quadratic well
        (chains, "THRESHOLD_DRIFT", (False, True)),
        (adaptation, "MOVES_PER_REFRESHMENT", (False, True)),
        (adaptation, "RATE", (False, True)),
    ):
        with sensitivity.varied({varied[module, name]: 2.0}):
            assert tuple(a != b for a, b in zip(found(), before, strict=True)) == changes, name
    assert found() == before


def test_the_default_of_an_argument_is_varied(sensitivity: ModuleType) -> None:
    """A descent along Rosenbrock's valley ends where it may; what goes wrong within leaves nothing behind."""
    constant = next(one for one in sensitivity.OF_THE_PILOT if one.name == "MOST_EVALUATIONS")

    def valley(module: Parameters, batch: Tensor) -> Tensor:
        a, b = module.values
        return 100 * (b - a**2) ** 2 + (1 - a) ** 2 + 0 * batch.sum()

    objective = Objective(Parameters([-1.2, 1.0]), [torch.zeros(1)], loss_fn=valley)
    with pytest.raises(KeyError), sensitivity.varied({constant: 0.5}):
        assert pilot.MOST_EVALUATIONS == 20 and pilot_descent(objective, 1.0, 0.0, negligible=1e-9).gradients <= 21
        raise KeyError
    assert pilot.MOST_EVALUATIONS == 40
    assert 30 < pilot_descent(objective, 1.0, 0.0, negligible=1e-9).gradients <= 41


def test_kinds(sensitivity: ModuleType) -> None:
    """Counts stay counts, shares below 1, factors on their side of 1; twice and half undo one another."""
    assert sensitivity.number(3, 0.5) == 2 and sensitivity.number(1, 0.5) == 1 and sensitivity.number(0.3, 2) == 0.6
    assert sensitivity.share(0.5, 2.0) == pytest.approx(2 / 3)
    assert sensitivity.ratio((0.5, 4.0), 2.0) == (0.25, 16.0) and sensitivity.ratio(1.44, 0.5) == pytest.approx(1.2)
    for constant in tables(sensitivity):
        for factor in (0.5, 2.0):
            changed = constant.kind(constant.value, factor)
            assert changed != constant.value, constant.name
            if constant.kind is sensitivity.share:
                assert 0 < changed < 1


def test_where_there_is_no_estimate_it_stands_out(sensitivity: ModuleType) -> None:
    usual = [sensitivity.Row("the default", "", [[0.01, 0.03], [0.02, 0.05]], 1.0, 1.0)]
    for errors, expected in (([0.02, 0.02], False), ([0.9, 0.9], True), ([0.02, float("nan")], True)):
        row = sensitivity.Row("RATE", "2", [errors, [0.03, 0.03]], 1.0, 1.0)
        assert sensitivity.stands_out(row, usual) is expected
