"""A language model of a few thousand parameters, its tokenizer, prompts and rewards: enough to train for real."""

import functools
import gc
import importlib.metadata
import os
import re

import torch
import trl
from datasets import Dataset
from packaging.version import Version
from peft import LoraConfig
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from trl_a3po import A3POConfig


# accelerate collects garbage whenever training begins. To search all that is imported by now would take half the time
# of training a model this small.
gc.collect()
gc.freeze()

# accelerate asks dozens of times whether a package is installed, and its metadata is parsed each time.
importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)

LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo"]
if Version(trl.__version__) >= Version("1.10.0"):
    # Before, it trained on padding, and averaged over the padded width: the trainer refuses it.
    LOSS_TYPES.append("luspo")

# `benchmarks/on_gpu.py` asks for the GPU.
USES_CPU = os.environ.get("TEST_DEVICE", "cpu") == "cpu"
DEVICE = "cpu" if USES_CPU else "cuda"  # of trainers
if not USES_CPU:
    # On a GPU, kernels may add in another order each time, and many tests compare two runs to the last bit. For some
    # operations there is no other kernel: these only warn.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # which no user's run does

CHARACTERS = "0123456789+-=*().? abcdefghijklmnopqrstuvwxyz\\{}$"
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


# What computes GRPO's update in GRPO's own way, and what is GRPO.
PLAIN = {"trim_padding": False, "skip_zero_advantage": False, "skip_old_logps": False}
NEUTRAL = {"positive_low_scale": 1.0, "negative_high_scale": 1.0, **PLAIN}


def tokenizer():
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
        model_input_names=["input_ids", "attention_mask"],
    )


def model(seed=0, **config):
    torch.manual_seed(seed)
    defaults = {
        "vocab_size": len(tokenizer()),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "initializer_range": 0.3,  # so that the probabilities of tokens differ
        "tie_word_embeddings": False,
    }
    return Qwen2ForCausalLM(Qwen2Config(**{**defaults, **config}))


def save(directory, **config):
    """Writes model and tokenizer, as the reference model of a KL term and every resumed run loads them."""
    model(**config).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return str(directory)


def lora():
    """The trainer's argument for an adapter of the model."""
    return {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")}


def prompts(rows=16, conversational=False):
    texts = [f"{i}+{i * 7 % 10}=" for i in range(rows)]
    return Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": text}] for text in texts] if conversational else texts,
            "solution": [f"${i + i * 7 % 10}$" for i in range(rows)],
        }
    )


def parity_reward(completion_ids, **kwargs):
    """1 for about half of all completions, 0 for the others."""
    return [float(sum(ids) % 2) for ids in completion_ids]


def signed_parity_reward(completion_ids, **kwargs):
    return [1.0 if sum(ids) % 2 else -1.0 for ids in completion_ids]


def digit_reward(completions, **kwargs):
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [len(re.findall(r"\d", text)) / 8 for text in texts]


def equal_reward(completions, **kwargs):
    return [1.0] * len(completions)


def sometimes_none_reward(completion_ids, **kwargs):
    return [None if sum(ids) % 3 == 0 else float(sum(ids) % 2) for ids in completion_ids]


def config(output_dir, config_class=A3POConfig, **fields):
    defaults = {
        "use_cpu": USES_CPU,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 8,
        "max_steps": 3,
        "seed": 3,
    }
    return config_class(str(output_dir), **{**defaults, **fields})


def parameters(trainer):
    """Copies on the CPU. Of a model that processes share by FSDP2, each puts the whole together: all must call it."""
    parameters = {name: parameter.detach() for name, parameter in trainer.model.named_parameters()}
    return {
        name: (each.full_tensor() if hasattr(each, "full_tensor") else each).to("cpu", copy=True)
        for name, each in parameters.items()
    }
