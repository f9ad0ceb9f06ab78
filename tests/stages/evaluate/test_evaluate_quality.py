from __future__ import annotations

from pathlib import Path

import numpy
import onnx
import pandas
import pytest
import torch
from sklearn.metrics import roc_auc_score, silhouette_score

from stages.core.cascade import load_exported, open_exported, predict_exported
from stages.core.checkpoints import load_model
from stages.core.metrics import calibration_error, log_loss, softmax
from stages.core.params import EmbeddingParams, EvaluateParams, LatencyParams, QualityParams
from stages.evaluate.calibration import (
    adaptive_calibration_error,
    at_temperature,
    brier_score,
    fit_temperature,
    scaling_scores,
)
from stages.evaluate.comparison import compare, flip_table, kinds_of_flips
from stages.evaluate.embeddings import cluster, draw_map, embed, output_layer_input, silhouette
from stages.evaluate.quality import prediction_table, score_quality, write_reliability

NAMES = ["a", "b", "c"]
LATENCY = LatencyParams.model_construct()
PARAMS = EvaluateParams.model_construct(
    bootstrap_samples=500, confidence=0.95, calibration_bins=10, temperature_scaling=True, latency=LATENCY
)


def calibrated(texts: int, seed: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Logits of a model that means what it says, and labels drawn from its probabilities."""
    random = numpy.random.default_rng(seed)
    logits = random.normal(0.0, 2.0, (texts, 3))
    labels = (softmax(logits).cumsum(axis=1) > random.random((texts, 1))).argmax(axis=1)
    return logits, labels


def test_quality_of_a_case_worked_by_hand() -> None:
    probabilities = numpy.array([[0.7, 0.2, 0.1], [0.2, 0.6, 0.2], [0.1, 0.5, 0.4], [0.0, 0.1, 0.9]])
    labels = numpy.array([0, 1, 2, 2])
    found = score_quality(probabilities, labels, NAMES, bins=10)
    quality = found["quality"]
    assert quality["accuracy"] == quality["precision_micro"] == quality["recall_micro"] == quality["f1_micro"] == 0.75
    assert quality["roc_auc"] == 1.0  # no text outside a class looks more like it than one inside
    # Right 3 of 4; squares of the predicted (1, 2, 1) and the actual (1, 1, 2) counts.
    assert quality["matthews"] == pytest.approx((3 * 4 - (1 + 2 + 2)) / numpy.sqrt((16 - 6) * (16 - 6)))
    assert quality["brier"] == pytest.approx((0.14 + 0.24 + 0.62 + 0.02) / 4)
    assert found["per_class"]["b"]["roc_auc"] == 1.0


def test_the_area_of_two_classes_is_that_of_the_second() -> None:
    random = numpy.random.default_rng(0)
    positive = random.random(60)
    labels = (random.random(60) < positive).astype(int)
    found = score_quality(numpy.stack([1 - positive, positive], axis=1), labels, ["no", "yes"], bins=10)
    assert found["quality"]["roc_auc"] == pytest.approx(roc_auc_score(labels, positive))


def test_a_class_without_texts_has_no_area_and_spoils_none() -> None:
    logits, labels = calibrated(80, seed=1)
    probabilities = softmax(logits)
    labels[labels == 2] = 0
    found = score_quality(probabilities, labels, NAMES, bins=10)
    assert found["per_class"]["c"]["roc_auc"] is None
    areas = [roc_auc_score(labels == index, probabilities[:, index]) for index in (0, 1)]
    assert found["quality"]["roc_auc"] == pytest.approx(numpy.mean(areas))
    assert score_quality(probabilities[:3], numpy.zeros(3, dtype=int), NAMES, bins=10)["quality"]["roc_auc"] is None


def test_adaptive_bins_hold_equally_many_texts() -> None:
    confidence = numpy.array([0.6, 0.7, 0.8, 0.9])
    probabilities = numpy.stack([confidence, 1 - confidence], axis=1)
    labels = numpy.array([0, 1, 0, 0])  # right, wrong, right, right
    # Two bins of two: |1.3 - 1| and |1.7 - 2|, over four texts.
    assert adaptive_calibration_error(probabilities, labels, bins=2) == pytest.approx((0.3 + 0.3) / 4)
    assert adaptive_calibration_error(probabilities, labels, bins=9) == pytest.approx((0.4 + 0.7 + 0.2 + 0.1) / 4)


def test_a_certain_mistake_has_the_worst_brier_score() -> None:
    assert brier_score(numpy.array([[1.0, 0.0]]), numpy.array([1])) == 2.0


def test_the_temperature_that_was_applied_is_found() -> None:
    logits, labels = calibrated(20_000, seed=2)
    temperature = fit_temperature(softmax(logits * 5), labels)
    assert temperature == pytest.approx(5.0, rel=0.05)
    mended = at_temperature(softmax(logits * 5), temperature)
    assert calibration_error(mended, labels, 15) < 0.02 < calibration_error(softmax(logits * 5), labels, 15)


def test_scaling_tells_before_and_after_and_changes_no_answer() -> None:
    logits, labels = calibrated(2000, seed=3)
    probabilities = softmax(logits * 5)
    found = scaling_scores(probabilities, labels, 5.0, bins=10)
    assert found["temperature"] == 5.0
    for name, before in found["before"].items():
        assert found["after"][name] < before
    scaled = at_temperature(probabilities, 5.0)
    assert (scaled.argmax(axis=1) == probabilities.argmax(axis=1)).all()
    assert scaled == pytest.approx(softmax(logits), abs=1e-6)
    assert found["after"]["log_loss"] == pytest.approx(log_loss(softmax(logits), labels), abs=1e-6)


def test_a_probability_rounded_to_nothing_stays_a_number() -> None:
    scaled = at_temperature(numpy.array([[1.0, 0.0]], dtype=numpy.float32), 3.0)
    assert numpy.isfinite(scaled).all()
    assert scaled.sum() == pytest.approx(1.0)


def test_the_reliability_curve_has_every_text(tmp_path: Path) -> None:
    logits, labels = calibrated(300, seed=4)
    write_reliability(tmp_path / "curve.csv", softmax(logits), labels, bins=10)
    table = pandas.read_csv(tmp_path / "curve.csv")
    assert list(table) == ["confidence", "accuracy", "count"]
    assert table["count"].sum() == 300
    assert table["confidence"].is_monotonic_increasing


def test_flips_are_told_both_ways() -> None:
    labels = numpy.array([0, 0, 1, 1, 2, 2])
    before = numpy.array([0, 0, 2, 0, 0, 2])
    after = numpy.array([0, 1, 1, 2, 0, 2])
    kinds = ["", "right_to_wrong", "wrong_to_right", "wrong_to_wrong", "", ""]
    assert kinds_of_flips(before, after, labels).tolist() == kinds
    table = flip_table("parent", before, after, labels, list("uvwxyz"), NAMES)
    assert table.to_dict("records") == [
        {"against": "parent", "text": "v", "label": "a", "before": "a", "after": "b", "kind": "right_to_wrong"},
        {"against": "parent", "text": "w", "label": "b", "before": "c", "after": "b", "kind": "wrong_to_right"},
        {"against": "parent", "text": "x", "label": "b", "before": "a", "after": "c", "kind": "wrong_to_wrong"},
    ]


def test_a_worse_variant_falls_below_the_floor() -> None:
    labels = numpy.arange(200) % 2
    variant = labels.copy()
    variant[:6] = 1 - variant[:6]
    known = compare(variant, labels, labels, QualityParams(metric="accuracy", floor=0.02), PARAMS, seed=1)
    assert known["difference"] == pytest.approx(-0.03)
    assert known["low"] < -0.03 < known["high"] < 0.0
    assert not known["within_floor"]
    assert known["flips"] == {"right_to_wrong": 6, "wrong_to_right": 0, "wrong_to_wrong": 0}
    assert known["mcnemar_p"] == 2 * 0.5**6
    assert known["non_inferiority_p"] > 0.5
    generous = compare(variant, labels, labels, QualityParams(metric="accuracy", floor=0.04), PARAMS, seed=1)
    assert generous["within_floor"]
    assert not generous["surely_within_floor"]
    assert not generous["non_inferior"]
    lavish = compare(variant, labels, labels, QualityParams(metric="accuracy", floor=0.1), PARAMS, seed=1)
    assert lavish["non_inferior"]


@pytest.mark.parametrize("metric", ["accuracy", "f1_macro"])
def test_every_metric_has_a_test_of_non_inferiority(metric: str) -> None:
    labels = numpy.arange(600) % 3
    variant, other = labels.copy(), labels.copy()
    variant[:9], other[20:29] = 2 - variant[:9], 2 - other[20:29]
    quality = QualityParams.model_validate({"metric": metric, "floor": 0.03})
    found = compare(variant, other, labels, quality, PARAMS, seed=1)
    assert found["non_inferior"]
    assert found["non_inferiority_method"] == ("score test" if metric == "accuracy" else "bootstrap")
    strict = compare(variant, other, labels, QualityParams.model_validate({"metric": metric, "floor": 0.0}), PARAMS, 1)
    assert not strict["non_inferior"]
    assert strict["texts_to_show"] is None


def test_vectors_are_those_that_the_output_layer_reads(
    exported_unit: Path, tiny_checkpoint: Path, tiny_data: Path
) -> None:
    texts = pandas.read_parquet(tiny_data / "test.parquet")["text"].tolist()
    model = load_exported(exported_unit)
    embedded = embed(model, texts, numpy.empty((len(texts), 3)))
    assert embedded.space == "hidden"
    network = load_model(tiny_checkpoint)
    head = network.get_submodule("classifier")
    with torch.inference_mode():
        logits = head(torch.from_numpy(embedded.vectors)).numpy()
    wanted = predict_exported(model, open_exported("onnxruntime-cpu", model), texts, 16)[1]
    assert softmax(logits) == pytest.approx(wanted, abs=1e-5)


def test_a_cascade_is_mapped_by_its_answers(cascade_unit: Path) -> None:
    probabilities = numpy.random.default_rng(0).dirichlet([1, 1, 1], 12).astype(numpy.float32)
    embedded = embed(load_exported(cascade_unit), ["the cat"] * 12, probabilities)
    assert embedded.space == "probabilities"
    assert embedded.vectors is probabilities


def test_the_output_layer_is_found_behind_what_follows_it() -> None:
    tensor = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, None)
    out = onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, None)
    make = onnx.helper.make_node
    nodes = [make("Tanh", ["x"], ["h"]), make("MatMul", ["h", "w"], ["p"]), make("Add", ["p", "b"], ["out"])]
    assert output_layer_input(onnx.helper.make_graph(nodes, "g", [tensor], [out])) == "h"
    lost = [make("Tanh", ["x"], ["h"]), make("Neg", ["x"], ["k"]), make("Add", ["h", "k"], ["out"])]
    assert output_layer_input(onnx.helper.make_graph(lost, "g", [tensor], [out])) is None


def test_labels_that_lie_apart_have_a_high_silhouette() -> None:
    random = numpy.random.default_rng(0)
    labels = numpy.arange(60) % 3
    apart = numpy.eye(3)[labels] * 9 + random.normal(size=(60, 3))
    assert silhouette(apart, labels) == pytest.approx(silhouette_score(apart, labels))
    assert silhouette(apart, labels) > 0.6 > 0.1 > (silhouette(apart, random.permutation(labels)) or 0.0)
    assert silhouette(apart, numpy.zeros(60, dtype=int)) is None


def test_the_plane_of_greatest_variance_shows_its_share() -> None:
    vectors = numpy.random.default_rng(1).normal(size=(500, 3)) * [6.0, 3.0, 2.0]
    places, shown = draw_map(vectors, "pca", seed=0)
    assert shown == pytest.approx(45 / 49, abs=0.03)
    assert places.var(axis=0).sum() / vectors.var(axis=0).sum() == pytest.approx(shown)


def test_a_model_to_which_all_texts_are_one_has_a_map_of_one_point() -> None:
    places, shown = draw_map(numpy.ones((9, 4), dtype=numpy.float32), "pca", seed=0)
    assert shown == 0.0
    assert not places.any()


def test_neighbours_stay_neighbours() -> None:
    groups = numpy.arange(24) % 2
    vectors = numpy.random.default_rng(2).normal(size=(24, 5)) + 20 * groups[:, None]
    places, shown = draw_map(vectors, "tsne", seed=0)
    assert shown is None
    assert silhouette(places, groups) > 0.5
    assert (draw_map(vectors, "tsne", seed=0)[0] == places).all()


def test_the_map_holds_no_more_texts_than_asked_for(exported_unit: Path, tiny_data: Path) -> None:
    test = pandas.read_parquet(tiny_data / "test.parquet")
    model = load_exported(exported_unit)
    labels = test["label"].to_numpy()
    probabilities = predict_exported(model, open_exported("onnxruntime-cpu", model), test["text"].tolist(), 16)[1]
    table = prediction_table(test["text"].tolist(), labels, probabilities, model.labels)
    params = EmbeddingParams(texts=20, map="pca")
    figures, places = cluster(model, table, labels, probabilities, params, seed=3)
    assert figures["texts"] == len(places) == 20
    assert list(places) == ["x", "y", "label", "prediction", "text"]
    known = dict(zip(table["text"], table["prediction"], strict=True))
    assert places["prediction"].tolist() == [known[text] for text in places["text"]]
    assert len(set(places.index)) == 20
    again = cluster(model, table, labels, probabilities, params, seed=3)[1]
    pandas.testing.assert_frame_equal(places, again)
