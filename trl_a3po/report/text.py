"""Texts of a page and of the terminal: names of runs, and what a model wrote made safe to display."""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path


# Control and formatting characters (some of them reverse the direction of text), halves of surrogate pairs, and
# separators of lines and paragraphs. They are invisible and change the look of the text around them.
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")


def visible(text: str) -> str:
    """Spells out invisible characters. Line ends still break lines, and are marked."""
    return "".join(_spelled_out(character) for character in text)


def _spelled_out(character: str) -> str:
    if character == "\n":
        return "↵\n"
    if character == "\t":
        return "⇥"
    if unicodedata.category(character) in _UNSEEN:
        return f"⟨U+{ord(character):04X}⟩"
    return character


def counted(number: int, name: str) -> str:
    """A number with the name of what is counted: 1 row, 2 rows."""
    return f"{number} {name}{'' if number == 1 else 's'}"


def names_of(directories: Sequence[Path]) -> list[str]:
    """
    The last part of each path, or as many of its last parts as no other path has.

    Raises:
        `ValueError`: two are the same directory.
    """
    parts = [directory.resolve().parts for directory in directories]
    if len(set(parts)) < len(parts):
        raise ValueError("The same directory was given twice. Pass different directories.")
    ends = [[each[-length:] for length in range(1, len(each) + 1)] for each in parts]
    count = Counter(end for all_ends in ends for end in all_ends)
    return [Path(*next(end for end in all_ends if count[end] == 1)).as_posix() for all_ends in ends]
