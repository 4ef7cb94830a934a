"""
Makes the pictures of the documents, in `docs/pictures`. `make pictures` runs it.

- `savings.svg`: a chart of the figures in `benchmarks.md`. Needs matplotlib.
- `report.png`: the token view of a run's report, with `python docs/pictures.py RUN_DIR`. Needs Chromium.
"""

import base64
import sys
import tempfile
from pathlib import Path


DOCS = Path(__file__).parent
PICTURES = DOCS / "pictures"
COLORS = {
    "GRPOTrainer": "#9aa0a6",
    "A3POTrainer": "#0072b2",
    "whole step": "#8cc4e8",
    "forward and backward": "#0072b2",
}


def table(text: str, heading: str) -> list[dict[str, str]]:
    """The rows of the table in a section of a Markdown page, by the names of its columns."""
    section = text.split(f"# {heading}\n")[1].split("\n#")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    names, _, *rows = ([cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(names, row, strict=True)) for row in rows]


def savings(text: str) -> dict[str, dict[str, dict[str, float]]]:
    """The figures of the chart in the page of benchmarks: by title of a panel, label, and share of equal rewards."""
    update = [row for row in table(text, "A small model") if (row["sigma"], row["micro-batch"]) == ("0.8", "8")]

    def column(rows: list[dict[str, str]], name: str) -> dict[str, float]:
        return {row["equal rewards"]: float(row[name].split()[0]) for row in rows}

    return {
        "Positions computed per distinct position": {
            "GRPOTrainer": column(update, "positions, GRPO"),
            "A3POTrainer": column(update, "positions, ours"),
        },
        "Times as fast as GRPOTrainer": {
            "whole step": column(table(text, "A whole step"), "transformers"),
            "forward and backward": column(update, "GRPO / ours"),
        },
    }


def draw_savings(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "trl-a3po"})
    panels = savings((DOCS / "benchmarks.md").read_text(encoding="utf-8"))
    picture, axes = pyplot.subplots(1, len(panels), figsize=(9, 2.9), layout="constrained")
    for panel, (title, series) in zip(axes, panels.items(), strict=True):
        for i, (label, values) in enumerate(series.items()):
            places = [place + 0.4 * i - 0.2 for place in range(len(values))]
            bars = panel.barh(places, values.values(), 0.36, color=COLORS[label], label=label)
            panel.bar_label(bars, [f"{value:.2f}" for value in values.values()], padding=3)
            panel.set_yticks(range(len(values)), values)
        panel.set_title(title, loc="left", fontsize=10)
        panel.set_ylabel("groups with equal rewards")
        panel.invert_yaxis()
        panel.set_xlim(0, 20)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, loc="upper right")
    picture.savefig(path, metadata={"Date": None})
    pyplot.close(picture)


def show_tokens(run_dir: Path, path: Path) -> None:
    sys.path.append(str(DOCS.parent / "tests"))
    from support import browser

    from trl_a3po.report import write_report

    with tempfile.TemporaryDirectory() as directory:
        report = write_report([run_dir], Path(directory, "report.html"))
        page = browser.Page(Path(directory))
        try:
            page.prefer("light")
            page.resize(1100, 900)
            page.open(report)
            page.resize(1100, page.run("document.documentElement.scrollHeight"))
            top = page.run("document.querySelector('.ramps').getBoundingClientRect().top") - 12
            bottom = page.run("document.querySelector('.prompt').getBoundingClientRect().bottom") + 12
            clip = {"x": 0, "y": top, "width": 1100, "height": bottom - top, "scale": 1}
            shot = page.call("Page.captureScreenshot", format="png", clip=clip)
        finally:
            page.close()
    path.write_bytes(base64.b64decode(shot["data"]))


if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    draw_savings(PICTURES / "savings.svg")
    for run_dir in sys.argv[1:]:
        show_tokens(Path(run_dir), PICTURES / "report.png")
