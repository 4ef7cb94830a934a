"""CI runs every stage, each in a job of its own, and CONTRIBUTING.md explains them."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml


REPOSITORY = Path(__file__).parents[2]
WORKFLOW = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "ci.yml").read_text())


def stages_run(directory, *arguments):
    """The stages that `.ci/run` runs, in a checkout where `make` and a browser are only names."""
    bin_directory = directory / "bin"
    bin_directory.mkdir()
    (bin_directory / "make").write_text('#!/bin/sh\necho "$@" >> "$LOG"\n[ "$1" != "$FAILS" ]\n')
    (bin_directory / "chromium").write_text("#!/bin/sh\n")
    for each in bin_directory.iterdir():
        each.chmod(0o755)
    path = os.pathsep.join([str(bin_directory), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "LOG": str(directory / "log"), "FAILS": "test-lowest"}
    result = subprocess.run([REPOSITORY / ".ci" / "run", *arguments], env=environment)
    return result.returncode, (directory / "log").read_text().splitlines()


@pytest.fixture(scope="module")
def stages():
    (line,) = re.findall(r"^stages=\((.*)\)$", (REPOSITORY / ".ci" / "run").read_text(), flags=re.MULTILINE)
    return line.split()


def test_every_stage_is_a_job_and_a_target(stages):
    (job,) = WORKFLOW["jobs"].values()
    assert job["strategy"]["matrix"]["stage"] == stages
    assert job["steps"][-1]["run"] == ".ci/run ${{ matrix.stage }}"
    targets = re.findall(r"^([\w-]+):.*## ", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE)
    assert set(stages) <= set(targets)


def test_the_script_runs_all_stages_and_stops_at_the_first_that_fails(stages, tmp_path):
    code, run = stages_run(tmp_path)
    assert code != 0
    assert run == stages[: stages.index("test-lowest") + 1]


def test_the_script_runs_the_stage_that_it_is_given(tmp_path):
    assert stages_run(tmp_path, "docs") == (0, ["docs"])


def test_contributing_explains_every_command():
    targets = re.findall(r"^([\w-]+):.*## ", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE)
    explained = re.findall(r"^\| `make ([\w-]+)", (REPOSITORY / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE)
    assert sorted(explained) == sorted(targets)
