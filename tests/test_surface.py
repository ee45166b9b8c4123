"""What is public is frozen, and the files know of each other only what they may."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

import anyattn
from cases import BACKENDS

SOURCE = Path(anyattn.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

#: The names that users may rely on. A change here is a change of the public interface.
PUBLIC = {
    "AnyattnError", "Attention", "BackendStatus",
    "ContextError",
    "ContextParallel",
    "ContextPlan", "DeviceError", "DtypeError", "Explanation", "InvalidArgument", "MissingExtra",
    "NoBackend", "Packing", "PackingError", "Reason", "ShapeError", "UnknownBackend", "Unsupported", "attention",
    "backends", "explain", "integrations", "use", "warm_up",
}  # fmt: skip

#: The environment variables of anyattn, and those of others that it honours or sets: file -> names.
ENVIRONMENT = {"ANYATTN_BACKEND", "ANYATTN_LOG", "ANYATTN_CACHE_DIR"}
OTHERS_ENVIRONMENT = {
    "_context/_exchange.py": {"TORCH_NCCL_HIGH_PRIORITY"},  # whether what NCCL starts goes first
    "integrations/transformer_engine.py": {"NVTE_ALLOW_NONDETERMINISTIC_ALGO"},  # Transformer Engine's own
    "backends/flex.py": {"CXX"},  # the compiler that torch's own compiler would use
    "backends/fa4.py": {"FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"},  # the package's own cache of compiled kernels
    "cli/_render.py": {"COLUMNS"},  # a terminal's width
    "_warm_up.py": {"LOCAL_RANK"},  # torchrun's
}


def module_name(file: Path) -> str:
    """``anyattn.backends.torch``."""
    parts = ["anyattn", *file.relative_to(SOURCE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def imports(file: Path) -> frozenset[str]:
    """Every module that a file imports, at the top or inside functions, but for type checking only."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    modules = {module_name(f) for f in FILES}
    return frozenset(name for name in found if not name.startswith("anyattn") or name in modules)


