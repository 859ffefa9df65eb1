"""What launches of kernels on a GPU have in common."""

from contextlib import AbstractContextManager, nullcontext

import torch


def options(warps: int, **others: int) -> dict[str, int]:
    """Options to compile a kernel with. That x·y + z be one instruction, Triton will have to be told from 3.10 on."""
    return {"num_warps": warps, "enable_fp_fusion": True, **others}


def on_device(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device, which is to be this one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is captured from the device's current stream."""
    if device.type != "cuda" or torch.compiler.is_compiling() or not torch.cuda.is_available():  # the last: fakes
        return False
    with on_device(device):
        return torch.cuda.is_current_stream_capturing()


def uploaded(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU's on the device; nothing waits. Raises RuntimeError where a CUDA graph is being captured: it
    would read this memory at every replay, when others have it.
    """
    if tensor.device != device and capturing(device):
        raise RuntimeError(
            "a CUDA graph that is being captured cannot take numbers from the CPU: pass them as tensors on the device, "
            "and call once before capturing, which leaves tables of addresses there"
        )
    return tensor.to(device, non_blocking=True)
