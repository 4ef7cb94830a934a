"""What the findings say of logs that are made up: nothing of a healthy one, and each rule at its bound."""

import math
import re
from pathlib import Path

import pytest
from support import logged_runs
from support.findings import CASES, FLAT, STEPS, constant, history, late, signal

from trl_a3po.cli.report import main
from trl_a3po.report.findings import find
from trl_a3po.report.rules import RULES
from trl_a3po.report.run import read_run
from trl_a3po.report.training_log import NO_SIGNAL
from trl_a3po.training.signal_budget import REASONS


def names(log_history):
    return [finding.name for finding in find(log_history)]


def test_the_reasons_are_those_that_the_trainer_logs():
    assert {"signal", *NO_SIGNAL} == set(REASONS)


def test_a_healthy_run_has_no_findings():
    assert names(history()) == []


def test_a_healthy_run_that_solves_its_task_has_none():
    # The reward reaches 1, all groups are equal, the entropy is gone, and the gradient with it.
    def reward(t):
        return min(1.0, 0.2 + 1.6 * t)

    solved = {
        "reward": reward,
        "rewards/accuracy_reward/mean": reward,
        "reward_std": lambda t: (reward(t) * (1 - reward(t))) ** 0.5,
        "frac_reward_zero_std": reward,
        "entropy": lambda t: max(0.0001, 0.8 - 1.6 * t),
        "grad_norm": lambda t: 0.5 if reward(t) < 1 else 0.0,
    }
    assert names(history(**solved)) == []


@pytest.mark.parametrize("smallest", [0.0, -0.1])
def test_a_penalty_that_is_learned_is_no_fault(smallest):
    # Every completion gets the smallest penalty in the end.
    def penalty(t):
        return min(smallest, -0.5 + t)

    learned = {
        "reward": penalty,
        "rewards/accuracy_reward/mean": penalty,
        "reward_std": lambda t: 0.2 if penalty(t) < smallest else 0.0,
        "frac_reward_zero_std": lambda t: 0.0 if penalty(t) < smallest else 1.0,
    }
    assert names(history(**learned)) == []


def test_empty_answers_are_a_fault_whatever_their_reward():
    assert names(history(**{"completions/mean_length": late(1.5, 3.0)})) == ["completions shrink to nothing"]
    assert names(history(**{"completions/mean_length": late(1.6, 3.2)})) == []


def test_a_step_that_was_skipped_hides_nothing():
    first_overflows = {"grad_norm": lambda t: math.inf if t <= 2 / STEPS else 0.5}
    assert names(history(**first_overflows)) == []
    assert names(history(**first_overflows, **FLAT)) == ["reward flat"]
    assert names(history(grad_norm=lambda t: math.inf if t <= 0.1 else 0.5)) == ["not finite"]


def test_a_warm_up_that_ends_between_two_logs():
    def logs(*rates):
        return [{"step": 10 * i, "learning_rate": rate} for i, rate in enumerate(rates, 1)] + [
            {"step": 30, "train_runtime": 1.0}
        ]

    assert names(logs(3.6e-5, 7.6e-5, 1e-4)) == []
    assert names(logs(3.6e-5, 7.6e-5, 11.6e-5)) == ["warm-up longer than the run"]
    evaluated = [*logs(3.6e-5, 7.6e-5, 11.6e-5), {"step": 30, "eval_reward": 0.5}]
    assert names(evaluated) == ["warm-up longer than the run"]
    assert names([*evaluated, {"step": 40, "learning_rate": 15.6e-5}]) == []  # training continues


@pytest.mark.parametrize("step", [math.nan, math.inf, "3", None])
def test_steps_that_are_no_numbers_are_passed_over(step):
    assert names([{"step": step, "loss": math.nan}, *history()]) == []


def test_rewards_too_small_to_square():
    assert "not finite" not in names(history(reward=lambda t: 1e-200 * t, reward_std=1e-200))


def test_every_rule_has_its_case():
    assert list(CASES) == [rule.name for rule in RULES]


@pytest.mark.parametrize("name", CASES)
def test_each_rule_at_its_bound(name):
    just_in, just_out = CASES[name]
    assert names(history(**just_in)) == [name]
    assert names(history(**just_out)) == []


@pytest.mark.parametrize("name", CASES)
def test_each_finding_can_be_acted_on(name):
    [finding] = find(history(**CASES[name][0]))
    assert finding.metric in history(**CASES[name][0])[0]
    assert 1 <= finding.since <= 1000
    assert any(character.isdigit() for character in finding.seen) or finding.name in ("never evaluated",)
    assert "`" in finding.change
    assert finding.means


