"""The run record: the one journal that everything writes to and reads from."""

from phasewatch.record.journal import Journal
from phasewatch.record.lines import FILE_NAME, SCHEMA_VERSION, DamagedLine, Gap, RecordError
from phasewatch.record.measurement import Histogram, Measurement
from phasewatch.record.reading import find_record, load_run
from phasewatch.record.run import Run, Series

__all__ = [
    "FILE_NAME",
    "SCHEMA_VERSION",
    "DamagedLine",
    "Gap",
    "Histogram",
    "Journal",
    "Measurement",
    "RecordError",
    "Run",
    "Series",
    "find_record",
    "load_run",
]
