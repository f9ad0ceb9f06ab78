"""Command line of the pretrain stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional

from stages.core.checkpoints import count_parameters, extend_lineage, load_tokenizer, save_model
from stages.core.errors import UserError
from stages.core.examples import load_dataset
from stages.core.masked_language import chosen_logits
from stages.core.packing import load_documents, packed_inputs
from stages.core.stage import StageRun, command
from stages.core.tensors import to_device
from stages.core.training.loop import train
from stages.core.training.recipe import Batch, Recipe, Tensors
from stages.pretrain.masking import mask_tokens
from stages.pretrain.model import build_model, leftover_tensors

_HELDOUT_SEED = 0


class MaskedLanguageModel:
    """The model, its data and its losses."""

    def __init__(self, model: nn.Module, tokenizer: Any, blocks: Path, run: StageRun):
        self.model, self.params, self.seed = model, run.params.pretrain, run.params.seed
        self.tokenizer = tokenizer
        self.train_blocks = load_blocks(blocks / "train.parquet")
        self.heldout_blocks = load_blocks(blocks / "heldout.parquet")
        self.documents = {"train": load_documents(blocks / "train.parquet")}
        self.documents["heldout"] = load_documents(blocks / "heldout.parquet")
        self.special = torch.tensor(tokenizer.all_special_ids)
        self.bytes_per_token = self._bytes_per_token()

    def batches(self, index: int) -> list[list[int]]:
        """Blocks of one part of the run; all parts together are `steps` batches over ever new shuffles."""
        size, parts = self._blocks_per_batch(), self.params.evaluations
        first, last = (self.params.steps * part // parts for part in (index, index + 1))
        return [self._batch(step, size) for step in range(first, last)]

    def prepare(self, batch: Batch) -> Tensors:
        """Blocks with tokens hidden; which ones depends on the step and the seed alone."""
        step, *rows = batch
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        return {**self._hidden(self.train_blocks[rows], generator), **self._documents("train", rows)}

    def loss(self, tensors: Tensors) -> Tensor:
        """Cross-entropy of the hidden tokens."""
        chosen = tensors["chosen"]
        apart = packed_inputs(self.model, tensors.get("documents"))
        logits = chosen_logits(self.model, tensors["seen"], chosen, **apart)
        return functional.cross_entropy(logits.float(), tensors["blocks"][chosen])

    def evaluate(self) -> tuple[float, dict[str, float]]:
        """Held-out loss in nats a token, perplexity, and bits a byte of text; the same tokens are hidden every time."""
        losses = [
            float(self._heldout_loss(slice(start, start + 32))) for start in range(0, len(self.heldout_blocks), 32)
        ]
        loss = sum(losses) / len(losses)
        bits = loss / math.log(2) / self.bytes_per_token
        return -loss, {"heldout_loss": loss, "perplexity": math.exp(min(loss, 50.0)), "bits_per_byte": bits}

    @torch.inference_mode()
    def _heldout_loss(self, rows: slice) -> Tensor:
        generator = torch.Generator().manual_seed(_HELDOUT_SEED + rows.start)
        hidden = {**self._hidden(self.heldout_blocks[rows], generator), **self._documents("heldout", rows)}
        return self.loss(to_device(hidden, self.model))

    def _documents(self, split: str, rows: Sequence[int] | slice) -> Tensors:
        documents = self.documents[split]
        return {} if documents is None else {"documents": documents[rows]}

    def _hidden(self, blocks: Tensor, generator: torch.Generator) -> Tensors:
        mask_id, vocabulary = self.tokenizer.mask_token_id, len(self.tokenizer)
        seen, chosen = mask_tokens(blocks, self.special, mask_id, vocabulary, self.params.mask_probability, generator)
        return {"seen": seen, "chosen": chosen, "blocks": blocks}

    def _blocks_per_batch(self) -> int:
        return max(1, self.params.optimizer.batch_tokens // self.train_blocks.shape[1])

    def _batch(self, step: int, size: int) -> list[int]:
        """Number of the step, then rows of the training blocks."""
        count = len(self.train_blocks)
        positions = range(step * size, (step + 1) * size)
        return [step, *(int(self._order(p // count)[p % count]) for p in positions)]

    def _order(self, epoch: int) -> numpy.ndarray:
        return numpy.random.default_rng([self.seed, epoch]).permutation(len(self.train_blocks))

    def _bytes_per_token(self) -> float:
        rows = self.heldout_blocks[:64]
        texts: Sequence[str] = self.tokenizer.batch_decode(rows.tolist(), skip_special_tokens=True)
        tokens = int((~torch.isin(rows, self.special)).sum())
        return sum(len(text.encode()) for text in texts) / max(tokens, 1)


def load_blocks(path: Path) -> Tensor:
    """Read packed blocks, int64 [blocks, length]."""
    rows = load_dataset(path)["input_ids"]
    return torch.tensor(numpy.array(rows[:], dtype=numpy.int64))


def run_pretrain(run: StageRun) -> dict[str, Any]:
    """Train the language model, or hand the checkpoint on where `steps` is 0."""
    checkpoint, params = run.inputs["checkpoint"], run.params.pretrain
    tokenizer = load_tokenizer(run.inputs["tokenizer"])
    model = build_model(checkpoint, len(tokenizer), tokenizer.pad_token_id)
    metrics: dict[str, Any] = {"parameters": count_parameters(model), "steps": params.steps}
    if params.steps:
        metrics |= _pretrain(run, model, tokenizer)
    lineage = extend_lineage(checkpoint, "pretrain")
    save_model(model, run.unit("model"), run.inputs["tokenizer"], lineage, leftover_tensors(checkpoint, model))
    return metrics


def _pretrain(run: StageRun, model: nn.Module, tokenizer: Any) -> dict[str, Any]:
    language_model = MaskedLanguageModel(model, tokenizer, run.inputs["blocks"], run)
    if not len(language_model.train_blocks) or not len(language_model.heldout_blocks):
        raise UserError(
            "params.yaml: pretrain.steps: the corpus gives no blocks to train on; "
            "add to acquire.corpus, raise tokenize.corpus_tokens, or set pretrain.steps to 0"
        )
    model.eval()
    _, before = language_model.evaluate()
    run.say(f"before: {', '.join(f'{name} {value:.4g}' for name, value in before.items())}")
    recipe = Recipe(
        optimizer=run.params.pretrain.optimizer,
        rounds=run.params.pretrain.evaluations,
        batches=language_model.batches,
        prepare=language_model.prepare,
        loss=language_model.loss,
        weight=lambda tensors: float(tensors["chosen"].sum()),
        evaluate=language_model.evaluate,
        keep_best=False,
    )
    train(model, recipe, run, "pretrain")
    _, after = language_model.evaluate()
    return {"before": before, "after": after}


if __name__ == "__main__":
    command("pretrain", run_pretrain, inputs=("checkpoint", "tokenizer", "blocks"))
