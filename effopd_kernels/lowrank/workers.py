"""Threads whose every operation is single-threaded.

The last bits of a product depend on how many threads take part in it, and for a few hundred columns their waiting for
each other costs more than they gain. So on the CPU whole matrices are factored side by side, one to a thread, and where
fewer matrices are left than there are threads, the panels of each are shared out. No result depends on that, nor on the
number of threads.
"""

import ctypes
import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")
Function = TypeVar("Function", bound=Callable)


def without_autocast(function: Function) -> Function:
    """Products keep the dtypes that they were written for, whatever the caller's own are rounded to."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return run


@functools.cache
def _own_setters() -> list[Callable[[int], object]]:
    """What sets the calling thread's count, and no other's, in the libraries that PyTorch computes with; empty where
    they are out of reach.
    """
    names = ["omp_set_num_threads"] * torch.backends.openmp.is_available()
    names += ["MKL_Set_Num_Threads_Local"] * torch.backends.mkl.is_available()
    found = {}
    for library in (torch._C.__file__, None):  # what is loaded for all, as by LD_PRELOAD, is what PyTorch calls instead
        for name in names:
            with suppress(OSError, AttributeError, TypeError):  # the last is what None is on Windows
                found[name] = getattr(ctypes.CDLL(library), name)
    return list(found.values()) if len(found) == len(names) else []


def _set_own_threads(count: int) -> bool:
    """torch.set_num_threads(count) for the calling thread alone. False where only PyTorch's own was within reach, whose
    count all threads get that are started later.
    """
    torch.get_num_threads()  # a thread takes over the default count when it first asks: before it is set, then
    for set_own in _own_setters():
        set_own(count)
    if torch.get_num_threads() == count:
        return True
    torch.set_num_threads(count)
    return False


_local = threading.local()  # team: the one this thread belongs to; shares: it takes panels of other threads' matrices


class _Team:
    """As many threads for matrices and as many for panels, each with operations of one thread."""

    def __init__(self, threads: int):
        self.threads, self.matrices = threads, 0  # those being worked on
        self.lock, self.default_changed = threading.Lock(), False
        ready = threading.Barrier(2 * threads + 1)
        self.drivers, self.sharers = pools = [
            ThreadPoolExecutor(threads, "effopd-lowrank", self._start, (ready, shares)) for shares in (False, True)
        ]
        try:
            for pool in pools:
                for _ in range(threads):
                    pool.submit(ready.wait)
            ready.wait()
        except BaseException as error:
            with self.lock:  # no thread sets a count after this
                ready.abort()
            for pool in pools:  # else Python would wait at its exit for threads that wait for work
                pool.shutdown(wait=False)
            if not isinstance(error, RuntimeError):  # which is that no thread can be started: `submitted` does without
                raise
        finally:
            if self.default_changed:
                torch.set_num_threads(threads)

    def _start(self, ready: threading.Barrier, shares: bool) -> None:
        with self.lock:
            if not ready.broken and not _set_own_threads(1):
                self.default_changed = True
        _local.team, _local.shares = self, shares

    def drive(self, function: Callable[[Item], Result], item: Item) -> Result:
        with self.lock:
            self.matrices += 1
        try:
            with torch.no_grad():
                return function(item)
        finally:
            with self.lock:
                self.matrices -= 1


_team = functools.cache(_Team)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_team.cache_clear)  # threads stay behind


def side_by_side(
    function: Callable[[Item], Result], items: Iterable[Item], at_once: int | None = None
) -> Iterator[Result]:
    """function(item) of every matrix, in order, without gradients. Items are drawn as threads become free; ``at_once``
    limits how many are held besides the one drawn last, by default to one for each thread.
    """
    threads = torch.get_num_threads()
    if threads == 1:  # of a team, or all there are
        return map(torch.no_grad()(function), items)
    team = _team(threads)
    return _in_order(team.drivers, functools.partial(team.drive, function), items, at_once or threads)


def shared_out(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """function(item) of every panel of a matrix, in order."""
    team = getattr(_local, "team", None)
    if team is None:
        threads = torch.get_num_threads()
        if threads == 1:
            return map(function, items)
        team = _team(threads)
    elif _local.shares or team.matrices >= team.threads:
        return map(function, items)
    return _in_order(team.sharers, function, items, team.threads)


def submitted(pool: ThreadPoolExecutor, function: Callable[[Item], Result], item: Item) -> Future[Result]:
    """function(item) in the pool, or, once the main thread has ended, which closes pools under threads that go on,
    here and now.
    """
    try:
        return pool.submit(function, item)
    except RuntimeError:
        future, threads = Future(), torch.get_num_threads()
        _set_own_threads(1)
        try:
            future.set_result(function(item))
        finally:
            _set_own_threads(threads)
        return future


def _in_order(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[Result]:
    waiting, inference = deque(), torch.is_inference_mode_enabled()

    def run(item: Item) -> Result:
        with torch.inference_mode(inference):  # tensors made in it can be written in it alone
            return function(item)

    try:
        for item in items:
            waiting.append(submitted(pool, run, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
