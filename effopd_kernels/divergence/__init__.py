"""Student–teacher divergences over the vocabulary: value and gradient without N×V probabilities."""

from .autograd import DivergenceStats
from .family import FORWARD_KL, REVERSE_KL, Divergence, jsd, skew_forward_kl, skew_reverse_kl
from .linear import linear_divergence_loss, linear_reverse_kl_loss
from .logits import divergence_loss, reverse_kl_loss
from .partial import linear_token_logprobs, sampled_kl, topk_divergence_loss

__all__ = [
    "FORWARD_KL",
    "REVERSE_KL",
    "Divergence",
    "DivergenceStats",
    "divergence_loss",
    "jsd",
    "linear_divergence_loss",
    "linear_reverse_kl_loss",
    "linear_token_logprobs",
    "reverse_kl_loss",
    "sampled_kl",
    "skew_forward_kl",
    "skew_reverse_kl",
    "topk_divergence_loss",
]
