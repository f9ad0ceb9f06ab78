from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stages.core.artifacts import write_json, write_manifest
from stages.core.cascade import (
    CASCADE_FILE,
    CascadeModel,
    CascadeRuntime,
    load_exported,
    open_exported,
    passed_on,
    predict_exported,
    share_passed_on,
)
from stages.core.errors import UserError
from stages.core.runtimes import ExportedModel, open_runtime, predict

FILLERS = ["what is the", "where is a", "how many of the", "who is in the", "is the", "what", "of the river the"]
WORDS = ["cat", "dog", "horse", "bird", "one", "two", "many", "few", "london", "paris", "hill", "town"]
TEXTS = [f"{filler} {word}" for filler in FILLERS for word in WORDS]
TEXTS += ["", "paris " * 200, "half a pair \ud800", "😀 ﷽"]
RUNTIME = "onnxruntime-cpu"


@pytest.fixture
def cascade_copy(cascade_unit: Path, tmp_path: Path) -> Path:
    """The output folder of a cascade stage, with `model/` inside, for tests that change something."""
    shutil.copytree(cascade_unit, tmp_path / "cascade" / "model")
    return tmp_path / "cascade"


def loaded(folder: Path) -> CascadeModel:
    model = load_exported(folder)
    assert isinstance(model, CascadeModel)
    return model


def with_threshold(folder: Path, threshold: float) -> CascadeModel:
    write_json(folder / "model" / CASCADE_FILE, {"threshold": threshold})
    write_manifest(folder / "model")
    return loaded(folder)


def answer(folder: Path, texts: Sequence[str], batch_size: int = 16) -> numpy.ndarray:
    model = load_exported(folder)
    labels, probabilities = predict_exported(model, open_exported(RUNTIME, model), texts, batch_size)
    assert (labels == probabilities.argmax(axis=1)).all()
    return probabilities


def test_loads_from_the_unit_or_the_stage_output(cascade_copy: Path, exported_unit: Path) -> None:
    model = loaded(cascade_copy)
    assert model.folder == loaded(cascade_copy / "model").folder
    assert model.labels == ("animal", "number", "place")
    assert model.same_tokens
    assert model.model_bytes == sum(path.stat().st_size for path in cascade_copy.rglob("model.onnx"))
    assert model.parameters == model.small.parameters + model.large.parameters
    assert isinstance(load_exported(exported_unit), ExportedModel)


def test_unsure_answers_are_the_larger_models_and_the_others_the_small_ones(
    cascade_unit: Path, worse_unit: Path, exported_unit: Path
) -> None:
    got, small, large = (answer(folder, TEXTS) for folder in (cascade_unit, worse_unit, exported_unit))
    model = loaded(cascade_unit)
    unsure = passed_on(small, model.threshold)
    assert 0.3 < unsure.mean() < 0.7
    assert numpy.array_equal(got[~unsure], small[~unsure])
    assert numpy.abs(got[unsure] - large[unsure]).max() < 1e-5
    assert numpy.abs(small - large).max() > 0.1
    runtime = open_exported(RUNTIME, model)
    assert isinstance(runtime, CascadeRuntime)
    assert share_passed_on(model, runtime, TEXTS, 16) == unsure.mean()


def test_threshold_one_gives_exactly_the_larger_models_answers_and_zero_the_small_ones(
    cascade_copy: Path, worse_unit: Path, exported_unit: Path
) -> None:
    with_threshold(cascade_copy, 1.0)
    assert numpy.array_equal(answer(cascade_copy, TEXTS), answer(exported_unit, TEXTS))
    with_threshold(cascade_copy, 0.0)
    assert numpy.array_equal(answer(cascade_copy, TEXTS), answer(worse_unit, TEXTS))


