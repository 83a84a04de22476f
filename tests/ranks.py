"""Runs a function in several processes that are the ranks of a group: gloo's, or NCCL's on GPUs."""

import multiprocessing
import pickle
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

# What the tests of this mark run on: a GPU for each rank, where there are so many.
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

# In seconds.
TIMEOUT = 60
GROUP_TIMEOUT = 30

# Its processes are forked from one that has imported torch.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    [
        *("pytest", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor"),
        *("tests.ranks", "tests.zo"),
    ]
)


_device = torch.device("cpu")


def device() -> torch.device:
    """That of this rank; the processor's outside of :func:`run`."""
    return _device


def error_of(call: Callable[[], object]) -> str:
    """What a call on one rank raises, to be sent home; nothing where it returns."""
    try:
        call()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return ""


def run(
    function: Callable, size: int, folder: Path, *arguments: Any, kind: str = "cpu"
) -> list[Any]:
    """What ``function(*arguments)`` returns on each rank, each on a device of this kind.

    Raises:
        AssertionError: with the traceback of the first rank that raises, or where one is killed or
            does not end in time.
    """
    if kind == "cuda" and torch.cuda.device_count() < size:
        pytest.skip(f"{size} ranks need as many GPUs, and there are {torch.cuda.device_count()}")
    answers = start(function, size, folder, *arguments, kind=kind)
    failed = [answer for kind, answer in answers if kind != "returned"]
    assert not failed, failed[0]
    return [answer for _, answer in answers]


def start(
    function: Callable, size: int, folder: Path, *arguments: Any, kind: str = "cpu"
) -> list[tuple[str, Any]]:
    """For each rank "returned" and what, "raised" and the traceback, or "died" and its status."""
    # Another group must not find the file of one before.
    file = folder / f"group-{time.monotonic_ns()}"
    pipes = [context.Pipe(duplex=False) for _ in range(size)]
    processes = [
        context.Process(target=_main, args=(function, rank, size, file, writer, arguments, kind))
        for rank, (_, writer) in enumerate(pipes)
    ]
    try:
        for process, (_, writer) in zip(processes, pipes, strict=True):
            process.start()
            writer.close()
        return _collect([reader for reader, _ in pipes], processes)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _collect(readers: list[Connection], processes: list) -> list[tuple[str, Any]]:
    deadline = time.monotonic() + TIMEOUT
    answers: dict[int, tuple[str, Any]] = {}
    while len(answers) < len(readers):
        left = [reader for i, reader in enumerate(readers) if i not in answers]
        ready = wait(left, max(0.0, deadline - time.monotonic()))
        assert ready, f"only {sorted(answers)} of {len(readers)} ranks ended within {TIMEOUT} s"
        for reader in ready:
            i = readers.index(reader)
            try:
                answers[i] = pickle.loads(reader.recv_bytes())
            except EOFError:
                processes[i].join()
                answers[i] = "died", processes[i].exitcode
    return [answers[i] for i in range(len(readers))]


def _main(
    function: Callable,
    rank: int,
    size: int,
    file: Path,
    writer: Connection,
    arguments: tuple,
    kind: str,
) -> None:
    global _device
    torch.set_num_threads(1)
    if kind == "cuda":
        _device = torch.device(kind, rank)
        torch.cuda.set_device(_device)
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        init_method=f"file://{file}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=GROUP_TIMEOUT),
    )
    try:
        answer = "returned", function(*arguments)
    except BaseException:
        answer = "raised", traceback.format_exc()
    # Connections of torch would share the memory of tensors, which ends with the process.
    writer.send_bytes(pickle.dumps(answer))
    dist.destroy_process_group()
