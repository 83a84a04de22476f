"""Triton's kernels compiled for GPUs that need not be there: what their machine code is like.

Triton compiles with its interpreter off. So this file, run as a program, compiles what a sweep,
inner products or selections launch and prints what it finds in the code; the tests look at that.
"""

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from benchmarks.audit.triton_kernels import TARGETS, compiled_for
from tests import merging_cases
from zokern.deltas import DeltaMerge
from zokern.laws import LAWS
from zokern.merging import (
    AdamNumbers,
    AdamSteps,
    Differences,
    L1Sums,
    Mask,
    MergeStep,
    Selection,
    Values,
)
from zokern.sweep import InnerProducts, Shard, Sweep, Update

pytest.importorskip("triton")

STORAGES = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "fp16": (torch.float16, None),
    "bf16_int16": (torch.bfloat16, torch.int16),
    "bf16_int8": (torch.bfloat16, torch.int8),
    "fp16_fp16": (torch.float16, torch.float16),
}
# Bytes by the ends of the instructions' names.
NVIDIA_WIDTHS = {".E.128": 16, ".E.64": 8}
AMD_WIDTHS = {"dwordx4": 16, "dwordx2": 8}
SAMPLE = {"seed": 1, "draw": 2, "tensor_id": 3, "offset": 4}


class Case(NamedTuple):
    """A sweep; ``rows`` of 64 elements, or one."""

    storage: str = "bf16"
    law: str = "gauss16"
    k: int = 1
    rows: int = 1
    scale: float = 1.0
    outs: bool = False
    picked: bool = False


CASES = {name: Case(storage=name) for name in STORAGES}
# Compiled for one GPU of each maker: the others differ in the instructions for the same things.
MORE_CASES = {
    "two-directions": Case(k=2),
    "many-directions": Case(k=5),
    "rows": Case(rows=100),
    "scaled": Case(scale=0.5),
    "picked-rows": Case(rows=100, picked=True),
    "outs": Case(outs=True),
    "split-outs": Case(storage="bf16_int16", outs=True),
    **{law: Case(law=law) for law in ("gauss32", "rademacher", "normal")},
}
ONE_OF_EACH_MAKER = ("sm_90", "gfx942")
COMPILED = [
    f"{target}-{name}"
    for target in TARGETS
    for name in (CASES | MORE_CASES if target in ONE_OF_EACH_MAKER else CASES)
]
# Sweeps that are not plain, and inner products with vectors of a dtype.
FORMS = ("master-evaluates", "momentum", "two-dense", "everything", "rounding")
PRODUCTS = ("fp32", "bf16")
# What magnitudes are selected from, and what is launched for them.
VALUES = ("plain", "rounded", "adam")
KERNELS = ("count", "ties", "cut", "sums")
# Merges of models: at random, of elected signs, and of models of several dtypes.
MERGES = ("merge-linear", "merge-random", "merge-ties", "merge-max", "merge-mixed")
# Steps of merging optimizers.
STEPS = ("step-everything", "step-split8", "step-ties-sparse", "step-paper", "step-ema")
OTHERS = [
    f"{target}-{name}"
    for target in ONE_OF_EACH_MAKER
    for name in (
        *FORMS,
        *(f"products-{dtype}" for dtype in PRODUCTS),
        *(f"{values}-{kernel}" for values in VALUES for kernel in KERNELS),
        *MERGES,
        *STEPS,
    )
]


def sweep(case: Case, seed: int = 0, count: int = 1) -> Sweep:
    dtype, residual_dtype = STORAGES[case.storage]
    numel = 1 << 16 if case.rows == 1 else 64 * case.rows
    params = [torch.empty(numel, dtype=dtype) for _ in range(count)]
    row = numel // case.rows
    return Sweep(
        params=params,
        residuals=[residual_dtype and torch.empty(numel, dtype=residual_dtype) for _ in params],
        masters=None,
        outs=[torch.empty_like(param) for param in params] if case.outs else None,
        dense=[],
        shards=[Shard(8 * seed, row, row + 8)] * count,
        rows=[torch.arange(case.rows) if case.picked else None] * count,
        tensor_ids=[seed] * count,
        draws=[(seed + i) % 2**32 for i in range(case.k)],
        coeffs=[[0.1] * case.k] * count,
        scales=[[case.scale] * case.k] * count,
        rest=case.k,
        update=None,
        rounding=None,
        seed=seed,
        law=case.law,
    )


