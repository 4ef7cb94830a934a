"""`trl-a3po train`: from a line, or a file of YAML, to a trained model."""

import functools
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import trl
import yaml
from support import tiny
from trl.scripts import grpo

from trl_a3po import A3POConfig, rewards
from trl_a3po.cli import main as cli
from trl_a3po.cli import train
from trl_a3po.cli.parser import recipes


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


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "The tokenizer of the model has no chat template, .* Save one as `chat_template.jinja`"),
        (
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}",
            r"refuses a conversation of system, user: TemplateError: no system\. The first is \[.*'5\+1='",
        ),
    ],
)
@pytest.mark.parametrize("command", ["train", "demo"])
def test_prompts_that_no_template_renders_are_refused_before_the_first_step(
    command, template, message, model_dir, file, tmp_path, capsys
):
    """As of a base model, or of Gemma where a row has a system message."""
    model = shutil.copytree(model_dir, tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    if template is not None:
        (model / "chat_template.jinja").write_text(template + tiny.CHAT_TEMPLATE)
    rows = [{"prompt": [{"role": "user", "content": f"{i}+1="}], "solution": f"{i + 1}"} for i in range(20)]
    rows[5]["prompt"].insert(0, {"role": "system", "content": "add"})
    line = ["--config", file(), "--dataset_name", write_rows(tmp_path / "problems.jsonl", rows)]
    line += ["--model_name_or_path", str(model)]
    if command == "train":
        with pytest.raises(train.UsageError, match=message):
            train.train([*line, "--problems"])
    else:
        with pytest.raises(SystemExit):
            cli.main(["demo", *line, "--eval_size", "4"])
        assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.glob("output/**/*.safetensors"))


def test_a_dataset_without_prompts_is_refused(file, tmp_path):
    dataset = write_rows(tmp_path / "problems.jsonl", GSM8K)
    with pytest.raises(
        train.UsageError, match=r"columns \['question', 'answer'\], but no `prompt`.* pass `--problems`"
    ):
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


