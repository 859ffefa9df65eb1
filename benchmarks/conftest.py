"""Options and the closing tables of the benchmarks.

pytest benchmarks/ --benchmark-only [--quick] [--save-results]
"""

import json
import pathlib
import sys

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # for common.py

from common import device_name, table, when_and_with_what

_tables: list[tuple[str, str, list[dict]]] = []


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="smaller shapes and fewer rounds")
    parser.addoption("--save-results", action="store_true", help="write results/<device>/<idea>.json")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    if config.option.benchmark_only:  # which the default options, made for the tests, would contradict
        config.option.benchmark_disable = False


@pytest.fixture
def report(request, benchmark):
    """report(title, rows): rows go to benchmark.extra_info, the closing table and, on request, results/."""

    def add(title: str, rows: list[dict], **facts):
        benchmark.extra_info.update(title=title, rows=rows, **facts)
        _tables.append((request.path.stem.removeprefix("bench_"), title, rows))

    return add


def pytest_terminal_summary(terminalreporter, config):
    for _, title, rows in _tables:
        terminalreporter.write_line("\n" + table(title, rows))
    if not config.getoption("--save-results"):
        return
    for idea in dict.fromkeys(idea for idea, _, _ in _tables):
        path = pathlib.Path(__file__).parent / "results" / device_name() / f"{idea}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        stored = json.loads(path.read_text()) if path.exists() else {"results": {}}
        tables = {title: rows for i, title, rows in _tables if i == idea}
        stored |= {"device": device_name(), "threads": torch.get_num_threads()}
        stored["results"] |= tables
        stored["measured"] = stored.get("measured", {}) | dict.fromkeys(tables, when_and_with_what())
        path.write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n")
        terminalreporter.write_line(f"\nwrote {path}")
