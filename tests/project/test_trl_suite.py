"""That the command which runs TRL's own tests tells the truth, on a miniature of TRL's repository."""

import runpy
import textwrap
from pathlib import Path

import pytest


SUITE = Path(__file__).parents[1] / "trl_suite"

MINIATURE = """
    from datasets import load_dataset
    from trl import GRPOConfig, GRPOTrainer

    from .testing_utils import TrlTestCase


    class TestGRPOTrainer(TrlTestCase):
        def test_init(self):
            trainer = GRPOTrainer(
                "trl-internal-testing/tiny-Qwen2ForCausalLM-2.5",
                reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
                args=GRPOConfig(self.tmp_dir, use_cpu=True, bf16=False, report_to="none"),
                train_dataset=load_dataset("trl-internal-testing/zen", "standard_prompt_only", split="train"),
            )
            assert len(trainer.train_dataset) > 0

        def test_originals(self):
            assert (GRPOTrainer.__name__, GRPOConfig.__name__) == ("GRPOTrainer", "GRPOConfig")

        def test_ours(self):
            assert (GRPOTrainer.__name__, GRPOConfig.__name__) == ("A3POTrainer", "A3POConfig")
"""
TESTING_UTILS = """
    import pytest
    from trl.import_utils import is_gone_since_available


    class TrlTestCase:
        @pytest.fixture(autouse=True)
        def set_tmp_dir(self, tmp_path):
            self.tmp_dir = str(tmp_path)
            assert not is_gone_since_available()
"""


@pytest.fixture(scope="module")
def suite():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SUITE)
        return runpy.run_path(str(SUITE / "__main__.py"))


@pytest.fixture
def checkout(tmp_path):
    tests = tmp_path / "trl" / "tests"
    tests.mkdir(parents=True)
    (tmp_path / "trl" / "trl").mkdir()
    # Not what is tested: what is installed is.
    (tmp_path / "trl" / "trl" / "__init__.py").write_text("raise ImportError")
    (tests / "__init__.py").touch()
    (tests / "testing_utils.py").write_text(textwrap.dedent(TESTING_UTILS))
    (tests / "test_grpo_trainer.py").write_text(textwrap.dedent(MINIATURE))
    return tmp_path / "trl"


@pytest.mark.slow
def test_names_are_replaced_and_what_no_longer_passes_is_told(suite, checkout, capfd):
    before = sorted(checkout.rglob("*"))
    assert suite["main"]([str(checkout)]) == 1
    *_, heading, originals, ours, lost = capfd.readouterr().out.splitlines()
    assert heading.split() == ["passed", "failed", "skipped"]
    assert originals.split() == ["GRPOTrainer", "2", "1", "0"]
    assert ours.split() == ["A3POTrainer", "2", "1", "0"]
    assert lost == "passes with GRPOTrainer, not with A3POTrainer (failed): TestGRPOTrainer::test_originals"
    assert sorted(checkout.rglob("*")) == before


@pytest.mark.slow
def test_a_run_in_which_the_names_are_not_replaced_is_refused(suite, checkout, tmp_path, capfd):
    tests = checkout / "tests" / "test_grpo_trainer.py"
    tests.write_text(tests.read_text().replace("from trl import GRPO", "from trl.trainer import GRPO"))
    with pytest.raises(SystemExit, match="nothing to compare"):
        suite["run"](tests, tmp_path, ["-p", "a3po_for_grpo"])
    assert "does not import `GRPOConfig` from `trl`" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("originals", "ours", "status"),
    [
        ({"a": "passed", "b": "failed"}, {"a": "passed", "b": "failed"}, 0),
        ({"a": "passed", "b": "failed"}, {"a": "passed", "b": "passed"}, 0),
        ({"a": "passed", "b": "passed"}, {"a": "passed", "b": "failed"}, 1),
        ({"a": "passed", "b": "passed"}, {"a": "passed", "b": "skipped"}, 1),
        ({"a": "passed", "b": "passed"}, {"a": "passed"}, 1),
        ({"a": "failed"}, {"a": "failed"}, 1),
    ],
)
def test_exit_status(suite, originals, ours, status):
    assert suite["report"](originals, ours) == status


def test_a_folder_without_the_tests_is_refused(suite, tmp_path, capsys):
    with pytest.raises(SystemExit):
        suite["main"]([str(tmp_path)])
    assert "clone its repository" in capsys.readouterr().err
