"""What a parameter and its residual hold."""

from torch import Tensor

from zokern.backends.reference import storage
from zokern.checks import check_residual


def stored_value(param: Tensor, residual: Tensor | None = None) -> Tensor:
    """The value that a parameter and its residual hold, as a new float32 tensor of its shape.

    Args:
        param: float32, bfloat16 or float16.
        residual: int16 or int8 beside bfloat16, float16 beside float16 (``split``, ``split8``).

    Raises:
        TypeError, ValueError: for a residual that cannot belong to the parameter.
    """
    if residual is not None:
        check_residual(param, residual)
    return storage.load(param, residual)
