"""The other side: `transformers.Trainer` as its own examples use it (run_mlm.py, run_glue.py)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers

from benchmarks.training.settings import SHARED
from benchmarks.training.watch import Watch
from stages.core.artifacts import ARTIFACTS
from stages.core.examples import load_examples, load_labels

_TEXTS_PER_MICRO_BATCH = 32
"""Of texts in rows of their own: a batch of as many tokens as Headroom's is too large to hold at once."""


def train_masked(
    form: str, checkpoint: Path, rows: Sequence[Sequence[int]], facts: dict[str, Any], seed: int, watch: Watch
) -> None:
    """Train a masked language model with the Trainer and its standard collator; ends with `Enough`.

    Args:
        form: `padded` and `dynamic` have a text a row, padded to the full length or to the longest row of the batch;
            `grouped` joins the texts and cuts them into rows of the full length.
        checkpoint: to start from, with its tokenizer.
        rows: token ids of the texts, special ones included.
        facts: `length`, `steps` and `texts_per_step`.
        seed: of order, masks and dropout.
        watch: of the training.
    """
    transformers.set_seed(seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    model = transformers.AutoModelForMaskedLM.from_pretrained(checkpoint, use_safetensors=True, dtype=torch.float32)
    length, texts = facts["length"], facts["texts_per_step"]
    if form == "grouped":
        parts, size = 1, max(1, SHARED.pretrain_batch_tokens // length)
        rows = group(rows, length)
    else:
        parts = -(-texts // _TEXTS_PER_MICRO_BATCH)
        size = -(-texts // parts)
    columns = {
        "input_ids": [list(row) for row in rows],
        "attention_mask": [[1] * len(row) for row in rows],
        "special_tokens_mask": [
            tokenizer.get_special_tokens_mask(row, already_has_special_tokens=True) for row in rows
        ],
    }
    if form == "padded":
        padding = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0, "special_tokens_mask": 1}
        columns = {
            name: [row + [padding[name]] * (length - len(row)) for row in found] for name, found in columns.items()
        }
    trainer = transformers.Trainer(
        model=model,
        args=_arguments(
            seed,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=parts,
            max_steps=facts["steps"],
            learning_rate=SHARED.pretrain_learning_rate,
        ),
        train_dataset=datasets.Dataset.from_dict(columns),
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=SHARED.mask_probability),
        processing_class=tokenizer,
    )
    with watch.watching(model):
        trainer.train()


def train_classifier(form: str, folder: Path, seed: int, watch: Watch) -> None:
    """Fine-tune a classifier with the Trainer and dynamic padding; ends with `Enough`.

    Args:
        form: `dynamic` draws batches at random, `by_length` groups texts of similar length.
        folder: laid out as a checkout is.
        seed: of the head, order and dropout.
        watch: of the training.
    """
    transformers.set_seed(seed)
    checkpoint, data = folder / ARTIFACTS / "pretrain" / "model", folder / ARTIFACTS / "tokenize" / "data"
    examples = load_examples(data, "train")
    tokenizer = transformers.AutoTokenizer.from_pretrained(data / "tokenizer")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        checkpoint, num_labels=len(load_labels(data)), use_safetensors=True, dtype=torch.float32
    )
    trainer = transformers.Trainer(
        model=model,
        args=_arguments(
            seed,
            per_device_train_batch_size=SHARED.finetune_batch_texts,
            num_train_epochs=SHARED.finetune_epochs,
            learning_rate=SHARED.finetune_learning_rate,
            train_sampling_strategy="group_by_length" if form == "by_length" else "random",
        ),
        train_dataset=datasets.Dataset.from_dict(
            {
                "input_ids": examples.input_ids,
                "attention_mask": [[1] * len(row) for row in examples.input_ids],
                "labels": examples.labels.tolist(),
            }
        ),
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
    )
    with watch.watching(model):
        trainer.train()


def group(rows: Sequence[Sequence[int]], length: int) -> list[list[int]]:
    """Join rows and cut them into rows of one length, as run_mlm.py does; a shorter rest is dropped."""
    joined = list(chain.from_iterable(rows))
    return [joined[start : start + length] for start in range(0, len(joined) - length + 1, length)]


def _arguments(seed: int, **values: Any) -> Any:
    """The Trainer's arguments: what both sides share, no saving; everything else as it is by itself."""
    return transformers.TrainingArguments(
        output_dir="trainer",
        bf16=SHARED.precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        lr_scheduler_type="linear",
        warmup_steps=SHARED.warmup,
        weight_decay=SHARED.weight_decay,
        max_grad_norm=SHARED.maximum_gradient_norm,
        optim="adamw_torch_fused",
        seed=seed,
        save_strategy="no",
        logging_steps=10,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        **values,
    )
