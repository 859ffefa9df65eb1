"""`effopd-analyze updates`: everything that the weights alone tell, read once.

Tensors are measured by as many threads as PyTorch uses, one core each: small matrices leave most of a shared team idle,
and while one thread reads the others compute. Under torchrun ranks share the tensors out by size and rank 0 writes.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..errors import UserError
from ..extrapolation.distributed import Ranks
from .checkpoints import FLOATS, Comparison, compare, listed
from .findings import Findings
from .measure import Measured, Options, measure
from .output import check_free, whole_folder
from .report import REPORT_NAME, write_report
from .roles import role_of

ALONE = "training"  # the name of the only trajectory


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("effopd-analyze updates", description="What training did to the weights.")
    p.add_argument("--base", required=True, metavar="DIR", help="the model that training started from")
    p.add_argument("--checkpoints", nargs="+", metavar="DIR", help="checkpoints of one run, or LoRA adapters")
    p.add_argument(
        "--trajectory", action="append", default=[], metavar="NAME=DIR,DIR",
        help="checkpoints of a run by name; give it again for each run to be compared",
    )  # fmt: skip
    p.add_argument("--output_dir", required=True, metavar="OUT", help="a new folder")
    p.add_argument("--overwrite_output_dir", action="store_true", help="replace what is in --output_dir")
    p.add_argument("--rank", type=int, default=64, help="leading triplets of every matrix (default 64)")
    p.add_argument(
        "--ks", type=int, nargs="+", default=[1, 8, 64], help="subspaces whose alignment is followed (default 1 8 64)"
    )
    p.add_argument("--exact_spectrum", action="store_true", help="every singular value; the time it takes is estimated")
    p.add_argument("--device", help="where to compute, such as cuda (default cpu)")
    p.add_argument("--seed", type=int, default=0)
    return p


def main(arguments: Sequence[str]) -> Path:
    """The sub-command. Returns the path of the report.

    Raises:
        UserError: before any work; see `compare`, `check_free` and `trajectories_of`.
    """
    args = _parsed(arguments)
    if missing := [name for name in ("matplotlib", "pyarrow", "sklearn") if find_spec(name) is None]:
        raise UserError(f"{' and '.join(missing)} must be installed: pip install effopd-kernels[analysis]")
    trajectories = trajectories_of(args.checkpoints, args.trajectory)
    if args.rank < 1 or min(args.ks) < 1:
        raise UserError(f"--rank and --ks must be positive, not {args.rank} and {args.ks}")
    ks = tuple(sorted({min(k, args.rank) for k in args.ks}))
    options = Options(args.rank, ks, args.exact_spectrum, seed=args.seed, device=args.device)
    with _ranks() as ranks:
        comparison = _checked(args, trajectories, ranks)
        if ranks.rank == 0 and options.exact:
            print(f"exact spectra: about {estimate(comparison, ranks.size):.0f} s", file=sys.stderr)
        began = time.perf_counter()
        found = analyse(comparison, options, ranks)
        if found is None:
            return Path(args.output_dir) / REPORT_NAME
        seconds = time.perf_counter() - began
        with whole_folder(args.output_dir) as folder:
            write_all(found, folder, {"seconds to read and measure": round(seconds, 1), "ranks": ranks.size})
    path = Path(args.output_dir) / REPORT_NAME
    print(path)
    return path


def trajectories_of(checkpoints: Sequence[str] | None, named: Sequence[str]) -> dict[str, list[str]]:
    """name → folders, from --checkpoints and every --trajectory NAME=DIR,DIR."""
    if bool(checkpoints) == bool(named):
        raise UserError("give either --checkpoints DIR [DIR ...] or one or more --trajectory NAME=DIR,DIR")
    if checkpoints:
        return {ALONE: list(checkpoints)}
    out: dict[str, list[str]] = {}
    for text in named:
        name, _, folders = text.partition("=")
        paths = [path for path in folders.split(",") if path]
        if not name or not paths:
            raise UserError(f"--trajectory '{text}' must be NAME=DIR,DIR")
        if name in out:
            raise UserError(f"--trajectory {name} is given twice; list its folders in one, separated by commas")
        out[name] = paths
    return out


def analyse(comparison: Comparison, options: Options, ranks: Ranks | None = None) -> Findings | None:
    """Measure every tensor, this rank its share; the findings on rank 0, None elsewhere."""
    from tqdm import tqdm

    ranks = ranks or Ranks()
    token_embedding = _token_embedding(comparison)
    mine = _share(comparison, ranks.rank, ranks.size)
    measured: list[Measured] = []
    error: BaseException | None = None
    try:
        with (
            _one_core_each() as workers,
            tqdm(total=len(mine), unit="tensor", disable=None if ranks.rank == 0 else True) as bar,
            ThreadPoolExecutor(workers) as pool,
        ):
            try:
                for result in pool.map(lambda n: measure(comparison, n, options, n == token_embedding), mine):
                    measured.append(result)
                    bar.update()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    except BaseException as failure:
        error = failure
        if ranks.size == 1:
            raise
    every = ranks.gather(measured, error)
    if error is not None:
        raise error
    return Findings(comparison, options, [m for part in every for m in part]) if ranks.rank == 0 else None


def write_all(found: Findings, folder: Path, settings: dict[str, Any]) -> None:
    """Tables, figures and the report of one analysis into ``folder``."""
    from .allocation import allocation
    from .embeddings import embeddings
    from .spectra import spectra
    from .subspaces import subspaces

    sections, headlines = [], []
    for part in (allocation, spectra, subspaces):
        own, numbers = part(found, folder)
        sections += own
        headlines += numbers
    sections += embeddings(found, folder)
    if len(found.trajectories) == 1:  # a column of one word
        sections = [replace(s, table=[_without(row, "trajectory") for row in s.table or ()]) for s in sections]
    comparison, options = found.comparison, found.options
    notes = [*comparison.notes, *_warnings(found)]
    for note in notes:
        print(f"effopd-analyze: {note}", file=sys.stderr)
    compared = {
        "base": comparison.base.path,
        **{t: ", ".join(str(c.path) for c in checkpoints) for t, checkpoints in comparison.trajectories.items()},
    }
    asked = {
        "rank of the factors": options.rank,
        "subspaces followed": ", ".join(map(str, options.ks)),
        "spectra": "exact" if options.exact else "leading factors, the rest sampled; exact where that is no slower",
        "seed": options.seed,
        "device": options.device or "cpu",
    }
    write_report(
        folder, "What training did to the weights", sections, {**compared, **asked, **settings},
        lead=_lead(comparison), headlines=headlines, notes=notes,
    )  # fmt: skip


def estimate(comparison: Comparison, ranks: int = 1) -> float:
    """Seconds that exact spectra will take, from one eigenproblem timed here: both the Gram (n·m² products) and its
    eigenvalues (m³) scale as the third power.
    """
    m = 384
    x = torch.randn(m, m, dtype=torch.float64)
    gram, eigen = (_timed(lambda f=f: f()) for f in (lambda: x @ x.mT, lambda: torch.linalg.eigvalsh(x @ x.mT)))
    total = 0.0
    for name in comparison.names:
        shape = comparison.base.shapes[name][0]
        if role_of(name).part in ("attention", "mlp") and len(shape) >= 2:
            short, long = sorted(shape[-2:])
            count = torch.Size(shape[:-2]).numel()
            total += count * (gram * long * short**2 + (eigen - gram) * short**3) / m**3
    return total * len(comparison.checkpoints()) / ranks


def _timed(function: Callable[[], Any]) -> float:
    function()
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    p = parser()
    p.error = lambda message: (_ for _ in ()).throw(
        UserError(f"{message} (effopd-analyze updates --help lists the options)")
    )
    return p.parse_args(list(arguments))


@contextmanager
def _ranks() -> Iterator[Ranks]:
    """This process among those torchrun started, if it did."""
    import os

    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield Ranks()
        return
    dist.init_process_group("gloo")
    try:
        yield Ranks()
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _checked(args: argparse.Namespace, trajectories: dict[str, list[str]], ranks: Ranks) -> Comparison:
    """Every rank opens the folders and finds the same faults; only the first looks at the output's."""
    if ranks.rank == 0:
        check_free(args.output_dir, args.overwrite_output_dir)
    if args.device is not None:
        try:
            torch.empty(0, device=args.device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"--device {args.device} is not available here: {str(error).splitlines()[0]}") from error
    return compare(args.base, trajectories)


