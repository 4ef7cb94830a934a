"""`trl-a3po compare`: paired differences over the same problems, and which problems only one model solves."""

import json
import re

import numpy as np
import pytest

from trl_a3po.cli import compare as compare_command
from trl_a3po.cli import main as cli
from trl_a3po.evaluation import metrics
from trl_a3po.evaluation.compare import Difference, compare, markdown, read_result
from trl_a3po.evaluation.files import hash_of_file
from trl_a3po.evaluation.page import write_page
from trl_a3po.evaluation.runs import problem_fingerprint, summary


@pytest.fixture
def write(tmp_path):
    """Writes an evaluation: the correct samples of each problem, by its text."""

    def write(name, correct, solution="$2$", settings=None, versions=None, says="\\boxed{{{}}}"):
        records = []
        for text, samples in correct.items():
            prompt = [{"role": "user", "content": text}]
            records.append(
                {
                    "problem": problem_fingerprint(prompt),
                    "prompt": prompt,
                    "solution": solution,
                    "completions": [says.format(2 if each else 3) for each in samples],
                    "correct": samples,
                    "tokens": [5] * len(samples),
                    "ended": [True] * len(samples),
                }
            )
        directory = tmp_path / name
        directory.mkdir(parents=True)
        samples = directory / "samples.jsonl"
        samples.write_text("".join(json.dumps(record) + "\n" for record in records))
        results = {
            **summary(records),
            "settings": settings or {"temperature": 0.6},
            "versions": versions or {"torch": "2.13"},
            "samples_sha256": hash_of_file(samples),
        }
        (directory / "results.json").write_text(json.dumps(results))
        return directory

    return write


def read(directory):
    return read_result(directory, directory.name)


def random_outcomes(seed, problems=200, samples=4, gain=0.0):
    generator = np.random.default_rng(seed)
    difficulty = np.random.default_rng(0).beta(0.5, 0.5, size=problems)
    probabilities = np.clip(difficulty + gain, 0, 1)
    drawn = generator.random((problems, samples)) < probabilities[:, None]
    return {f"{i}?": [float(each) for each in row] for i, row in enumerate(drawn)}


def test_a_gain_is_seen_though_problems_differ_more_than_models(write):
    before, after = random_outcomes(1), random_outcomes(2, gain=0.08)
    pair = compare(read(write("grpo", before)), read(write("a3po", after)))
    found = pair.differences["avg@4"]
    expected = np.mean(list(after.values())) - np.mean(list(before.values()))
    assert found.estimate.mean == pytest.approx(expected)
    assert found.verdict == "better"
    assert found.share_above_zero > 0.99
    # Unpaired, the intervals are wider than the gain.
    separate = [each.estimates["avg@4"] for each in (pair.first, pair.second)]
    assert separate[0].high > separate[1].low
    back = compare(pair.second, pair.first).differences["avg@4"]
    assert back.verdict == "worse"
    assert back.estimate.mean == pytest.approx(-expected)


def test_an_interval_that_ends_at_0_but_for_rounding_tells_nothing(write):
    counts = [(5, 4), (1, 2), (2, 2), (3, 5), (2, 2), (1, 2), (5, 4), (0, 1), (2, 5), (1, 3)]
    outcomes = [
        {f"{problem}?": [1.0] * each[side] + [0.0] * (5 - each[side]) for problem, each in enumerate(counts)}
        for side in (0, 1)
    ]
    before, after = (read(write(name, each)) for name, each in zip(["before", "after"], outcomes, strict=True))
    found = compare(before, after).differences["avg@5"]
    assert found.estimate.low == pytest.approx(0, abs=1e-12)
    assert found.verdict == compare(after, before).differences["avg@5"].verdict == "not told apart"


def test_nineteen_of_twenty_comparisons_of_equals_tell_nothing(monkeypatch):
    monkeypatch.setattr(metrics, "RESAMPLES", 400)
    told = 0
    for seed in range(400):
        sides = [np.mean(list(random_outcomes(2 * seed + side, 60).values()), axis=1) for side in (0, 1)]
        told += Difference(metrics.estimate(sides[1] - sides[0]), 0.5).verdict != "not told apart"
    assert 0.02 < told / 400 < 0.09


