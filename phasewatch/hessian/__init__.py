"""The spectrum of the Hessian and of the Gauss-Newton matrix: operators, eigenvalues, density, zeros."""

from phasewatch.hessian.density import Density
from phasewatch.hessian.operators import GaussNewtonOperator, HessianOperator
from phasewatch.hessian.spectrum import Spectrum, hessian_spectrum
from phasewatch.hessian.zeros import ZeroCount

__all__ = ["Density", "GaussNewtonOperator", "HessianOperator", "Spectrum", "ZeroCount", "hessian_spectrum"]
