"""Train the start model of the demo from scratch: `python -m trl_a3po.demo.pretrain OUTPUT_DIR`.

The package contains the result, `start_model`. Run this only to make it again (about six minutes on two CPU cores).
"""

import argparse
import json
import random
from itertools import islice
from pathlib import Path
from typing import cast

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import BatchEncoding, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from trl_a3po.demo.arithmetic import demonstrations


STEPS = 2500
BATCH_SIZE = 128
PEAK_LEARNING_RATE = 3e-3

END, PAD = "<|end|>", "<|pad|>"
ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|' + message['role'] + '|>' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{%- generation %}{{- message['content'] + '<|end|>' }}{%- endgeneration %}"
    "{%- else %}{{- message['content'] + '<|end|>' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer with one token for each UTF-8 byte and one for each marker of the chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END, PAD, *ROLES])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        padding_side="left",
        model_max_length=2048,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def untrained_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Returns an untrained model of 0.3 million parameters."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=3,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Trains the model to predict the tokens of the demonstrated solutions. The questions have no loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=STEPS, pct_start=0.05)
    stream = demonstrations(random.Random(0))
    model.train()
    for step in range(1, STEPS + 1):
        conversations = [
            [{"role": "user", "content": question}, {"role": "assistant", "content": solution}]
            for question, solution in islice(stream, BATCH_SIZE)
        ]
        encoded = tokenizer.apply_chat_template(
            conversations, padding=True, return_tensors="pt", return_dict=True, return_assistant_tokens_mask=True
        )
        batch = cast(BatchEncoding, encoded)
        labels = batch["input_ids"].masked_fill(batch["assistant_masks"] == 0, -100)
        loss = model(batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step}/{STEPS}  loss {loss.item():.4f}", flush=True)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output_dir: Path) -> None:
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    # transformers 5 writes a class name that transformers 4 does not know. Both know this one.
    path = output_dir / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the start model of the demo from scratch.")
    parser.add_argument("output_dir", type=Path)
    output_dir = parser.parse_args().output_dir
    set_seed(0)
    tokenizer = byte_tokenizer()
    model = untrained_model(tokenizer)
    train(model, tokenizer)
    save(model, tokenizer, output_dir)


if __name__ == "__main__":
    main()
