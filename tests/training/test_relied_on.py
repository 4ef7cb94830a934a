"""The table of what is relied on in other packages: nothing is missing in it, and nothing in it is missing."""

import ast
import importlib.util
import inspect
import pkgutil
import re
import sys
import types
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import transformers
import trl
from support import tiny
from support.training import make, train
from transformers import Trainer
from trl import GRPOConfig, GRPOTrainer

import trl_a3po
from trl_a3po import A3POTrainer
from trl_a3po.training import relied_on
from trl_a3po.training.relied_on import RELIED_ON, TESTED, as_markdown, check_relied_on
from trl_a3po.update import attention


REPOSITORY = Path(__file__).parents[2]
OTHERS = ("trl", "transformers", "accelerate", "peft", "vllm")
# argparse's, which every Python has, and torch's, which is documented in its notes on autograd.
NOT_OF_OTHERS = {"_optionals", "_group_actions", "_action_groups", "_actions", "_version"}

# How the package calls a trainer, where it is not `self`.
TRAINERS = {"trainer", "probe", "self._trainer", "GRPOTrainer"}


def modules():
    """Every module of the package, with its name in it."""
    for each in pkgutil.walk_packages(trl_a3po.__path__, "trl_a3po."):
        if not each.ispkg and not each.name.endswith("__main__"):
            yield each.name.removeprefix("trl_a3po."), importlib.import_module(each.name)


def trainer_classes():
    """The trainers of the package, each with its module."""
    for name, module in modules():
        for each in vars(module).values():
            if inspect.isclass(each) and issubclass(each, Trainer) and each.__module__ == module.__name__:
                yield name, each


def overrides(trainer_class):
    """What a trainer has, and a base outside of the package has, too."""
    bases = [each for each in trainer_class.__mro__ if each.__module__.partition(".")[0] != "trl_a3po"]
    names = [name for name in vars(trainer_class) if not name.startswith("__") and name != "_given"]
    return {name for name in names if any(name in vars(base) for base in bases[:-1])}


@pytest.fixture(scope="module")
def plain_trainers(tmp_path_factory):
    """A trainer of TRL that has trained, and one of transformers, for the attributes that they set."""
    directory = str(tmp_path_factory.mktemp("plain"))
    arguments = {"train_dataset": tiny.prompts(), "processing_class": tiny.tokenizer()}
    args = tiny.config(directory, GRPOConfig, max_steps=1)
    theirs = GRPOTrainer(tiny.model(), tiny.parity_reward, args, **arguments)
    theirs.train()
    fields = {"use_cpu": True, "report_to": "none"}
    return theirs, Trainer(tiny.model(), transformers.TrainingArguments(directory, **fields))


class Uses(ast.NodeVisitor):
    """The names of other packages that a module uses, by the rules of the table."""

    def __init__(self, module, of_trl, of_transformers, defined):
        self.module, self.of_trl, self.of_transformers, self.defined = module, of_trl, of_transformers, defined
        self.found, self.modules, self.in_trainer = set(), set(), False
        self.visit(ast.parse(inspect.getsource(module)))

    def visit_ImportFrom(self, node):
        source = node.module or ""
        if node.level == 0 and source.partition(".")[0] in OTHERS and "." in source:
            for alias in node.names:
                self.found.add(alias.name)
                if inspect.ismodule(getattr(self.module, alias.name, None)):
                    self.modules.add(alias.name)

    def visit_ClassDef(self, node):
        outer, cls = self.in_trainer, getattr(self.module, node.name, None)
        self.in_trainer = inspect.isclass(cls) and issubclass(cls, Trainer)
        self.generic_visit(node)
        self.in_trainer = outer

    def visit_Attribute(self, node):
        self._use(ast.unparse(node.value), node.attr)
        self.generic_visit(node)

    def visit_Call(self, node):
        if isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            receiver, name, *_ = node.args
            if isinstance(name, ast.Constant):
                self._use(ast.unparse(receiver), name.value, asked_for=True)
        self.generic_visit(node)

    def _use(self, receiver, name, asked_for=False):
        if name.startswith("__") or name in NOT_OF_OTHERS:
            return
        if receiver in self.modules:
            self.found.add(name)
        elif receiver in TRAINERS or (self.in_trainer and receiver in ("self", "super()")):
            # Public attributes of transformers' Trainer are documented.
            private = name.startswith("_") or name not in self.of_transformers
            if (private and name in self.of_trl) or (asked_for and name not in self.defined):
                self.found.add(name)
        elif name.startswith("_") and name not in self.defined:
            self.found.add(name)


