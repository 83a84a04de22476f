"""Builds the native core, ``zokern._C``, with ninja. Needs no torch.

The environment variables that steer it are described in ``zokern/env.py``.
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"

CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    # Roots and selects become vectors; their bits stay the same.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    "-DNDEBUG",
]
INSTRUCTION_SETS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        *["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512cd", "-mavx512vnni"],
        *["-mfma", "-mf16c", "-mprefer-vector-width=512"],
        # The intrinsics' own undefined operands set off these warnings in GCC 12.
        *["-Wno-uninitialized", "-Wno-maybe-uninitialized"],
    ],
}
NVCC_FLAGS = ["-std=c++17", "-O3", "--fmad=false", "-cudart=static", "-Xcompiler"]
NVCC_HOST_FLAGS = "-fPIC,-fvisibility=hidden,-ffp-contract=off"


def choice(variable: str, default: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(variable, default)
    if value not in allowed:
        sys.exit(f"{variable} must be one of {', '.join(allowed)}; it is {value!r}")
    return value


def find_compiler() -> str | None:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name.split()[0]):
            return name
    return None


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home and (Path(home) / "bin" / "nvcc").is_file():
        return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def cuda_runtime_folder(nvcc: str) -> str:
    """Where the toolkit that this nvcc belongs to keeps the static CUDA runtime."""
    steps = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull, "-o", os.devnull],
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    found = re.search(r"^#\$ TOP=(.*)$", steps, re.MULTILINE)
    top = Path(found[1].strip()) if found else Path(nvcc).resolve().parent.parent
    for library in (*top.glob("lib*/libcudart_static.a"), *top.glob("targets/*/lib/libcudart*.a")):
        return str(library.parent)
    raise CompileError(f"no libcudart_static.a under {top}: the CUDA toolkit is incomplete")


def compression_flags(nvcc: str) -> list[str]:
    """The kernels' parameter structs make large, mostly empty sections of every architecture."""
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)", version)
    return ["--compress-mode=size"] if release and int(release[1]) >= 13 else []


def cuda_arch_flags() -> list[str]:
    archs = re.split(r"[;, ]+", os.environ.get("ZOKERN_CUDA_ARCHS", "80;90;100").strip())
    if not all(re.fullmatch(r"\d{2,3}a?", arch) for arch in archs):
        sys.exit(f"ZOKERN_CUDA_ARCHS must be like '80;90;100', not {';'.join(archs)!r}")
    newest = max(archs, key=lambda arch: int(arch.rstrip("a")))
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [
        *flags,
        # Code for GPUs newer than the newest of these, compiled by the driver.
        f"-gencode=arch=compute_{newest},code=compute_{newest}",
    ]


def cuda_compiler() -> str | None:
    """The nvcc to build the CUDA kernels with; None where they are left out."""
    wanted = choice("ZOKERN_CUDA", "auto", ("auto", "0", "1"))
    nvcc = None if wanted == "0" else find_nvcc()
    if wanted == "1" and nvcc is None:
        raise CompileError("ZOKERN_CUDA=1, but nvcc is not on the PATH or in CUDA_HOME")
    return nvcc


def write_rules(writer, compiler: str, nvcc: str | None) -> None:
    writer.rule("cxx", f"{compiler} $flags -MMD -MF $out.d -c $in -o $out", depfile="$out.d")
    link_flags = ["-shared", "-pthread"]
    if sys.platform == "darwin":
        link_flags = ["-bundle", "-undefined", "dynamic_lookup"]
    if nvcc:
        flags = [*NVCC_FLAGS, NVCC_HOST_FLAGS, *cuda_arch_flags(), *compression_flags(nvcc)]
        command = f"{nvcc} {' '.join(flags)} -MMD -MF $out.d -c $in -o $out"
        writer.rule("nvcc", command, depfile="$out.d")
        link_flags += [f"-L{cuda_runtime_folder(nvcc)}", "-lcudart_static", "-lrt", "-ldl"]
    # Linked beside the target and moved: a failed link leaves no half module, and a process that
    # has the old module loaded keeps it.
    writer.rule("link", f"{compiler} $in {' '.join(link_flags)} -o $out.tmp && mv -f $out.tmp $out")


def write_objects(writer, build: Path, includes: list[str], nvcc: str | None) -> list[str]:
    cxx_flags = [*CXX_FLAGS, *includes, *(["-DZOKERN_WITH_CUDA"] if nvcc else [])]
    instruction_sets = INSTRUCTION_SETS if platform.machine() in ("x86_64", "AMD64") else {}
    objects = []
    for source in sorted(CSRC.rglob("*.c*")):
        target = f"{build / source.relative_to(CSRC)}.o"
        if source.suffix == ".cpp":
            flags = [*cxx_flags, *instruction_sets.get(source.stem, [])]
            writer.build(target, "cxx", str(source), variables={"flags": " ".join(flags)})
        elif source.suffix == ".cu" and nvcc:
            writer.build(target, "nvcc", str(source))
        else:
            continue
        objects.append(target)
    return objects


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import ninja
        import pybind11
        from ninja import ninja_syntax

        compiler, nvcc = find_compiler(), cuda_compiler()
        assert compiler is not None
        build = Path(self.build_temp).resolve() / "native"
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        for folder in (build, output.parent):
            folder.mkdir(parents=True, exist_ok=True)
        includes = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
        with open(build / "build.ninja", "w") as file:
            writer = ninja_syntax.Writer(file)
            write_rules(writer, compiler, nvcc)
            writer.build(str(output), "link", write_objects(writer, build, includes, nvcc))
        subprocess.run([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(build)], check=True)


def write_commit(folder: Path) -> None:
    """For ``zokern.commit``, where ``folder`` is not a checkout: it holds the built package."""
    spec = importlib.util.spec_from_file_location("commit", ROOT / "zokern" / "commit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (folder / module.WRITTEN.name).write_text(f"{module.commit() or ''}\n")


class BuildWithCommit(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            write_commit(Path(self.build_lib) / "zokern")


class SdistWithCommit(sdist):
    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        write_commit(Path(base_dir) / "zokern")


def why_not_native() -> str | None:
    if sys.platform == "win32":
        return "the native core needs POSIX threads"
    if find_compiler() is None:
        return "there is no C++ compiler; set CXX or install one"
    return None


def native_extensions() -> list[Extension]:
    wanted = choice("ZOKERN_NATIVE", "auto", ("auto", "0", "1"))
    if wanted == "0":
        return []
    reason = why_not_native()
    if reason is None:
        return [Extension("zokern._C", sources=[])]
    if wanted == "1":
        sys.exit(f"ZOKERN_NATIVE=1, but {reason}")
    print(f"zokern: {reason}. Building without the native core", file=sys.stderr)
    return []


setup(
    ext_modules=native_extensions(),
    cmdclass={"build_ext": NinjaBuild, "build_py": BuildWithCommit, "sdist": SdistWithCommit},
)
