"""A run as a list of steps: what each of them was, in a few bytes.

The file is a header and one record a step, little-endian:

========  =================================================================================
header    8 bytes ``b"zokern\\x00\\x01"``, length (u32), JSON, CRC-32 of length and JSON (u32)
step      checksum (u16), number of directions K (u16), K draws (u32), K coefficients of the
          estimated gradient (float32), the learning rate of each param group (float32)
skipped   checksum, 0: a step whose losses were not finite, which left the weights alone
settings  checksum, 0xFFFF, length (u32), JSON: what holds from the next step on
========  =================================================================================

A record's checksum is CRC-16 of what follows it, begun with its place in the file. A step with one
direction and one param group takes 16 bytes.
"""

import binascii
import ctypes
import json
import os
import struct
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

MAGIC = b"zokern\x00\x01"
SETTINGS_MARK = 0xFFFF
MAX_DIRECTIONS = SETTINGS_MARK - 1

# Elements of a tensor that its checksum looks at.
CHECKED_ELEMENTS = 4096


class Record(NamedTuple):
    """A step: the estimated gradient is Σ gradient[k]·z(draws[k]). A skipped step has no draws."""

    draws: tuple[int, ...]
    gradient: tuple[float, ...]
    lrs: tuple[float, ...]


@dataclass(frozen=True)
class _Settings:
    values: dict[str, Any]


class TrajectoryError(ValueError):
    """A trajectory that is cut off, damaged, or of another run."""


