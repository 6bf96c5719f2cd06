"""The run record: the one ledger that everything writes to and reads from, and the types that stand in it."""

from phasewatch.record.ledger import FILE_NAME, SCHEMA_VERSION, Ledger, RecordError
from phasewatch.record.measurement import Estimate, Histogram, Measurement
from phasewatch.record.run import Run, Series, find_record, load_run
from phasewatch.record.signals import Signal, describe
from phasewatch.record.transition import Change, Flag, Transition, standing_transitions

__all__ = [
    "FILE_NAME",
    "SCHEMA_VERSION",
    "Change",
    "Estimate",
    "Flag",
    "Histogram",
    "Ledger",
    "Measurement",
    "RecordError",
    "Run",
    "Series",
    "Signal",
    "Transition",
    "describe",
    "find_record",
    "load_run",
    "standing_transitions",
]
