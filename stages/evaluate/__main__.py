"""`python -m stages.evaluate`: quality on the test split and speed on this machine of one exported model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy
import pandas

from stages.core.cascade import (
    CascadeModel,
    CascadeRuntime,
    Exported,
    ExportedRuntime,
    load_exported,
    models_of,
    open_exported,
    predict_exported,
    share_passed_on,
)
from stages.core.checkpoints import load_model
from stages.core.choice import RUNTIME_FILE, Setting, open_setting, write_choice
from stages.core.encoding import read_tokenizer
from stages.core.errors import UserError
from stages.core.examples import Examples, load_examples, load_labels, load_pad_id, load_slice_columns
from stages.core.judging import predict_logits
from stages.core.metrics import Array
from stages.core.runtimes import COMPILED, EAGER, REFERENCE_RUNTIME, available_runtimes, safe_runtimes
from stages.core.stage import StageRun, command
from stages.core.timing import watch_other_load
from stages.evaluate.baselines import PyTorchService, naive_length, prepare_pytorch
from stages.evaluate.calibration import at_temperature, fit_temperature, scaling_scores
from stages.evaluate.comparison import compare, flip_table
from stages.evaluate.cost import Service, measure_cost, throughput_curves, write_cost_tables
from stages.evaluate.embeddings import cluster
from stages.evaluate.fairness import measure_fairness
from stages.evaluate.quality import (
    RELIABILITY,
    RELIABILITY_SCALED,
    prediction_table,
    score_quality,
    write_reliability,
    write_tables,
)
from stages.evaluate.serving import watch_serving
from stages.evaluate.slices import Texts, judge_slices, make_groupings, summarize_slices
from stages.evaluate.speed import BASELINES, Contest, measure_speed

_BATCH_SIZE = 32
_NOTEWORTHY_LOAD = 0.1


def run_evaluate(run: StageRun) -> dict[str, Any]:
    """Measure quality and speed; write the tables; return the metrics."""
    params = run.params.evaluate
    model = load_exported(run.inputs["model"])
    test = _read_test(run, model)
    prepare_pytorch()
    network = load_model(run.inputs["reference"])
    # The reference keeps the whole vocabulary, where the model's may be trimmed: each reads its own tokens.
    one = models_of(model)[-1]
    whole = replace(
        one,
        tokenizer=read_tokenizer(run.inputs["reference"], one.maximum_length),
        pad_id=load_pad_id(run.inputs["data"], run.inputs["reference"]),
    )
    naive = naive_length(params.latency.naive_length, network)

    run.say(f"quality on {len(test)} texts")
    runtime = open_exported(REFERENCE_RUNTIME, model)
    probabilities = predict_exported(model, runtime, test.texts, _BATCH_SIZE)[1]
    runtimes = _usable_runtimes(run, model)
    reference = predict_logits(network, whole.encode(test.texts), whole.pad_id).argmax(dim=1).numpy()
    predictions = probabilities.argmax(axis=1)
    quality = _measure_quality(run, model, test, probabilities, reference)
    quality |= _measure_scaling(run, model, runtime, probabilities, test.labels)
    slices = _judge_slices(run, test, predictions, reference)

    run.say("speed beside both baselines")
    lengths = (None, naive)
    services = {name: PyTorchService(network, whole, length) for name, length in zip(BASELINES, lengths, strict=True)}
    passed_on = _passed_on(model, runtime, test.texts)
    # Half of what quality may be lost is left to compression: no more labels than that may a precision change.
    least = 1.0 - run.params.quality.floor / 2
    candidates = [{"eager": EAGER, "compiled": COMPILED}[way] for way in params.latency.torch]
    contest = Contest(
        model, runtimes, candidates, services, test.texts, predictions, least, params.latency, run.params.seed
    )
    speed = _measure_speed(run, contest, passed_on.get("passed_on", 0.0))
    for name in list(speed["runtimes"])[1:]:
        chosen = open_setting(Setting(**speed["runtimes"][name]["throughput_setting"]), model, "throughput")
        others = predict_exported(model, chosen, test.texts, _BATCH_SIZE)[0]
        speed["runtimes"][name]["agreement"] = float(numpy.mean(others == predictions))
    return {
        "variant": run.name.partition("@")[2],
        "texts": len(test),
        **quality,
        **slices,
        "size": {"parameters": model.parameters, "model_bytes": model.model_bytes},
        **passed_on,
        **speed,
    }


def _read_test(run: StageRun, model: Exported) -> Examples:
    folder = run.inputs["data"]
    names = tuple(load_labels(folder))
    if names != model.labels:
        raise UserError(
            f"{folder / 'labels.json'}: the data has labels {', '.join(names)}, "
            f"the model {', '.join(model.labels)}; run `dvc repro` to make both from the same data"
        )
    return load_examples(folder, "test")


def _measure_quality(
    run: StageRun, model: Exported, test: Examples, probabilities: Array, reference: Array
) -> dict[str, Any]:
    """Score the probabilities [texts, labels], alone and against two other models' answers; write the tables."""
    params, answers = run.params.evaluate, probabilities.argmax(axis=1)
    table = prediction_table(test.texts, test.labels, probabilities, model.labels)
    write_tables(run.staging, table)
    others = {"parent": _answers_of_parent(run, model, reference, test.texts), "reference": reference}
    flips = [
        flip_table(name, before, answers, test.labels, test.texts, model.labels) for name, before in others.items()
    ]
    pandas.concat(flips).to_csv(run.staging / "flips.csv", index=False, lineterminator="\n")
    clusters, places = cluster(model, table, test.labels, probabilities, params.embeddings, run.params.seed)
    places.to_parquet(run.staging / "embeddings.parquet", index=False)
    against = {
        f"against_{name}": compare(answers, before, test.labels, run.params.quality, params, run.params.seed)
        for name, before in others.items()
    }
    return {
        **score_quality(probabilities, test.labels, model.labels, params.calibration_bins),
        **against,
        "clusters": clusters,
    }


