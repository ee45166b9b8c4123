"""Run the benchmarks: ``python benchmarks/suite.py [host] [gpu] [--out FOLDER] [--only fa4,fa3]``.

Without a name, all that can run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import gpu
import host
from measure import RESULTS, Report
from raw import KERNELS


def main() -> None:
    """Measure, print, and write one dated file per kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", choices=["host", "gpu", []], help="default: all that can run")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--only", default="", help="backends or kernels of the gpu figures: fa4,torch:flash; their "
                        "names become part of the file's")  # fmt: skip
    chosen = parser.parse_args()
    only = [name for name in chosen.only.split(",") if name]
    if unknown := [name for name in only if not gpu.chosen([name])]:
        parser.error(f"--only takes {', '.join(KERNELS)}; got {', '.join(unknown)}")
    for kind in chosen.kinds or (["host", "gpu"] if torch.cuda.is_available() else ["host"]):
        if kind == "host":
            report = Report(kind, chosen.out)
            host.measure_all(report)
        else:
            report = Report("-".join([kind, *(name.replace(":", "_") for name in only)]), chosen.out)
            gpu.measure_all(report, gpu.chosen(only))
        report.write()
        report.show()


if __name__ == "__main__":
    main()
