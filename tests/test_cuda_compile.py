"""The CUDA kernels compile for every architecture that is shipped, and stay in registers."""

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).parent.parent / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = (80, 90, 100)
# By their names, the kernels that write no octets, and those that read none.
READERS = ("product", "select", "l1_")
OTHERS = ("sample", "decide", "answer", "total")


def built_core() -> list[Path]:
    """The native core, if it was built with the kernels for all of these."""
    try:
        from zokern import _C
    except ImportError:
        return []
    return [Path(_C.__file__)] if set(ARCHITECTURES) <= set(_C.cuda_architectures()) else []


def find_tool(name: str, folders: list) -> str:
    for folder in (None, "/usr/local/cuda/bin", *folders):
        path = shutil.which(name, path=folder)
        if path is not None:
            return path
    pytest.skip(f"there is no {name}")


def run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# To compile them once more takes a minute.
@pytest.fixture(scope="module", params=built_core() or SOURCES, ids=lambda path: path.name)
def compiled(request, tmp_path_factory) -> Path:
    """The kernels of the native core, or of one source, for all architectures."""
    if request.param.suffix != ".cu":
        return request.param
    nvcc = find_tool("nvcc", [])
    target = tmp_path_factory.mktemp("cuda") / "kernels.fatbin"
    codes = [f"-gencode=arch=compute_{a},code=[sm_{a},compute_{a}]" for a in ARCHITECTURES]
    flags = ["-std=c++17", "-O3", "--fmad=false", "-Werror=all-warnings", *codes]
    run(nvcc, *flags, "-fatbin", request.param, "-o", target)
    return target


@pytest.fixture(scope="module")
def cuobjdump() -> str:
    triton = find_spec("triton")
    folders = list(triton.submodule_search_locations or []) if triton else []
    return find_tool("cuobjdump", [f"{folder}/backends/nvidia/bin" for folder in folders])


def test_kernels_use_no_local_memory(compiled, cuobjdump):
    usage = run(cuobjdump, "-res-usage", compiled)
    kernels = re.findall(r"Function (\w+):\n.*STACK:(\d+) .*LOCAL:(\d+)", usage)
    assert len(kernels) >= 6 * len(ARCHITECTURES)
    assert [kernel for kernel in kernels if kernel[1:] != ("0", "0")] == []


def test_full_octets_move_in_vectors(compiled, cuobjdump):
    code = run(cuobjdump, "-sass", compiled)
    for function in code.split("Function : ")[1:]:
        name = function.split(maxsplit=1)[0]
        assert "STG.E.128" in function or any(reader in name for reader in READERS), name
        assert "LDG.E.128" in function or any(other in name for other in OTHERS), name


def test_no_product_can_be_fused_but_the_written_ones(compiled, cuobjdump):
    # The assembler fuses products and sums only where they do not say how to round.
    code = run(cuobjdump, "-ptx", compiled)
    assert "fma.rn.f32" in code
    assert re.findall(r"\b(?:mul|add|sub|mad)(?:\.ftz)?\.f(?:32|64)", code) == []
