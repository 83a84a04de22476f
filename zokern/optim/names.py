"""Names of parameters as different owners of the same weights write them."""

from itertools import pairwise

from zokern.laws import canonical_name

# Components of PEFT's modules that are followed by the name of the adapter.
_ADAPTER_PARENTS = ("lora_", "vera_", "ia3_", "hada_", "lokr_", "oft_", "modules_to_save")


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers and PEFT add to it."""
    parts = canonical_name(name).removeprefix("base_model.model.").split(".")
    kept = parts[:1]
    for before, part in pairwise(parts):
        if not (before.startswith(_ADAPTER_PARENTS) and part not in ("weight", "bias")):
            kept.append(part)
    # PEFT saves a module that is trained as a whole under the name that it has without PEFT.
    return ".".join(part for part in kept if part != "modules_to_save")
