"""`trl-a3po train`: from a line, or a file of YAML, to a trained model."""

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import trl
import yaml
from trl.scripts import grpo

from trl_a3po import A3POConfig
from trl_a3po.cli import main as cli
from trl_a3po.cli import train


GSM8K = [{"question": f"what is {i} + 1?", "answer": f"one more.\n#### {i + 1}"} for i in range(8)]
VERL = [
    {"prompt": [{"role": "user", "content": f"{i}+1="}], "reward_model": {"ground_truth": str(i)}} for i in range(8)
]
SMALL = {
    "use_cpu": True,
    "bf16": False,
    "max_steps": 1,
    "max_completion_length": 4,
    "per_device_train_batch_size": 8,
    "report_to": "none",
    "gradient_checkpointing": False,
}


def parity_reward(completion_ids, **kwargs):
    return [float(sum(ids) % 2) for ids in completion_ids]


@pytest.fixture(autouse=True)
def _trl_as_it_was(monkeypatch):
    monkeypatch.setattr(trl, "GRPOTrainer", trl.GRPOTrainer)


@pytest.fixture
def file(model_dir, tmp_path):
    """Writes the options of a small run, and others, as a file of YAML."""

    def write(**options):
        path = tmp_path / "config.yaml"
        output = {"model_name_or_path": model_dir, "output_dir": str(tmp_path / "output")}
        path.write_text(yaml.safe_dump({**output, **SMALL, **options}))
        return str(path)

    return write


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def assert_trained(output_dir, **settings):
    card = (output_dir / "README.md").read_text()
    found = json.loads(re.search("```json\n(.+?)```", card, re.DOTALL)[1])
    assert settings.items() <= found.items()
    assert list(output_dir.glob("*model.safetensors"))
    assert (output_dir / "trainer_state.json").exists()


@pytest.mark.parametrize("rows", [GSM8K, VERL], ids=["gsm8k", "verl"])
def test_problems_in_a_file(rows, file, tmp_path):
    dataset = write_rows(tmp_path / "problems.jsonl", rows)
    options = ["--dataset_name", dataset, "--problems", "--instruction", "box it.", "--positive_low_scale", "3"]
    train.train(["--config", file(), *options])
    assert_trained(tmp_path / "output", positive_low_scale=3.0)


def test_a_dataset_without_prompts_is_refused(file, tmp_path):
    dataset = write_rows(tmp_path / "problems.jsonl", GSM8K)
    with pytest.raises(ValueError, match=r"columns \['question', 'answer'\], and no `prompt`.* pass `--problems`"):
        train.train(["--config", file(), "--dataset_name", dataset, "--reward_funcs", "accuracy_reward"])


def test_a_mixture_and_a_reward_of_ones_own_from_yaml(file, tmp_path, monkeypatch):
    rows = [{"prompt": f"{i}+1="} for i in range(8)]
    datasets = [
        {"path": "json", "data_files": write_rows(tmp_path / name, rows), "split": "train"}
        for name in ("a.jsonl", "b.jsonl")
    ]
    monkeypatch.setenv("OF_THE_FILE", "")
    options = {"datasets": datasets, "reward_funcs": [f"{__name__}.parity_reward"], "env": {"OF_THE_FILE": "set"}}
    train.train(["--config", file(**options, scale_decay="cosine")])
    assert_trained(tmp_path / "output", scale_decay="cosine")
    assert os.environ["OF_THE_FILE"] == "set"


