"""The examples run, and say the same on one rank and on several."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fresh

EXAMPLE = Path(__file__).parents[1] / "examples" / "context_parallel.py"
IMAGES = EXAMPLE.with_name("diffusers_image_model.py")
LINE = re.compile(r"step +(\d+)  loss (\d+\.\d+) +[\d,]+ tokens/s  (\w+)")
STEPS = 3
#: Of every process: the CPU, and one thread.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="this torch has no gloo"
)


def launched(file: Path, ranks: int, *options: str) -> subprocess.CompletedProcess[str]:
    """An example on the CPU, as its own text says to start it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(file)]
    return subprocess.run(
        [*command, *options], env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False
    )


def as_one_rank(file: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The same, with the variables that torchrun sets for a rank that is alone."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    return fresh.script(file, *options, **ENVIRONMENT, **rank, MASTER_ADDR="localhost", MASTER_PORT=port)


def losses(ranks: int, *options: str) -> dict[str, list[float]]:
    """What it prints: the losses, and the schemes that communicated."""
    options = ("--steps", str(STEPS), *options)
    ended = launched(EXAMPLE, ranks, *options) if ranks > 1 else as_one_rank(EXAMPLE, *options)
    assert ended.returncode == 0, ended.stderr
    found = LINE.findall(ended.stdout)
    assert [int(step) for step, _, _ in found] == list(range(1, STEPS + 1)), ended.stdout
    return {"loss": [float(loss) for _, loss, _ in found], "comm": [comm for _, _, comm in found]}


@pytest.fixture(scope="module")
def alone() -> list[float]:
    found = losses(1)["loss"]
    assert found[0] > found[-1] + 0.1, "it does not learn"
    return found


@pytest.mark.parametrize("options", [("--comm", "a2a"), ("--dp", "2")], ids=" ".join)  # p2p: pretrain.py below
def test_two_ranks_print_the_losses_of_one(alone, options):
    found = losses(2, *options)
    assert found["loss"] == pytest.approx(alone, abs=5e-5)  # five digits are printed
    if options[0] == "--comm":
        assert set(found["comm"]) == {options[1]}


def test_it_says_how_to_start_it():
    ended = fresh.script(EXAMPLE)
    assert ended.returncode == 2
    assert "start it with torchrun --nproc-per-node N examples/context_parallel.py" in ended.stderr


def painted(attention: str) -> list[float]:
    """The losses that the image model prints with a backend of diffusers."""
    pytest.importorskip("diffusers")
    ended = fresh.script(IMAGES, "--steps", "9", "--every", "4", "--attention", attention, **ENVIRONMENT)
    assert ended.returncode == 0, ended.stderr
    found = re.findall(r"step +(\d+)  loss (\d+\.\d+) +[\d,]+ images/s", ended.stdout)
    assert [int(step) for step, _ in found] == [1, 4, 8, 9], ended.stdout
    return [float(loss) for _, loss in found]


def test_an_image_model_learns_as_with_diffusers_own_attention():
    found = painted("anyattn")
    assert found[0] > found[-1] + 0.3, "it does not learn"
    assert found == pytest.approx(painted("native"), abs=5e-4)  # training magnifies rounding


# --- examples that run alone, and under torchrun ---

STARTS = {"pretrain.py": ("--comm", "p2p"), "finetune_trainer.py": ("--longest", "256")}


def printed_losses(name: str, ranks: int | None, *options: str) -> list[float]:
    """What an example prints; ranks None: as plain Python."""
    file, options = EXAMPLE.with_name(name), ("--steps", str(STEPS), *options)
    ended = fresh.script(file, *options, **ENVIRONMENT) if ranks is None else launched(file, ranks, *options)
    assert ended.returncode == 0, ended.stderr
    found = re.findall(r"^step +(\d+)  loss (\d+\.\d+)", ended.stdout, re.MULTILINE)
    assert [int(step) for step, _ in found] == list(range(1, STEPS + 1)), ended.stdout
    return [float(loss) for _, loss in found]


@pytest.mark.parametrize("name", STARTS)
def test_one_process_learns_what_two_ranks_learn(name):
    if name == "finetune_trainer.py":
        pytest.importorskip("accelerate")
    alone = printed_losses(name, None, *STARTS[name])
    assert alone[0] > alone[-1] + 0.1, "it does not learn"
    assert printed_losses(name, 2, *STARTS[name]) == pytest.approx(alone, abs=2e-4)
