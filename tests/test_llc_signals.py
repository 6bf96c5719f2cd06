"""The learning coefficient as signals of a run: of single layers, on other data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from phasewatch import Objective, Watch, estimate_llc
from phasewatch.estimators import HessianSpectrum, LearningCoefficient
from phasewatch.measure import seed_at

SETTINGS: dict[str, Any] = {"chains": 2, "draws": 60, "burn_in": 40, "localization": 1.0}


def mean_squared_error(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return 0.5 * (module(batch[0]) - batch[1]).square().sum(dim=1).mean()


def network_and_data() -> tuple[nn.Module, list[Any], list[Any]]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(60, 3)
    first, second = ([(part, network(part).detach()) for part in half.split(15)] for half in x.split(30))
    return network, first, second


def test_layers_and_other_data_are_series_of_their_own() -> None:
    """Each is what the estimator says by itself."""
    network, probe, validation = network_and_data()
    coefficient = LearningCoefficient(**SETTINGS, refined=("0", "*.bias"))
    watch = Watch(
        network,
        probe,
        loss_fn=mean_squared_error,
        n=500,
        estimators=[coefficient],
        other_data={"validation": validation},
        schedule=1,
        on_error="raise",
    )
    measurement = watch.at(0)
    assert measurement is not None
    for name, batches, part in (
        ("llc", probe, None),
        ("llc_0", probe, "0"),
        ("llc_*.bias", probe, "*.bias"),
        ("llc_validation", validation, None),
        ("llc_validation_0", validation, "0"),
    ):
        objective = Objective(network, batches, loss_fn=mean_squared_error)
        objective = objective.restricted_to(part) if part else objective
        alone = estimate_llc(objective, n=500, seed=seed_at(0, 0), **SETTINGS)  # type: ignore[arg-type]
        assert measurement.value(name) == alone.learning_coefficient
        assert measurement.estimates[name].standard_error == alone.standard_error
    assert {"loss", "loss_validation", "gradient_norm_validation"} <= measurement.estimates.keys()


def test_a_part_that_matches_nothing_is_named() -> None:
    """The failure says what there is; λ of the whole is not lost."""
    network, probe, _ = network_and_data()
    coefficient = LearningCoefficient(**SETTINGS, refined=("encoder",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'encoder' matches no .* 0\.weight"):
        coefficient.read(Objective(network, probe, loss_fn=mean_squared_error), 500, 0)


def test_the_quadratic_value_comes_with_the_spectrum() -> None:
    """At zero residual with seven zero eigenvalues or fewer it lies between rank / 2 less localization and d / 2."""
    network, probe, _ = network_and_data()
    reading = HessianSpectrum().read(Objective(network, probe, loss_fn=mean_squared_error), 10**9, 0)
    assert reading.estimates["llc_quadratic"].value == pytest.approx(reading.estimates["rank_half"].value, abs=0.6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"other_data": {"held out": [1]}}, ValueError, "'held out' is no name"),
        ({"other_data": {"test": []}}, ValueError, "'test'.* is empty"),
        ({"other_data": {"test": [1]}, "estimators": [HessianSpectrum()]}, ValueError, "none is among the estimators"),
    ],
)
def test_bad_other_data(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    """Refused before the first step."""
    network, probe, _ = network_and_data()
    with pytest.raises(error, match=message):
        Watch(network, probe, loss_fn=mean_squared_error, **arguments)


def test_one_name_is_no_list_of_names() -> None:
    """A string would be taken letter by letter."""
    with pytest.raises(TypeError, match=r"expected a list of names, as \['encoder'\]"):
        LearningCoefficient(refined="encoder")  # type: ignore[arg-type]


def test_a_part_that_is_not_there_is_refused_before_training() -> None:
    """It would cost all of λ at every measurement."""
    coefficient = LearningCoefficient(**SETTINGS, refined=("encoder",))  # type: ignore[arg-type]
    batch = (torch.zeros(4, 2), torch.zeros(4, 1))
    with pytest.raises(ValueError, match="'encoder' matches no module or parameter.* one of: weight, bias"):
        Watch(
            nn.Linear(2, 1),
            [batch],
            loss_fn=lambda module, batch: (module(batch[0]) - batch[1]).square().mean(),
            estimators=[coefficient],
        )
