r"""Is this completion right? Final answers are extracted from free text and compared.

Typography is made plain first, in completion and answer alike: delimiters and spacing of LaTeX, ``\text``, ``\frac`` of
numbers, bold, minus, currency and degree signs. A final answer is then, in order of preference: the last ``\boxed{…}``;
the line after the last ``####`` (GSM8K), "answer is", "answer:" or "answer ="; otherwise the last number in the text;
otherwise the whole text. Of a completion that has thought, all this is of what follows ``</think>``.
"""

import importlib.util
import math
import re
from decimal import Decimal
from itertools import product

_BOX = r"\\(?:boxed|fbox)\s*\{", r"\\boxed{"  # a box by any name
# In this order. Each pattern reads a text in linear time, as do all below: completions can be long and degenerate.
_TYPOGRAPHY = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        ("[−–]", "-"),
        (r"\\\\|\\[()\[\]:; ]|\\q?quad\b|~|\*\*", " "),
        (r"\\[!,]|\\?[$£€¥]|\^\{?\\circ\}?|°|\\(?:left|right)(?![a-zA-Z])", ""),
        (r"\\%", "%"),
        (r"\{,\}", ","),
        _BOX,
        (r"\\(?:text|math|mbox)[a-z]*\{([^{}]*)\}", r"\1"),
        # 3 \times 10^5 is 3e5
        (r"(?<=\d)\s*(?:\\times|\\cdot|[×·*x])\s*10\s*\^\s*(?:\{\s*([-+]?\d+)\s*\}|([-+]?\d+))", r"e\1\2"),
        (r"(?<![\w.^}/)])10\s*\^\s*(?:\{\s*([-+]?\d+)\s*\}|([-+]?\d+)(?!\.?\d))", r"1e\1\2"),  # and 10^5 is 1e5
        (r"\\[cdt]frac", r"\\frac"),
        (r"(?<=\d)\s*(?=\\frac)", " "),  # 1\frac12 is 1 1/2
        (r"\\frac\s*(?:\{\s*([-\d.,]+)\s*\}|(\d))\s*(?:\{\s*([-\d.,]+)\s*\}|(\d))", r"\1\2/\3\4"),
    )
)
# `.*` in front: the last statement counts.
_MARKER = re.compile(r".*(?:####|answer(?:\s+is|\s*[:=]))[\s:]*([^\s:][^\n]*)", re.DOTALL | re.IGNORECASE)

# Commas separate thousands only where all groups have three digits: 1,234 is a number, 1,23 and 1,234,5 are lists.
_UNSIGNED = r"(?:(?:(?<!\d,)\d{1,3}(?:,\d{3})+(?!,?\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
# Sign, whole part of a mixed number, numerator, denominator, per cent sign. After a digit, a letter or a closing
# bracket "-" is no sign; exponents, indices, what is added to symbols or divides them and arguments of LaTeX are no
# answers.
_NUMBER = re.compile(
    r"(?:(?<![\da-zA-Z)\]}%^{/])([-+])|(?<![\d^{/√])(?<![a-zA-Z]_)(?<!(?<![a-zA-Z])[a-zA-Z][-+])"
    r"(?<!\d[.:eE])(?<![\^{]-)(?<!sqrt))"
    rf"(\d+ (?=\d+\s*/\s*\d))?({_UNSIGNED})(?:\s*/\s*(-?{_UNSIGNED}))?(\s*%)?"
)
_PART = re.compile(r"\s*(?:[\^√π]|\\(?:pi|sqrt|frac))|:(?!00)\d")  # follows: the 2 of 2\pi, 2^10 and 2:3 is no answer
# What a sentence says of its number, a box makes another answer: 5! and 5x, and what stands beside it: the rest of a
# list, as in 1, 2 and (1, 2), a bound, as in x > 5 and \pm 5, or of a sum or product, as in 3+\sqrt{2} and 12\log 2.
_TERM = re.compile(r"\d(?:!|[xyzni](?![a-zA-Z\d]))")
_BOUND = r"(?:[<>≤≥≠±]|\\(?:pm|[lgn]eq?(?:slant)?|[lg]t)(?![a-z]))"
_BEFORE = re.compile(rf"{_BOUND}\s*$")
_MORE = r"(?:\+\s*[\w\\(]|\\(?:log|ln)(?![a-z]))"
_AFTER = re.compile(rf"\s*(?:[)\]]\s*)?(?:(?:[;,]|:(?!00)|or)[-+(\[\s]*[\d\\]|{_BOUND}|{_MORE})")
_GROUPED = re.compile(r"[-+]?\d{1,3}(?: \d{3})+(?:\.\d+)?")  # 10 000, where there is nothing else
# Around the number that an answer is: the symbol that it is the value of, and its unit, where that is set as text.
_SYMBOL = re.compile(r"^[a-zA-Z] ?= ?")
_UNIT = re.compile(r"(?<=[\d}])(?:\\[,;:! ]|[\s~])*\\(?:text|math|mbox)[a-z]*\{[^{}]*\}(?:\^\{?\d\}?)?\W*$")
_OPERATORS = ("+", "-", "*", "/", "=", "×", "·", "÷", r"\times", r"\cdot", r"\div")

