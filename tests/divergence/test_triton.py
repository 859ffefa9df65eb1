"""The Triton row kernel against fp64, on the GPU or in the interpreter. N tokens, V vocabulary."""

import math

import oracle
import pytest
import torch

pytest.importorskip("triton")

from divergence.criterion import MEMBERS, PLAIN, assert_accurate, assert_sharp, definition, spec
from interpreted import DEVICE, ON_GPU, needs_gpu, needs_kernels, round_once, run_in_interpreter

from effopd_kernels.divergence import ops, triton_kernels
from effopd_kernels.divergence.triton_kernels import launch_divergence_rows

ROUTES = ("reverse", "forward", "jsd(0.3)")  # the kernel's three compile-time cases
every_member = pytest.mark.parametrize("member", MEMBERS)
every_route = pytest.mark.parametrize("member", ROUTES)


def test_in_interpreter():
    run_in_interpreter(__file__)


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    """The interpreter crosses slices and tiles with short rows; a GPU runs what is shipped. Tiles are as large
    as there, of fewer lanes that load more each: the interpreter adds up lanes one after the other, in Python."""
    if not ON_GPU:
        launch = triton_kernels.LAUNCH["sm_90"]._replace(lanes=8, loads=32, slice=8192, resident=3)
        monkeypatch.setattr(triton_kernels, "UNALIGNED_LOADS", 128)
        monkeypatch.setattr(triton_kernels, "launch_for", lambda device: (launch, 2))


def run(student, teacher, member, knobs=PLAIN, mask=None, row_scale=None, grad=True, stats=True, out=None):
    """(loss, grad, stats); the gradient's memory is poisoned beforehand."""
    if grad and out is None:
        out = torch.full(student.shape, math.nan, dtype=student.dtype, device=student.device)
    loss, statistics = launch_divergence_rows(student, teacher, mask, row_scale, spec(member, knobs), out, stats)
    return loss, out, statistics


def check(student, teacher, member, knobs=PLAIN):
    assert_accurate(run(student, teacher, member, knobs), member, student, teacher, knobs)


def logits(*shape, spread=3.0, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * spread).to(DEVICE, dtype)


@needs_kernels
@every_member
@pytest.mark.parametrize("V", [1, 2, 127] + [4097, 50257, 151936] * ON_GPU)
def test_value_gradient_and_statistics(member, V):
    check(logits(2, V), logits(2, V, seed=1), member)


@needs_kernels
@every_route
def test_vocabulary_of_many_slices(member):
    check(logits(1, 4097), logits(1, 4097, seed=1), member)


@needs_kernels
@every_route
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_aligned_and_unaligned_rows(member, dtype):
    """Rows that all begin at multiples of 16 elements are read in vectors, others element by element."""
    V = 8448 // dtype.itemsize  # of two slices, the first of two tiles
    student, teacher = logits(2, V, dtype=dtype), logits(2, V, dtype=dtype, seed=1)
    check(student, teacher, member)
    check(student[:, 1 : V - 7], teacher[:, 1 : V - 7], member)
    check(student[:, : V - 111], teacher[:, 16 : V - 95], member)


@needs_kernels
@every_route
def test_value_alone_is_the_same(member):
    student, teacher = logits(2, 2100), logits(2, 2100, seed=1)
    with_gradient, _, _ = run(student, teacher, member)
    loss, grad, stats = run(student, teacher, member, grad=False, stats=False)
    assert grad is None and stats.numel() == 0
    assert torch.equal(loss, with_gradient)


@needs_kernels
@every_route
@pytest.mark.parametrize(
    ("student_dtype", "teacher_dtype"),
    [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.float16)],
    ids=["bf16", "bf16 fp32", "fp32 fp16"],
)
def test_dtypes_mix(member, student_dtype, teacher_dtype):
    check(logits(2, 2112, dtype=student_dtype), logits(2, 2112, dtype=teacher_dtype, seed=1), member)


@needs_kernels
@every_route
@pytest.mark.parametrize(("Vs", "Vt"), [(1037, 1100), (2100, 1000)])
def test_unequal_vocabularies_share_their_prefix(member, Vs, Vt):
    """Columns past the shared prefix are never read, and their gradient is written as 0."""
    student, teacher = logits(2, Vs), logits(2, Vt, seed=1)
    V = min(Vs, Vt)
    student[:, V:], teacher[:, V:] = math.nan, math.nan
    loss, grad, _ = run(student, teacher, member)
    want_loss, want_grad, _ = run(student[:, :V].contiguous(), teacher[:, :V].contiguous(), member)
    torch.testing.assert_close(loss, want_loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad[:, :V], want_grad, rtol=1e-5, atol=1e-7)
    assert (grad[:, V:] == 0).all()