def _answers_of_parent(run: StageRun, model: Exported, reference: Array, texts: Sequence[str]) -> Array:
    """Classes that the model predicted which this one was made from; for the first export that is the reference."""
    if run.inputs["parent"] == run.inputs["reference"]:
        return reference
    parent = load_exported(run.inputs["parent"])
    if parent.labels != model.labels:
        raise UserError(
            f"{parent.folder}: has labels {', '.join(parent.labels)}, {model.folder} has {', '.join(model.labels)}; "
            "run `dvc repro` to make both from the same data"
        )
    return predict_exported(parent, open_exported(REFERENCE_RUNTIME, parent), texts, _BATCH_SIZE)[0]


def _measure_scaling(
    run: StageRun, model: Exported, runtime: ExportedRuntime, probabilities: Array, labels: Array
) -> dict[str, Any]:
    """Write the reliability curve and, where the params ask for it, what one temperature would make of it."""
    params = run.params.evaluate
    bins = params.calibration_bins
    write_reliability(run.staging / RELIABILITY, probabilities, labels, bins)
    if not params.temperature_scaling:
        return {}
    validation = load_examples(run.inputs["data"], "validation")
    fitted_on = predict_exported(model, runtime, validation.texts, _BATCH_SIZE)[1]
    temperature = fit_temperature(fitted_on, validation.labels)
    write_reliability(run.staging / RELIABILITY_SCALED, at_temperature(probabilities, temperature), labels, bins)
    return {"temperature_scaling": scaling_scores(probabilities, labels, temperature, bins)}


