"""Triton's kernels, compiled for a GPU that need not be there.

Triton compiles with its interpreter off, which is chosen when it is imported. So this file is also
a program: ``python -m benchmarks.audit.triton_kernels NAME…`` compiles what these variants launch
and prints where their cubins lie.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.audit.tools import Missing, cached
from benchmarks.audit.variants import VARIANTS, Variant
from zokern.merging import AdamNumbers, AdamSteps, Differences, Mask, MergeStep, Selection
from zokern.sweep import InnerProducts, Shard, Sweep, Update

TARGETS: dict[str, int | str] = {"sm_80": 80, "sm_90": 90, "sm_100": 100, "gfx942": "gfx942"}
DTYPES = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "fp16": (torch.float16, None),
    "split": (torch.bfloat16, torch.int16),
    "split8": (torch.bfloat16, torch.int8),
    "fp16-split": (torch.float16, torch.float16),
}
NUMEL = 1 << 16


class Driver:
    """A driver of a GPU that is not there."""

    def __init__(self, name: str) -> None:
        from triton.backends.compiler import GPUTarget

        backend, warp_size = ("cuda", 32) if name.startswith("sm") else ("hip", 64)
        self.index = list(TARGETS).index(name)
        self.target = GPUTarget(backend, TARGETS[name], warp_size)

    def get_current_device(self) -> int:
        return self.index

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self):
        return self.target


@contextmanager
def compiled_for(name: str) -> Iterator[list]:
    """What would be launched on that GPU is compiled and collected instead."""
    from triton.runtime import driver

    from zokern.backends.triton import (
        deltas,
        l1,
        launch,
        merging,
        noise,
        perturb,
        products,
        selection,
        update,
    )

    kernels: list = []
    launched = (
        perturb.perturb_kernel,
        update.update_kernel,
        merging.merge_step_kernel,
        products.inner_products_kernel,
        noise.sample_kernel,
        selection.count_kernel,
        selection.ties_kernel,
        selection.cut_kernel,
        l1.l1_kernel,
        l1.total_kernel,
        deltas.merge_kernel,
    )
    runs = {kernel: kernel.run for kernel in launched}
    for kernel, run in runs.items():

        def warm_up(*args, run=run, warmup, **kwargs):
            kernels.append(run(*args, warmup=True, **kwargs))

        kernel.run = warm_up
    driver.set_active(Driver(name))
    launch.target.cache_clear()
    yield kernels
    for kernel, run in runs.items():
        kernel.run = run


def sweep_of(variant: Variant) -> Sweep:
    dtype, residual_dtype = DTYPES[variant.storage]
    param = torch.empty(NUMEL, dtype=dtype)
    k, form = variant.k, variant.form
    momentum = Update([[1.0]], [0.9], [0.1], [torch.empty(NUMEL)])
    return Sweep(
        params=[param],
        residuals=[residual_dtype and torch.empty(NUMEL, dtype=residual_dtype)],
        masters=[param.float()] if form.startswith("master") else None,
        outs=[torch.empty_like(param)] if variant.apart else None,
        dense=[],
        shards=[Shard(0, NUMEL, NUMEL)],
        rows=[None],
        tensor_ids=[1],
        draws=list(range(k)),
        coeffs=[[0.1] * k],
        scales=[[1.0] * k],
        rest=0 if form == "master-evaluate" else k,
        update=momentum if form == "momentum" else None,
        rounding=1 if form == "round" else None,
        seed=1,
        law=variant.law,
    )


def adam_steps() -> AdamSteps:
    grads = [torch.empty(NUMEL, dtype=torch.bfloat16)]
    numbers, merges = torch.tensor([AdamNumbers()]), torch.ones(1, dtype=torch.int64)
    return AdamSteps(grads, [torch.empty(NUMEL)], [torch.empty(NUMEL)], None, numbers, merges)


def step_of(variant: Variant) -> MergeStep:
    half = [torch.empty(NUMEL, dtype=torch.bfloat16) for _ in range(2)]
    integer, shard = torch.ones(1, dtype=torch.int64), Shard(0, NUMEL, NUMEL)
    by_magnitude = (torch.zeros(1), integer) if variant.form == "ties" else (None, None)
    return MergeStep(
        params=half[:1],
        residuals=[None],
        masters=None,
        steps=adam_steps(),
        taus=[half[1]],
        mask=Mask(*by_magnitude, integer, integer, [shard], [1], 1),
        method=variant.form,
    )


def _launch_select(variant: Variant) -> None:
    from zokern.backends.triton import selection

    plain: list[Tensor] = [torch.empty(NUMEL)]
    values = Differences(plain) if variant.form == "select" else adam_steps()
    selection.select(Selection(values, [1000], False))


def launch(variant: Variant, kernels: list) -> object:
    """The compiled kernel of the variant, of those that a launch adds to the list."""
    from zokern.backends.triton import merging, perturb, products, update

    before = len(kernels)
    if variant.form == "sweep":
        perturb.perturb_(sweep_of(variant))
    elif variant.form in ("dare", "ties"):
        merging.merge_step_(step_of(variant))
    elif variant.form == "products":
        vectors = [torch.empty(NUMEL, dtype=DTYPES[variant.storage][0])]
        shards = [Shard(0, NUMEL, NUMEL)]
        products.inner_products(InnerProducts(vectors, shards, [1], 1, 1, variant.law))
    elif variant.form.startswith("select"):
        _launch_select(variant)
    else:
        update.perturb_(sweep_of(variant))
    return kernels[before]


def compile_triton(names: Iterable[str], progress: Callable[[], object]) -> dict[str, Path]:
    """The cubins for sm_90 of these variants; ``progress`` is called for each.

    Raises:
        Missing: there is no Triton.
    """
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise Missing(f"there is no triton: {error}") from error
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.audit.triton_kernels", *names]
    root = Path(__file__).parent.parent.parent
    cubins = {}
    with subprocess.Popen(command, env=environment, cwd=root, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for line in process.stdout:
            name, path = json.loads(line)
            cubins[name] = Path(path)
            progress()
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}")
    return cubins


def main(names: list[str]) -> None:
    with compiled_for("sm_90") as kernels:
        for name in names:
            cubin = launch(VARIANTS[name], kernels).asm["cubin"]  # type: ignore[attr-defined]
            target = cached(cubin)
            target.write_bytes(cubin)
            print(json.dumps([name, str(target)]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
