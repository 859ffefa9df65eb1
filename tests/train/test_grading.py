import pytest

from effopd_kernels.train.grading import extract_answer, is_correct


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("3 + 4 = 7, so the answer is 7.", "7"),
        (r"Thus \boxed{\frac{3}{4}}", "0.75"),
        (r"first \boxed{1}, no: \boxed{12{,}000}".replace("{,}", ","), "12000"),
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
    ],
)
def test_wrong(completion, answer):
    assert not is_correct(completion, answer)


def test_the_last_statement_counts():
    assert extract_answer("the answer is 3. Wait, the answer is 5") == "5"