class Trajectory:
    """The record of a zeroth-order run, from which :func:`zokern.replay` rebuilds its weights.

    Give it to an optimizer (``trajectory=``), which appends each step. Beside the directions'
    numbers and the coefficients, it holds the seed, the law and the parameters' names, shapes and
    checksums. At most 16 bytes a direction, step and param group, plus the header, and a note where
    weight decay or momentum change. A copy of an optimizer (deepcopy, pickle) does not record.

    Args:
        path: where each step is appended as it is made, so that a run that is killed loses at most
            the one that it was making; None keeps the record in memory. An existing file is gone on
            with: after ``load_state_dict`` of a checkpoint of that run, the steps after the
            checkpoint are made, and recorded, anew.

    Example::

        run = zokern.Trajectory("run.zok")
        opt = zokern.MeZO(model.named_parameters(), lr=1e-6, trajectory=run)
        ...
        zokern.replay(base_model, zokern.Trajectory.load("run.zok"))
    """

    def __init__(self, path: str | os.PathLike | None = None) -> None:
        self.header: dict[str, Any] | None = None
        self._records: list[bytes] = []
        # The records that are steps, and the settings that hold at the end.
        self._steps: list[int] = []
        self._settings: dict[str, Any] = {}
        self._owner: weakref.ref | None = None
        self._path = None if path is None else Path(path)
        # What the file holds; half a record that a killed run left is cut off when it goes on.
        self._size = 0
        if self._path is not None and not self._path.absolute().parent.is_dir():
            raise FileNotFoundError(f"there is no folder {self._path.absolute().parent}")
        if self._path is not None and self._path.exists() and self._path.stat().st_size > 0:
            self._read(self._path, allow_truncated=True)
            self._size = self._path.stat().st_size

    @classmethod
    def load(cls, path: str | os.PathLike, *, allow_truncated: bool = False) -> "Trajectory":
        """The trajectory in a file, in memory.

        Args:
            path: the file.
            allow_truncated: take the whole steps of a file that was cut off in mid-write; what is
                damaged is refused all the same.

        Raises:
            TrajectoryError: if the file is cut off, damaged, or no trajectory.
        """
        trajectory = cls()
        trajectory._read(Path(path), allow_truncated=allow_truncated)
        return trajectory

    def save(self, path: str | os.PathLike) -> None:
        """Write the trajectory to a file, which is replaced at once or not at all."""
        _write_atomically(Path(path), self.to_bytes())

    def to_bytes(self) -> bytes:
        """What a file of it holds."""
        header = b"" if self.header is None else _pack_header(self.header)
        return header + b"".join(self._records)

    def __len__(self) -> int:
        """The number of steps."""
        return len(self._steps)

    def __iter__(self) -> Iterator[tuple[Record, dict[str, Any]]]:
        """Each step and the settings that hold for it, one object as long as they do not change."""
        settings: dict[str, Any] = {}
        for record in self._records:
            content = _unpack(record, self._groups)
            if isinstance(content, _Settings):
                settings = settings | content.values
            else:
                yield content, settings

    @property
    def _groups(self) -> int:
        assert self.header is not None
        return self.header["groups"]

    def attach(
        self, description: dict[str, Any], step: int, *, owner: object, may_rewind: bool
    ) -> None:
        """Begin to record a run, or go on with it at its step number ``step``.

        Args:
            description: of the run, which the header keeps.
            step: of the run.
            owner: who records; nobody else may as long as it lives.
            may_rewind: whether the run was loaded from a checkpoint: then it takes over from
                another owner, and all its steps may be made anew.

        Raises:
            TrajectoryError: if it holds another run, or other steps of this one; naming the field.
        """
        if not may_rewind:
            self._check_owner(owner)
        self._check_size()
        if self.header is None or len(self) == 0:
            # Of a run that made no step nothing is kept.
            header = description | {"format": 1, "first_step": step}
            if self._path is not None:
                _write_atomically(self._path, _pack_header(header))
                self._size = self._path.stat().st_size
            self.header, self._records, self._settings = header, [], {}
            self._owner = weakref.ref(owner)
            return
        check_run(self.header, description)
        made = step - self.header["first_step"]
        if made < 0 or made > len(self):
            raise TrajectoryError(
                f"the trajectory holds steps {self.header['first_step']} to "
                f"{self.header['first_step'] + len(self) - 1} of the run, which stands at step "
                f"{step}: steps are missing"
            )
        if made == 0 and not may_rewind:
            where = "" if self._path is None else f" in {self._path}"
            raise TrajectoryError(
                f"the trajectory{where} holds {len(self)} steps already: record a new run in a new "
                "one, or load the state of the run that it belongs to"
            )
        self._cut(made)
        self._owner = weakref.ref(owner)

    def append(self, record: Record, settings: dict[str, Any], *, owner: object) -> None:
        """Add a step, which was made under these settings."""
        self._check_owner(owner)
        if len(record.draws) > MAX_DIRECTIONS:
            raise ValueError(
                f"a trajectory records at most {MAX_DIRECTIONS} directions a step, not "
                f"{len(record.draws)}"
            )
        contents: list[Record | _Settings] = [record]
        known = self._settings
        changed = {key: value for key, value in settings.items() if known.get(key) != value}
        if changed:
            contents.insert(0, _Settings(changed))
        place = len(self._records)
        packed = [_pack(content, place + i) for i, content in enumerate(contents)]
        if self._path is not None:
            self._check_size()
            _append(self._path, b"".join(packed))
            self._size += sum(map(len, packed))
        self._records += packed
        self._steps.append(len(self._records) - 1)
        self._settings = known | changed

    def withdraw(self) -> None:
        """Take the last step back."""
        self._cut(len(self) - 1)

    def _check_owner(self, owner: object) -> None:
        other = None if self._owner is None else self._owner()
        if other is not None and other is not owner:
            raise TrajectoryError("another optimizer records in this trajectory")

    def __getstate__(self) -> dict[str, Any]:
        # A copy is nobody's yet.
        return self.__dict__ | {"_owner": None}

    def _check_size(self) -> None:
        if self._path is None:
            return
        size = self._path.stat().st_size if self._path.exists() else 0
        if size != self._size:
            raise TrajectoryError(f"somebody else has written to {self._path}")

    def _cut(self, steps: int) -> None:
        """Drop all steps but the first so many, and what may follow the last one in the file."""
        kept = self._steps[steps - 1] + 1 if steps > 0 else 0
        records = self._records[:kept]
        if self._path is not None:
            assert self.header is not None
            size = len(_pack_header(self.header)) + sum(map(len, records))
            os.truncate(self._path, size)
            self._size = size
        self._records, self._steps = records, self._steps[:steps]
        self._settings = {}
        for record in records:
            content = _unpack(record, self._groups)
            if isinstance(content, _Settings):
                self._settings |= content.values

    def _read(self, path: Path, *, allow_truncated: bool) -> None:
        data = path.read_bytes()
        self.header, at = _unpack_header(data, path)
        while at < len(data):
            size = _record_size(data, at, self._groups)
            record = data[at : at + (size or len(data))]
            if size is None or at + size > len(data):
                if allow_truncated:
                    break
                raise TrajectoryError(
                    f"{path} is cut off in step {len(self)} (at byte {at}); the steps before it "
                    "can be had with Trajectory.load(..., allow_truncated=True)"
                )
            if not _is_intact(record, len(self._records)):
                raise TrajectoryError(f"{path} is damaged in step {len(self)} (at byte {at})")
            self._records.append(record)
            content = _unpack(record, self._groups)
            if isinstance(content, _Settings):
                self._settings |= content.values
            else:
                self._steps.append(len(self._records) - 1)
            at += len(record)


def describe_tensor(name: str, tensor_id: int, group: int, tensor: Tensor) -> dict[str, Any]:
    """What a header says of a parameter."""
    return {
        "name": name,
        "id": tensor_id,
        "group": group,
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "checksum": checksum(tensor),
    }