def test_resumes_from_the_last_checkpoint(file, tmp_path):
    dataset = write_rows(tmp_path / "problems.jsonl", GSM8K)
    line = ["--config", file(), "--dataset_name", dataset, "--problems", "--save_steps", "1", "--logging_steps", "1"]
    train.train(line)
    train.train([*line, "--max_steps", "2", "--resume_from_checkpoint", "True"])
    state = json.loads((tmp_path / "output" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    before = json.loads((tmp_path / "output" / "checkpoint-1" / "trainer_state.json").read_text())
    assert state["log_history"][0] == before["log_history"][0]


@pytest.mark.parametrize(
    ("in_file", "on_line", "settings"),
    [
        ({"shaping_args": {"negative_weight": 0.9}}, "", {"negative_weight": 0.9, "top_ratio": 0.1}),
        ({}, '{"top_ratio": 0.2}', {"negative_weight": 1.0, "top_ratio": 0.2}),
    ],
    ids=["yaml", "line"],
)
def test_another_method_with_its_settings(in_file, on_line, settings, file, tmp_path):
    dataset = write_rows(tmp_path / "problems.jsonl", GSM8K)
    line = ["--config", file(shaping="stare", **in_file), "--dataset_name", dataset, "--problems"]
    train.train([*line, "--shaping_args", on_line] if on_line else line)
    assert_trained(tmp_path / "output", shaping="stare", **settings)
    assert "trained with STARE" in (tmp_path / "output" / "README.md").read_text()


@pytest.mark.slow
def test_the_command_starts_processes_of_its_own(file, tmp_path):
    dataset = write_rows(tmp_path / "problems.jsonl", GSM8K)
    command = [sys.executable, "-m", "trl_a3po.cli", "train", "--config", file(accelerate_config="single_gpu")]
    options = ["--dataset_name", dataset, "--problems", "--num_processes", "1", "--cpu"]
    options += ["--shaping", "clip_cov", "--shaping_args", '{"clip_ratio": 0.1}']
    result = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert_trained(tmp_path / "output", shaping="clip_cov", clip_ratio=0.1)


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
        ("train {small} --shaping star", "`shaping` must be one of 'a3po', .*'stare', got 'star'"),
        ("train {small} --shaping stare --shaping_args 0.1", "`shaping_args` must be a dictionary, .* got 0.1"),
        ('train {small} --shaping stare --shaping_args {{"quantile":1}}', "has `quantile`, which is not a setting of"),
        ("train {small} --shaping stare --positive_low_scale 3", "`positive_low_scale=3.0` has no effect because"),
        ("train {small} --accelerate_config nowhere", "nowhere is neither a file nor a valid config"),
        ("train --config nowhere.yaml", r"no file 'nowhere.yaml' for `--config`\. The recipes are .*a3po-gsm8k-lora"),
        ("train --config a3po-gsm8k", r"no file 'a3po-gsm8k' for `--config`\. The recipes are .*a3po-gsm8k-lora"),
        ("train --config", "`--config` needs the name of a file"),
        ("train --config=nowhere.yaml", "no file 'nowhere.yaml'"),
        ("train --config {list}", "'.*list.yaml' must contain options, one `name: value` per line"),
        ("train --config {broken}", "'.*broken.yaml' is not YAML: .*line 1"),
        ("train --config {null} {small}", "An option has a value of the wrong type"),
        ("train {small} --problems", "--model_name_or_path"),
        (
            "train {model} {data} --problems --resume_from_checkpoint yes",
            r"no checkpoint 'yes' for `resume_from_checkpoint`\. Pass the path of a checkpoint, or True for the last",
        ),
        ("train {model} --problems", "no dataset. Pass `--dataset_name`, or `datasets`"),
        ("train {model} {data}", "no reward. Pass `--reward_funcs`, or `--problems`"),
        ("train {model} --problems --dataset_name none.jsonl", "no file 'none.jsonl'"),
        ("train {model} --problems --dataset_name {empty}", "'.*empty.jsonl' is empty"),
        ("train {model} --problems --dataset_name {list}", r"'.*list.yaml' is not a \.jsonl, \.json, \.parquet file"),
        (
            "train {model} {data} --problems --eval_strategy steps --eval_steps 1",
            "`eval_strategy` needs a test split, but the file '.*' has none. Pass `--test_split_size 0.1`",
        ),
        ("train {model} {data} --problems --dataset_train_split test", "'test', but a file has one split, `train`"),
        (
            "train {model} {data} --problems --dataset_train_split train+test",
            "a split or a slice of one.*'train.test'",
        ),
        ("train {model} {data} --problems --dataset_train_split train[:x]", "Unrecognized|train.:x"),
        ("train {model} {data} --problems --dataset_streaming", "A stream has no length: pass `--max_steps`"),
        (
            "train {model} {data} --problems --dataset_streaming --max_steps 5 --test_split_size 0.1",
            "`test_split_size` cannot split a stream",
        ),
        (
            "train {model} {data} --problems --test_split_size 0.1",
            "`test_split_size` holds out rows .* `eval_strategy` is 'no'. Pass `--eval_strategy steps`, or leave out",
        ),
        ("train {model} {data} --problems --test_split_size 2 --do_eval", "holds out rows .* `eval_strategy` is 'no'"),
        ("train {model} --problems --config {mixture} --test_split_size 2", "holds out rows .* `eval_strategy` is"),
        *(
            (
                f"train {{model}} {{data}} --problems --eval_strategy steps --eval_steps 1 --test_split_size {size}",
                rf"`test_split_size` must be a share of the rows between 0 and 1, .* 1 or more\. Got {size}",
            )
            for size in ("0.0", "-0.5", "-2.0", "1.5", "nan", "inf")
        ),
        (
            "train {model} {data} --reward_funcs accuracy_reward --instruction box-it",
            "`instruction` has an effect only on problems. Pass `--problems`, or leave it out",
        ),
        *(
            (f"{command} {options}", message)
            for command in ("train {model} {data} --problems", "demo {data} --eval_size 2")
            for options, message in [
                ("--max_steps 0", "`max_steps` must be a number of steps, 1 or more, or -1 for .* got 0"),
                ("--max_steps -5", "`max_steps` must be a number of steps, 1 or more, or -1 for .* got -5"),
                ("--max_steps -1 --num_train_epochs 0", "`num_train_epochs` must be a number above 0, got 0.0"),
                ("--max_steps -1 --num_train_epochs -1", "`num_train_epochs` must be a number above 0, got -1.0"),
                ("--max_steps -1 --num_train_epochs inf", "`num_train_epochs` must be a number above 0, got inf"),
                ("--config {no_steps}", "`max_steps` must be a number of steps, 1 or more, or -1 for .* got 0"),
                ("--config {no_epochs}", "`num_train_epochs` must be a number above 0, got 0"),
            ]
        ),
        (
            "train {model} {data} --problems --dataset_streaming --max_steps 5 --dataset_train_split train[:2]",
            "A stream has no slices",
        ),
        ("train {model} {data} --problems --config {mixture}", "`dataset_name` and `datasets` both name data"),
        ("train {model} --problems --config {mixture} --dataset_train_split a", "no effect on `datasets`"),
        (
            "train {model} --problems --config {mixture} --eval_strategy steps --eval_steps 1",
            "`datasets` has none. Pass `--test_split_size 0.1`",
        ),
        (
            "train {model} {data} --problems --dataset_train_split train[:2]+train[3:]",
            "`dataset_train_split` must be a split or a slice of one",
        ),
        ("train {model} --problems --config {wrong_mixture}", "wrong type: .*'file'"),
        (
            'train {model} {data} --problems --lr_scheduler_kwargs {{"min":0}}',
            "with `lr_scheduler_type='linear'` and `lr_scheduler_kwargs={'min': 0}` does not work: .*'min'",
        ),
        ("train {model} {data} --problems --report_to dvclive", "`report_to=.'dvclive'.` does not work: .*dvclive"),
        ("train {model} {data} --problems --report_to foo", "`report_to=.'foo'.` does not work: foo is not supported"),
        ("train {model} {data} --problems --learning_rate=-1", "`learning_rate=-1.0` with .* does not work: Invalid"),
        *(
            (
                f"{command} --learning_rate nan",
                "`learning_rate` must be a finite number, got nan. Pass for example 1e-6",
            )
            for command in ("train {model} {data} --problems", "demo {data} --eval_size 2")
        ),
        ("train {model} {data} --problems --accelerate_config {broken}", "file of `accelerate_config` is not YAML: "),
        ("train {small} {data} --problems --model_name_or_path=", "`model_name_or_path` is empty. Give it a value"),
        *(
            (f"train {{small}} {{data}} --problems --model_name_or_path {path}", f"There is no directory '{path}' for")
            for path in ("/no/where", "./nowhere", "no/where/at_all")
        ),
        (
            "train {small} {data} --problems --model_name_or_path {adapter}",
            r"`model_name_or_path='.*'` is an adapter, without its base model\. Merge it",
        ),
        ("train {model} {data} --problems --optim lomo", "`optim='lomo'` does not work: .*lomo"),
        ("train {model} {data} --problems --output_dir=", "`output_dir` is empty"),
        ("train {model} {data} --problems --lr_scheduler_type cosine_with_min_lr", "One of min_lr or min_lr_rate"),
        ("demo --config {small_file}", "has options that `trl-a3po demo` does not have: dataset_nam"),
        ("demo --eval_size 0", "`eval_size` must be 1 or more, got 0"),
        ("demo --dataset_name none.jsonl", "no file 'none.jsonl'"),
        ("demo {data}", "Cannot hold out 256 of 8 rows.*Set `eval_size`"),
        ("demo {data} --eval_size 2 --report_to dvclive", "`report_to=.'dvclive'.` does not work: .*dvclive"),
        ("demo {data} --eval_size 2 --lr_scheduler_type cosine_with_min_lr", "One of min_lr or min_lr_rate"),
        ("demo --dataset_name script.py", "no file 'script.py'"),
        ("demo {data} --eval_size 2", "The training dataset has 6 rows, fewer than the 16 prompts"),
        ("demo {data} --eval_size 2 --num_generations 64 --model_name_or_path ./nowhere", "nowhere"),
    ],
)
def test_bad_lines_are_refused_before_anything_starts(arguments, message, tmp_path, capsys):
    texts = {
        "list.yaml": "[1]",
        "broken.yaml": "{",
        "null.yaml": "num_generations: null",
        "mixture.yaml": yaml.safe_dump({"datasets": [{"path": "json", "data_files": "a.jsonl"}]}),
        "wrong_mixture.yaml": yaml.safe_dump({"datasets": [{"path": "a.jsonl", "file": "a.jsonl"}]}),
        "small_file.yaml": "dataset_nam: a.jsonl",
        "no_steps.yaml": "max_steps: 0",
        "no_epochs.yaml": "max_steps: -1\nnum_train_epochs: 0",
        "empty.jsonl": "",
    }
    files = {}
    for name, text in texts.items():
        files[name.partition(".")[0]] = tmp_path / name
        (tmp_path / name).write_text(text)
    files["adapter"] = tmp_path / "adapter"
    files["adapter"].mkdir()
    (files["adapter"] / "adapter_config.json").touch()
    small = f"--output_dir {tmp_path} --use_cpu --bf16 False"
    data = f"--dataset_name {write_rows(tmp_path / 'rows.jsonl', GSM8K)}"
    model = f"{small} --model_name_or_path nowhere"
    with pytest.raises(SystemExit) as error:
        cli.main(arguments.format(small=small, data=data, model=model, **files).split())
    assert error.value.code == 2
    printed = capsys.readouterr().err
    usage, refusal = printed[printed.index("usage:") :].split("\n", 1)
    assert len(usage) < 100
    assert re.search(message, refusal)
    assert refusal.count("\n") == 1 or arguments in ("", "trian")


