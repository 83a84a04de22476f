"""Fixtures that run a test on every backend that this machine has."""

import functools
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

# The native backend comes with each of its instruction sets.
NATIVE = ["native-portable", "native-avx2", "native-avx512"]
# Triton's interpreter takes its time: tests that leave it out have smaller ones beside them.
FAST = ["reference", *NATIVE]


def patch_triton_once() -> None:
    """Halve the time of Triton's interpreter.

    It puts its functions into triton.language anew for every function that a kernel calls, and
    takes them out again after the kernel. Nothing else needs triton.language here.
    """
    try:
        from triton.runtime import interpreter

        patch, scope = interpreter._patch_lang, interpreter._LangPatchScope
    except (ImportError, AttributeError):
        return  # There is no Triton, or one that goes another way.
    interpreter._patch_lang = functools.cache(patch)
    scope.restore = lambda self: None


if os.environ.get("TRITON_INTERPRET") == "1":
    patch_triton_once()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="there is no CUDA GPU"))


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


def each_of(names: list[str]):
    """A fixture that selects each of them in turn and gives its name."""

    @pytest.fixture(params=names)
    def chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
        choose(request.param, monkeypatch)
        return request.param

    return chosen


backend = each_of([*FAST, "triton"])
fast_backend = each_of(FAST)
# Those that are compared with the reference.
kernel_backend = each_of([*NATIVE, "triton"])
native_backend = each_of(NATIVE)


@pytest.fixture(autouse=True)
def _automatic_choice_afterwards():
    yield
    zokern.use_backend(None)
