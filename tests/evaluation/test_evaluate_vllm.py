"""The evaluation by vLLM, the real engine on a CPU, says what the one by transformers says: `make test-vllm`."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest


pytest.importorskip("vllm")

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from support import adapters, tiny, vllm_on_cpu
from support.generation import INHERITED

import trl_a3po.demo
from trl_a3po.demo import arithmetic
from trl_a3po.evaluation.compare import compare, read_result
from trl_a3po.evaluation.runs import EvaluateArguments, evaluate
from trl_a3po.evaluation.samplers import Request, Sampling, seed_of, vllm_engine


pytestmark = [
    pytest.mark.vllm,
    # How vLLM looks through torch for kernels.
    pytest.mark.filterwarnings("ignore:`torch.distributed.reduce_op` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    # What PEFT says of embeddings that are tied and adapted, when it makes such an adapter.
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*tied layer is part of the adapter:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]

START_MODEL = Path(trl_a3po.demo.__file__).parent / "start_model"
ENGINE = {"dtype": "float32", "max_model_len": 64, "gpu_memory_utilization": 0.05}
SAMPLED = Sampling(temperature=1.0, top_p=0.95, top_k=0, end_ids=(1,))


@pytest.fixture(autouse=True)
def _engines():
    with vllm_on_cpu.engines():
        yield


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("model"), **vllm_on_cpu.MODEL)


@pytest.fixture
def run(tmp_path):
    """Evaluates by both engines: the directories of transformers' and vLLM's evaluation."""

    def run(model, problems, **fields):
        for use_vllm in (False, True):
            defaults = {"dtype": "float32", "gpu_memory_utilization": 0.05, "use_vllm": use_vllm}
            output = str(tmp_path / ("vllm" if use_vllm else "transformers"))
            evaluate(EvaluateArguments(str(model), "-", output, **{**defaults, **fields}), problems)
        return tmp_path / "transformers", tmp_path / "vllm"

    return run


def completions(directory):
    lines = (directory / "samples.jsonl").read_text().splitlines()
    return [json.loads(line)["completions"] for line in lines]


def sums(number=12):
    return Dataset.from_list(
        [{"prompt": [{"role": "user", "content": f"{i}+1="}], "solution": "$2$"} for i in range(number)]
    )


GREEDY = {"temperature": 0.0, "num_samples": 1, "max_completion_length": 12}


@pytest.mark.parametrize("kind", ["full", *adapters.MERGED])
def test_greedy_completions_are_the_same(kind, model_dir, run, tmp_path):
    model = model_dir
    if kind != "full":
        config, fields = adapters.MERGED[kind]
        model = adapters.save(tmp_path, config, **{**vllm_on_cpu.MODEL, **fields})
    expected, found = map(completions, run(model, sums(), **GREEDY))
    assert found == expected
    assert len({text for (text,) in found}) > 2


def test_nothing_is_inherited_from_the_generation_config(model_dir, run, tmp_path):
    plain = completions(run(model_dir, sums(), **GREEDY)[1])
    model = tiny.save(tmp_path / "model", **vllm_on_cpu.MODEL)
    fields = {name: value for name, value in INHERITED.items() if name != "eos_token_id"}
    Path(model, "generation_config.json").write_text(json.dumps(fields))
    arguments = EvaluateArguments(
        model, "-", str(tmp_path / "out"), use_vllm=True, gpu_memory_utilization=0.05, dtype="float32", **GREEDY
    )
    evaluate(arguments, sums())
    assert completions(tmp_path / "out") == plain


def test_completions_end_at_every_end_token(run, tmp_path):
    model = tiny.save(tmp_path / "model", **vllm_on_cpu.MODEL)
    Path(model, "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 9, 14, 20]}))
    expected, found = run(model, sums(), **GREEDY)
    assert completions(found) == completions(expected)
    lengths = [json.loads(line)["tokens"] for line in (found / "samples.jsonl").read_text().splitlines()]
    assert min(lengths) < [12]


def test_a_model_without_some_of_its_weights_is_refused(model_dir, tmp_path):
    model = shutil.copytree(model_dir, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    message = r"do not have all weights of Qwen2ForCausalLM: model\.layers\.1\.mlp\.down_proj\.weight\."
    with pytest.raises(ValueError, match=message), vllm_engine(model, SAMPLED, **ENGINE):
        pass


def test_what_vllm_does_not_load_is_one_line(model_dir):
    options = {**ENGINE, "max_model_len": 10**6}  # more than the context
    with (
        pytest.raises(ValueError, match=r"Cannot load the model '.*' with vLLM: ") as error,
        vllm_engine(model_dir, SAMPLED, **options),
    ):
        pass
    assert "\n" not in str(error.value)


def test_no_two_samples_share_their_random_numbers(model_dir):
    keys = [(seed, row, index) for seed in (0, 1) for row in range(8) for index in range(4)]
    endless = Sampling(temperature=1.0, top_p=1.0, top_k=0, end_ids=())
    requests = [Request([3, 4, 5], 16, seed_of(seed, "p", row, index)) for seed, row, index in keys]
    with vllm_engine(model_dir, endless, **ENGINE) as engine:
        drawn = engine(requests)
        assert len({tuple(ids) for ids in drawn}) == len(keys)
        # The same whatever the batch and the order.
        assert engine(requests[::-1])[::-1] == drawn
        assert [engine([request])[0] for request in requests[:8]] == drawn[:8]


def test_tokens_have_the_probabilities_of_the_model(model_dir):
    from transformers import AutoModelForCausalLM

    number = 2000
    with vllm_engine(model_dir, SAMPLED, **ENGINE) as engine:
        drawn = engine([Request([3, 4, 5], 1, seed_of(0, "", 0, index)) for index in range(number)])
    counts = Counter(ids[0] for ids in drawn)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with torch.no_grad():
        ranked = model(torch.tensor([[3, 4, 5]])).logits[0, -1].softmax(-1).sort(descending=True)
    kept = ranked.values.cumsum(-1) - ranked.values < 0.95
    probabilities = ranked.values[kept] / ranked.values[kept].sum()
    assert set(counts) <= set(ranked.indices[kept].tolist())
    for token, probability in zip(ranked.indices[kept].tolist(), probabilities.tolist(), strict=True):
        error = (number * probability * (1 - probability)) ** 0.5
        assert abs(counts[token] - number * probability) < 4 * error + 1


def test_sampled_figures_are_within_their_intervals(run):
    rows = [arithmetic.row(problem) for problem in arithmetic.problems("test")[:160]]
    directories = run(START_MODEL, Dataset.from_list(rows), max_completion_length=40, batch_size=160)
    pair = compare(*(read_result(directory, directory.name) for directory in directories))
    difference = pair.differences["avg@8"].estimate
    assert difference.low < 0 < difference.high
    assert difference.high - difference.low < 0.1
    assert 0.1 < pair.second.estimates["avg@8"].mean < 0.4


def test_a_problem_that_does_not_fit_ends_nothing(model_dir, run):
    rows = [*sums(4), {"prompt": [{"role": "user", "content": "1" * 100}], "solution": "$2$"}, *sums(6)]
    rows.append({"prompt": [{"role": "user", "content": "1" * 60}], "solution": "$2$"})
    directories = run(model_dir, Dataset.from_list(rows), **{**GREEDY, "max_model_len": 64})
    expected, found = map(completions, directories)
    assert found == expected
    results = json.loads((directories[1] / "results.json").read_text())
    assert results["rows_not_sampled"] == {"4": "it has 100 tokens, but the context has 64"}
