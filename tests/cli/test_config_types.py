"""Values in the file of `--config` have the types of the options."""

import json

import pytest

from trl_a3po.cli import eval as eval_command
from trl_a3po.cli import main as cli
from trl_a3po.cli import train as train_command


REQUIRED = {"model_name_or_path": "model", "dataset_name": "problems.jsonl", "output_dir": "scores"}


@pytest.fixture
def file(tmp_path):
    def write(**options):
        path = tmp_path / "config.yaml"
        path.write_text(json.dumps(options))  # JSON is YAML
        return str(path)

    return write


@pytest.fixture
def refusal(capsys):
    """What a command says of a line that it refuses."""

    def run(*line):
        with pytest.raises(SystemExit) as error:
            cli.main(list(line))
        assert error.value.code == 2
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": [1, 2]}, "`seed` must be a whole number, got [1, 2]."),
        ({"seed": 1.5}, "`seed` must be a whole number, got 1.5."),
        ({"seed": None}, "`seed` must be a whole number, got None."),
        ({"num_samples": True}, "`num_samples` must be a whole number, got True."),
        ({"num_samples": 2.5}, "`num_samples` must be a whole number, got 2.5."),
        ({"batch_size": 2.5}, "`batch_size` must be a whole number, got 2.5."),
        ({"max_model_len": 100.5}, "`max_model_len` must be a whole number or null, got 100.5."),
        ({"dataset_split": 5}, "`dataset_split` must be text in quotes, got 5."),
        ({"temperature": False}, "`temperature` must be a number, got False."),
        ({"use_vllm": 1}, "`use_vllm` must be true or false, got 1."),
        (
            {"chat_template_kwargs": [1]},
            "`chat_template_kwargs` must be a mapping or text in quotes or null, got [1].",
        ),
    ],
)
def test_other_types_are_refused(options, message, file, refusal):
    path = file(**REQUIRED, **options)
    assert f"error: '{path}': {message}\n" in refusal("eval", "--config", path)


@pytest.mark.parametrize("command", ["eval", "train"])
@pytest.mark.parametrize(
    ("text", "name", "lines"),
    [
        ("seed: 1\n# again\ntemperature: 1\n'seed': 2\n", "seed", (1, 4)),
        ("{seed: 1, seed: 1}\n", "seed", (1, 1)),
        ("seed: 1\nenv:\n  A: b\n  C: d\n  A: e\n", "A", (3, 5)),
        ("seed: 1\ndatasets:\n- path: a\n  split: b\n  path: c\n", "path", (3, 5)),
        ("env: &env\n  A: b\n  A: c\nother: *env\n", "A", (2, 3)),
    ],
)
def test_a_repeated_name_is_refused(command, text, name, lines, tmp_path, refusal):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    message = f"'{path}' has `{name}` on line {lines[0]} and again on line {lines[1]}. Keep one of them."
    assert message in refusal(command, "--config", str(path))


def test_what_is_merged_is_no_repetition(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "model_name_or_path: model\ndataset_name: a.jsonl\noutput_dir: scores\n"
        "chat_template_kwargs:\n  one: &one {a: 1, b: 1}\n  two: {in: &two {<<: *one, b: 2}}\n"
        "  three: {<<: *two, b: 3, c: 3}\n  four: {b: 4, <<: [*one, *two]}\n"
    )
    (arguments,) = eval_command.make_parser().parse_args_and_config(["--config", str(path)])
    assert arguments.chat_template_kwargs["three"] == {"a": 1, "b": 3, "c": 3}
    assert arguments.chat_template_kwargs["four"] == {"a": 1, "b": 4}


