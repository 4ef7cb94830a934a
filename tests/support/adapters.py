"""Adapters of every kind that training takes, with weights that change what a tiny model says."""

from copy import deepcopy

import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM

from support import tiny


TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lora(**fields):
    return LoraConfig(**{"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **fields})


# Name to the configuration of the adapter, and of the model under it.
MERGED = {
    "lora": (lora(), {}),
    "rank and alpha patterns": (
        lora(rank_pattern={"q_proj": 16, "down_proj": 2}, alpha_pattern={"v_proj": 64, r"layers\.0\..*up_proj": 1}),
        {},
    ),
    "rslora": (lora(use_rslora=True, r=16), {}),
    "dora": (lora(use_dora=True), {}),
    "bias": (lora(bias="all"), {}),
    "modules to save": (lora(modules_to_save=["lm_head", "embed_tokens"]), {}),
    "modules to save, tied": (lora(modules_to_save=["lm_head"]), {"tie_word_embeddings": True}),
    "embeddings, tied": (lora(target_modules=[*TARGETS, "embed_tokens"]), {"tie_word_embeddings": True}),
    "output, tied": (lora(target_modules=[*TARGETS, "lm_head"]), {"tie_word_embeddings": True}),
    "tokens": (TrainableTokensConfig(token_indices=[*range(3, 20)], task_type="CAUSAL_LM"), {}),
    "tokens, tied": (lora(trainable_token_indices=[*range(3, 20)]), {"tie_word_embeddings": True}),
    "ia3": (
        IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
        ),
        {},
    ),
    "loha": (LoHaConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"), {}),
}
PROMPT_TUNING = PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM", tokenizer_name_or_path=None)


def save(directory, config, more_tokens=0, **model):
    """
    Writes an adapter into `directory/adapter`, and its base model into `directory/base`, as the trainer does. The
    training may have added tokens.
    """
    base = AutoModelForCausalLM.from_pretrained(tiny.save(directory / "base", **model), dtype=torch.float32)
    torch.manual_seed(1)
    if more_tokens:
        base.resize_token_embeddings(base.config.vocab_size + more_tokens)
    adapted = get_peft_model(base, deepcopy(config))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.6))
    adapted.save_pretrained(directory / "adapter")
    tiny.tokenizer().save_pretrained(directory / "adapter")
    return directory / "adapter"
