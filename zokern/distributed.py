"""What the ranks of a zeroth-order run tell each other: losses, and whether they still agree.

Every exchange begins with a message of one size from each rank, in one collective: whether it has
failed, a checksum of what must be the same everywhere, and its losses. So ranks that have failed or
differ find that out together, whatever they were about to do, and none is left waiting.
"""

import hashlib
import operator
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from zokern.sharding import device_of, groups_of, holders, mesh_ranks
from zokern.sweep import Shard

# Of a message, in words of 8 bytes. More losses than fit follow in a second collective.
WORDS = 64
_HEADER = struct.Struct("qqq")
# Of a checksum, in elements.
CHUNK = 1 << 20

Settings = Mapping[str, Any]
T = TypeVar("T")


class Ranks:
    """The processes that make a run together; one that is alone communicates with nobody.

    Args:
        process_group: of torch.distributed, None for one process.
        parallel: ``data``: each rank has losses of all points, which are averaged;
            ``population``: each copy of the weights has those of its share of the points.

    Raises:
        TypeError: for what is no process group that this process is in.
    """

    def __init__(self, process_group: Any = None, parallel: str = "data") -> None:
        if process_group is not None and not (
            dist.is_available() and isinstance(process_group, dist.ProcessGroup)
        ):
            raise TypeError(
                "process_group must be a torch.distributed.ProcessGroup that this process is in, "
                f"or None, not {process_group!r}"
            )
        self._group = process_group
        self.parallel = parallel
        self.is_alone = process_group is None
        self.rank = 0 if self.is_alone else dist.get_rank(process_group)
        self.size = 1 if self.is_alone else dist.get_world_size(process_group)
        # For each rank the first one that holds parts of the same copy of the weights.
        self._copy_of = list(range(self.size))
        # Those that may have parts of this rank's copy, among all ranks that there are.
        self._holders = self._all_ranks()

    def check_dtensors(self, params: Sequence[Tensor]) -> None:
        """Raises ValueError if other ranks that have DTensors too could take other steps."""
        ranks = mesh_ranks(params)
        if len(ranks) > 1 and not ranks <= set(self._all_ranks()):
            given = "none" if self.is_alone else f"one of the ranks {self._all_ranks()}"
            raise ValueError(
                f"parameters are DTensors of the ranks {sorted(ranks)}, which must all take the "
                "same steps by the same losses: process_group must be a group of all of them, such "
                f"as torch.distributed.group.WORLD, not {given}"
            )
        parts = holders(map(groups_of, params))
        if not parts <= set(self._holders):
            raise ValueError(
                f"parts of the parameters lie on ranks {sorted(parts)}, those of the parameters "
                f"before on {self._holders}: give all of them at construction"
            )

    def share(self, parts: Sequence[Collection[int]]) -> None:
        """Learn, for each rank, on which ranks the parts of its copy of the weights lie."""
        place = {rank: i for i, rank in enumerate(self._all_ranks())}
        copy_of = list(range(self.size))
        for i, others in enumerate(parts):
            joined = {copy_of[i], *(copy_of[place[rank]] for rank in others)}
            copy_of = [min(joined) if first in joined else first for first in copy_of]
        self._copy_of = copy_of
        own = copy_of[self.rank]
        self._holders = [rank for rank, i in place.items() if copy_of[i] == own]

    def _all_ranks(self) -> list[int]:
        """The numbers of the group's ranks among all that there are."""
        if self.is_alone:
            return [dist.get_rank()] if dist.is_available() and dist.is_initialized() else []
        return dist.get_process_group_ranks(self._group)

    @property
    def _firsts(self) -> list[int]:
        """The first rank of each copy of the weights."""
        return sorted(set(self._copy_of))

    def has(self, point: int, points: int) -> bool:
        """Whether this rank evaluates a point, with the others that hold parts of its copy.

        Where there are fewer points than copies, those that are left over evaluate one again: so
        torch's generators stay alike on all of them.
        """
        if self.parallel == "data":
            return True
        copies = self._firsts
        copy = copies.index(self._copy_of[self.rank])
        return point % min(len(copies), points) == copy % points

    def losses(self, own: Sequence[float], points: int, settings: Settings) -> list[float]:
        """The losses of all points, the same on every rank, from those that each rank has.

        Raises:
            RuntimeError: on every rank, where one has failed or settings differ.
        """
        gathered = self._exchange("losses", settings, own)
        if self.parallel == "population":
            copies = self._firsts
            sharing = min(len(copies), points)
            return [gathered[copies[i % sharing]][i // sharing] for i in range(points)]
        return [mean(values) for values in zip(*gathered, strict=True)]

    def fail(self, error: BaseException) -> None:
        """Tell the other ranks, which wait for this one, that there is nothing to wait for."""
        self._exchange("", {}, failure=error)

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """All ranks get through a block, or all raise."""
        try:
            yield
        except BaseException as error:
            self.fail(error)
            raise
        self._exchange(what, {})

    def gather(self, what: str, own: T) -> list[T]:
        """What every rank has."""
        self._exchange(what, {})
        return self._gather_objects(own)

    def _exchange(
        self,
        what: str,
        settings: Settings,
        losses: Sequence[float] = (),
        failure: BaseException | None = None,
    ) -> list[list[float]]:
        """Each rank's losses; the rank that fails returns, the others raise what it raises."""
        if self.is_alone:
            return [list(losses)]
        settings = {"what it waits for": what, **settings}
        header = _HEADER.pack(failure is not None, _fingerprint(settings), len(losses))
        room = WORDS - _HEADER.size // 8
        messages = self._gather_words(header + _packed(losses[:room]), WORDS)
        failed, fingerprints, counts = zip(*map(_HEADER.unpack_from, messages), strict=True)
        if any(failed):
            self._report(failure)
            return []
        if len(set(fingerprints)) > 1:
            raise RuntimeError(
                "the ranks have come apart: " + differences(self._gather_objects(settings))
            )
        packed = [message[_HEADER.size :] for message in messages]
        if max(counts) > room:
            more = self._gather_words(_packed(losses[room:]), max(counts) - room)
            packed = [first + rest for first, rest in zip(packed, more, strict=True)]
        return [
            list(struct.unpack_from(f"{count}d", own))
            for count, own in zip(counts, packed, strict=True)
        ]

    def _report(self, failure: BaseException | None) -> None:
        text = None if failure is None else f"{type(failure).__name__}: {failure}"
        texts = self._gather_objects(text)
        if failure is None:
            errors = (f"rank {rank} with {text}" for rank, text in enumerate(texts) if text)
            raise RuntimeError(f"this rank stops because others have failed: {'; '.join(errors)}")

    def _gather_words(self, own: bytes, words: int) -> list[bytes]:
        device = device_of(self._group)
        sent = torch.frombuffer(bytearray(own.ljust(8 * words, b"\0")), dtype=torch.int64)
        received = torch.empty(self.size, words, dtype=torch.int64, device=device)
        dist.all_gather(list(received.unbind()), sent.to(device), group=self._group)
        return [struct.pack(f"{words}q", *row) for row in received.tolist()]

    def _gather_objects(self, own: T) -> list[T]:
        if self.is_alone:
            return [own]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, own, group=self._group)
        return gathered

    def __deepcopy__(self, memo: dict) -> "Ranks":
        return self

    def __reduce__(self) -> tuple:
        if self.is_alone:
            return Ranks, (None, self.parallel)
        raise TypeError(
            "an optimizer with a process group cannot be pickled, as the group cannot: save its "
            "state_dict()"
        )


def mean(values: Sequence[float]) -> float:
    """In float64, in this order; that of equal values is their value."""
    if all(value == values[0] for value in values):
        return values[0]
    # Since Python 3.12 sum() is another one.
    return reduce(operator.add, values) / len(values)


def differences(of_ranks: Sequence[Settings], *, at_most: int = 4) -> str:
    """What settings differ in and on which ranks; empty where they are the same."""
    keys = dict.fromkeys(key for settings in of_ranks for key in settings)
    found = []
    for key in keys:
        ranks_by_value: dict[str, list[int]] = {}
        for rank, settings in enumerate(of_ranks):
            value = _short(settings[key]) if key in settings else "missing"
            ranks_by_value.setdefault(value, []).append(rank)
        if len(ranks_by_value) > 1:
            sides = (f"{value} on {_names(ranks)}" for value, ranks in ranks_by_value.items())
            found.append(f"{key} is {', '.join(sides)}")
    more = [f"and {len(found) - at_most} more"] if len(found) > at_most else []
    return "; ".join(found[:at_most] + more)


def drifted(of_ranks: Sequence[Settings]) -> tuple[list[int], list[str]]:
    """The ranks that differ from most others (of equally many, from rank 0's), and in what."""
    keys = dict.fromkeys(key for sums in of_ranks for key in sums)
    ranks, names = set(), []
    for key in keys:
        values = [sums.get(key) for sums in of_ranks]
        usual = max(values, key=values.count)
        others = [rank for rank, value in enumerate(values) if value != usual]
        if others:
            ranks.update(others)
            names.append(key)
    return sorted(ranks), names


def checksum(tensor: Tensor, shard: Shard | None = None) -> int:
    """64 bits of a tensor's elements and their places, as a sum: the order does not matter.

    With a shard the places are those in the full tensor, whose checksum is the sum, modulo 2^64, of
    those of its parts.
    """
    flat = tensor.detach().reshape(-1)
    bits = flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, bits.numel(), CHUNK):
        chunk = bits[start : start + CHUNK].long()
        places = torch.arange(start, start + chunk.numel(), device=bits.device)
        if shard is not None:
            rows = places // shard.row_length
            places = shard.offset + rows * shard.row_stride + places % shard.row_length
        # Each place has a scrambling of its own (multiplications of splitmix64), so that what
        # changes in two elements does not cancel.
        mixed = (chunk ^ (places * -0x61C8864680B583EB)) * -0x40A7B892E31B1A47
        mixed = (mixed ^ (mixed >> 29)) * -0x6B2FB644ECCEEE15
        total += (mixed ^ (mixed >> 32)).sum()
    return int(total)


def _fingerprint(settings: Settings) -> int:
    digest = hashlib.blake2b(repr(sorted(settings.items())).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _packed(losses: Sequence[float]) -> bytes:
    return struct.pack(f"{len(losses)}d", *losses)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:60]}… ({_fingerprint({'': value}) % 2**32:08x})"


def _names(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
