"""`python -m stages.evaluate`: quality on the test split and speed on this machine of one exported model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy

from stages.core.checkpoints import load_model
from stages.core.encoding import read_tokenizer
from stages.core.errors import UserError
from stages.core.examples import Examples, load_examples, load_labels, load_pad_id
from stages.core.judging import predict_logits
from stages.core.runtimes import REFERENCE_RUNTIME, ExportedModel, OpenVino, open_runtime, predict
from stages.core.stage import StageRun, command
from stages.core.timing import watch_other_load
from stages.evaluate.baselines import PyTorchService, naive_length, prepare_pytorch
from stages.evaluate.memory import serving_memory_mb
from stages.evaluate.quality import compare, score_quality, write_tables
from stages.evaluate.speed import BASELINES, RUNTIMES, Contest, measure_speed

_BATCH_SIZE = 32
_NOTEWORTHY_LOAD = 0.1


def run_evaluate(run: StageRun) -> dict[str, Any]:
    """Measure quality and speed; write the tables; return the metrics."""
    params = run.params.evaluate
    model = ExportedModel.load(run.inputs["model"])
    test = _read_test(run, model)
    prepare_pytorch()
    network = load_model(run.inputs["reference"])
    # The reference keeps the whole vocabulary, where the model's may be trimmed: each reads its own tokens.
    whole = replace(
        model,
        tokenizer=read_tokenizer(run.inputs["reference"], model.maximum_length),
        pad_id=load_pad_id(run.inputs["data"], run.inputs["reference"]),
    )
    naive = naive_length(params.latency.naive_length, network)

    run.say(f"quality on {len(test)} texts")
    probabilities = predict(model, open_runtime(REFERENCE_RUNTIME, model), test.texts, _BATCH_SIZE)[1]
    openvino = predict(model, open_runtime(OpenVino.name, model), test.texts, _BATCH_SIZE)[0]
    reference = predict_logits(network, whole.encode(test.texts), whole.pad_id).argmax(dim=1).numpy()
    predictions = probabilities.argmax(axis=1)
    against = compare(predictions, reference, test.labels, run.params.quality, params, run.params.seed)
    write_tables(run.staging, test.texts, test.labels, probabilities, model.labels, params.calibration_bins)

    run.say("speed beside both baselines")
    lengths = (None, naive)
    services = {name: PyTorchService(network, whole, length) for name, length in zip(BASELINES, lengths, strict=True)}
    speed = _measure_speed(run, Contest(model, services, test.texts, params.latency, run.params.seed))
    speed["runtimes"][OpenVino.name]["agreement"] = float(numpy.mean(openvino == predictions))
    return {
        "variant": run.name.partition("@")[2],
        "texts": len(test),
        **score_quality(probabilities, test.labels, model.labels, params),
        "against_reference": against,
        "size": {"parameters": model.parameters, "model_bytes": model.model_bytes},
        **speed,
    }


def _read_test(run: StageRun, model: ExportedModel) -> Examples:
    folder = run.inputs["data"]
    names = tuple(load_labels(folder))
    if names != model.labels:
        raise UserError(
            f"{folder / 'labels.json'}: the data has labels {', '.join(names)}, "
            f"the model {', '.join(model.labels)}; run `dvc repro` to make both from the same data"
        )
    return load_examples(folder, "test")


def _measure_speed(run: StageRun, contest: Contest) -> dict[str, Any]:
    """Measure speed, and how much memory a process that only serves takes at the batch size at which it is fastest."""
    with watch_other_load() as other:
        speed = measure_speed(contest)
    if other.share > _NOTEWORTHY_LOAD:
        run.say(
            f"other work took {other.share:.0%} of the processors while timing, which slows PyTorch most; "
            "measure again on a quiet machine before you trust the ratios"
        )
    texts = contest.sample(contest.params.throughput_texts)
    for name in RUNTIMES:
        entry = speed["runtimes"][name]
        entry["peak_memory_mb"] = serving_memory_mb(contest.model.folder, name, texts, entry["best_batch_size"])
    speed["best"]["peak_memory_mb"] = speed["runtimes"][speed["best"]["throughput_runtime"]]["peak_memory_mb"]
    return {**speed, "other_load": other.share}


if __name__ == "__main__":
    command("evaluate", run_evaluate, inputs=("model", "reference", "data"), variants=True)
