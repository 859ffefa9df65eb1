"""Runs `effopd-train` once per argument list read from stdin (JSON), in one process because importing transformers
takes seconds; prints one JSON line per run: exit code and what went to stderr."""

import contextlib
import io
import json
import sys

from effopd_kernels.train.cli import main

for argv in json.load(sys.stdin):
    stderr, stdout = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(stdout):
        try:
            code = main(argv)
        except SystemExit as e:  # argparse
            code = e.code
    print(json.dumps({"code": code, "stderr": stderr.getvalue(), "stdout": stdout.getvalue()}), flush=True)
