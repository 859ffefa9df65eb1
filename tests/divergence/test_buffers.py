"""The kept pages behind large gradients on the CPU: reused when free, never while in use."""

import gc
import threading

import pytest
import torch

from effopd_kernels.divergence import ops, reverse_kl_loss

module = ops.native()
pytestmark = pytest.mark.skipif(not hasattr(module, "fresh_rows"), reason="needs the C++ extension on Linux")
N, V = 64, 50_000  # 12.8 MB in fp32


@pytest.fixture(autouse=True)
def nothing_kept():
    gc.collect()
    module.release_rows()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_buffer_is_an_ordinary_tensor(dtype):
    like = torch.empty(128, 60_000, dtype=dtype)
    rows = ops.empty_rows(*like.shape, like)
    assert (rows.shape, rows.dtype, rows.stride()) == (like.shape, dtype, like.stride())
    assert rows.data_ptr() % (2 << 20) == 0
    rows.fill_(3)
    assert rows.sum(dtype=torch.float64) == 3 * like.numel()


def test_pages_serve_the_next_and_only_when_free():
    like = torch.empty(N, V)
    first = ops.empty_rows(*like.shape, like)
    address = first.data_ptr()
    second = ops.empty_rows(*like.shape, like)
    assert second.data_ptr() != address
    view = first[3:]
    del first
    assert ops.empty_rows(*like.shape, like).data_ptr() != address  # a view is a use
    del view
    assert ops.empty_rows(*like.shape, like).data_ptr() == address


def test_pages_far_larger_than_needed_are_not_used():
    large = ops.empty_rows(4 * N, V, torch.empty(0))
    begin, end = large.data_ptr(), large.data_ptr() + large.nbytes
    del large  # its pages are kept, for the next of their size
    small = ops.empty_rows(N, V, torch.empty(0))
    assert not begin <= small.data_ptr() < end
    assert ops.empty_rows(4 * N, V, torch.empty(0)).data_ptr() == begin


def test_a_capsule_nobody_takes_gives_its_pages_back():
    address = torch.from_dlpack(module.fresh_rows(N, V, 2, 32)).data_ptr()
    module.fresh_rows(N, V, 2, 32)
    assert torch.from_dlpack(module.fresh_rows(N, V, 2, 32)).data_ptr() == address


def test_threads_never_share_pages():
    like, wrong = torch.empty(N, V), []

    def work(value):
        for _ in range(50):
            rows = ops.empty_rows(*like.shape, like)
            rows.fill_(value)
            if not torch.equal(rows[:, ::997], torch.full_like(rows[:, ::997], value)):
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_gradients_of_two_losses_live_side_by_side():
    torch.manual_seed(0)
    student, teacher = torch.randn(N, V, requires_grad=True), torch.randn(N, V)
    (first,) = torch.autograd.grad(reverse_kl_loss(student, teacher), student)
    kept = first.clone()
    (second,) = torch.autograd.grad(reverse_kl_loss(student, 2 * teacher), student)
    assert torch.equal(first, kept) and not torch.equal(first, second)
