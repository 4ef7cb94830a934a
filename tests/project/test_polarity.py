"""The benchmark of the paper's claims: its verifier, its methods, its rules, and that it resumes after a kill."""

import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_a3po import A3POConfig, A3POTrainer


# As Python does for the program.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "polarity"))

import analyse
import countdown
import results as results_module
import run
from methods import DAPO, METHODS


PROGRAM = Path(run.__file__)


# The task


def brute_force(numbers, target):
    """Whether some attempt hits the target, by Python's own arithmetic."""
    for first, *rest in itertools.permutations(numbers):
        for signs in itertools.product("+-*", repeat=len(rest)):
            value, inside = first, True
            for sign, number in zip(signs, rest, strict=True):
                value = eval(f"{value} {sign} {number}")
                inside = inside and 0 <= value <= 99
            if inside and value == target:
                return True
    return False


some_numbers = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(lambda numbers: tuple(sorted(numbers)))


@given(some_numbers, st.integers(0, 99))
def test_chains_find_a_solution_where_there_is_one(numbers, target):
    hits = [text for text, result in countdown.chains(numbers) if result == target]
    assert bool(hits) == brute_force(numbers, target)
    assert all(countdown.is_right(text, numbers, target) for text in hits)


@given(some_numbers, st.lists(st.sampled_from([*countdown.vocabulary(9), "nonsense", "=", "+"]), max_size=9))
def test_nothing_but_a_chain_to_the_target_is_right(numbers, words):
    """Any sequence of words against the list of everything that is right."""
    last = " ".join(words).split(";")[-1].strip()
    for target in (0, 7, 18, 99):
        solutions = [text for text, result in countdown.chains(numbers) if result == target]
        assert countdown.is_right(" ".join(words), numbers, target) == (last in solutions)


@given(some_numbers, st.randoms(use_true_random=False))
def test_one_wrong_word_is_enough(numbers, rng):
    text, target = rng.choice(countdown.chains(numbers))
    words = text.split()
    position = rng.randrange(len(words))
    other = rng.choice([word for word in countdown.vocabulary(9) if word != words[position]])
    changed = " ".join([*words[:position], other, *words[position + 1 :]])
    solutions = [text for text, result in countdown.chains(numbers) if result == target]
    assert countdown.is_right(changed, numbers, target) == (changed.split(";")[-1].strip() in solutions)
    assert countdown.is_right(f"{changed} ; {text}", numbers, target)
    assert not countdown.is_right(f"{text} ;", numbers, target)


def test_problems_are_all_solvable_and_split_without_overlap():
    held_out, training = run.split(run.PRESETS["cpu"])
    assert len(held_out) == 128
    assert not set(held_out) & set(training)
    assert (held_out, training) == run.split(run.PRESETS["cpu"])
    assert all(brute_force(problem.numbers, problem.target) for problem in held_out)


def test_demonstrations_are_of_the_stated_quality():
    _, training = run.split(run.PRESETS["cpu"])
    settings = {"attempts": 1, "give_up": 1.0}

    def share_right(**others):
        stream = countdown.demonstrations(training, random.Random(0), **settings, **others)
        pairs = list(itertools.islice(stream, 2000))
        return sum(countdown.is_right(text, each.numbers, each.target) for each, text in pairs) / len(pairs)

    by_chance = share_right(aimed=0.0, miscalculated=0.0)
    assert 0.03 < by_chance < 0.15
    assert share_right(aimed=1.0, miscalculated=0.0) == 1.0
    assert share_right(aimed=0.5, miscalculated=0.0) == pytest.approx((1 + by_chance) / 2, abs=0.04)
    assert share_right(aimed=1.0, miscalculated=1.0) < 0.05


def test_the_tokenizer_knows_every_word():
    tokenizer = run.word_tokenizer(9)
    text = "2 3 7 =20 : 3 *2 =6 +7 =13 ; 7 *3 =21 -2 =19"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == 3 + 9 + 27 + 100 + 2


# The methods


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    output = tmp_path_factory.mktemp("polarity")
    run.make_start(run.PRESETS["dry"], output, 0)
    return output


