"""What importing costs, and where the package still works."""

import os
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path

import pytest

from effopd_kernels import commands


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def needs(*names: str) -> pytest.MarkDecorator:
    missing = [name for name in names if find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def test_import_brings_no_heavy_package():
    run(
        """
        import sys
        import effopd_kernels
        heavy = {"transformers", "trl", "datasets", "matplotlib", "accelerate", "peft", "pandas"} & set(sys.modules)
        assert not heavy, heavy
        """
    )


def test_help_and_wrong_options_need_no_torch():
    said = run(
        """
        import sys
        import effopd_kernels
        from effopd_kernels.analysis.cli import main
        assert main(["--help"]) == 0 and main(["updates", "--rank", "8"]) == 2 and main(["nothing"]) == 2
        try:
            main(["updates", "--help"])
        except SystemExit as done:
            assert done.code == 0
        assert not {"torch", "numpy"} & set(sys.modules)
        assert {*effopd_kernels.__all__} <= {*dir(effopd_kernels)}
        assert not hasattr(effopd_kernels, "nothing") and "torch" not in sys.modules
        for name in effopd_kernels.__all__:
            assert getattr(effopd_kernels, name) is not None
        from effopd_kernels import lowrank
        assert lowrank.batched_rsvd is effopd_kernels.batched_rsvd
        """
    )
    assert said.count("usage: effopd-analyze") == 2


@needs("trl", "peft", "matplotlib", "pyarrow", "sklearn")
def test_an_interrupt_while_importing_is_one_sentence():
    run(
        """
        import contextlib, io, sys
        from effopd_kernels.analysis.cli import main as analyze
        from effopd_kernels.train_command import main as train

        class Impatient:
            def find_spec(self, name, *_):
                if name == "torch":
                    raise KeyboardInterrupt

        sys.meta_path.insert(0, Impatient())
        updates = ["updates", "--base", "a", "--checkpoints", "b", "--output_dir", "c"]
        for command, call in (("effopd-analyze", lambda: analyze(updates)), ("effopd-train", train)):
            with contextlib.redirect_stderr(io.StringIO()) as said:
                assert call() == 130
            assert said.getvalue() == f"{command}: interrupted\\n"
        """
    )


def test_output_that_nobody_reads_ends_a_command_quietly(monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as unread:
        monkeypatch.setattr(sys, "stdout", unread)
        for text in "short", "long" * 10_000:
            with pytest.raises(SystemExit) as stopped, commands.printed_and_done():
                print(text)
            assert stopped.value.code == 0


def test_the_module_of_a_command_is_the_command():
    """Asked without TRL, which answers soonest."""
    code = "import runpy, sys; sys.modules['trl'] = None; runpy.run_module(sys.argv[1], run_name='__main__')"
    asked = [sys.executable, "-c", code, "effopd_kernels.train_command"]
    result = subprocess.run(asked, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and "effopd-train: error: effopd_kernels.train needs trl" in result.stderr


# `sys.modules[name] = None` makes `import name` fail as it does where it is not installed.
LOSS = """
    import sys, warnings
    sys.modules[{missing!r}] = None
    import torch, effopd_kernels as ek
    s, t = (torch.randn(3, 40) for _ in range(2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            loss = ek.reverse_kl_loss(s.requires_grad_(), t)
            loss.backward()
            ek.linear_reverse_kl_loss(torch.randn(3, 8), torch.randn(40, 8), torch.randn(3, 8), torch.randn(40, 8))
        p, w = torch.zeros(5), torch.ones(5)
        ek.extrapolate_([p], [torch.zeros(5)], [w], 3.0)
        ek.batched_rsvd(torch.randn(6, 5), 2)
    assert p.tolist() == [3.0] * 5
    expected = (s.softmax(-1) * (s.log_softmax(-1) - t.log_softmax(-1))).sum(-1).mean()
    assert abs(loss - expected) < 1e-5
    print([str(w.message) for w in caught])
"""


def test_works_without_triton():
    assert run(LOSS.format(missing="triton")).strip() == "[]"


def test_works_without_the_extension_and_says_so_once():
    said = run(LOSS.format(missing="effopd_kernels._C"))
    assert said.count("installed without its C++ extension") == 1


def test_a_warning_made_an_error_does_not_keep_the_package_from_working():
    run(
        """
        import sys, warnings
        sys.modules["effopd_kernels._C"] = None
        import torch, effopd_kernels as ek
        warnings.simplefilter("error")
        try:
            ek.reverse_kl_loss(torch.zeros(2, 5), torch.eye(2, 5))
        except RuntimeWarning as warning:
            assert "installed without its C++ extension" in str(warning)
        else:
            raise AssertionError("said nothing")
        assert ek.reverse_kl_loss(torch.zeros(2, 5), torch.eye(2, 5)) > 0
        """
    )


def test_tests_are_collected_without_the_extension():
    tests = [str(Path(__file__).parent / idea) for idea in ("divergence", "extrapolation", "lowrank")]
    run(
        f"""
        import sys
        sys.modules["effopd_kernels._C"] = None
        import pytest
        assert pytest.main(["--collect-only", "-q", "--no-header", *{tests!r}]) == 0
        """
    )


@needs("trl", "peft")
def test_the_trainer_names_what_is_missing_before_any_training():
    run(
        """
        import importlib.util
        find = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *rest: None if name == "matplotlib" else find(name, *rest)
        try:
            import effopd_kernels.train
        except ImportError as error:
            assert str(error) == "effopd_kernels.train needs matplotlib: pip install effopd-kernels[train]", error
        else:
            raise AssertionError("imported")
        """
    )


@needs("matplotlib", "pyarrow", "sklearn")
def test_every_benchmark_is_collected_from_its_folder():
    """`pytest benchmarks/ --benchmark-only` finds files by pattern, not by name."""
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "pytest", "benchmarks", "--collect-only", "-q"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    for file in (root / "benchmarks").glob("bench_*.py"):
        assert f"benchmarks/{file.name}::test_" in listed


def test_the_readme_shows_what_was_measured():
    root = Path(__file__).parents[1]
    if not (root / "benchmarks" / "results").is_dir():
        pytest.skip("measurements are not packed")
    table = subprocess.run(
        [sys.executable, root / "benchmarks" / "table.py"], capture_output=True, text=True, check=True
    )
    assert table.stdout in (root / "README.md").read_text()
