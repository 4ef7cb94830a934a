"""`shaping`: the methods by name, in the configuration, the trainer and the model card."""

import inspect
import json
import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from support.training import make, moved, train
from trl import TrlParser

from trl_a3po import A3POConfig, A3POTrainer, peers
from trl_a3po.methods import METHODS, check_shaping, needs_of_trainer, settings_of
from trl_a3po.testing import assert_gradients_follow


PEERS = [name for name in METHODS if name != "a3po"]
# Those that change nothing while rollout and update are aligned need rollouts that serve several steps.
REUSE = {"num_iterations": 2}

all_peers = pytest.mark.parametrize("name", PEERS)


def batch():
    generator = torch.Generator().manual_seed(0)
    tensors = {"per_token_logps": -4.0, "old_per_token_logps": -4.0, "entropies": 3.0}
    batch = {name: scale * torch.rand(6, 20, generator=generator) for name, scale in tensors.items()}
    mask = (torch.arange(20) < torch.tensor([20, 8, 15, 3, 0, 11])[:, None]).long()
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    return {
        "advantages": torch.tensor([1.2, -0.7, -0.7, 1.5, 0.5, 0.0]),
        **batch,
        "mask": mask,
        "rewards": rewards,
        "progress": 0.25,
    }


# The table


def test_every_peer_has_a_name():
    functions = {
        name
        for name, value in vars(peers).items()
        if inspect.isfunction(value) and value.__module__ == peers.__name__ and not name.startswith("_")
    }
    assert set(PEERS) == functions - {"entropy_change", "logged_entropy"}
    for name in PEERS:
        parameters = inspect.signature(getattr(peers, name)).parameters
        kinds = [each.kind for each in parameters.values()]
        assert next(iter(parameters)) == "advantages"
        assert set(kinds[1:-1]) == {inspect.Parameter.KEYWORD_ONLY}
        assert kinds[-1] is inspect.Parameter.VAR_KEYWORD
        assert settings_of(name)


def test_every_method_has_its_row_and_its_paper_in_the_document():
    page = (Path(__file__).parents[1] / "docs" / "shaping.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \((.*?)\) \|", page, flags=re.MULTILINE))
    assert set(PEERS) <= set(rows)
    for name in PEERS:
        number = METHODS[name].paper["id"]
        assert number in rows[name] or rows[name] == "as above"


@all_peers
def test_the_paper_is_the_one_of_the_docstring(name):
    paper = METHODS[name].paper
    assert re.search(r"arXiv (\d{4}\.\d{5})", inspect.getdoc(getattr(peers, name)))[1] == paper["id"]
    assert paper["title"] in paper["citation"]
    assert f"{{arXiv:{paper['id']}}}" in paper["citation"]
    assert re.match(r"@article\{[a-z]+20\d\d[a-z]+,\n    title ", paper["citation"])


def test_what_a_peer_takes_is_divided_between_the_hook_the_settings_and_the_trainer():
    needs = {name: set(needs_of_trainer(name)) for name in PEERS if needs_of_trainer(name)}
    assert needs == {"clip_cov": {"epsilon_low", "epsilon_high"}, "stare": {"entropy_of_last_step"}}
    assert settings_of("clip_cov") == {"clip_ratio": 0.0002, "lower": 1.0, "upper": 5.0}
    assert settings_of("fipo")["delta"] is None


# The configuration


@pytest.fixture
def config(tmp_path):
    return lambda **fields: A3POConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **fields)


def test_settings_from_a_dictionary_and_from_json(config):
    for given in ({"top_ratio": 0.2}, '{"top_ratio": 0.2}'):
        args = config(shaping="stare", shaping_args=given)
        assert args.shaping_args == {"top_ratio": 0.2}
        assert args.peer_settings == {**settings_of("stare"), "top_ratio": 0.2}
    assert config(shaping="fipo", shaping_args='{"delta": null}', **REUSE).peer_settings == settings_of("fipo")


def test_settings_from_yaml_and_the_command_line(tmp_path):
    fields = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "shaping": "aepo"}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**fields, "shaping_args": {"alpha": 0.5}}))
    parser = TrlParser(A3POConfig)
    (args,) = parser.parse_args_and_config(["--config", str(path)])
    assert (args.shaping, args.shaping_args) == ("aepo", {"alpha": 0.5})
    line = ["--config", str(path), "--shaping", "stare", "--shaping_args", '{"positive_weight": 1.05}']
    (args,) = parser.parse_args_and_config(line)
    assert (args.shaping, args.shaping_args) == ("stare", {"positive_weight": 1.05})


