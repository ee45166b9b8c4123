"""tools/record_signatures.py reads what packages publish, and imports none of it."""

from __future__ import annotations

import io
import json
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from doubles.signatures import Recorded

TOOLS = Path(__file__).parents[1] / "tools"

PYTHON = """
raise ImportError("nobody imports this")

class Func:
    def forward(ctx, q, lse_too):
        return q if not lse_too else (q, ctx)

@custom_op("flash_attn::_flash_attn_forward", mutates_args=("out",), device_types="cuda")
def _flash_attn_forward(q: Tensor, k: Tensor = None, *, out: float = 0.0) -> Tuple[Tensor, Tensor]:
    def inside():
        return 1, 2, 3
    out, lse, *rest = flash_attn_gpu.fwd(q, k, None, {scale})
    return out, lse, *rest

def flash_attn_func(q, lse_too=False):
    return Func.apply(q, lse_too)
"""
COMPILED = """
std::vector<at::Tensor>
mha_fwd(at::Tensor &q,  // batch, rows
        const at::Tensor &k, /* heads, (h) */
        std::optional<const at::Tensor> &out_, const float softmax_scale, std::optional<at::Generator> gen_) {
    auto round = [](int x) { return (x + 1) / 2; };
    if (softmax_scale) { return {out, lse, round(3, 4)}; }
    return {q, lse, p};
}
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    m.def("fwd", &FLASH_NAMESPACE::mha_fwd, "Forward pass");
}
"""
OPERATORS = """
TORCH_LIBRARY(flash_attn_3, m) {
    m.def("bwd("
        "Tensor q,"
        "Tensor(dq!)? dq = None,"
        "float softcap = 0.0) -> (Tensor, Tensor)");
}
"""


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(TOOLS))
    import record_signatures

    yield record_signatures
    for name in [n for n in sys.modules if n.partition(".")[0] in ("signatures", "record_signatures")]:
        del sys.modules[name]


