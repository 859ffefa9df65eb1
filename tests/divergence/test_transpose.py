"""Products with a head on the CPU, and the transposition between them and the row kernels."""

from types import SimpleNamespace

import pytest
import torch

from effopd_kernels.divergence import head_products, ops


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (7, 9), (8, 8), (33, 64), (512, 31), (1500, 700)])
def test_transpose(shape, dtype):
    R, C = shape
    x = torch.randn(R, C + 3).to(dtype)[:, 1:-2]
    out = torch.full((C, R + 5), torch.nan, dtype=dtype)
    ops.transpose(x, out[:, 2:-3])
    assert torch.equal(out[:, 2:-3], x.T)
    assert out[:, :2].isnan().all() and out[:, -3:].isnan().all()


@pytest.mark.parametrize("x", [torch.randn(40, 6).T, torch.randn(6, 40), torch.randn(0, 40), torch.randn(6, 0)])
def test_transpose_of_any_strides_and_dtypes(x):
    out = torch.empty(x.shape[1], x.shape[0], dtype=torch.bfloat16)
    ops.transpose(x, out)
    assert torch.equal(out, x.T.bfloat16())


@pytest.mark.parametrize("widened", [True, False])
@pytest.mark.parametrize("transposes", [True, False])
@pytest.mark.parametrize("operands, results", [("bf16", "bf16"), ("bf16", "fp32"), ("fp32", "fp32"), ("fp32", "bf16")])
@pytest.mark.parametrize("N, D, V", [(1, 8, 5), (31, 24, 5000), (48, 40, 70_001)])
def test_products_with_a_head(N, D, V, operands, results, transposes, widened, monkeypatch):
    """Both orders of operands, in one block and in several, with rows to pad and without; where the processor has a
    GEMM of bf16 and where it has not.
    """
    monkeypatch.setattr(head_products, "BLOCK", 1 << 18)
    monkeypatch.setattr(head_products, "TRANSPOSES", transposes)
    monkeypatch.setattr(head_products, "_product_dtype", lambda dtype, *_: torch.float32 if widened else dtype)
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    hidden, head, grad = (torch.randn(s).to(dtypes[operands]) for s in ((N, D), (V, D), (N, V)))
    bias = torch.randn(V).to(dtypes[operands])
    rtol = 2**-7 if results == "bf16" else 1e-5

    logits = torch.full((N, V), torch.nan, dtype=dtypes[results])
    head_products.project(logits, hidden, head, bias)
    exact = hidden.double() @ head.double().T + bias.double()
    torch.testing.assert_close(logits.double(), exact, rtol=rtol, atol=8 * rtol)

    found, exact = head_products.hidden_gradient(grad, head), grad.double() @ head.double()
    rtol_h = 1e-5 if widened or operands == "fp32" else 2**-7
    torch.testing.assert_close(found.double(), exact, rtol=rtol_h, atol=rtol_h * V**0.5)

    if operands == results or results == "fp32":
        acc = torch.full((V, D), torch.nan, dtype=dtypes[results])
        head_products.add_product(acc, grad, hidden, first=True)
        exact = grad.double().T @ hidden.double()
        torch.testing.assert_close(acc.double(), exact, rtol=rtol, atol=8 * rtol)
        head_products.add_product(acc, grad, hidden, first=False)
        torch.testing.assert_close(acc.double(), 2 * exact, rtol=rtol, atol=8 * rtol)


@pytest.mark.parametrize("outruns", [True, False])
@pytest.mark.parametrize("tiles", [True, False])
@pytest.mark.parametrize("supported", [True, False])
def test_bf16_is_multiplied_where_that_is_faster(supported, tiles, outruns, monkeypatch):
    """By PyTorch at all, and by a processor with matrix tiles, or vectors whose products of bf16 outrun fp32's; and for
    few rows, where a head is cast for nothing.
    """
    cpu, bf16, many = torch.device("cpu"), torch.bfloat16, head_products.FEW + 1
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported, raising=False)
    monkeypatch.setattr(head_products, "TILES", tiles)
    monkeypatch.setattr(head_products, "native", lambda: SimpleNamespace(multiplies_bf16=lambda: outruns))
    expected = bf16 if supported and (tiles or outruns) else torch.float32
    assert head_products._product_dtype(bf16, many, cpu) == expected
    assert head_products._product_dtype(bf16, head_products.FEW, cpu) == (bf16 if supported else torch.float32)
    monkeypatch.setattr(head_products, "native", lambda: None)  # then PyTorch is asked alone
    assert head_products._product_dtype(bf16, many, cpu) == (bf16 if supported else torch.float32)
    assert head_products._product_dtype(bf16, many, torch.device("cuda")) == bf16
    assert head_products._product_dtype(torch.float64, many, cpu) == torch.float64
