"""May a quantized model take the place of the float one?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy
from torch import Tensor

from stages.core.metrics import Array, paired_bootstrap
from stages.core.params import GateParams

_LEAST_KAPPA = 0.5
"""Agreement with the float model beyond chance (Cohen 1960), below which answers are near random."""
_ROUNDING = 1e-9
"""A loss of just what is tolerated passes, though differences of scores are not exact."""


@dataclass(frozen=True)
class Verdict:
    """What the gate says of a recipe."""

    reason: str
    """Why it failed; empty where it passed."""
    loss: float
    """Score lost against the float model on the same texts."""
    low: float
    high: float
    agreement: float
    """Share of texts with the float model's answer."""

    @property
    def passed(self) -> bool:
        """Tell whether the recipe may be taken."""
        return not self.reason

    def to_json(self) -> dict[str, Any]:
        """Describe in JSON; an interval that is not a number becomes null."""
        return {name: _or_none(value) for name, value in asdict(self).items()}


def judge_recipe(metric: str, wanted: Tensor, logits: Tensor, labels: Array, gate: GateParams, seed: int) -> Verdict:
    """Hold a quantized model's logits against the float model's on the same texts.

    The estimate of the loss decides. Its interval is reported and decides nothing: on a few hundred texts it is
    wider than any loss worth tolerating.

    Args:
        metric: accuracy, f1_macro or f1_weighted.
        wanted: logits of the float model, [texts, classes].
        logits: of the quantized one.
        labels: true classes, [texts].
        gate: what is tolerated.
        seed: of the bootstrap.
    """
    if not bool(logits.isfinite().all()):
        return Verdict("its logits are not numbers", *[float("nan")] * 4)
    first, second = wanted.argmax(dim=1).numpy(), logits.argmax(dim=1).numpy()
    loss, low, high = paired_bootstrap(metric, first, second, labels, gate.bootstrap_samples, gate.confidence, seed)
    reason = ""
    if _kappa(first, second) < _LEAST_KAPPA:
        reason = "its answers are nearly independent of the float model's"
    elif loss > gate.tolerated_loss + _ROUNDING:
        reason = f"it costs {loss:.4f} {metric} ({low:+.4f} to {high:+.4f}), tolerated {gate.tolerated_loss:.4f}"
    return Verdict(reason, loss, low, high, float((first == second).mean()))


def _kappa(first: Array, second: Array) -> float:
    """Cohen's kappa; 1 where both give one and the same answer everywhere."""
    agreement = float((first == second).mean())
    classes = int(max(first.max(), second.max())) + 1
    shares = [numpy.bincount(answers, minlength=classes) / len(answers) for answers in (first, second)]
    chance = float(shares[0] @ shares[1])
    return 1.0 if agreement == 1.0 else (agreement - chance) / (1.0 - chance)


def _or_none(value: Any) -> Any:
    return None if isinstance(value, float) and value != value else value
