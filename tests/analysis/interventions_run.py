"""`effopd-analyze` with the arguments given, as a process of its own; leaves through the end of the script."""

import sys

from effopd_kernels.analysis.cli import main

if code := main(sys.argv[1:]):
    raise SystemExit(code)