# One of each kind: settings, a function of the package, one that reads the log, a class, a sampler that lags behind.
@pytest.mark.parametrize("name", ["sgd_p2n2", "clip_cov", "stare", "a3po_loop_entropy", "stale_a3po_loop"])
def test_a_method_trains(start, name):
    run.run(run.PRESETS["dry"], start, name, 0)
    result = json.loads((start / f"{name}-0.json").read_text())
    assert result["curves"]["step"] == [4]  # of one rollout
    assert all(len(values) == 1 for values in result["curves"].values())
    assert len(result["held_out"]["right"]) == 4
    assert result["settings"]["learning_rate"] == (0.02 if "sgd" in name else 1e-4)
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_settings_that_are_allowed(name, tmp_path):
    method = METHODS[name]
    updates = {"steps_per_generation": run.PRESETS["cpu"].updates}
    config = A3POConfig(tmp_path, **{**DAPO, **updates, **method.settings}, use_cpu=True, bf16=False, report_to="none")
    settings = {name: value for name, value in method.settings.items() if name != "shaping_args"}
    assert all(getattr(config, name) == value for name, value in settings.items())
    assert issubclass(method.trainer, A3POTrainer)


def test_methods_differ_by_what_the_loss_reads(start, monkeypatch):
    """The advantages of one and the same micro-batch, method by method: no two alike that should not be."""
    seen = {}
    original = A3POTrainer._before_loss_reads

    def spy(self, scope, **others):
        before = scope.inputs["advantages"].clone()
        original(self, scope, **others)
        if self.is_in_train and name not in seen:  # not the check of the contract, before training
            mask, shaped = scope.inputs["completion_mask"].bool(), scope.inputs["advantages"]
            seen[name] = torch.where(mask, shaped if shaped.dim() == 2 else shaped[:, None], 0.0), before

    monkeypatch.setattr(A3POTrainer, "_before_loss_reads", spy)
    monkeypatch.setattr(run, "is_right", lambda text, numbers, target: len(text) % 2 == 0)
    monkeypatch.setattr(run, "right_answers", lambda model, tokenizer, held_out, *others, **more: [0] * len(held_out))
    names = [
        "dapo",
        "psr",
        "nsr",
        "p2n1",
        "p1n0.5",
        "p2n2",
        "w_reinforce",
        "reversed",
        "random",
        "a3po",
        "a3po_entropy",
    ]
    for name in names:  # the spy reads it
        run.run(run.PRESETS["dry"], start, name, 0)
    # The first rollout is the same: its start and its seed are.
    dapo, plain = seen["dapo"]
    for shaped, before in seen.values():
        torch.testing.assert_close(before, plain, rtol=0, atol=0)
        assert shaped.shape == dapo.shape
    positive = plain[:, None] > 0
    torch.testing.assert_close(seen["psr"][0], torch.where(positive, dapo, 0.0))
    torch.testing.assert_close(seen["nsr"][0], torch.where(positive, 0.0, dapo))
    torch.testing.assert_close(seen["p2n1"][0], torch.where(positive, 2 * dapo, dapo))
    torch.testing.assert_close(seen["p2n1"][0], 2 * seen["p1n0.5"][0])
    torch.testing.assert_close(seen["p2n2"][0], 2 * dapo)
    for left, right in itertools.combinations(
        ["dapo", "a3po", "a3po_entropy", "reversed", "random", "w_reinforce"], 2
    ):
        assert not torch.equal(seen[left][0], seen[right][0]), f"{left} and {right} do the same"
    # At random, as many are amplified, as much.
    assert seen["random"][0].abs().sum().item() == pytest.approx(seen["a3po"][0].abs().sum().item(), rel=0.2)


def test_presets_for_gpus_are_the_same_program(tmp_path):
    small = {
        "hidden_size": 32,
        "layers": 1,
        "imitation_steps": 1,
        "imitation_batch_size": 2,
        "rollouts": 1,
        "completions": 8,
        "held_out": 2,
    }
    preset = replace(run.PRESETS["gpu"], **small, num_generations=2, samples=2, curve_samples=1, curve_points=1)
    run.make_start(preset, tmp_path, 0)
    run.run(preset, tmp_path, "a3po", 0)
    assert json.loads((tmp_path / "a3po-0.json").read_text())["curves"]["step"][-1] == preset.updates


# A killed run