@pytest.fixture
def recorded(tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """What is recorded of three releases of flash-attn, of which two are the same."""
    for version, scale in (("2.10.0", "1, 2"), ("2.9.0", "1"), ("2.8.0", "1")):
        with tarfile.open(tmp_path / f"flash_attn-{version}.tar.gz", "w:gz") as archive:
            top = f"flash_attn-{version}"
            add(archive, f"{top}/flash_attn/flash_attn_interface.py", PYTHON.replace("{scale}", scale))
            add(archive, f"{top}/csrc/flash_attn/flash_api.cpp", COMPILED)
            add(archive, f"{top}/csrc/other/flash_api.cpp", "another")
    monkeypatch.setattr(tool, "TARGET", tmp_path)
    tool.main([tmp_path])
    monkeypatch.setattr("doubles.signatures.FOLDER", tmp_path)
    return Recorded("fa2")


def add(archive: tarfile.TarFile, name: str, text: str) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(text)
    archive.addfile(member, io.BytesIO(text.encode()))


def test_equal_releases_share_an_entry(recorded: Recorded) -> None:
    assert recorded.versions() == ["2.8.0", "2.9.0", "2.10.0"]
    assert [e["versions"] for e in recorded.functions["_flash_attn_forward"]] == [["2.8.0", "2.9.0"], ["2.10.0"]]


def test_a_python_function(recorded: Recorded) -> None:
    entry = recorded.entry("_flash_attn_forward", "2.10.0")
    assert entry["signature"] == "q, k=None, *, out=0.0"
    assert (entry["op"], entry["mutates"], entry["annotated"]) == ("flash_attn::_flash_attn_forward", ["out"], 2)
    assert entry["calls"] == {"fwd": 5}
    assert recorded.returns("_flash_attn_forward", "2.10.0") == [2]
    parameters = recorded.signature("_flash_attn_forward", "2.10.0").parameters
    assert parameters["q"].default is parameters["q"].empty
    assert parameters["out"].kind is parameters["out"].KEYWORD_ONLY
    assert parameters["out"].default == "0.0"


def test_returns_are_followed_into_autograd_functions(recorded: Recorded) -> None:
    assert recorded.returns("flash_attn_func", "2.8.0") == [1, 2]


def test_a_pybind11_function(recorded: Recorded) -> None:
    entry = recorded.entry("flash_attn_2_cuda.fwd", "2.8.0")
    assert entry["schema"] == "fwd(Tensor q, Tensor k, Tensor? out_, float softmax_scale, Generator? gen_)"
    assert recorded.returns("flash_attn_2_cuda.fwd", "2.8.0") == [3]
    signature = recorded.signature("flash_attn_2_cuda.fwd", "2.8.0")
    signature.bind(1, 2, None, 3.0, None)
    with pytest.raises(TypeError):
        signature.bind(1, 2, None, 3.0)
    with pytest.raises(TypeError):
        signature.bind(1, 2, None, 3.0, gen_=None)


def test_an_operator(tool: Any, tmp_path: Path) -> None:
    from signatures import cpp_source

    found = cpp_source.read(OPERATORS, "")
    assert found == {
        "flash_attn_3::bwd": {"schema": "bwd(Tensor q, Tensor(dq!)? dq=None, float softcap=0.0) -> (Tensor, Tensor)"}
    }
    binary = b"\0\1fwd(Tensor q,bool is_causal = False) -> (Tensor(out!), Tensor)\0other\0"
    assert cpp_source.read_binary(binary, "fa3_fwd") == {
        "fa3_fwd::fwd": {"schema": "fwd(Tensor q, bool is_causal=False) -> (Tensor(out!), Tensor)"}
    }


def test_a_docstring(tool: Any) -> None:
    from signatures import cudnn_graph

    pybind = (
        "sdpa(self: m.pygraph, q: m.tensor, arg: m.kind = <kind.A: 0>, mod: Callable[[m.a, m.b], m.c] = None)"
        ' -> Annotated[list[m.tensor], "FixedSize(2)"]\n\n    Text (more) -> of it.\n'
    )
    assert cudnn_graph._from_docstring(pybind) == {"signature": "self, q, arg=kind.A, mod=None", "returns": [2]}
    unnamed = "plans(self: m.pygraph, arg0: list[m.mode]) -> None\n"
    assert cudnn_graph._from_docstring(unnamed) == {"signature": "self, arg0, /", "returns": []}
    overloaded = (
        "size(*args, **kwargs)\nOverloaded function.\n\n1. size(self: m.g) -> int\n\n"
        "2. size(self: m.g, h: int | None = None) -> int\n"
    )
    assert cudnn_graph._from_docstring(overloaded) == {"signature": "self, h=None", "returns": [1]}


def test_wheels_of_torch(tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from signatures import packages

    listed = (
        "- func: _flash_attention_forward(Tensor query, *, float? scale=None) -> (Tensor out, Tensor lse)\n  x: y\n"
    )
    with zipfile.ZipFile(tmp_path / "torch-2.12.0-cp311-cp311-some_platform.whl", "w") as archive:
        for path in packages.TORCH:
            archive.writestr(path, "def varlen_attn(query, *, scale=None): return query" * path.endswith("varlen.py"))
        archive.writestr("torchgen/packaged/ATen/native/native_functions.yaml", listed)
    monkeypatch.setattr(tool, "TARGET", tmp_path)
    tool.main([tmp_path])
    monkeypatch.setattr("doubles.signatures.FOLDER", tmp_path)
    recorded = Recorded("torch")
    assert list(json.loads((tmp_path / "torch.json").read_text())["versions"]) == ["2.12.0"]
    assert str(recorded.signature("varlen_attn", "2.12.0")) == "(query, *, scale='None')"
    assert str(recorded.signature("aten::_flash_attention_forward", "2.12.0")) == "(query, *, scale='None')"
    assert recorded.returns("aten::_flash_attention_forward", "2.12.0") == [2]