@pytest.mark.parametrize("name", ["onnxruntime-cpu", "openvino-cpu"])
def test_every_text_gets_its_answer_in_order(cascade_unit: Path, name: str) -> None:
    model = load_exported(cascade_unit)
    runtime = open_exported(name, model, goal="throughput")
    together = predict_exported(model, runtime, TEXTS, 7)[0]
    alone = [int(predict_exported(model, runtime, [text], 1)[0][0]) for text in TEXTS]
    # In bfloat16 the company in a batch can carry an answer over the threshold.
    assert (together == alone).mean() > (0.999 if name == "onnxruntime-cpu" else 0.9)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(range(len(TEXTS))), batch_size=st.integers(1, 40))
def test_the_order_of_the_texts_is_the_order_of_the_answers(
    cascade_unit: Path, order: list[int], batch_size: int
) -> None:
    straight = answer(cascade_unit, TEXTS)
    shuffled = answer(cascade_unit, [TEXTS[place] for place in order], batch_size)
    assert numpy.abs(shuffled - straight[order]).max() < 1e-4


def test_no_texts_give_no_answers(cascade_unit: Path) -> None:
    assert answer(cascade_unit, []).shape == (0, 3)


def test_a_small_model_with_tokens_of_its_own_is_read_by_its_own_tokenizer(
    cascade_copy: Path, worse_unit: Path, exported_unit: Path
) -> None:
    before = answer(worse_unit, TEXTS)
    path = cascade_copy / "model" / "small" / "tokenizer.json"
    description = json.loads(path.read_text())
    # A small model that never knew these words: it spells them in letters, while the larger one reads them whole.
    for word in ("cat", "one", "paris"):
        number = description["model"]["vocab"].pop(word)
        description["model"]["vocab"][f"[unused-{word}]"] = number
    path.write_text(json.dumps(description))
    write_manifest(path.parent)
    write_manifest(cascade_copy / "model")
    model = loaded(cascade_copy)
    assert not model.same_tokens
    small, large = answer(path.parent, TEXTS), answer(exported_unit, TEXTS)
    assert numpy.abs(small - before).max() > 0.01
    unsure = passed_on(small, model.threshold)
    got = answer(cascade_copy, TEXTS)
    assert numpy.array_equal(got[~unsure], small[~unsure])
    assert numpy.abs(got[unsure] - large[unsure]).max() < 1e-5
    assert model.encode(TEXTS) == ExportedModel.load(exported_unit).encode(TEXTS)


@pytest.mark.parametrize("name", ["cascade.json", "small/model.onnx", "large/tokenizer.json", "large/manifest.json"])
def test_a_lost_or_altered_file_is_named(cascade_copy: Path, name: str) -> None:
    path = cascade_copy / "model" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}: was altered"):
        load_exported(cascade_copy)
    path.unlink()
    with pytest.raises(UserError, match=rf"{name}: is missing"):
        load_exported(cascade_copy)


def test_models_of_other_labels_are_refused(cascade_copy: Path) -> None:
    path = cascade_copy / "model" / "small" / "headroom.json"
    write_json(path, {**json.loads(path.read_text()), "labels": ["animal", "number", "planet"]})
    write_manifest(path.parent)
    write_manifest(cascade_copy / "model")
    with pytest.raises(UserError, match=r"has labels animal, number, planet, .* has animal, number, place"):
        load_exported(cascade_copy)


def test_a_folder_that_is_neither_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no exported model"):
        load_exported(tmp_path)


def test_a_cascade_needs_both_its_runtimes(cascade_unit: Path, exported_unit: Path) -> None:
    single = ExportedModel.load(exported_unit)
    with pytest.raises(TypeError, match="open_exported"):
        predict_exported(load_exported(cascade_unit), open_runtime(RUNTIME, single), TEXTS, 4)
    assert numpy.array_equal(answer(exported_unit, TEXTS), predict(single, open_runtime(RUNTIME, single), TEXTS, 16)[1])


def test_serving_a_cascade_needs_neither_pytorch_nor_transformers(cascade_unit: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from stages.core.cascade import *\n"
        f"model = load_exported(Path({str(cascade_unit)!r}))\n"
        "predict_exported(model, open_exported('onnxruntime-cpu', model), ['the cat'], 1)\n"
        "print([name for name in ('torch', 'transformers', 'pandas', 'sklearn') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
