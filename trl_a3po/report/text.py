"""Makes text written by a model safe to display."""

import unicodedata


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
