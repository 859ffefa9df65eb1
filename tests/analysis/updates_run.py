"""The command, for torchrun."""

import sys

from effopd_kernels.analysis import cli

assert cli.main(sys.argv[1:]) == 0
