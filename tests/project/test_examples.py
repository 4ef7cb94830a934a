"""The example trains, and its commands are read by the parsers that they go to."""

import os
import re
import runpy
import shlex
import string
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from datasets import Dataset
from trl import TrlParser
from trl.rewards import accuracy_reward

from trl_a3po import A3POConfig


EXAMPLES = Path(__file__).parents[2] / "examples"
GSM8K = runpy.run_path(str(EXAMPLES / "gsm8k.py"))
CONFIGS, *COMMANDS = re.findall(r"```bash\n(.*?)\n```", (EXAMPLES / "README.md").read_text(), flags=re.DOTALL)
ON_THIS_MACHINE = ["--use_cpu", "True", "--bf16", "False"]


# What TRL's configurations say, and Accelerate reads.
SHARDED = {
    "multi_gpu": {"distributed_type": "MULTI_GPU", "num_processes": 8},
    "fsdp2": {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}},
    "zero2": {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2}},
    "zero3": {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 3}},
}


@pytest.fixture(scope="module")
def configs():
    """The directory that the first command of the page finds."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    shell = ["bash", "-c", f"{CONFIGS}; echo $CONFIGS"]
    return Path(subprocess.check_output(shell, env={**os.environ, "PATH": path}, text=True).strip())


def parse_script(words, output_dir):
    assert words[0] == "examples/gsm8k.py"
    on_this_machine = ["--use_cpu", "True", "--bf16", "False", "--output_dir", str(output_dir)]
    args, model_args = GSM8K["parse"]([*words[1:], *on_this_machine])
    assert isinstance(args, A3POConfig)
    return args, model_args


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command, configs, tmp_path):
    variables = {"CONFIGS": configs, "RANK": 1, "HEAD": "10.0.0.1", "SERVER": "10.0.0.3"}
    program, *words = shlex.split(string.Template(command).substitute(variables))
    if program == "trl":
        server = pytest.importorskip("trl.scripts.vllm_serve")
        assert words.pop(0) == "vllm-serve"
        TrlParser(server.ScriptArguments).parse_args_and_config(words)
    elif program == "accelerate":
        assert words.pop(0) == "launch"
        launch = launch_command_parser().parse_args(words)
        assert Path(launch.config_file).stem in SHARDED
        parse_script([launch.training_script, *launch.training_script_args], tmp_path)
    else:
        assert program == "python"
        parse_script(words, tmp_path)


@pytest.mark.parametrize("name", SHARDED)
def test_configurations_say_what_the_page_says(name, configs):
    config = load_config_from_file(str(configs / f"{name}.yaml"))
    for field, expected in SHARDED[name].items():
        value = getattr(config, field)
        assert expected.items() <= value.items() if isinstance(expected, dict) else value == expected


@pytest.mark.parametrize(
    ("options", "weights"),
    [([], "model.safetensors"), (["--use_peft", "--lora_target_modules", "all-linear"], "adapter_model.safetensors")],
)
def test_gsm8k_trains(options, weights, model_dir, tmp_path):
    small = "--max_steps 1 --max_completion_length 8 --per_device_train_batch_size 8 --gradient_accumulation_steps 1"
    words = ["examples/gsm8k.py", "--model_name_or_path", model_dir, *small.split(), "--report_to", "none", *options]
    rows = [{"question": f"what is {i} + 1?", "answer": f"one more.\n#### {i + 1}"} for i in range(8)]
    GSM8K["train"](*parse_script(words, tmp_path), Dataset.from_list(rows))
    assert (tmp_path / weights).exists()


def test_gsm8k_maps_its_dataset_to_what_the_reward_reads():
    row = GSM8K["to_conversation"]({"question": "6 times 170?", "answer": "<<6*170=1020>>\n#### 1,020"})
    completions = [[{"role": "assistant", "content": text}] for text in ("It is \\boxed{1020}.", "\\boxed{102}")]
    assert accuracy_reward(completions, [row["solution"]] * 2) == [1.0, 0.0]
