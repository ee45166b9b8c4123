"""Cases become tests here: on the CPU always, on CUDA with ``-m gpu``."""

from __future__ import annotations

import os
import warnings

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for torch.use_deterministic_algorithms on CUDA

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

import anyattn
import cases

settings.register_profile("anyattn", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("anyattn")


def _wants_gpu(config: pytest.Config) -> bool:
    return "gpu" in (config.option.markexpr or "")


def _devices(config: pytest.Config) -> list[str]:
    return ["cpu", "cuda"] if _wants_gpu(config) and torch.cuda.is_available() else ["cpu"]


def _mark(device: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.gpu] if device == "cuda" else []


def pytest_configure(config: pytest.Config) -> None:
    """``needs``: only kernels that declare these features are generated."""
    config.addinivalue_line("markers", "needs(feature, ...): run for kernels that declare all of these features")
    config.addinivalue_line("markers", "forward_only: run for kernels without a backward too")
    if _wants_gpu(config):
        for package in ("cutlass", "flash_attn", "torch.utils.cpp_extension"):
            config.addinivalue_line("filterwarnings", f"ignore:::{package}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # kernel packages warn when they are imported; that is not our test
            anyattn.backends()


def _targets(metafunc: pytest.Metafunc, device: str) -> list[cases.Target]:
    needed = {feature for mark in metafunc.definition.iter_markers("needs") for feature in mark.args}
    found = [t for t in cases.all_targets(device) if cases.is_tried_everywhere(t)]
    if metafunc.definition.get_closest_marker("forward_only") is None:
        found = [t for t in found if cases.has_backward(t)]
    return [t for t in found if needed <= set(t.capability.features)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``case``: every generated case. ``target``: every kernel that runs. ``device``: "cpu", and "cuda" with -m gpu."""
    devices = _devices(metafunc.config)
    if "case" in metafunc.fixturenames:
        found = [pytest.param(c, id=c.id, marks=_mark(d)) for d in devices for c in cases.generate(d)]
        metafunc.parametrize("case", found)
    if "target" in metafunc.fixturenames:
        found = [pytest.param(t, id=t.id, marks=_mark(d)) for d in devices for t in _targets(metafunc, d)]
        metafunc.parametrize("target", found)
    if "cuda_target" in metafunc.fixturenames:
        found = [pytest.param(t, id=t.id) for d in devices if d == "cuda" for t in _targets(metafunc, d)]
        metafunc.parametrize("cuda_target", found)
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", [pytest.param(d, marks=_mark(d)) for d in devices])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked gpu run with -m gpu only, and are skipped there if there is no GPU."""
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not _wants_gpu(config):
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if item not in set(gpu)]
    elif not torch.cuda.is_available():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="module")
def registered() -> Iterator[None]:
    """anyattn is known to transformers, which says only errors."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    anyattn.integrations.transformers.register()
    yield
    anyattn.integrations.transformers.unregister()
    logging.set_verbosity(verbosity)


@pytest.fixture(autouse=True)
def _clean_state() -> Iterator[None]:
    """One seed per test, and no state left behind."""
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _machine(request: pytest.FixtureRequest, _clean_state: None) -> Iterator[None]:
    """The machine that the test's kernel runs on, where that is an imagined one."""
    given = getattr(request.node, "callspec", None)
    parameters = given.params if given is not None else {}
    target = parameters.get("target")
    if target is None and (case := parameters.get("case")) is not None:
        target = case.target
    if isinstance(target, cases.Target):
        with target.machine():
            yield
    else:
        yield


@pytest.fixture
def fresh_choice(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """A process that has chosen nothing yet; call it to forget again."""
    from anyattn import _select

    monkeypatch.delenv("ANYATTN_BACKEND", raising=False)

    def forget() -> None:
        _select.forget_world()
        _select.choose.cache_clear()
        forget_prepared()

    forget()
    yield forget
    monkeypatch.undo()
    forget()


def forget_prepared() -> None:
    """Empty the caches of prepared calls."""
    from anyattn import _select

    for cache in _select.caches:
        cache.clear()


@pytest.fixture
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any kernel that runs fails the test."""
    for name in cases.BACKENDS.ORDER:
        backend = cases.BACKENDS.get(name)
        for way in ("forward", "backward"):
            monkeypatch.setattr(backend, way, _reached(name, way))


def _reached(name: str, way: str) -> Callable[..., None]:
    def fail(*_: object) -> None:
        pytest.fail(f"{name}.{way} was reached")

    return fail


@pytest.fixture
def packing() -> anyattn.Packing:
    """Three sequences with padding between them: rows 0-2, 4-4 empty, 4-8 real of 12."""
    return anyattn.Packing.from_lengths([3, 0, 5], pad_to_multiple_of=4)
