"""The options of `effopd-analyze updates`, apart from what it does: to explain or refuse them needs no PyTorch."""

import argparse
from typing import NoReturn

from ..errors import UserError


class Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} --help lists the options)")


def parser() -> Parser:
    p = Parser("effopd-analyze updates", description="What training did to the weights.")
    p.add_argument("--base", required=True, metavar="DIR", help="the model that training started from")
    p.add_argument("--checkpoints", nargs="+", metavar="DIR", help="checkpoints of one run, or LoRA adapters")
    p.add_argument(
        "--trajectory", action="extend", nargs="+", default=[], metavar="NAME=DIR,DIR",
        help="checkpoints of a run by name, for each run to be compared",
    )  # fmt: skip
    p.add_argument("--output_dir", required=True, metavar="OUT", help="a new folder")
    p.add_argument("--overwrite_output_dir", action="store_true", help="replace the analysis in --output_dir")
    p.add_argument("--rank", type=int, default=64, help="leading triplets of every matrix (default 64)")
    p.add_argument(
        "--ks", type=int, nargs="+", default=[1, 8, 64],
        help="subspaces whose alignment is followed, up to --rank (default 1 8 64)",
    )  # fmt: skip
    p.add_argument("--exact_spectrum", action="store_true", help="every singular value; the time it takes is estimated")
    p.add_argument("--device", help="where to compute, such as cuda (default cpu)")
    p.add_argument("--seed", type=int, default=0)
    return p
