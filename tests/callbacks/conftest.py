import sys
from functools import partial
from pathlib import Path

import pytest

from phasewatch.callbacks import monitors
from phasewatch.estimators import BehavioralCoefficient

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def few_draws_for_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """The callbacks have no setting for it, and what λ of the function says is tested elsewhere."""
    monkeypatch.setattr(
        monitors, "BehavioralCoefficient", partial(BehavioralCoefficient, chains=2, draws=32, burn_in=20)
    )