def sweep_of_form(form: str) -> Sweep:
    plain = sweep(Case("fp32" if form == "momentum" else "bf16", rows=100))
    (param,) = plain.params
    master, momentum = param.float(), param.float()
    update = Update([[0.5] * 3], [0.9], [0.1], [momentum], sign=form == "everything")
    mixed = {
        "dense": [[torch.empty_like(param)], [momentum]],
        "draws": [1, -1, -2],
        "coeffs": [[0.1] * 3],
        "scales": [[1.0] * 3],
        "rest": 3,
    }
    changes: dict = {
        "master-evaluates": {"masters": [master], "rest": 0},
        "momentum": {"update": replace(update, gradient=[[0.5]])},
        "two-dense": mixed,
        "everything": mixed | {"masters": [master], "update": update},
        "rounding": mixed | {"rounding": 3},
    }[form]
    return replace(plain, **changes)


def products_of(dtype: str) -> InnerProducts:
    plain = sweep(Case(dtype))
    return InnerProducts(plain.params, plain.shards, [0], draw=1, seed=2, law="gauss16")


def merge_named(name: str) -> DeltaMerge:
    numel, half = 1 << 16, torch.bfloat16
    dtypes = [half, torch.float32] if name == "merge-mixed" else [half, half]
    numbers = torch.zeros(2, 1)
    plain = DeltaMerge(
        outs=[torch.empty(numel, dtype=half)],
        bases=[torch.empty(numel, dtype=half)],
        models=[[torch.empty(numel, dtype=dtype)] for dtype in dtypes],
        weights=[0.3, 0.7],
        ratios=None,
        thresholds=None,
        cuts=None,
        limits=[1 << 32] * 2,
        draws=[0, 1],
        seed=3,
        tensor_ids=[5],
        rounded=True,
        votes="none",
        zero_up=True,
        combine="sum",
        divisor=2.0,
        scale=0.5,
    )
    by_magnitude: dict = {"thresholds": numbers, "cuts": numbers.long(), "votes": "weighted"}
    changes: dict = {
        "merge-linear": {},
        "merge-random": {"limits": [1 << 31, 5], "ratios": numbers},
        "merge-ties": by_magnitude | {"combine": "mean"},
        "merge-max": by_magnitude | {"combine": "max", "votes": "total"},
        "merge-mixed": by_magnitude | {"combine": "mean", "votes": "frequency"},
    }
    return replace(plain, **changes[name])


def values_named(name: str) -> Values:
    numel = 1 << 16
    half, single = torch.empty(numel, dtype=torch.bfloat16), torch.empty(numel)
    if name == "plain":
        return Differences([single])
    if name == "rounded":
        return Differences([half], [single], rounded=True)
    numbers, merges = torch.tensor([AdamNumbers()]), torch.ones(1, dtype=torch.int64)
    return AdamSteps([half], [half], [single], [single], numbers, merges)


def select_and_sum(kernels: list, name: str) -> dict:
    """The kernels that are launched, by what they do."""
    from zokern.backends.triton import l1, selection

    values, numbers = values_named(name), torch.zeros(1, dtype=torch.int64)
    selection.select(Selection(values, [1000], False))
    count, ties, cut = kernels[-3:]
    shard = Shard(0, 1 << 16, 1 << 16)
    l1.l1_sums(L1Sums(values, Mask(None, None, numbers, numbers, [shard], [0], 1)))
    return dict(zip(KERNELS, (count, ties, cut, kernels[-2]), strict=True))


