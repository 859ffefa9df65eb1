"""The ops under `topk_divergence_loss` and `linear_token_logprobs` of hidden states: the few numbers that they need of
each token's logits, without N×V logits.

N tokens, V vocabulary, D hidden size, k known entries. Buckets: log-weights of the k and of all others together; or the
log-probability of one token. Logits are projected a chunk of rows at a time, and again for the gradient. An operator
and not a loop, because torch.compile would unroll the loop anew for each number of tokens.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..gradients import differentiable_once
from .autograd import apply
from .linear_rows import add_product, hidden_gradient, pieces, project, without_autocast
from .ops import empty_rows


def _transformed(
    logits_NV: Tensor, temperature: float, scale: float, softcap: float | None, masked_N: Tensor | None = None
) -> Tensor:
    if masked_N is not None:  # before all else: a NaN times their gradient of 0 would be NaN in backward
        logits_NV = logits_NV.masked_fill(masked_N[:, None], 0)
    z = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    if softcap:
        z = torch.tanh(z * (scale / softcap)) * softcap
    elif scale != 1:
        z = z * scale
    return z if temperature == 1 else z / temperature


class _BucketRows(torch.autograd.Function):
    """Autograd's own gradient of a log-sum-exp over nothing but −inf would be NaN."""

    @staticmethod
    def forward(logits_NV, ids_Nk, tail, *transform):
        return _bucket_rows(logits_NV, ids_Nk, tail, *transform)

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits_NV, ids_Nk, ctx.tail, *ctx.transform, masked_N = inputs
        ctx.save_for_backward(logits_NV, ids_Nk, masked_N, output)

    @staticmethod
    def backward(ctx, grad):
        logits_NV, ids_Nk, masked_N, buckets = ctx.saved_tensors
        with torch.no_grad():
            logits = logits_NV if masked_N is None else logits_NV.masked_fill(masked_N[:, None], 0)
            g = _rows_gradient(grad, logits, ids_Nk, False, ctx.tail, *ctx.transform, buckets[:, -1:])
        return differentiable_once([g], [logits_NV, grad])[0], None, None, None, None, None, None


def bucket_rows(*args) -> Tensor:
    """`_bucket_rows` with a gradient for the logits."""
    return apply(_BucketRows, *args)


def _present(ids_Nk: Tensor) -> Tensor:
    """Ids to index with. A negative one, which stands for no token, becomes another id of its row, or 0 if there is
    none.
    """
    return torch.where(ids_Nk < 0, ids_Nk.amax(1, keepdim=True).clamp(min=0), ids_Nk)


def _fill_known(x_NV: Tensor, ids_Nk: Tensor, value: float) -> Tensor:
    """Write the value into x, in place, at the ids that are not negative; returns x."""
    present = _present(ids_Nk)
    return x_NV.scatter_(1, present, torch.where(ids_Nk.amax(1, keepdim=True) < 0, x_NV.gather(1, present), value))


def _others(z_NV: Tensor, ids_Nk: Tensor) -> Tensor:
    """Log-sum-exp (N, 1) of all but the k."""
    z = _fill_known(z_NV.clone(), ids_Nk, -torch.inf)
    most = z.amax(1, keepdim=True)
    most = most.masked_fill_(most == -torch.inf, 0)
    return z.sub_(most).exp_().sum(1, keepdim=True).log_().add_(most)


def _bucket_rows(logits_NV: Tensor, ids_Nk: Tensor, tail: bool, *transform) -> Tensor:
    """Log-weights (N, k) of the k entries, −inf where the id is negative, and with a tail to speak of, of all others
    together as one more column.

    Summed over the others rather than taken as 1 − Σ of the k, which cancels where the k hold nearly everything.
    """
    z = _transformed(logits_NV, *transform)
    known = z.gather(1, _present(ids_Nk)).masked_fill(ids_Nk < 0, -torch.inf)
    return torch.cat([known, _others(z, ids_Nk)], 1) if tail else known


def _token_rows(logits_NV: Tensor, ids_N1: Tensor, *transform) -> Tensor:
    z = _transformed(logits_NV, *transform)
    return z.gather(1, ids_N1) - z.logsumexp(1, keepdim=True)


# token: the log-probabilities of ids (N, 1); else the buckets of ids (N, k).
_ARGS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor ids, bool token, bool tail, float temperature, float scale, "
    "float? softcap, ScalarType dtype, int chunk_rows"
)
torch.library.define("effopd::partial_rows", f"({_ARGS}) -> Tensor")
torch.library.define(
    "effopd::partial_rows_backward",
    f"(Tensor grad, {_ARGS}, bool grad_hidden, bool grad_weight, bool grad_bias) -> (Tensor, Tensor, Tensor)",
)


def _rows(logits: Tensor, ids: Tensor, token: bool, tail: bool, *transform) -> Tensor:
    return _token_rows(logits, ids, *transform) if token else _bucket_rows(logits, ids, tail, *transform)


