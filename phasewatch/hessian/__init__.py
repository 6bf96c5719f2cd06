"""The spectrum of the Hessian and of the Gauss-Newton matrix: operators, eigenvalues, density, zeros."""

from phasewatch.hessian.density import Density
from phasewatch.hessian.effective_rank import EffectiveRank, LayerRank, effective_rank
from phasewatch.hessian.eigenpairs import Eigenpairs, leading_eigenpairs
from phasewatch.hessian.operators import (
    GaussNewtonOperator,
    HessianOperator,
    NoCurvatureError,
    NoSecondDerivativeError,
)
from phasewatch.hessian.spectrum import Spectrum, hessian_spectrum
from phasewatch.hessian.trace import TraceEstimate, hessian_trace
from phasewatch.hessian.zeros import ZeroCount

__all__ = [
    "Density",
    "EffectiveRank",
    "Eigenpairs",
    "GaussNewtonOperator",
    "HessianOperator",
    "LayerRank",
    "NoCurvatureError",
    "NoSecondDerivativeError",
    "Spectrum",
    "TraceEstimate",
    "ZeroCount",
    "effective_rank",
    "hessian_spectrum",
    "hessian_trace",
    "leading_eigenpairs",
]
