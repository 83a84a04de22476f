"""The static audit of the GPU kernels reads machine code rightly, and fails when it gets worse."""

import json
import shutil
from pathlib import Path

import pytest

from benchmarks.audit.__main__ import BUDGETS, CSRC, main
from benchmarks.audit.paths import Work, main_path
from benchmarks.audit.pipes import class_of
from benchmarks.audit.reports import Report, compare, examine
from benchmarks.audit.sass import Function, parse
from benchmarks.audit.tools import Missing, find
from benchmarks.audit.triton_kernels import DTYPES
from benchmarks.audit.variants import NOISE, STORAGES, VARIANTS, Variant

# A loop over vectors of 16 bytes, and one over single elements for what is left.
LISTING = """
.text.scale:
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/              @!P0 BRA `(.L_x_2) ;
.L_x_1:
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   FMUL R4, R4, R8 ;
        /*0040*/              @P1  BRA `(.L_x_3) ;
        /*0050*/                   MUFU.RCP R5, R5 ;
        /*0060*/                   FADD R4, R4, R5 ;
.L_x_3:
        /*0070*/                   IMAD.WIDE.U32 R6, R0, 0x10, RZ ;
        /*0080*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0090*/              @P0  BRA `(.L_x_1) ;
.L_x_2:
        /*00a0*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*00b0*/                   STG.E desc[UR4][R2.64], R4 ;
        /*00c0*/              @P0  BRA `(.L_x_2) ;
        /*00d0*/                   EXIT ;
"""
VECTORS = Work(loads16=1, stores16=1)


@pytest.fixture
def scale() -> Function:
    (function,) = parse(LISTING).values()
    return function


def test_a_listing_is_read(scale):
    assert [len(block.instructions) for block in scale.blocks] == [2, 3, 2, 3, 3, 1]
    assert [block.successors for block in scale.blocks] == [
        (4, 1),
        (3, 2),
        (3,),
        (1, 4),
        (4, 5),
        (),
    ]
    assert [header for header, _ in scale.loops] == [1, 4]
    assert scale.instructions[1].guard == "@!P0"


def test_the_main_path_does_the_work_in_the_fewest_instructions(scale):
    path = main_path(scale, VECTORS)
    opcodes = [instruction.opcode for instruction in path.instructions]
    assert opcodes == ["LDG.E.128", "FMUL", "BRA", "IMAD.WIDE.U32", "STG.E.128", "BRA"]
    assert (path.octets, path.start, path.slots) == (1, 2, 6 / 8)


def test_narrow_loads_and_stores_are_not_the_main_path(scale):
    with pytest.raises(LookupError, match="no loop of scale"):
        main_path(scale, Work(loads16=2, stores16=1))


def test_where_a_wait_ends():
    (function,) = parse("""
.text.wait:
        /*0000*/                   BSSY B0, `(.L_x_9) ;
        /*0010*/              @P0  BRA `(.L_x_8) ;
        /*0020*/                   BSYNC B0 ;
        /*0030*/                   NOP ;
.L_x_8:
        /*0040*/                   CALL.REL.NOINC `(slow) ;
.L_x_9:
        /*0050*/                   EXIT ;
""").values()
    assert [block.successors for block in function.blocks] == [(3, 1), (4,), (3,), (4,), ()]


@pytest.mark.parametrize(
    ("opcode", "kind"),
    [
        ("IMAD.WIDE.U32", "wide"), ("IMAD.MOV.U32", "imad"), ("IDP.4A.U8.U8", "imad"),
        ("LOP3.LUT", "logic"), ("FFMA", "fma"), ("FSETP.GEU.AND", "integer"), ("UIADD3", "uniform"),
        ("HADD2.F32", "fma"), ("F2FP.BF16.F32.PACK_AB", "integer"), ("F2F.F16.F32", "convert"),
        ("DADD", "fp64"), ("LDG.E.128", "global"), ("LDL.64", "local"), ("QUUX", "other"),
    ],
)  # fmt: skip
def test_classes(opcode, kind):
    listing = f".text.f:\n        /*0000*/                   {opcode} R0, R1 ;\n"
    assert class_of(parse(listing)["f"].instructions[0]) == kind