def checksum(tensor: Tensor) -> int:
    """CRC-32 of the bytes of up to 4096 elements, evenly spaced over the tensor."""
    flat = tensor.detach().reshape(-1)
    stride = max(1, flat.numel() // CHECKED_ELEMENTS)
    sample = flat[::stride].to("cpu", copy=True).contiguous()
    size = sample.numel() * sample.element_size()
    return binascii.crc32(ctypes.string_at(sample.data_ptr(), size)) if size else 0


def check_run(header: dict[str, Any], other: dict[str, Any]) -> None:
    """Raises TrajectoryError, naming the field, if a run is not the one that a header describes.

    Of the other run only those fields are looked at that are given.
    """
    for field, value in other.items():
        if field == "tensors":
            continue
        if header[field] != value:
            raise TrajectoryError(
                f"the trajectory is of another run: its {field} is {header[field]!r}, not {value!r}"
            )
    if "tensors" not in other:
        return
    recorded, given = ([t["name"] for t in run["tensors"]] for run in (header, other))
    if recorded != given:
        raise TrajectoryError(
            "the trajectory is of another run: its tensors are others, they differ in "
            f"{sorted(set(recorded) ^ set(given)) or 'their order'}"
        )
    for mine, theirs in zip(header["tensors"], other["tensors"], strict=True):
        for field in ("id", "group", "shape", "dtype"):
            if mine[field] != theirs[field]:
                raise TrajectoryError(
                    f"the trajectory is of another run: the {field} of {mine['name']} is "
                    f"{mine[field]!r}, not {theirs[field]!r}"
                )


def _pack_header(header: dict[str, Any]) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    body = struct.pack("<I", len(text)) + text
    return MAGIC + body + struct.pack("<I", binascii.crc32(body))


def _unpack_header(data: bytes, path: Path) -> tuple[dict[str, Any], int]:
    if data[: len(MAGIC)] != MAGIC:
        raise TrajectoryError(f"{path} is no zokern trajectory of format 1")
    start = len(MAGIC)
    size = struct.unpack_from("<I", data, start)[0] if len(data) >= start + 4 else len(data)
    end = start + 4 + size
    if len(data) < end + 4:
        raise TrajectoryError(f"{path} is cut off in its header")
    if struct.unpack_from("<I", data, end)[0] != binascii.crc32(data[start:end]):
        raise TrajectoryError(f"the header of {path} is damaged")
    return json.loads(data[start + 4 : end]), end + 4


def _pack(content: Record | _Settings, place: int) -> bytes:
    if isinstance(content, _Settings):
        text = json.dumps(content.values, separators=(",", ":")).encode()
        body = struct.pack("<HI", SETTINGS_MARK, len(text)) + text
    else:
        k, groups = len(content.draws), len(content.lrs)
        body = struct.pack(
            f"<H{k}I{k}f{groups}f", k, *content.draws, *content.gradient, *content.lrs
        )
    return struct.pack("<H", _crc16(body, place)) + body


def _unpack(record: bytes, groups: int) -> Record | _Settings:
    (k,) = struct.unpack_from("<H", record, 2)
    if k == SETTINGS_MARK:
        return _Settings(json.loads(record[8:]))
    if k == 0:
        return Record((), (), ())
    numbers = struct.unpack_from(f"<{k}I{k}f{groups}f", record, 4)
    return Record(numbers[:k], numbers[k : 2 * k], numbers[2 * k :])


def _record_size(data: bytes, at: int, groups: int) -> int | None:
    """The size of the record there, or None where too little is left to tell."""
    if len(data) < at + 4:
        return None
    (k,) = struct.unpack_from("<H", data, at + 2)
    if k == SETTINGS_MARK:
        return None if len(data) < at + 8 else 8 + struct.unpack_from("<I", data, at + 4)[0]
    return 4 if k == 0 else 4 + 8 * k + 4 * groups


def _is_intact(record: bytes, place: int) -> bool:
    return struct.unpack_from("<H", record)[0] == _crc16(record[2:], place)


def _crc16(body: bytes, place: int) -> int:
    return binascii.crc_hqx(body, place & 0xFFFF)


def _append(path: Path, data: bytes) -> None:
    """Append to a file, all of it or, where that fails, nothing."""
    before = path.stat().st_size
    try:
        with open(path, "ab", buffering=0) as file:
            written = file.write(data)
        if written != len(data):
            raise OSError(f"only {written} of {len(data)} bytes could be written to {path}")
    except BaseException:
        os.truncate(path, before)
        raise


def _write_atomically(path: Path, data: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