def test_help_lists_the_options_of_the_shaping_together(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    shaping = capsys.readouterr().out.split("\nwhat A3POConfig adds to GRPOConfig:\n")[1]
    shaping = shaping.split("\nmodel:\n")[0]
    assert re.findall(r"\n  --(\w+)", "\n" + shaping) == [
        *("shaping", "shaping_args"),
        *("positive_low_ratio", "positive_low_scale", "positive_high_ratio", "positive_high_scale"),
        *("negative_low_ratio", "negative_low_scale", "negative_high_ratio", "negative_high_scale"),
        *("token_metric", "scale_decay", "scale_decay_steps"),
        *("positive_weight", "negative_weight", "dynamic_sampling"),
        *("trim_padding", "no_trim_padding", "skip_zero_advantage", "no_skip_zero_advantage"),
        *("skip_old_logps", "no_skip_old_logps", "log_tokens"),
    ]


# Datasets


def logs(output_dir):
    return json.loads((output_dir / "trainer_state.json").read_text())["log_history"]


EVALUATES = ["--problems", "--eval_strategy", "steps", "--eval_steps", "1", "--per_device_eval_batch_size", "8"]


@pytest.mark.parametrize(
    "options",
    [
        ["--test_split_size", "0.25"],
        ["--dataset_train_split", "train[:75%]", "--dataset_test_split", "train[75%:]"],
    ],
    ids=["test_split_size", "slices"],
)
def test_a_file_is_split_for_evaluation(options, file, tmp_path, capsys):
    dataset = write_rows(tmp_path / "problems.jsonl", GSM8K)
    train.train(["--config", file(), "--dataset_name", dataset, *EVALUATES, *options])
    assert "6 problems to train on, 2 to evaluate on" in capsys.readouterr().out
    assert any("eval_reward" in log for log in logs(tmp_path / "output"))


def test_problems_that_are_both_trained_and_evaluated_on_are_warned_of(file, tmp_path, caplog):
    dataset = write_rows(tmp_path / "problems.jsonl", GSM8K)
    shared = ["--dataset_train_split", "train[:6]", "--dataset_test_split", "train[4:]"]
    train.train(["--config", file(), "--dataset_name", dataset, *EVALUATES, *shared])
    assert "2 of 4 rows to evaluate on have a problem that is trained on too" in caplog.text


def test_a_folder_has_a_test_split(file, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "train.jsonl", GSM8K)
    write_rows(tmp_path / "data" / "test.jsonl", GSM8K[:3])
    train.train(["--config", file(), "--dataset_name", str(tmp_path / "data"), *EVALUATES])
    assert "8 problems to train on, 3 to evaluate on" in capsys.readouterr().out


def test_a_missing_split_is_named(file, tmp_path):
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "train.jsonl", GSM8K)
    with pytest.raises(train.UsageError, match=r"has no split 'test', only train\. .*`--test_split_size 0.1`"):
        train.train(["--config", file(), "--dataset_name", str(tmp_path / "data"), *EVALUATES])


