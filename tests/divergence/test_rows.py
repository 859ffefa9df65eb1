"""Each implementation of the row op that runs on a CPU, called by name, against fp64. N tokens, V vocabulary."""

import math

import pytest
import torch
from divergence.criterion import MEMBERS, PLAIN, assert_accurate, assert_sharp, definition, spec
from hypothesis import example, given, settings
from hypothesis import strategies as st

from effopd_kernels.divergence import ops

INSTRUCTION_SETS = range(ops.native().num_instruction_sets() if ops.native() else 0)
IMPLEMENTATIONS = ["reference", *(f"c++ {i}" for i in INSTRUCTION_SETS)]

every_member = pytest.mark.parametrize("member", MEMBERS)
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def run(implementation, student, teacher, member, knobs=PLAIN, mask=None, row_scale=None, out=None):
    """(loss, grad, stats) of one implementation; the gradient's memory is poisoned beforehand."""
    grad = torch.full(student.shape, math.nan, dtype=student.dtype) if out is None else out
    args = student, teacher, mask, row_scale, spec(member, knobs), grad, True
    if implementation == "reference":
        loss, stats = ops._reference(*args)
    else:
        loss, stats = ops._cpp(*args, instruction_set=int(implementation[-1]))
    return loss, grad, stats


def check(implementation, student, teacher, member, knobs=PLAIN):
    assert_accurate(run(implementation, student, teacher, member, knobs), member, student, teacher, knobs)


def logits(N, V, dtype=torch.float32, spread=3.0, seed=0):
    return (torch.randn(N, V, generator=torch.Generator().manual_seed(seed)) * spread).to(dtype)


@every_implementation
@every_member
@pytest.mark.parametrize("V", [1, 2, 127, 4097, 50257])
def test_vocabularies(implementation, member, V):
    check(implementation, logits(3, V), logits(3, V, seed=1), member)


@every_implementation
@pytest.mark.parametrize("member", ["reverse", "jsd(0.3)"])
def test_large_vocabulary(implementation, member):
    check(implementation, logits(2, 151936, torch.bfloat16), logits(2, 152064, torch.bfloat16, seed=1), member)


