"""Text that a model wrote, made safe to look at."""

import unicodedata


# Control and formatting characters (among them those that turn the direction of text around), halves of surrogate
# pairs, and separators of lines and paragraphs. Unseen, they change how the text around them looks.
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")


def visible(text: str) -> str:
    """The text with each character that cannot be seen spelled out; lines still end, and their ends can be seen."""
    return "".join(_spelled_out(character) for character in text)


def _spelled_out(character: str) -> str:
    if character == "\n":
        return "↵\n"
    if character == "\t":
        return "⇥"
    if unicodedata.category(character) in _UNSEEN:
        return f"⟨U+{ord(character):04X}⟩"
    return character