@pytest.mark.slow
def test_a_killed_program_resumes(start, tmp_path):
    line = ["--preset", "dry", "--methods", "dapo", "psr", "nsr", "--seeds", "0", "--output", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(PROGRAM.parents[2])}
    program = subprocess.Popen([sys.executable, str(PROGRAM), *line], env=environment)
    first, deadline = tmp_path / "dapo-0.json", time.monotonic() + 120
    while not first.exists() and time.monotonic() < deadline and program.poll() is None:
        time.sleep(0.005)
    program.send_signal(signal.SIGKILL)
    program.wait()
    before = first.read_bytes(), first.stat().st_mtime_ns
    (tmp_path / ".psr-0.json.1").write_text('{"half')  # what a kill may leave
    assert run.main(line) == 0
    assert (first.read_bytes(), first.stat().st_mtime_ns) == before
    # What was made before the kill and after it are what one program makes.
    for name in ("dapo", "nsr"):
        run.run(run.PRESETS["dry"], start, name, 0)
        one, other = (json.loads((each / f"{name}-0.json").read_text()) for each in (start, tmp_path))
        assert one["curves"] == other["curves"]
        assert one["held_out"] == other["held_out"]
    assert set(results_module.load(tmp_path)) == {"dapo", "psr", "nsr"}


def test_another_preset_in_the_same_place_is_refused(start):
    run.run(run.PRESETS["dry"], start, "dapo", 0)
    with pytest.raises(ValueError, match=r"dapo-0.json.*another preset.*--output"):
        run.is_done(start, "dapo", 0, {"preset": asdict(run.PRESETS["cpu"])})


def test_a_failing_run_does_not_end_the_others(capsys):
    done = []

    def fail():
        raise RuntimeError("no")

    assert not run.work_off({"first": fail, "second": lambda: done.append(2)}, jobs=1)
    assert done == [2]
    assert "first failed" in capsys.readouterr().out


# The rules


def synthetic(effects, seeds=5, noise=0.005, samples=64):
    """Results of every method: those of a common level and of the seed, plus the method's effect and some noise."""
    rng = random.Random(0)
    made = {}
    levels = [rng.gauss(0, 0.1) for _ in range(seeds)]
    for method in METHODS:
        made[method] = {}
        for seed, level in enumerate(levels):
            shift = {each: effects.get((method, each), 0.0) + rng.gauss(0, noise) for each in STATISTICS}
            right = [round(samples * min(1, max(0, 0.5 + level / 4 + shift["pass@1"])))] * 400
            made[method][seed] = {
                "method": method,
                "seed": seed,
                "preset": {},
                "curves": {
                    each: [STATISTICS[each] + level + shift[each]] * 4 for each in STATISTICS if "@" not in each
                },
                "held_out": {"samples": samples, "right": right},
                "train_seconds": 1.0,
                "commit": "abc",
                "hardware": "this",
                "versions": {"torch": "2"},
            }
    return made


STATISTICS = {"pass@1": 0.5, "entropy": 1.0, "length": 10.0, "reward": 0.5}


def verdicts(results):
    return [
        analyse.claim_verdict([analyse.compare(results, each).verdict for each in claim.comparisons])
        for claim in analyse.CLAIMS
    ]


def expected_effects(sign):
    """The smallest set of effects under which every strict comparison holds (sign 1), or its contrary (-1)."""
    effects = {}
    for claim in analyse.CLAIMS:
        for each in claim.comparisons:
            if each.relation in ("<", ">") and not each.statistic.startswith("pass@"):
                effects[each.left, each.statistic] = sign * (0.2 if each.relation == ">" else -0.2)
    effects["p1n0.5", "entropy"] = effects["p2n1", "entropy"]  # which are claimed to be equal
    for method in ("a3po", "a3po_loop_entropy", "stale_a3po_loop", "a3po_grpo", "grpo_clip_higher"):
        effects[method, "pass@1"] = sign * 0.1
    effects["psr", "pass@1"] = effects["nsr", "pass@1"] = -sign * 0.1
    return effects


def test_known_effects_are_reproduced():
    assert verdicts(synthetic(expected_effects(1))) == ["reproduced"] * len(analyse.CLAIMS)