def defined_names():
    """Every name that the package gives to something of its own."""
    names = set()
    for _, module in modules():
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return names


def test_every_name_that_the_package_uses_stands_in_the_table(plain_trainers):
    of_trl, of_transformers = ({*dir(trainer)} for trainer in plain_trainers)
    defined = defined_names()
    used = {
        (name, each) for name, module in modules() for each in Uses(module, of_trl, of_transformers, defined).found
    }
    used |= {(name, each) for name, trainer_class in trainer_classes() for each in overrides(trainer_class)}
    listed = {(module, each.name) for each in RELIED_ON for module in each.used_by}
    assert not used - listed, f"add to RELIED_ON: {sorted(used - listed)}"
    assert len(used) > 40  # the rules find something


def test_every_name_of_the_table_is_used_where_it_says():
    sources = {name: inspect.getsource(module) for name, module in modules()}
    listed = [(module, each.name) for each in RELIED_ON for module in each.used_by]
    stale = [use for use in listed if not re.search(rf"\b{use[1]}\b", sources.get(use[0], ""))]
    assert not stale, f"take out of RELIED_ON: {stale}"
    assert len({(each.owner, each.name) for each in RELIED_ON}) == len(RELIED_ON)


def test_the_installed_releases_have_what_the_table_says_and_nothing_else(plain_trainers):
    assert list(modules())  # imported: a submodule is an attribute only then
    for each in RELIED_ON:
        if each.name == "push_in_progress":
            continue  # only a trainer that pushes has it: see test_hub.py
        if importlib.util.find_spec(each.package):
            assert each.exists(plain_trainers[0]) == each.must_exist, each


@pytest.mark.parametrize(
    ("owner", "name"),
    [(GRPOTrainer, "_calculate_rewards"), (GRPOTrainer, "_prepare_inputs"), (Trainer, "evaluation_loop")],
)
def test_a_method_that_was_renamed_is_an_error_at_construction(owner, name, tmp_path, monkeypatch):
    monkeypatch.setattr(owner, f"{name}_anew", vars(owner)[name], raising=False)
    monkeypatch.delattr(owner, name)
    version = f"TRL {trl.__version__}" if owner is GRPOTrainer else f"transformers {transformers.__version__}"
    message = rf"^{version} has no `{owner.__name__}\.{name}`, which A3POTrainer needs for .* Install a release"
    with pytest.raises(RuntimeError, match=message):
        make(tmp_path)


def test_every_name_that_a_trainer_needs_is_looked_for(tmp_path, monkeypatch):
    trainer, found = make(tmp_path), relied_on._resolve
    check_relied_on(trainer)
    needed = [each for each in RELIED_ON if each.in_training and each.must_exist and not each.later]
    for each in needed:
        of_owner = [other.name for other in needed if other.owner == each.owner]
        name = each.name if each.owner in ("trl.GRPOTrainer", "transformers.Trainer") else of_owner[0]
        message = rf"has no `{each.owner.rpartition('.')[2]}\.{name}`, .*pip install {each.package}=="
        with monkeypatch.context() as patch:
            if each.owner in ("trl.GRPOTrainer", "transformers.Trainer"):
                patch.delitem(vars(trainer), each.name, raising=False)
                for owner in GRPOTrainer.__mro__:
                    if each.name in vars(owner):
                        patch.delattr(owner, each.name)
            else:
                patch.setattr(
                    relied_on, "_resolve", lambda owner, of=each.owner: None if owner == of else found(owner)
                )
            with pytest.raises(RuntimeError, match=message):
                check_relied_on(trainer)
    assert len(needed) > 25


