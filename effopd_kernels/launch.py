"""What launches of Triton kernels have in common."""

from contextlib import AbstractContextManager, nullcontext

import torch


def options(warps: int, **others: int) -> dict[str, int]:
    """Options to compile a kernel with. That x·y + z be one instruction, Triton will have to be told from 3.10 on."""
    return {"num_warps": warps, "enable_fp_fusion": True, **others}


def on_device(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device, which is to be this one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
