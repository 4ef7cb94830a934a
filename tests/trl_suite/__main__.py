"""
Runs the GRPO tests of a TRL checkout with the originals, and with A3POTrainer and A3POConfig under their names.

    python tests/trl_suite path/to/trl [options of pytest, such as -k beta]

The tests run offline against the installed TRL, on stand-ins for the models and datasets that they load from the Hub.
The exit status is 1 if a test passes with the originals and not with ours.
"""

import argparse
import ast
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import datasets
import stand_ins
import transformers


TESTS = Path("tests", "test_grpo_trainer.py")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("trl_suite", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("checkout", type=Path, help="clone of TRL's repository, best at the version that is installed")
    options, pytest_options = parser.parse_known_args(arguments)
    tests = options.checkout.resolve() / TESTS
    if not tests.is_file():
        parser.error(f"{tests} is not a file. TRL's wheels carry no tests: clone its repository.")

    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="trl-suite-") as directory:
        work = Path(directory)
        for name, reason in stand_ins.build(work / "hf", hub_names(tests)).items():
            print(f"no stand-in for {name}: {reason}")
        originals = run(tests, work, pytest_options)
        ours = run(tests, work, ["-p", "a3po_for_grpo", *pytest_options])
    return report(originals, ours)


def hub_names(tests: Path) -> set[str]:
    """What the tests name of the organization on the Hub that has TRL's models and datasets for tests."""
    prefix = f"{stand_ins.ORGANIZATION}/"
    nodes = ast.walk(ast.parse(tests.read_text(encoding="utf-8")))
    texts = (node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return {text.removeprefix(prefix) for text in texts if text.startswith(prefix)}


def run(tests: Path, work: Path, options: list[str]) -> dict[str, str]:
    """The outcome of each test: passed, failed or skipped."""
    results = work / "results.xml"
    plugins, _, repository = Path(__file__).resolve().parents[:3]
    import_from = [str(plugins), str(repository), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment.update(
        HF_HOME=str(work / "hf"),
        HF_HUB_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
        OMP_NUM_THREADS="1",
        PYTHONPATH=os.pathsep.join(import_from),
        # Nothing is written into the checkout.
        PYTHONDONTWRITEBYTECODE="1",
    )
    command = [sys.executable, "-m", "pytest", str(tests), "-p", "older_tests", "-p", "no:cacheprovider"]
    # The checkout stays out of `sys.path`: it has a `trl` too, and what is tested is the installed one.
    command += ["--import-mode=importlib", f"--basetemp={work / 'tmp'}", f"--junitxml={results}"]
    command += ["--quiet", "--tb=short", "--disable-warnings", *options]
    print("\n$", *command, flush=True)
    status = subprocess.run(command, cwd=work, env=environment).returncode
    if status not in (0, 1):
        sys.exit(f"pytest ended with status {status}: there is nothing to compare.")
    return {
        f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}": outcome(case)
        for case in ElementTree.parse(results).iter("testcase")
    }


def outcome(case: ElementTree.Element) -> str:
    for tag in ("failure", "error", "skipped"):
        if case.find(tag) is not None:
            return "skipped" if tag == "skipped" else "failed"
    return "passed"


def report(originals: dict[str, str], ours: dict[str, str]) -> int:
    """Prints the comparison, and returns the exit status."""
    print(f"\n{'':12}{'passed':>8}{'failed':>8}{'skipped':>8}")
    for trainer, outcomes in (("GRPOTrainer", originals), ("A3POTrainer", ours)):
        counts = Counter(outcomes.values())
        print(f"{trainer:12}{counts['passed']:8}{counts['failed']:8}{counts['skipped']:8}")
    passed = [test for test, result in originals.items() if result == "passed"]
    lost = [test for test in passed if ours.get(test) != "passed"]
    for test in lost:
        print(f"passes with GRPOTrainer, not with A3POTrainer ({ours.get(test, 'not run')}): {test}")
    if not passed:
        print("No test passes with GRPOTrainer: this says nothing.")
    elif not lost:
        print("Every test that passes with GRPOTrainer passes with A3POTrainer.")
    return 1 if lost or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