def test_trl_and_transformers_call_every_method_that_is_overridden(tmp_path):
    callers = defaultdict(set)

    def watched(name):
        def method(self, *args, **kwargs):
            callers[name].add(sys._getframe(1).f_globals["__name__"].partition(".")[0])
            return getattr(super(Watched, self), name)(*args, **kwargs)

        return method

    names = {
        name
        for _, trainer_class in trainer_classes()
        if issubclass(A3POTrainer, trainer_class)
        for name in overrides(trainer_class) - {"_push_from_checkpoint"}  # test_hub.py pushes
        if inspect.isfunction(vars(trainer_class)[name])
    }
    Watched = type("Watched", (A3POTrainer,), {name: watched(name) for name in names})  # noqa: N806
    fields = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 1}
    fields |= {"dynamic_sampling": 1, "top_entropy_quantile": 0.5}
    fields |= {"load_best_model_at_end": True, "arguments": {"eval_dataset": tiny.prompts(4)}}
    train(tmp_path, Watched, **fields)
    make(tmp_path, Watched, **{**fields, "max_steps": 2}).train(resume_from_checkpoint=True)
    assert names - {name for name, by in callers.items() if by - {"trl_a3po"}} == set(), "called by nobody else"
    assert len(names) > 8


def test_the_table_of_the_documentation_is_that_of_the_code():
    page = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = page.partition("## What is relied on\n")[2].partition("\n## ")[0]
    table = "\n".join(line for line in section.splitlines() if line.startswith("|"))
    assert table == as_markdown(), "paste what `python -m trl_a3po.training.relied_on` prints"


def test_the_releases_to_install_are_those_that_the_tests_run_with():
    constraints = (REPOSITORY / "requirements" / "constraints.txt").read_text(encoding="utf-8")
    for package, release in TESTED.items():
        assert f"\n{package}=={release}\n" in constraints
    (versions,) = re.findall(r"^TRL_VERSIONS \?= (.*)$", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE)
    assert versions.split()[-1] == TESTED["trl"]


# A package that puts a trainer of its own in the place of TRL's


@pytest.fixture
def replaced(monkeypatch):
    """Puts a class of another package in the place of `trl.GRPOTrainer`, and returns this package, imported after."""

    def replace(**attributes):
        class FastGRPOTrainer(GRPOTrainer):
            __module__ = "fast_compiled_cache.fast_grpo"

        for name, value in attributes.items():
            setattr(FastGRPOTrainer, name, value)
        monkeypatch.setattr(trl, "GRPOTrainer", FastGRPOTrainer)
        # Importing it again registers the attention of the new modules.
        registered = transformers.AttentionInterface._global_mapping
        monkeypatch.setitem(registered, attention._NAME, registered[attention._NAME])
        for name in [name for name in sys.modules if name.partition(".")[0] == "trl_a3po"]:
            monkeypatch.delitem(sys.modules, name)
        return importlib.import_module("trl_a3po")

    return replace


def make_of(package, output_dir):
    return package.A3POTrainer(
        tiny.model(),
        tiny.parity_reward,
        tiny.config(output_dir, package.A3POConfig),
        tiny.prompts(),
        processing_class=tiny.tokenizer(),
    )


BLAMES_THE_OTHER = (
    r"^`FastGRPOTrainer` of the module `fast_compiled_cache\.fast_grpo`, which has replaced TRL's `GRPOTrainer`, .* "
    r"Train without the package that replaces the class"
)


def test_a_class_that_replaces_trls_is_named_where_its_loss_is_another(replaced, tmp_path):
    package = replaced(_compute_loss=lambda self, model, inputs: inputs["advantages"].sum() + torch.zeros(()))
    with pytest.raises(RuntimeError, match=BLAMES_THE_OTHER) as error:
        make_of(package, tmp_path)
    assert "pip install trl" not in str(error.value)


def test_a_class_that_replaces_trls_is_named_where_it_lacks_a_name(replaced, tmp_path):
    def __init__(self, *args, **kwargs):  # noqa: N807
        GRPOTrainer.__init__(self, *args, **kwargs)
        del self.reward_func_names

    package = replaced(__init__=__init__)
    with pytest.raises(RuntimeError, match=BLAMES_THE_OTHER):
        make_of(package, tmp_path)


def test_a_class_that_replaces_trls_and_keeps_its_loss_trains(replaced, tmp_path):
    make_of(replaced(), tmp_path).train()


def test_what_is_imported_before_the_replacement_is_built_on_trls(tmp_path, monkeypatch):
    def fails(self, model, inputs):
        raise AssertionError

    other = types.new_class("FastGRPOTrainer", (GRPOTrainer,), exec_body=lambda body: body.update(_compute_loss=fails))
    monkeypatch.setattr(trl, "GRPOTrainer", other)
    make(tmp_path)
    assert relied_on.GRPOTrainer is GRPOTrainer
