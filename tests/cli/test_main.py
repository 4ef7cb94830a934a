"""What all commands of `trl-a3po` have in common."""

import os
import subprocess
import sys

import pytest
from support import logged_runs

from trl_a3po.cli import main as cli
from trl_a3po.cli import report
from trl_a3po.cli.main import exit_status


def test_a_terminal_without_the_characters_gets_them_escaped(tmp_path):
    run = tmp_path / "日本"
    logged_runs.write_state(run, [{"step": 1, "loss": 1}], 1)
    done = subprocess.run(
        [sys.executable, "-m", "trl_a3po.cli", "report", str(run), "--output", str(run / "report.html")],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "\\u65e5\\u672c" in done.stdout


@pytest.mark.parametrize(
    ("codes", "status", "message"),
    [
        ([1], 1, ""),
        ([1, 2], 2, ""),
        ([-9], 137, "error: SIGKILL ended the evaluation. The machine may have run out of memory.\n"),
        ([-15], 143, "error: SIGTERM ended the evaluation.\n"),
    ],
)
def test_the_exit_status_is_that_of_the_processes(codes, status, message, capsys):
    assert exit_status(codes, "evaluation") == status
    assert capsys.readouterr().err == message


def test_a_report_is_written_though_nobody_reads_what_is_printed(tmp_path):
    logged_runs.write_state(tmp_path / "run", [{"step": 1, "loss": 1}], 1)
    read, written = os.pipe()
    os.close(read)
    line = [sys.executable, "-m", "trl_a3po.cli", "report", str(tmp_path / "run"), "--output"]
    done = subprocess.run([*line, str(tmp_path / "page.html")], stdout=written, stderr=subprocess.PIPE, text=True)
    os.close(written)
    assert (done.returncode, done.stderr) == (141, "")
    assert (tmp_path / "page.html").exists()


def test_an_interrupt_ends_in_one_line(capsys, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "main", interrupted)
    assert cli.main(["report", "run"]) == 130
    assert capsys.readouterr().err.strip() == "trl-a3po report: interrupted"
