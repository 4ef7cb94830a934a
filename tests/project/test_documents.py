"""The code, command lines, links and lists of the documents work as they are written."""

import inspect
import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import torch
import trl
import yaml
from accelerate.commands.launch import launch_command_parser
from support import tiny, training
from trl.cli.accelerate_config import resolve_accelerate_config_argument

import trl_a3po
from trl_a3po.cli import main as cli
from trl_a3po.cli import train


REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
GUIDE = (REPOSITORY / "docs" / "guide.md").read_text(encoding="utf-8")
SHAPING = (REPOSITORY / "docs" / "shaping.md").read_text(encoding="utf-8")
TRLS_OWN = {"tests/test_grpo_trainer.py"}
PAGES = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md")),
    *sorted((REPOSITORY / "docs").glob("*.md")),
    *(REPOSITORY / name / "README.md" for name in ("benchmarks/polarity", "benchmarks/real", "examples/smollm2")),
]


def test_the_trainer_that_the_readme_writes_trains(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    namespace = {}
    exec(code, namespace)
    trainer = namespace["FirstTokensTrainer"](
        tiny.model(),
        tiny.parity_reward,
        tiny.config(tmp_path, max_steps=2),
        tiny.prompts(),
        processing_class=tiny.tokenizer(),
    )
    before = tiny.parameters(trainer)
    trainer.train()
    assert any(not before[name].equal(value) for name, value in tiny.parameters(trainer).items())


def run(text, tmp_path):
    """Runs the code of a document. What it leaves defined."""
    fields = ("use_cpu", "bf16", "report_to", "max_steps", "per_device_train_batch_size", "max_completion_length")
    fields += ("logging_steps",)
    namespace = {
        "model": tiny.save(tmp_path / "model"),
        "reward": tiny.parity_reward,
        "dataset": tiny.prompts(),
        "options": {name: getattr(tiny.config(tmp_path), name) for name in fields},
    }
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(block, namespace)
    return namespace


def test_the_code_of_the_guide_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = run(GUIDE, tmp_path)
    assert namespace["trainer"].state.global_step == 3
    assert namespace["args"].shaping_settings["positive_low_scale"] == 1
    assert namespace["psr"].shaping_settings["negative_weight"] == 0


def test_the_shapings_that_the_documentation_writes_train_and_pass_their_test(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = run(SHAPING, tmp_path)
    namespace["test_gradients"]()
    trainers = [value for value in namespace.values() if inspect.isclass(value) and "shape_advantages" in vars(value)]
    assert len(trainers) == 1 + 12
    for trainer_class in {*trainers} - {trl_a3po.A3POTrainer}:
        args = trl_a3po.A3POConfig("out", **namespace["options"])
        trainer = trainer_class(namespace["model"], namespace["reward"], args, namespace["dataset"])
        before = tiny.parameters(trainer)
        trainer.train()
        assert any(not before[name].equal(value) for name, value in tiny.parameters(trainer).items())


def test_a_method_by_name_on_the_command_line_and_in_yaml():
    (line,) = re.findall(r"^trl-a3po train (.*)$", SHAPING, flags=re.MULTILINE)
    words = shlex.split(f"{line} --use_cpu --bf16 False")
    _, args, *_ = train.make_parser().parse_args_and_config(words, return_remaining_strings=True)
    assert (args.shaping, args.shaping_args, args.max_steps) == ("stare", {"top_ratio": 0.2}, 500)
    (block,) = re.findall(r"```yaml\n(.*?)```", SHAPING, flags=re.DOTALL)
    assert yaml.safe_load(block) == {"shaping": args.shaping, "shaping_args": args.shaping_args}


@pytest.mark.parametrize(("name", "state"), [("RunningMean", "baseline"), ("WrongEntropy", "wrong_entropy")])
def test_the_state_of_the_documentation_survives_a_resume(name, state, model_dir, tmp_path, monkeypatch):
    def reward(completion_ids, **kwargs):
        """None for the first completion of each group: there, `rewards` is NaN."""
        return [None if i % 4 == 0 else reward for i, reward in enumerate(tiny.parity_reward(completion_ids))]

    monkeypatch.chdir(tmp_path)
    trainer_class = run(SHAPING, tmp_path)[name]
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    after = []
    for run_name, checkpoint in (("whole", None), ("resumed", str(tmp_path / "whole" / "checkpoint-2"))):
        args = tiny.config(tmp_path / run_name, **options)
        trainer = trainer_class(model_dir, reward, args, tiny.prompts())
        trainer.train(resume_from_checkpoint=checkpoint)
        states = [log[state] for log in trainer.state.log_history if state in log]
        after.append((states, tiny.parameters(trainer)))
    (states, parameters), (resumed_states, resumed_parameters) = after
    assert states == resumed_states
    assert len({*states}) == 4
    assert all(torch.equal(value, resumed_parameters[name]) for name, value in parameters.items())


def test_a_method_and_its_test_are_under_thirty_lines():
    (code,) = re.findall(r"## A method and its test.*?```python\n(.*?)```", SHAPING, flags=re.DOTALL)
    assert len(code.splitlines()) < 30


# On this machine, and a tiny model and dataset in place of those on the Hub. What comes last on a line counts.
SMALL = {
    "train": "--use_cpu True --bf16 False --report_to none --max_steps 1 --logging_steps 1 --max_completion_length 4 "
    "--per_device_train_batch_size 8",
    "eval": "--use_vllm False --max_completion_length 4",
    "report": "",
}


@pytest.mark.parametrize("text", [README, GUIDE], ids=["readme", "guide"])
def test_the_command_lines_run(text, model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trl, "GRPOTrainer", trl.GRPOTrainer)  # which the command replaces
    rows = [{"question": f"{i}+1=", "answer": f"#### {i + 1}"} for i in range(8)]
    Path("problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    here = f"--model_name_or_path {model_dir} --dataset_name problems.jsonl"
    lines = dict(re.findall(r"^trl-a3po (train|eval|report) (.*)$", text, flags=re.MULTILINE))
    for command in ("train", "report", "eval"):
        words = shlex.split(f"{lines[command]} {SMALL[command]}".replace("RUN_DIR [RUN_DIR ...]", "gsm8k-a3po"))
        if command != "report":
            words += shlex.split(here)
        if command != "train":
            assert cli.main([command, *words]) == 0
            continue
        train.train(words)
        *_, for_launcher = train.make_parser().parse_args_and_config(words, return_remaining_strings=True)
        launch_command_parser().parse_args([*resolve_accelerate_config_argument(for_launcher), "script.py"])
    assert lines.keys() == {"train", "eval", "report"}
    assert Path("gsm8k-a3po", "eval", "results.json").exists()
    assert Path("report.html").exists()


def test_the_readme_names_every_option():
    added = trl_a3po.A3POConfig.__annotations__
    assert all(f"`{name}`" in README for name in added)


def test_the_guide_names_every_metric(tmp_path):
    trainer = training.train(tmp_path, max_steps=1)
    metrics = {name.split("/")[-1] for name in trainer.state.log_history[0] if name.startswith("a3po/")}
    assert len(metrics) > 8
    documented = {"positive_low", "negative_high"}  # as {end}
    assert all(name in documented or f"/{name}`" in GUIDE for name in metrics)


def test_the_readme_is_short_and_its_map_names_every_file_and_room():
    assert len(README.splitlines()) <= 170
    (tree,) = re.findall(r"```text\n(trl_a3po/.*?)```", README, flags=re.DOTALL)
    package = REPOSITORY / "trl_a3po"
    there = {path.name for path in package.glob("[!_]*.py")} | {
        f"{path.parent.name}/" for path in package.glob("*/__init__.py")
    }
    assert there == set(re.findall(r"^  (\w+(?:/|\.py)) ", tree, flags=re.MULTILINE))
    mentioned = re.findall(r"(\w+\.py)", tree)
    assert all(list(package.rglob(name)) for name in mentioned)


def test_the_api_page_has_what_is_public_and_nothing_else():
    documented = re.findall(r"^::: (\S+)$", (REPOSITORY / "docs" / "api.md").read_text(), flags=re.MULTILINE)
    names = {f"trl_a3po.{name}" for name in trl_a3po.__all__ if not name.startswith("_")}
    at_the_top = {f"trl_a3po.{path.stem}" for path in (REPOSITORY / "trl_a3po").glob("[!_]*.py")}
    exported_from = {getattr(trl_a3po, name.rpartition(".")[2]).__module__ for name in names}
    named_by_the_documents = {
        "trl_a3po.report.findings.find",
        "trl_a3po.training.checkpoints.last_complete_checkpoint",
    }
    assert sorted(documented) == sorted(names | (at_the_top - exported_from) | named_by_the_documents)


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(REPOSITORY)) for page in PAGES])
def test_links_between_documents_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}, (
                target
            )


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(REPOSITORY)) for page in PAGES])
def test_the_files_that_documents_name_exist(page):
    paths = r"\b(?:trl_a3po|tests|benchmarks|docs|examples|requirements)/[\w./-]+\.\w+"
    named = {path for path in re.findall(paths, page.read_text(encoding="utf-8")) if "/github.com/" not in path}
    assert {path for path in named if not (REPOSITORY / path).exists()} <= TRLS_OWN


def test_one_version():
    assert f"version: {trl_a3po.__version__}" in (REPOSITORY / "CITATION.cff").read_text()
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert "version" in project["dynamic"]
