"""What is evaluated is the model as it was trained: its files, adapter, chat template, end tokens and class."""

import dataclasses
import json
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
import trl
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support import adapters, tiny
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from trl_a3po import A3POTrainer
from trl_a3po.evaluation import models
from trl_a3po.evaluation.models import (
    Chat,
    can_be_merged,
    check_weights,
    find_model,
    fingerprint,
    load_adapted_model,
    load_chat,
    load_model,
    ordinary_checkpoint,
    resolve_dtype,
    trained_chat_template_kwargs,
)
from trl_a3po.evaluation.runs import score
from trl_a3po.evaluation.samplers import Request, Sampling, transformers_engine
from trl_a3po.rewards import reasoning_accuracy_reward


PROMPTS = [[*range(3, 3 + length)] for length in (5, 5, 5, 5)] + [[*range(9, 14)], [40, 5, 30, 6, 22]]
GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, end_ids=(1,))


def greedy(model):
    return transformers_engine(model, GREEDY)([Request(prompt, 12, 0) for prompt in PROMPTS])


def reference(adapter, more_tokens=0):
    """By PEFT itself, with the adapter beside its base model, one prompt at a time."""
    base = AutoModelForCausalLM.from_pretrained(adapter.parent / "base", dtype=torch.float32)
    base.resize_token_embeddings(base.config.vocab_size + more_tokens)
    model = PeftModel.from_pretrained(base, adapter).eval()
    completions = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=1,
        )
        completions.append(output[0, -(output.shape[1] - len(prompt)) :].tolist())
    return completions