def test_files_of_a_mixture(file, tmp_path, capsys):
    datasets = [{"path": write_rows(tmp_path / name, GSM8K[:5])} for name in ("a.jsonl", "b.jsonl")]
    train.train(["--config", file(datasets=datasets), *EVALUATES, "--test_split_size", "2"])
    assert "8 problems to train on, 2 to evaluate on" in capsys.readouterr().out


@pytest.mark.parametrize(("count", "size"), [(3, "3"), (3, "5"), (1, "0.5")])
def test_a_test_split_of_all_rows_is_refused(count, size, file, tmp_path):
    dataset = write_rows(tmp_path / "problems.jsonl", GSM8K[:count])
    message = rf"`test_split_size={size}` leaves no rows to train on: the dataset '.*problems.jsonl' has {count} in"
    with pytest.raises(train.UsageError, match=message):
        train.train(["--config", file(), "--dataset_name", dataset, *EVALUATES, "--test_split_size", size])


def test_a_file_is_streamed(file, tmp_path):
    dataset = write_rows(tmp_path / "problems.jsonl", GSM8K)
    line = ["--config", file(), "--dataset_name", dataset, "--problems", "--dataset_streaming"]
    if "Iterable datasets are not yet supported" in inspect.getsource(trl.GRPOTrainer):
        with pytest.raises(train.UsageError, match="Iterable datasets are not yet supported"):
            train.train(line)
    else:
        train.train(line)
        assert_trained(tmp_path / "output")


