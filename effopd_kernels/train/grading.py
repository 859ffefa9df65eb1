r"""Is this completion right? Final answers are extracted from free text and compared.

A final answer is, in order of preference: the last ``\boxed{…}``; what follows the last ``####`` (GSM8K); what follows
the last "answer is" or "answer:"; otherwise the last number in the text; otherwise the whole text.
"""

import importlib.util
import math
import re

_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_STATED = re.compile(_NUMBER.pattern + r"\\?%?")  # a number as prose states it, per cent sign included
_FRACTION = re.compile(r"([-+]?[\d,.]+)\s*/\s*([\d,.]+)")
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}")
# `.*` in front: the last statement counts. What is stated ends with its line or sentence.
_MARKERS = (
    re.compile(r".*####\s*([^\n]+)", re.DOTALL),
    re.compile(r".*answer(?:\s+is|\s*[:=])\s*(.+?)(?:\.\s|\.?$|\n)", re.DOTALL | re.IGNORECASE),
)


def _last_boxed(text: str) -> str | None:
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    depth = 0
    for i in range(start + len(r"\boxed"), len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[start + len(r"\boxed{") : i]
    return None


def _marked(text: str) -> str | None:
    if (boxed := _last_boxed(text)) is not None:
        return boxed
    for marker in _MARKERS:
        if found := marker.match(text):
            return found[1]
    return None


def extract_answer(text: str) -> str:
    """The final answer stated in `text`, as text (see the module's order of preference)."""
    if (marked := _marked(text)) is not None:
        return marked.strip()
    numbers = _STATED.findall(text)
    return numbers[-1] if numbers else text.strip()


def _normalise(text: str) -> str:
    text = text.strip().strip("$").replace("\\!", "").replace("\\,", "").replace("\\%", "%")
    return " ".join(text.casefold().split()).rstrip(".!;,").strip()


def _number(text: str) -> float | None:
    """`text` as a number, when it is one and nothing else: thousands separators, %, $, a/b and \\frac{a}{b} allowed."""
    text = _LATEX_FRACTION.sub(r"\1/\2", _normalise(text)).removeprefix("$").strip()
    percent = text.endswith("%")
    text = text.removesuffix("%").strip()
    try:
        if fraction := _FRACTION.fullmatch(text):
            value = float(fraction[1].replace(",", "")) / float(fraction[2].replace(",", ""))
        elif _NUMBER.fullmatch(text):
            value = float(text.replace(",", ""))
        else:
            return None
    except (ValueError, ZeroDivisionError):
        return None
    return value / 100 if percent else value


def _math_verify(completion: str, answer: str) -> bool:
    if importlib.util.find_spec("math_verify") is None:
        return False
    from math_verify import parse, verify

    return bool(verify(parse(f"${answer}$"), parse(completion)))


def is_correct(completion: str, answer: str | float | list[str | float], rel_tol: float = 1e-6) -> bool:
    """Whether the final answer of `completion` equals that of `answer`, or of one of several.

    Numbers are compared within `rel_tol` (relative), strings after folding case, white space and closing punctuation.
    When the `math_verify` package is installed, a mismatch gets a second opinion from it (symbolic equality).
    """
    if isinstance(answer, list):
        return any(is_correct(completion, one, rel_tol) for one in answer)
    answer = str(answer)
    gold = marked if (marked := _marked(answer)) is not None else answer
    gold_number = _number(gold)
    if gold_number is not None:
        given = _number(extract_answer(completion))
        if given is None:  # "the answer is 12 apples": fall back to the number inside the marked part
            inside = _STATED.findall(extract_answer(completion))
            given = _number(inside[-1]) if inside else None
        right = given is not None and math.isclose(given, gold_number, rel_tol=rel_tol, abs_tol=1e-9)
    else:
        stated = marked if (marked := _marked(completion)) is not None else completion
        right = _normalise(stated) == _normalise(gold)
    return right or _math_verify(completion, gold)
