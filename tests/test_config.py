import dataclasses
import math

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


def test_every_field_is_explained_once_in_the_docstring_and_once_in_the_help():
    added = {field.name for field in dataclasses.fields(A3POConfig)} - {f.name for f in dataclasses.fields(GRPOConfig)}
    assert len(added) == 15
    for field in dataclasses.fields(A3POConfig):
        if field.name in added:
            assert A3POConfig.__doc__.count(f"\n        {field.name} (`") == 1
            assert field.metadata["help"]


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
        "scale_decay_steps": 300,
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(fields))
    (config,) = TrlParser(A3POConfig).parse_args_and_config(["--config", str(path), "--positive_low_ratio", "0.1"])
    assert (config.negative_weight, config.scale_decay_steps, config.positive_low_ratio) == (0, 300, 0.1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"positive_low_ratio": 20},
            r"`positive_low_ratio` must be a number from 0 to 1, got 20\. .* pass 0\.2 for 20 %",
        ),
        ({"positive_high_ratio": -0.2}, r"`positive_high_ratio` must be a number from 0 to 1, got -0\.2"),
        ({"negative_low_ratio": math.nan}, r"`negative_low_ratio` must be a number from 0 to 1, got nan"),
        ({"negative_high_ratio": "a lot"}, r"`negative_high_ratio` must be a number from 0 to 1, got 'a lot'"),
        ({"positive_low_scale": -1.0}, r"`positive_low_scale` must be a finite .* got -1\.0\. .* pass 1 to leave"),
        ({"negative_high_scale": math.inf}, r"`negative_high_scale` must be a finite .* got inf"),
        ({"positive_weight": -1}, r"`positive_weight` must be a finite number that is not negative, got -1"),
        ({"negative_weight": None}, r"`negative_weight` must be a finite number that is not negative, got None"),
        ({"token_metric": "logprob"}, r"`token_metric` must be one of 'prob', 'entropy', got 'logprob'\. Pass 'prob'"),
        ({"scale_decay": "exp"}, r"`scale_decay` must be one of 'linear', 'cosine', 'constant', got 'exp'\. Pass"),
        ({"scale_decay_steps": 0}, r"`scale_decay_steps` must be a whole number .* got 0\. .* set the scales to 1"),
        ({"scale_decay_steps": -0.5}, r"`scale_decay_steps` must be .* got -0\.5"),
        ({"scale_decay_steps": 1.5}, r"`scale_decay_steps` must be .* got 1\.5"),
        ({"scale_decay_steps": math.inf}, r"`scale_decay_steps` must be .* got inf"),
    ],
)
def test_refuses_bad_values_at_construction(config, fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)
