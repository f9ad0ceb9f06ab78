from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy
import pandas
import pytest
import yaml

from stages.core.artifacts import read_json, write_json, write_manifest
from stages.core.cascade import CascadeModel, open_exported, predict_exported
from stages.core.checkpoints import load_model
from stages.core.choice import DEFAULT, Setting, read_choice
from stages.core.errors import UserError
from stages.core.examples import load_examples
from stages.core.observe.tracking import RunRecord, flatten
from stages.core.params import Params, parse_params
from stages.core.runtimes import ExportedModel, Goal, open_runtime, predict
from stages.core.stage import StageRun
from stages.evaluate.__main__ import _judge_slices, run_evaluate
from stages.evaluate.baselines import PyTorchService, naive_length
from stages.evaluate.serving import watch_serving
from stages.evaluate.speed import Contest, Sweep, far_behind, kept_precisions, sweep_runtime

PROJECT = Path(__file__).parents[3]
BATCH_SIZES = [4, 16]


def small_params(**latency: Any) -> Params:
    raw = yaml.safe_load((PROJECT / "params.yaml").read_text())
    raw["evaluate"]["bootstrap_samples"] = 200
    raw["evaluate"]["latency"] = {
        "single_texts": 12,
        "batch_sizes": BATCH_SIZES,
        "throughput_texts": 40,
        "rounds": 3,
        "baseline_batch_size": 8,
        "naive_length": 512,
        "naive_texts": 8,
        "torch": [],
        **latency,
    }
    raw["evaluate"]["cost"] |= {
        "curve_batch_sizes": [1, 8],
        "curve_lengths": [8, 24, 128],
        "curve_tokens": 64,
        "curve_rounds": 2,
        "cold_starts": 1,
    }
    return parse_params(raw, "params.yaml")


MakeRun = Callable[..., StageRun]