@pytest.mark.parametrize(
    ("share", "mean", "std", "name"),
    [
        (0.97, 0.012, 0.1, "all wrong"),
        (0.92, 0.04, 0.2, "all wrong"),
        (0.95, -0.97, 0.3, "all wrong"),
        (0.95, 0.985, 0.12, "all right"),
        (0.95, 0.012, 1.0, "same reward within groups"),  # rewards of -1 and 1
        (0.95, 0.05, 0.0, "same reward within groups"),  # each of them
        (1.0, 0.02, 0.14, "same reward within groups"),
        (0.95, 0.5, 0.5, "same reward within groups"),
    ],
)
def test_why_groups_have_equal_rewards_in_the_log_of_trl(share, mean, std, name):
    rewards = {"reward": mean, "rewards/accuracy_reward/mean": mean, "rewards/accuracy_reward/std": std}
    logs = history(**rewards, frac_reward_zero_std=share, reward_std=0.02)
    assert names(logs) == [f"no signal: {name}"]
    # A function that returned None everywhere says nothing of it.
    assert names([{**each, "rewards/other/mean": None} for each in logs]) == [f"no signal: {name}"]


@pytest.mark.parametrize("rewards", [(0.5, 0.98, 1, 1, 1, 1), (0.4, 1, 1, 1, 1), (0.6, 0.95, 1, 1, 1)])
def test_what_was_solved_at_once_was_not_solved_from_the_start(rewards):
    logs = [
        {"step": 10 * i, "reward": r, "reward_std": 0.5 * (r < 1), "frac_reward_zero_std": r if r > 0.9 else 0.2}
        for i, r in enumerate(rewards, start=1)
    ]
    assert names(logs) == []
    assert names([{**each, "reward": 1.0, "frac_reward_zero_std": 1.0} for each in logs]) == ["no signal: all right"]


def test_gradients_of_0_that_chance_explains():
    # Real: a step of one or two groups, whose gradient is logged every 25 steps.
    signal, norms = (0.58, 0.66, 0.48, 0.44), (1.97, 0.0, 0.0, 0.0)
    logs = [
        {"step": 25 * i, "reward": reward, "signal/completions/all_wrong": 1 - share, "grad_norm": norm}
        for i, (reward, share, norm) in enumerate(zip((0.27, 0.44, 0.61, 0.59), signal, norms, strict=True), 1)
    ]
    assert names(logs) == []
    assert names(history(grad_norm=0.0, frac_reward_zero_std=0.5)) == ["gradient of 0"]


def test_one_gradient_in_many_that_are_0_hides_nothing():
    logs = history(grad_norm=lambda t: 0.5 if t <= 0.5 or t == 1 - 1 / STEPS else 0.0, frac_reward_zero_std=0.3)
    assert names(logs) == ["gradient of 0"]


def test_a_large_first_gradient_hides_no_spike():
    norms = {2 / STEPS: 600.0, 60 / STEPS: 500.0}
    [finding] = find(history(grad_norm=lambda t: norms.get(t, 0.5)))
    assert finding.name == "gradient spikes"


def test_what_began_all_wrong_was_not_right_from_the_start():
    rewards = [0.0, 0.0, 0.4, 0.9, *[1.0] * 8]
    logs = [
        {"step": step, "reward": reward, "reward_std": 0.0, "frac_reward_zero_std": 1.0}
        | {"rewards/f/mean": reward, "rewards/f/std": 0.0}
        for step, reward in enumerate(rewards, 1)
    ]
    assert "no signal: all right" not in names(logs)


def test_three_logs_are_enough_to_see_a_reward_rise():
    logs = [
        {"step": 20 * i, "reward": reward, "reward_std": 0.4, "completions/clipped_ratio": 0.9}
        for i, reward in enumerate((0.42, 0.7, 0.93), 1)
    ]
    assert names(logs) == []


def test_the_entropy_of_completions_that_are_all_masked_is_no_start():
    assert names(history(entropy=lambda t: 0.0 if t <= 0.1 else 0.8)) == []


def test_a_gradient_that_becomes_small_has_no_spikes():
    assert names(history(grad_norm=lambda t: 1.0 if t <= 0.04 else 0.005)) == []


def test_since_when_where_the_last_logs_scatter():
    [finding] = find(history(**{"clip_ratio/region_mean": lambda t: 0.0 if t > 0.95 else 0.9 * (t > 0.5)}))
    assert finding.name == "clip share high"
    assert finding.since < 800


