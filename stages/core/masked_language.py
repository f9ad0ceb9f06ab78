"""What a language model says at the tokens it must guess, and only there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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


def chosen_logits(model: Any, seen: Tensor, chosen: Tensor, **inputs: Tensor) -> Tensor:
    """Logits [chosen, vocabulary] at the chosen positions only.

    Args:
        model: a transformers model with a language-model head.
        seen: token ids, [texts, length].
        chosen: where the model must guess, bool [texts, length].
        inputs: further arguments of the model, such as `attention_mask` where something is padded.
    """
    with only_at(model, chosen):
        logits: Tensor = model(input_ids=seen, **inputs).logits
    return logits.squeeze(0)
