import dataclasses
import inspect
import math
import re

import pytest
import yaml
from transformers import HfArgumentParser
from trl import GRPOConfig, TrlParser

from trl_a3po import A3POConfig


@pytest.fixture
def config(tmp_path):
    return lambda **fields: A3POConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **fields)


def test_defaults_are_a3po(config):
    assert config().shaping_settings == {
        "positive_low_ratio": 0.2,
        "positive_low_scale": 2.0,
        "positive_high_ratio": 0.0,
        "positive_high_scale": 1.0,
        "negative_low_ratio": 0.0,
        "negative_low_scale": 1.0,
        "negative_high_ratio": 0.2,
        "negative_high_scale": 2.0,
        "positive_weight": 1.0,
        "negative_weight": 1.0,
    }
    assert (config().token_metric, config().scale_decay, config().scale_decay_steps) == ("prob", "linear", 0.5)


def test_every_field_of_grpo_config_keeps_its_default():
    # Of a field without default, or with a factory, equality of the factories is enough.
    ours = {field.name: (field.default, field.default_factory) for field in dataclasses.fields(A3POConfig)}
    for field in dataclasses.fields(GRPOConfig):
        assert ours[field.name] == (field.default, field.default_factory)


def test_the_docstring_and_the_help_explain_every_field_in_the_same_words():
    added = {field.name for field in dataclasses.fields(A3POConfig)} - {f.name for f in dataclasses.fields(GRPOConfig)}
    assert len(added) == 20
    for field in dataclasses.fields(A3POConfig):
        if field.name in added:
            (explained,) = re.findall(
                rf"^    {field.name} \(.*?, defaults to `(.*?)`\):\n((?:        .*\n?)+)",
                inspect.getdoc(A3POConfig),
                flags=re.MULTILINE,
            )
            assert explained[0] == (f'"{field.default}"' if isinstance(field.default, str) else str(field.default))
            words = re.sub(r'`"(\w+)"`|"(\w+)"', r"'\1\2'", " ".join(explained[1].split()))
            assert words == field.metadata["help"]


def test_hf_argument_parser(tmp_path):
    arguments = f"--output_dir {tmp_path} --use_cpu --bf16 False --positive_low_scale 5 --scale_decay cosine"
    (config,) = HfArgumentParser(A3POConfig).parse_args_into_dataclasses(arguments.split())
    assert (config.positive_low_scale, config.scale_decay, config.negative_high_scale) == (5.0, "cosine", 2.0)


def test_trl_parser_with_yaml(tmp_path):
    fields = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "bf16": False,
        "negative_weight": 0,
        "negative_high_scale": 1,
        "scale_decay_steps": 300,
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(fields))
    (config,) = TrlParser(A3POConfig).parse_args_and_config(["--config", str(path), "--positive_low_ratio", "0.1"])
    assert (config.negative_weight, config.scale_decay_steps, config.positive_low_ratio) == (0, 300, 0.1)


RATIO = "must be a number from 0 to 1, got {}. It is the share of a completion's tokens to select: pass 0.2 for 20 %"
FACTOR = "must be a finite number that is not negative, got {}. It multiplies advantages, whose sign must stay: pass 1"
STEPS = "`scale_decay_steps` must be a whole number of steps, or a fraction of all steps between 0 and 1, got {}. Pass"