def test_completions_that_are_all_cut_explain_a_gradient_of_0():
    cut = {"completions/clipped_ratio": 1.0, "grad_norm": 0.0, "frac_reward_zero_std": 0.2}
    assert names(history(**cut, **FLAT)) == ["most completions truncated"]


def test_the_caps_of_cispo_are_no_fault():
    assert names(history(cispo_clip_ratio=0.5)) == []


def test_a_warm_up_that_ends_between_the_only_two_logs():
    logs = [{"step": 10, "learning_rate": 9e-7}, {"step": 20, "learning_rate": 1e-6}, {"step": 20, "train_runtime": 1}]
    assert names(logs) == []
    logs[1]["learning_rate"] = 19e-7
    assert names(logs) == ["warm-up longer than the run"]


def test_a_held_out_reward_that_was_best_before_the_first_step():
    rising = {"reward": lambda t: 0.2 + 0.6 * t, "reward_std": 0.4}
    logs = history(**rising)
    evaluated = [{"step": step, "eval_reward": 0.6 - step / 2000} for step in range(0, 1001, 100)]
    assert names([*evaluated, *logs]) == ["held-out reward falls"]


def test_two_logs_do_not_say_that_the_reward_fell():
    logs = [{"step": step, "reward": reward, "reward_std": 0.4} for step, reward in ((10, 0.6), (20, 0.3))]
    assert names(logs) == []
    assert names([*logs, {"step": 30, "reward": 0.05, "reward_std": 0.4}]) == ["reward fell"]


def test_since_which_step():
    [finding] = find(history(**{"frac_reward_zero_std": late(1.0, 0.2), **constant(0.0)}))
    assert finding.since in (31, 32, 33)  # of a moving mean of three logs
    assert "100 %" in finding.seen


def test_symptoms_of_another_finding_are_left_out():
    # A gradient of 0, a flat reward and scales for nothing, since no completion is right.
    all_wrong = {"frac_reward_zero_std": 1.0, "grad_norm": 0.0, "reward_std": 0.0, **constant(0.0)}
    assert names(history(**all_wrong)) == ["no signal: all wrong"]
    # All are wrong because all are cut.
    assert names(history(**all_wrong, **{"completions/clipped_ratio": 1.0})) == ["most completions truncated"]


def test_gradients_that_vanish_are_not_preceded_by_spikes():
    assert names(history(grad_norm=lambda t: 0.5 if t <= 0.1 else 1e-6)) == []


def test_rewards_that_are_none_in_the_log_of_trl():
    nothing = {"reward": None, "reward_std": None}
    logs = [{**entry, "reward": None} if "train_runtime" not in entry else entry for entry in history(**nothing)]
    assert names(logs) == ["completions that no reward function scores"]


@pytest.mark.parametrize(("value", "found"), [(math.inf, True), (-math.inf, True), (1e308, False)])
def test_infinite_rewards_are_named_and_too_large_ones_are_rewards(value, found):
    rewards = {"reward": value, "rewards/accuracy_reward/mean": value}
    assert names(history(**rewards)) == ["infinite rewards"] * found
    assert names(history(**rewards, grad_norm=0.0))[:1] == (["infinite rewards"] if found else ["gradient of 0"])


@pytest.mark.parametrize(
    "logs",
    [
        [],
        [{}],
        ["no entry", None, 3, {"step": None}, {"step": "1", "reward": 1.0}, {"step": True, "reward": 0.0}],
        [{"step": 1, "reward": "<b>", "entropy": [1], "loss": {}}],
        [{"step": 1, "reward": 10**400, "entropy": 10**400}],
        [{"step": 1, "frac_reward_zero_std": 1.0, "reward": 0.0, "grad_norm": 0.0}],
        [{"step": step, "reward": math.nan, "entropy": math.inf, "learning_rate": math.nan} for step in (1, 2)],
        [{"step": step, "eval_reward": 0.5} for step in (10, 20, 30)],
        [{"step": step, "reward": 0.5, "reward_std": 0.0} for step in range(3)],
    ],
)
def test_odd_logs_have_no_findings(logs):
    assert names(logs) == []


def without(log_history, name):
    return [{key: value for key, value in entry.items() if key != name} for entry in log_history]


