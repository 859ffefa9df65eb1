"""The console script `effopd-train`, outside the folder that cannot be imported without its extra: where it is not
installed, that is one sentence and exit code 2, not the ImportError that `import effopd_kernels.train` is."""

import sys

from .errors import UserError


def main() -> int:
    """Returns the exit code, see `train.cli`."""
    try:
        from .train.cli import main as train
    except UserError as error:
        print(f"effopd-train: error: {error}", file=sys.stderr)
        return 2
    return train()
