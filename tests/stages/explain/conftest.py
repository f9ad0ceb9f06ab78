"""A reader of the tiny checkpoint, in float and quantized, and texts with one word that tells the label."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from stages.core.artifacts import write_manifest
from stages.core.checkpoints import load_model, load_tokenizer, save_model
from stages.core.params import ExplainParams, load_params
from stages.core.quantized import ActivationRange, QuantizedEmbedding, QuantizedLinear, replace_module
from stages.core.structure import encoder_layers, keep_parts, quantizable_linears
from stages.core.tensors import pad_tensors
from stages.explain.reader import Reader

REPOSITORY = Path(__file__).parents[3]


FILLERS = ["what", "is", "the", "a", "of", "in", "where", "how", "?", "who"]
KEYWORDS = [["cat", "dog"], ["one", "two"], ["london", "paris"]]


@dataclass(frozen=True)
class Planted:
    """Texts of random words with one that tells the label."""

    texts: list[str]
    places: list[int]
    """Of the telling word."""
    labels: list[int]


def plant(count: int, seed: int) -> Planted:
    generator = numpy.random.default_rng(seed)
    planted = Planted([], [], [])
    for number in range(count):
        words = generator.choice(FILLERS, generator.integers(4, 12)).tolist()
        place, label = int(generator.integers(len(words))), number % len(KEYWORDS)
        words[place] = str(generator.choice(KEYWORDS[label]))
        planted.texts.append(" ".join(words))
        planted.places.append(place)
        planted.labels.append(label)
    return planted


@pytest.fixture(scope="session")
def planted() -> Planted:
    return plant(60, seed=1)


@pytest.fixture(scope="session")
def texts(planted: Planted) -> list[str]:
    return planted.texts


@pytest.fixture(scope="session")
def keyword_checkpoint(tiny_checkpoint: Path, tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint, trained until nothing but the planted word counts."""
    model, tokenizer = load_model(tiny_checkpoint), load_tokenizer(tiny_tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    torch.manual_seed(0)
    for step in range(80):
        lesson = plant(48, seed=100 + step)
        batch = tokenizer(lesson.texts, padding=True, return_tensors="pt")
        loss = torch.nn.functional.cross_entropy(
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits,
            torch.tensor(lesson.labels),
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("keyword")
    save_model(model.eval(), folder, tiny_tokenizer, [{"stage": "finetune"}])
    write_manifest(folder)
    return folder


@pytest.fixture(scope="session")
def explain_params() -> ExplainParams:
    return load_params(REPOSITORY / "presets/questions.yaml").explain


@pytest.fixture(scope="session")
def quantized_checkpoint(
    keyword_checkpoint: Path, tiny_data: Path, texts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same checkpoint in static int8: embeddings and every linear of the encoder."""
    model = _quantize_all(load_model(keyword_checkpoint), Reader.load(keyword_checkpoint, tiny_data), texts)
    folder = tmp_path_factory.mktemp("quantized")
    save_model(model, folder, keyword_checkpoint, [{"stage": "finetune"}, {"stage": "quantize"}])
    write_manifest(folder)
    return folder


@pytest.fixture(scope="session")
def lean_checkpoint(
    keyword_checkpoint: Path, tiny_data: Path, texts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same checkpoint without heads in its first layer and with three in its second, in static int8."""
    model = load_model(keyword_checkpoint)
    first, second = encoder_layers(model)
    keep_parts(first, torch.tensor([]).long(), torch.arange(64))
    keep_parts(second, torch.tensor([0, 1, 3]), torch.arange(48))
    folder = tmp_path_factory.mktemp("lean")
    quantized = _quantize_all(model, Reader.load(keyword_checkpoint, tiny_data), texts)
    save_model(quantized, folder, keyword_checkpoint, [{"stage": "finetune"}, {"stage": "quantize"}])
    write_manifest(folder)
    return folder


@pytest.fixture(scope="session")
def reader(keyword_checkpoint: Path, tiny_data: Path) -> Reader:
    """Not to be changed."""
    return Reader.load(keyword_checkpoint, tiny_data)


@pytest.fixture(scope="session")
def quantized_reader(quantized_checkpoint: Path, tiny_data: Path) -> Reader:
    """Not to be changed."""
    return Reader.load(quantized_checkpoint, tiny_data)


def _quantize_all(model: nn.Module, reader: Reader, texts: list[str]) -> nn.Module:
    model = copy.deepcopy(model)
    ranges = {name: [0.0, 0.0] for name in quantizable_linears(model)}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            low, high = ranges[name]
            ranges[name] = [min(low, float(inputs[0].min())), max(high, float(inputs[0].max()))]

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in ranges]
    rows = [reader.tokenizer.encode(text).ids for text in texts]
    with torch.no_grad():
        model(**pad_tensors(rows, reader.pad_id))
    for handle in handles:
        handle.remove()
    for name, (low, high) in ranges.items():
        linear: Any = model.get_submodule(name)
        replace_module(model, name, QuantizedLinear.from_linear(linear, ActivationRange.covering(low, high)))
    table: Any = model.get_submodule("bert.embeddings.word_embeddings")
    replace_module(model, "bert.embeddings.word_embeddings", QuantizedEmbedding.from_embedding(table))
    return model
