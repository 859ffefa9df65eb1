import math

import pytest

from effopd_kernels.train import grading
from effopd_kernels.train.grading import is_correct


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("3 + 4 = 7, so the answer is 7.", "7"),
        (r"Thus \boxed{\frac{3}{4}}", "0.75"),
        (r"first \boxed{1}, no: \boxed{12{,}000}", "12000"),
        ("reasoning\n#### 1,234", "1234"),
        ("it costs $18.00", 18),
        ("about 50%", "0.5"),
        ("The answer is Paris.", " paris"),
        ("Answer: x = 2\n", "x = 2"),
        ("6.9999999999", "7"),
        ("she has -3 left", "-3"),
        ("so we get 42 at last", "The steps were 40 + 2.\n#### 42"),
        (r"\boxed{f(x) = \{1, 2\}}", r"f(x) = \{1, 2\}"),
        ("the answer is Big Apple", ["New York", "big apple"]),
        # where a statement begins and ends
        ("The answer is: B", "B"),
        ("The answer is:\n\n$$5$$", "5"),
        ("**The answer is:** 5", "5"),
        ("The answer is St. Louis", "St. Louis"),
        ("The answer is St. Louis. It is in Missouri.", "St. Louis"),
        ("The final answer is: $5$. I hope it is correct.", "5"),
        ("#### Step 1\n3 + 4\nThe answer is 7", "7"),
        (r"so \boxed{42", "42"),
        ("the answer is 3. Wait, the answer is 5", "5"),
        # LaTeX
        (r"so we get \(42\)", "42"),
        (r"The answer is \(42\).", "42"),
        (r"\[5\]", "5"),
        (r"\boxed{5\text{ cm}}", "5"),
        (r"\boxed{90^\circ}", "90"),
        (r"\boxed{12{,}000}", "12000"),
        (r"12\,000", "12000"),
        (r"\left(1,2\right)", "(1, 2)"),
        (r"\boxed{2 \pi}", r"2\pi"),
        # fractions
        ("3/4", "3/4"),
        (r"\frac{3}{4}", r"\frac{3}{4}"),
        (r"It is $\frac{3}{4}$.", "0.75"),
        (r"-$\frac{3}{4}$", "-0.75"),
        (r"\frac34", "0.75"),
        (r"1\frac12", "1.5"),
        ("2 1/2 cups", "2.5"),
        # powers of ten
        (r"\boxed{3 \times 10^5}", "300000"),
        (r"\boxed{3\cdot10^{-5}}", "0.00003"),
        ("the answer is 6.02 x 10^23", "6.02e23"),
        ("6.02 × 10^23 of them", r"6.02 \times 10^{23}"),
        (r"$1.5*10^{3}$ m", "1500"),
        (r"\boxed{10^{6}}", "1000000"),
        (r"the answer is $-10^{-2}$", "-0.01"),
        # units glued to a number
        (r"\boxed{5kg}", "5"),
        (r"\boxed{5\text{m}}", "5"),
        (r"\boxed{5\text{ in}}", "5"),
        (r"\boxed{5\%}", "5"),
        (r"\boxed{5x = 10}", "10"),
        (r"\boxed{2 + 3 = 5}", "5"),
        ("The answer is 5!", "5"),
        ("The answer is 5x as many", "5"),
        # options
        ("(B)", "B"),
        (r"\text{B}", "B"),
        ("**B**", "B"),
        ("B) Paris", "B"),
        ("B. Paris", "(B)"),
        ("The answer is (B).", "B"),
        (r"The answer is \text{B}", "B"),
        ("The answer is **B**", "B"),
        ("The answer is B) Paris", "B"),
        ("The answer is B because A is too small.", "B"),
        (r"\boxed{\textbf{(B)}\ 5}", ["B"]),
        (r"\boxed{\textbf{(B)}\ 5}", ["5"]),
        # several numbers
        ("The answer is 10, not 9", "10"),
        ("The answer is 12 apples and 3 pears", "12"),
        ("The answer is 42 because 6 * 7 = 42 and 1 + 1 = 2", "42"),
        (r"The answer is \(6 \times 7 = 42\), not 43", "42"),
        ("Answer: (3 + 4) * 2 = 14", "14"),
        ("The answer is 60 km/h, 5 more", "60"),
        # signs and units
        ("There are 3-4 apples", "4"),
        ("10-3 =", "3"),
        ("so the change is -$5.", "-5"),
        ("−5", "-5"),
        ("it is –5", "-5"),
        ("pages 3–5", "5"),
        ("the answer is 7:00 PM", "7"),
        (r"\boxed{7:00}", "7"),
        ("it is _42_", "42"),
        ("it costs €18", "£18"),
        ("50%", "50"),
        # an answer with a unit or a symbol, and a statement without
        (r"\boxed{42}", r"42\text{ cm}"),
        (r"\boxed{42}", r"so the area is $\boxed{42\mbox{ cm}^2}$."),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}\,\mathrm{m}"),
        (r"The answer is 5.", "x = 5"),
        # thousands set apart
        ("#### 10 000", "10000"),
        (r"\boxed{1\ 234\ 567.5}", "1234567.5"),
        ("1 234 567", "1234567"),
        ("10000", "10 000"),
        (r"\boxed{1,234}", "1234"),
        (r"\boxed{(5), \text{ i.e. five}}", "5"),
        (r"\boxed{\frac{1}{2} \text{ or } 0.5}", "0.5"),
        (r"\boxed{5\text{, since }3<4}", "5"),
        (r"\boxed{x = 5 \quad (n \ge 1)}", "5"),
        # strings
        ("(1,2)", "(1, 2)"),
        (r"\boxed{\left(1, \dfrac{\pi}{2}\right)}", r"(1,\frac{\pi}{2})"),
        (r"\boxed{3 : 4}", "3:4"),
        (r"\boxed{x^{2} + \sqrt{2}}", r"x^2+\sqrt2"),
        (r"\boxed{1010_2}", "1010_{2}"),
        (r"\boxed{2^{10}}", "2^10"),
        ("x=5", "x = 5"),
        (r"\boxed {5}", "5"),
        (r"\boxed{5}", r"\boxed {5\text{ cm}}"),
        ("5", r"\fbox{5\text{ cm}}"),
        (r"\fbox{\frac{1}{2}}", "0.5"),
        # thoughts
        (r"<think>\boxed{3}</think> It is 4.", "4"),
        ("<think>The answer is 3?</think>\n\nIt is 4.", "4"),
        ("<think>So \\boxed{3}</think>\n", "3"),
        ("<think>The answer is A</think>", "A"),
        ("<think>3? The answer is B.</think> The answer is A</think>", "A"),
        # numbers of all kinds
        ("it is ٤٢", "42"),
        ("答案是-5", "-5"),
        ("1e3", 1000),
        ("NaN", math.nan),
        ("inf", "inf"),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_right(completion, answer):
    assert is_correct(completion, answer)


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("the answer is 8", "7"),
        ("", "7"),
        ("7 of 9", "7"),
        ("the answer is Rome", "Paris"),
        ("1/0", "1"),
        ("7.1", "7"),
        ("it is 3", ["7", 8]),
        # integers are compared exactly
        ("1234567", "1234568"),
        ("9007199254740993", "9007199254740992"),
        ("9" * 5000, "9" * 4999 + "8"),
        ("6.6e-34", "1.6e-19"),
        # commas of lists
        ("The numbers are 1,2,3", "123"),
        ("1,2", "12"),
        ("1,2345", "12345"),
        ("1,234,5", "12345"),
        ("10-3 =", "-3"),
        # part of a formula
        (r"\boxed{2\pi}", "2"),
        (r"\boxed{\sqrt{2}}", "2"),
        (r"\boxed{x^{-12}}", "2"),
        (r"\boxed{x_{12} + y_12}", "2"),
        (r"\boxed{\frac{\pi}{4}}", "4"),
        ("unmatched } and 7 of 9", "7"),
        (r"\boxed{3 \times 10^5}", "3"),
        ("the answer is 6.02 x 10^23", "6.02"),
        (r"\boxed{5!}", "5"),
        (r"\boxed{\sqrt{10^6}}", "1e6"),
        (r"\boxed{10^{6}}", "10"),
        (r"\boxed{\sqrt{10^6}}", "6"),
        ("n-10^3", "3"),
        (r"\boxed{10^2.5}", "100"),
        (r"\boxed{110^2}", "1100"),
        (r"\boxed{\sqrt{2x}}", r"\sqrt{2}x"),
        (r"\boxed{x^{2y}}", "x^2y"),
        (r"\boxed{2^{n}m}", "2^{nm}"),
        (r"\boxed {5!}", "5"),
        (r"\boxed{5x}", "5"),
        (r"\boxed{-\frac{1}{2}x}", "-1/2"),
        (r"\boxed{3+4i}", "4"),
        (r"\boxed{2x+5}", "5"),
        ("x-3", "3"),
        (r"\boxed{x+12}", "12"),
        (r"\boxed{5}", "2x = 5"),
        (r"\boxed{5}", "5x"),
        (r"\boxed{42\text{ m}}", r"42\text{ cm}"),
        (r"\boxed{43}", r"42\text{ cm}"),
        (r"\boxed{3}", r"3\text{ or }4"),
        ("#### 10 00", "1000"),
        # one of several, in a box
        (r"\boxed{3:4}", "3"),
        (r"{\boxed{3 : 4}}", "4"),
        ("the ratio is 3:4", "4"),
        ("the answer is 3:4", "3"),
        (r"\boxed{1,2}", "1"),
        (r"\boxed{\left(1, 2\right]}", "1"),
        (r"\boxed{-1 \text{ or } 2}", "-1"),
        (r"\boxed{\frac{1}{2}, \frac{1}{3}}", "0.5"),
        (r"\boxed{x \geq 3}", "3"),
        (r"\boxed{x \geqslant 3}", "3"),
        (r"\boxed{3 < x}", "3"),
        (r"\boxed{x = 1, 2}", "1"),
        (r"\boxed{(1), (2)}", "1"),
        (r"\boxed{x = \pm 3}", "3"),
        (r"\boxed{\pm 3}", "3"),
        (r"\boxed{3+\sqrt{2}}", "3"),
        (r"\boxed{12\log 2}", "12"),
        (r"\boxed{2 + 3}", "2"),
        # percentages
        ("The answer is 50%", "0.5%"),
        (r"\boxed{100\%}", r"1\%"),
        # thoughts
        (r"<think>\boxed{3}</think> It is 4.", "3"),
        ("<think>The answer is 3?</think>\n\nIt is 4.", "3"),
        # what comes after the answer
        ("The answer is 10, not 9", "9"),
        ("The answer is 12 apples and 3 pears", "3"),
        ("The answer is Stockholm", "St"),
        ("The answer is", "7"),
        (r"\boxed{}", "0"),
        # options
        ("C) Paris", "B"),
        ("Brazil", "B"),
        ("The answer is A cat", "A"),
        # no numbers
        ("nan", "5"),
        ("inf", "5"),
        ("1e999", "2e999"),
        ("1e99999999999999999999", "1e99999999999999999998"),
    ],
)
def test_wrong(completion, answer):
    assert not is_correct(completion, answer)


@pytest.mark.timeout(60)  # a few seconds; an expression that backtracks takes hours
def test_huge_completions_take_linear_time(monkeypatch):
    monkeypatch.setattr(grading, "_math_verify", lambda *_: False)  # it gives up after five seconds of its own
    units = [
        "1", "1,", "1,234,", "1 ", "1/", "0 1/", "1.", "1e", "1\\", "1 + ", "{", "}", "\\", "\\ ", "(", "$", "*", "#",
        "-", "−", r"\frac", r"\frac{1", r"\frac{1}", r"\text{", r"\boxed{", r"\sqrt", "answer ", "answer is ", "a. ",
        " ", "\n", "1 x ", "1 x 10^", "1 x 10^{",
    ]  # fmt: skip
    texts = [unit * (100_000 // len(unit)) for unit in units]
    texts += [
        start + " " * 100_000
        for start in (
            "answer", "answer is", "####", "1", "1 /", r"\frac{1}", "x", "1 x", "1 x 10^", "10", "x^", r"\boxed{1",
            r"\boxed{1)",
        )
    ]  # fmt: skip
    for text in texts:
        assert not is_correct(text, "0.123")
        is_correct(text, "1")
        assert not is_correct(text + "}x", "Paris")
