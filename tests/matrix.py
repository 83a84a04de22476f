"""One wheel beside several versions of torch: ``python -m tests.matrix PYTHON...``.

Each ``PYTHON`` is the interpreter of an environment that has a torch, pytest and numpy, and Triton
or not. A wheel is built for each version of Python, without torch, installed beside that torch,
and the smoke part of the tests runs against it, away from the sources. Prints what ran on what.
(The interpreter of Triton 3.6, which the tests run on a CPU, takes NumPy below 2.4.)
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
# They need torch, numpy and pytest alone, and take less than a minute together.
SMOKE = [
    "test_package.py",
    "test_native.py",
    "test_noise.py",
    "test_ops.py",
    "test_mezo.py",
]
DESCRIBE = """
import importlib.metadata as metadata, json, platform, torch
def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"
versions = ["Python " + platform.python_version(), "torch " + torch.__version__]
print(json.dumps([*versions, "Triton " + version("triton")]))
"""


def run(python: str, *arguments: str, folder: Path, **environment: str) -> str:
    """The output of a command; its exit is an error."""
    return subprocess.run(
        [python, *arguments],
        cwd=folder,
        env=os.environ | environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout


def wheel_for(python: str, wheels: Path) -> Path:
    """The wheel for this Python, built unless one like it lies there already."""
    with tempfile.TemporaryDirectory() as folder:
        find = ["download", "--quiet", "--no-deps", "--no-index", "--find-links", str(wheels)]
        try:
            run(python, "-m", "pip", *find, "zokern", folder=Path(folder), PIP_FIND_LINKS="")
        except subprocess.CalledProcessError:
            build = ["wheel", "--quiet", "--no-deps", "--wheel-dir", folder, str(ROOT)]
            run(python, "-m", "pip", *build, folder=Path(folder))
        (wheel,) = Path(folder).glob("zokern-*.whl")
        return Path(shutil.copy(wheel, wheels))


def smoke(python: str, wheel: Path) -> str:
    """The last line of the tests' output."""
    install = ["install", "--quiet", "--no-deps", "--force-reinstall", str(wheel)]
    with tempfile.TemporaryDirectory() as folder:
        run(python, "-m", "pip", *install, folder=Path(folder))
        shutil.copytree(ROOT / "tests", Path(folder) / "tests")
        shutil.copy(ROOT / "pyproject.toml", folder)
        tests = [f"tests/{name}" for name in SMOKE]
        pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
        return run(python, *pytest, folder=Path(folder)).splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pythons", nargs="+", metavar="PYTHON")
    parser.add_argument("--wheels", type=Path, default=ROOT / "dist", help="default: dist/")
    arguments = parser.parse_args()
    wheels = arguments.wheels.resolve()
    wheels.mkdir(parents=True, exist_ok=True)
    lines, failed = [], False
    for name in arguments.pythons:
        python = shutil.which(name) or name
        try:
            versions = json.loads(run(python, "-c", DESCRIBE, folder=wheels))
            wheel = wheel_for(python, wheels)
            result = f"{wheel.name}: {smoke(python, wheel)}"
        except (OSError, subprocess.CalledProcessError) as error:
            print(getattr(error, "stdout", None) or "", file=sys.stderr)
            versions, result, failed = [name], f"FAILED: {error}", True
        lines.append(", ".join([*versions, result]))
    print("\n".join(lines))
    sys.exit(failed)


if __name__ == "__main__":
    main()
