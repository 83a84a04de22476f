"""What a user sees of the package before any kernel runs."""

import os
import subprocess
import sys

import torch

import zokern


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    env = {key: value for key, value in os.environ.items() if not key.startswith("ZOKERN_")}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=env | environment
    )


def test_python_m_zokern_says_what_is_there():
    run = python("-m", "zokern")
    assert run.returncode == 0, run.stderr
    lines = dict(line.split(maxsplit=1) for line in run.stdout.splitlines())
    assert lines["zokern"] == zokern.__version__
    assert lines["torch"] == torch.__version__
    for backend in ("native", "triton", "reference"):
        assert f"{backend} on cpu" in run.stdout
    assert "in use" in run.stdout


def test_python_m_zokern_says_why_a_backend_cannot_run():
    run = python("-m", "zokern", ZOKERN_BACKEND="cuda")
    assert run.returncode == 1
    assert run.stderr == "zokern: unknown backend 'cuda'; there are native, triton, reference\n"


def test_it_works_without_triton_and_without_the_native_core():
    code = """
import sys
sys.modules["triton"] = None
sys.modules["zokern._C"] = None
import torch, zokern
weight = torch.zeros(5)
zokern.ops.perturb_([weight], [0], [1.0], seed=0)
assert weight.any()
for name in ("native", "triton"):
    try:
        zokern.use_backend(name)
    except RuntimeError as error:
        print(error)
"""
    run = python("-c", code)
    assert run.returncode == 0, run.stderr
    first, second = run.stdout.splitlines()
    assert "the backend 'native' cannot run here" in first
    assert "built without the native core" in first
    assert "the backend 'triton' cannot run here" in second


def test_importing_zokern_does_not_import_triton():
    run = python("-c", "import zokern, sys; print('triton' in sys.modules)")
    assert run.stdout.strip() == "False", run.stderr


def test_the_backend_can_be_chosen_by_the_environment():
    code = "import zokern, torch; print(zokern.backends.select(torch.device('cpu')).__name__)"
    run = python("-c", code, ZOKERN_BACKEND="reference")
    assert run.stdout.strip() == "zokern.backends.reference"
