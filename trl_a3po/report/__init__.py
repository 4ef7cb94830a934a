"""A report on what runs have logged: one HTML file that needs nothing else. `trl-a3po report --help`."""

from .page import write_report


__all__ = ["write_report"]