def test_which_problems_only_one_solves(write):
    first = write("first", {"a?": [1.0, 0.0], "b?": [0.0, 0.0], "c?": [1.0, 1.0], "d?": [0.0, 0.0]})
    second = write("second", {"a?": [0.0, 0.0], "b?": [1.0, 1.0], "c?": [1.0, 0.0], "d?": [0.0, 0.0]})
    pair = compare(read(first), read(second))
    texts = pair.first.texts
    assert [texts[each].prompt for each in pair.solved_only_by(pair.first)] == ["a?"]
    assert [texts[each].prompt for each in pair.solved_only_by(pair.second)] == ["b?"]
    assert [texts[each].prompt for each in pair.by_difference()] == ["b?", "a?", "c?"]
    text = markdown([pair.first, pair.second], [pair])
    assert "1 only by first, 1 only by second." in text


def test_which_problems_only_one_solves_of_as_many_samples(write, tmp_path):
    first = write("first", {"a?": [0.0], "b?": [0.0], "c?": [1.0]})
    second = write("second", {"a?": [0.0, 1.0, 1.0], "b?": [1.0, 0.0, 0.0], "c?": [1.0, 1.0, 1.0]})
    pair = compare(read(first), read(second))
    assert [pair.first.texts[each].prompt for each in pair.solved_only_by(pair.second)] == ["b?"]
    said = "at least one correct among the first 1 samples: 0 only by first, 1 only by second."
    assert said in markdown([pair.first, pair.second], [pair])
    assert said in write_page([pair.first, pair.second], [pair], tmp_path / "page.html").read_text()


def test_what_is_not_the_same_is_said_and_not_compared(write):
    first = write("first", {"a?": [1.0] * 4, "b?": [0.0] * 4, "c?": [0.0] * 4})
    second = write("second", {"a?": [0.0] * 2, "b?": [0.0] * 2, "d?": [1.0] * 2}, settings={"temperature": 1.0})
    pair = compare(read(first), read(second))
    assert len(pair.shared) == 2
    assert list(pair.differences) == ["avg@2", "pass@1", "pass@2", "maj@2"]
    assert pair.differences["avg@2"].estimate.mean == -0.5
    assert pair.notes == [
        "Only in first, and not compared: 1 of its problems.",
        "Only in second, and not compared: 1 of its problems.",
        "first has 4 samples of each problem, second has 2. k is at most 2; avg@k is the mean over all samples.",
        "temperature differs: 0.6 and 1.0.",
    ]


def test_versions_that_differ_are_said(write):
    versions = {"torch": "2.13", "transformers": "5.23.0", "device": "CPU"}
    first = write("first", {"a?": [1.0]}, versions=versions)
    second = write(
        "second", {"a?": [1.0]}, versions={**versions, "transformers": "4.56.2", "device": "H100", "vllm": "1"}
    )
    notes = compare(read(first), read(second)).notes
    assert notes == ["Versions differ: transformers 5.23.0 and 4.56.2, device CPU and H100."]


@pytest.mark.parametrize("change", ["cut", "doubled", "foreign", "broken"])
def test_samples_that_the_results_are_not_of_are_refused(change, write):
    directory = write("first", {"a?": [1.0], "b?": [0.0]})
    samples = directory / "samples.jsonl"
    text = samples.read_text()
    foreign = (write("second", {"a?": [0.0], "b?": [0.0]}) / "samples.jsonl").read_text()
    changed = {"cut": text[: text.index("\n") + 1], "doubled": text * 2, "foreign": foreign, "broken": text + "{\n"}
    samples.write_text(changed[change])
    with pytest.raises(ValueError, match=r"samples.jsonl' is not the file that '.*results.json' was computed from"):
        read(directory)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"metrics": {}, "settings": 3, "versions": {}}'])
def test_damaged_results_are_named(text, write):
    directory = write("first", {"a?": [1.0]})
    (directory / "results.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"first/results.json' is damaged: it .* Delete it and run `trl-a3po eval` ag"
    ):
        read(directory)


@pytest.mark.parametrize(
    "change",
    [
        {"metrics": {"avg@1": 0.5}},
        {"metrics": {"avg@1": {"mean": "x", "low": None, "high": None}}},
        {"metrics": {"avg@1": {"mean": 1.0}}},
        {"problems": None},
    ],
)
def test_results_of_another_shape_are_named(change, write):
    directory = write("first", {"a?": [1.0]})
    results = json.loads((directory / "results.json").read_text()) | change
    (directory / "results.json").write_text(json.dumps({name: each for name, each in results.items() if each}))
    with pytest.raises(ValueError, match=r"first/results.json' is damaged: its metrics .* run `trl-a3po eval` again"):
        read(directory)