@pytest.mark.skipif(
    "resume_from_checkpoint" not in inspect.getsource(grpo.main), reason="this TRL's script does not resume"
)
def test_resumes_from_the_last_checkpoint(file, tmp_path):
    dataset = write_rows(tmp_path / "problems.jsonl", GSM8K)
    line = ["--config", file(), "--dataset_name", dataset, "--problems", "--save_steps", "1", "--logging_steps", "1"]
    train.train(line)
    train.train([*line, "--max_steps", "2", "--resume_from_checkpoint", "True"])
    state = json.loads((tmp_path / "output" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    before = json.loads((tmp_path / "output" / "checkpoint-1" / "trainer_state.json").read_text())
    assert state["log_history"][0] == before["log_history"][0]


def test_the_command_starts_processes_of_its_own(file, tmp_path):
    dataset = write_rows(tmp_path / "problems.jsonl", GSM8K)
    command = [sys.executable, "-m", "trl_a3po.cli", "train", "--config", file(accelerate_config="single_gpu")]
    options = ["--dataset_name", dataset, "--problems", "--num_processes", "1", "--cpu"]
    result = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert_trained(tmp_path / "output")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("trian", r"argument COMMAND: invalid choice: 'trian' \(choose from '?train"),
        ("train {small} --positve_low_scale 2", "unrecognized arguments: --positve_low_scale"),
        ("train {small} stray", "unrecognized arguments: stray"),
        ("train {small} --positive_low_sc 2", "unrecognized arguments: --positive_low_sc"),
        ("train {small} --positive_low_ratio 20", "`positive_low_ratio` must be a number from 0 to 1, got 20.0"),
        (
            "train {small} --scale_decay_steps 9 --max_steps 5",
            "`scale_decay_steps=9.0` is longer than the training of 5",
        ),
        ("train {small} --accelerate_config nowhere", "nowhere is neither a file nor a valid config"),
        ("train --config nowhere.yaml", "No such file or directory: 'nowhere.yaml'"),
    ],
)
def test_bad_lines_are_refused_before_anything_starts(arguments, message, tmp_path, capsys):
    small = f"--output_dir {tmp_path} --use_cpu --bf16 False"
    with pytest.raises(SystemExit) as error:
        cli.main(arguments.format(small=small).split())
    assert error.value.code == 2
    usage, refusal = capsys.readouterr().err.split("\n", 1)
    assert len(usage) < 100
    assert re.search(message, refusal)


def test_help_lists_the_options_of_the_shaping_together(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    shaping = capsys.readouterr().out.split("\nwhat A3POConfig adds to GRPOConfig:\n")[1]
    shaping = shaping.split("\nmodel:\n")[0]
    assert re.findall(r"\n  --(\w+)", "\n" + shaping) == [
        *("positive_low_ratio", "positive_low_scale", "positive_high_ratio", "positive_high_scale"),
        *("negative_low_ratio", "negative_low_scale", "negative_high_ratio", "negative_high_scale"),
        *("token_metric", "scale_decay", "scale_decay_steps"),
        *("positive_weight", "negative_weight", "dynamic_sampling"),
        *("trim_padding", "no_trim_padding", "skip_zero_advantage", "no_skip_zero_advantage", "log_tokens"),
    ]


RECIPES = sorted((Path(__file__).parents[2] / "examples" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=[recipe.stem for recipe in RECIPES])
def test_recipes_train(recipe, model_dir, tmp_path):
    """On a tiny model, a few rows in the format of their dataset, and this machine; all else is theirs."""
    settings = yaml.safe_load(recipe.read_text())
    dataset = write_rows(tmp_path / "problems.jsonl", VERL if "DAPO" in settings["dataset_name"] else GSM8K)
    here = {"model_name_or_path": model_dir, "dataset_name": dataset, "output_dir": tmp_path / "output", **SMALL}
    here |= {"use_vllm": False, "dtype": "float32", "steps_per_generation": 1, "gradient_accumulation_steps": 1}
    here |= {"per_device_train_batch_size": settings["num_generations"]}
    train.train(["--config", str(recipe), *(f"--{name}={value}" for name, value in here.items())])
    of_shaping = A3POConfig.__annotations__.keys() - {"dynamic_sampling"}
    fields = {name: value for name, value in settings.items() if name in of_shaping}
    assert_trained(tmp_path / "output", **fields)
