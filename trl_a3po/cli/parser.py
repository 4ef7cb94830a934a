"""The parser for commands whose options are fields of dataclasses, and the files that `--config` finds."""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from enum import EnumMeta
from inspect import get_annotations
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from trl import TrlParser


PACKAGE = Path(__file__).parents[1]


def recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    # In the wheel they are inside the package; in a clone they are beside it.
    folders = [PACKAGE / "recipes", PACKAGE.parent / "examples" / "recipes"]
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}


class Parser(TrlParser):
    """
    TRL's parser, with `--config` in the help, and a `ValueError` for any mistake in the file.

    Args:
        command (`str`): Name of the command.
        description (`str`, *optional*): Text above the options.
        dataclasses (`list`): Their fields are the options.
        with_recipes (`bool`, *optional*, defaults to `False`): Whether `--config` takes names of recipes.
    """

    def __init__(self, command: str, description: str | None, dataclasses: list[Any], with_recipes: bool = False):
        super().__init__(
            dataclasses,
            prog=f"trl-a3po {command}",
            usage=f"trl-a3po {command} [--config FILE] [options]",
            description=description,
            formatter_class=_Help,
            allow_abbrev=False,
        )
        self._recipes = recipes() if with_recipes else {}
        text = "YAML file of options. Options on the command line take precedence."
        if self._recipes:
            text += f" Or the name of a recipe that comes with the package: {', '.join(self._recipes)}."
        # Only for the help: TRL's parser removes the option from the line before argparse reads it.
        self.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help=text)
        group_options(self, "general", {"help", "config"})

    def find_config(self, arguments: Sequence[str]) -> list[str]:
        """
        Splits `--config=FILE` into two words, and replaces the name of a recipe by its path.

        Raises:
            `OSError`: there is neither a file nor a recipe of this name.
            `ValueError`: the name is missing, or there are several.
        """
        words = [
            part for word in arguments for part in (word.split("=", 1) if word.startswith("--config=") else [word])
        ]
        if "--config" not in words:
            return words
        if words.count("--config") > 1:
            raise ValueError("`--config` was given more than once. Put all options into one file.")
        index = words.index("--config") + 1
        if index == len(words) or not words[index]:
            raise ValueError("`--config` needs the name of a file.")
        path = Path(words[index])
        if not path.is_file():  # a file comes before the recipe of its name
            path = self._recipes.get(words[index], path)
        if not path.is_file():
            known = f" The recipes are {', '.join(self._recipes)}." if self._recipes else ""
            raise FileNotFoundError(f"There is no file '{path}' for `--config`.{known}")
        words[index] = str(path)
        return words

    def parse_args_and_config(self, args: Iterable[str] | None = None, *positional: Any, **options: Any) -> tuple:
        words = self.find_config(list(args or ()))
        if "--config" in words:
            self._check_config(Path(words[words.index("--config") + 1]), **options)
        try:
            return super().parse_args_and_config(words, *positional, **options)
        except TypeError as error:  # a value in the file that is a list or null where a number belongs
            raise ValueError(f"An option has a value of the wrong type: {error}.") from error

    def _check_config(self, path: Path, return_remaining_strings: bool = False, **_: Any) -> None:
        try:
            config = yaml.load(path.read_text(encoding="utf-8"), _Loader)
        except _RepeatedKeyError as error:
            raise ValueError(f"'{path}' {error}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"'{path}' is not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(config, dict):
            raise ValueError(f"'{path}' must contain options, one `name: value` per line.")
        for name in config:
            if not isinstance(name, str):
                raise ValueError(f"'{path}': the name of an option must be text, got {name!r}. {_READS_NO}")
        if of_line := config.keys() & {"config", "help"}:
            raise ValueError(f"'{path}' has `{min(of_line)}`, which is an option of the command line only.")
        unknown = config.keys() - {action.dest for action in self._actions} - {"env"}
        if unknown and not return_remaining_strings:
            raise ValueError(f"'{path}' has options that `{self.prog}` does not have: {', '.join(sorted(unknown))}.")
        self._check_types(path, config)

    def _check_types(self, path: Path, config: dict[str, Any]) -> None:
        """
        Checks all of our own options. Of TRL's, it checks the numbers, the mappings, the names of an enumeration,
        and those in `TEXTS` and `LISTS`: the others are declared as texts or lists, but also take `false` or one text.
        """
        for kind, name, allowed in self._declared():
            enums = [each for each in allowed if isinstance(each, EnumMeta)]
            is_checked = _is_number(allowed) or dict in allowed or enums or name in TEXTS or name in LISTS
            if name not in config or not (_is_ours(kind, name) or is_checked):
                continue
            value = config[name]
            words = " or ".join(WORDS.get(each, each.__name__) for each in allowed if each not in enums)
            # argparse converts text, as on the command line.
            fits = type(value) in {*allowed, str} or (type(value) is int and float in allowed)
            if name in LISTS:
                items, words = LISTS[name]
                fits = value is None or (type(value) is list and items.issuperset(map(type, value)))
                if fits and name == "datasets":
                    fits = all(type(each.get("path")) is str for each in value or ())
            elif not _is_ours(kind, name):
                # What TRL's trainer takes, whatever the declaration says.
                fits |= (value is None and name in MAY_BE_NULL) or (type(value) is float and value.is_integer())
            if not fits:
                note = f" {_READS_NO}" if enums and type(value) is bool else ""
                raise ValueError(f"'{path}': `{name}` must be {words}, got {value!r}.{note}")

    def _declared(self) -> Iterator[tuple[Any, str, list[type]]]:
        """Each option, with its class and the types that it is declared with."""
        for kind in self.dataclass_types:
            for name, hint in get_type_hints(kind).items():
                yield kind, name, _types(hint)

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        for _, name, allowed in self._declared():
            if type(config.get(name)) is float and int in allowed and float not in allowed:
                config[name] = int(config[name])  # such as 2.0; others were refused
        return super().set_defaults_with_config(**config)


_READS_NO = "YAML reads `on`, `off`, `yes` and `no` as true or false."


class _RepeatedKeyError(ValueError):
    """A mapping of a YAML file has a key twice."""


class _Loader(yaml.SafeLoader):
    """Refuses a repeated key. YAML would take the last one, and say nothing."""

    # Not where values are made: by then, a mapping may have the keys of others that it merges (`<<`).
    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in lines:
                raise _RepeatedKeyError(
                    f"has `{key.value}` on line {lines[name]} and again on line {line}. Keep one of them."
                )
            lines[name] = line
        return node


# What the file of `--config` contains for a type.
WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text in quotes",
    dict: "a mapping",
    NoneType: "null",
}


