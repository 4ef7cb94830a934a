"""The chart in the documents shows the figures of the page of benchmarks."""

import re
import runpy
from pathlib import Path


DOCS = Path(__file__).parents[2] / "docs"


def test_the_chart_shows_the_figures_of_the_tables():
    savings = runpy.run_path(str(DOCS / "pictures.py"))["savings"]
    panels = savings((DOCS / "benchmarks.md").read_text(encoding="utf-8"))
    shown = [
        float(text) for text in re.findall(r">(\d+\.\d\d)</text>", (DOCS / "pictures" / "savings.svg").read_text())
    ]
    assert shown == [value for series in panels.values() for values in series.values() for value in values.values()]
    assert len(shown) == 12
