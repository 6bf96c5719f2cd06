"""The zero eigenvalues of a network, by what causes them: symmetries, and units that have degenerated."""

from phasewatch.symmetry.explain import explain_zeros
from phasewatch.symmetry.ledger import GENERIC_KINDS, NON_GENERIC_KINDS, Finding, ZeroLedger
from phasewatch.symmetry.units import NEARLY, Closeness

__all__ = ["GENERIC_KINDS", "NEARLY", "NON_GENERIC_KINDS", "Closeness", "Finding", "ZeroLedger", "explain_zeros"]
