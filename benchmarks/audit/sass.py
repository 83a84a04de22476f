"""A listing of ``nvdisasm -c``, read: functions, their instructions, blocks and loops."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

_LABEL = re.compile(r"^(\S+):\s*$")
_INSTRUCTION = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?P<guard>@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)\s*(?P<operands>.*?)\s*;"
)
_TARGET = re.compile(r"`\((\S+)\)")
_BARRIER = re.compile(r"\bB\d+\b")


@dataclass(frozen=True)
class Instruction:
    guard: str  # a predicate like @!P0, or ""
    opcode: str
    operands: str

    def is_a(self, *opcodes: str) -> bool:
        return self.opcode.split(".", 1)[0] in opcodes

    @property
    def target(self) -> str | None:
        """The label that it names."""
        found = _TARGET.search(self.operands)
        return found[1] if found else None


@dataclass(frozen=True)
class Block:
    """Instructions without a jump into or out of their midst, and the blocks that may follow."""

    instructions: tuple[Instruction, ...]
    successors: tuple[int, ...]


@dataclass
class Function:
    name: str
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    @cached_property
    def blocks(self) -> list[Block]:
        jumps = {"BRA", "EXIT", "RET", "BRX", "BSYNC", "CALL"}
        ends = {
            i + 1 for i, instruction in enumerate(self.instructions) if instruction.is_a(*jumps)
        }
        starts = sorted({0, *ends, *self.labels.values()} - {len(self.instructions)})
        number = {start: i for i, start in enumerate(starts)}
        bounds = zip(starts, [*starts[1:], len(self.instructions)], strict=True)
        return [
            Block(
                tuple(self.instructions[start:end]),
                tuple(number[s] for s in self._successors(end - 1) if s in number),
            )
            for start, end in bounds
        ]

    def _successors(self, at: int) -> Iterator[int]:
        """Where the instruction may go on."""
        instruction = self.instructions[at]
        if instruction.is_a("BRA") and not instruction.opcode.startswith("BRA.DIV"):
            conditional = instruction.guard or re.match(r"!?U?P\d", instruction.operands)
            if instruction.target in self.labels:
                yield self.labels[instruction.target]
            if conditional:
                yield at + 1
        elif instruction.is_a("BSYNC"):
            yield self._joined_at(at)
        elif not instruction.is_a("EXIT", "RET", "BRX") or instruction.guard:
            yield at + 1

    def _joined_at(self, at: int) -> int:
        """Where the threads go on that a BSYNC waits for: its BSSY says."""
        barrier = _BARRIER.search(self.instructions[at].operands)
        for before in reversed(self.instructions[:at]):
            same = barrier and before.is_a("BSSY") and barrier[0] in before.operands.split(",")[0]
            if same and before.target in self.labels:
                return self.labels[before.target]
        return at + 1

    @cached_property
    def loops(self) -> list[tuple[int, frozenset[int]]]:
        """Each loop's first block, and all of its blocks; a loop goes back to a block before."""
        before: dict[int, set[int]] = {i: set() for i in range(len(self.blocks))}
        for i, block in enumerate(self.blocks):
            for successor in block.successors:
                before[successor].add(i)
        loops: dict[int, set[int]] = {}
        for i, block in enumerate(self.blocks):
            for header in block.successors:
                if header <= i and block.instructions[-1].target != "":
                    body = loops.setdefault(header, {header})
                    waiting = [i]
                    while waiting:
                        inside = waiting.pop()
                        if inside not in body:
                            body.add(inside)
                            waiting.extend(before[inside])
        return [(header, frozenset(body)) for header, body in sorted(loops.items())]


def parse(listing: str) -> dict[str, Function]:
    """The functions of a listing by their mangled names."""
    functions: dict[str, Function] = {}
    function = None
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            if label[1].startswith(".text."):
                name = label[1].removeprefix(".text.")
                function = functions.setdefault(name, Function(name))
            elif function is not None:
                function.labels[label[1]] = len(function.instructions)
        elif function is not None and (found := _INSTRUCTION.match(line)):
            guard = (found["guard"] or "").strip()
            function.instructions.append(Instruction(guard, found["opcode"], found["operands"]))
    return functions
