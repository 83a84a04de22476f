"""``python -m zokern``: what is installed and runs here. ``replay``: a trained checkpoint."""

import argparse
import platform
import signal
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import zokern
from zokern import backends
from zokern.checkpoints import CheckpointError, rewritten
from zokern.trajectory import Trajectory, TrajectoryError


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


def _replay(arguments: argparse.Namespace) -> None:
    trajectory = Trajectory.load(arguments.run, allow_truncated=arguments.allow_truncated)
    if trajectory.header is not None and not trajectory.header["named"]:
        raise TrajectoryError(
            f"{arguments.run} records parameters without names, which a checkpoint cannot be "
            "matched with: use zokern.replay"
        )
    if arguments.out.absolute() == arguments.run.absolute():
        raise CheckpointError(f"--out would overwrite the trajectory {arguments.run}")
    device = _device(arguments.device)
    # Stopped by a signal, it takes its temporary files along.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with rewritten(arguments.base, arguments.out) as tensors:
        zokern.replay(tensors, trajectory, device=device, progress=True)


def _device(name: str | None) -> torch.device | None:
    if name is None:
        return None
    try:
        return torch.empty(0, device=name).device
    except (AssertionError, RuntimeError) as error:
        raise RuntimeError(f"the device {name!r} cannot be used: {error}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m zokern", description=__doc__)
    commands = parser.add_subparsers(title="commands")
    replay = commands.add_parser(
        "replay",
        help="rebuild trained weights from base weights and a trajectory",
        description="Rebuild trained weights from base weights and a trajectory. The output is "
        "written beside its place and moved there at the end.",
    )
    replay.add_argument("base", type=Path, help="a safetensors file, or a folder of shards")
    replay.add_argument("run", type=Path, help="the trajectory's file")
    replay.add_argument("--out", type=Path, required=True, help="the new file or folder")
    replay.add_argument("--device", help="where the kernels run, such as cuda; cpu by default")
    replay.add_argument(
        "--allow-truncated", action="store_true", help="take the whole steps of a run cut off"
    )
    replay.set_defaults(command=_replay)
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