@needs_kernels
@every_route
def test_rows_that_rise(member):
    """Each slice's logits lie hundreds of bits above all before."""
    rising = logits(2, 4097, spread=300.0).sort().values
    check(rising, logits(2, 4097, seed=1), member)
    check(logits(2, 4097, seed=1), rising, member)


@needs_kernels
@every_route
@pytest.mark.parametrize("low", [-1e10, -1e20])
def test_entries_far_below(monkeypatch, member, low):
    """As masked entries are: so far that a reference's own rounding is hundreds of bits, and 2^u overflows."""
    round_once(monkeypatch)
    student, teacher = logits(2, 3072), logits(2, 3072, seed=1)
    student[:, :2048] = teacher[:, :2048] = low
    for temperature in (1.0, 3.0):
        check(student, teacher, member, (temperature, temperature, *PLAIN[2:]))


@needs_kernels
@every_route
def test_masked_rows_cost_nothing_and_leak_nothing(member):
    student, teacher = logits(4, 1100), logits(4, 1100, seed=1)
    mask = torch.tensor([True, False, True, False], device=DEVICE)
    student[~mask], teacher[~mask] = math.nan, math.inf
    loss, grad, stats = run(student, teacher, member, mask=mask)
    alone = run(student[mask], teacher[mask], member)
    for found, want in zip((loss[mask], grad[mask], stats[:, mask]), alone, strict=True):
        assert torch.equal(found, want)
    assert (loss[~mask] == 0).all() and (grad[~mask] == 0).all() and (stats[:, ~mask] == 0).all()
    loss, grad, stats = run(student, teacher, member, mask=torch.zeros_like(mask))
    assert not loss.any() and not grad.any() and not stats.any()


@needs_kernels
@every_route
def test_row_scale_scales_the_gradient_alone(member):
    student, teacher = logits(3, 1100), logits(3, 1100, seed=1)
    row_scale = torch.tensor([0.0, -2.5, 1e-3], device=DEVICE)
    plain, scaled = run(student, teacher, member), run(student, teacher, member, row_scale=row_scale)
    assert torch.equal(plain[0], scaled[0]) and torch.equal(plain[2], scaled[2])
    torch.testing.assert_close(scaled[1], plain[1] * row_scale[:, None], rtol=1e-5, atol=5e-7)


@needs_kernels
def test_no_rows():
    loss, grad, stats = run(logits(0, 100), logits(0, 100), "reverse")
    assert loss.shape == (0,) and grad.shape == (0, 100) and stats.shape == (3, 0)


@needs_kernels
@every_route
@pytest.mark.parametrize("columns", [slice(0, 1312), slice(7, 1307)], ids=["aligned", "unaligned"])
def test_sequences_that_lie_apart(member, columns):
    whole = logits(2 * 3, 1312).view(2, 3, 1312)
    student, teacher = whole[:, :-1, columns], logits(4, 1328, seed=1).view(2, 2, 1328)
    flat = student.reshape(4, -1), teacher.view(4, -1)
    assert_accurate(run(*flat, member), member, *flat)
    want = run(student.contiguous(), teacher, member)
    before = whole.clone()
    for out in (None, student):
        found = run(student, teacher, member, out=out)
        for ours, theirs in zip(found, want, strict=True):
            torch.testing.assert_close(ours, theirs)
    whole[:, :-1, columns] = before[:, :-1, columns]
    assert torch.equal(whole, before)


@needs_kernels
@every_route
def test_strided_rows_and_in_place(member):
    student, teacher = logits(2, 3, 1300)[:, 1], logits(4, 1400, seed=1)[::2, 50:][:, :1300]
    want = run(student.contiguous(), teacher.contiguous(), member)
    loss, grad, stats = run(student, teacher, member, out=student)
    assert grad is student
    for ours, theirs in zip((loss, grad, stats), want, strict=True):
        assert torch.equal(ours, theirs)


@needs_kernels
@every_route
@pytest.mark.parametrize("where", ["student", "teacher", "both", "apart"])
def test_entries_at_minus_infinity(member, where):
    """−inf on both sides is outside the support; on one side the log-probability counts as −1e4."""
    student, teacher = logits(2, 2100), logits(2, 2100, seed=1)
    if where in ("student", "both", "apart"):
        student[:, 100:200] = -math.inf
    if where in ("teacher", "both"):
        teacher[:, 100:200] = -math.inf
    if where == "apart":
        teacher[:, 2050:] = -math.inf
    loss, grad, stats = run(student, teacher, member)
    want_loss, want_grad = definition(member, student, teacher)
    torch.testing.assert_close(loss.double(), want_loss, rtol=3e-6, atol=4e-6)
    entropies = [oracle.entropy(oracle.log_probs(x.double())) for x in (student, teacher)]
    torch.testing.assert_close(stats[:2].double(), torch.stack(entropies), rtol=3e-6, atol=4e-6)
    assert grad.isfinite().all()
    if where in ("teacher", "both"):
        torch.testing.assert_close(grad.double(), want_grad, rtol=1e-5, atol=1e-6)
    if where == "both":
        assert (grad[:, 100:200] == 0).all()
        keep = torch.cat([torch.arange(100), torch.arange(200, 2100)]).to(DEVICE)
        _, without, _ = run(student[:, keep].contiguous(), teacher[:, keep].contiguous(), member)
        torch.testing.assert_close(grad[:, keep], without, rtol=1e-5, atol=1e-7)


