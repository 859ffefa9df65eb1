"""`effopd-analyze`: what training did to the weights, from checkpoints on disk.

Exit codes: 0 done; 2 something given was wrong or could not be read or written (one sentence on stderr); 130
interrupted, by Ctrl-C or SIGTERM. After either nothing was written, or, with `interventions`, what was done is kept and
the same command goes on.
"""

import gc
import os
import sys
from importlib.util import find_spec

from ..commands import EXIT_USER_ERROR, interrupted, print_anywhere, refused
from ..errors import UserError, one_line
from .ahead import reading_ahead
from .painter import Painter

USAGE = """usage: effopd-analyze updates --base DIR --checkpoints DIR [DIR ...] --output_dir OUT
       effopd-analyze interventions ... --dataset_name NAME --eval_metric accuracy|teacher_kl

  updates         where updates go and along which directions, from the weights alone
  interventions   what edited models score: scaled, truncated, transplanted updates

effopd-analyze updates --help and effopd-analyze interventions --help list the options.
"""


def main(argv: list[str] | None = None) -> int:
    """The console script. Returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    print_anywhere()
    if sys.stderr is None:  # closed: notes and the progress are for nobody
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    command, arguments = (argv[0], argv[1:]) if argv else ("--help", [])
    try:
        if command in ("-h", "--help"):
            print(USAGE, end="")
            return 0 if argv else EXIT_USER_ERROR
        if command == "updates":
            run = _updates
        elif command == "interventions":
            _installed("analysis,train", "matplotlib", "pyarrow", "trl")
            from .interventions import main as run
        else:
            raise UserError(f"unknown command '{command}'; the commands are updates and interventions")
        run(arguments)
    except (UserError, OSError) as error:  # the latter: a file that is gone or not for this user
        known = isinstance(error, OSError) and error.filename and error.strerror
        why = f"{error.filename}: {error.strerror}" if known else one_line(error)
        return refused("effopd-analyze", why)
    except KeyboardInterrupt:
        return interrupted("effopd-analyze")
    return 0


def _installed(extras: str, *packages: str) -> None:
    if missing := [name for name in packages if find_spec(name) is None]:
        raise UserError(f"{' and '.join(missing)} must be installed: pip install effopd-kernels[{extras}]")


def _updates(arguments: list[str]) -> None:
    from .arguments import parser

    args = parser().parse_args(arguments)
    _installed("analysis", "matplotlib", "pyarrow", "sklearn")
    if "torch" in sys.modules or os.environ.get("RANK", "0") != "0":
        from .updates import main

        return main(args)
    named = (folder for text in args.trajectory for folder in text.partition("=")[2].split(","))
    with Painter() as painter:
        with reading_ahead([args.base, *(args.checkpoints or ()), *named]):
            gc.disable()  # what is imported stays: not to be searched for garbage while it comes, nor ever after
            try:
                from .updates import main

                gc.freeze()
            finally:
                gc.enable()
        main(args, painter)


if __name__ == "__main__":
    sys.exit(main())
