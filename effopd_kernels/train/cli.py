"""`effopd-train`: one command from prompts, a teacher and a student to a distilled student.

Exit codes: 0 done; 2 something given was wrong (one sentence on stderr); 130 interrupted (once training has begun, with
a checkpoint of the last completed step).
"""

import sys
from pathlib import Path

from ..commands import (
    EXIT_USER_ERROR,
    interrupted,
    leave_process_group,
    print_anywhere,
    refused,
    something_was_said,
)
from ..errors import UserError
from .checkpoint import checkpoints
from .demo import run_demo
from .errors import NonFiniteLossError
from .options import parse
from .run import run


def main(argv: list[str] | None = None) -> int:
    """The console script. Returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    print_anywhere()
    args = None
    try:
        data, args, model_args = parse(argv)
        if data.demo:
            run_demo(argv, args)
        else:
            run(data, args, model_args)
    except (UserError, NonFiniteLossError) as e:
        return refused("effopd-train", str(e))
    except KeyboardInterrupt:
        there = args is not None and not data.demo and checkpoints(Path(args.output_dir))
        return interrupted("effopd-train", "; go on with --resume_from_checkpoint" if there else "")
    except Exception:
        if not something_was_said():
            raise
        return EXIT_USER_ERROR  # the rank that found the error is gone, which is all that this one could tell
    leave_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