def _token_embedding(comparison: Comparison) -> str | None:
    """The embedding with the most rows: positions have fewer."""
    shapes = {n: comparison.base.shapes[n][0] for n in comparison.names if role_of(n).type == "embedding"}
    matrices = [n for n, shape in shapes.items() if len(shape) == 2]
    return max(matrices, key=lambda n: shapes[n][0], default=None)


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


def _without(row: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k != key}


def _lead(comparison: Comparison) -> str:
    shapes = [comparison.base.shapes[name] for name in comparison.names]
    parameters = sum(torch.Size(shape).numel() for shape, _ in shapes)
    dtypes = " and ".join(str(d).removeprefix("torch.") for d in FLOATS if any(d == dtype for _, dtype in shapes))
    runs = "; ".join(
        f"{t}: {c[-1].label}" if len(c) == 1 else f"{t}: {len(c)} checkpoints, {c[0].label} to {c[-1].label}"
        for t, c in comparison.trajectories.items()
    )
    kind = comparison.base.config.get("model_type")
    return (
        f"ΔW = W − W₀ with W₀ = {comparison.base.label}{f' ({kind})' if kind else ''}: {parameters:,} parameters "
        f"in {len(shapes)} tensors, {dtypes}. {runs}."
    )


def _warnings(found: Findings) -> list[str]:
    """What a reader must know: checkpoints that equal the base, tensors that are not finite."""
    out = []
    for trajectory, position, checkpoint in found.comparison.checkpoints():
        progress = found.comparison.progress[trajectory][position]
        own = [r for r in found.rows if r["trajectory"] == trajectory and r["progress"] == progress]
        if bad := [r["tensor"] for r in own if r["non_finite"]]:
            out.append(f"NaN or infinite in {checkpoint.path}, so left out of its numbers: {listed(bad)}.")
        elif not any(r["update_norm"] for r in own):
            out.append(f"{checkpoint.path} equals the base: every entry of every tensor is the same.")
    return out
