"""Tiny real parts that tests of several rooms share: a tokenizer, a BERT classifier, and its ONNX export."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from stages.core.artifacts import write_json, write_manifest

if TYPE_CHECKING:
    from torch import nn

LABELS = ["animal", "number", "place"]
WORDS = {
    "animal": ["cat", "dog", "horse", "bird", "fish"],
    "number": ["one", "two", "three", "many", "few"],
    "place": ["london", "paris", "river", "hill", "town"],
}
FILLERS = ["what", "is", "the", "a", "of", "in", "where", "how", "?", "who"]
MAXIMUM_LENGTH = 24


def tiny_texts(count: int) -> tuple[list[str], list[int]]:
    """Texts of 3 to 15 words with one word that tells the label, and label indices."""
    texts, labels = [], []
    for number in range(count):
        label = number % len(LABELS)
        filler = [FILLERS[(number * 7 + place * 3) % len(FILLERS)] for place in range(2 + number * 5 % 13)]
        word = WORDS[LABELS[label]][number // len(LABELS) % 5]
        texts.append(" ".join([*filler, word]))
        labels.append(label)
    return texts, labels


@pytest.fixture(autouse=True)
def own_precision() -> Iterator[None]:
    """Let each test train in a precision of its own: accelerate holds on to the first one of a process."""
    yield
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state()


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of a small WordPiece tokenizer."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [word for group in WORDS.values() for word in group]
    vocabulary = dict.fromkeys([*special, *letters, *(f"##{letter}" for letter in letters), *words, *FILLERS])
    tokenizer = Tokenizer(models.WordPiece({word: index for index, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A unit with a two-layer BERT classifier, trained for a moment so that its answers differ between texts."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    from stages.core.checkpoints import save_model

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        num_labels=len(LABELS),
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
    )
    model = BertForSequenceClassification(config)
    texts, labels = tiny_texts(60)
    batch = tokenizer(texts, padding=True, truncation=True, max_length=MAXIMUM_LENGTH, return_tensors="pt")
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(40):
        loss = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=torch.tensor(labels)
        ).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("checkpoint")
    save_model(model.eval(), folder, tiny_tokenizer, [{"stage": "finetune"}])
    write_manifest(folder)
    return folder


@pytest.fixture(scope="session")
def exported_unit(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unit of the checkpoint's ONNX export. Tests must not change it; copy it with `exported_copy`."""
    from stages.core.checkpoints import load_model

    folder = tmp_path_factory.mktemp("exported") / "model"
    _export(load_model(tiny_checkpoint), tiny_checkpoint, folder)
    return folder


@pytest.fixture(scope="session")
def worse_unit(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of the checkpoint with noise in its weights: a model that is often wrong or unsure."""
    import torch

    from stages.core.checkpoints import load_model

    model = load_model(tiny_checkpoint)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter += 2.0 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    folder = tmp_path_factory.mktemp("worse") / "model"
    _export(model, tiny_checkpoint, folder)
    return folder


def _export(model: nn.Module, tokenizer: Path, folder: Path) -> None:
    """Write the unit that the export stage makes of a model."""
    from stages.core.checkpoints import copy_tokenizer, count_parameters
    from stages.core.onnx_graph import export_onnx

    folder.mkdir()
    export_onnx(model, folder / "model.onnx", ["input_ids", "attention_mask"], "logits", opset=20)
    copy_tokenizer(tokenizer, folder)
    description = {
        "task": "text-classification",
        "labels": LABELS,
        "maximum_length": MAXIMUM_LENGTH,
        "pad_id": 0,
        "inputs": ["input_ids", "attention_mask"],
        "output": "logits",
        "quantized": False,
        "parameters": count_parameters(model),
        "lineage": [{"stage": "finetune"}, {"stage": "export"}],
    }
    write_json(folder / "headroom.json", description)
    write_manifest(folder)


@pytest.fixture(scope="session")
def cascade_unit(worse_unit: Path, exported_unit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cascade of the worse model and the good one that passes on about half of the texts; not to be changed."""
    import numpy

    from stages.core.cascade import CASCADE_FILE, confidence_of
    from stages.core.runtimes import ExportedModel, open_runtime, predict

    folder = tmp_path_factory.mktemp("cascade") / "model"
    shutil.copytree(worse_unit, folder / "small")
    shutil.copytree(exported_unit, folder / "large")
    small = ExportedModel.load(worse_unit)
    confidence = confidence_of(predict(small, open_runtime("onnxruntime-cpu", small), tiny_texts(90)[0], 16)[1])
    write_json(folder / CASCADE_FILE, {"threshold": float(numpy.median(confidence))})
    write_manifest(folder)
    return folder


@pytest.fixture
def exported_copy(exported_unit: Path, tmp_path: Path) -> Path:
    """The output folder of an export stage, with `model/` inside, for tests that change something."""
    shutil.copytree(exported_unit, tmp_path / "exported" / "model")
    return tmp_path / "exported"


@pytest.fixture(scope="session")
def tiny_data(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unit of tokenized data: 60 training, 30 validation and 45 test texts."""
    import pandas
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    folder = tmp_path_factory.mktemp("tokenized") / "data"
    folder.mkdir()
    texts, labels = tiny_texts(135)
    rows = tokenizer(texts, truncation=True, max_length=MAXIMUM_LENGTH)["input_ids"]
    frame = pandas.DataFrame({"text": texts, "label": labels, "input_ids": rows})
    for name, part in (("train", frame[:60]), ("validation", frame[60:90]), ("test", frame[90:])):
        part.reset_index(drop=True).to_parquet(folder / f"{name}.parquet")
    shutil.copytree(tiny_tokenizer, folder / "tokenizer")
    write_json(folder / "labels.json", LABELS)
    write_json(folder / "tokens.json", {"maximum_length": MAXIMUM_LENGTH, "pad_id": 0})
    write_manifest(folder)
    return folder
