"""What the chains of an estimate saw, draw by draw, for who wants to look at them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from phasewatch.llc.diagnostics import FloatArray


@dataclass(frozen=True, eq=False)
class KeptDraws:
    """The draws of an estimate.

    Attributes:
        name: What was drawn: ``loss`` (above that of w*, on the batch of the draw) or ``divergence``.
        values: Of each draw, shape ``(chains, draws)``.
        chains: Number of each chain; those that diverged are not there.
        attributes: What is to be known of them, such as ``nbeta``.
    """

    name: str
    values: FloatArray
    chains: tuple[int, ...]
    attributes: Mapping[str, float]

    def __repr__(self) -> str:
        """What, and how many."""
        return f"KeptDraws({self.name}, {self.values.shape[0]} chains of {self.values.shape[1]} draws)"

    def to_xarray(self) -> Any:
        """The draws as an ``xarray.Dataset`` of one variable, with dimensions ``chain`` and ``draw``.

        Raises:
            ImportError: If xarray is not installed.
        """
        coordinates = {"chain": list(self.chains), "draw": np.arange(self.values.shape[1])}
        variables = {self.name: (("chain", "draw"), self.values)}
        return _imported("xarray").Dataset(variables, coords=coordinates, attrs=dict(self.attributes))

    def to_arviz(self) -> Any:
        """The draws as ArviZ takes them, in its group ``posterior``: ``arviz.summary(estimate.to_arviz())``.

        Returns:
            An ``arviz.InferenceData``; from ArviZ 1.0 on an ``xarray.DataTree``.

        Raises:
            ImportError: If ArviZ is not installed.
        """
        arviz = _imported("arviz")
        convert = getattr(arviz, "convert_to_datatree", None) or arviz.convert_to_inference_data
        return convert(self.to_xarray())


def existing(draws: KeptDraws | None, call: str) -> KeptDraws:
    """The draws.

    Args:
        draws: None where they were not kept, or there are none.
        call: The function whose argument ``keep_draws`` it is.

    Raises:
        ValueError: If there are none.
    """
    if draws is None:
        raise ValueError(f"There are no draws; expected an estimate that was sampled by {call}(..., keep_draws=True).")
    return draws


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"This needs {name}, which is not installed: pip install 'phasewatch[arviz]'") from error
