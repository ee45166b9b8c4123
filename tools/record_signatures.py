"""Record the signatures of the kernel packages' functions from what they published, importing none of them.

(One compiled module, of cuDNN's front end, is loaded all the same, in a process of its own.)

    python tools/record_signatures.py FOLDER_OR_CLONE ...

A folder holds sdists and wheels, as pip leaves them, of as many releases as wanted::

    pip download --no-deps --no-binary :all: --no-build-isolation flash-attn==2.8.3
    pip download --no-deps flash-attn-4==4.0.0b36 fa3-fwd==0.0.3 nvidia-cudnn-frontend==1.32.0
    pip download --no-deps --only-binary :all: --platform macosx_14_0_arm64 torch==2.15.0
    pip download --no-deps transformer-engine==2.20.2

For the first, pip runs the package's setup.py: it wants torch, psutil, wheel and setuptools below 70, and
FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE. For the last, any platform will do, and that one is small. A clone is one of
github.com/Dao-AILab/flash-attention, for FlashAttention 3. Each package that is found is written to tests/signatures,
whole: tests/doubles/signatures.py says how that reads.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from signatures.packages import Release

from signatures import packages

TARGET = Path(__file__).parent.parent / "tests" / "signatures"
SOURCES = {
    "cudnn": "wheels of nvidia-cudnn-frontend on PyPI: cudnn/__init__.py, _pygraph.py, docstrings of _compiled_module",
    "fa2": "sdists of flash-attn on PyPI: flash_attn/flash_attn_interface.py, csrc/flash_attn/flash_api.cpp",
    "fa3": "github.com/Dao-AILab/flash-attention: hopper/flash_attn_interface.py, flash_api.cpp, flash_api_stable.cpp",
    "fa3_fwd": "wheels of fa3-fwd on PyPI: fa3_fwd_interface.py, fa3_fwd_config.py, strings of fa3_fwd/_C.abi3.so",
    "fa4": "wheels of flash-attn-4 on PyPI: flash_attn/cute/interface.py",
    "torch": "wheels of torch on PyPI: torch/nn/attention, torchgen/packaged/ATen/native/native_functions.yaml",
    "transformer_engine": "wheels of transformer-engine on PyPI: pytorch/attention/dot_product_attention",
}


def record(releases: Iterable[Release], source: str) -> dict[str, Any]:
    """Every distinct signature by function, with the versions that have it, oldest first."""
    functions: dict[str, list[dict[str, Any]]] = {}
    versions: dict[str, dict[str, Any]] = {}
    for version, noted, found in releases:
        versions[version] = noted
        for name, entry in found.items():
            entries = functions.setdefault(name, [])
            same = [e for e in entries if {k: v for k, v in e.items() if k != "versions"} == entry]
            if same:
                same[0]["versions"].append(version)
            else:
                entries.append({"versions": [version], **entry})
    return {"source": source, "versions": versions, "functions": dict(sorted(functions.items()))}


def as_text(recorded: dict[str, Any]) -> str:
    """JSON with one signature, and one list of versions, to a line: differences then read well."""
    versions = [f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in recorded["versions"].items()]
    functions = []
    for name, entries in recorded["functions"].items():
        texts = [[f"        {json.dumps(k)}: {json.dumps(v)}" for k, v in entry.items()] for entry in entries]
        inner = ["      {\n" + ",\n".join(lines) + "\n      }" for lines in texts]
        functions.append(f"    {json.dumps(name)}: [\n" + ",\n".join(inner) + "\n    ]")
    return (
        f'{{\n  "source": {json.dumps(recorded["source"])},\n'
        '  "versions": {\n' + ",\n".join(versions) + "\n  },\n"
        '  "functions": {\n' + ",\n".join(functions) + "\n  }\n}\n"
    )


def main(places: list[Path]) -> None:
    """Write one file for each package that is found."""
    TARGET.mkdir(exist_ok=True)
    for place in places:
        for name, source in SOURCES.items():
            recorded = record(getattr(packages, name)(place), source)
            if recorded["versions"]:
                (TARGET / f"{name}.json").write_text(as_text(recorded))
                print(f"{TARGET / name}.json: {len(recorded['versions'])} versions")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    main([Path(p) for p in sys.argv[1:]])
