"""Kernels that make on-policy distillation of language models cheap."""

__version__ = "0.1.0"