@every_implementation
@every_member
@pytest.mark.parametrize("student_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(implementation, member, student_dtype, teacher_dtype):
    check(implementation, logits(3, 1500, student_dtype), logits(3, 1500, teacher_dtype, seed=1), member)


@every_implementation
@every_member
@pytest.mark.parametrize(
    "knobs",
    [
        (0.7, 1.3, 1.0, 1.0, 0.0, 0.0),
        (1.0, 1.0, 0.25, 16.0, 0.0, 0.0),
        (0.5, 0.9, 1.5, 0.5, 5.0, 0.0),
        (1.0, 1.0, 1.0, 1.0, 0.0, 30.0),
        (2.0, 1.0, 1.0, 1.0, 3.0, 30.0),
    ],
)
def test_temperature_scale_softcap(implementation, member, knobs):
    check(implementation, logits(3, 1500), logits(3, 1500, seed=1), member, knobs)


@every_implementation
@every_member
@pytest.mark.parametrize("temperature", [0.01, 100.0])
def test_extreme_temperatures(implementation, member, temperature):
    check(implementation, logits(3, 1500), logits(3, 1500, seed=1), member, (temperature, temperature, *PLAIN[2:]))


@every_implementation
@every_member
def test_logits_of_ten_thousand(implementation, member):
    check(implementation, logits(4, 1500, spread=1.0).clamp(-1, 1) * 1e4, logits(4, 1500, seed=1), member)
    check(implementation, logits(4, 1500) + 1e4, logits(4, 1500, seed=1) - 1e4, member)  # shifts cancel


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
@every_member
def test_no_time_goes_into_subnormals(implementation, member):
    """Of logits that span 100 nats most exponentials are such: kernels round them to 0, for themselves alone."""
    student = logits(2, 4096, spread=30.0)
    check(implementation, student, teacher := logits(2, 4096, spread=30.0, seed=1), member)
    _, grad, _ = run(implementation, student, teacher, member)
    assert not ((grad != 0) & (grad.abs() < torch.finfo(torch.float32).tiny)).any()
    assert (torch.full((8,), 1e-38) * 0.1 != 0).all()


@every_implementation
@every_member
@pytest.mark.parametrize("spread", [100.0, 300.0, 1000.0])
def test_rows_that_rise(implementation, member, spread):
    """Each block's logits lie hundreds of bits above all before: what is gathered relative to those overflows."""
    rising = logits(3, 4097, spread=spread).sort().values
    check(implementation, rising, logits(3, 4097, seed=2), member)
    check(implementation, logits(3, 4097, seed=2), rising, member)
    check(implementation, rising, logits(3, 4097, spread=spread, seed=1).sort(descending=True).values, member)


@every_implementation
@every_member
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("low", [-1e10, -1e20, torch.finfo(torch.bfloat16).min])
def test_rows_that_begin_far_below(implementation, member, dtype, low):
    """As masked entries do: so far that a reference's own rounding is hundreds of bits, and 2^u overflows."""
    student, teacher = logits(2, 2500, dtype), logits(2, 2500, dtype, seed=1)
    student[0, :2048] = teacher[0, :2048] = low
    student[1, :1024] = teacher[1, :1200] = low
    student[1, 1024:1200] = -1e3
    for temperature in (1.0, 2.0, 3.0):
        check(implementation, student, teacher, member, (temperature, temperature, *PLAIN[2:]))


@every_implementation
@every_member
def test_student_near_teacher(implementation, member):
    """Where distillation ends: the value is tiny and every digit of it is a difference."""
    teacher = logits(4, 4097)
    check(implementation, teacher + 1e-3 * logits(4, 4097, seed=1), teacher, member)
    loss, grad, _ = run(implementation, teacher, teacher, member)
    assert loss.abs().max() < 1e-6 and grad.abs().max() < 1e-7


@every_implementation
@pytest.mark.parametrize("spread", [1.0, 10.0])
@pytest.mark.parametrize("member", [name for name, m in MEMBERS.items() if 0 < m.pi < 1])
def test_mixtures_near_the_teacher(implementation, member, spread):
    student = logits(8, 4097, spread=spread)
    teacher = student + 1e-2 * logits(8, 4097, spread=1.0, seed=1)
    assert_sharp(run(implementation, student, teacher, member), member, student, teacher)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 5),
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.sampled_from(list(MEMBERS)),
    st.floats(0.05, 20.0),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.floats(0.1, 30.0),
    st.integers(0, 1000),
)
@example(2, 1285, 1272, "reverse", 0.0546875, torch.float32, 5.0, 4)  # a shift of 260 after scaling, lost digits
def test_any_shape(N, student_V, teacher_V, member, temperature, dtype, spread, seed):
    student, teacher = logits(N, student_V, dtype, spread, seed), logits(N, teacher_V, dtype, spread, seed + 1)
    for implementation in IMPLEMENTATIONS:
        check(implementation, student, teacher, member, (temperature, 1.0, *PLAIN[2:]))


# ---- infinities


@every_implementation
@every_member
def test_infinite_on_both_sides_is_outside_the_support(implementation, member):
    student, teacher = logits(3, 2000), logits(3, 2000, seed=1)
    hidden = torch.arange(2000) % 3 == 1
    loss, grad, stats = run(
        implementation, student.masked_fill(hidden, -math.inf), teacher.masked_fill(hidden, -math.inf), member
    )
    inside = run(implementation, student[:, ~hidden].contiguous(), teacher[:, ~hidden].contiguous(), member)
    assert (grad[:, hidden] == 0).all()
    torch.testing.assert_close(loss, inside[0])
    torch.testing.assert_close(grad[:, ~hidden], inside[1])
    torch.testing.assert_close(stats, inside[2])


