"""TextPruner, training-free: attention heads and feed-forward neurons by their first-order importance, in iterations.

Sizes and iterations as in its guide for BERT (2,048 of 3,072 neurons, 8 of 12 heads, 4 iterations): two thirds stay.
Its vocabulary pruning is exact on the texts it has seen and saves no time, so that the tokenizer stays as it is here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.peers.running import TorchService
from benchmarks.peers.service import Service
from benchmarks.peers.task import Task

_ITERATIONS = 4
_TEXTS = 512
_BATCH = 32
_SAVED = "pruned"


class _Loader:
    """Batches as PyTorch tensors; TextPruner asks for their count."""

    def __init__(self, task: Task):
        import torch

        self._batches = [
            {
                "input_ids": torch.from_numpy(input_ids),
                "attention_mask": torch.from_numpy(mask),
                "labels": torch.from_numpy(labels),
            }
            for (input_ids, mask), labels in task.batches(_BATCH, _TEXTS)
        ]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._batches)


def compress(variant: str, task: Task, out: Path) -> None:
    """Keep the share of heads and neurons that the variant names, such as `8/12`."""
    from textpruner import GeneralConfig, TransformerPruner, TransformerPruningConfig
    from transformers import AutoModelForSequenceClassification

    model: Any = AutoModelForSequenceClassification.from_pretrained(task.checkpoint, attn_implementation="eager")
    kept, of = (int(number) for number in variant.split("/"))
    config = TransformerPruningConfig(
        target_ffn_size=model.config.intermediate_size * kept // of,
        target_num_of_heads=model.config.num_attention_heads * kept // of,
        pruning_method="iterative",
        n_iters=_ITERATIONS,
        head_even_masking=False,
    )
    pruner = TransformerPruner(model, config, GeneralConfig(use_device="cpu", output_dir=str(out)))
    pruner.prune(dataloader=_Loader(task), save_model=False)
    pruner.save_model(_SAVED)


def open_service(variant: str, folder: Path, goal: str, threads: int | None) -> Service:
    """Load the pruned checkpoint as its guide says, with transformers."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder / _SAVED, attn_implementation="sdpa").eval()
    return TorchService(model, threads)
