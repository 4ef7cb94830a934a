"""What users give to a rollout: found before it is used."""

import pytest
from support import tiny
from support.training import make


def test_a_token_that_the_model_does_not_have_is_refused(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["@"])
    trainer = make(tmp_path, arguments={"processing_class": tokenizer}, max_steps=1)
    prompts = trainer.train_dataset.to_list()
    trainer.train_dataset = trainer.train_dataset.from_list(
        [{**row, "prompt": row["prompt"] + "@"} for row in prompts]
    )
    size = len(tokenizer)
    with pytest.raises(
        ValueError, match=f"has token {size - 1}, but the vocabulary of the model has {size - 1} tokens"
    ):
        trainer.train()
