"""What a user sees of the package before any kernel runs."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import zokern
from zokern.commit import commit


def python(
    *arguments: str, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess:
    env = {key: value for key, value in os.environ.items() if not key.startswith("ZOKERN_")}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=env | environment, cwd=cwd
    )


def test_python_m_zokern_says_what_is_there():
    run = python("-m", "zokern")
    assert run.returncode == 0, run.stderr
    lines = dict(line.split(maxsplit=1) for line in run.stdout.splitlines())
    assert lines["zokern"] == zokern.__version__
    assert lines["commit"] == (commit() or "unknown")
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


def test_importing_zokern_imports_only_what_torch_and_python_bring():
    code = """
import sys, torch
before = set(sys.modules)
import zokern
own = {"zokern", *sys.stdlib_module_names}
print(*sorted(name for name in {*sys.modules} - before if name.partition(".")[0] not in own))
"""
    run = python("-c", code)
    assert run.stdout.split() == [], run.stderr


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory):
    """A wheel without the native core, unpacked; built from the unpacked source distribution."""
    root = Path(__file__).parent.parent
    if not (root / "setup.py").is_file():
        pytest.skip("installed without the sources")
    folder = tmp_path_factory.mktemp("dist")

    def setup(cwd, *arguments):
        run = python("setup.py", "-q", *arguments, "-d", str(folder), cwd=cwd, ZOKERN_NATIVE="0")
        assert run.returncode == 0, run.stderr

    setup(root, "egg_info", "--egg-base", str(folder), "sdist")
    (archive,) = folder.glob("zokern-*.tar.gz")
    # Later releases of Python 3.10 and 3.11 know it, and 3.12 warns without.
    known = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    shutil.unpack_archive(archive, folder, **known)
    sources = folder / archive.name.removesuffix(".tar.gz")
    setup(sources, "bdist_wheel")
    (wheel,) = folder.glob("*-py3-none-any.whl")
    shutil.unpack_archive(wheel, folder / "wheel", format="zip")
    return sources, folder / "wheel"


def test_a_source_distribution_has_all_that_a_build_and_its_tests_need(pure_wheel):
    sources, _ = pure_wheel
    root = Path(__file__).parent.parent
    for pattern in ("csrc/**/*.*", "zokern/**/*.py*", "tests/**/*.*", "docs/*.md"):
        for file in root.glob(pattern):
            if file.suffix != ".pyc":
                assert (sources / file.relative_to(root)).is_file(), file
    for name in ("LICENSE", "README.md", "pyproject.toml", "setup.py", "zokern/py.typed"):
        assert (sources / name).is_file(), name


def test_a_wheel_without_the_native_core_says_so_and_which_commit_it_is(pure_wheel):
    _, wheel = pure_wheel
    assert (wheel / "zokern" / "py.typed").is_file()
    assert (wheel / "zokern" / "_C.pyi").is_file()
    # Where zokern is installed in place as well, modules that the wheel lacks are found there.
    code = """
import runpy, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
runpy.run_module("zokern", run_name="__main__")
"""
    run = python("-c", code, cwd=wheel, PYTHONPATH=str(wheel), PYTHONDONTWRITEBYTECODE="1")
    assert run.returncode == 0, run.stderr
    lines = dict(line.split(maxsplit=1) for line in run.stdout.splitlines())
    assert lines["zokern"] == zokern.__version__ or zokern.__version__ == "0+unknown"
    assert lines["commit"] == (commit() or "unknown")
    assert "missing: zokern was built without the native core" in run.stdout


def test_the_backend_can_be_chosen_by_the_environment():
    code = "import zokern, torch; print(zokern.backends.select(torch.device('cpu')).__name__)"
    run = python("-c", code, ZOKERN_BACKEND="reference")
    assert run.stdout.strip() == "zokern.backends.reference"
