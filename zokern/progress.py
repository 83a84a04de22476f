"""Progress bars, where tqdm is installed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(
    total: int, what: str, unit: str, *, shown: bool = True
) -> Iterator[Callable[[int], None]]:
    """A bar, as a function that moves it on."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda amount: None
        return
    with tqdm(total=total, desc=what, unit=unit, unit_scale=True, disable=not shown) as bar:
        yield lambda amount: bar.update(amount) and None
