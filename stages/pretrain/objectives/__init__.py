"""What a language model learns from: one small object a kind, which the stage asks.

`objective` says what the stage asks; each further module answers for one kind of `pretrain.objective`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stages.core.params import PretrainObjective
from stages.pretrain.objectives.causal import Causal
from stages.pretrain.objectives.denoising import Denoising
from stages.pretrain.objectives.masked import Masked
from stages.pretrain.objectives.next_sentence import NextSentence
from stages.pretrain.objectives.objective import Objective
from stages.pretrain.objectives.replaced_tokens import ReplacedTokens
from stages.pretrain.objectives.span_corruption import SpanCorruption

_OBJECTIVES: dict[str, Any] = {
    "masked": Masked,
    "next_sentence": NextSentence,
    "causal": Causal,
    "span_corruption": SpanCorruption,
    "denoising": Denoising,
    "replaced_tokens": ReplacedTokens,
}


def build_objective(params: PretrainObjective, checkpoint: Path, tokenizer: Any, length: int) -> Objective:
    """Build the objective and its model from a checkpoint folder, for blocks of this length.

    Raises:
        UserError: if the checkpoint or its tokenizer lacks what the objective needs.
    """
    objective: Objective = _OBJECTIVES[params.kind](params, checkpoint, tokenizer, length)
    return objective