def test_a_dataset_smaller_than_a_generation_batch(file, tmp_path):
    dataset = write_rows(tmp_path / "problems.jsonl", GSM8K[:3])
    line = ["--config", file(num_generations=2), "--dataset_name", dataset, "--problems"]
    with pytest.raises(train.UsageError, match="The training dataset has 3 rows, fewer than the 4 prompts"):
        train.train(line)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ('{"question": 1\n', [], "Cannot read the dataset '.*problems.jsonl': .*JSON"),
        ('{"question": "1+1?", "answer": ""}\n', [], "None of the 1 problems has both a text and a final answer"),
        (
            '{"question": "1+1?", "answer": "$no.$ $x$"}\n',
            ["--reward_funcs", "nowhere.reward"],
            "`reward_funcs` names 'nowhere.reward', but .*: No module named 'nowhere'",
        ),
        ('{"text": "1+1?"}\n', [], r"has the columns \['text'\]"),
        (
            '{"question": ["1+1?"], "answer": "2"}\n',
            [],
            r"Row 0 \(counted from 0\) of the problems for training from '.*problems.jsonl': a problem must be a text",
        ),
        (json.dumps(GSM8K[0]) + "\n", ["--reward_funcs", f"{__name__}.no_reward"], "has no such function"),
        (json.dumps(GSM8K[0]) + "\n", ["--reward_funcs", "no_reward"], "Could not load reward function 'no_reward'"),
        (
            json.dumps(GSM8K[0]) + "\n",
            ["--per_device_train_batch_size", "2", "--num_generations", "2", "--model_name_or_path", "./nowhere"],
            "nowhere",
        ),
    ],
)
def test_mistakes_that_are_found_while_loading(content, options, message, file, tmp_path):
    dataset = tmp_path / "problems.jsonl"
    dataset.write_text(content)
    with pytest.raises(train.UsageError, match=message) as error:
        train.train(["--config", file(), "--dataset_name", str(dataset), "--problems", *options])
    assert "\n" not in str(error.value)