def test_samples_that_are_not_utf8_are_named(write):
    directory = write("first", {"a?": [1.0]})
    samples, results = directory / "samples.jsonl", directory / "results.json"
    samples.write_bytes(samples.read_bytes().replace(b"boxed", b"\xffoxed"))
    results.write_text(json.dumps(json.loads(results.read_text()) | {"samples_sha256": hash_of_file(samples)}))
    with pytest.raises(ValueError, match=r"first/samples.jsonl' is damaged: it is not UTF-8"):
        read(directory)


def test_problems_with_another_solution_are_not_the_same(write):
    first, second = write("first", {"a?": [1.0]}), write("second", {"a?": [1.0]}, solution="$3$")
    with pytest.raises(ValueError, match="'first' and 'second' share no problem with the same solution"):
        compare(read(first), read(second))


def test_a_list_of_one_solution_is_that_solution(write):
    first, second = write("first", {"a?": [1.0]}), write("second", {"a?": [1.0]}, solution=["$2$"])
    pair = compare(read(first), read(second))
    assert len(pair.shared) == 1
    assert pair.notes == []


def test_the_page_shows_hostile_text_as_text(write, tmp_path):
    hostile = "<script>alert(1)</script>\u202e\x00&\"'"
    options = {"solution": hostile, "says": f"{hostile} {{}}"}
    first = write("<b>first</b>", {hostile: [1.0]}, settings={hostile: 1}, **options)
    second = write("second", {hostile: [0.0], "x": [0.0]}, settings={hostile: hostile}, **options)
    results = [read(first), read(second)]
    page = write_page(results, [compare(*results)], tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert "<b>" not in page
    assert "\u202e" not in page
    # In the summary, the problem, the solution, a completion of each model, and the note on the settings.
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;⟨U+202E⟩⟨U+0000⟩&amp;") >= 6
    assert "default-src 'none'" in page
    assert not re.search(r"(src|href)=", page)


def test_the_command(write, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    directories = [str(write(name, random_outcomes(seed))) for seed, name in enumerate(["base", "grpo", "a3po"])]
    assert cli.main(["compare", *directories]) == 0
    out = capsys.readouterr().out
    assert "grpo minus base, 200 problems, paired" in out
    assert "a3po minus base, 200 problems, paired" in out
    assert "The intervals are not corrected for making 2 comparisons." in out
    assert (tmp_path / "comparison.html").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["a"], "pass at least two directories"),
        (["a", "b"], "'a' contains no complete evaluation: results.json is missing. Run or resume"),
        (["b", "a"], "There is no directory 'b'. Pass the `output_dir` of `trl-a3po eval`."),
        (["page.html", "a"], "There is no directory 'page.html'. Pass the `output_dir` of `trl-a3po eval`."),
        (["c", "d", "--output", "c/samples.jsonl"], "c/samples.jsonl' exists and is no HTML page."),
        (["c", "d", "--output", "none/page.html"], "/none' to write 'page.html' into. Make it first."),
        (["c", "d", "--output", "c"], "/c' is a directory. Name a file in it."),
    ],
)
def test_bad_lines_are_refused(line, message, write, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "page.html").touch()
    for name in ("c", "d"):
        write(name, {"1?": [1.0], "2?": [0.0]})
    try:
        status = cli.main(["compare", *line])
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("output", ["c", "none/page.html", "c/samples.jsonl"])
def test_where_the_page_goes_is_checked_before_the_work(output, write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare_command, "read_result", lambda *_: pytest.fail("an evaluation was read"))
    directories = [str(write(name, {"1?": [1.0]})) for name in ("c", "d")]
    assert cli.main(["compare", *directories, "--output", output]) == 2


def test_a_page_is_written_though_nobody_reads_what_is_printed(write, tmp_path, monkeypatch):
    def broken(*_):
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", broken)
    directories = [str(write(name, {"1?": [1.0]})) for name in ("c", "d")]
    with pytest.raises(BrokenPipeError):  # see tests/cli/test_main.py
        compare_command.main([*directories, "--output", str(tmp_path / "page.html")])
    assert (tmp_path / "page.html").exists()


def test_a_page_that_cannot_be_written_loses_no_comparison(write, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(compare_command, "write_page", full)
    directories = [str(write(name, {"1?": [1.0]})) for name in ("c", "d")]
    assert cli.main(["compare", *directories, "--output", str(tmp_path / "page.html")]) == 2
    out, err = capsys.readouterr()
    assert "d minus c, 1 problems, paired" in out
    assert "No space left on device" in err