@pytest.fixture(scope="module", autouse=True)
def small_ceilings() -> Iterator[None]:
    """Small matrices: the ceilings of the machine that runs the tests are nobody's business."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("ceilings", "products"):
            patch.setattr(f"stages.core.{module}.SIZE", 256)
        yield


@pytest.fixture(scope="module")
def make_run(
    exported_unit: Path, tiny_checkpoint: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> MakeRun:
    def make(
        params: Params, data: Path = tiny_data, model: Path = exported_unit, parent: Path = tiny_checkpoint
    ) -> StageRun:
        staging = tmp_path_factory.mktemp("staging")
        inputs = {"model": model, "parent": parent, "reference": tiny_checkpoint, "data": data}
        record = cast(RunRecord, SimpleNamespace(log=lambda *_: None))
        return StageRun("evaluate@finetune", params, inputs, staging, staging / "state", record)

    return make


@pytest.fixture(scope="module")
def evaluated(make_run: MakeRun) -> tuple[dict[str, Any], Path]:
    """Metrics and output folder of one run."""
    run = make_run(small_params())
    return run_evaluate(run), run.staging


@pytest.fixture(scope="module")
def model(exported_unit: Path) -> ExportedModel:
    return ExportedModel.load(exported_unit)


Evaluated = tuple[dict[str, Any], Path]


def test_metrics_tell_quality_speed_and_size(evaluated: Evaluated, exported_unit: Path) -> None:
    metrics = evaluated[0]
    assert metrics["variant"] == "finetune"
    assert metrics["texts"] == 45
    assert metrics["quality"]["accuracy"] > 0.9  # each text has a word that gives its label away
    assert metrics["size"]["model_bytes"] == (exported_unit / "model.onnx").stat().st_size
    numbers = [value for value in flatten(metrics).values() if isinstance(value, float)]
    assert len(numbers) > 40
    assert all(math.isfinite(value) for value in numbers)


def test_the_export_of_the_reference_is_as_good_as_the_reference(evaluated: Evaluated) -> None:
    against = evaluated[0]["against_reference"]
    assert (against["difference"], against["low"], against["high"]) == (0.0, 0.0, 0.0)
    assert against["within_floor"]
    assert against["surely_within_floor"]
    assert against["agreement"] == 1.0


def test_the_parent_of_the_first_export_is_the_reference(evaluated: Evaluated) -> None:
    metrics, folder = evaluated
    assert metrics["against_parent"] == metrics["against_reference"]
    assert pandas.read_csv(folder / "flips.csv").empty


def test_clusters_and_temperature_are_told(evaluated: Evaluated) -> None:
    metrics, folder = evaluated
    assert metrics["clusters"]["space"] == "hidden"
    assert metrics["clusters"]["silhouette"] > 0.3  # the model tells the labels apart
    places = pandas.read_parquet(folder / "embeddings.parquet")
    predictions = pandas.read_parquet(folder / "predictions.parquet")
    assert places["text"].tolist() == predictions["text"].tolist()
    scaling = metrics["temperature_scaling"]
    assert scaling["before"]["log_loss"] == metrics["quality"]["log_loss"]
    assert pandas.read_csv(folder / "calibration_scaled.csv")["count"].sum() == 45


def test_speed_is_told_for_both_runtimes_and_both_baselines(evaluated: Evaluated) -> None:
    metrics = evaluated[0]
    assert set(metrics["runtimes"]) == {"onnxruntime-cpu", "openvino-cpu"}
    for entry in metrics["runtimes"].values():
        assert list(entry["texts_per_second"]) == [str(size) for size in BATCH_SIZES]
        assert entry["best_batch_size"] in BATCH_SIZES
        assert 0 < entry["latency_ms"]["p50"] <= entry["latency_ms"]["p95"] <= entry["latency_ms"]["p99"]
        assert 20 < entry["peak_memory_mb"] < 2000
    assert metrics["runtimes"]["openvino-cpu"]["agreement"] > 0.9
    assert metrics["baselines"]["naive"]["padded_to"] == 64  # as many positions as the model has
    assert metrics["baselines"]["fair"]["padded_to"] == "longest in the batch"
    best = metrics["best"]
    assert best["texts_per_second"] == max(entry["best_texts_per_second"] for entry in metrics["runtimes"].values())
    assert best["latency_ms"]["p50"] == min(entry["latency_ms"]["p50"] for entry in metrics["runtimes"].values())
    for baseline in ("fair", "naive"):
        for measure in ("throughput", "latency"):
            ratio = metrics["speedup"][f"{measure}_over_{baseline}"]
            assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
    assert metrics["speedup"]["throughput_over_naive"]["median"] > 1.0


def test_the_choice_is_that_of_the_metrics(evaluated: Evaluated) -> None:
    metrics, folder = evaluated
    for goal in ("latency", "throughput"):
        setting, problem = read_choice(folder / "runtime.json", cast(Goal, goal))
        name = metrics["best"][f"{goal}_runtime"]
        assert problem is None
        assert setting == Setting(**metrics["runtimes"][name][f"{goal}_setting"])
        assert setting.runtime == name


def test_precisions_are_kept_by_the_share_of_labels_that_they_keep() -> None:
    assert kept_precisions(["f32", "bf16", "f16"], {"bf16": 0.994, "f16": 0.995}, 0.995) == ["f32", "f16"]
    assert kept_precisions([None], {}, 1.0) == [None]


def test_a_precision_that_changes_labels_is_never_chosen(model: ExportedModel, tiny_data: Path) -> None:
    texts = pandas.read_parquet(tiny_data / "test.parquet")["text"].tolist()
    labels = predict(model, open_runtime("onnxruntime-cpu", model), texts, 32)[0]
    latency = small_params(single_texts=4, throughput_texts=4).evaluate.latency

    def sweep(expected: numpy.ndarray) -> Sweep:
        return sweep_runtime(Contest(model, [], [], {}, texts, expected, 0.995, latency, 0), "openvino-cpu")

    wrong = sweep((labels + 1) % 3)
    assert (wrong.throughput.precision, wrong.latency.precision) == ("f32", "f32")
    assert set(wrong.agreement.values()) <= {0.0}
    assert all(share > 0.9 for share in sweep(labels).agreement.values())


def test_pytorch_takes_part_only_where_a_trial_shows_it_within_reach(model: ExportedModel, tiny_data: Path) -> None:
    texts = pandas.read_parquet(tiny_data / "test.parquet")["text"].tolist()
    contest = Contest(model, [], [], {}, texts, numpy.zeros(len(texts)), 1.0, small_params().evaluate.latency, 0)

    def best(texts_per_second: float, milliseconds: float) -> dict[str, Sweep]:
        return {"best": Sweep(DEFAULT, DEFAULT, 8, milliseconds, {8: texts_per_second}, {})}

    assert far_behind(contest, "torch-eager", best(1e-9, 1e-9)) == ""
    assert far_behind(contest, "torch-eager", best(1e9, 1e9)) == ""
    reason = far_behind(contest, "torch-eager", best(1e9, 1e-9))
    assert "texts a second where the best did 1000000000" in reason
    assert "torch-none: no such runtime here" in far_behind(contest, "torch-none", best(1e9, 1e-9))


def test_runtimes_that_saturate_are_left_out(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.evaluate.__main__.safe_runtimes", lambda model: ["onnxruntime-cpu"])
    metrics = run_evaluate(make_run(small_params(single_texts=4, throughput_texts=4, torch=["eager"])))
    assert set(metrics["runtimes"]) | set(metrics["left_out"]) == {"onnxruntime-cpu", "torch-eager"}
    assert "openvino-cpu" not in metrics["runtimes"]


def test_tables_hold_a_row_a_text(evaluated: Evaluated, tiny_data: Path) -> None:
    metrics, folder = evaluated
    test = pandas.read_parquet(tiny_data / "test.parquet")
    names = read_json(tiny_data / "labels.json")
    predictions = pandas.read_parquet(folder / "predictions.parquet")
    confusion = pandas.read_csv(folder / "confusion.csv")
    calibration = pandas.read_csv(folder / "calibration.csv")
    assert predictions["text"].tolist() == test["text"].tolist()
    assert predictions["label"].tolist() == [names[index] for index in test["label"]]
    assert predictions["score"].between(1 / 3, 1).all()
    assert confusion["actual"].tolist() == predictions["label"].tolist()
    assert (confusion["actual"] == confusion["predicted"]).mean() == metrics["quality"]["accuracy"]
    assert calibration["count"].sum() == len(test)


def test_cost_is_told_with_curves(evaluated: Evaluated) -> None:
    metrics, folder = evaluated
    cost = metrics["cost"]
    assert cost["operations"]["int8"] == 0.0
    words = pandas.read_parquet(folder / "predictions.parquet")["text"].str.split().str.len()
    assert cost["operations"]["tokens"] == pytest.approx(words.mean() + 2, abs=2)  # a sample of 40 of the 45 texts
    assert cost["ceilings"]["share"] > 0
    assert cost["cold_start"]["low"] <= cost["cold_start"]["seconds"] <= cost["cold_start"]["high"]
    assert "price_per_million_texts" not in cost
    latency = pandas.read_csv(folder / "latency.csv")
    assert set(latency["contender"]) == {"onnxruntime-cpu", "openvino-cpu", "fair", "naive"}
    name = metrics["best"]["latency_runtime"]
    own = latency[latency["contender"] == name].set_index("share")["milliseconds"]
    assert own[0.5] == pytest.approx(metrics["best"]["latency_ms"]["p50"])
    assert own.is_monotonic_increasing
    # No text of the model is longer than 24 tokens, so a point at 128 would be one at 24.
    for name, sizes in (("batch", [1, 8]), ("length", [8, 24])):
        curve = pandas.read_csv(folder / f"throughput_{name}.csv")
        assert curve["size"].tolist() == sizes
        assert (curve["low"] <= curve["texts_per_second"]).all()
        assert (curve["texts_per_second"] <= curve["high"]).all()


def test_slices_of_the_export_of_the_reference_lost_nothing(evaluated: Evaluated) -> None:
    metrics, folder = evaluated
    table = pandas.read_csv(folder / "slices.csv")
    assert metrics["slices"]["looked_at"] == len(table)
    assert metrics["slices"]["hurt"] == 0
    assert (table["difference"].dropna() == 0).all()
    assert table[table["kind"] == "label"]["texts"].sum() == metrics["texts"]
    assert metrics["fairness"]["length"]["accuracy"]["change"] == 0.0


def test_a_column_of_the_user_becomes_slices(make_run: MakeRun, tiny_data: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    frame = pandas.read_parquet(data / "test.parquet")
    frame["country"] = ["fr" if number < 20 else "de" for number in range(len(frame))]
    frame.to_parquet(data / "test.parquet")
    test, run = load_examples(data, "test"), make_run(small_params(), data)
    predictions = test.labels.copy()
    predictions[:15] = (predictions[:15] + 1) % 3
    metrics = _judge_slices(run, test, predictions, test.labels)
    table = pandas.read_csv(run.staging / "slices.csv")
    assert table.loc[0, ["kind", "name", "value", "texts", "lost", "hurt"]].tolist() == [
        "column", "country", "fr", 20, 15, True,
    ]  # fmt: skip
    assert metrics["slices"]["worst"] == "country: fr"
    assert metrics["fairness"]["column country"]["accuracy"]["change"] == pytest.approx(0.75)


def test_other_labels_than_the_models_are_refused(make_run: MakeRun, tiny_data: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    write_json(data / "labels.json", ["animal", "number", "planet"])
    with pytest.raises(UserError, match=r"labels\.json: the data has labels animal, number, planet, the model"):
        run_evaluate(make_run(small_params(), data))


def test_a_parent_with_other_labels_is_refused(make_run: MakeRun, exported_copy: Path, model: ExportedModel) -> None:
    description = read_json(exported_copy / "model" / "headroom.json")
    write_json(exported_copy / "model" / "headroom.json", description | {"labels": ["animal", "number", "planet"]})
    write_manifest(exported_copy / "model")
    with pytest.raises(UserError, match=r"has labels animal, number, planet, .* has animal, number, place"):
        run_evaluate(make_run(small_params(), parent=exported_copy / "model"))


def test_a_cascade_is_measured_like_a_model(
    make_run: MakeRun, cascade_unit: Path, worse_unit: Path, evaluated: Evaluated
) -> None:
    run = make_run(small_params(), model=cascade_unit, parent=worse_unit)
    metrics = run_evaluate(run)
    cascade = CascadeModel.load(cascade_unit)
    assert metrics["size"]["model_bytes"] == sum(path.stat().st_size for path in cascade_unit.rglob("model.onnx"))
    assert 0.0 < metrics["passed_on"] < 1.0
    test = pandas.read_parquet(run.inputs["data"] / "test.parquet")
    expected = predict_exported(cascade, open_exported("onnxruntime-cpu", cascade), test["text"].tolist(), 32)[1]
    assert pandas.read_parquet(run.staging / "predictions.parquet")["score"].tolist() == expected.max(axis=1).tolist()
    assert set(metrics) - set(evaluated[0]) == {"passed_on"}
    assert metrics["clusters"]["space"] == "probabilities"
    flips = pandas.read_csv(run.staging / "flips.csv")
    for name in ("parent", "reference"):
        against = metrics[f"against_{name}"]
        counts = flips[flips["against"] == name]["kind"].value_counts().to_dict()
        assert counts == {kind: count for kind, count in against["flips"].items() if count}
        assert against["agreement"] == pytest.approx(1 - sum(counts.values()) / 45)
        won, lost = against["flips"]["wrong_to_right"], against["flips"]["right_to_wrong"]
        assert against["difference"] == pytest.approx((won - lost) / 45)
    assert metrics["against_parent"]["difference"] > 0.0  # the small model alone is the worse one


def test_padding_shorter_than_the_texts_is_refused() -> None:
    with pytest.raises(UserError, match=r"naive_length 16 is shorter .* at least tokenize\.maximum_length, 128"):
        small_params(naive_length=16)


def test_fewer_texts_than_rounds_are_enough_and_no_temperature_is_fitted_unasked(make_run: MakeRun) -> None:
    raw = small_params(single_texts=2, throughput_texts=1, naive_texts=1).model_dump(mode="json")
    raw["evaluate"]["temperature_scaling"] = False
    run = make_run(parse_params(raw, "params.yaml"))
    metrics = run_evaluate(run)
    assert metrics["speedup"]["latency_over_fair"]["median"] > 0
    assert "temperature_scaling" not in metrics
    assert not (run.staging / "calibration_scaled.csv").exists()


def test_padding_changes_the_speed_of_a_baseline_not_its_answers(
    model: ExportedModel, tiny_checkpoint: Path, tiny_data: Path
) -> None:
    network = load_model(tiny_checkpoint)
    test = pandas.read_parquet(tiny_data / "test.parquet")
    texts = test["text"].tolist()
    fair = PyTorchService(network, model, None).classify(texts, 8)
    naive = PyTorchService(network, model, naive_length(512, network)).classify(texts, 8)
    onnx = predict(model, open_runtime("onnxruntime-cpu", model), texts, 8)[0]
    assert fair == naive == onnx.tolist()


def test_memory_is_that_of_a_process_that_only_serves(exported_unit: Path) -> None:
    # This process holds PyTorch and more; a serving one holds a runtime and a tokenizer.
    serving = watch_serving(exported_unit, DEFAULT, ["the cat", ""])
    assert 20 < serving.resident_memory_mb <= serving.peak_memory_mb < 250
    assert min(serving.import_seconds, serving.load_seconds, serving.answer_seconds) > 0
    assert serving.cold_start_seconds < 60
