"""Trains tiny models, alone or as one of several processes, and writes what came of it; see `test_training_devices`.

    python devices_worker.py OUT CASE...

A case is a name of `CASES`, perhaps with `-again` or `-left` behind it, which give it a state of its own: it goes on
from what lies in OUT/state/CASE. With `-parts` it trains on micro-batches, and with `-stopped` at the very end it is
interrupted half way. OUT gets a file for each process.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from stages.core.masked_language import chosen_logits
from stages.core.params import OptimizerParams, ParallelParams, ScheduleParams, load_params
from stages.core.training.loop import Trainer
from stages.core.training.recipe import Batch, Recipe, Tensors

OPTIMIZER = OptimizerParams(
    kind="adamw",
    betas=[0.9, 0.999],
    batch_tokens=64,
    learning_rate=5e-3,
    weight_decay=0.01,
    schedule=ScheduleParams(kind="linear", warmup=0.1),
    maximum_gradient_norm=0.5,
    precision="fp32",
    averaging=None,
)
PARAMS = load_params(Path(__file__).parents[4] / "presets" / "tiny.yaml")
STOPPED_AFTER = 3
SIZES = [8, 5, 1, 7, 6]  # rows of each batch: uneven shares, and one row for two processes
CASES: dict[str, tuple[str, dict[str, int]]] = {
    f"{problem}-{name}": (problem, sizes)
    for problem in ("classify", "language")
    for name, sizes in {
        "data": {"data": 2},
        "shards": {"shards": 2},
        "tensor": {"tensor": 2},
        "pipeline": {"pipeline": 2},
        "data-shards": {"data": 2, "shards": 2},
        "shards-tensor": {"shards": 2, "tensor": 2},
        "data-tensor": {"data": 2, "tensor": 2},
        "data-pipeline": {"data": 2, "pipeline": 2},
        "tensor-pipeline": {"tensor": 2, "pipeline": 2},
        "pipeline-four": {"pipeline": 4},
        "one": {},
    }.items()
}


class Problem:
    """A tiny BERT and some random texts to learn by heart."""

    def __init__(self, kind: str, dropout: float = 0.0):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=32,
            max_position_embeddings=16,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            num_labels=3,
        )
        self.kind = kind
        self.model: Any = BertForMaskedLM(config) if kind == "language" else BertForSequenceClassification(config)
        generator = torch.Generator().manual_seed(1)
        self.texts = torch.randint(1, 40, (sum(SIZES), 10), generator=generator)
        self.labels = torch.randint(0, 3, (sum(SIZES),), generator=generator)
        self.chosen = torch.rand(self.texts.shape, generator=generator) < 0.2
        self.chosen[::3] = False  # many rows have nothing to guess
        self.chosen[sum(SIZES[:2])] = False  # and the third batch has nothing at all
        self.seen: list[list[float]] = []

    def batches(self, index: int) -> list[list[int]]:
        """One batch a round, so that every step is a point of the curve."""
        start = sum(SIZES[:index])
        return [list(range(start, start + SIZES[index]))]

    def prepare(self, batch: Batch) -> Tensors:
        rows = torch.tensor(list(batch))
        return {"input_ids": self.texts[rows], "labels": self.labels[rows], "chosen": self.chosen[rows]}

    def loss(self, tensors: Tensors) -> Tensor:
        if self.kind == "language":
            logits = chosen_logits(self.model, tensors["input_ids"], tensors["chosen"])
            loss = functional.cross_entropy(logits, tensors["input_ids"][tensors["chosen"]])
        else:
            logits = self.model(tensors["input_ids"], torch.ones_like(tensors["input_ids"])).logits
            loss = functional.cross_entropy(logits, tensors["labels"])
        self.seen += logits.detach().tolist()
        return loss

    def weight(self, tensors: Tensors) -> float:
        return float(tensors["chosen"].sum()) if self.kind == "language" else float(len(tensors["labels"]))

    @torch.no_grad()
    def evaluate(self) -> tuple[float, dict[str, float]]:
        seen = len(self.seen)
        loss = float(self.loss(self.prepare(range(len(self.texts)))))
        del self.seen[seen:]
        return -loss, {"validation_loss": loss}

    def recipe(self) -> Recipe:
        return Recipe(
            optimizer=OPTIMIZER,
            rounds=len(SIZES),
            batches=self.batches,
            prepare=self.prepare,
            loss=self.loss,
            evaluate=self.evaluate,
            weight=self.weight,
            divisible=True,
            keep_best=False,
        )

    def fit(self, run: Any, parts: int) -> dict[str, Any]:
        """Train with so many micro-batches a batch, and tell what came of it."""
        trainer = Trainer(self.model, self.recipe(), run, "fit")
        trainer.position.parts = parts
        position = trainer.fit()
        rows = SIZES[0] if self.kind == "classify" else int(self.chosen[: SIZES[0]].sum())
        return {
            "train_loss": [row["train_loss"] for row in position.history],
            "validation_loss": [row["validation_loss"] for row in position.history],
            "logits": self.seen[:rows],
            "weights": float(sum(weight.double().square().sum() for weight in self.model.state_dict().values())),
            "plain": all(type(weight) is nn.Parameter for weight in self.model.parameters()),
            "said": run.said,
        }


def make_run(state: Path, sizes: dict[str, int], stopped: bool) -> Any:
    """A stage's run without a stage; the last process is told to stop after a few steps, as by Ctrl-C."""
    axes = {"data": 1, "shards": 1, "tensor": 1, "pipeline": 1} | sizes
    training = PARAMS.training.model_copy(update={"parallel": ParallelParams(**axes) if sizes else None})
    said: list[str] = []

    def log(step: int, **_: float) -> None:
        if stopped and step == STOPPED_AFTER and os.environ.get("RANK", "0") == str(max(1, *axes.values()) - 1):
            os.kill(os.getpid(), signal.SIGINT)

    return SimpleNamespace(
        name="test",
        state=state,
        params=SimpleNamespace(saves=PARAMS.saves, training=training),
        record=SimpleNamespace(log=lambda step, values: None),
        log=log,
        say=said.append,
        said=said,
    )


def run_case(out: Path, name: str) -> dict[str, Any]:
    """Run a case; one that is stopped has nothing to tell but that it was."""
    case = name.removesuffix("-stopped")
    kind, sizes = CASES["-".join(case.split("-")[:2])] if case not in CASES else CASES[case]
    run = make_run(out / "state" / case, sizes, stopped=case != name)
    try:
        return Problem(kind).fit(run, parts=3 if case.endswith("-parts") else 1)
    except KeyboardInterrupt:
        return {"stopped": True}


def main(out: Path, names: list[str]) -> None:
    """Run the cases one after the other and write this process's results."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    results = {name: run_case(out, name) for name in names}
    (out / f"process{os.environ.get('RANK', '0')}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
