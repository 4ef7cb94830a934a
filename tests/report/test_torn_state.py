"""A report on a run that was killed while it saved a checkpoint: the state of the trainer is torn."""

import subprocess
import sys

from support import logged_runs

from trl_a3po.cli.report import main
from trl_a3po.report.run import read_run


TORN = '{"global_step": 4, "log_hist'


def write(run, step, *, torn=False, marked=False):
    logged_runs.write_state(run / f"checkpoint-{step}", [{"step": step, "loss": step}], step)
    if torn:
        (run / f"checkpoint-{step}" / "trainer_state.json").write_text(TORN)
    if marked:
        (run / f"checkpoint-{step}.incomplete").touch()


def warnings(caplog):
    return [record.getMessage() for record in caplog.records]


def test_a_torn_state_gives_way_to_the_one_before(tmp_path, caplog):
    write(tmp_path, 2)
    write(tmp_path, 4, torn=True, marked=True)
    torn = tmp_path / "checkpoint-4" / "trainer_state.json"
    warning = f"warning: skipping '{torn}', which is incomplete."
    assert read_run(tmp_path).metrics == {"loss": [(2, 2)]}
    assert warnings(caplog) == [warning]
    (tmp_path / "checkpoint-4.incomplete").unlink()  # as GRPOTrainer leaves it
    assert read_run(tmp_path).metrics == {"loss": [(2, 2)]}
    assert warnings(caplog) == [warning] * 2


def test_a_torn_state_at_the_end_gives_way_to_the_last_checkpoint(tmp_path, caplog):
    write(tmp_path, 2)
    (tmp_path / "trainer_state.json").write_text(TORN)
    assert read_run(tmp_path).metrics == {"loss": [(2, 2)]}
    assert len(warnings(caplog)) == 1


def test_a_marked_checkpoint_counts_only_where_there_is_no_other(tmp_path):
    """It may be from an earlier run, with a higher step."""
    write(tmp_path, 40, marked=True)
    assert read_run(tmp_path).metrics == {"loss": [(40, 40)]}
    write(tmp_path, 2)
    assert read_run(tmp_path).metrics == {"loss": [(2, 2)]}


def test_a_checkpoint_that_waits_is_found(tmp_path):
    """A kill while checkpoint-2 was written for the second time."""
    write(tmp_path, 2)
    (tmp_path / "checkpoint-2").rename(tmp_path / "checkpoint-2.previous")
    write(tmp_path, 2, torn=True, marked=True)
    assert read_run(tmp_path).metrics == {"loss": [(2, 2)]}


def test_tokens_without_a_whole_state_are_shown(tmp_path, caplog):
    write(tmp_path, 2, torn=True, marked=True)
    logged_runs.write_tokens(tmp_path, [logged_runs.completion(1)])
    run = read_run(tmp_path)
    assert (run.metrics, [each.step for each in run.completions]) == ({}, [1])
    assert len(warnings(caplog)) == 1


def test_the_command_says_what_it_passed_over(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "run", 2, torn=True)
    assert main(["run"]) == 2
    expected = "error: 'run/checkpoint-2/trainer_state.json' is incomplete, or not the state of a trainer.\n"
    assert capsys.readouterr().err == expected
    write(tmp_path / "run", 1)
    command = [sys.executable, "-m", "trl_a3po.cli", "report", "run"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("report.html\n")
    path = "run/checkpoint-2/trainer_state.json"
    assert done.stderr == f"warning: skipping '{path}', which is incomplete.\n"
