"""Tests of what needs an extra are left out, and named at the top, where the extra is not installed."""

import signal
from importlib.util import find_spec

NEEDS = {
    "analysis": ("matplotlib", "pyarrow", "sklearn"),
    "analysis/test_edits.py": ("trl",),
    "analysis/test_interventions.py": ("trl",),
    "analysis/test_report.py": ("trl",),
    "test_examples.py": ("trl",),
    "train": ("trl", "peft"),
}
MISSING = {path: [name for name in names if find_spec(name) is None] for path, names in NEEDS.items()}
collect_ignore = [path for path, names in MISSING.items() if names]

# A shell starts background jobs with SIGINT ignored, which the processes of tests would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Up to a minute each: left for the end, they would keep one core while the others have nothing to do.
LONG = {
    f"test_{name}.py"
    for name in (
        "aot", "callback", "checkpoint", "citizenship", "cli", "demo", "distributed", "examples", "interventions",
        "sharded", "trainer", "triton",
    )
}  # fmt: skip


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONG)


def pytest_report_header():
    return [f"left out: tests/{path}, for want of {', '.join(names)}" for path, names in MISSING.items() if names]
