"""Command line of the pretrain stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stages.core.checkpoints import count_parameters, extend_lineage, load_tokenizer, save_model
from stages.core.errors import UserError
from stages.core.packing import check_packable, starts_of
from stages.core.stage import StageRun, command
from stages.core.tensors import to_device
from stages.core.training.loop import train
from stages.core.training.recipe import Batch, Recipe, Tensors
from stages.pretrain.blocks import Blocks
from stages.pretrain.model import leftover_tensors
from stages.pretrain.objectives import build_objective
from stages.pretrain.objectives.objective import Objective, language_figures

_HELDOUT_BATCH = 32
_HELDOUT_SEED = 0


class Pretraining:
    """An objective on the blocks of a corpus."""

    def __init__(self, objective: Objective, blocks: Blocks, tokenizer: Any, run: StageRun):
        self.objective, self.blocks = objective, blocks
        self.params, self.seed = run.params.pretrain, run.params.seed
        if blocks.per_batch < objective.least_blocks:
            least = objective.least_blocks * blocks.length
            raise UserError(
                f"params.yaml: pretrain.optimizer.batch_tokens: must be at least {least} for pretrain.objective.kind "
                f"{self.params.objective.kind}, which takes {objective.least_blocks} blocks a batch"
            )
        if blocks.train_documents is not None:
            self._check_apart()
        self.bytes_per_token = self._bytes_per_token(tokenizer)

    def _check_apart(self) -> None:
        if not self.objective.keeps_apart:
            raise UserError(
                f"params.yaml: tokenize.documents: pretrain.objective.kind {self.params.objective.kind} reads a block "
                "as one text; set it to joined"
            )
        causal = self.params.objective.kind == "causal"
        check_packable(self.objective.handed_on()["model"], self.blocks.length, backwards=causal)

    def batches(self, index: int) -> list[list[int]]:
        """Batches of one part of the run."""
        return self.blocks.batches(index, self.params.evaluations)

    def prepare(self, batch: Batch) -> Tensors:
        """Inputs and labels of blocks; chance depends on the step and the seed alone."""
        step, *rows = batch
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        progress = step / max(1, self.params.steps - 1)
        tensors = self.objective.prepare(self.blocks.train[rows], progress, generator)
        return {**tensors, **_documents(self.blocks.train_documents, rows)}

    def evaluate(self) -> tuple[float, dict[str, float]]:
        """Held-out figures, batches weighted as in the loss; chance is the same every time."""
        starts = range(0, len(self.blocks.heldout), _HELDOUT_BATCH)
        measured = [self._measure(slice(start, start + _HELDOUT_BATCH)) for start in starts]
        names = dict.fromkeys(name for _, batch in measured for name in batch)
        if not names:
            raise UserError("params.yaml: tokenize.corpus_tokens: the held-out blocks have nothing to guess; raise it")
        figures = {
            name: _mean([(weight, batch[name]) for weight, batch in measured if name in batch]) for name in names
        }
        loss = figures["heldout_loss"]
        told = language_figures(loss, self.bytes_per_token) if self.objective.vocabulary_head else {}
        return -loss, figures | told

    @torch.inference_mode()
    def _measure(self, rows: slice) -> tuple[float, dict[str, float]]:
        """Figures of some blocks, and what they are a mean over."""
        generator = torch.Generator().manual_seed(_HELDOUT_SEED + rows.start)
        tensors = self.objective.prepare(self.blocks.heldout[rows], 0.0, generator)
        whole = {**tensors, **_documents(self.blocks.heldout_documents, rows)}
        weight = self.objective.weight(whole)
        return weight, self.objective.measure(to_device(whole, self.objective.model)) if weight else {}

    def _bytes_per_token(self, tokenizer: Any) -> float | None:
        """Bytes of text for each token that the held-out loss may fall on; None where it falls on other tokens."""
        rows = self.blocks.heldout[:64]
        scored = self.objective.scored(rows)
        if scored is None:
            return None
        if self.blocks.heldout_documents is not None:
            documents = self.blocks.heldout_documents[:64]
            scored = scored & (documents >= 0) & ~starts_of(documents)
        texts: Sequence[str] = tokenizer.batch_decode(rows.tolist(), skip_special_tokens=True)
        return sum(len(text.encode()) for text in texts) / max(int(scored.sum()), 1)


def _documents(documents: Tensor | None, rows: Sequence[int] | slice) -> Tensors:
    return {} if documents is None else {"documents": documents[rows]}


def _mean(weighted: Sequence[tuple[float, float]]) -> float:
    """Mean of values, each with its weight before it."""
    return sum(weight * value for weight, value in weighted) / sum(weight for weight, _ in weighted)


def run_pretrain(run: StageRun) -> dict[str, Any]:
    """Train the language model, or hand the checkpoint on where `steps` is 0."""
    checkpoint, params = run.inputs["checkpoint"], run.params.pretrain
    tokenizer = load_tokenizer(run.inputs["tokenizer"])
    blocks = Blocks(run.inputs["blocks"], params.steps, params.optimizer.batch_tokens, run.params.seed)
    objective = build_objective(params.objective, checkpoint, tokenizer, blocks.length)
    models = objective.handed_on()
    metrics: dict[str, Any] = {"parameters": count_parameters(models["model"]), "steps": params.steps}
    if params.steps:
        metrics |= _pretrain(run, Pretraining(objective, blocks, tokenizer, run))
    lineage = extend_lineage(checkpoint, "pretrain")
    for unit, model in models.items():
        leftovers = leftover_tensors(checkpoint, model) if unit == "model" else {}
        save_model(model, run.unit(unit), run.inputs["tokenizer"], lineage, leftovers)
    return metrics


def _pretrain(run: StageRun, pretraining: Pretraining) -> dict[str, Any]:
    objective = pretraining.objective
    objective.model.eval()
    _, before = pretraining.evaluate()
    run.say(f"before: {', '.join(f'{name} {value:.4g}' for name, value in before.items())}")
    recipe = Recipe(
        optimizer=run.params.pretrain.optimizer,
        rounds=run.params.pretrain.evaluations,
        batches=pretraining.batches,
        prepare=pretraining.prepare,
        loss=objective.loss,
        weight=objective.weight,
        evaluate=pretraining.evaluate,
        keep_best=False,
        divisible=run.params.pretrain.objective.kind in ("masked", "causal"),
    )
    train(objective.model, recipe, run, "pretrain")
    _, after = pretraining.evaluate()
    return {"before": before, "after": after}


if __name__ == "__main__":
    command(
        "pretrain",
        run_pretrain,
        inputs=("checkpoint", "tokenizer", "blocks"),
        parallel=("data", "shards", "tensor", "pipeline"),
    )
