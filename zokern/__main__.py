"""``python -m zokern``: what is installed and runs here; ``replay`` and ``merge`` checkpoints."""

import argparse
import platform
import signal
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

import zokern
from zokern import backends
from zokern.commands import add_merge, add_replay
from zokern.commit import commit


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _native_details() -> list[tuple[str, str]]:
    native = backends.load("native")
    if native.why_not(torch.device("cpu")) is not None:
        return []
    from zokern.backends.native.capability import (
        cpu_capabilities,
        cpu_capability,
        cuda_architectures,
    )

    archs = ", ".join(f"sm_{arch}" for arch in cuda_architectures()) or "none (built without CUDA)"
    return [
        ("instruction set", f"{cpu_capability()} (of {', '.join(cpu_capabilities())})"),
        ("threads", str(torch.get_num_threads())),
        ("CUDA architectures", archs),
    ]


def report() -> str:
    """The versions, the backends for each kind of device, and the details of the native core."""
    rows = [
        ("zokern", zokern.__version__),
        ("commit", commit() or "unknown"),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("triton", _version("triton")),
    ]
    for kind in backends.device_kinds():
        device = torch.device(kind)
        chosen = backends.select(device).__name__.rpartition(".")[2]
        for name in backends.ORDER:
            reason = backends.load(name).why_not(device)
            state = "in use" if name == chosen else "available"
            rows.append((f"{name} on {kind}", state if reason is None else f"missing: {reason}"))
    rows += _native_details()
    width = max(len(label) for label, _ in rows) + 2
    return "\n".join(f"{label:<{width}}{value}" for label, value in rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m zokern", description=__doc__)
    commands = parser.add_subparsers(title="commands")
    add_replay(commands)
    add_merge(commands)
    parser.set_defaults(command=lambda arguments: print(report()))
    return parser


def main() -> None:
    arguments = _parser().parse_args()
    try:
        arguments.command(arguments)
    except (OSError, RuntimeError, ValueError) as error:
        # Bad files, and environment variables that ask for what cannot be had.
        sys.exit(f"zokern: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