# Adapters


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")
@pytest.mark.filterwarnings("ignore:.*tied layer is part of the adapter:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
@pytest.mark.parametrize("kind", adapters.MERGED)
def test_a_merged_adapter_completes_as_the_adapter(kind, tmp_path):
    config, fields = adapters.MERGED[kind]
    adapter = adapters.save(tmp_path, config, **fields)
    files = find_model(str(adapter))
    assert can_be_merged(files)
    with ordinary_checkpoint(files, "float32", tmp_path) as directory:
        assert not list(directory.glob("adapter*"))
        merged = greedy(load_model(directory, "float32"))
    assert not directory.exists()
    assert merged == reference(adapter)
    assert merged != greedy(load_model(tmp_path / "base", "float32"))


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")
@pytest.mark.filterwarnings("ignore:.*tied layer is part of the adapter:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fields", [{}, {"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}])
def test_an_adapter_with_more_tokens_than_its_base_completes_as_the_adapter(fields, tied, tmp_path):
    adapter = adapters.save(tmp_path, adapters.lora(**fields), more_tokens=3, tie_word_embeddings=tied)
    files = find_model(str(adapter))
    base = load_model(tmp_path / "base", "float32")
    assert load_chat(files).vocabulary == base.config.vocab_size + 3
    with ordinary_checkpoint(files, "float32", tmp_path) as directory:
        merged = load_model(directory, "float32")
    assert merged.config.vocab_size == base.config.vocab_size + 3
    assert greedy(merged) == reference(adapter, more_tokens=3)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_an_adapter_that_lacks_weights_of_new_tokens_is_refused(tmp_path):
    adapter = adapters.save(tmp_path, adapters.lora(target_modules=["embed_tokens", "q_proj"]), more_tokens=3)
    is_refused(adapter, r"training changed the number of tokens from \d+ to \d+, .* new weights of lm_head\. Merge")


@pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning:UserWarning")
def test_prompt_tuning_completes_as_the_adapter(tmp_path):
    adapter = adapters.save(tmp_path, adapters.PROMPT_TUNING)
    files = find_model(str(adapter))
    assert not can_be_merged(files)
    completed = greedy(load_adapted_model(files, "float32"))
    assert completed == reference(adapter)
    assert completed != greedy(load_model(tmp_path / "base", "float32"))


def test_a_merge_that_changes_the_model_is_refused(tmp_path, monkeypatch):
    adapter = adapters.save(tmp_path, adapters.lora())

    def forgetful(self, *args, **kwargs):
        return self.unload()

    monkeypatch.setattr(PeftModel, "merge_and_unload", forgetful, raising=False)
    with (
        pytest.raises(ValueError, match="gives other logits after it is merged"),
        ordinary_checkpoint(find_model(str(adapter)), "float32", tmp_path),
    ):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "base"}


def content(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_only_temporary_directories_of_an_evaluation_are_deleted(tmp_path):
    adapter = adapters.save(tmp_path, adapters.lora())
    tiny.save(tmp_path / "merged")
    # What a killed evaluation leaves, a copy of it, and a directory of the same kind of name.
    for name, mark in [("temporary-a", "temporary-a"), ("temporary-b", "temporary-a"), ("temporary-c", None)]:
        tiny.save(tmp_path / name)
        if mark:
            (tmp_path / name / "temporary").write_text(mark)
    before = content(tmp_path)
    with ordinary_checkpoint(find_model(str(tmp_path / "merged")), "float32", tmp_path) as directory:
        assert directory == tmp_path / "merged"
    assert content(tmp_path) == before
    with ordinary_checkpoint(find_model(str(adapter)), "float32", tmp_path):
        assert not (tmp_path / "temporary-a").exists()
    assert content(tmp_path) == {path: each for path, each in before.items() if path.parts[0] != "temporary-a"}


def test_an_adapter_without_a_tokenizer_has_that_of_its_base(tmp_path):
    adapter = adapters.save(tmp_path, adapters.lora())
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (adapter / name).unlink(missing_ok=True)
    files = find_model(str(adapter))
    assert load_chat(files).encode([{"role": "user", "content": "12"}]) == tiny.tokenizer()("12").input_ids


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_model_name_or_path": None}, "`base_model_name_or_path` in its `adapter_config.json` is None"),
        ({"base_model_name_or_path": 7}, "`base_model_name_or_path` in its `adapter_config.json` is 7"),
        ({"base_model_name_or_path": "no/where"}, "The base model of the adapter .* 'no/where' is not a directory"),
    ],
)
def test_an_adapter_without_its_base_is_refused(change, message, tmp_path):
    adapter = adapters.save(tmp_path, adapters.lora())
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        find_model(str(adapter))


def test_an_adapter_in_the_directory_of_its_base_is_refused(tmp_path):
    adapter = adapters.save(tmp_path, adapters.lora())
    base = Path(json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"])
    for path in adapter.glob("adapter_*"):
        shutil.copy(path, base)
    with pytest.raises(ValueError, match="has an adapter and its base model in one directory"):
        find_model(str(base))


def test_a_directory_without_a_model_is_refused(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(ValueError, match=r"contains no model: neither .*`\. Pass `--checkpoints`"):
        find_model(str(tmp_path))


def test_a_directory_with_named_adapters_is_refused_with_their_paths(tmp_path):
    for path in ("second", "first", "checkpoint-3"):
        (tmp_path / path).mkdir()
        (tmp_path / path / "adapter_config.json").write_text("{}")
    message = f"Pass one of them: '{tmp_path}/first', '{tmp_path}/second'. Pass `--checkpoints`"
    with pytest.raises(ValueError, match=re.escape(message)):
        find_model(str(tmp_path))


@pytest.mark.parametrize(("in_config", "in_training"), [("v1", "v2"), (None, "v2"), (None, None)])
def test_the_base_of_an_adapter_has_the_revision_of_the_training(in_config, in_training, tmp_path, monkeypatch):
    adapter = adapters.save(tmp_path, adapters.lora())
    path = adapter / "adapter_config.json"
    change = {"base_model_name_or_path": "user/base", "revision": in_config}
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    if in_training:
        torch.save(tiny.config(tmp_path, model_init_kwargs={"revision": in_training}), adapter / "training_args.bin")
    asked = []
    monkeypatch.setattr(
        models, "snapshot_download", lambda name, revision, **_: asked.append((name, revision)) or tmp_path / "base"
    )
    assert find_model(str(adapter)).base_revision == (in_config or in_training)
    assert asked == [("user/base", in_config or in_training)]


def test_a_base_on_the_disk_has_no_revision(tmp_path):
    adapter = adapters.save(tmp_path, adapters.lora())
    torch.save(tiny.config(tmp_path, model_init_kwargs={"revision": "main"}), adapter / "training_args.bin")
    assert find_model(str(adapter)).base_revision is None


def test_the_tokenizer_beside_an_adapter_has_the_class_of_that_beside_its_base(tmp_path):
    adapter = adapters.save(tmp_path, adapters.lora())
    for directory in (adapter, tmp_path / "base"):
        edit(directory / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")  # wrong, as in some repositories
    beside_adapter, beside_base = (load_chat(find_model(str(each))).processor for each in (adapter, tmp_path / "base"))
    assert type(beside_adapter) is type(beside_base)


# Files that are not whole


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(path, change):
    save_file(change(load_file(path)), path, {"format": "pt"})


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def without_second_layer(weights):
    return {name: weight for name, weight in weights.items() if ".layers.1." not in name}


def is_refused(model, message):
    """In one line, by whatever loads the model."""
    with pytest.raises(ValueError, match=message) as error:  # noqa: PT012
        files = find_model(str(model))
        load_chat(files)
        if files.is_adapter and not can_be_merged(files):
            load_adapted_model(files, "float32")
        with ordinary_checkpoint(files, "float32", files.directory) as directory:
            load_model(directory, "float32")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1500


CLASSIFIER = {"architectures": ["Qwen2ForSequenceClassification"]}
QUANTIZED = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
MODELS = {
    "without a layer": (
        lambda model: edit_weights(model / "model.safetensors", without_second_layer),
        r"do not have all weights of Qwen2ForCausalLM: model\.layers\.1\.input_layernorm\.weight, .* and 9 more\.",
    ),
    "truncated": (lambda model: truncate(model / "model.safetensors"), "Cannot load the model '.*': Safetensor"),
    "no weights": (lambda model: (model / "model.safetensors").unlink(), "contains no weights: neither"),
    "another size": (
        lambda model: edit(model / "config.json", vocab_size=99),
        "other sizes .*: lm_head.weight, model",
    ),
    "no class": (lambda model: edit(model / "config.json", architectures=None), "`architectures` in .* is None"),
    "unknown class": (lambda model: edit(model / "config.json", architectures=["Own"]), r"is \['Own'\]. It must"),
    "classifier": (lambda model: edit(model / "config.json", **CLASSIFIER), "Cannot load the model .*score|generate"),
    "quantized": (lambda model: edit(model / "config.json", **QUANTIZED), "Cannot load the model '.*'"),
    "no JSON": (lambda model: truncate(model / "tokenizer.json"), "Cannot load the tokenizer in '.*'"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_that_cannot_be_loaded_whole_is_refused(kind, tmp_path):
    model = Path(tiny.save(tmp_path))
    change, message = MODELS[kind]
    change(model)
    is_refused(model, message)


@pytest.mark.parametrize("kind", ["without a layer", "another size"])
def test_weights_are_checked_without_being_read(kind, tmp_path, monkeypatch):
    model, loaded = Path(tiny.save(tmp_path)), []
    monkeypatch.setattr(models, "load_model", lambda *args, **kwargs: loaded.append(load_model(*args, **kwargs)))
    check_weights(model)
    assert {parameter.device.type for parameter in loaded[0].parameters()} == {"meta"}
    change, message = MODELS[kind]
    change(model)
    with pytest.raises(ValueError, match=message):
        check_weights(model)


def test_a_model_that_generates_no_text_is_refused(tmp_path):
    tiny.save(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, num_labels=2)
    transformers.Qwen2ForSequenceClassification(config).save_pretrained(tmp_path)
    is_refused(tmp_path, "Qwen2ForSequenceClassification does not generate text")


def renamed(weights):
    return {name.replace("base_model.model.", "base_model.other."): weight for name, weight in weights.items()}


WEIGHTS = "adapter_model.safetensors"
ADAPTERS = {
    "under other names": (lambda adapter: edit_weights(adapter / WEIGHTS, renamed), "base_model"),
    "of half of the layers": (
        lambda adapter: edit_weights(adapter / WEIGHTS, without_second_layer),
        r"Found missing adapter keys while loading the checkpoint: .*layers\.1\.",
    ),
    "with more layers": (
        lambda adapter: edit_weights(
            adapter / WEIGHTS,
            lambda weights: (
                weights | {name.replace("layers.1", "layers.2"): weights[name].clone() for name in weights}
            ),
        ),
        r"its base model has no place for its weights .*layers\.2\.mlp\.",
    ),
    "truncated": (lambda adapter: truncate(adapter / WEIGHTS), "Cannot load the adapter '.*': Safetensor"),
    "no weights": (lambda adapter: (adapter / WEIGHTS).unlink(), "is an adapter without weights: neither"),
    "unknown type": (lambda adapter: edit(adapter / "adapter_config.json", peft_type="OWN"), "the adapter .*OWN"),
    "no JSON": (lambda adapter: (adapter / "adapter_config.json").write_text("{"), "Cannot load the adapter '.*'"),
    "base of another size": (
        lambda adapter: tiny.save(adapter.parent / "base", hidden_size=48),
        "Cannot load the adapter '.*': RuntimeError: .*size mismatch",
    ),
    "base not whole": (
        lambda adapter: edit_weights(adapter.parent / "base" / "model.safetensors", without_second_layer),
        "Cannot load the adapter '.*': Cannot load the model '.*base': its files do not have all weights",
    ),
    "base quantized": (
        lambda adapter: edit(adapter.parent / "base" / "config.json", **QUANTIZED),
        "Cannot load the adapter '.*': Cannot load the model '.*base'",
    ),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_that_cannot_be_loaded_whole_is_refused(kind, tmp_path):
    adapter = adapters.save(tmp_path, adapters.lora())
    change, message = ADAPTERS[kind]
    change(adapter)
    is_refused(adapter, message)
    assert not list(adapter.glob("temporary-*"))


@pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning:UserWarning")
def test_prompt_tuning_without_its_prompt_is_refused(tmp_path):
    adapter = adapters.save(tmp_path, adapters.PROMPT_TUNING)
    edit_weights(adapter / WEIGHTS, lambda weights: {"other": weights["prompt_embeddings"]})
    is_refused(adapter, "Cannot load the adapter '.*': .*prompt_embeddings")


@pytest.mark.parametrize("fields", [{"tie_word_embeddings": True}, {}])
def test_weights_that_are_tied_are_not_missing(fields, tmp_path):
    tiny.save(tmp_path, **fields)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not fields.get("tie_word_embeddings")
    assert greedy(load_model(tmp_path, "float32"))


# Fingerprints


@pytest.mark.parametrize(
    ("file", "part"),
    [
        ("base/model.safetensors", "weights"),
        ("base/config.json", "configuration"),
        ("adapter/tokenizer.json", "tokenizer"),
        ("adapter/chat_template.jinja", "tokenizer"),
        ("adapter/adapter_model.safetensors", "adapter"),
        ("adapter/adapter_config.json", "adapter"),
        ("base/modeling_own.py", "code"),
    ],
)
def test_a_change_of_a_file_changes_its_part_of_the_fingerprint(file, part, tmp_path):
    adapter = adapters.save(tmp_path, adapters.lora())
    (tmp_path / "base" / "modeling_own.py").write_text("pass  ")
    files = find_model(str(adapter))
    before = fingerprint(files)
    path = tmp_path / file
    stat, content = path.stat(), path.read_bytes()
    path.write_bytes(content[:-2] + b"\n ")  # of the same size, and as old
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = fingerprint(files)
    assert {name for name in before if before[name] != after[name]} == {part}


def test_what_does_not_act_is_not_in_the_fingerprint(tmp_path):
    tiny.save(tmp_path)
    before = fingerprint(find_model(str(tmp_path)))
    for name in ("training_args.bin", "optimizer.pt", "trainer_state.json", "README.md", "results.json", "run.json"):
        (tmp_path / name).write_text("{}")
    shutil.copytree(tmp_path, tmp_path / "checkpoint-2", ignore=lambda *_: ["checkpoint-2"])
    moved = shutil.copytree(tmp_path, tmp_path.with_name(f"{tmp_path.name}-moved"))
    assert fingerprint(find_model(str(tmp_path))) == fingerprint(find_model(str(moved))) == before


# Chat template, tokens


def test_the_chat_template_is_called_as_in_training(tmp_path, monkeypatch):
    """By what a real run leaves beside its model."""
    model = tiny.save(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = (
        tiny.CHAT_TEMPLATE + "{% if enable_thinking is not defined or enable_thinking %}7{% endif %}"
    )
    args = tiny.config(tmp_path / "run", max_steps=1, chat_template_kwargs={"enable_thinking": False})
    trainer = A3POTrainer(
        model, tiny.parity_reward, args, tiny.prompts(conversational=True), processing_class=tokenizer
    )
    seen = []
    generate = trainer._generate_single_turn
    trainer._generate_single_turn = lambda ids, *rest, **keywords: seen.extend(ids) or generate(ids, *rest, **keywords)
    trainer.train()
    trainer.save_model()
    files = find_model(str(tmp_path / "run"))
    assert trained_chat_template_kwargs(files) == {"enable_thinking": False}
    chat = load_chat(files, trained_chat_template_kwargs(files))
    prompts = [row["prompt"] for row in tiny.prompts(conversational=True)]
    assert seen
    assert {tuple(ids) for ids in seen} <= {tuple(chat.encode(prompt)) for prompt in prompts}
    assert load_chat(files).encode(prompts[0]) == [*chat.encode(prompts[0]), *tokenizer("7").input_ids]


@pytest.mark.skipif(
    Version(trl.__version__) < Version("1.8.0") or Version(transformers.__version__) < Version("5.13.0"),
    reason="has no response templates",
)
def test_what_is_scored_is_what_the_reward_of_the_training_reads(tmp_path):
    """With a response template, training takes the reasoning out. Here it stands in parentheses."""
    fields = {
        "reasoning_content": {"open": "(", "close_pattern": r"\)", "content": "text"},
        "content": {"close_pattern": r"<eos>", "content": "text"},
    }
    model = tiny.save(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.response_template = {"defaults": {"role": "assistant"}, "start_anchor": "=", "fields": fields}
    read = []

    def reward(completions, completion_ids, prompts, **kwargs):
        for completion, ids, prompt in zip(completions, completion_ids, prompts, strict=True):
            read.append((prompt, ids, completion[0]["content"]))
        return tiny.parity_reward(completion_ids)

    args = tiny.config(tmp_path / "run", max_steps=2, max_completion_length=40)
    trainer = A3POTrainer(model, reward, args, tiny.prompts(conversational=True), processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    chat = load_chat(find_model(str(tmp_path / "run")))
    assert [chat.answer(chat.encode(prompt), ids) for prompt, ids, _ in read] == [content for _, _, content in read]
    assert any(content and content != chat.decode(ids) for _, ids, content in read)
    ends = dataclasses.replace(chat, reasoning_delimiters=("9",))
    assert [ends.answer(chat.encode(prompt), ids) for prompt, ids, _ in read] == [
        content.split("9")[-1] if "9" in content else "" for _, _, content in read
    ]


@pytest.mark.parametrize("delimiters", [["</think>"], ["</think>", "|"], ["|", "</think>"]])
@given(parts=st.lists(st.sampled_from([r"\boxed{2}", r"\boxed{3}", "</think>", "|", "so "]), max_size=6))
def test_reasoning_ends_where_the_reward_says(parts, delimiters):
    text = "".join(parts)
    processor = SimpleNamespace(decode=lambda *_, **__: text)
    chat = Chat(processor, (), (), None, None, reasoning_delimiters=tuple(delimiters))
    messages = [[{"role": "assistant", "content": text}]]
    expected = reasoning_accuracy_reward(messages, ["$2$"], reasoning_delimiters=delimiters)
    assert score([chat.answer([], [])], "$2$") == expected


def test_no_code_of_the_training_arguments_is_run(tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'run'}",)

    tiny.save(tmp_path)
    (tmp_path / "training_args.bin").unlink(missing_ok=True)
    for value in (Malicious(), {"chat_template_kwargs": Malicious()}, [Malicious()]):
        with zipfile.ZipFile(tmp_path / "training_args.bin", "w") as archive:
            archive.writestr("training_args/data.pkl", pickle.dumps(value))
        assert trained_chat_template_kwargs(find_model(str(tmp_path))) is None
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [None, b"", b"text", pickle.dumps({"chat_template_kwargs": {}})])
def test_training_arguments_that_cannot_be_read_are_not_known(content, tmp_path):
    tiny.save(tmp_path)
    if content is not None:
        (tmp_path / "training_args.bin").write_bytes(content)
    assert trained_chat_template_kwargs(find_model(str(tmp_path))) is None


def test_arguments_that_the_chat_template_does_not_read_are_refused(model_dir):
    with pytest.raises(ValueError, match=r"`chat_template_kwargs`: the chat template of '.*' ignores enable_thinkin"):
        load_chat(find_model(model_dir), {"enable_thinkin": False})


def test_end_tokens_are_those_of_tokenizer_and_model(tmp_path):
    for declared, expected in [(None, (1,)), (1, (1,)), (5, (1, 5)), ([5, 6], (1, 5, 6)), ([-1, 5], (1, 5))]:
        tiny.save(tmp_path)
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": declared}))
        assert load_chat(find_model(str(tmp_path))).end_ids == expected
    (tmp_path / "generation_config.json").unlink()
    assert load_chat(find_model(str(tmp_path))).end_ids == (1,)


@pytest.mark.parametrize("declared", [["x"], "x", [1.5]])
def test_end_tokens_that_are_none_are_named(declared, tmp_path):
    tiny.save(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": declared}))
    with pytest.raises(ValueError, match=f"the model '{tmp_path}': .*eos_token_id") as error:
        load_chat(find_model(str(tmp_path)))
    assert "TypeError" not in str(error.value)


def test_a_model_without_a_tokenizer_is_refused(tmp_path):
    tiny.save(tmp_path)
    for path in tmp_path.glob("*token*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer\. Save the one of the model there"):
        load_chat(find_model(str(tmp_path)))


@pytest.mark.parametrize("name", ["thinking", "enable", "able_think"])
def test_a_part_of_a_name_that_the_chat_template_reads_is_refused(name, tmp_path):
    tiny.save(tmp_path)
    template = "{% if enable_thinking %}yes{% endif %}" + tiny.CHAT_TEMPLATE
    (tmp_path / "chat_template.jinja").write_text(template)
    load_chat(find_model(str(tmp_path)), {"enable_thinking": False})
    with pytest.raises(ValueError, match=f"ignores {name}"):
        load_chat(find_model(str(tmp_path)), {name: False})


def test_an_argument_that_did_nothing_in_training_is_only_warned_of(tmp_path, caplog):
    files = find_model(tiny.save(tmp_path))
    chat = load_chat(files, {"enable_thinking": False}, are_of_training=True)
    assert "ignores enable_thinking. It is an argument of the training" in caplog.text
    prompt = [{"role": "user", "content": "12"}]
    assert chat.encode(prompt) == load_chat(files).encode(prompt)


def test_an_end_token_outside_the_vocabulary_changes_nothing(model_dir):
    model = load_model(Path(model_dir), "float32")
    requests = [Request(prompt, 12, 0) for prompt in ([3, 4, 5], [6, 7])]
    plain, with_more = (
        transformers_engine(model, Sampling(0.0, 1.0, 0, end_ids))(requests) for end_ids in ((1,), (99, 1))
    )
    assert with_more == plain


def test_a_model_without_a_padding_token(tmp_path):
    model = tiny.save(tmp_path)
    config = AutoConfig.from_pretrained(model)
    config.pad_token_id = None
    config.save_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(model)
    assert AutoTokenizer.from_pretrained(model).pad_token is None
    files = find_model(model)
    chat = load_chat(files)
    requests = [Request(chat.encode([{"role": "user", "content": text}]), 8, 0) for text in ("1", "2+2=", "1+2+3=")]
    sampling = Sampling(0.0, 1.0, 0, chat.end_ids)
    engine = transformers_engine(load_model(files.base, "float32"), sampling)
    assert engine(requests) == [engine([request])[0] for request in requests]


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path):
    model = tiny.save(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(model)
    Path(model, "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="has no chat template"):
        load_chat(find_model(model))


# Classes and data types


def test_the_data_type_is_that_of_the_configuration(model_dir, tmp_path):
    config = AutoConfig.from_pretrained(model_dir)
    assert resolve_dtype("auto", config) == "float32"
    assert resolve_dtype("bfloat16", config) == "bfloat16"
    config.dtype = torch.bfloat16
    assert resolve_dtype("auto", config) == "bfloat16"
    config.dtype = torch.float64
    with pytest.raises(ValueError, match="data type float64 is not supported"):
        resolve_dtype("auto", config)


TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_heads": 2,
    "depth": 1,
    "out_hidden_size": 32,
    "image_size": 28,
    "patch_size": 14,
}
SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
VISION_LANGUAGE = {
    "Qwen2_5_VL": ("Qwen2_5_VLForConditionalGeneration", {"rope_parameters": SECTIONS, "rope_scaling": SECTIONS}),
    "Qwen3VL": ("Qwen3VLForConditionalGeneration", {"rope_parameters": SECTIONS, "rope_scaling": SECTIONS}),
    "Mistral3": ("Mistral3ForConditionalGeneration", {}),
    "SmolVLM": ("SmolVLMForConditionalGeneration", {}),
}


@pytest.mark.parametrize("family", VISION_LANGUAGE)
def test_models_for_images_are_evaluated_on_text(family, tmp_path):
    """Those that AutoModelForCausalLM does not load."""
    architecture, text = VISION_LANGUAGE[family]
    model_class = getattr(transformers, architecture, None)
    if model_class is None:
        pytest.skip(f"transformers {transformers.__version__} has no {architecture}")
    config = getattr(transformers, f"{family}Config")(text_config={**TEXT, **text}, vision_config=VISION)
    for each in (config, config.get_text_config()):
        each.eos_token_id, each.pad_token_id, each.bos_token_id = 1, 0, None
    for name in (
        "image_token_id",
        "image_token_index",
        "video_token_id",
        "vision_start_token_id",
        "vision_end_token_id",
    ):
        if hasattr(config, name) or family.startswith("Qwen"):  # older ones have no defaults
            setattr(config, name, 60)
    torch.manual_seed(0)
    model = model_class(config)
    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    files = find_model(str(tmp_path))
    chat = load_chat(files)
    assert chat.context == 128
    requests = [Request(chat.encode([{"role": "user", "content": text}]), 6, 3) for text in ("1", "2+2=")]
    engine = transformers_engine(load_model(files.base, resolve_dtype("auto", config)), Sampling(1.0, 1.0, 0, (1,)))
    completions = engine(requests)
    assert all(0 < len(ids) <= 6 for ids in completions)
    assert completions == [engine([request])[0] for request in requests]
