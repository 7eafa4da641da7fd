"""The report of a run: one page from what it has written in its dump folder."""

from torchtitan.report.write import report_at_end, write_report

__all__ = ["report_at_end", "write_report"]
