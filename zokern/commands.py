"""The commands over checkpoints: ``python -m zokern replay`` and ``merge``."""

import argparse
import inspect
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import zokern
from zokern import merge
from zokern.checkpoints import CheckpointError, rewritten
from zokern.trajectory import Trajectory, TrajectoryError

METHODS: dict[str, Callable[..., object]] = {
    "linear": merge.linear,
    "dare": merge.dare,
    "dare_ties": merge.dare_ties,
    "ties": merge.ties,
}


def add_replay(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "replay",
        help="rebuild trained weights from base weights and a trajectory",
        description="Rebuild trained weights from base weights and a trajectory. The output is "
        "written beside its place and moved there at the end.",
    )
    parser.add_argument("base", type=Path, help="a safetensors file, or a folder of shards")
    parser.add_argument("run", type=Path, help="the trajectory's file")
    parser.add_argument("--out", type=Path, required=True, help="the new file or folder")
    parser.add_argument("--device", help="where the kernels run, such as cuda; cpu by default")
    parser.add_argument(
        "--allow-truncated", action="store_true", help="take the whole steps of a run cut off"
    )
    parser.set_defaults(command=_replay)


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
    _take_files_along()
    with rewritten(arguments.base, arguments.out) as tensors:
        zokern.replay(tensors, trajectory, device=device, progress=True)


def add_merge(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "merge",
        help="merge models: linear, DARE, TIES",
        description="Merge safetensors checkpoints. Tensors are merged one after the other; the "
        "output is written beside its place and moved there at the end.",
    )
    add = parser.add_argument
    add("method", choices=METHODS, help="how they are merged")
    add("models", type=Path, nargs="+", help="safetensors files, or folders of shards")
    add("--base", type=Path, help="what they were trained from: a file or folder")
    add("--out", type=Path, required=True, help="the new file, or folder where the base is one")
    add("--weights", type=float, nargs="+", help="one number, or one for each model; 1 by default")
    add("--density", type=float, nargs="+", help="which part is kept: one number or one for each")
    add("--lambda", type=float, dest="lambda_", help="what the sum is multiplied with; default 1")
    add("--semantics", choices=("mergekit", "peft", "ties"), help="as whom; default mergekit")
    boolean = argparse.BooleanOptionalAction
    add("--normalize", action=boolean, default=None, help="mergekit: divide by the weights")
    add("--rescale", action=boolean, default=None, help="mergekit: keep the L1 norm of deltas")
    add("--majority-sign", choices=("total", "frequency"), help="peft: how signs are elected")
    add("--combine", choices=("mean", "sum", "max"), help="ties: of the deltas that agree")
    add("--seed", type=int, help="of the random masks; default 0")
    add("--device", help="where the kernels run, such as cuda; cpu by default")
    parser.set_defaults(command=_merge)


def _merge(arguments: argparse.Namespace) -> None:
    given = {
        name: value
        for name, value in vars(arguments).items()
        if value is not None and name not in ("method", "models", "command", "device")
    }
    method = METHODS[arguments.method]
    known = inspect.signature(method).parameters
    for name in given:
        if name not in known:
            option = name.strip("_").replace("_", "-")
            raise ValueError(f"{arguments.method} has no --{option}")
    if "density" in known and "density" not in given:
        raise ValueError(f"{arguments.method} needs --density")
    for name in ("weights", "density"):
        if len(given.get(name, ())) == 1:
            given[name] = given[name][0]
    device = _device(arguments.device)
    _take_files_along()
    method(arguments.models, **given, device=device, progress=True)


def _take_files_along() -> None:
    """Stopped by a signal, a command takes its temporary files along."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))


def _device(name: str | None) -> torch.device | None:
    if name is None:
        return None
    try:
        return torch.empty(0, device=name).device
    except (AssertionError, RuntimeError) as error:
        raise RuntimeError(f"the device {name!r} cannot be used: {error}") from None