# Of TRL, texts that are names, and lists with the types of their items.
TEXTS = {
    "dataset_config",
    "dataset_name",
    "dataset_test_split",
    "dataset_train_split",
    "model_name_or_path",
    "output_dir",
}
LISTS: dict[str, tuple[set[type], str]] = {
    "datasets": ({dict}, "a list of mappings, each with a `path`"),
    "reward_funcs": ({str}, "a list of names"),
    "reward_weights": ({int, float}, "a list of numbers"),
}

# Options that are declared as numbers, for which null turns off what they control.
MAY_BE_NULL = {"repetition_penalty", "top_k", "top_p"}


def _types(hint: Any) -> list[type]:
    is_union = get_origin(hint) in (Union, UnionType)
    return [get_origin(each) or each for each in (get_args(hint) if is_union else [hint])]


def _is_number(allowed: list[type]) -> bool:
    return {*allowed} <= {int, float, NoneType} and allowed != [NoneType]


def _is_ours(kind: type, name: str) -> bool:
    """Whether the field of a dataclass is declared in this package."""
    owner = next(base for base in kind.__mro__ if name in get_annotations(base))
    return owner.__module__.startswith("trl_a3po.")


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the description with its line breaks."""


def group_options(parser: argparse.ArgumentParser, title: str, names: set[str]) -> None:
    """Lists some options under their own title in the help, above the options without a title."""
    others = parser._optionals
    group = parser.add_argument_group(title)
    group._group_actions += [action for action in others._group_actions if action.dest in names]
    others._group_actions = [action for action in others._group_actions if action.dest not in names]
    parser._action_groups.remove(others)
    parser._action_groups.append(others)
