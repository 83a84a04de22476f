"""What instructions cost on an H200, and which of its limits a kernel meets first.

An H200's multiprocessor has four sub-partitions; each issues an instruction for a warp of 32
threads every cycle. The pipes behind take some of them more slowly: results per cycle and
multiprocessor are those of the CUDA C++ Programming Guide, "Throughput of Native Arithmetic
Instructions", for compute capability 9.0, and a sub-partition has a quarter of them. All numbers
are predictions; ``python -m zokern.bench --device cuda`` measures.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.audit.sass import Instruction

# The first class whose pattern an opcode begins with; one that none fits counts as "other".
CLASSES = {
    "uniform": r"U[A-Z]|R2UR|S2UR|VOTEU|REDUX",
    "wide": r"IMAD\.(WIDE|HI)",
    "imad": r"IMAD|IDP|IMUL",
    "fma": r"F(FMA|MUL|ADD|SWZADD)\b|H(FMA2|ADD2|MUL2|MNMX2)|FFMA|FMUL|FADD",
    "fp64": r"D(ADD|MUL|FMA|SETP)",
    "mufu": r"MUFU",
    "convert": r"F2F\b|F2I|I2F\b|FRND|POPC|FLO|BREV",
    "logic": r"LOP3|SHF|PRMT|SHL|SHR|LOP|SGXT|BMSK|PLOP3|R2P|P2R",
    "integer": r"V?IADD|ISETP|LEA|F?SEL|FSET|V?[FI]MNMX|IABS|[FI]2FP|MOV|CS2R|S2R|FCHK",
    "global": r"LDG|STG|RED|ATOMG",
    "shared": r"LDS|STS|ATOMS|LDSM|STSM",
    "local": r"LDL|STL",
    "constant": r"LDC",
    "exchange": r"SHFL|MATCH|VOTE",
    "barrier": r"BAR|WARPSYNC|MEMBAR|DEPBAR",
    "branch": r"BRA|BSSY|BSYNC|BREAK|EXIT|CALL|RET|NOP|YIELD",
}  # fmt: skip
_SIZES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
_PATTERNS = {name: re.compile(pattern) for name, pattern in CLASSES.items()}


def class_of(instruction: Instruction) -> str:
    matches = (name for name, p in _PATTERNS.items() if p.match(instruction.opcode))
    return next(matches, "other")


@dataclass(frozen=True)
class Machine:
    """An H200 SXM; the clock and the bandwidth are assumptions.

    Attributes:
        clock: in Hz, sustained; the boost clock is 1.98e9.
        bandwidth: in bytes/s, of a copy; 4.8e12 by the data sheet.
    """

    multiprocessors: int = 132
    clock: float = 1.7e9
    bandwidth: float = 4.2e12

    def slots_in_time_of(self, size: float) -> float:
        """Issue slots, of all threads together, while so many bytes are moved."""
        return size / self.bandwidth * self.clock * self.multiprocessors * 128


H200 = Machine()


def cycles(counts: Counter[str], moved: Counter[int]) -> dict[str, float]:
    """The cycles of a sub-partition for a warp's instructions, by what they would be bound by.

    64 results a cycle make 2 cycles for a warp, 16 make 8. IMAD.WIDE, whose rate is not published,
    is taken for half as fast as IMAD, since it writes two registers. FFMA and its kin go through
    the pipe of IMAD or through another of the same width. Global and shared memory are reached
    through 128 bytes a cycle and multiprocessor.
    """
    heavy = 4 * counts["wide"] + 2 * counts["imad"]
    memory = sum(n * max(4, width) for width, n in moved.items())
    return {
        "issue": float(sum(counts.values())),
        "fma": max(heavy, (heavy + 2 * counts["fma"]) / 2),
        "alu": 2.0 * (counts["logic"] + counts["integer"]),
        "mufu": 8.0 * (counts["mufu"] + counts["convert"]),
        "fp64": 2.0 * counts["fp64"],
        "lsu": float(memory + 4 * counts["exchange"]),
    }


def widths(instructions: Iterable[Instruction], *kinds: str) -> Counter[int]:
    """How many loads and stores of each width in bytes, but for narrow ones under a predicate."""
    counts: Counter[int] = Counter()
    for instruction in instructions:
        narrow = ".128" not in instruction.opcode
        if instruction.is_a(*kinds) and not (instruction.guard and narrow):
            parts = instruction.opcode.split(".")
            counts[next((n for part, n in _SIZES.items() if part in parts), 4)] += 1
    return counts