def _judge_slices(run: StageRun, test: Examples, predictions: Array, reference: Array) -> dict[str, Any]:
    """Judge every slice and the gaps between groups; write slices.csv."""
    params, data = run.params.evaluate, run.inputs["data"]
    names = load_labels(data)
    texts = Texts(
        texts=test.texts,
        labels=[names[label] for label in test.labels],
        lengths=[len(row) for row in test.input_ids],
        columns=load_slice_columns(data, "test"),
        training=load_examples(data, "train").texts,
    )
    groupings = make_groupings(texts, params.slices)
    smallest, confidence = params.slices.smallest, params.confidence
    table = judge_slices(groupings, predictions, reference, test.labels, smallest, confidence)
    table.to_csv(run.staging / "slices.csv", index=False, lineterminator="\n")
    fairness = measure_fairness(
        groupings, predictions, reference, test.labels, len(names),
        smallest, params.bootstrap_samples, confidence, run.params.seed,
    )  # fmt: skip
    return {"slices": summarize_slices(table), "fairness": fairness}


def _passed_on(model: Exported, runtime: ExportedRuntime, texts: Sequence[str]) -> dict[str, float]:
    """How much of the work a cascade leaves to its larger model; nothing for a single model."""
    if isinstance(model, CascadeModel) and isinstance(runtime, CascadeRuntime):
        return {"passed_on": share_passed_on(model, runtime, texts, _BATCH_SIZE)}
    return {}


def _usable_runtimes(run: StageRun, model: Exported) -> list[str]:
    """Names of the runtimes that take part, the reference first: those that are right here and can start."""
    offered = [name for name in available_runtimes() if name not in (EAGER, COMPILED)]
    safe = [name for name in offered if all(name in safe_runtimes(part) for part in models_of(model))]
    for name in sorted(set(offered) - set(safe)):
        run.say(f"{name}: left out, its int8 products saturate on a CPU without VNNI")
    usable = [REFERENCE_RUNTIME]
    for name in safe:
        try:
            if name != REFERENCE_RUNTIME:
                open_exported(name, model)
                usable.append(name)
        except UserError as problem:
            run.say(f"left out: {problem}")
    return usable


def _measure_speed(run: StageRun, contest: Contest, passed_on: float) -> dict[str, Any]:
    """Measure speed and cost; the memory is that of a process that only serves, in the setting that is fastest."""
    with watch_other_load() as other:
        speed, settings, latencies = measure_speed(contest)
    for name, entry in speed["left_out"].items():
        run.say(f"{name}: left out, {entry['reason']}")
    if other.share > _NOTEWORTHY_LOAD:
        run.say(
            f"other work took {other.share:.0%} of the processors while timing, which slows PyTorch most; "
            "measure again on a quiet machine before you trust the ratios"
        )
    texts, best = contest.sample(contest.params.throughput_texts), speed["best"]
    serving = {
        name: watch_serving(contest.model.folder, Setting(**entry["throughput_setting"]), texts)
        for name, entry in speed["runtimes"].items()
    }
    for name, found in serving.items():
        memory = {"peak_memory_mb": found.peak_memory_mb, "resident_memory_mb": found.resident_memory_mb}
        speed["runtimes"][name] |= {**memory, "cold_start_seconds": found.cold_start_seconds}
    first = serving[best["throughput_runtime"]]
    best |= {"peak_memory_mb": first.peak_memory_mb, "resident_memory_mb": first.resident_memory_mb}
    run.say("cost")
    service = Service(contest.model, settings["throughput"], texts, best["texts_per_second"], passed_on)
    params = run.params.evaluate.cost
    cost = measure_cost(service, first, params)
    write_cost_tables(run.staging, latencies, throughput_curves(service, params, run.params.seed))
    write_choice(
        run.staging / RUNTIME_FILE,
        settings,
        {"runtimes": speed["runtimes"], "left_out": speed["left_out"], "other_load": other.share},
    )
    return {**speed, "cost": cost, "other_load": other.share}


if __name__ == "__main__":
    command("evaluate", run_evaluate, inputs=("model", "parent", "reference", "data"), variants=True)
