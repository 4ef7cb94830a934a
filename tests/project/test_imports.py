"""Imports between the rooms of the package run one way."""

import ast
from pathlib import Path

import trl_a3po


PACKAGE = Path(trl_a3po.__file__).parent
# Each imports only what stands before it, or itself. Public files and rooms, by their names in the package.
ORDER = [
    "shaping",
    "schedules",
    "rewards",
    "peers",
    "methods",
    "a3po_config",
    "update",
    "training",
    "a3po_trainer",
    "testing",
    "report",
    "evaluation",
    "demo",
    "cli",
]
MOST_PUBLIC_FILES = 9


def imports(path):
    """The public files and rooms that a module imports, by name."""
    module = path.relative_to(PACKAGE).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = module[: len(module) - node.level]
            parts = [*base, *(node.module or "").split(".")] if node.module else [*base]
            yield from [parts[0]] if parts and parts[0] else [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trl_a3po"):
            yield from node.module.split(".")[1:2] or [each.name for each in node.names]


def test_imports_between_rooms_run_one_way():
    found = set()
    for path in PACKAGE.rglob("*.py"):
        here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if here == "__init__":
            continue  # names what is public, without importing it
        assert here in ORDER, f"give {here} its place in the order"
        for other in set(imports(path)) - {"__version__"}:
            found.add((here, other))
            assert ORDER.index(other) <= ORDER.index(here), f"{path} imports {other}"
    assert ("a3po_trainer", "update") in found
    assert ("cli", "evaluation") in found


def test_what_tests_share_is_in_one_place():
    """No test module imports another, and the trainers that tests make are those of `support.training`."""
    tests = sorted(Path(__file__).parents[1].rglob("test_*.py"))
    assert Path(__file__) in tests
    for path in tests:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        modules = {
            name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in (
                [node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
            )
        }
        assert not modules & {each.stem for each in tests}, path
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert not defined & {"make", "train", "Recorder"}, path


def test_the_top_of_the_package_is_short_and_each_room_says_what_belongs_in_it():
    files = {path.stem for path in PACKAGE.glob("*.py")}
    assert len(files) <= MOST_PUBLIC_FILES
    rooms = {path.parent.name: path for path in PACKAGE.glob("*/__init__.py")}
    assert files - {"__init__"} | rooms.keys() == set(ORDER)
    for name, path in rooms.items():
        sentence = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert sentence, name
        assert "\n\n" not in sentence, name