# In normalised text: where a statement ends, and the letter of an option as in (B), B), B: or B.
_END = re.compile(r"$|\. |,? ?because\b")
_OPTION = re.compile(rf"[(\[]?([^\W\d_])(?:[)\]:]|{_END.pattern})")


def _plain(text: str) -> str:
    for pattern, replacement in _TYPOGRAPHY:
        text = pattern.sub(replacement, text)
    return text


def _answered(completion: str) -> str:
    """What follows the thoughts, where anything does: they weigh answers that are not given."""
    return next((part for part in reversed(completion.split("</think>")) if part.strip()), completion)


def _marked(text: str) -> str | None:
    """What the markers say is the answer, if any does. A box that is never closed reaches to the end of the text."""
    _, boxed, rest = text.rpartition(r"\boxed{")
    if not boxed:
        return found[1].strip() if (found := _MARKER.match(text)) else None
    depth = 1
    for i, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[:i].strip()
    return rest.strip()


def _marked_or_all(text: str) -> str:
    return text if (marked := _marked(text)) is None else marked


def _numbers(text: str) -> list[re.Match]:
    return [found for found in _NUMBER.finditer(text) if not _PART.match(text, found.end())]


def extract_answer(text: str) -> str:
    """The final answer stated in `text`, as text (see the module's order of preference)."""
    text = _plain(text)
    if (marked := _marked(text)) is not None:
        return _ungrouped(marked)
    numbers = _numbers(_ungrouped(text.strip()))
    return numbers[-1][0] if numbers else text.strip()


def _ungrouped(text: str) -> str:
    return text.replace(" ", "") if _GROUPED.fullmatch(text) else text


def _result(text: str) -> re.Match | None:
    """The first number, or what is computed from it on the spot: 42 in "42, not 9", 7 in "3 + 4 = 7, not 9"."""
    result = None
    for found in _numbers(text):
        if result and not text[result.end() : found.start()].rstrip(" (").endswith(_OPERATORS):
            break
        result = found
    return result


def _says_more(text: str, number: re.Match, rel_tol: float) -> bool:
    """Whether a box has more than `number`, and so another answer. Two forms of one value, 1/2 or 0.5, are no list."""
    if _TERM.search(text) and "=" not in text:
        return True
    if not _BEFORE.search(text[: number.start()]) and not _AFTER.match(text, number.end()):
        return False
    forms = _numbers(text)
    return len(forms) == 1 or not all(_equal(form, number, rel_tol) for form in forms)


def _values(number: re.Match) -> list[Decimal]:
    """What a number can mean: 50% is 0.5, or the 50 of "how many per cent". Nothing if it is undefined, as 1/0 is."""
    sign, whole, top, bottom, percent = ((part or "").replace(",", "") for part in number.groups())
    try:
        value = Decimal(sign + top)  # exact whatever its length, so that long integers differ by their last digit
        if bottom:
            value /= Decimal(bottom)
        if whole:
            value += Decimal(sign + whole)
        return [value, value / 100] if percent else [value]
    except ArithmeticError:  # also of exponents beyond decimal's range
        return []


