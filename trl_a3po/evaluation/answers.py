"""Answers as people write them, in the LaTeX that math-verify reads as they mean it."""

import json
import math
import numbers
import re
import reprlib
import unicodedata
from typing import Any

import numpy as np


def accepted_answers(truth: Any) -> list[str]:
    r"""
    All answers that a ground truth accepts, each in the form of [`final_answer`]; none if the ground truth is empty.

    A list accepts each of its items. A string that contains a JSON list of strings is read as that list, as in
    Skywork-OR1; `"[1, 2]"` stays an interval. verl's datasets nest a dictionary beside a copy of the question. Its
    answer is `solution` if that is a derivation with a `\boxed{}`, else `target`, `answer` or `solution`. The `target`
    of MATH has lost spaces and line breaks, so some of its answers are damaged. An amount of money, such as `€5` or
    `5 USD`, accepts the number, too.

    Raises:
        `ValueError`: a dictionary with none of these keys.
    """
    if isinstance(truth, np.ndarray | np.generic):
        truth = truth.tolist()
    truth = decoded(truth)
    if isinstance(truth, bool):
        truth = [str(truth), str(truth).lower()]
    if isinstance(truth, dict):
        return _nested_answers(truth)
    if isinstance(truth, list | tuple):
        return list(dict.fromkeys(answer for each in truth for answer in accepted_answers(each)))
    answer = final_answer(truth)
    amount = _AMOUNT.fullmatch(answer)
    if amount is not None:  # math-verify takes `€5` for another answer than 5
        return [answer, final_answer("".join(filter(None, amount.groups())))]
    return [answer] if answer else []


def final_answer(answer: Any) -> str:
    r"""
    The part of an answer that math-verify compares, as LaTeX; empty if there is none.

    In GSM8K it follows `####`; in MATH it is the last `\boxed{...}` of the derivation. Other answers get dollar
    signs: without them, math-verify would read a bare `\frac{1}{2}` as the number 1. Within them, it reads letters as
    factors, and it stops at some characters, so `8 dollars`, `3 1/2`, `1 000`, `1e5`, `2√3`, `5²` and the like become
    LaTeX too.

    Raises:
        `ValueError`: the answer is neither a text nor a number that is exact.
    """
    if answer is None or (isinstance(answer, float) and math.isnan(answer)):
        return ""
    # Readers of files make times of texts and round large numbers, so these may not be what was written.
    if not isinstance(answer, str | numbers.Number) or (isinstance(answer, float) and abs(answer) >= 2**53):
        raise ValueError(
            f"the answer {reprlib.repr(answer)} may not be what was written. Write it as a text within dollar signs, "
            'such as "$2^{70}$".'
        )
    # 1e-05 would be read as e - 5.
    text = np.format_float_positional(answer, trim="-") if isinstance(answer, float) else str(answer)
    text = _SPACE.sub(" ", text.rsplit("####", 1)[-1]).strip()
    box = _last_box(text)
    if box is not None:
        return f"\\boxed{{{box}}}" if box else ""
    if _IN_DELIMITERS.search(text) and not _are_currencies(text):
        return text
    if not text.strip("$. "):
        return ""
    # Such a dollar sign, and a single one, is a currency.
    bare = _DOLLAR.sub(r"\\$", text.removesuffix("."))
    return f"${_number_in_latex(_symbols_in_latex(bare))}$"


def _are_currencies(text: str) -> bool:
    """Whether a text is a list of amounts, such as `$5 and $6`. It has no LaTeX between dollar signs."""
    amount = rf"[-+]?\$\s*{_NUMBER}"
    return re.fullmatch(rf"{amount}(?:\s*(?:,|;|/|and|or)\s*{amount})+\.?", text) is not None


def _symbols_in_latex(text: str) -> str:
    """
    A formula without the characters at which math-verify stops, or which it does not read as people do. Words and
    units stay as they are: before those, it stops at the right place.
    """
    if _WORD.search(_COMMAND.sub(" ", text)) or _LETTER_OF_UNIT.search(text):
        return text
    text = _VULGAR.sub(_fraction, _RAISED.sub(_power, _NEGATIVE.sub("-", text)))
    text = _NEGATIVE_POWER.sub(r"^{\1}", text.translate(_SYMBOLS))
    return _ROOT.sub(lambda match: rf"{_ROOTS[match[1]]}{{{match[2] or match[3].replace(',', '')}}}", text)


def _power(raised: re.Match[str]) -> str:
    exponent = raised[0].translate(_LOWERED)
    return f"^{exponent}" if len(exponent) == 1 else f"^{{{exponent}}}"


def _fraction(vulgar: re.Match[str]) -> str:
    over, under = unicodedata.normalize("NFKC", vulgar[0]).split("⁄")
    return rf"\frac{{{over}}}{{{under}}}"


def _number_in_latex(text: str) -> str:
    """A number as people write it, with its currency or unit; other texts as they are."""
    match = _PLAIN_NUMBER.fullmatch(text)
    if match is None:
        return text
    before, whole, over, under, spaced, mantissa, exponent, number, percent, unit = match.groups()
    if over:
        number = f"{over}/{under}"
        if percent:  # without the factor, math-verify reads 1/2% as 1/(2%), and 2 1/2% as 2
            number = rf"\frac{{{int(whole or 0) * int(under) + int(over)}}}{{{under}}}\cdot1"
        elif whole:
            number = rf"{whole}\frac{{{over}}}{{{under}}}"
    elif spaced:
        number = spaced.replace(" ", "")
    elif mantissa:
        number = rf"{mantissa}\cdot10^{{{exponent}}}" + (r"\cdot1" if percent else "")
    return before + number + (r"\%" if percent else "") + (rf"\text{{ {unit}}}" if unit else "")


