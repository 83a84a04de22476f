"""The laws of the noise contract and what identifies a weight in it."""

import functools
import hashlib
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Law:
    """A law: its code in the counter, how many elements a group of four words gives."""

    code: int
    per_group: int
    is_direction: bool

    @property
    def dtype(self) -> torch.dtype:
        """Of the values as a tensor; words of up to 32 bits are held in int64."""
        return torch.float32 if self.is_direction else torch.int64

    @property
    def max_elements(self) -> int:
        """Elements that a 32-bit group index can count."""
        return self.per_group << 32


LAWS = {
    "gauss16": Law(code=0, per_group=8, is_direction=True),
    "gauss32": Law(code=1, per_group=4, is_direction=True),
    "rademacher": Law(code=2, per_group=128, is_direction=True),
    "uniform32": Law(code=3, per_group=4, is_direction=False),
    "rounding16": Law(code=4, per_group=8, is_direction=False),
    "normal": Law(code=5, per_group=4, is_direction=True),
}

WRAPPER_COMPONENTS = frozenset(
    {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
)


@functools.lru_cache(maxsize=1 << 16)
def canonical_name(name: str) -> str:
    """The parameter's name without the components that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in WRAPPER_COMPONENTS)


@functools.lru_cache(maxsize=1 << 16)
def tensor_id(name: str) -> int:
    """The 56-bit id of a named parameter: BLAKE2b of its UTF-8 name, 7 bytes, little-endian.

    Components that wrappers add to the name (``module.``, ``_orig_mod.``, …) do not count, so a
    weight keeps its noise under DistributedDataParallel, torch.compile and FSDP.
    """
    digest = hashlib.blake2b(canonical_name(name).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little")
