"""Definitions, written for clarity and sharing no code with the package.

Each is the textbook form of what it names, and gradients come from autograd, never from the formulas that kernels use.
Given fp64 they are the oracle; given a narrower dtype they are what a user writes in eager PyTorch, whose error against
the oracle is the most that a kernel may have. N tokens, V vocabulary.
"""

import math

import torch
from torch import Tensor

LOG_FLOOR = -1e4  # log-probability of an entry that is −inf on one side only


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.nn.functional.linear(hidden, weight, bias)


def log_probs(x: Tensor, temperature: float = 1.0, scale: float = 1.0, softcap: float | None = None) -> Tensor:
    z = x * scale
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    out = torch.log_softmax(z / temperature, -1)
    return torch.where(out == -math.inf, LOG_FLOOR, out)


def kl(log_p: Tensor, log_m: Tensor) -> Tensor:
    """KL(p‖m) per row, 0·(anything) = 0."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_m), 0.0).sum(-1)


def log_mixture(log_p: Tensor, log_q: Tensor, pi: float) -> Tensor:
    if pi in (0.0, 1.0):
        return log_p if pi == 1.0 else log_q
    return torch.logsumexp(torch.stack([log_p + math.log(pi), log_q + math.log1p(-pi)]), 0)


def reverse_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    return kl(log_q, log_p)


def forward_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    return kl(log_p, log_q)


def jsd(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    m = log_mixture(log_p, log_q, beta)
    return beta * kl(log_p, m) + (1 - beta) * kl(log_q, m)


def skew_forward_kl(log_q: Tensor, log_p: Tensor, alpha: float) -> Tensor:
    return kl(log_p, log_mixture(log_p, log_q, alpha))


def skew_reverse_kl(log_q: Tensor, log_p: Tensor, alpha: float) -> Tensor:
    return kl(log_q, log_mixture(log_p, log_q, 1 - alpha))


def entropy(log_q: Tensor) -> Tensor:
    q = log_q.exp()
    return -torch.where(q > 0, q * log_q, 0.0).sum(-1)


FAMILY = {
    "reverse": reverse_kl,
    "forward": forward_kl,
    "jsd(0.3)": lambda log_q, log_p: jsd(log_q, log_p, 0.3),
    "skew_forward(0.1)": lambda log_q, log_p: skew_forward_kl(log_q, log_p, 0.1),
    "skew_reverse(0.1)": lambda log_q, log_p: skew_reverse_kl(log_q, log_p, 0.1),
}


def value_and_grad(function, *inputs: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """function(*inputs) in `dtype`, and the gradient of its sum by each input."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    value = function(*inputs)
    return value.detach(), *torch.autograd.grad(value.sum(), inputs)
