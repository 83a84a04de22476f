"""The native core on the CPU: threads, forks, floating-point modes, its independence of torch."""

import concurrent.futures
import hashlib
import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import zokern
from tests.conftest import choose
from zokern import noise, ops

native = pytest.importorskip("zokern._C", reason="built without the native core")

NUMEL = 1 << 18


@pytest.fixture(autouse=True)
def _native(monkeypatch):
    choose("native", monkeypatch)


def moved(numel: int = NUMEL) -> torch.Tensor:
    tensor = torch.ones(numel)
    ops.perturb_([tensor], [0, 1], [0.1, 0.2], seed=3)
    return tensor


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_the_number_of_threads_changes_nothing(threads):
    threads(1)
    wanted = moved()
    for count in (2, 3, 7):
        threads(count)
        assert torch.equal(moved(), wanted)


@pytest.mark.parametrize("variable", ["OMP_THREAD_LIMIT=1", "OMP_DYNAMIC=true"])
def test_all_is_done_where_openmp_gives_fewer_threads_than_were_asked_for(variable):
    code = "import torch; torch.set_num_threads(3); from tests import test_native as t"
    run = subprocess.run(
        [sys.executable, "-c", f"{code}; print(t.digest())"],
        env={**os.environ, **dict([variable.split("=")]), "ZOKERN_BACKEND": "native"},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == digest()


def test_callers_on_several_threads_do_not_disturb_each_other():
    wanted = moved()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda _: moved(), range(16)):
            assert torch.equal(result, wanted)


def digest() -> str:
    """Of a sweep, without torch's own parallel operations, which hang after a fork."""
    array = np.ones(NUMEL, dtype=np.float32)
    ops.perturb_([torch.from_numpy(array)], [0, 1], [0.1, 0.2], seed=3)
    return hashlib.sha256(array.tobytes()).hexdigest()


def _in_child(queue):
    queue.put(digest())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_it_works_in_a_forked_child(threads):
    threads(2)
    wanted = digest()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue,))
    child.start()
    try:
        assert queue.get(timeout=60) == wanted
        child.join(timeout=60)
        assert child.exitcode == 0
    finally:
        child.kill()
    assert digest() == wanted


def test_denormals_are_kept_whatever_the_callers_mode():
    tensor = torch.full((5000,), 1e-40)
    wanted = tensor.clone()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        ops.perturb_([tensor], [0], [0.0], seed=0)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(tensor, wanted)


def test_an_instruction_set_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setenv("ZOKERN_CPU_CAPABILITY", "avx1024")
    with pytest.raises(RuntimeError, match="ZOKERN_CPU_CAPABILITY=avx1024, but this processor has"):
        moved()


def test_the_core_refuses_an_instruction_set_too():
    with pytest.raises(ValueError, match="no avx1024 kernels"):
        native.cpu_values(noise.LAWS["gauss16"].code, 0, 0, 0, "avx1024")


def test_the_core_needs_no_torch():
    code = f"""
import importlib.util, sys
sys.modules["torch"] = None
spec = importlib.util.spec_from_file_location("zokern._C", {native.__file__!r})
core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(core)
print(core.cpu_capabilities()[0])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "portable"


def test_the_sources_include_no_torch_header():
    sources = Path(zokern.__file__).parent.parent / "csrc"
    if not sources.is_dir():
        pytest.skip("installed without the sources")
    for source in sources.rglob("*.*"):
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)", source.read_text()), source


def test_more_than_two_to_the_31_elements():
    numel = (1 << 31) + 100
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if available < 3 * 2 * numel:
        pytest.skip(f"needs {6 * numel >> 30} GiB of free memory")
    tensor = torch.zeros(numel, dtype=torch.bfloat16)
    # Of all laws the one that takes the least time.
    ops.perturb_([tensor], [0], [1.0], seed=1, law="rademacher")
    tail = noise.sample("rademacher", 200, seed=1, draw=0, offset=numel - 200)
    assert torch.equal(tensor[-200:], tail.bfloat16())
