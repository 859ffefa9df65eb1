"""Measuring every tensor of a comparison, with all cores and all ranks.

Tensors are measured by as many threads as PyTorch uses, one core each: small matrices leave most of a shared team idle,
and while one thread reads the others compute. A GPU is driven by one: two must not load its kernels at once. Under
torchrun ranks share the tensors out by size, and no number depends on how.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from ..extrapolation.distributed import Ranks
from .comparison import Comparison
from .findings import Findings
from .matrix import Options
from .measure import Measured, measure
from .roles import role_of, token_embedding


def analyse(comparison: Comparison, options: Options, ranks: Ranks) -> Findings | None:
    """Measure every tensor, this rank its share; the findings on rank 0, None elsewhere."""
    try:
        measured = _measured(comparison, options, ranks)
    except BaseException as error:
        if ranks.size > 1:
            ranks.report(error)
        raise
    every = ranks.gather(measured)
    return Findings(comparison, options, [m for part in every for m in part]) if ranks.rank == 0 else None


def _measured(comparison: Comparison, options: Options, ranks: Ranks) -> list[Measured]:
    from tqdm import tqdm

    embedding = token_embedding({name: comparison.base.shapes[name][0] for name in comparison.names})
    mine = _share(comparison, ranks.rank, ranks.size)
    with _one_core_each() as workers, ThreadPoolExecutor(workers if options.device is None else 1) as pool:
        results = pool.map(lambda name: measure(comparison, name, options, name == embedding), mine)
        try:
            hidden = None if ranks.rank == 0 else True  # None: shown on a terminal only
            return list(tqdm(results, total=len(mine), unit="tensor", disable=hidden))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def estimate(comparison: Comparison, ranks: int) -> float:
    """Seconds that exact spectra will take, from one eigenproblem timed on one core: the Gram matrix (half of n·m²
    products) and its eigenvalues (m³) both scale as the third power.
    """
    m = 512
    x = torch.randn(m, m, dtype=torch.float64)
    with _one_core_each() as workers:
        gram, eigen = _timed(lambda: x @ x.mT) / 2, _timed(lambda: torch.linalg.eigvalsh(x @ x.mT))
    total = 0.0
    for name in comparison.names:
        shape = comparison.base.shapes[name][0]
        if role_of(name).part in ("attention", "mlp") and len(shape) >= 2:
            short, long = sorted(shape[-2:])
            total += torch.Size(shape[:-2]).numel() * (gram * long * short**2 + (eigen - 2 * gram) * short**3) / m**3
    return total * len(comparison.checkpoints()) / (ranks * workers)


def _timed(function: Callable[[], Any]) -> float:
    function()
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def _share(comparison: Comparison, rank: int, size: int) -> list[str]:
    """This rank's tensors, in the order they lie in the base: the largest go first to whoever has least to do."""
    load, mine = [0] * size, set()
    bytes_of = {n: torch.Size(shape).numel() * dtype.itemsize for n, (shape, dtype) in comparison.base.shapes.items()}
    for name in sorted(comparison.names, key=lambda n: (-bytes_of[n], n)):
        least = load.index(min(load))
        load[least] += bytes_of[name]
        if least == rank:
            mine.add(name)
    return [name for name in comparison.names if name in mine]


@contextmanager
def _one_core_each() -> Iterator[int]:
    """How many threads to measure with, while each operation keeps to one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield max(2, threads)
    finally:
        torch.set_num_threads(threads)