_SPACE = re.compile(r"[^\S\r\n]")  # of any width: French separates thousands by those that do not break
_LETTER = "[^\\W\\d_¼-¾⅐-⅞⁰¹²³⁴-⁹]"
_WORD = re.compile(rf"{_LETTER}{{2,}}")
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_LETTER_OF_UNIT = re.compile(rf"\d\s+{_LETTER}|\dm[²³]")  # such as `48 m²`, but also `5 x²`, which may be one
_NEGATIVE = re.compile(r"(?<![^(\[{,=^])–")  # between numbers, it is a range
_VULGAR = re.compile("[¼-¾⅐-⅞]")
_LOWERED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+")
_NEGATIVE_POWER = re.compile(r"\^\s*(-(?:\d+(?:\.\d+)?|[a-zA-Z]))(?![\w.^({])")
_SYMBOLS = str.maketrans(
    {
        "⁄": "/",
        "∕": "/",
        "·": r"\cdot ",
        "⋅": r"\cdot ",
        "×": r"\times ",
        "∞": r"\infty ",
        "±": r"\pm ",
        "∪": r"\cup ",
        "∩": r"\cap ",
    }
)
_ROOTS = {"√": r"\sqrt", "∛": r"\sqrt[3]"}
_NUMBER = r"\d[\d,]*(?:\.\d+)?"
_ROOT = re.compile(rf"([√∛])\s*(?:\(([^()]*)\)|({_NUMBER}|[a-zA-Z]))")

# Other words may be factors, or change the number: `2 L`, `3 xy`, `5 million`, `3 tenths`.
_UNIT = (
    r"(?:US |square |cubic )?(?:dollars?|cents?|euros?|pounds?|seconds?|minutes?|hours?|days?|weeks?|months?|years?|"
    r"degrees?|(?:centi|milli|kilo)?(?:met(?:er|re)s?|grams?)|lit(?:er|re)s?|inch(?:es)?|feet|foot|yards?|miles?|"
    r"people|units?|mm|cm|km|mg|kg|m[lL]|ft|oz|lb)(?:(?: per |/)[a-z]+|\^[23])?"
)
_PLAIN_NUMBER = re.compile(
    r"((?:[-+]?\s*(?:\\\$)?|\\\$\s*[-+])\s*)"  # a sign and a currency
    r"(?:(?:(\d+)\s+)?([1-9]\d*)/([1-9]\d*)"
    r"|(\d{1,3}(?: \d{3})+(?:\.\d+)?)"
    rf"|({_NUMBER}(?=[eE](?:\d|[-+]\d\d))|\d+\.\d+(?=[eE]))[eE]([-+]?\d+)"  # `2e-1` may be 2 times e, minus 1
    rf"|({_NUMBER}))"
    rf"(?:(\s*\\?%|\s+(?i:per ?cent))|\s+({_UNIT}))?"
)
_CURRENCY = r"(?:[€£¥₹]|\b(?:USD|EUR|GBP|JPY|CNY|RMB|INR)\b)"
_WHOLE_AMOUNT = r"((?:\d{1,3}(?:[, ]\d{3})+|\d+)(?:\.\d+)?)"
_AMOUNT = re.compile(rf"\$([-+]?)\s*{_CURRENCY}\s*{_WHOLE_AMOUNT}\$|\$([-+]?)\s*{_WHOLE_AMOUNT}\s*{_CURRENCY}\$")

_BOX = re.compile(r"\\(?:boxed|fbox)\s*")
_DOLLAR = re.compile(r"(?<!\\)\$")
_IN_DELIMITERS = re.compile(r"(?<!\\)\$[^$]*[^$\s][^$]*(?<!\\)\$|\\\(.*\S.*\\\)|\\\[.*\S.*\\\]", re.DOTALL)


def is_derivation(text: Any) -> bool:
    """Whether a text is a sentence without a mark of the final answer."""
    if not isinstance(text, str) or has_box(text) or "####" in text or _IN_DELIMITERS.search(text):
        return False
    return len(_WORD.findall(_COMMAND.sub(" ", text))) > _MOST_WORDS


_MOST_WORDS = 5  # of an answer. Our choice: `The answer is 7` has three


def has_box(text: Any) -> bool:
    return isinstance(text, str) and _BOX.search(text) is not None


def _last_box(text: str) -> str | None:
    r"""The content of the last `\boxed{...}`, on one line; empty if the box is not closed, None if there is no box."""
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    rest = text[boxes[-1].end() :]
    if not rest.startswith("{"):  # `\boxed 5$`
        return " ".join(rest.partition("$")[0].split())
    depth, position = 0, 0
    while position < len(rest):
        character = rest[position]
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return " ".join(rest[1:position].split())
        position += 2 if character == "\\" else 1  # `\{` and `\}` are no braces
    return ""


def decoded(truth: Any) -> Any:
    """Decodes a string that contains a dictionary or a list of strings as JSON. Returns other values unchanged."""
    if not isinstance(truth, str) or not truth.strip().startswith(("{", "[")):
        return truth
    try:
        decoded = json.loads(truth)
    except json.JSONDecodeError:
        return truth
    if isinstance(decoded, dict) or (isinstance(decoded, list) and all(isinstance(each, str) for each in decoded)):
        return decoded
    return truth


def _nested_answers(truth: dict[str, Any]) -> list[str]:
    names = [name for name in ("target", "answer", "solution") if name in truth]
    if truth and not names:
        raise ValueError(f"A ground truth has {sorted(truth)}. Accepted are `target`, `answer`, `solution`.")
    if has_box(truth.get("solution")):
        names.insert(0, "solution")
    return next(filter(None, (accepted_answers(truth[name]) for name in names)), [])
