"""Progress bars."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(
    total: int, what: str, unit: str, *, shown: bool
) -> Iterator[Callable[[int], object]]:
    """A bar, as a function that moves it on."""
    if not shown:
        yield lambda amount: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=what, unit=unit, unit_scale=True) as bar:
        yield bar.update