REFUSED = [
    ({"positive_low_ratio": 20}, "`positive_low_ratio` " + RATIO.format("20")),
    ({"positive_high_ratio": -0.2}, "`positive_high_ratio` " + RATIO.format("-0.2")),
    ({"negative_low_ratio": math.nan}, "`negative_low_ratio` " + RATIO.format("nan")),
    ({"negative_high_ratio": "a lot"}, "`negative_high_ratio` " + RATIO.format("'a lot'")),
    ({"positive_low_ratio": None}, "`positive_low_ratio` " + RATIO.format("None")),
    ({"positive_low_ratio": True}, "`positive_low_ratio` " + RATIO.format("True")),
    ({"negative_high_ratio": math.inf}, "`negative_high_ratio` " + RATIO.format("inf")),
    ({"positive_low_scale": -1.0}, "`positive_low_scale` " + FACTOR.format("-1.0")),
    ({"positive_high_scale": "2"}, "`positive_high_scale` " + FACTOR.format("'2'")),
    ({"negative_low_scale": math.nan}, "`negative_low_scale` " + FACTOR.format("nan")),
    ({"negative_high_scale": math.inf}, "`negative_high_scale` " + FACTOR.format("inf")),
    ({"negative_high_scale": [2.0, 1.0]}, "`negative_high_scale` " + FACTOR.format("[2.0, 1.0]")),
    ({"positive_weight": -1}, "`positive_weight` " + FACTOR.format("-1")),
    ({"negative_weight": None}, "`negative_weight` " + FACTOR.format("None")),
    ({"negative_weight": False}, "`negative_weight` " + FACTOR.format("False")),
    ({"token_metric": "logprob"}, "`token_metric` must be one of 'prob', 'entropy', got 'logprob'. Pass 'prob'"),
    ({"token_metric": None}, "`token_metric` must be one of 'prob', 'entropy', got None. Pass 'prob'"),
    (
        {"scale_decay": "exp"},
        "`scale_decay` must be one of 'linear', 'cosine', 'constant', got 'exp'. Pass",
    ),
    ({"scale_decay": True}, "`scale_decay` must be one of 'linear', 'cosine', 'constant', got True. Pass"),
    ({"scale_decay_steps": 0}, STEPS.format("0")),
    ({"scale_decay_steps": -0.5}, STEPS.format("-0.5")),
    ({"scale_decay_steps": 1.5}, STEPS.format("1.5")),
    ({"scale_decay_steps": math.inf}, STEPS.format("inf")),
    ({"scale_decay_steps": math.nan}, STEPS.format("nan")),
    ({"scale_decay_steps": "half"}, STEPS.format("'half'")),
    ({"scale_decay_steps": True}, STEPS.format("True")),
    ({"trim_padding": "no"}, "`trim_padding` must be True or False, got 'no'."),
    ({"skip_zero_advantage": 7}, "`skip_zero_advantage` must be True or False, got 7."),
    ({"log_tokens": -1}, "`log_tokens` must be a number of prompts, 0 or more, got -1. Pass for example 2 to log"),
    ({"log_tokens": 2.5}, "`log_tokens` must be a number of prompts, 0 or more, got 2.5."),
    ({"log_tokens": True}, "`log_tokens` must be a number of prompts, 0 or more, got True."),
    (
        {"dynamic_sampling": True},
        "`dynamic_sampling` must be a number of rounds, 0 or more, got True. Pass for example 4",
    ),
    ({"dynamic_sampling": -1}, "`dynamic_sampling` must be a number of rounds, 0 or more, got -1."),
    ({"dynamic_sampling": 1.5}, "`dynamic_sampling` must be a number of rounds, 0 or more, got 1.5."),
    # Options of TRL that it checks only in the first step, or never.
    ({"temperature": 0}, "`temperature` must be a number above 0, got 0. The update divides logits by it: pass 1.0"),
    ({"temperature": -1.0}, "`temperature` must be a number above 0, got -1.0."),
    ({"temperature": math.nan}, "`temperature` must be a number above 0, got nan."),
    ({"temperature": None}, "`temperature` must be a number above 0, got None."),
    ({"top_k": -3}, "`top_k` must be a number of tokens, got -3. Pass 0 to sample from all tokens."),
    (
        {"scale_rewards": "foo"},
        "`scale_rewards` must be 'group', 'batch' or 'none' (in Python also True for 'group', False for 'none'), got",
    ),
    ({"delta": 0.9}, "`delta` must be 1 or more, or None, got 0.9. Ratios start at 1, so below it the tokens of"),
    ({"delta": math.nan}, "`delta` must be 1 or more, or None, got nan."),
    ({"off_policy_mask_threshold": -1.0}, "`off_policy_mask_threshold` must be 0 or more, or None, got -1.0."),
    ({"min_p": 2.0}, "`min_p` must be between 0 and 1, or None, got 2.0."),
    ({"repetition_penalty": 0.0}, "`repetition_penalty` must be above 0, got 0.0. Pass 1.0 for none."),
    ({"repetition_penalty": None, "use_vllm": True}, "`repetition_penalty` must be a number with vLLM, got None."),
    ({"multi_objective_aggregation": "sum"}, "must be 'sum_then_normalize' or 'normalize_then_sum', got 'sum'."),
    ({"chat_template_kwargs": "[1]"}, "`chat_template_kwargs` must be a dictionary, got '[1]'. In a YAML file,"),
    ({"num_iterations": 0}, "`num_iterations` must be 1 or more, got 0. Pass 1 to use each rollout once."),
    ({"epsilon": -1.0}, "`epsilon` must be 0 or more, got -1.0."),
    ({"epsilon": math.nan}, "`epsilon` must be 0 or more, got nan."),
    ({"epsilon_high": -0.2}, "`epsilon_high` must be 0 or more, got -0.2."),
    ({"beta": -1.0}, "`beta` must be 0 or more, got -1.0."),
    ({"top_p": 0.0}, "`top_p` must be above 0 and not above 1, got 0.0. Pass 1.0 to sample from all tokens."),
    ({"top_p": 1.5}, "`top_p` must be above 0 and not above 1, got 1.5."),
    ({"top_entropy_quantile": 2.0}, "`top_entropy_quantile` must be between 0 and 1, got 2.0. Pass 1.0 to train on"),
    ({"reward_weights": [1.0, math.nan]}, "`reward_weights` must be finite numbers, got [1.0, nan]."),
    ({"reward_weights": [math.inf]}, "`reward_weights` must be finite numbers, got [inf]."),
    ({"per_device_train_batch_size": 0}, "`per_device_train_batch_size` must be 1 or more, got 0."),
    ({"gradient_accumulation_steps": 0}, "`gradient_accumulation_steps` must be 1 or more, got 0. Pass 1 to"),
    ({"steps_per_generation": 0}, "`steps_per_generation` must be 1 or more, got 0. Pass 1 to"),
    ({"max_completion_length": 0}, "`max_completion_length` must be 1 or more, got 0."),
    *(
        ({name: "{bad"}, f"`{name}` must be a dictionary in JSON, such as '{{\"name\": 1}}', got '{{bad': Expecting")
        for name in ("chat_template_kwargs", "generation_kwargs", "lr_scheduler_kwargs")
    ),
    # What contradicts itself.
    (
        {"positive_weight": 0, "negative_weight": 0},
        "`positive_weight` and `negative_weight` are both 0, so there is nothing to train on. Pass (1, 0)",
    ),
    (
        {"positive_weight": 0, "positive_low_scale": 5.0},
        "`positive_low_scale=5.0` has no effect because `positive_weight=0` sets the advantage of all positive "
        "completions to 0. Set another weight, or leave `positive_low_scale` at its default of 2.0.",
    ),
    ({"negative_weight": 0, "negative_high_ratio": 0.3}, "`negative_high_ratio=0.3` has no effect because `negative_"),
    ({"negative_weight": 0, "negative_low_scale": 3}, "`negative_low_scale=3` has no effect because `negative_weight"),
    (
        {"positive_high_scale": 3},
        "`positive_high_scale=3` has no effect because `positive_high_ratio=0` selects no tokens. Set a ratio, for "
        "example `positive_high_ratio=0.2`, or leave `positive_high_scale` at its default of 1.0.",
    ),
    (
        {"negative_low_scale": 0},
        "`negative_low_scale=0` has no effect because `negative_low_ratio=0` selects no tokens.",
    ),
    (
        {"positive_low_ratio": 0, "positive_low_scale": 5.0},
        "`positive_low_scale=5.0` has no effect because `positive_low_ratio=0` selects no tokens.",
    ),
    (
        {"positive_high_ratio": 0.3},
        "`positive_high_ratio=0.3` has no effect because `positive_high_scale=1` changes no advantage. Set another "
        "scale, for example `positive_high_scale=2`, or leave `positive_high_ratio` at its default of 0.0.",
    ),
    (
        {"scale_decay_steps": 500, "max_steps": 300},
        "`scale_decay_steps=500` is longer than the training of 300 optimizer steps: the scales would never reach 1. "
        "Pass a fraction, for example 0.5, or at most 300 steps. To keep the scales at their initial values, set",
    ),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=[str(fields) for fields, _ in REFUSED])
