"""``import anyattn`` needs torch alone; kernel packages that do not load are a reason and never a crash (promise 9)."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

import fresh

#: Neither imported nor needed. numpy and triton come with torch in some installations, but anyattn asks for neither.
FOREIGN = (
    "triton", "numpy", "flash_attn", "flash_attn_2_cuda", "flash_attn_interface", "flash_attn_3", "flash_attn_3_cuda",
    "flash_attn_config", "fa3_fwd", "fa3_fwd_interface", "fa3_fwd_config", "cutlass", "cudnn", "transformers",
    "diffusers",
    "typer", "rich", "platformdirs", "matplotlib", "pytest", "hypothesis", "einops",
)  # fmt: skip

#: Refuses the import of names, and says who asked for one that was refused.
BLOCKER = """
    import sys

    class Blocker:
        asked = []
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in BLOCKED:
                frame, callers = sys._getframe(1), []
                while frame is not None:
                    callers.append(frame.f_globals.get("__name__", ""))
                    frame = frame.f_back
                if any(c.partition(".")[0] == "anyattn" for c in callers):
                    first = next(c for c in callers if not c.startswith("importlib"))
                    if first.partition(".")[0] == "anyattn":
                        Blocker.asked.append(f"{first} asked for {name}")
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            return None
"""


def python(code: str, *, path: Path | None = None, **env: str) -> str:
    """Run code in an interpreter that has imported torch alone; its output."""
    result = fresh.run(code, () if path is None else (path,), **env)
    assert result.returncode == 0, result.stderr
    return result.stdout


def new_python(code: str) -> str:
    """Run code in an interpreter that has imported nothing; its output."""
    result = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:anyattn", "-c", textwrap.dedent(code)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def blocked(code: str, names: tuple[str, ...] = FOREIGN, run: Callable[[str], str] = new_python) -> str:
    """Run code in a process in which these packages are not there."""
    return run(
        f"BLOCKED = {names!r}\n"
        + textwrap.dedent(BLOCKER)
        + "\nsys.meta_path.insert(0, Blocker())\n"
        + textwrap.dedent(code)
    )


def test_import_needs_torch_alone() -> None:
    """And packaging, which is declared. A call on the CPU needs no more."""
    code = """
        import warnings
        warnings.simplefilter("ignore")  # torch speaks of a missing numpy
        import torch, anyattn
        assert not Blocker.asked, Blocker.asked
        x = torch.ones(1, 4, 2, 8, requires_grad=True)
        anyattn.attention(x, x, x, causal=True).sum().backward()
        p = anyattn.Packing.from_lengths([2, 1], 4)
        y = torch.ones(p.rows, 2, 8)
        anyattn.attention(y, y, y, packing=p, backend="reference")
        assert str(anyattn.explain(x, x, x, on="sm90"))
        table = anyattn.backends()
        assert table["torch"].runs_here and table["reference"].runs_here
        assert not any(name.partition(".")[0] in BLOCKED for name in sys.modules)
        print("done")
    """
    assert blocked(code).strip() == "done"


def test_the_blocker_can_fail() -> None:
    """The test above notices an import that should not be."""
    with pytest.raises(AssertionError, match="No module named 'torch'"):
        blocked("import anyattn", ("torch",))


def test_import_and_probing_import_nothing_foreign() -> None:
    """Also where the packages are installed: neither import, nor a call on the CPU, nor ``explain`` loads them."""
    code = f"""
        import sys, torch
        before = set(sys.modules)
        path = list(sys.path)
        import anyattn
        x = torch.ones(1, 4, 2, 8)
        anyattn.attention(x, x, x, causal=True)
        anyattn.explain(x, x, x, on="sm90")
        new = {{name.partition(".")[0] for name in set(sys.modules) - before}}
        assert not new & set({FOREIGN!r}), new & set({FOREIGN!r})
        assert sys.path == path
        assert not any(name.startswith("anyattn.cli") for name in sys.modules)
        print(*sorted(name for name in new if not name.startswith("_")))
    """
    allowed = {"anyattn", "packaging"} | set(sys.stdlib_module_names)
    assert set(new_python(code).split()) - allowed <= {"torch"}


def test_import_reads_no_cuda() -> None:
    """No CUDA context is made by importing, for a process that forks later."""
    code = """
        import torch, anyattn
        x = torch.ones(1, 4, 2, 8)
        anyattn.attention(x, x, x)
        assert not torch.cuda.is_initialized()
    """
    python(code)


# --- packages that are there and do not load -----------------------------------------------------------------------

#: Ways in which a kernel package fails at import, as seen: a renamed attribute, a missing symbol, a wrong torch.
FAILURES = {
    "attribute": "import math; math.no_such_thing",
    "import": "import no_such_module_anywhere",
    "os": "raise OSError('libcudart.so.12: cannot open shared object file')",
    "type": "raise TypeError('unexpected keyword\\nsecond line of it')",
    "syntax": "def (",
    "runtime": "raise RuntimeError('CUDA driver is too old')",
    "assertion": "assert False",
    "exit": "raise SystemExit(1)",
}


def fake_flash_attn_4(folder: Path, body: str) -> None:
    """An installed flash-attn-4 whose package does what ``body`` says."""
    package = folder / "flash_attn" / "cute"
    package.mkdir(parents=True)
    lines = ["import sys", "sys.path.insert(0, '/a/folder/that/shadows/utils')", body]
    (package / "__init__.py").write_text("\n".join(lines))
    (package / "interface.py").write_text("\n".join(lines))
    for name, version in (("flash_attn_4", "4.0.0b36"), ("nvidia_cutlass_dsl", "4.8.1")):
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")
        (info / "RECORD").write_text("")


@pytest.mark.parametrize("kind", FAILURES)
def test_a_package_that_does_not_import_is_a_reason(kind: str, tmp_path: Path) -> None:
    """``backends()`` names the failure in one line; attention runs on what is left; sys.path is as it was."""
    fake_flash_attn_4(tmp_path, FAILURES[kind])
    code = """
        import sys, torch
        torch.backends.cuda.is_built = lambda: True  # else the package would not even be tried here
        path = list(sys.path)
        import anyattn
        table = anyattn.backends()
        status = table["fa4"]
        assert not status.runs_here
        assert status.version == "4.0.0b36", status.version
        assert status.reason and "\\n" not in status.reason, status.reason
        assert table["torch"].runs_here
        x = torch.ones(1, 4, 2, 8)
        anyattn.attention(x, x, x)
        try:
            anyattn.attention(x, x, x, backend="fa4")
        except anyattn.NoBackend as error:
            assert "fa4" in str(error)
        else:
            raise AssertionError("another backend ran")
        assert sys.path == path, sys.path
        print(status.reason)
    """
    reason = python(code, path=tmp_path)
    expected = {
        "attribute": "AttributeError", "import": "No module named", "os": "libcudart", "type": "TypeError",
        "syntax": "SyntaxError", "runtime": "driver is too old", "assertion": "AssertionError", "exit": "SystemExit",
    }  # fmt: skip
    assert expected[kind] in reason


def test_a_package_that_is_not_installed_is_a_reason(tmp_path: Path) -> None:
    code = """
        import anyattn
        status = anyattn.backends()["fa4"]
        assert status.version is None and not status.runs_here
        assert "flash-attn-4" in status.install
        print(status.reason)
    """
    assert blocked(code, ("flash_attn", "cutlass"), python).strip()


def test_a_metadata_version_that_is_none_does_not_crash(tmp_path: Path) -> None:
    """Source builds carry versions such as "4.0.0b36+local" or worse."""
    fake_flash_attn_4(tmp_path, "pass")
    info = tmp_path / "flash_attn_4-4.0.0b36.dist-info"
    for version in ("4.0.0b36+abc.d2026", "0.0.0+unknown", "not-a-version"):
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: flash-attn-4\nVersion: {version}\n")
        code = """
            import torch, anyattn
            x = torch.ones(1, 4, 2, 8)
            anyattn.attention(x, x, x)
            print(anyattn.backends()["fa4"])
        """
        assert "fa4" in python(code, path=tmp_path)


# --- environment variables -----------------------------------------------------------------------------------------


def test_anyattn_log_sends_choices_to_standard_error() -> None:
    code = """
        import sys
        sys.stderr = sys.stdout
        import torch, anyattn
        x = torch.ones(1, 4, 2, 8)
        for _ in range(3):
            anyattn.attention(x, x, x, causal=True)
    """
    assert python(code) == ""
    said = python(code, ANYATTN_LOG="info").splitlines()
    assert len(said) == 1
    assert said[0].startswith("anyattn: ")
    assert "torch:cpu" in said[0]
    assert "use debug, info, warning or error" in python(code, ANYATTN_LOG="loud")


def test_anyattn_backend_of_a_process() -> None:
    code = """
        import torch, anyattn
        x = torch.ones(1, 4, 2, 8)
        print(anyattn.explain(x, x, x).chosen)
    """
    assert python(code).strip() == "torch"
    assert python(code, ANYATTN_BACKEND="reference").strip() == "reference"