def test_the_other_commands_too(file, capsys):
    for command, option in [("demo", "eval_size"), ("train", "log_tokens")]:
        with pytest.raises(SystemExit):
            cli.main([command, "--config", file(**{option: 2.5})])
        assert f"`{option}` must be a whole number, got 2.5." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("learning_rate", True, "a number"),
        ("learning_rate", None, "a number"),
        ("temperature", None, "a number"),
        ("epsilon", None, "a number"),
        ("max_steps", 2.5, "a whole number"),
        ("seed", None, "a whole number"),
        ("num_generations", [4], "a whole number or null"),
        ("dataset_train_split", 2024, "text in quotes"),
        ("dataset_name", ["p.jsonl"], "text in quotes or null"),
        ("model_init_kwargs", [1], "a mapping or text in quotes or null"),
        ("reward_funcs", "accuracy_reward", "a list of names"),
        ("reward_funcs", [None], "a list of names"),
        ("reward_weights", 1.0, "a list of numbers"),
        ("datasets", ["p.jsonl"], "a list of mappings, each with a `path`"),
        ("datasets", [{"path": "p.jsonl"}, {"path": 1}], "a list of mappings, each with a `path`"),
        ("datasets", [{"split": "train"}], "a list of mappings, each with a `path`"),
        ("datasets", {"path": "p.jsonl"}, "a list of mappings, each with a `path`"),
        ("save_total_limit", False, "a whole number or null"),
        ("lora_r", 8.5, "a whole number"),
        ("max_grad_norm", None, "a number"),
        ("lr_scheduler_type", None, "text in quotes"),
    ],
)
def test_numbers_of_trl_are_checked(option, value, words, file, refusal):
    path = file(**{option: value})
    assert f"error: '{path}': `{option}` must be {words}, got {value!r}.\n" in refusal("train", "--config", path)


def test_what_trl_takes_is_accepted(file):
    options = {
        "learning_rate": "1e-6",  # what YAML reads as text
        "weight_decay": 0,
        "top_k": None,
        "save_total_limit": None,
        "max_completion_length": 16.0,
        "scale_rewards": False,
        "lr_scheduler_kwargs": {},
        "use_cpu": 1,
        "bf16": False,
    }
    _, config, *_ = train_command.make_parser().parse_args_and_config(["--config", file(output_dir="run", **options)])
    found = {name: getattr(config, name) for name in options}
    assert found == {**options, "learning_rate": 1e-6, "scale_rewards": "none"}


def test_whole_numbers_with_a_point_are_whole_numbers(file):
    options = {"max_steps": 2.0, "num_generations": 4.0, "seed": 1e1, "max_completion_length": 16.0}
    line = ["--config", file(output_dir="run", use_cpu=True, bf16=False, lora_r=8.0, learning_rate=1.0, **options)]
    _, config, model, *_ = train_command.make_parser().parse_args_and_config(line)
    found = [*(getattr(config, name) for name in options), model.lora_r]
    assert repr(found) == "[2, 4, 10, 16, 8]"
    assert repr(config.learning_rate) == "1.0"


@pytest.mark.parametrize("line", ["save_strategy: no", "eval_strategy: off", "logging_strategy: no"])
def test_names_that_yaml_takes_for_false(line, tmp_path, refusal):
    path = tmp_path / "config.yaml"
    path.write_text(line)
    name = line.partition(":")[0]
    message = f"`{name}` must be text in quotes, got False. YAML reads `on`, `off`, `yes` and `no` as true or false.\n"
    assert message in refusal("train", "--config", str(path))


@pytest.mark.parametrize(
    ("line", "name", "says"),
    [("on: 3", True, ""), ("no: x", False, ""), ("5: abc", 5, ""), ("config: other.yaml", None, "`config`")],
)
@pytest.mark.parametrize("command", ["train", "demo", "eval"])
def test_names_that_no_option_has(command, line, name, says, tmp_path, refusal):
    path = tmp_path / "config.yaml"
    path.write_text(line)
    message = f"has {says}, which is an option of the command line only" if says else f"must be text, got {name!r}."
    assert message in refusal(command, "--config", str(path))


def test_two_files_are_refused(file, refusal):
    for words in (["--config", file(), "--config", file()], ["--config", file(), f"--config={file()}"]):
        assert "`--config` was given more than once. Put all options into one file." in refusal("train", *words)


def test_what_yaml_says_naturally_is_accepted(file):
    options = {
        "temperature": 1,
        "top_p": "9e-1",  # what YAML reads as text
        "use_vllm": True,
        "max_model_len": None,
        "chat_template_kwargs": {"enable_thinking": False},
    }
    (arguments,) = eval_command.make_parser().parse_args_and_config(["--config", file(**REQUIRED, **options)])
    assert {name: getattr(arguments, name) for name in options} == {**options, "top_p": 0.9}