def step_of(form: str, sizes: Sequence[int] = (1 << 16,)) -> MergeStep:
    bf16 = torch.bfloat16
    halves = merging_cases.Case(sizes=sizes, storage="bf16", grad=bf16, state=bf16, tau=bf16)
    changes: dict = {
        "step-everything": {"method": "dare_paper", "master": True, "steps_k": True},
        "step-split8": {"storage": "bf16-split8"},
        "step-ties-sparse": {"method": "ties", "sparse": True},
        "step-paper": {"method": "ties_paper", "storage": "fp32", "state": torch.float32},
        "step-ema": {"method": "ema", "shards": [(8, 64, 72)] * len(sizes)},
    }[form]
    return merging_cases.make_step(replace(halves, **changes))


def loops(sass: str) -> Iterator[tuple[int, list[str]]]:
    """For each loop how many instructions come before it, and those in it."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*);", line):
            instructions.append(instruction[1])
            jump = re.match(r"BRA.*`\((\.L_x_\d+)\)", instruction[1])
            if jump and jump[1] in labels:
                yield labels[jump[1]], instructions[labels[jump[1]] :]


@functools.cache
def sass_of(cubin: bytes) -> str:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        # Without an analysis of indirect jumps, which there are none of.
        command = [tools / "nvdisasm", "-c", "--no-dataflow", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def nvidia_report(kernel) -> dict:
    """What is asked of every kernel."""
    sass = sass_of(kernel.asm["cubin"])
    return {
        "vectors": len(re.findall(r"\b(?:LDG|STG)\.E\.128", sass)),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "inexact": re.findall(r"\S*(?:\.ftz|\.approx)\S*", kernel.asm["ptx"]),
        "contracts": kernel.metadata.enable_fp_fusion,
    }


def nvidia_tile_report(kernel, case: Case) -> dict:
    """What is asked of the plain sweep's tiles without masks, whose loop comes first."""
    from zokern.backends.triton import perturb

    before, body = next(
        (b, loop) for b, loop in loops(sass_of(kernel.asm["cubin"])) if "STG" in str(loop)
    )
    opcodes = [instruction.split()[0] for instruction in body]
    octets, warps = perturb._tile(case.storage, 1 << 20)
    per_tile = octets * 8 / (32 * warps)
    return {
        "widths": sorted(
            {NVIDIA_WIDTHS.get(op[3:], 0) for op in opcodes if op[:3] in ("LDG", "STG")}
        ),
        "exchange": sorted({op for op in opcodes if re.match("LDS|STS|BAR|SHFL", op)}),
        "slots": (len(body) + before / perturb.MAX_TILES) / per_tile,
    }


def amd_report(kernel) -> dict:
    code = kernel.asm["amdgcn"]
    return {
        "vectors": len(re.findall(r"_(?:load|store)_dwordx4", code)),
        "spills": len(re.findall(r"\bscratch_\w+", code)),
        "denormals": re.findall(r"denorm_mode_\w+ (\d)", code),
        "contracts": kernel.metadata.enable_fp_fusion,
    }


def amd_tile_report(kernel) -> dict:
    blocks = re.split(r"\n(?=\.LBB)", kernel.asm["amdgcn"])
    body = next(block for block in blocks if "global_store_dwordx" in block)
    return {
        "widths": sorted(
            {AMD_WIDTHS.get(op, 0) for op in re.findall(r"_(?:load|store)_(\w+)", body)}
        ),
        "exchange": sorted(set(re.findall(r"\bds_\w+|\bs_barrier", body))),
    }


