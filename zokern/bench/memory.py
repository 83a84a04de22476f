"""Peak memory of a step, each kind in a process of its own.

On a CPU the peak is the largest resident size after the model was built, less what Python and torch
take; on a GPU it is what torch's allocator says.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from zokern.bench import end_to_end, models
from zokern.bench.comparison import Run, Setting, Unavailable

KINDS = (end_to_end.FORWARD, end_to_end.IN_PLACE, end_to_end.LAYERWISE)
SMALL = "opt-tiny"
STATUS = Path("/proc/self/status")


def peaks(setting: Setting, layers: int) -> dict[str, int]:
    """Bytes at the peak of an evaluation, and of a step in place and layerwise.

    Raises:
        Unavailable: where the system does not say how much a process has taken, or has too little.
    """
    if setting.device.type == "cpu" and not STATUS.exists():
        raise Unavailable(f"peak memory of a process is read from {STATUS}, which is not there")
    # Its processes begin with the imports done, and without this one's memory.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["transformers", "zokern.bench.end_to_end"])
    result, threads = {}, torch.get_num_threads()
    for kind in KINDS:
        with ProcessPoolExecutor(1, mp_context=context) as process:
            try:
                result[kind] = process.submit(_peak, setting, layers, kind, threads).result()
            except (BrokenProcessPool, torch.OutOfMemoryError) as error:
                raise Unavailable(f"peak memory, {kind}: {error}") from None
    return result


def _peak(setting: Setting, layers: int, kind: str, threads: int) -> int:
    torch.set_num_threads(threads)
    on_cpu = setting.device.type == "cpu"
    # What torch and transformers load when they are first used is no part of a model's memory.
    _step(setting, SMALL, models.layers_of(SMALL), kind)()
    before = _resident("VmRSS") if on_cpu else 0
    run = _step(setting, setting.model, layers, kind)
    if on_cpu:
        Path("/proc/self/clear_refs").write_text("5")
    else:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        run()
    return _resident("VmHWM") - before if on_cpu else torch.cuda.max_memory_allocated()


def _step(setting: Setting, name: str, layers: int, kind: str) -> Run:
    model = models.build(name, layers, setting.device, setting.dtype)
    loss = end_to_end.evaluation(model, setting.tokens)
    if kind == end_to_end.FORWARD:
        return torch.no_grad()(loss)
    return end_to_end.step(model, loss, kind)


def _resident(which: str) -> int:
    lines = STATUS.read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(which))
