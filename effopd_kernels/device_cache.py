"""Small tensors on a device, made once and read by many launches: tables of addresses, test matrices."""

from collections.abc import Callable
from functools import lru_cache, wraps

import torch
from torch import Tensor

from .launch import capturing

captured: list[Tensor] = []  # read by a CUDA graph whenever it is replayed, whatever the caches forget


def device_cache(maxsize: int) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """lru_cache for functions that make a tensor, which is to be read only, and on the current stream of its device.

    A stream other than the one it was made on waits for it there, and its memory is not reused before that stream has
    read it. A CUDA graph can be captured wherever the tensor is made already, and keeps it.
    """

    def decorate(make):
        @lru_cache(maxsize)
        def made(*args):
            tensor = make(*args)
            stream = torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None
            return tensor, stream, stream and stream.record_event()

        @wraps(make)
        def cached(*args):
            tensor, home, done = made(*args)
            if not tensor.is_cuda:
                return tensor
            stream = torch.cuda.current_stream(tensor.device)
            if capturing(tensor.device):
                captured.append(tensor)
            elif stream != home:
                stream.wait_event(done)
                tensor.record_stream(stream)
            return tensor

        return cached

    return decorate
