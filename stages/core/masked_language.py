"""What a masked-language model says at the tokens it must guess."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from stages.core.errors import UserError


def chosen_logits(model: Any, seen: Tensor, chosen: Tensor, **inputs: Tensor) -> Tensor:
    """Logits [chosen, vocabulary] at the chosen positions only; the head is by far the dearest part.

    Args:
        model: a transformers model with a masked-language head.
        seen: token ids, [texts, length].
        chosen: where the model must guess, bool [texts, length].
        inputs: further arguments of the model's body, such as `attention_mask` where something is padded.

    Raises:
        UserError: if the family's head is not known.
    """
    body = getattr(model, model.base_model_prefix)
    hidden = body(input_ids=seen, **inputs).last_hidden_state
    logits: Tensor = _head(model)(hidden[chosen])
    return logits


def _head(model: Any) -> nn.Module:
    """The part that turns hidden states into logits; each family has its own name for it."""
    for name in ("cls", "lm_head", "predictions"):
        if hasattr(model, name):
            head: nn.Module = getattr(model, name)
            return head
    raise UserError(
        f"model_type {model.config.model_type}: its masked-language head is not known here; set pretrain.steps and "
        "distill.transfer.augmentation.copies to 0"
    )
