"""The run record: the one journal that everything writes to and reads from, and the types that stand in it."""

from phasewatch.record.ending import NOT_CLOSED, Ending
from phasewatch.record.journal import Journal
from phasewatch.record.lines import FILE_NAME, SCHEMA_VERSION, DamagedLine, Gap, RecordError
from phasewatch.record.measurement import Estimate, Histogram, Measurement
from phasewatch.record.moved import Moved, MovedClass, MovedSample
from phasewatch.record.reading import find_record, load_run
from phasewatch.record.run import Run, Series
from phasewatch.record.signals import Signal, describe
from phasewatch.record.trace import Observed, noise_scale
from phasewatch.record.transition import Change, Flag, Transition, standing_transitions

__all__ = [
    "FILE_NAME",
    "NOT_CLOSED",
    "SCHEMA_VERSION",
    "Change",
    "DamagedLine",
    "Ending",
    "Estimate",
    "Flag",
    "Gap",
    "Histogram",
    "Journal",
    "Measurement",
    "Moved",
    "MovedClass",
    "MovedSample",
    "Observed",
    "RecordError",
    "Run",
    "Series",
    "Signal",
    "Transition",
    "describe",
    "find_record",
    "load_run",
    "noise_scale",
    "standing_transitions",
]