@needs_kernels
@pytest.mark.parametrize("member", [name for name, m in MEMBERS.items() if 0 < m.pi < 1])
def test_mixtures_near_the_teacher(member):
    student = logits(4, 1500, spread=1.0)
    teacher = student + 1e-2 * logits(4, 1500, spread=1.0, seed=1)
    assert_sharp(run(student, teacher, member), member, student, teacher)


@needs_kernels
@every_route
def test_logits_as_large_as_1e4(member):
    student, teacher = logits(3, 1100, spread=3e3), logits(3, 1100, spread=3e3, seed=1)
    student[0, 7], teacher[0, 9] = 1e4, 1e4
    student[1] += 1e4 - student[1].max()
    teacher[2] -= 1e4
    check(student, teacher, member)
    same = student.clone()
    loss, grad, _ = run(student, same, member)
    assert loss.abs().max() <= 1e-6 and grad.abs().max() <= 1e-6


@needs_kernels
@every_route
@pytest.mark.parametrize(
    "knobs",
    [
        (2.0, 0.5, 1.0, 1.0, 0.0, 0.0),
        (1.0, 1.0, 0.25, 3.0, 0.0, 0.0),
        (1.3, 0.7, 0.5, 2.0, 30.0, 20.0),
        (1.0, 1.0, 1.0, 1.0, 1000.0, 500.0),
    ],
    ids=["temperatures", "scales", "soft caps", "soft caps far away"],
)
def test_temperature_scale_and_soft_cap(member, knobs):
    check(logits(2, 1100), logits(2, 1100, seed=1), member, knobs)


@needs_kernels
@every_route
@pytest.mark.parametrize("temperature", [0.01, 100.0])
def test_extreme_temperatures(member, temperature):
    knobs = (temperature, temperature, 1.0, 1.0, 0.0, 0.0)
    check(logits(2, 1100), logits(2, 1100, seed=1), member, knobs)


@needs_kernels
@every_route
@pytest.mark.parametrize("side", [0, 1])
def test_nan_in_a_live_row_is_reported_in_that_row_alone(member, side):
    pair = [logits(2, 1100), logits(2, 1100, seed=1)]
    pair[side][1, 1050] = math.nan
    loss, grad, _ = run(*pair, member)
    assert loss.isnan().tolist() == [False, True]
    assert grad[1].isnan().any() and grad[0].isfinite().all()


@needs_kernels
@every_route
def test_results_repeat_bitwise(member):
    student, teacher = logits(3, 2100), logits(3, 2100, seed=1)
    first, second = run(student, teacher, member), run(student, teacher, member)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1.0, 0.25, 1 / 3, 0.0])
def test_scaling_in_place(monkeypatch, dtype, factor):
    monkeypatch.setattr(triton_kernels, "SCALE_PROGRAMS", 2)  # several turns each, the last ragged
    x = logits(5, 4099, dtype=dtype)
    want = (x.float() * torch.tensor(factor, device=DEVICE)).to(dtype)
    triton_kernels.launch_scale(x, torch.tensor(factor, device=DEVICE))
    # the interpreter truncates to bf16 where a GPU rounds: one unit in the last place
    torch.testing.assert_close(x, want, rtol=0 if ON_GPU else torch.finfo(dtype).eps, atol=0)


def test_scaling_leaves_fp64_and_strided_tensors_to_pytorch():
    for x in (torch.ones(3, 4, dtype=torch.float64, device=DEVICE), torch.ones(4, 3, device=DEVICE).T):
        ops._scale_triton(x, torch.tensor(0.5, device=DEVICE))
        assert (x == 0.5).all()


@needs_gpu
@every_route
def test_launch_is_captured_in_a_cuda_graph(member):
    student, teacher = logits(64, 50304), logits(64, 50304, seed=1)
    out = torch.empty_like(student)
    want = run(student, teacher, member)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, _, stats = run(student, teacher, member, out=out)
    for _ in range(2):
        out.fill_(math.nan)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip((loss, out, stats), want, strict=True))


@needs_gpu
@every_route
def test_rows_beyond_two_to_the_31st_element(member):
    rows = torch.empty(2**31 + 2**20, dtype=torch.bfloat16, device=DEVICE)
    student = rows.as_strided((2, 4096), (2**31 + 16, 1)).copy_(logits(2, 4096))
    check(student, logits(2, 4096, dtype=torch.bfloat16, seed=1), member)
