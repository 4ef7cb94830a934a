"""The model that every method starts from: trained from scratch, by imitation of demonstrations of mixed quality."""

from collections.abc import Iterator
from itertools import islice

import torch
from countdown import Problem, vocabulary
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def word_tokenizer(largest: int) -> PreTrainedTokenizerFast:
    """One token for each word of the task."""
    words = ["<pad>", "<end>", "<unknown>", *vocabulary(largest)]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unknown>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unknown>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        chat_template=CHAT_TEMPLATE,
    )


def untrained_model(tokenizer: PreTrainedTokenizerFast, hidden_size: int, layers: int, heads: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def imitate(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    stream: Iterator[tuple[Problem, str]],
    *,
    steps: int,
    batch_size: int,
    peak_learning_rate: float,
) -> float:
    """Next-token prediction of the completions, not of the prompts. Returns the last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_learning_rate, total_steps=steps, pct_start=0.05)
    model.train()
    for _ in range(steps):
        batch = list(islice(stream, batch_size))
        texts = [f"{problem.prompt} {completion} {tokenizer.eos_token}" for problem, completion in batch]
        inputs = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").to(model.device)
        prompt_length = len(batch[0][0].prompt.split())  # that of every problem
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        labels[:, :prompt_length] = -100
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return loss.item()
