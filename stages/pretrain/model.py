"""A masked-language model from a checkpoint or from scratch."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

from stages.core.checkpoints import WEIGHTS_FILE
from stages.core.errors import UserError


def build_model(checkpoint: Path, vocabulary: int, pad_id: int) -> nn.Module:
    """Load a masked-language model; where the folder has only a configuration, start from random weights.

    Raises:
        UserError: if the architecture is unknown or has no masked-language-model head.
    """
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        config = transformers.AutoConfig.from_pretrained(checkpoint)
        if (checkpoint / WEIGHTS_FILE).exists():
            pretrained: nn.Module = transformers.AutoModelForMaskedLM.from_pretrained(
                checkpoint, use_safetensors=True, dtype=torch.float32
            )
            return pretrained
        config.vocab_size, config.pad_token_id = vocabulary, pad_id
        fresh: nn.Module = transformers.AutoModelForMaskedLM.from_config(config)
    except ValueError as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{checkpoint}: no masked-language model can be built from it: {reason}") from None
    return fresh


def leftover_tensors(checkpoint: Path, model: Any) -> dict[str, Tensor]:
    """Tensors of the checkpoint that the language model lacks, named as it would name them."""
    path = checkpoint / WEIGHTS_FILE
    if not path.exists():
        return {}
    prefix, known = f"{model.base_model_prefix}.", set(model.state_dict())
    found = safetensors.torch.load_file(path)
    named = {name if name.startswith(prefix) else prefix + name: tensor for name, tensor in found.items()}
    return {name: tensor for name, tensor in named.items() if name not in known and "position_ids" not in name}
