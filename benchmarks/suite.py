"""Run the benchmarks: ``python benchmarks/suite.py [host] [gpu] [--out FOLDER]``. Without a name, all that can run."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import host
from measure import RESULTS, report


def main() -> None:
    """Measure, print, and write one dated file per kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", choices=["host", "gpu", []], help="default: all that can run")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    chosen = parser.parse_args()
    kinds = chosen.kinds or (["host", "gpu"] if torch.cuda.is_available() else ["host"])
    for kind in kinds:
        if kind == "host":
            rows = host.rows()
        else:
            import gpu

            rows = gpu.rows()
        report(kind, rows, chosen.out)


if __name__ == "__main__":
    main()
