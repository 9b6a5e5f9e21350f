"""The report of a run: one self-contained HTML file made from the run folder's files."""

from .page import inline, show_report, write_report

__all__ = ["inline", "show_report", "write_report"]
