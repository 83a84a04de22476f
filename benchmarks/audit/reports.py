"""What is found in a kernel's machine code, and how it compares with its budget."""

from collections import Counter
from dataclasses import asdict, dataclass, field

from benchmarks.audit import pipes
from benchmarks.audit.paths import main_path
from benchmarks.audit.pipes import H200
from benchmarks.audit.sass import Function
from benchmarks.audit.variants import Variant

# More slots than were recorded, for a parameter, are a regression.
TOLERANCE = 1.0
# Octets that a thread goes through in a long block.
OCTETS_OF_BLOCK = 16


@dataclass
class Report:
    """Of a variant on a backend. All counts are for a parameter, on the main path.

    Attributes:
        slots: issue slots in the loop.
        start: issue slots before the loop, shared out over a long block's parameters.
        instructions: by class; see :data:`benchmarks.audit.pipes.CLASSES`.
        bounds: cycles of a sub-partition for a warp, by what takes them, and the slots that pass
            while memory moves the parameter.
        bound: the largest of them.
        share: the predicted time of a copy of as many bytes, over the predicted time.
        widths: in bytes, of the loads and stores of global memory.
        problems: what is wrong, whatever the budget.
    """

    backend: str
    name: str
    slots: float = 0.0
    start: float = 0.0
    octets: int = 0
    instructions: dict[str, float] = field(default_factory=dict)
    bounds: dict[str, float] = field(default_factory=dict)
    bound: str = ""
    share: float = 0.0
    bytes: int = 0
    widths: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def as_json(self) -> dict:
        return asdict(self)


def examine(backend: str, name: str, variant: Variant, function: Function) -> Report:
    report = Report(backend, name, bytes=variant.bytes)
    apart = variant.apart if backend == "cuda" and variant.form == "sweep" else None
    try:
        path = main_path(function, variant.work(backend), apart=apart)
    except LookupError as error:
        report.problems.append(str(error))
        return report
    elements = 8 * path.octets
    counts = Counter(map(pipes.class_of, path.instructions))
    moved = pipes.widths(path.instructions, "LDG", "STG", "LDS", "STS")
    report.octets, report.slots = path.octets, path.slots
    report.start = path.start / (8 * OCTETS_OF_BLOCK)
    report.instructions = {kind: n / elements for kind, n in sorted(counts.items())}
    report.bounds = {by: n / elements for by, n in pipes.cycles(counts, moved).items()}
    report.bounds["issue"] += report.start
    report.bounds["memory"] = H200.slots_in_time_of(variant.bytes)
    report.bound = max(report.bounds, key=lambda by: report.bounds[by])
    report.share = report.bounds["memory"] / report.bounds[report.bound]
    report.widths = sorted(pipes.widths(path.instructions, "LDG", "STG"), reverse=True)
    report.problems += _problems(variant, function, counts)
    return report


def _problems(variant: Variant, function: Function, counts: Counter[str]) -> list[str]:
    problems = []
    if any(i.is_a("LDL", "STL") for i in function.instructions):
        problems.append("uses local memory: registers are spilled, or an array is indexed")
    if variant.exact and counts["mufu"]:
        problems.append(f"{counts['mufu']} MUFU instructions on the main path, of a law without")
    if not variant.joins and (counts["shared"] or counts["barrier"]):
        problems.append("values change places through shared memory on the main path")
    if counts["other"]:
        problems.append(f"{counts['other']} instructions of no known class on the main path")
    return problems


def compare(report: Report, budget: dict[str, float] | None) -> list[str]:
    """What is wrong with a kernel.

    Args:
        budget: ``slots`` as they were recorded, and a ``goal`` where there is one.
    """
    if report.problems or not report.slots:
        return report.problems
    if budget is None or "slots" not in budget:
        return ["has no budget; --update records what it is"]
    recorded, goal = budget["slots"], budget.get("goal")
    if report.slots > recorded + TOLERANCE:
        return [f"{report.slots:.2f} slots for a parameter, where {recorded:.2f} were recorded"]
    if goal is not None and report.slots > goal >= recorded:
        return [f"{report.slots:.2f} slots for a parameter; the goal is {goal:g}"]
    return []
