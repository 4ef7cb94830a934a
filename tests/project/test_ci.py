"""CI runs every stage, each in a job of its own, and CONTRIBUTING.md explains them."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml


REPOSITORY = Path(__file__).parents[2]
WORKFLOW = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "ci.yml").read_text())


def stages_run(directory, *arguments, code=0):
    """The stages that `.ci/run` asks `make` for. Here `make`, which ends with `code`, and a browser are only names."""
    bin_directory = directory / "bin"
    bin_directory.mkdir()
    (bin_directory / "make").write_text('#!/bin/sh\necho "$@" >> "$LOG"\nexit "$CODE"\n')
    (bin_directory / "chromium").write_text("#!/bin/sh\n")
    for each in bin_directory.iterdir():
        each.chmod(0o755)
    path = os.pathsep.join([str(bin_directory), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "LOG": str(directory / "log"), "CODE": str(code)}
    result = subprocess.run([REPOSITORY / ".ci" / "run", *arguments], env=environment)
    (line,) = (directory / "log").read_text().splitlines()
    return result.returncode, [word for word in line.split() if not word.startswith("--") and not word.isdigit()]


@pytest.fixture(scope="module")
def stages():
    (line,) = re.findall(r"^stages=\((.*)\) ", (REPOSITORY / ".ci" / "run").read_text(), flags=re.MULTILINE)
    return line.split()


def test_every_stage_is_a_job_and_a_target(stages):
    (job,) = WORKFLOW["jobs"].values()
    assert job["strategy"]["matrix"]["stage"] == stages
    assert job["steps"][-1]["run"] == ".ci/run ${{ matrix.stage }}"
    targets = re.findall(r"^([\w-]+):.*## ", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE)
    assert set(stages) <= set(targets)


@pytest.mark.parametrize("code", [0, 2])
def test_the_script_runs_all_stages_and_fails_if_one_does(stages, code, tmp_path):
    assert stages_run(tmp_path, code=code) == (code, stages)


def test_the_script_runs_the_stage_that_it_is_given(tmp_path):
    assert stages_run(tmp_path, "docs") == (0, ["docs"])


def test_contributing_explains_every_command():
    targets = re.findall(r"^([\w-]+):.*## ", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE)
    explained = re.findall(r"^\| `make ([\w-]+)", (REPOSITORY / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE)
    assert sorted(explained) == sorted(targets)