@every_implementation
@every_member
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_infinite_on_one_side_is_floored(implementation, member, side):
    student, teacher = logits(3, 2000), logits(3, 2000, seed=1)
    (student if side == "student" else teacher)[:, ::5] = -math.inf
    loss, grad, _ = run(implementation, student, teacher, member)
    assert grad.isfinite().all()
    true_loss, true_grad = definition(member, student, teacher)
    torch.testing.assert_close(loss.double(), true_loss, rtol=1e-5, atol=1e-6)
    if side == "teacher":
        torch.testing.assert_close(grad.double(), true_grad, rtol=1e-4, atol=1e-5)


@every_implementation
@every_member
def test_infinite_from_the_start_of_a_row(implementation, member):
    """No finite logit in the first blocks: references that are not there yet must not make NaN."""
    student, teacher = logits(2, 5000) - 300, logits(2, 5000, seed=1)
    student[:, :2500] = -math.inf
    teacher[:, :1500] = -math.inf
    loss, grad, _ = run(implementation, student, teacher, member)
    true_loss, _ = definition(member, student, teacher)
    torch.testing.assert_close(loss.double(), true_loss, rtol=1e-5, atol=1e-6)
    assert grad.isfinite().all()


@every_implementation
@every_member
def test_nan_is_not_hidden(implementation, member):
    student, teacher = logits(3, 2000), logits(3, 2000, seed=1)
    teacher[1, 1234] = math.nan
    loss, _, _ = run(implementation, student, teacher, member)
    assert loss.isnan().tolist() == [False, True, False]


# ---- masks, scales, strides


@every_implementation
@every_member
@pytest.mark.parametrize("side", [0, 1])
def test_nan_among_what_lies_far_below_is_not_hidden(implementation, member, side):
    pair = student, teacher = logits(3, 2500), logits(3, 2500, seed=1)
    student[1, :1024] = teacher[1, :1024] = -1e10
    pair[side][1, 100] = math.nan
    loss, *_ = run(implementation, student, teacher, member)
    assert loss.isnan().tolist() == [False, True, False]


@every_implementation
@every_member
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_masked_rows_are_zero_whatever_they_hold(implementation, member, poison):
    student, teacher = logits(4, 300, torch.bfloat16), logits(4, 300, seed=1)
    mask = torch.tensor([True, False, True, False])
    expected = run(implementation, student[mask], teacher[mask], member, row_scale=torch.tensor([0.5, 2.0]))
    student[~mask] = poison
    teacher[~mask] = poison
    row_scale = torch.tensor([0.5, 7.0, 2.0, 7.0])
    loss, grad, stats = run(implementation, student, teacher, member, mask=mask, row_scale=row_scale)
    assert (loss[~mask] == 0).all() and (grad[~mask] == 0).all() and (stats[:, ~mask] == 0).all()
    assert torch.equal(loss[mask], expected[0]) and torch.equal(grad[mask], expected[1])
    assert torch.equal(stats[:, mask], expected[2])


@every_implementation
def test_rows_of_any_stride(implementation):
    wide_student, wide_teacher = logits(3, 500, torch.bfloat16), logits(3, 700, seed=1)
    student, teacher = wide_student[:, 7:307], wide_teacher[:, 5:305]
    found = run(implementation, student, teacher, "reverse")
    expected = run(implementation, student.contiguous(), teacher.contiguous(), "reverse")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
