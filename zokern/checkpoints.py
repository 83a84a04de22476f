"""safetensors checkpoints, read and written through memory maps; a new one appears at once.

A file is 8 bytes with the length of a JSON header (u64, little-endian), the header, which gives
each tensor's dtype, shape and place, and the tensors' bytes.
"""

import json
import math
import mmap
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# What a folder's copy is made without: its weights, in whichever format.
_WEIGHTS = [
    *("*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5"),
    *("*.msgpack", "*.onnx", "*.onnx_data"),
]


class CheckpointError(ValueError):
    """A path that holds no safetensors checkpoint, or cannot be written."""


def opened(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, of a folder of shards or of its index, as views of mapped files.

    What is written to them is not written to the files.

    Raises:
        CheckpointError: if there is no such checkpoint.
    """
    return _tensors(weight_files(path), None)


@contextmanager
def rewritten(base: Path, out: Path) -> Iterator[dict[str, Tensor]]:
    """The floating-point tensors of a copy of ``base``, which becomes ``out`` when the block ends.

    Until then, and where the block raises, ``out`` is what it was. Tensors are views of mapped
    files: no more of them is in memory than is being worked on.

    Args:
        base: a safetensors file, or a folder of them (shards, with the files beside them).
        out: a file, or a folder that does not exist yet.

    Raises:
        CheckpointError: if there is no such checkpoint, or ``out`` cannot take its place.
    """
    files = weight_files(base)
    with _beside(out, base) as temporary:
        if base.is_dir():
            shutil.copytree(base, temporary)
            copies = [temporary / file.name for file in files]
        else:
            shutil.copyfile(base, temporary)
            copies = [temporary]
        with ExitStack() as maps:
            tensors = _tensors(copies, maps)
            yield {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}


@contextmanager
def created(like: Path | Mapping[str, Tensor], out: Path) -> Iterator[dict[str, Tensor]]:
    """The tensors, of no value yet, of a checkpoint that becomes ``out`` when the block ends.

    As :func:`rewritten`. All of their bytes are reserved on the disk at once.

    Args:
        like: the checkpoint whose names, dtypes and shapes it has, and which files (and beside
            them those of the folder that hold no weights); or tensors, for one file.
        out: a file, or a folder that does not exist yet.
    """
    if isinstance(like, Mapping):
        with _beside(out, None) as temporary:
            _reserve(temporary, _header(like))
            with ExitStack() as maps:
                yield _tensors([temporary], maps)
        return
    files = weight_files(like)
    with _beside(out, like) as temporary:
        copies = [temporary]
        if like.is_dir():
            shutil.copytree(like, temporary, ignore=shutil.ignore_patterns(*_WEIGHTS))
            copies = [temporary / file.name for file in files]
            for index in like.glob("*.safetensors.index.json"):
                shutil.copyfile(index, temporary / index.name)
        for file, copy in zip(files, copies, strict=True):
            _reserve(copy, _read_header(file))
        with ExitStack() as maps:
            yield _tensors(copies, maps)


def weight_files(base: Path) -> list[Path]:
    """A file by itself; the files that an index names; of a folder those of its index, or all."""
    if not base.is_dir() and not base.is_file():
        raise CheckpointError(f"there is no file {base}")
    index = base if base.is_file() else base / "model.safetensors.index.json"
    if base.is_file() and not _is_index(base):
        return [base]
    if not index.exists():
        files = sorted(base.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"there are no .safetensors files in {base}")
        return files
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no index of shards: {error!r}") from None
    folder = index.parent
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{index} names files that are not there: {missing[:3]}")
    return [folder / name for name in names]


def _is_index(path: Path) -> bool:
    return path.name.endswith(".safetensors.index.json")


@contextmanager
def _beside(out: Path, base: Path | None) -> Iterator[Path]:
    """A path beside ``out`` for what becomes ``out``, if the block ends well, and else is gone."""
    if base is not None and _is_index(base):
        raise CheckpointError(
            f"{base} is an index: give its folder, which the output is to be like"
        )
    if base is not None and base.is_dir() and base.resolve() in out.resolve().parents:
        raise CheckpointError(f"{out} lies in {base}, which it is to be a copy of")
    if base is not None and base.is_dir() and out.exists():
        raise CheckpointError(f"{out} exists already: give a folder that does not")
    if out.is_dir():
        what = "the output is" if base is None else f"{base} is"
        raise CheckpointError(f"{out} is a folder: give a file, as {what} one")
    if not out.absolute().parent.is_dir():
        raise CheckpointError(f"there is no folder {out.absolute().parent}")
    temporary = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, out)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    """That of a file of these tensors, with the length before it."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # Of wide elements first, so that all lie on their boundaries.
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):
        if tensor.dtype not in _NAMES:
            raise CheckpointError(f"safetensors files hold no {tensor.dtype}, which {name} is")
        begin, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _read_header(path: Path) -> bytes:
    with open(path, "rb") as file:
        length = file.read(8)
        return length + file.read(*struct.unpack("<Q", length))


def _reserve(path: Path, header: bytes) -> None:
    """Write a header and room for its tensors."""
    entries = json.loads(header[8:])
    entries.pop("__metadata__", None)
    size = len(header) + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    with open(path, "wb") as file:
        file.write(header)
        file.flush()
        if hasattr(os, "posix_fallocate"):
            # A disk that is full says so here, and not by a signal when the map is written.
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)


def _tensors(files: list[Path], written: ExitStack | None) -> dict[str, Tensor]:
    """Those of files, which are written where there is a stack for the maps."""
    tensors: dict[str, Tensor] = {}
    for path in files:
        access = mmap.ACCESS_COPY if written is None else mmap.ACCESS_WRITE
        with open(path, "rb" if written is None else "r+b") as file:
            try:
                mapped = mmap.mmap(file.fileno(), 0, access=access)
            except ValueError as error:
                raise CheckpointError(f"{path} is no safetensors file: {error}") from None
        if written is not None:
            # Closing a map that tensors still look at fails; letting go of it closes it after them.
            written.callback(mapped.flush)
        views = _views(mapped, path, skip_others=written is not None)
        twice = sorted(tensors.keys() & views.keys())
        if twice:
            raise CheckpointError(f"several files of the folder hold {twice[:3]}")
        tensors |= views
    return tensors


def _views(mapped: mmap.mmap, path: Path, *, skip_others: bool) -> dict[str, Tensor]:
    """The tensors of a file; those of a type that torch has not are an error or skipped."""
    try:
        (length,) = struct.unpack_from("<Q", mapped)
        header = json.loads(mapped[8 : 8 + length])
        header.pop("__metadata__", None)
        views = {}
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES:
                if skip_others:
                    continue
                raise TypeError(f"{name} is of the type {entry['dtype']}, which cannot be read")
            begin, end = entry["data_offsets"]
            dtype = DTYPES[entry["dtype"]]
            count = math.prod(entry["shape"])
            if not 0 <= begin <= end <= len(mapped) - 8 - length:
                raise ValueError(f"{name} lies outside of it")
            if end - begin != count * dtype.itemsize:
                raise ValueError(f"{name} has {end - begin} bytes for {count} elements")
            if count == 0:
                views[name] = torch.empty(entry["shape"], dtype=dtype)
                continue
            flat = torch.frombuffer(mapped, dtype=dtype, count=count, offset=8 + length + begin)
            views[name] = flat.view(entry["shape"])
        return views
    except (struct.error, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}") from None