def test_refuses_bad_values_at_construction(fields, message, config):
    with pytest.raises(ValueError, match=re.escape(message)):
        config(**fields)


def test_dynamic_sampling_needs_whole_groups_on_a_process(config, monkeypatch):
    monkeypatch.setattr(A3POConfig, "world_size", 2)
    fields = {"per_device_train_batch_size": 3, "steps_per_generation": 2, "num_generations": 4}
    config(**fields)
    config(dynamic_sampling=2, **{**fields, "num_generations": 2})
    message = (
        "`dynamic_sampling=2` needs all completions of a prompt on one process. A process has "
        "`per_device_train_batch_size` x `steps_per_generation` = 6 completions of a generation batch, which is not a "
        "multiple of `num_generations=4`. Change one of the three, or set `dynamic_sampling=0`."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        config(dynamic_sampling=2, **fields)


@pytest.mark.parametrize(
    "fields",
    [
        # Settings at their default, and those that turn a token end off, are never the reason of an error.
        {"negative_weight": 0},
        {"positive_weight": 0},
        {"negative_weight": 0, "negative_high_scale": 1},
        {"negative_weight": 0, "negative_high_ratio": 0},
        {"negative_weight": 0, "positive_low_scale": 1},
        {"negative_weight": 0, "positive_low_scale": 1, "scale_decay_steps": 500, "max_steps": 300},
        {"positive_low_ratio": 0, "negative_high_ratio": 0},
        {"positive_low_scale": 1, "negative_high_scale": 1},
        {"positive_low_ratio": 0, "positive_low_scale": 1},
        {"positive_high_ratio": 0.3, "positive_high_scale": 0.5},
        {"scale_decay_steps": 300, "max_steps": 300},
        {"scale_decay_steps": 500, "max_steps": 300, "scale_decay": "constant"},
        {"scale_decay_steps": 500, "max_steps": 300, "positive_low_scale": 1, "negative_high_scale": 1},
        {"scale_decay_steps": 500},  # of as many steps as the epochs have
        # What samplers and TRL take.
        {"top_k": -1},
        {"top_k": None},
        {"repetition_penalty": None},
        {"temperature": math.inf},
        {"epsilon": math.inf},
        {"epsilon": 0.0, "epsilon_high": 5.0, "beta": 0.5, "top_entropy_quantile": 0.0},
        {"epsilon_high": None},
        {"top_p": None},
        {"reward_weights": [0.0, -1, 2.5]},
        {"max_completion_length": None},
        {"lr_scheduler_kwargs": '{"min_lr": 0.0}'},
        {"scale_rewards": True},
        {"scale_rewards": False},
        {"scale_rewards": "batch"},
    ],
)
def test_accepts_what_is_next_to_a_contradiction(fields, config):
    config(**fields)


LINES = [
    ("--positive_low_scale lots", "", "argument --positive_low_scale.*: invalid float value: 'lots'"),
    ("--positive_low_scale", "", "argument --positive_low_scale.*: expected one argument"),
    ("--scale_decay_steps 10%", "", "argument --scale_decay_steps.*: invalid float value: '10%'"),
    ("--trim_padding maybe", "", "argument --trim_padding.*: Truthy value expected: got maybe but expected one of"),
    ("--positve_low_scale 2", "", r"not used .*\['--positve_low_scale', '2'\]"),
    ("--positive_low_ratio 20", "", "`positive_low_ratio` must be a number from 0 to 1, got 20.0"),
    ("", "positive_low_scales: 2", "Unknown arguments from config file: .*--positive_low_scales"),
    ("", "positive_low_scale: lots", "argument --positive_low_scale.*: invalid float value: 'lots'"),
    ("", "negative_high_scale:", "`negative_high_scale` must be a finite number that is not negative, got None"),
    ("", "skip_zero_advantage: 7", "`skip_zero_advantage` must be True or False, got 7"),
]


@pytest.mark.parametrize(("line", "file", "message"), LINES)
def test_refuses_bad_command_lines_and_files(line, file, message, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(f"{file}\noutput_dir: {tmp_path}\nuse_cpu: true\nbf16: false\n")
    with pytest.raises((ValueError, SystemExit)) as error:
        TrlParser(A3POConfig).parse_args_and_config(["--config", str(tmp_path / "config.yaml"), *line.split()])
    assert re.search(message, str(error.value) + capsys.readouterr().err)