def test_a_damaged_model_is_named(model_dir, file, tmp_path):
    model = shutil.copytree(model_dir, tmp_path / "model")
    (weights,) = model.glob("*.safetensors")
    os.truncate(weights, weights.stat().st_size // 2)
    line = ["--config", file(), "--dataset_name", write_rows(tmp_path / "problems.jsonl", GSM8K), "--problems"]
    with pytest.raises(
        train.UsageError, match=rf"Cannot load the model '{model}': a file of its weights is damaged: "
    ):
        train.train([*line, "--model_name_or_path", str(model)])


@pytest.mark.parametrize("length", [["--max_steps", "1"], ["--max_steps", "-1", "--num_train_epochs", "0.1"]])
def test_resuming_from_beyond_the_end(length, file, tmp_path):
    dataset = write_rows(tmp_path / "problems.jsonl", GSM8K)
    line = ["--config", file(save_steps=1), "--dataset_name", dataset, "--problems"]
    train.train([*line, "--max_steps", "2"])
    with pytest.raises(train.UsageError, match=r"checkpoint-2' is of step 2, beyond the 1 steps of the training"):
        train.train([*line, *length, "--resume_from_checkpoint", "True"])


def test_resuming_without_a_checkpoint(file, tmp_path):
    dataset = write_rows(tmp_path / "problems.jsonl", GSM8K)
    line = ["--config", file(), "--dataset_name", dataset, "--problems", "--resume_from_checkpoint", "True"]
    with pytest.raises(train.UsageError, match="checkpoint"):
        train.train(line)


def test_an_output_directory_that_cannot_be_written_is_refused(file, tmp_path):
    """Also if no checkpoint will be: the trained model is saved there."""
    dataset = write_rows(tmp_path / "problems.jsonl", GSM8K)
    (tmp_path / "output").write_text("a file")
    with pytest.raises(train.UsageError, match=r"Cannot write to `output_dir='.*output'` \(File exists\)"):
        train.train(["--config", file(save_strategy="no"), "--dataset_name", dataset, "--problems"])


def test_a_loss_that_trl_does_not_know(file, tmp_path):
    dataset = write_rows(tmp_path / "problems.jsonl", GSM8K)
    with pytest.raises(train.UsageError, match=r"`loss_type='gpro'` is not known to the loss of TRL .*default is"):
        train.train(["--config", file(), "--dataset_name", dataset, "--problems", "--loss_type", "gpro"])


def failing_reward(completion_ids, **kwargs):
    raise ValueError("of the reward")


def test_errors_of_training_keep_their_traceback(file, tmp_path):
    dataset = write_rows(tmp_path / "problems.jsonl", GSM8K)
    line = ["--config", file(reward_funcs=[f"{__name__}.failing_reward"]), "--dataset_name", dataset, "--problems"]
    with pytest.raises(ValueError, match="of the reward") as error:
        train.train(line)
    assert not isinstance(error.value, train.UsageError)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [["--num_processes", "1", "--cpu"], ["--num_processes", "2"]], ids=["one", "two"])
