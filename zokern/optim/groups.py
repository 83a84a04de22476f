"""Parameter groups that everyone makes."""

from typing import Any

from torch import nn

_NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.modules.batchnorm._NormBase,
)


def param_groups(module: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups of named parameters: one with weight decay, one without it for biases and norms.

    A parameter does not decay if it has fewer than two dimensions or belongs to a normalization
    layer (torch's own, or a class whose name ends in "Norm", as in transformers).

    Args:
        module: whose parameters; tied ones appear once, under their first name.
        weight_decay: of the first group, at least 0.

    Returns:
        Groups for ``zokern.MeZO(...)`` or any ``torch.optim`` optimizer; an empty one is left out.
    """
    decaying: list[tuple[str, nn.Parameter]] = []
    others: list[tuple[str, nn.Parameter]] = []
    seen = set()
    for prefix, owner in module.named_modules():
        is_norm = isinstance(owner, _NORMS) or type(owner).__name__.endswith("Norm")
        for name, param in owner.named_parameters(prefix=prefix, recurse=False):
            if param in seen:
                continue
            seen.add(param)
            group = others if is_norm or param.ndim < 2 else decaying
            group.append((name, param))
    groups: list[dict[str, Any]] = [
        {"params": decaying, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
