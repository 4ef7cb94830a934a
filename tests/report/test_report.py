"""The report as a file: it holds what runs have logged, all of it as data, and says what it cannot read."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import logged_runs

from trl_a3po.cli.report import main
from trl_a3po.report import run as run_module
from trl_a3po.report import write_report
from trl_a3po.report.page import save_page
from trl_a3po.report.run import read_run
from trl_a3po.report.text import names_of, visible
from trl_a3po.training.token_log_format import MAX_LINE_BYTES, TOKENS_FILE


def embedded(path):
    """The data of a report, from the element that a browser would read."""
    (data,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', path.read_text("utf-8"))
    return json.loads(data)


def test_a_report_holds_what_was_logged(tmp_path):
    path = write_report([logged_runs.a3po(tmp_path / "mine")], tmp_path / "report.html")
    assert path == tmp_path / "report.html"
    (run,) = embedded(path)["runs"]
    assert run["name"] == "mine"
    assert run["metrics"]["reward"] == [[step, step / 10] for step in range(1, 11)]
    assert run["metrics"]["eval_reward"] == [[5, 0.5], [10, 0.5]]
    assert run["metrics"]["late"] == [[10, 1.0]]
    assert not {"step", "epoch", "train_runtime", "train_loss"} & run["metrics"].keys()
    assert len(run["completions"]) == 20
    assert run["completions"][0] == {
        "step": 1,
        "prompt": "2+2=",
        "reward": 1.0,
        "advantage": 1.5,
        "length": 3,
        "tokens": ["4", " is", "↵\n"],
        "weights": [2.0, 1.0, 1.0],
        "probs": [0.125, 0.75, 0.75],
        "entropies": [1.25, 0.5, 0.5],
        "group": 0,
    }


def test_several_runs_and_missing_metrics(tmp_path):
    runs = [logged_runs.a3po(tmp_path / "a" / "run"), logged_runs.grpo(tmp_path / "b" / "run")]
    runs.append(logged_runs.grpo(tmp_path / "c"))
    (first, second, third) = embedded(write_report(runs, tmp_path / "report.html"))["runs"]
    assert [first["name"], second["name"], third["name"]] == ["a/run", "b/run", "c"]
    assert any(name.startswith("a3po/") for name in first["metrics"])
    assert not any(name.startswith("a3po/") for name in second["metrics"])
    assert second["completions"] == []


def test_values_that_are_none_are_left_out(tmp_path):
    odd = {"step": 1, "none": None, "nan": float("nan"), "text": "1", "flag": True, "huge": 10**400, "loss": 2}
    logged_runs.write_state(tmp_path, [odd, "no entry", {"loss": 3}, {"step": None, "loss": 3}])
    assert read_run(tmp_path).metrics == {"loss": [(1, 2)]}


def test_the_newest_state_counts(tmp_path):
    logged_runs.write_state(tmp_path / "checkpoint-5", [{"step": 5, "loss": 5}], 5)
    logged_runs.write_state(tmp_path / "checkpoint-10", [{"step": 10, "loss": 10}], 10)
    logged_runs.write_state(tmp_path / "checkpoint-last", [{"step": 99, "loss": 99}], 99)
    assert read_run(tmp_path).metrics == {"loss": [(10, 10)]}
    logged_runs.write_state(tmp_path, [{"step": 10, "loss": 11}], 10)
    assert read_run(tmp_path).metrics == {"loss": [(10, 11)]}
    assert read_run(tmp_path / "checkpoint-5").metrics == {"loss": [(5, 5)]}


def test_an_earlier_run_with_more_steps_does_not_count(tmp_path):
    def write(name, steps, run, at):
        logs = [{"step": step, "loss": 100 * run + step} for step in range(1, steps + 1)]
        logged_runs.write_state(tmp_path / name, [*logs, {"step": steps, "train_runtime": 1.0}], steps)
        os.utime(tmp_path / name / "trainer_state.json", (at, at))

    def last():
        return read_run(tmp_path).metrics["loss"][-1]

    write("checkpoint-4", 4, run=1, at=10)
    write("checkpoint-8", 8, run=1, at=20)
    write(".", 8, run=1, at=30)
    assert last() == (8, 108)
    write("checkpoint-2", 2, run=2, at=40)  # the second run was killed
    assert last() == (2, 202)
    write(".", 3, run=2, at=50)
    assert last() == (3, 203)
    write("checkpoint-5", 5, run=2, at=60)  # and is resumed
    assert last() == (5, 205)


def test_the_end_of_a_run_whose_files_were_copied_in_another_order(tmp_path):
    for steps, at in ((2, 30), (4, 20), (6, 10)):
        logs = [{"step": step, "loss": step} for step in range(1, steps + 1)]
        name = "." if steps == 6 else f"checkpoint-{steps}"
        logged_runs.write_state(tmp_path / name, logs, steps)
        os.utime(tmp_path / name / "trainer_state.json", (at, at))
    assert read_run(tmp_path).metrics["loss"][-1] == (6, 6)


def test_tokens_alone_are_enough(tmp_path):
    logged_runs.write_tokens(tmp_path, [logged_runs.completion(3)])
    run = read_run(tmp_path)
    assert (run.metrics, [each.step for each in run.completions]) == ({}, [3])


# Untrusted text


def test_nothing_in_the_data_ends_the_element_that_holds_it(tmp_path):
    page = write_report([logged_runs.hostile(tmp_path / "<b>&")], tmp_path / "report.html").read_bytes()
    (data,) = re.findall(rb'type="application/json">([^<]*)<', page)
    assert data.isascii()
    assert page.count(b"<script") == page.count(b"</script>") == 2
    assert b"<img" not in page
    (run,) = json.loads(data)["runs"]
    assert run["name"] == "<b>&"
    assert "</script><script>globalThis.broken = 1</script>" in run["metrics"]
    assert run["completions"][0]["tokens"][0] == logged_runs.HOSTILE[0]


def test_the_policy_names_the_script_and_the_style_and_forbids_the_rest(tmp_path):
    page = write_report([logged_runs.hostile(tmp_path / "run")], tmp_path / "report.html").read_text("utf-8")
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    digest = r"'sha256-[A-Za-z0-9+/]{43}='"
    assert re.fullmatch(
        f"default-src 'none'; script-src {digest}; style-src {digest}; base-uri 'none'; form-action 'none'", policy
    )
    template = re.sub(r'<script id="data".*?</script>', "", page, flags=re.DOTALL)
    assert not re.search(
        r"https?://(?!www\.w3\.org/2000/svg)|innerHTML|outerHTML|insertAdjacent|eval\(|style=", template
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a b<é日👍", "a b<é日👍"),
        ("1\n\t2", "1↵\n⇥2"),
        ("\x00\x1b[31m\r", "⟨U+0000⟩⟨U+001B⟩[31m⟨U+000D⟩"),
        ("\x7f\x85\xad", "⟨U+007F⟩⟨U+0085⟩⟨U+00AD⟩"),
        ("\u202e\u2066\u200f\u200d\ufeff", "⟨U+202E⟩⟨U+2066⟩⟨U+200F⟩⟨U+200D⟩⟨U+FEFF⟩"),
        ("\ud800\udfff", "⟨U+D800⟩⟨U+DFFF⟩"),
        ("\u2028\u2029", "⟨U+2028⟩⟨U+2029⟩"),
        ("\U000e0041", "⟨U+E0041⟩"),  # a tag character: text that nobody sees
    ],
)
def test_what_cannot_be_seen_is_spelled_out(text, shown):
    assert visible(text) == shown


def test_names(tmp_path):
    paths = [tmp_path / name for name in ("a/eval", "b/eval", "c")]
    assert names_of(paths) == ["a/eval", "b/eval", "c"]
    assert names_of(paths[1:]) == ["eval", "c"]
    assert names_of([Path("/run"), Path("/x/run")]) == ["/run", "x/run"]
    with pytest.raises(ValueError, match="The same directory was given twice"):
        names_of([paths[0], paths[0]])


# Bounds


def test_long_runs_are_thinned_and_the_ends_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "MAX_TOKENS_SHOWN", 20_000)
    logged_runs.write_state(tmp_path, [{"step": step, "loss": 1.0} for step in range(1, 5001)], 5000)
    count = 3 * run_module.MAX_TOKENS_SHOWN // 1001
    logged_runs.write_tokens(tmp_path, [logged_runs.completion(step, ["x"] * 1000) for step in range(1, count + 1)])
    run = read_run(tmp_path)
    steps = [step for step, _ in run.metrics["loss"]]
    assert (len(steps), steps[0], steps[-1]) == (run_module.MAX_POINTS, 1, 5000)
    shown = [each.step for each in run.completions]
    assert sum(len(each.tokens) for each in run.completions) <= run_module.MAX_TOKENS_SHOWN
    assert (len(shown), shown[0], shown[-1]) == (run_module.MAX_TOKENS_SHOWN // 1001, 1, count)
    assert run.logged_steps == count


def test_lines_that_are_none_are_counted_and_the_others_read(tmp_path):
    good = logged_runs.completion(1).to_line().encode()
    lines = [good, b"\n", b"\xff\x00\n", b"x" * 10_000_000 + b"\n", good, b"[" * 100_000 + b"\n", good[:40]]
    (tmp_path / TOKENS_FILE).write_bytes(b"".join(lines))
    run = read_run(tmp_path)
    assert len(run.completions) == 2
    assert run.unreadable_lines == 5
    assert MAX_LINE_BYTES < 10_000_000


# The command line


def test_the_command_writes_a_report_and_says_where(tmp_path, capsys):
    run, output = logged_runs.a3po(tmp_path / "run"), tmp_path / "out.html"
    assert main([str(run), "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"run: no findings\nReport: {output}\n"
    assert embedded(output)["runs"][0]["name"] == "run"


def test_the_command_by_its_name_loads_neither_torch_nor_trl(tmp_path):
    code = (
        "import sys; from trl_a3po.cli.report import main; status = main();"
        "assert not {'torch', 'trl', 'transformers'} & set(sys.modules), 'heavy import'; sys.exit(status)"
    )
    run = str(logged_runs.a3po(tmp_path / "run"))
    subprocess.run([sys.executable, "-c", code, run], check=True, cwd=tmp_path)
    assert (tmp_path / "report.html").exists()
    done = subprocess.run(
        [sys.executable, "-m", "trl_a3po.cli", "report", "none"], capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (
        2,
        "error: There is no directory 'none'. Pass the `output_dir` of a run.\n",
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "There is no directory 'missing'."),
        (
            ["empty"],
            "'empty' contains no log of a run (looked for trainer_state.json, checkpoint-N/trainer_state.json",
        ),
        (["run", "missing"], "There is no directory 'missing'."),
        (["torn"], r"is incomplete, or not the state of a trainer."),
        (["run", "--output", "nowhere/report.html"], "nowhere' to write 'report.html' into. Make it first."),
        (["run", "./run"], "The same directory was given twice."),
        (["run", "--output", "torn/trainer_state.json"], "torn/trainer_state.json' exists and is no HTML page."),
    ],
)
def test_errors_say_what_was_looked_for(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    logged_runs.grpo(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "trainer_state.json").write_text('{"global_step": 3, "log_hist')
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "report.html").exists()


def test_a_step_without_tokens_is_a_mistake(tmp_path):
    with pytest.raises(SystemExit) as exit_:
        main([str(tmp_path), "--step", "3"])
    assert exit_.value.code == 2


def test_a_page_is_written_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    page = tmp_path / "report.html"
    save_page("<!doctype html>first", page)

    def full(path, *_, **__):
        path.write_bytes(b"sec")
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space left"):
            save_page("second", page)
    assert page.read_text() == "<!doctype html>first"
    save_page("second", page)
    assert page.read_text() == "second"
    assert list(tmp_path.iterdir()) == [page]
    assert save_page("third", "/dev/null") == Path("/dev/null")
    assert Path("/dev/null").is_char_device()


def test_a_page_replaces_only_a_page_and_stays_what_it_was(tmp_path):
    page, link, other = (tmp_path / name for name in ("page", "link", "notes.html"))
    save_page("<!doctype html>1", page)
    page.chmod(0o600)
    link.symlink_to(page)
    save_page("<!doctype html>2", link)
    assert link.is_symlink()
    assert page.read_text() == "<!doctype html>2"
    assert page.stat().st_mode & 0o777 == 0o600
    other.write_text("my notes")
    with pytest.raises(ValueError, match=r"notes\.html' exists and is no HTML page\."):
        save_page("<!doctype html>3", other)
    assert other.read_text() == "my notes"


# The terminal


def test_the_terminal_shows_one_prompt_of_a_step(tmp_path, capsys):
    pytest.importorskip("rich")
    run = str(logged_runs.a3po(tmp_path / "run"))
    assert main([run, "--tokens", "--step", "3"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("step 3, prompt\n2+2=\n")
    assert "positive: reward 1, advantage +1.5, 3 tokens\n4 is↵\n" in shown
    assert "negative: reward 0, advantage -0.5, 3 tokens\n" in shown
    assert re.search(r"\n 1 +4 +2 +0\.125 +1\.25 *\n", shown)
    assert main([run, "--tokens"]) == 0
    assert capsys.readouterr().out.startswith("step 10,")


def test_the_terminal_does_not_mix_groups_with_one_question(tmp_path, capsys):
    pytest.importorskip("rich")
    completions = [logged_runs.completion(1, reward=float(group), group=group) for group in (0, 1)]
    logged_runs.write_tokens(tmp_path, completions)
    assert main([str(tmp_path), "--tokens"]) == 0
    shown = capsys.readouterr().out
    assert "reward 0," in shown
    assert "reward 1," not in shown


def test_the_terminal_takes_no_orders_from_a_model(tmp_path, capsys):
    pytest.importorskip("rich")
    assert main([str(logged_runs.hostile(tmp_path / "run")), "--tokens"]) == 0
    shown = capsys.readouterr().out
    assert "[red]markup[/red][/]" in shown
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b\u202e\u2066\ud800]", shown)


def test_the_terminal_says_where_there_is_nothing(tmp_path, capsys):
    pytest.importorskip("rich")
    run = str(logged_runs.a3po(tmp_path / "run"))
    assert main([run, "--tokens", "--step", "11"]) == 2
    assert "of step 11. It has some from step 1 to 10, for example of 10." in capsys.readouterr().err
    assert main([str(logged_runs.grpo(tmp_path / "grpo")), "--tokens"]) == 2
    assert "has no logged completions. Set `log_tokens` in A3POConfig." in capsys.readouterr().err


def test_the_terminal_without_rich_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main([str(logged_runs.a3po(tmp_path / "run")), "--tokens"]) == 2
    assert capsys.readouterr().err == "error: `--tokens` needs rich. Install it: pip install rich\n"