@pytest.mark.parametrize("lacking", ["not there", "not a number"])
def test_a_log_of_reasons_that_lacks_the_share_with_a_signal(lacking):
    share = "signal/completions/signal"
    logs = history(**{**signal(all_equal=1.0), share: math.nan, "frac_reward_zero_std": None})
    if lacking == "not there":
        logs = without(logs, share)
    [finding] = [each for each in find(logs) if each.name == "no signal: same reward within groups"]
    assert finding.since == 0  # nothing says since when
    assert "100 %" in finding.seen


def test_a_share_above_1_is_taken_for_1():
    logs = history(frac_reward_zero_std=1.5, **constant(0.0))
    assert find(logs) == find(history(frac_reward_zero_std=1.0, **constant(0.0)))
    assert "no signal: all wrong" in names(logs)


@pytest.mark.parametrize("value", [1e308, -1e308, 1e200, lambda t: 1e308 * math.cos(99 * t)])
@pytest.mark.parametrize("name", ["reward", "reward_std", "grad_norm", "entropy", "loss", "eval_reward"])
def test_values_too_large_to_calculate_with_are_not_known(name, value):
    assert names(history(**{name: value})) == []


def test_the_document_has_the_table_of_the_code():
    page = (Path(__file__).parents[2] / "docs" / "findings.md").read_text(encoding="utf-8")
    for rule in RULES:
        assert f"| {rule.name} | {rule.when} | {rule.bound:g} | {rule.reason} |" in page
        assert f"| {rule.name} | {rule.means} | {rule.change} |" in page


# In the report


def faulty(directory, **metrics):
    logged_runs.write_state(directory, history(**{**CASES["learning rate at 0"][0], **metrics}), STEPS)
    return directory


def test_the_command_prints_findings_before_the_report(tmp_path, capsys):
    healthy = tmp_path / "fine"
    logged_runs.write_state(healthy, history(), STEPS)
    assert main([str(faulty(tmp_path / "run")), str(healthy), "--output", str(tmp_path / "out.html")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["run: 1 finding", "", "  learning rate at 0, since step 31"]
    assert any("`lr_scheduler_type`" in line for line in lines)
    assert lines[-2:] == ["fine: no findings", f"Report: {tmp_path / 'out.html'}"]


def test_findings_are_printed_even_if_the_report_cannot_be_written(tmp_path, capsys):
    assert main([str(faulty(tmp_path / "run")), "--output", str(tmp_path / "nowhere" / "out.html")]) == 2
    printed = capsys.readouterr()
    assert "learning rate at 0" in printed.out
    assert "Make it first" in printed.err


def test_the_name_of_a_reward_function_gives_no_orders(tmp_path, capsys):
    names = [f"rewards/{text}" for text in logged_runs.HOSTILE]
    for number, name in enumerate(names):
        metrics = {f"{name}/mean": 0.0, f"{name}/std": 0.0, **FLAT}
        run = tmp_path / str(number)
        logged_runs.write_state(run, history(**metrics), STEPS)
        assert main([str(run), "--output", str(tmp_path / "out.html")]) == 0
        shown = capsys.readouterr().out
        assert "a reward function that gives nothing" in shown
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b\u202e\u2066\ud800]", shown)
        page = (tmp_path / "out.html").read_text(encoding="utf-8")
        assert page.count("<script") == page.count("</script>") == 2


def test_a_run_of_which_only_tokens_are_left_has_no_findings_to_tell(tmp_path, capsys):
    logged_runs.write_tokens(tmp_path / "run", [logged_runs.completion(3)])
    assert main([str(tmp_path / "run"), "--output", str(tmp_path / "out.html")]) == 0
    said = "run: too few logs to tell what is wrong"
    assert capsys.readouterr().out == f"{said}\nReport: {tmp_path / 'out.html'}\n"


@pytest.mark.parametrize("logs", [[], history()[:2], history()[-1:]], ids=["none", "two", "summary"])
def test_a_run_with_too_few_logs_is_not_called_healthy(logs, tmp_path):
    logged_runs.write_state(tmp_path, logs, 2)
    assert read_run(tmp_path).findings is None
    logged_runs.write_state(tmp_path, [*history()[:2], {"step": 3, "loss": math.nan}], 3)
    assert [finding.name for finding in read_run(tmp_path).findings] == ["not finite"]


def test_tokens_per_second(tmp_path):
    logs = [{"step": step, "num_tokens": 100.0 * step, "step_time": 0.5} for step in (2, 4, 8)]
    logged_runs.write_state(tmp_path, logs, 8)
    assert read_run(tmp_path).metrics["tokens per second"] == [(4, 200.0), (8, 200.0)]