def main() -> None:
    from zokern.backends.triton import deltas, merging, noise, perturb, products, update

    reports: dict[str, object] = {}
    for target in TARGETS:
        amd = target.startswith("gfx")
        report = amd_report if amd else nvidia_report
        with compiled_for(target) as kernels:
            for name, case in (CASES | MORE_CASES).items():
                if f"{target}-{name}" in COMPILED:
                    perturb.perturb_(sweep(case))
                    kernel = kernels[-1]
                    tile = amd_tile_report(kernel) if amd else nvidia_tile_report(kernel, case)
                    reports[f"{target}-{name}"] = report(kernel) | tile
            if target in ONE_OF_EACH_MAKER:
                for form in FORMS:
                    update.perturb_(sweep_of_form(form))
                    reports[f"{target}-{form}"] = report(kernels[-1])
                for dtype in PRODUCTS:
                    products.inner_products(products_of(dtype))
                    reports[f"{target}-products-{dtype}"] = report(kernels[-1])
                for form in STEPS:
                    merging.merge_step_(step_of(form))
                    reports[f"{target}-{form}"] = report(kernels[-1])
                for values in VALUES:
                    for name, kernel in select_and_sum(kernels, values).items():
                        reports[f"{target}-{values}-{name}"] = report(kernel)
                for name in MERGES:
                    deltas.merge_deltas(merge_named(name))
                    reports[f"{target}-{name}"] = report(kernels[-1])
            for law in LAWS:
                noise.sample(law, 100, **SAMPLE, device=torch.device("cpu"))
    with compiled_for("sm_90") as kernels:
        for seed in (0, 1, 16, (1 << 31) + 5, 1 << 32, (1 << 64) - 1):
            small, draw = seed % (1 << 31), seed % (1 << 32)
            plain = replace(sweep(Case(), small, count=1 + seed % 40), seed=seed)
            perturb.perturb_(plain)
            update.perturb_(replace(plain, masters=[p.float() for p in plain.params], rest=0))
            step = step_of("step-everything", [1 + small % 1000] * (1 + seed % 40))
            merging.merge_step_(replace(step, mask=replace(step.mask, seed=seed)))
            operands = (plain.params, plain.shards, plain.tensor_ids)
            products.inner_products(InnerProducts(*operands, draw, seed, "gauss16"))
            sample = {"seed": seed, "draw": draw, "tensor_id": small, "offset": small}
            noise.sample("gauss16", 1 + seed % 40, **sample, device=torch.device("cpu"))
        reports["distinct"] = len({kernel.hash for kernel in kernels})
    print(json.dumps(reports))


@pytest.fixture(scope="module")
def reports() -> dict:
    """What main() prints."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_triton_compile"],
        env=environment,
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", COMPILED)
def test_full_tiles_go_in_vectors_and_stay_in_their_thread(reports, name):
    report = reports[name]
    storage = name.split("-", 1)[1]
    if storage != "many-directions":
        # int8 residuals are half as wide, and so are the numbers of picked rows.
        narrow = {8} if storage in ("bf16_int8", "picked-rows") else set()
        assert {16} <= set(report["widths"]) <= {16} | narrow
    # In float32 the halves of octets change places within a warp.
    shuffles = {"SHFL.IDX", "SHFL.BFLY", "ds_bpermute_b32"} if storage == "fp32" else set()
    assert set(report["exchange"]) <= shuffles


@pytest.mark.parametrize("name", COMPILED + OTHERS)
def test_no_register_is_spilled(reports, name):
    assert reports[name]["spills"] == 0


@pytest.mark.parametrize("name", OTHERS)
def test_other_kernels_go_in_vectors_too(reports, name):
    assert reports[name]["vectors"] > 0


@pytest.mark.parametrize("name", [name for name in COMPILED + OTHERS if name.startswith("sm")])
def test_no_operation_is_approximate(reports, name):
    # A root begins with an approximation, which two fma correct.
    roots = {"rsqrt.approx.ftz.f32"} if name == "sm_90-normal" else set()
    assert set(reports[name]["inexact"]) == roots


@pytest.mark.parametrize("name", COMPILED + OTHERS)
def test_nothing_is_fused_by_the_compiler(reports, name):
    assert reports[name]["contracts"] is False


@pytest.mark.parametrize("name", [name for name in COMPILED + OTHERS if name.startswith("gfx")])
def test_denormals_are_kept(reports, name):
    assert reports[name]["denormals"] == ["3", "3"]


@pytest.mark.parametrize(
    ("name", "budget"), [("bf16", 19), ("outs", 19), ("fp16", 19), ("two-directions", 34)]
)
def test_instructions_for_a_parameter(reports, name, budget):
    assert reports[f"sm_90-{name}"]["slots"] <= budget


def test_other_numbers_do_not_compile_again(reports):
    assert reports["distinct"] == 5


if __name__ == "__main__":
    main()