def test_a_mistake_ends_in_one_line_without_a_traceback(launcher, file, tmp_path):
    (tmp_path / "problems.jsonl").write_text('{"question": 1\n')
    config = file(accelerate_config="single_gpu" if "--cpu" in launcher else "fsdp2")
    command = [sys.executable, "-m", "trl_a3po.cli", "train", "--config", config, "--problems", *launcher]
    command += ["--dataset_name", str(tmp_path / "problems.jsonl")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    (message,) = re.findall("^trl-a3po train: error: (.*)$", result.stderr, re.MULTILINE)
    assert re.match("Cannot read the dataset .*problems.jsonl.*JSON", message)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    ("number", "kill", "status"),
    [(signal.SIGTERM, os.kill, 143), (signal.SIGINT, os.kill, 130), (signal.SIGINT, os.killpg, 130)],
    ids=["terminate", "interrupt", "interrupt in a terminal"],
)
def test_a_signal_ends_all_processes(number, kill, status, processes, file, tmp_path):
    options = {"max_steps": 1000000, "save_steps": 1, "save_total_limit": 1, "save_only_model": True}
    config = file(accelerate_config="single_gpu" if processes == 1 else "fsdp2", **options)
    command = [sys.executable, "-m", "trl_a3po.cli", "train", "--config", config, "--problems"]
    command += ["--num_processes", str(processes), *(["--cpu"] if processes == 1 else [])]
    command += ["--dataset_name", write_rows(tmp_path / "problems.jsonl", GSM8K * 2)]
    with (tmp_path / "printed").open("w+") as printed:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=printed,
            start_new_session=True,
            # Shells have what runs in the background ignore it, and these tests may.
            preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        try:
            while not list(tmp_path.glob("output/checkpoint-*")):
                assert process.poll() is None, (tmp_path / "printed").read_text()
                time.sleep(0.1)
            kill(process.pid, number)
            process.communicate(timeout=60)  # until the last process has closed its end of the pipe
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == status
    assert "Traceback" not in (tmp_path / "printed").read_text()


@pytest.mark.parametrize(("code", "status", "message"), [(1, 1, ""), (2, 2, ""), (-9, 137, "SIGKILL.*memory")])
def test_the_launcher_adds_no_traceback(code, status, message, file, tmp_path, monkeypatch, capsys):
    def launch(arguments):
        raise subprocess.CalledProcessError(code, "python")

    monkeypatch.setattr(train, "launch_command", launch)
    dataset = write_rows(tmp_path / "problems.jsonl", GSM8K)
    assert cli.main(["train", "--config", file(), "--dataset_name", dataset, "--problems"]) == status
    assert re.search(message, capsys.readouterr().err)


# Answers


def test_any_accepted_answer_is_rewarded(file, tmp_path, monkeypatch):
    """Every completion says the second of two accepted answers."""
    seen = []

    def say_it(completions, solution, **kwargs):
        said = [[{"role": "assistant", "content": "\\boxed{0.25}"}] for _ in completions]
        seen.extend(zip(solution, original(said, solution, **kwargs), strict=True))
        return [reward for _, reward in seen[-len(said) :]]

    original = rewards.accuracy_reward
    monkeypatch.setattr(rewards, "accuracy_reward", say_it)
    truths = [["1/2", "0.25"], ["1/2", "3"]] * 4
    rows = [{"prompt": f"{i}+1=", "reward_model": {"ground_truth": truth}} for i, truth in enumerate(truths)]
    dataset = write_rows(tmp_path / "problems.jsonl", rows)
    train.train(["--config", file(), "--dataset_name", dataset, "--problems"])
    assert seen
    assert all(reward == float("$0.25$" in solution) for solution, reward in seen)


def test_rows_without_a_reward_are_counted(file, tmp_path, caplog):
    rows = [*GSM8K[:6], {"question": "a", "answer": "####"}, {"question": "b", "answer": "$\\ $ $"}]
    dataset = write_rows(tmp_path / "problems.jsonl", rows)
    train.train(["--config", file(num_generations=4), "--dataset_name", dataset, "--problems"])
    assert "Skipped 1 of 8 problems: row 6" in caplog.text


def test_the_epochs_of_a_length_in_steps_have_no_meaning(file, monkeypatch):
    monkeypatch.setattr(train, "_launch", lambda arguments: 0)
    line = ["--config", file(num_train_epochs=0), "--dataset_name", "on/the-hub", "--problems"]
    assert train.main(line) == 0


