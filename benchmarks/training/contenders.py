"""Who trains what, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from stages.core.errors import UserError

Task = Literal["pretrain", "finetune"]


@dataclass(frozen=True)
class Contender:
    """A way to train one of the two models."""

    name: str
    title: str
    """For the table."""
    task: Task
    form: str
    """How texts become batches: `headroom`, or one of `peer`'s forms."""
    share: float = 1.0
    """Of the steps that it runs before it is stopped; less than 1 for what is too slow to run in full every round."""
    whole_once: bool = False
    """Whether it runs in full in the first round all the same, for the loss that it ends with."""
    compiled: bool = False
    """Whether Headroom's loss is compiled; the speed leaves the compiling out."""
    when_named: bool = False
    """Whether it takes part only where `--only` names it, to keep the default run short."""

    @property
    def headroom(self) -> bool:
        """Whether it is Headroom."""
        return self.form == "headroom"


TARGET_PRETRAIN = "pretrain-trainer-dynamic"
TARGET_FINETUNE = "finetune-trainer-dynamic"

CONTENDERS = (
    Contender("pretrain-headroom", "Headroom, packed", "pretrain", "headroom"),
    Contender(
        "pretrain-headroom-compiled",
        "Headroom, the same, compiled",
        "pretrain",
        "headroom",
        compiled=True,
        when_named=True,
    ),
    # Padding changes no gradient, so that this one would end where the next one does, only later.
    Contender(
        "pretrain-trainer-padded", "Trainer, a text a row, padded to full length", "pretrain", "padded", share=0.2
    ),
    Contender(
        TARGET_PRETRAIN,
        "Trainer, a text a row, padded to the longest in the batch",
        "pretrain",
        "dynamic",
        share=0.25,
        whole_once=True,
    ),
    Contender("pretrain-trainer-grouped", "Trainer, texts joined and cut into blocks", "pretrain", "grouped"),
    Contender("finetune-headroom", "Headroom, batches by length and tokens", "finetune", "headroom"),
    Contender(TARGET_FINETUNE, "Trainer, padded to the longest in the batch", "finetune", "dynamic"),
    Contender(
        "finetune-trainer-by-length", "Trainer, the same, grouped by length", "finetune", "by_length", when_named=True
    ),
)


def choose(only: Sequence[str]) -> list[Contender]:
    """Keep the contenders that `only` names, whole or by the beginnings of names; if empty, all that need not be named.

    Raises:
        UserError: if a name fits nobody.
    """
    names = [contender.name for contender in CONTENDERS]
    chosen: set[str] = set()
    for given in only:
        found = [given] if given in names else [name for name in names if name.startswith(given)]
        if not found:
            raise UserError(f"--only {given}: no such contender; there are {', '.join(names)}")
        chosen.update(found)
    return [each for each in CONTENDERS if each.name in chosen or (not only and not each.when_named)]