@functools.cache
def strings(file: Path) -> frozenset[str]:
    """Every string in a file that is neither a docstring nor a statement of its own."""
    tree = ast.parse(file.read_text())
    docs = {id(n.body[0].value) for n in ast.walk(tree)
            if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef)) and n.body
            and isinstance(n.body[0], ast.Expr)}  # fmt: skip
    docs |= {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    constants = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return frozenset(n.value for n in constants if id(n) not in docs)


# --- frozen --------------------------------------------------------------------------------------------------------


def test_exported_names_are_frozen() -> None:
    assert set(anyattn.__all__) == PUBLIC
    assert sorted(anyattn.__all__) == list(anyattn.__all__)
    assert all(hasattr(anyattn, name) for name in PUBLIC)


def test_nothing_else_is_public() -> None:
    """Every module but the door is private, or is named where it is documented."""
    documented = {"anyattn", "anyattn.backends", "anyattn.integrations", "anyattn.cli", "anyattn.__main__"}
    documented |= {f"anyattn.backends.{name}" for name in BACKENDS.ORDER}
    documented |= {module_name(f) for f in (SOURCE / "integrations").glob("[!_]*.py")}
    documented |= {module_name(f) for f in (SOURCE / "demo").glob("*.py")}  # what `anyattn demo` runs
    public = {m for m in map(module_name, FILES) if not any(part.startswith("_") for part in m.split("."))}
    assert public <= documented


def test_everything_exported_is_documented() -> None:
    for name in anyattn.__all__:
        assert getattr(anyattn, name).__doc__, name


def test_environment_variables_are_frozen() -> None:
    reads = re.compile(r"(?:environ(?:\.get|\.setdefault|\.pop)?|getenv)\s*[\[(]\s*[\"']([A-Z_0-9]+)[\"']")
    named = re.compile(r"[\"'](ANYATTN_[A-Z_]+)[\"']")
    for file in FILES:
        text, where = file.read_text(), file.relative_to(SOURCE).as_posix()
        assert set(named.findall(text)) <= ENVIRONMENT, where
        assert set(reads.findall(text)) - ENVIRONMENT <= OTHERS_ENVIRONMENT.get(where, set()), where


# --- who may know whom ---------------------------------------------------------------------------------------------


def kernels_of(name: str) -> set[str]:
    """The names of a backend's kernels, which may be another backend's name."""
    return {c.kernel for c in BACKENDS.get(name).CAPABILITIES} if name in BACKENDS.ORDER else set()


@pytest.mark.parametrize("name", [n for n in BACKENDS.ORDER if n not in ("torch",)])
def test_nothing_outside_a_backends_file_knows_its_name(name: str) -> None:
    """But ``ORDER``: not as a string, not as an import. ("torch" is also the library's name, and cannot be told.)

    Docstrings may give an example; what speaks to users in words (the command line, the table of extras) is not code
    that decides.
    """
    for file in FILES:
        where = file.relative_to(SOURCE).as_posix()
        if where in (f"backends/{name}.py", "backends/__init__.py") or where.startswith(f"backends/_{name}_"):
            continue
        if where.startswith("cli/") or (file.parent.name == "backends" and name in kernels_of(file.stem)):
            continue
        assert name not in strings(file), f"{where} names the backend {name}"
        assert f"anyattn.backends.{name}" not in imports(file), f"{where} imports the backend {name}"


#: Who may import whom, among the private modules: the spine points one way.
LAYERS = (
    {"anyattn._errors", "anyattn._environment", "anyattn._log", "anyattn._problem"},
    {"anyattn._capability"},
    {"anyattn._call"},
    {"anyattn._packing"},
    {"anyattn._padding", "anyattn._padding_triton"},
    {"anyattn.backends"},
    {"anyattn._select"},
    {"anyattn._request"},
    {"anyattn._validate"},
    {"anyattn._preparation"},
    {"anyattn._core"},
    {"anyattn._autograd", "anyattn._traced"},
    {"anyattn._api"},
)


def layer(module: str) -> int | None:
    """Where a module of the spine stands."""
    return next((i for i, names in enumerate(LAYERS) if module in names), None)


def test_the_spine_points_one_way() -> None:
    """_api to _core to _preparation to _select to _capability to _problem, and never back."""
    for file in FILES:
        here = layer(module_name(file))
        if here is None:
            continue
        for name in imports(file):
            there = layer(name)
            assert there is None or there <= here, f"{module_name(file)} imports {name}"


@pytest.mark.parametrize("file", sorted((SOURCE / "backends").glob("*.py")), ids=lambda f: f.stem)
def test_a_backend_knows_the_contract_and_no_other_backend(file: Path) -> None:
    allowed = {
        "anyattn", "anyattn._call", "anyattn._capability", "anyattn._derived", "anyattn._environment",
        "anyattn._errors", "anyattn._log", "anyattn._padding", "anyattn._problem", "anyattn._random",
        "anyattn.backends",
    }  # fmt: skip
    shared = {module_name(f) for f in (SOURCE / "backends").glob("_*.py")}
    found = {name for name in imports(file) if name.startswith("anyattn")}
    assert found <= allowed | shared, found - allowed - shared


def test_optimised_code_never_imports_the_reference() -> None:
    for file in FILES:
        assert "anyattn.backends.reference" not in imports(file), file


def test_nothing_of_the_library_imports_its_users() -> None:
    """The command line and the integrations stand on the door; only the door's own package and __main__ know them."""
    for file in FILES:
        module = module_name(file)
        for user in ("anyattn.cli", "anyattn.demo", "anyattn.integrations"):
            if module.startswith(("anyattn.cli", "anyattn.demo", user)) or module in ("anyattn", "anyattn.__main__"):
                continue
            assert not any(name.startswith(user) for name in imports(file)), f"{module} imports {user}"


def test_the_oracle_imports_nothing_that_it_judges() -> None:
    text = (Path(__file__).parent / "oracle.py").read_text()
    assert not re.search(r"^\s*(import|from)\s+anyattn", text, re.MULTILINE)


def test_the_package_is_typed() -> None:
    assert (SOURCE / "py.typed").exists()
