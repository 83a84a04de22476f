"""The compilers and the disassembler, and what they gave before."""

import functools
import hashlib
import os
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

from benchmarks.audit.sass import Function, parse


class Missing(Exception):
    """A tool that is not on this machine."""


def find(name: str) -> str:
    """The path of a tool of CUDA's, from the PATH, CUDA's usual folder or Triton's wheel.

    Raises:
        Missing: it is in none of them.
    """
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    triton = find_spec("triton")
    wheels = list(triton.submodule_search_locations or []) if triton else []
    for folder in (None, f"{home}/bin", *(f"{wheel}/backends/nvidia/bin" for wheel in wheels)):
        path = shutil.which(name, path=folder)
        if path is not None:
            return path
    raise Missing(f"there is no {name} on the PATH, in {home}/bin or in Triton's wheel")


def run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def cached(*parts: str | bytes) -> Path:
    """Where what is made of these lies, or is to be written, from one audit to the next."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "little") + content)
    folder = root / "zokern" / "audit"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / digest.hexdigest()[:32]


@functools.cache
def version(tool: str) -> str:
    return run(tool, "--version")


def compile_cuda(source: Path) -> Path:
    """The cubin for sm_90 of a source beside all its headers, with the flags of the build."""
    nvcc = find("nvcc")
    flags = ["-std=c++17", "-O3", "--fmad=false", "-arch=sm_90", "-cubin"]
    headers = sorted([*source.parent.parent.rglob("*.h"), *source.parent.parent.rglob("*.cuh")])
    contents = [path.read_bytes() for path in (source, *headers)]
    target = cached(version(nvcc), *flags, *contents)
    if not target.exists():
        part = target.with_suffix(f".{os.getpid()}")
        run(nvcc, *flags, source, "-o", part)
        part.replace(target)
    return target


@functools.cache
def disassemble(cubin: Path) -> dict[str, Function]:
    # Without an analysis of indirect jumps, which there are none of.
    return parse(run(find("nvdisasm"), "-c", "--no-dataflow", cubin))
