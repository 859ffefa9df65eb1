"""The console script `effopd-train`, outside the folder that cannot be imported without its extra: where it is not
installed, that is one sentence and exit code 2, not the ImportError that `import effopd_kernels.train` is."""

import sys

from .commands import interrupted, refused
from .errors import UserError


def main() -> int:
    """Returns the exit code, see `train.cli`."""
    try:
        from .train.cli import main as train
    except UserError as error:
        return refused("effopd-train", str(error))
    except KeyboardInterrupt:  # within the seconds that importing takes
        return interrupted("effopd-train")
    return train()


if __name__ == "__main__":
    sys.exit(main())
