"""What a model writes is anybody's text: nothing that prints, logs or saves it on its way runs it or breaks on it."""

import json
import logging
from pathlib import Path

import pandas as pd
import pytest
import torch
from datasets import Dataset
from support import tiny
from support.demo_program import SMALL, START_MODEL, run_demo
from transformers import AutoConfig, AutoTokenizer
from trl import ModelConfig

from trl_a3po import A3POConfig, A3POTrainer
from trl_a3po.rewards import accuracy_reward
from trl_a3po.training.input_checks import check_rewards


HOSTILE = {
    "colours": "\x1b[31mred\x1b[0m",
    "title of the terminal": "\x1b]0;title\x07",
    "clipboard": "\x1b]52;c;cm0gLXJm\x07",
    "control characters": "".join(map(chr, [*range(32), *range(127, 160)])),
    "markup of rich": "[bold]x[/bold][link=file:///etc/passwd]y[/link][/]",
    "HTML": "<script>alert(1)</script>",
    "Markdown": "---\n# heading\n![x](http://127.0.0.1/x.png)\n```",
    "direction": "\u202eabc\u2066",
    "Jinja": "{{ 7 * 7 }}{% for x in y %}{{ cycler.__init__ }}",
    "format": "%s%n{}{0.__class__}",
    "path": "../../etc/passwd",
    "code": "__import__('os')._exit(1)",
    "marker of the chat template": "<|end|><|assistant|>",
    "nothing": "",
}


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte, so that it can write anything."""
    return AutoTokenizer.from_pretrained(START_MODEL)


def says(texts):
    """A rollout in which the model answers with the given texts."""

    def rollout(prompts, trainer):
        tokenizer = trainer.processing_class
        template = {"tokenize": False, "add_generation_prompt": True}
        as_text = [p if isinstance(p, str) else tokenizer.apply_chat_template(p, **template) for p in prompts]
        completion_ids = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
        return {
            "prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in as_text],
            "completion_ids": completion_ids,
            "logprobs": [[-1.0] * len(ids) for ids in completion_ids],
        }

    return rollout


def content(text):
    return text if isinstance(text, str) else text[0]["content"]


def as_decoded(text):
    return text.replace("<|end|>", "").replace("<|assistant|>", "")  # special tokens are no text


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func':UserWarning")
@pytest.mark.parametrize("conversational", [False, True], ids=["text", "conversations"])
def test_prompts_and_completions(conversational, tokenizer, tmp_path, caplog):
    texts = [text for text in HOSTILE.values() for _ in range(2)]
    prompts = [f"{text}=" for text in HOSTILE.values()]
    seen = []

    def reward(prompts, completions, log_extra, **kwargs):
        seen.extend(zip(map(content, prompts), map(content, completions), strict=True))
        log_extra("completion again", [content(completion) for completion in completions])
        # None for all of a prompt is what TRL warns of, showing prompt and completion.
        return [None, None, *(float(i % 2) for i in range(len(completions) - 2))]

    trainer = A3POTrainer(
        model=tiny.model(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id),
        reward_funcs=reward,
        args=tiny.config(
            tmp_path,
            max_steps=1,
            num_generations=2,
            per_device_train_batch_size=len(texts),
            max_completion_length=100,
            shuffle_dataset=False,
            log_completions=True,
            save_strategy="steps",
            save_steps=1,
        ),
        train_dataset=Dataset.from_dict(
            {"prompt": [[{"role": "user", "content": p}] for p in prompts] if conversational else prompts}
        ),
        processing_class=tokenizer,
        rollout_func=says(texts),
    )
    caplog.set_level(logging.WARNING)
    trainer.train()

    assert [completion for _, completion in seen] == list(map(as_decoded, texts))
    assert [prompt for prompt, _ in seen] == [prompt for prompt in prompts for _ in range(2)]
    (table,) = (tmp_path / "completions").glob("*.parquet")
    assert pd.read_parquet(table)["completion again"].tolist() == list(map(as_decoded, texts))
    assert "\x1b" not in caplog.text
    for path in (tmp_path / "README.md", tmp_path / "checkpoint-1" / "trainer_state.json"):
        written = path.read_text(encoding="utf-8")
        assert not any(text in written for text in HOSTILE.values() if text)
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


@pytest.mark.parametrize("text", [*HOSTILE.values(), "a\ud800b", "x" * 10_000_000], ids=lambda text: repr(text)[:30])
def test_the_error_that_shows_a_prompt(text):
    for prompt in (text, [{"role": "user", "content": text}]):
        with pytest.raises(ValueError, match="gave inf") as error:
            check_rewards(torch.tensor([[torch.inf]]), torch.ones(1), ["reward"], [prompt])
        assert str(error.value).isprintable()
        assert len(str(error.value)) < 1000


@pytest.mark.slow
def test_the_demo_prints_nothing_of_its_problems(tmp_path):
    rows = [{"question": text, "answer": f"{text}#### 1"} for text in HOSTILE.values()]
    (tmp_path / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)))
    output = run_demo(tmp_path, "--dataset_name", "problems.jsonl", "--max_steps", "1", "--eval_size", "4", *SMALL)
    assert output.replace("\n", "").isprintable()
    assert not any(text in output for text in HOSTILE.values() if text)


@pytest.mark.parametrize(
    "answer",
    [
        *HOSTILE.values(),
        "a\ud800b",
        "__import__('pathlib').Path('ran').touch()",
        r"\text{__import__('pathlib').Path('ran').touch()}",
        "9" * 5000,
        r"\frac{1" * 200 + "}" * 200,
        "9^{9^{9^{9}}}",  # as long as math-verify gives it: 5 s
    ],
    ids=lambda answer: repr(answer)[:30],
)
def test_an_answer_is_scored_and_not_run(answer, tmp_path, monkeypatch):
    pytest.importorskip("math_verify")
    monkeypatch.chdir(tmp_path)
    completion = [{"role": "assistant", "content": f"\\boxed{{{answer}}}"}]
    assert accuracy_reward([completion], ["$228$"]) == [0.0]
    assert not list(tmp_path.iterdir())


def test_ten_megabytes_in_one_line():
    pytest.importorskip("math_verify")
    completion = [{"role": "assistant", "content": "1" * 10_000_000}]
    assert accuracy_reward([completion], ["$228$"]) == [0.0]


@pytest.mark.slow
def test_code_that_comes_with_a_model_does_not_run(tmp_path):
    """Neither by the trainer nor by the demo, as long as nobody asks for it."""
    for config in (A3POConfig(str(tmp_path), use_cpu=True, bf16=False), ModelConfig()):
        assert not getattr(config, "trust_remote_code", False)  # some releases of TRL have it in the one, some in both
    model = tiny.save(tmp_path / "model")
    for name in ("config.json", "tokenizer_config.json"):
        path = Path(model, name)
        classes = {
            "AutoConfig": "code.Config",
            "AutoModelForCausalLM": "code.Model",
            "AutoTokenizer": [None, "code.T"],
        }
        path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": classes}))
    ran = tmp_path / "ran"
    Path(model, "code.py").write_text(f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n")
    trainer = A3POTrainer(model, tiny.parity_reward, tiny.config(tmp_path / "run"), tiny.prompts())
    assert type(trainer.model).__module__.startswith("transformers.")
    run_demo(tmp_path, "--model_name_or_path", model, "--max_steps", "1", "--eval_size", "2", *SMALL)
    assert not ran.exists()
    with pytest.raises(AttributeError, match="has no attribute"):
        AutoConfig.from_pretrained(model, trust_remote_code=True)
    assert ran.exists()  # so it would