def _equal(given: re.Match, gold: re.Match, rel_tol: float) -> bool:
    """Of two percentages like is compared with like: 50% is not 0.5%, though 0.5 is a meaning of both."""
    meanings = _values(given), _values(gold)
    pairs = zip(*meanings, strict=False) if given[5] and gold[5] else product(*meanings)
    return any(_close(a, b, rel_tol) for a, b in pairs)


def _close(given: Decimal, gold: Decimal, rel_tol: float) -> bool:
    if given == given.to_integral_value() and gold == gold.to_integral_value():
        return given == gold
    return math.isclose(given, gold, rel_tol=rel_tol, abs_tol=0 if gold else 1e-9)


def _normalise(text: str) -> str:
    """Case, white space (also "x=5", "(1,2)"), braces of x^{2} and closing punctuation folded. The space after a full
    stop stays. Braces are put in, not taken out: x^{2y} is not x^2y."""
    text = re.sub(r"([\^_]|\\sqrt)\s*(\d+|[^\W\d_])", r"\1{\2}", text)
    return re.sub(r" ?([^\w\s.]) ?", r"\1", " ".join(text.casefold().split())).rstrip(".!;, ").lstrip()


def _says(stated: str, gold: str) -> bool:
    """Whether the statement is `gold`, or opens with it as a sentence, before a reason or as an option's letter."""
    stated, gold = _normalise(stated), _normalise(gold)
    if option := _OPTION.fullmatch(gold):
        return (found := _OPTION.match(stated)) is not None and found[1] == option[1]
    return stated.startswith(gold) and _END.match(stated, len(gold)) is not None


def _is_value(stated: str, answer: str, rel_tol: float) -> bool:
    """Whether the statement is a number and nothing else, and the answer that number with a symbol or a unit: 5 is what
    x = 5 and 5\\text{ cm} say."""
    bare = _SYMBOL.sub("", _plain(_UNIT.sub("", _marked_or_all(re.sub(*_BOX, answer)))).strip())
    given, gold = (_NUMBER.fullmatch(_ungrouped(text.rstrip("."))) for text in (stated, bare))
    return bool(given and gold) and _equal(given, gold, rel_tol)


def _math_verify(completion: str, answer: str) -> bool:
    # Of words it would accept any anagram, as products of the same symbols.
    if answer.replace(" ", "").isalpha() or importlib.util.find_spec("math_verify") is None:
        return False
    from math_verify import parse, verify

    return bool(verify(parse(f"${answer}$"), parse(completion)))


def is_correct(completion: str, answer: str | float | list[str | float], rel_tol: float = 1e-6) -> bool:
    """Whether the final answer of `completion` equals that of `answer`, or of one of several.

    Integers are compared exactly, other numbers within `rel_tol` (relative); 50% equals 0.5 and 50. Of several numbers
    after a marker the first counts, or the result of the calculation that it opens; of a list in a box, none. Strings
    are compared after folding case, white space and closing punctuation; a new sentence, "because" or the text of an
    option may follow. Of x = 5 and of 5\\text{ cm} the number alone is right, too.
    When the `math_verify` package is installed, a mismatch gets a second opinion from it (symbolic equality).
    """
    if isinstance(answer, list):
        return any(is_correct(completion, one, rel_tol) for one in answer)
    completion = _answered(completion)
    gold = _marked_or_all(_plain(str(answer)).strip())
    if number := _NUMBER.fullmatch(gold.rstrip(".")):
        stated = extract_answer(completion)
        given = _result(stated)
        right = given is not None and _equal(given, number, rel_tol)
        if right and r"\boxed{" in _plain(completion):
            right = not _says_more(stated, given, rel_tol)
    else:
        stated = _marked_or_all(_plain(completion))
        right = _says(stated, gold) or _is_value(stated, str(answer), rel_tol)
    return right or _math_verify(completion, gold)