REFUSED = [
    ({"shaping": "star"}, "`shaping` must be one of 'a3po', 'w_reinforce', .*'stare', got 'star'. Pass 'a3po' for"),
    ({"shaping": "entropy_change"}, "`shaping` must be one of .*, got 'entropy_change'"),
    ({"shaping": None}, "`shaping` must be one of .*, got None"),
    ({"shaping": ["stare"]}, "`shaping` must be one of .*, got \\['stare'\\]"),
    ({"shaping_args": {"top_ratio": 0.1}}, "`shaping_args` has no effect with `shaping='a3po'`, got .*top_ratio"),
    (
        {"shaping": "stare", "shaping_args": {"quantile": 0.1}},
        "`shaping_args` has `quantile`, which is not a setting of `shaping='stare'`. Its .* `top_ratio` \\(0.1\\),",
    ),
    ({"shaping": "stare", "shaping_args": {"mask": 1}}, "`shaping_args` has `mask`, which is not a setting"),
    ({"shaping": "stare", "shaping_args": {"entropy_of_last_step": 1}}, "has `entropy_of_last_step`, which is no"),
    ({"shaping": "clip_cov", "shaping_args": {"epsilon_low": 1}}, "has `epsilon_low`, which is not a setting"),
    ({"shaping": "clip_cov", "shaping_args": {"generator": 1}}, "has `generator`, which is not a setting"),
    (
        {"shaping": "stare", "shaping_args": {"top_ratio": 20}},
        "`shaping='stare'`: `top_ratio` must be a number from 0 to 1, got 20. .*\\) are `top_ratio` \\(0.1\\),",
    ),
    ({"shaping": "aepo", "shaping_args": {"alpha": "1e-1"}}, "`alpha` must be a number of 0 or more, got '1e-1'"),
    ({"shaping": "fipo", "shaping_args": {"lower": 2}, **REUSE}, "`lower` must be a number from 0 to 1.2, got 2"),
    ({"shaping": "w_reinforce", "shaping_args": {"positive_weight": -1}}, "`positive_weight` must be a number of 0"),
    (
        {"shaping": "aepo", "shaping_args": "alpha=1"},
        "`shaping_args` must be a dictionary, .* got 'alpha=1'. Pass for",
    ),
    ({"shaping": "aepo", "shaping_args": "{alpha: 1}"}, "`shaping_args` must be a dictionary, .* got '{alpha: 1}'"),
    ({"shaping": "aepo", "shaping_args": "[1]"}, "`shaping_args` must be a dictionary, .* got \\[1\\]"),
    ({"shaping": "aepo", "shaping_args": 0.2}, "`shaping_args` must be a dictionary, .* got 0.2"),
    # Settings of A3PO without effect.
    (
        {"shaping": "stare", "positive_low_scale": 5.0},
        "`positive_low_scale=5.0` has no effect because `shaping='stare'` replaces A3PO. Leave .* default of 2.0, or",
    ),
    ({"shaping": "stare", "positive_weight": 2.0}, "`positive_weight=2.0` has no effect because `shaping='stare'`"),
    ({"shaping": "stare", "negative_weight": 0}, "`negative_weight=0` has no effect because `shaping='stare'`"),
    ({"shaping": "stare", "token_metric": "entropy"}, "`token_metric='entropy'` has no effect .* default of 'prob'"),
    ({"shaping": "stare", "scale_decay": "cosine"}, "`scale_decay='cosine'` has no effect because"),
    ({"shaping": "stare", "scale_decay_steps": 100}, "`scale_decay_steps=100` has no effect because"),
    # Methods without effect, or that the loss cannot compute.
    ({"shaping": "fipo"}, "`shaping='fipo'` has no effect because each rollout serves one optimizer step.*num_iterat"),
    (
        {"shaping": "aspo", "gradient_accumulation_steps": 4, "steps_per_generation": 2},
        "`shaping='aspo'` has no effect .* `steps_per_generation` \\(here 2\\) above .* \\(here 4\\)",
    ),
    ({"shaping": "aspo", "loss_type": "cispo", **REUSE}, "needs a loss that clips .* got `loss_type='cispo'`"),
    ({"shaping": "aspo", "importance_sampling_level": "sequence", **REUSE}, "`importance_sampling_level='token'`"),
    ({"shaping": "stare", "logging_strategy": "no"}, "reads the entropy of the last step from the log.*Set `logging_"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=[str(fields) for fields, _ in REFUSED])
def test_refused(fields, message, config):
    with pytest.raises(ValueError, match=message) as error:
        config(**fields)
    assert "\n" not in str(error.value)


@all_peers
def test_a_setting_that_is_no_number_is_refused(name):
    for setting in settings_of(name):
        for value in ("0.5", True, math.nan, [1.0]):
            with pytest.raises(ValueError, match=f"`{setting}` must be a .*number.*, got {re.escape(repr(value))}"):
                check_shaping(name, {setting: value})


def test_what_turns_a3po_off_is_accepted(config):
    config(shaping="stare", positive_low_ratio=0, negative_high_scale=1, scale_decay_steps=0.5)
    config(shaping="aspo", steps_per_generation=2)


# The trainer


def test_each_name_is_the_function_of_peers(tmp_path):
    """As a class of one line calls it, with what only the trainer knows."""
    trainer, given = make(tmp_path, epsilon_high=0.3), batch()
    trainer.state.log_history = [{"entropy": 0.2}]
    trainer_knows = {"epsilon_low": 0.2, "epsilon_high": 0.3, "entropy_of_last_step": 0.2}
    for name in PEERS:
        trainer.args.shaping = name
        torch.manual_seed(0)
        shaped = trainer.shape_advantages(**given)
        torch.manual_seed(0)
        needs = {need: trainer_knows[need] for need in needs_of_trainer(name)}
        expected = getattr(peers, name)(**given, **needs)
        assert torch.equal(shaped, expected), name
        assert name == "clip_cov" or not torch.equal(
            torch.where(given["mask"] == 1, given["advantages"][:, None], 0.0),
            shaped if shaped.dim() == 2 else shaped[:, None].expand(6, 20),
        )


def test_gradients_with_settings(tmp_path):
    trainer = make(tmp_path, shaping="clip_cov", shaping_args={"clip_ratio": 0.25, "lower": 0.2}, epsilon=0.1)

    def reference(advantages, **given):
        torch.manual_seed(1)
        settings = {"clip_ratio": 0.25, "lower": 0.2, "epsilon_low": 0.1, "epsilon_high": 0.1}
        return peers.clip_cov(advantages, **settings, **given)

    original = trainer.shape_advantages

    def seeded(*args, **kwargs):
        torch.manual_seed(1)
        return original(*args, **kwargs)

    trainer.shape_advantages = seeded
    assert_gradients_follow(trainer, reference)


class Doubled(A3POTrainer):
    def shape_advantages(self, advantages, **batch):
        return 2 * super().shape_advantages(advantages, **batch)


def test_super_is_the_method(tmp_path):
    trainer, given = make(tmp_path, Doubled, shaping="aepo", shaping_args={"alpha": 0.5}), batch()
    assert torch.equal(trainer.shape_advantages(**given), 2 * peers.aepo(**given, alpha=0.5))


def test_every_row_is_trained_on(tmp_path):
    """W-REINFORCE learns from groups that are all wrong: none of their rows is skipped."""

    def wrong(completions, **kwargs):
        return [0.0] * len(completions)

    trainer = train(tmp_path, reward_funcs=wrong, max_steps=1, shaping="w_reinforce")
    assert moved(trainer)
    assert not [name for log in trainer.state.log_history for name in log if name.startswith("a3po/scale")]


# The model card


def card(trainer, tmp_path):
    trainer.create_model_card()
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    return text, json.loads(re.search("```json\n(.+?)```", text, re.DOTALL)[1])


def test_the_model_card_cites_the_method(tmp_path):
    text, settings = card(make(tmp_path, shaping="stare", shaping_args={"top_ratio": 0.2}), tmp_path)
    assert "trained with STARE, a method introduced in [STARE: Surprisal-Guided Token-Level Advantage" in text
    assert "https://huggingface.co/papers/2606.19236" in text
    assert "luo2026stare" in text
    assert "A3PO" not in text
    assert settings == {"shaping": "stare", **settings_of("stare"), "top_ratio": 0.2}
    assert "- stare" in text.split("---")[1]
    assert "- a3po" not in text.split("---")[1]


class CitesItsOwn(Doubled):
    _name = "Doubled"
    _paper = {"title": "Twice as much", "id": "0000.00000", "citation": "@misc{twice}"}  # noqa: RUF012


class CitesStare(Doubled):
    _name, _paper = METHODS["stare"]


def test_a_subclass_may_cite_a_paper_of_the_table(tmp_path):
    text, settings = card(make(tmp_path, CitesStare), tmp_path)
    assert "trained with STARE, a method introduced in [STARE: " in text
    assert settings["shaping"] == "a3po"


def test_a_subclass_may_cite_its_own_paper(tmp_path):
    text, settings = card(make(tmp_path, CitesItsOwn, shaping="aepo"), tmp_path)
    assert (
        "trained with Doubled, a method introduced in [Twice as much](https://huggingface.co/papers/0000.00000)"
        in text
    )
    assert "They apply where `CitesItsOwn.shape_advantages` calls `super()`." in text
    assert settings == {"shaping": "aepo", "alpha": 0.2}
