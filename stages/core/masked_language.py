"""What a language model says at the tokens it must guess, and only there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def only_at(model: Any, chosen: Tensor) -> Iterator[None]:
    """Let a language model compute logits at some positions only; the head is by far the dearest part.

    Within the context the model's body hands its head [1, chosen, width] instead of [texts, length, width], whatever
    the family calls either of them, and so `model(...)` gives logits [1, chosen, vocabulary].

    Args:
        model: a transformers model with a language-model head.
        chosen: where it must guess, bool [texts, length]; of the decoder's tokens where there is a decoder.
    """

    def choose(module: nn.Module, inputs: Any, output: Any) -> Any:
        output["last_hidden_state"] = output["last_hidden_state"][chosen].unsqueeze(0)
        return output

    body = model.get_decoder() if model.config.is_encoder_decoder else model.base_model
    hook = body.register_forward_hook(choose)
    try:
        yield
    finally:
        hook.remove()


def chosen_logits(model: Any, seen: Tensor, chosen: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits [chosen, vocabulary] at the chosen positions only.

    Args:
        model: a transformers model with a masked-language head.
        seen: token ids, [texts, length].
        chosen: where the model must guess, bool [texts, length].
        mask: attention mask, [texts, length]; None where nothing is padded.
    """
    mask = torch.ones_like(seen) if mask is None else mask
    with only_at(model, chosen):
        logits: Tensor = model(input_ids=seen, attention_mask=mask).logits
    return logits.squeeze(0)
