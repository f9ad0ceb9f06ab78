"""Batches made ready in another thread while the model learns from the one before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from stages.core.training.recipe import Batch, Tensors


def prefetched(prepare: Callable[[Batch], Tensors], batches: Sequence[Batch]) -> Iterator[Tensors]:
    """Prepare each batch one ahead of its use, in the order given."""
    if not batches:
        return
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as pool:
        ahead = pool.submit(prepare, batches[0])
        for batch in batches[1:]:
            ready, ahead = ahead.result(), pool.submit(prepare, batch)
            yield ready
        yield ahead.result()