def _rows_gradient(grad, logits, ids, token, tail, temperature, scale, softcap, total=None) -> Tensor:
    """The product of ∂_rows/∂logits with grad, of the logits' shape and dtype. total: the tail's, where it is known."""
    z = _transformed(logits, temperature, scale, softcap)
    known = grad[:, : ids.shape[1]].masked_fill(ids < 0, 0)
    if token or tail:  # a log-sum-exp, of all or of those that are not known, which may all be −inf
        if total is None:
            total = z.logsumexp(1, keepdim=True) if token else _others(z, ids)
        g = (z - total.masked_fill(total == -torch.inf, 0)).exp_().mul_(-grad if token else grad[:, -1:])
        g = g if token else _fill_known(g, ids, 0.0)  # which may be infinite, or NaN
    else:
        g = torch.zeros_like(z)
    g.scatter_add_(1, _present(ids), known)
    if softcap:
        g.addcmul_(g, z.mul_(temperature / softcap).square_(), value=-1)
    return (g if scale == temperature else g.mul_(scale / temperature)).to(logits.dtype)


def _in(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.to(dtype) for t in tensors]


def _chunks(hidden_ND, weight_VD, bias_V, chunk_rows) -> Iterator[tuple[slice, Tensor]]:
    """Rows, and their logits, whose memory the next ones take."""
    with without_autocast(hidden_ND.device.type):
        logits = empty_rows(min(max(chunk_rows, 1), hidden_ND.shape[0]), weight_VD.shape[0], hidden_ND)
        for chunk in pieces(hidden_ND.shape[0], len(logits)):
            own = logits[: chunk.stop - chunk.start]
            project(own, hidden_ND[chunk], weight_VD, bias_V)
            yield chunk, own


def _empty(hidden_ND, ids_Nk, token, tail, dtype) -> Tensor:
    columns = ids_Nk.shape[1] + int(tail and not token)  # under torch.compile sizes are symbols, which add no bools
    return hidden_ND.new_empty((hidden_ND.shape[0], columns), dtype=torch.promote_types(dtype, torch.float32))


def _partial_rows(hidden_ND, weight_VD, bias_V, ids_Nk, *args):
    """_rows(hidden·weightᵀ + bias, ids, …), a chunk of rows at a time."""
    token, tail, *transform, dtype, chunk_rows = args
    out = _empty(hidden_ND, ids_Nk, token, tail, dtype)
    for chunk, logits in _chunks(*_in(dtype, hidden_ND, weight_VD, bias_V), chunk_rows):
        out[chunk] = _rows(logits, ids_Nk[chunk], token, tail, *transform)
    return out


def _partial_rows_backward(grad, hidden_ND, weight_VD, bias_V, ids_Nk, *args):
    """Projects each chunk again. What is not needed is empty."""
    *options, dtype, chunk_rows, need_h, need_w, need_b = args
    wide = torch.promote_types(dtype, torch.float32)
    grad_h = hidden_ND.new_empty(hidden_ND.shape if need_h else 0)
    grad_w = empty_rows(*weight_VD.shape, weight_VD, wide) if need_w else weight_VD.new_empty(0)
    grad_b = torch.zeros_like(bias_V, dtype=wide) if need_b else None
    if need_w and not len(hidden_ND):
        grad_w.zero_()
    hidden, weight, bias = _in(dtype, hidden_ND, weight_VD, bias_V)
    for chunk, logits in _chunks(hidden, weight, bias, chunk_rows):
        g = _rows_gradient(grad[chunk], logits, ids_Nk[chunk], *options)
        if need_h:
            grad_h[chunk] = hidden_gradient(g, weight)
        if need_w:
            add_product(grad_w, g, hidden[chunk], first=chunk.start == 0)
        if need_b:
            grad_b += g.sum(0, dtype=wide)
    return grad_h, grad_w.to(weight_VD.dtype), grad_b.to(bias_V.dtype) if need_b else weight_VD.new_empty(0)


torch.library.impl("effopd::partial_rows", "CompositeExplicitAutograd", _partial_rows)
torch.library.impl("effopd::partial_rows_backward", "CompositeExplicitAutograd", _partial_rows_backward)


@torch.library.register_fake("effopd::partial_rows")
def _(hidden, weight, bias, ids, token, tail, temperature, scale, softcap, dtype, chunk_rows):
    return _empty(hidden, ids, token, tail, dtype)


@torch.library.register_fake("effopd::partial_rows_backward")
def _(grad, hidden, weight, bias, ids, *args):
    *_, need_h, need_w, need_b = args
    return (
        hidden.new_empty(hidden.shape if need_h else 0),
        weight.new_empty(weight.shape if need_w else 0),
        bias.new_empty(bias.shape) if need_b else weight.new_empty(0),
    )
