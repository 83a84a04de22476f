"""Fixtures that run a test on every backend that this machine has."""

import os

import torch

if not torch.cuda.is_available():
    # Triton's kernels run on the CPU under its interpreter, which must be chosen before the import.
    os.environ.setdefault("TRITON_INTERPRET", "1")

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores; threads that wait for each other there take longer than one.
    torch.set_num_threads(1)

import pytest

import zokern
from zokern import backends

CAPABILITIES = ("portable", "avx2", "avx512")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="there is no CUDA GPU"))


def variants() -> list[str]:
    return ["reference", *(f"native-{name}" for name in CAPABILITIES), "triton"]


def choose(variant: str, monkeypatch: pytest.MonkeyPatch, device: str = "cpu") -> None:
    """Select a backend, and for the native one an instruction set; skip where it is missing."""
    name, _, capability = variant.partition("-")
    reason = backends.load(name).why_not(torch.device(device))
    if reason is not None:
        pytest.skip(reason)
    if capability:
        from zokern.backends.native.capability import cpu_capabilities

        if capability not in cpu_capabilities():
            pytest.skip(f"this processor has no {capability}")
        monkeypatch.setenv("ZOKERN_CPU_CAPABILITY", capability)
    monkeypatch.setenv("ZOKERN_BACKEND", name)


@pytest.fixture(params=variants())
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each backend in turn; the native one with each instruction set."""
    choose(request.param, monkeypatch)
    return request.param


@pytest.fixture(params=variants()[1:])
def kernel_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each backend but the reference, which they are compared with."""
    choose(request.param, monkeypatch)
    return request.param


@pytest.fixture(autouse=True)
def _automatic_choice_afterwards():
    yield
    zokern.use_backend(None)