def test_an_optimizer_that_needs_the_model_is_left_to_the_trainer(file, monkeypatch):
    def needs_model(args, model=None):
        raise ValueError("You need to pass a model")

    monkeypatch.setattr(train.A3POTrainer, "get_optimizer_cls_and_kwargs", staticmethod(needs_model))
    monkeypatch.setattr(train, "_launch", lambda arguments: 0)
    assert train.main(["--config", file(), "--dataset_name", "on/the-hub", "--problems"]) == 0


# TRL's script


def test_trl_is_left_as_it_was(file, tmp_path):
    trainer, init = trl.GRPOTrainer, trl.GRPOTrainer.__init__
    dataset = write_rows(tmp_path / "problems.jsonl", GSM8K)
    train.train(["--config", file(), "--dataset_name", dataset, "--problems"])
    assert trl.GRPOTrainer is trainer
    assert trl.GRPOTrainer.__init__ is init
    with pytest.raises(ZeroDivisionError), train.trains_with(lambda: None):
        _ = 1 / 0
    assert trl.GRPOTrainer is trainer
    assert trl.GRPOTrainer.__init__ is init


def test_a_script_with_a_trainer_of_its_own_is_refused_before_it_trains(file, tmp_path, monkeypatch):
    """As if TRL's script imported GRPOTrainer at the top of its module."""
    from trl import GRPOTrainer

    steps = []

    def script(script_args, training_args, model_args, dataset_args):
        trainer = GRPOTrainer(model_args.model_name_or_path, parity_reward, training_args, tiny.prompts())
        steps.append(trainer.train())

    monkeypatch.setattr(grpo, "main", script)
    dataset = write_rows(tmp_path / "problems.jsonl", GSM8K)
    with pytest.raises(RuntimeError, match=rf"does not work with TRL {trl.__version__}.*would train with GRPO"):
        train.train(["--config", file(), "--dataset_name", dataset, "--problems"])
    assert not steps
    monkeypatch.setattr(grpo, "main", lambda *arguments: None)
    with pytest.raises(RuntimeError, match="does not work with TRL"):
        train.train(["--config", file(), "--dataset_name", dataset, "--problems"])


def test_the_installed_script_trains_with_our_trainer(file, tmp_path):
    made = []

    class StopError(Exception):
        pass

    def make_trainer(**keywords):
        made.append(keywords)
        raise StopError

    dataset = write_rows(tmp_path / "rows.jsonl", [{"prompt": "1+1="}])
    line = ["--config", file(), "--dataset_name", dataset, "--reward_funcs", "accuracy_reward"]
    script, config, model, mixture, _ = train.make_parser().parse_args_and_config(line, return_remaining_strings=True)
    train._resolve(script, config, mixture)
    with pytest.raises(StopError), train.trains_with(make_trainer):
        grpo.main(script, config, model, mixture)
    assert {"train_dataset", "eval_dataset", "args", "model"} <= made[0].keys()


# Recipes


def test_a_recipe_is_found_by_its_name(capsys):
    assert recipes().keys() == {recipe.stem for recipe in RECIPES}
    words = train.make_parser().find_config(["--config", "a3po-gsm8k-lora", "--seed", "1"])
    assert Path(words[1]).samefile(next(recipe for recipe in RECIPES if recipe.stem == "a3po-gsm8k-lora"))
    assert words[2:] == ["--seed", "1"]
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"the name of a recipe that comes with the package: {', '.join(recipes())}." in text.replace("- ", "-")


def test_recipes_of_the_installed_package_are_found(tmp_path, monkeypatch):
    (tmp_path / "trl_a3po" / "recipes").mkdir(parents=True)
    (tmp_path / "trl_a3po" / "recipes" / "mine.yaml").write_text("seed: 1")
    monkeypatch.setattr("trl_a3po.cli.parser.PACKAGE", tmp_path / "trl_a3po")
    assert list(recipes()) == ["mine"]


def test_a_file_of_a_recipes_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a3po-gsm8k-lora").write_text("seed: 1")
    assert train.make_parser().find_config(["--config=a3po-gsm8k-lora"]) == ["--config", "a3po-gsm8k-lora"]


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