@pytest.mark.parametrize("member", ["reverse", "forward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_gradients_of_rows_that_begin_anywhere(implementation, member, dtype):
    """More than 8 MB are stored past the caches, by whole lines: every number is as in the caches."""
    N, V = 72, 65537
    student, teacher = logits(N, V, dtype), logits(N, V, dtype, seed=1)
    whole = run(implementation, student, teacher, member)
    for rows in torch.arange(N).split(12):
        part = run(implementation, student[rows], teacher[rows], member)
        assert torch.equal(part[0], whole[0][rows]) and torch.equal(part[1], whole[1][rows])


@every_implementation
@every_member
def test_sequences_that_lie_apart(implementation, member):
    """(B, T, V) as logits[:, :-1] is: every number as from a copy, in place too, and nothing written between."""
    whole = logits(3 * 5, 400, torch.bfloat16).view(3, 5, 400)
    student, teacher = whole[:, :-1, 10:310], logits(3 * 4, 320, seed=1).view(3, 4, 320)
    mask, row_scale = torch.arange(12) % 4 != 1, torch.rand(12)
    flat = student.reshape(12, 300), teacher.view(12, 320)
    expected = run(implementation, *flat, member, mask=mask, row_scale=row_scale)
    found = run(implementation, student, teacher, member, mask=mask, row_scale=row_scale)
    assert found[1].shape == student.shape
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x.reshape(y.shape), y)
    before = whole.clone()
    torch.ops.effopd.divergence_rows_(student, teacher, None, None, 0.0, 1.0, 1.0, *PLAIN, True, False)
    assert not torch.equal(whole[:, :-1, 10:310], before[:, :-1, 10:310])
    whole[:, :-1, 10:310] = before[:, :-1, 10:310]
    assert torch.equal(whole, before)


@every_implementation
@every_member
def test_overwriting_the_student(implementation, member):
    student, teacher = logits(3, 2500, torch.bfloat16), logits(3, 2500, seed=1)
    loss, grad, _ = run(implementation, student, teacher, member)
    found, *_ = run(implementation, student, teacher, member, out=student)
    assert torch.equal(found, loss) and torch.equal(student, grad)


@pytest.mark.skipif(not INSTRUCTION_SETS, reason="needs the C++ extension")
def test_threads_do_not_change_the_result():
    student, teacher = logits(40, 20000), logits(40, 20000, seed=1)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            results.append(run(IMPLEMENTATIONS[-1], student, teacher, "jsd(0.3)"))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_offsets_beyond_32_bits():
    """Two rows 2³¹ + 2¹⁶ elements apart in one buffer, of which only the rows themselves are ever touched."""
    V, stride = 1000, 2**31 + 2**16
    student, teacher = (torch.empty(stride + V, dtype=torch.bfloat16).as_strided((2, V), (stride, 1)) for _ in range(2))
    student.copy_(logits(2, V))
    teacher.copy_(logits(2, V, seed=1))
    found = torch.ops.effopd.divergence_rows_(student, teacher, None, None, 0.0, 1.0, 1.0, *PLAIN, True, True)
    loss, grad, stats = run("c++ 0", logits(2, V, torch.bfloat16), logits(2, V, torch.bfloat16, seed=1), "reverse")
    torch.testing.assert_close(found[0], loss)
    torch.testing.assert_close(found[1], stats)
    torch.testing.assert_close(student, grad)


# ---- the two traps


def test_share_as_an_exponential_is_not_finite():
    """(1−π)·q/m written exp(lq − lm) overflows where p vanishes and π nears 1; the ratio does not."""
    student, teacher = torch.tensor([[0.0, 200.0]]), torch.tensor([[200.0, 0.0]])
    log_q, log_p = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    naive = (1 - 1.0) * (log_q - log_p).exp()  # π = 1: m = p
    assert not naive.isfinite().all()
    for member in MEMBERS:
        for implementation in ("reference", IMPLEMENTATIONS[-1]):
            loss, grad, _ = run(implementation, student, teacher, member)
            assert loss.isfinite().all() and grad.isfinite().all()


def test_log_probabilities_without_a_floor_are_nan():
    student, teacher = logits(1, 50), logits(1, 50, seed=1)
    student[:, 40:] = teacher[:, 40:] = -math.inf
    log_q, log_p = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    assert (log_q.exp() * (log_q - log_p)).sum().isnan()
    for implementation in ("reference", IMPLEMENTATIONS[-1]):
        assert run(implementation, student, teacher, "reverse")[0].isfinite().all()
