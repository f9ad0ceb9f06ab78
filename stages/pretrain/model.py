"""A language model from a checkpoint or from scratch, whatever the family."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

from stages.core.checkpoints import WEIGHTS_FILE
from stages.core.errors import UserError

_ROLES = ("pad", "bos", "eos", "cls", "sep", "mask")


def build_model(checkpoint: Path, kinds: Sequence[Any], tokenizer: Any, vocabulary: int, objective: str) -> nn.Module:
    """Load a language model; where the folder has only a configuration, start from random weights.

    Args:
        checkpoint: folder with a configuration, and weights where there are any.
        kinds: transformers' automatic classes that would do; the first that knows the architecture is taken.
        tokenizer: whose special tokens the configuration learns.
        vocabulary: number of token ids that the model must embed.
        objective: named in messages.

    Raises:
        UserError: if the architecture is unknown or has no such head.
    """
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        config = transformers.AutoConfig.from_pretrained(checkpoint)
        auto = next((kind for kind in kinds if type(config) in kind._model_mapping), kinds[0])
        if not (checkpoint / WEIGHTS_FILE).exists():
            config.vocab_size = vocabulary
            set_token_ids(config, tokenizer)
            fresh: nn.Module = auto.from_config(config)
            return fresh
        model: Any = auto.from_pretrained(checkpoint, config=config, use_safetensors=True, dtype=torch.float32)
    except ValueError as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{checkpoint}: no model for pretrain.objective.kind {objective} can be built: {reason}"
        ) from None
    if model.get_input_embeddings().num_embeddings < vocabulary:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    pretrained: nn.Module = model
    return pretrained


def set_token_ids(config: Any, tokenizer: Any) -> None:
    """Set every special token's id that a configuration has; begin and end serve where there is no cls and sep."""
    ids = {role: getattr(tokenizer, f"{role}_token_id") for role in _ROLES}
    for one, other in (("bos", "cls"), ("eos", "sep")):
        ids[one], ids[other] = _first(ids[one], ids[other]), _first(ids[other], ids[one])
    for role, index in ids.items():
        if hasattr(config, f"{role}_token_id"):
            setattr(config, f"{role}_token_id", index)
    if config.is_encoder_decoder:
        usual = type(config)()
        starts_at_end = getattr(usual, "decoder_start_token_id", None) == usual.eos_token_id
        config.decoder_start_token_id = ids["eos"] if starts_at_end else ids["pad"]


def _first(one: int | None, other: int | None) -> int | None:
    return other if one is None else one


def require_tokens(tokenizer: Any, objective: str, *roles: str) -> None:
    """Refuse a tokenizer that lacks a special token which the objective needs.

    Raises:
        UserError: naming the tokens and the objective.
    """
    missing = [f"{role}_token" for role in roles if getattr(tokenizer, f"{role}_token_id") is None]
    if missing:
        raise UserError(
            f"params.yaml: pretrain.objective.kind {objective}: the tokenizer has no {' and no '.join(missing)}; "
            "choose another objective, or a checkpoint whose tokenizer has it"
        )


def sees_ahead(model: Any, length: int) -> bool:
    """Tell whether a model's answer at a token depends on the tokens after it.

    Raises:
        UserError: if the model does not take so many tokens.
    """
    ids = torch.full((2, length), 1)
    ids[1, -1] = 2
    one, other = probe(model, ids).logits[:, :-1]
    return not torch.allclose(one, other, atol=1e-6)


@torch.inference_mode()
def probe(model: Any, input_ids: Tensor, **inputs: Tensor) -> Any:
    """Ask the model once, before it is trained.

    Raises:
        UserError: if it does not take so many tokens.
    """
    model.eval()
    try:
        return model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), **inputs)
    except (IndexError, RuntimeError) as error:
        length, reason = input_ids.shape[1], " ".join(str(error).split())[:160]
        raise UserError(
            f"params.yaml: tokenize.block_length: the checkpoint does not take blocks of {length} tokens ({reason})"
        ) from None


def leftover_tensors(checkpoint: Path, model: Any) -> dict[str, Tensor]:
    """Tensors of the checkpoint that the language model lacks, named as it would name them."""
    path = checkpoint / WEIGHTS_FILE
    if not path.exists():
        return {}
    prefix, known = f"{model.base_model_prefix}.", set(model.state_dict())
    found = safetensors.torch.load_file(path)
    if not hasattr(model, model.base_model_prefix):  # such as T5, whose parts stand by themselves
        prefix = ""
    named = {name if name.startswith(prefix) else prefix + name: tensor for name, tensor in found.items()}
    return {name: tensor for name, tensor in named.items() if name not in known and "position_ids" not in name}
