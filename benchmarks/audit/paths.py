"""The main path of a kernel: the fewest instructions that do a stated work in a loop.

A kernel's hot loop has branches for tails, types and methods. Which of them a case takes is said by
its work: for each octet (eight parameters) the vectors that are loaded and stored, the weighted
sums of bytes and the groups of random words. Any other load or store of global memory is not on the
path: neither a narrow one nor one of an operand that the case does not have. One under a predicate
takes its slot, and may do its work or not.
"""

import heapq
import re
from collections.abc import Iterable
from dataclasses import astuple, dataclass

from benchmarks.audit.sass import Block, Function, Instruction

# Of a group's twenty products a few are the same for all threads or all draws, and leave the loop.
PRODUCTS_OF_GROUP = 16
# Octets for a thread in an iteration. Of a loop the fewest are right with which there is a path:
# with more, operands that the case does not have could be taken for those of another octet.
OCTETS = (1, 2, 4)


@dataclass(frozen=True)
class Work:
    """For an octet. ``sums`` counts DP4A instructions, ``atomics`` those on shared memory,
    ``groups`` groups of four random words."""

    loads16: int = 0
    loads8: int = 0
    stores16: int = 0
    stores8: int = 0
    sums: int = 0
    atomics: int = 0
    groups: int = 0

    def times(self, octets: int) -> "Work":
        return Work(*(octets * number for number in astuple(self)))


@dataclass(frozen=True)
class Path:
    """What a thread does for ``octets`` octets, and before the loop."""

    octets: int
    instructions: tuple[Instruction, ...]
    start: int

    @property
    def slots(self) -> float:
        """Issue slots for a parameter."""
        return len(self.instructions) / (8 * self.octets)


def _work_of(block: Block, predicate: bool) -> tuple[int, ...] | None:
    """A block's work, in the order of the fields of Work; None where it has other work."""
    counts = [0] * 7
    for instruction in block.instructions:
        opcode = instruction.opcode
        if instruction.is_a("CALL", "BRX"):
            return None
        if instruction.is_a("LDG", "STG") and (predicate or not instruction.guard):
            width = next((i for i, w in enumerate((".128", ".64")) if w in opcode), None)
            if width is not None:
                counts[2 * (opcode[0] == "S") + width] += 1
            elif not instruction.guard:
                return None
        elif opcode.startswith("IDP.4A"):
            counts[4] += 1
        elif instruction.is_a("ATOMS"):
            counts[5] += 1
        elif re.match(r"IMAD\.(WIDE|HI)\.U32", opcode):
            counts[6] += 1
    return tuple(counts)


def main_path(function: Function, work: Work, *, apart: bool | None = None) -> Path:
    """The cheapest way through a loop that does the work, for one octet or several at once.

    Args:
        apart: whether something is stored by an address that nothing is loaded by; None for either.

    Raises:
        LookupError: there is none.
    """
    done_by = [{_work_of(block, True), _work_of(block, False)} for block in function.blocks]
    found = []
    for header, body in function.loops:
        for octets in OCTETS:
            blocks = _cheapest(function, done_by, header, body, work.times(octets))
            if blocks is not None:
                instructions = tuple(i for b in blocks for i in function.blocks[b].instructions)
                if apart is None or _stores_apart(instructions) == apart:
                    found.append(Path(octets, instructions, _start(function, header)))
                break
    if not found:
        raise LookupError(f"no loop of {function.name} does {work} in vectors, and nothing else")
    return min(found, key=lambda path: path.slots)


def _cheapest(function: Function, done_by: list[set], header: int, body: frozenset[int],
              work: Work) -> list[int] | None:  # fmt: skip
    """Dijkstra's search over (block, work done so far), from the header back to it."""
    *exact, groups = astuple(work)
    enough = PRODUCTS_OF_GROUP * groups
    waiting: list[tuple[int, int, tuple[int, ...], tuple]] = [(0, header, (0,) * 7, ())]
    seen = set()
    while waiting:
        cost, block, done, trail = heapq.heappop(waiting)
        if block == header and trail:
            if done == (*exact, enough):
                return _blocks_of(trail)
            continue
        if (block, done) in seen:
            continue
        seen.add((block, done))
        cost += len(function.blocks[block].instructions)
        for own in done_by[block]:
            # What an inner loop does again is not the work of another octet.
            if own is None or (any(own[:4]) and block in _blocks_of(trail)):
                continue
            total = tuple(a + b for a, b in zip(done, own, strict=True))
            if any(a > b for a, b in zip(total, exact, strict=False)):
                continue
            total = (*total[:6], min(total[6], enough))
            for successor in function.blocks[block].successors:
                if successor in body:
                    heapq.heappush(waiting, (cost, successor, total, (block, trail)))
    return None


def _blocks_of(trail: tuple) -> list[int]:
    blocks = []
    while trail:
        block, trail = trail
        blocks.append(block)
    return blocks[::-1]


def _start(function: Function, header: int) -> int:
    """The fewest instructions from the kernel's first one to the loop."""
    waiting, seen = [(0, 0)], set()
    while waiting:
        cost, block = heapq.heappop(waiting)
        if block == header:
            return cost
        if block not in seen:
            seen.add(block)
            cost += len(function.blocks[block].instructions)
            for successor in function.blocks[block].successors:
                heapq.heappush(waiting, (cost, successor))
    raise LookupError(f"a loop of {function.name} is never reached")


def _stores_apart(instructions: Iterable[Instruction]) -> bool:
    """Whether something is stored by an address that nothing is loaded by."""
    bases: dict[str, set[str]] = {"LDG": set(), "STG": set()}
    for instruction in instructions:
        if instruction.is_a("LDG", "STG"):
            base = re.search(r"\[(R\d+)", instruction.operands)
            bases[instruction.opcode[:3]].add(base[1] if base else "")
    return not bases["STG"] <= bases["LDG"]
