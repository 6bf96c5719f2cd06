"""The run record: the one ledger that everything writes to and reads from."""

from phasewatch.record.ledger import FILE_NAME, SCHEMA_VERSION, Ledger, RecordError
from phasewatch.record.measurement import Histogram, Measurement
from phasewatch.record.run import Run, Series, find_record, load_run

__all__ = [
    "FILE_NAME",
    "SCHEMA_VERSION",
    "Histogram",
    "Ledger",
    "Measurement",
    "RecordError",
    "Run",
    "Series",
    "find_record",
    "load_run",
]