def test_what_is_wrong_is_said(scale):
    variant = Variant("sweep", (2,), (2,))
    assert examine("cuda", "scale", variant, scale).problems == []
    spilled = parse(LISTING.replace("FMUL R4, R4, R8", "LDL R4, [R1]"))["scale"]
    assert "local memory" in str(examine("cuda", "scale", variant, spilled).problems)
    approximate = parse(LISTING.replace("FMUL R4, R4, R8", "MUFU.RCP R4, R4"))["scale"]
    assert "MUFU" in str(examine("cuda", "scale", variant, approximate).problems)
    exchanged = parse(LISTING.replace("FMUL R4, R4, R8", "STS [R1], R4"))["scale"]
    assert "shared memory" in str(examine("cuda", "scale", variant, exchanged).problems)
    narrow = parse(LISTING.replace("STG.E.128", "STG.E.64"))["scale"]
    assert "no loop" in str(examine("cuda", "scale", variant, narrow).problems)


@pytest.mark.parametrize(
    ("slots", "budget", "passes"),
    [
        (18.0, {"slots": 17.5}, True),
        (18.6, {"slots": 17.5}, False),
        (19.5, {"slots": 18.9, "goal": 19}, False),
        (22.5, {"slots": 22.0, "goal": 19}, True),
        (18.0, None, False),
    ],
)
def test_budgets(slots, budget, passes):
    assert (compare(Report("cuda", "sweep", slots=slots), budget) == []) is passes


def test_goals_are_those_of_the_design():
    budgets = json.loads(BUDGETS.read_text())
    goals = [(b, n, v["goal"]) for b in budgets for n, v in budgets[b].items() if "goal" in v]
    assert sorted(goals) == [
        ("cuda", "sweep-bf16", 19),
        ("cuda", "sweep-bf16-2", 34),
        ("triton", "sweep-bf16", 21),
        ("triton", "sweep-bf16-2", 37),
    ]
    assert {name for own in budgets.values() for name in own} == set(VARIANTS)
    assert STORAGES.keys() == DTYPES.keys()
    assert {"gauss16", "normal"} < NOISE.keys()


@pytest.fixture(params=["cuda", "triton"])
def compiler(request) -> str:
    try:
        find("nvdisasm")
        if request.param == "cuda":
            find("nvcc")
        else:
            pytest.importorskip("triton")
    except Missing as error:
        pytest.skip(str(error))
    return request.param


def test_kernels_are_within_their_budgets(compiler, tmp_path, capsys):
    found = tmp_path / "found.json"
    command = ["--backend", compiler, "--json", str(found)]
    assert main(command) == 0, capsys.readouterr().err
    reports = {report["name"]: report for report in json.loads(found.read_text())}
    plain = reports["sweep-bf16"]
    assert plain["widths"] == [16]
    assert plain["bounds"]["issue"] < plain["bounds"]["memory"]
    # Ten rounds of two products for eight parameters, of which a few leave the loop.
    assert 2.0 < plain["instructions"]["wide"] <= 2.5
    assert plain["instructions"].keys().isdisjoint({"mufu", "local", "shared", "other"})


@pytest.fixture
def one_kernel(tmp_path) -> Path:
    """CUDA sources with a single sweep in them, which compile quickly."""
    for tool in ("nvcc", "nvdisasm"):
        try:
            find(tool)
        except Missing as error:
            pytest.skip(str(error))
    shutil.copytree(CSRC, tmp_path / "csrc")
    (tmp_path / "csrc" / "cuda" / "sweep_gauss16.cu").write_text(
        '#include "sweep_kernel.cuh"\n'
        "template __global__ void zokern::sweep_global<zokern::Law::gauss16, zokern::Storage::bf16,"
        " 1>(const __grid_constant__ zokern::SweepBatch);\n"
    )
    return tmp_path / "csrc"


@pytest.mark.parametrize(
    ("worse", "message"),
    [
        ("return q * x;", None),
        ("return (q * x + 1.0f) * x;", "slots for a parameter"),
        ("return __frcp_rn(q) * x;", "MUFU"),
    ],
    ids=["as it is", "two operations more", "an approximation"],
)
def test_a_kernel_that_gets_worse_fails(one_kernel, capsys, worse, message):
    header = one_kernel / "noise.h"
    assert header.read_text().count("return q * x;") == 1
    header.write_text(header.read_text().replace("return q * x;", worse))
    command = ["--backend", "cuda", "--kernel", "sweep-bf16", "--csrc", str(one_kernel)]
    assert main(command) == (0 if message is None else 1)
    errors = capsys.readouterr().err
    assert (message or "") in errors
