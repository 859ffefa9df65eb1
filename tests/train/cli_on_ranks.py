"""`effopd-train` on several ranks, the last of which gets more flags: cli_on_ranks.py FLAGS FLAGS_OF_THE_LAST."""

import json
import os
import sys

from effopd_kernels.train.cli import main

flags, of_last = map(json.loads, sys.argv[1:])
last = os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1)
sys.exit(main([*flags, *(of_last if last else [])]))
