"""The report on logged runs: reads what they logged, and writes one self-contained HTML file or a terminal view."""

from .page import write_report


__all__ = ["write_report"]
