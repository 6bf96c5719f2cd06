"""What a person reads about a run: its transitions as a table, a figure and a page."""

from phasewatch.report.comparison import Comparison, compare_runs, format_comparison, write_comparison
from phasewatch.report.hints import format_hints
from phasewatch.report.html import ReportPaths, write_report
from phasewatch.report.moved import format_moved
from phasewatch.report.table import format_events, format_table
from phasewatch.report.verdict import NAMES, Verdict, verdict

__all__ = [
    "NAMES",
    "Comparison",
    "ReportPaths",
    "Verdict",
    "compare_runs",
    "format_comparison",
    "format_events",
    "format_hints",
    "format_moved",
    "format_table",
    "verdict",
    "write_comparison",
    "write_report",
]
