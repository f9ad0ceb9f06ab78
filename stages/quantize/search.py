"""Which layers stay in float: the most sensitive first, and none that need not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.nn import functional


def answers_moved(wanted: Tensor, logits: Tensor) -> float:
    """How far logits [n, classes] move the answers: mean Kullback-Leibler divergence, in nats."""
    first, second = functional.log_softmax(wanted, dim=-1), functional.log_softmax(logits, dim=-1)
    return float(functional.kl_div(second, first, log_target=True, reduction="batchmean"))


def fewest_in_float(
    most_sensitive_first: Sequence[str], most: int, passes: Callable[[Sequence[str]], bool]
) -> list[str] | None:
    """Find a set of layers to leave in float that passes and of which no layer can be given back.

    Layers are added, the most sensitive first, until the set passes; then each is given back, the least sensitive
    first, where the rest still pass. What is left is minimal: without any one of its layers it fails.

    Args:
        most_sensitive_first: the layers.
        most: that may be left in float.
        passes: whether a model with these layers in float passes.

    Returns:
        the layers, the most sensitive first; None where no set tried passes.
    """
    count = next((count for count in range(most + 1) if passes(most_sensitive_first[:count])), None)
    if count is None:
        return None
    kept = list(most_sensitive_first[:count])
    changed = True
    while changed:
        changed = False
        for name in reversed(kept):
            rest = [other for other in kept if other != name]
            if passes(rest):
                kept, changed = rest, True
    return kept