def test_contrary_effects_are_contradicted():
    equalities = [all(each.relation == "=" for each in claim.comparisons) for claim in analyse.CLAIMS]
    found = verdicts(synthetic(expected_effects(-1)))
    assert found == ["reproduced" if same else "contradicted" for same in equalities]
    unequal = {("p2n2", "entropy"): 0.2, ("sgd_p2n2", "entropy"): 0.2}
    found = verdicts(synthetic(unequal))
    assert [verdict for verdict, same in zip(found, equalities, strict=True) if same] == ["contradicted"] * 2


def test_noise_is_null():
    found = verdicts(synthetic({}, noise=0.1))
    assert found.count("null") >= len(found) - 2  # at 95 %, some comparison may stand out


def test_missing_methods_are_not_run():
    made = synthetic(expected_effects(1))
    del made["a3po"]
    finding = analyse.compare(made, analyse.Comparison("a3po", ">", "dapo", "pass@1"))
    assert (finding.verdict, finding.seeds) == ("not run", 0)
    assert "not run" in verdicts(made)
    table = "\n".join(analyse.claim_table(made))
    assert "not run" in table  # of a claim of which a part was run
    assert "The decay matters" not in table


def test_interval_is_students():
    # By hand: mean 2, standard deviation 1, three values; t(0.975, 2) = 4.303.
    mean, low, high = analyse.paired_interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert (high - mean, mean - low) == pytest.approx([4.303 / math.sqrt(3)] * 2)


@pytest.mark.parametrize(
    ("relation", "low", "high", "expected"),
    [
        (">", 0.1, 0.2, "reproduced"),
        (">", -0.1, 0.2, "null"),
        (">", -0.2, -0.1, "contradicted"),
        ("<", -0.2, -0.1, "reproduced"),
        ("<", 0.1, 0.2, "contradicted"),
        (">=", -0.01, 0.2, "reproduced"),
        (">=", -0.03, 0.2, "null"),
        (">=", -0.04, -0.03, "contradicted"),
        ("<=", -0.2, 0.01, "reproduced"),
        ("<=", -0.2, 0.03, "null"),
        ("<=", 0.03, 0.04, "contradicted"),
        ("=", -0.01, 0.01, "reproduced"),
        ("=", -0.01, 0.03, "null"),
        ("=", 0.03, 0.04, "contradicted"),
        ("=", -0.04, -0.03, "contradicted"),
    ],
)
def test_rule(relation, low, high, expected):
    assert analyse.verdict(relation, low, high, margin=0.02) == expected


def test_report_names_everything(tmp_path, capsys):
    for method, by_seed in synthetic(expected_effects(1)).items():
        for seed, result in by_seed.items():
            result["curves"]["step"] = [1, 2, 3, 4]
            result["held_out_curve"] = {"step": [0, 4], "pass@1": [0.1, 0.5]}
            (tmp_path / f"{method}-{seed}.json").write_text(json.dumps(result))
    assert analyse.main([str(tmp_path)]) == 0
    text = (tmp_path / "claims.md").read_text()
    assert text in capsys.readouterr().out
    assert all(f"| `{method}` | 5 |" in text for method in METHODS)
    assert len(re.findall(r"^\| \*\*\d+\..*\*\*reproduced\*\* \|$", text, flags=re.MULTILINE)) == len(analyse.CLAIMS)


def test_results_of_two_presets_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no result"):
        results_module.load(tmp_path)
    for seed, preset in enumerate(({"a": 1}, {"a": 2})):
        (tmp_path / f"{seed}.json").write_text(json.dumps({"method": "dapo", "seed": seed, "preset": preset}))
    with pytest.raises(ValueError, match="2 presets"):
        results_module.load(tmp_path)


@pytest.mark.parametrize(("name", "values"), [("sampler", ("vllm", "transformers")), ("model", (None, "qwen"))])
def test_results_of_two_samplers_or_models_are_refused(tmp_path, name, values):
    for seed, value in enumerate(values):
        result = {"method": "dapo", "seed": seed, "preset": {"a": 1}, name: value}
        (tmp_path / f"dapo-{seed}.json").write_text(json.dumps(result))
    with pytest.raises(ValueError, match=f"2 {name}s"):
        results_module.load(tmp_path)
    shared = {"preset": {"a": 1}, name: values[0]}
    assert results_module.is_done(tmp_path, "dapo", 0, shared)
    with pytest.raises(ValueError, match=rf"dapo-1.json' was made with another {name}: {values[1]}"):
        results_module.is_done(tmp_path, "dapo", 1, shared)
