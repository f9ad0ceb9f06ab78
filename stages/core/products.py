"""How fast the machine multiplies matrices: the ceiling of everything a model does."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a serving process that measures ceilings may have no PyTorch loaded yet
    import torch

SIZE = 2048
_SMALL = 256
_REPEATS = 7
_SECONDS = 0.4


def product_rate(dtype: torch.dtype, device: str = "cpu") -> float:
    """Measure operations a second of a product of square matrices, on all threads that PyTorch was given."""
    import torch

    def rate(size: int) -> float:
        # A generator of its own: a training run that measures must draw the same numbers as one that does not.
        matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(device, dtype)

        def product() -> None:
            result = matrix @ matrix
            if result.is_cuda:
                torch.cuda.synchronize()

        return 2.0 * size**3 / fastest_seconds(product)

    # A type that the processor only imitates, such as fp16 on most, would take a minute for one large product.
    small = rate(_SMALL)
    return small if 2.0 * SIZE**3 / small > _SECONDS else rate(SIZE)


def fastest_seconds(work: Callable[[], object]) -> float:
    """Seconds of the fastest of some calls, after one that warms up: other work only ever slows a call down.

    A slow machine gets fewer calls, to stay under a second.
    """
    work()
    spent: list[float] = []
    while not spent or (len(spent) < _REPEATS and sum(spent) < _SECONDS):
        started = time.perf_counter()
        work()
        spent.append(time.perf_counter() - started)
    return min(spent)
