"""safetensors checkpoints, written anew with other values: through memory maps, and at once.

A file is 8 bytes with the length of a JSON header (u64, little-endian), the header, which gives
each tensor's dtype, shape and place, and the tensors' bytes.
"""

import json
import mmap
import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class CheckpointError(ValueError):
    """A path that holds no safetensors checkpoint, or cannot be written."""


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
    files = _files(base)
    if base.is_dir() and out.exists():
        raise CheckpointError(f"{out} exists already: give a folder that does not")
    if not base.is_dir() and out.is_dir():
        raise CheckpointError(f"{out} is a folder: give a file, as {base} is one")
    if not out.absolute().parent.is_dir():
        raise CheckpointError(f"there is no folder {out.absolute().parent}")
    temporary = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        if base.is_dir():
            shutil.copytree(base, temporary)
            copies = [temporary / file.name for file in files]
        else:
            shutil.copyfile(base, temporary)
            copies = [temporary]
        with ExitStack() as maps:
            yield _tensors(copies, maps)
        os.replace(temporary, out)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _files(base: Path) -> list[Path]:
    if base.is_dir():
        files = sorted(base.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"there are no .safetensors files in {base}")
        return files
    if not base.is_file():
        raise CheckpointError(f"there is no file {base}")
    return [base]


def _tensors(files: list[Path], maps: ExitStack) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in files:
        with open(path, "r+b") as file:
            mapped = mmap.mmap(file.fileno(), 0)
        # Closing a map that tensors still look at fails; letting go of it closes it after them.
        maps.callback(mapped.flush)
        views = _views(mapped, path)
        twice = sorted(tensors.keys() & views.keys())
        if twice:
            raise CheckpointError(f"several files of the folder hold {twice[:3]}")
        tensors |= views
    return tensors


def _views(mapped: mmap.mmap, path: Path) -> dict[str, Tensor]:
    try:
        (length,) = struct.unpack_from("<Q", mapped)
        header = json.loads(mapped[8 : 8 + length])
        header.pop("__metadata__", None)
        views = {}
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES:
                continue
            begin, end = entry["data_offsets"]
            dtype = DTYPES[entry["dtype"]]
            count = (end - begin) // dtype.itemsize
            if count == 0:
                views[name] = torch.empty(entry["shape"], dtype=dtype)
                continue
            flat = torch.frombuffer(mapped, dtype=dtype, count=count, offset=8 + length + begin)
            views[name] = flat.view(entry["shape"])
        return views
    except (struct.error, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}") from None
