"""Command line of the explain stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pandas
import safetensors.torch
from scipy import stats

from stages.core.artifacts import write_json
from stages.core.errors import UserError
from stages.core.examples import Examples, load_examples, load_labels, sample
from stages.core.judging import predict_logits
from stages.core.metrics import Array, softmax
from stages.core.params import ExplainParams
from stages.core.stage import StageRun, command
from stages.explain.attention import attention_maps, rollout
from stages.explain.attribution import Integrated, Value, integrated_gradients, lime_weights, shapley_values
from stages.explain.faithfulness import Trial, against_random, mean_curves, random_orders, rank, try_orders
from stages.explain.path import first_token_vectors, layer_probabilities, nearest, settled_at
from stages.explain.reader import Reader, Reading, odds_when_absent, read_together, sum_by_word

TEACHER, COMPRESSED = "teacher", "compressed"
ROLES = (TEACHER, COMPRESSED)
GRADIENTS, SHAPLEY, LIME, ROLLOUT = "integrated_gradients", "shapley", "lime", "rollout"

_LEAST_WORDS = 2  # one word cannot be ranked
_LEAST_TEXTS = 2  # one text has no interval
_LEAST_CORRELATED = 3  # two ranks agree or they do not


@dataclass(frozen=True)
class Sampled:
    """Texts to explain."""

    indices: list[int]
    """Places in the test split, the chosen ones first."""
    chosen: int
    """How many of them are shown, and explained by the costly methods too."""
    flips: int
    """Texts of the whole test split that the two models answer differently."""


@dataclass(frozen=True)
class Explained:
    """What one model says about all sampled texts, and why."""

    probabilities: Array
    """[texts, classes]."""
    answers: Array
    """Classes, [texts]."""
    gradients: Integrated
    attributions: dict[str, list[Array]]
    """Of words by method; the costly methods have those of the chosen texts alone."""
    maps: list[list[Any]]
    """Attention of the chosen texts by layer."""
    layers: Array
    """Probabilities after each layer, [layers + 1, texts, classes]."""
    settled: Array
    """First layer from which on the answer stays, [texts]."""
    smooth_gap: float
    """Largest difference of a probability between the model and the one that gradients are taken of."""
    trials: dict[str, list[Trial]]
    controls: list[list[Trial]]
    neighbours: tuple[Array, Array]
    """Training texts by index, and cosines, [chosen, neighbours]."""


def run_explain(run: StageRun) -> dict[str, Any]:
    """Explain the sampled texts for both models, test the explanations, and compare them."""
    params, data = run.params.explain, run.inputs["data"]
    readers = {role: Reader.load(run.inputs[role], data) for role in ROLES}
    test = load_examples(data, "test")
    words, readings = _read_all(test, readers)
    sampled = _sample(words, readings, readers, params, run.params.seed)
    run.say(f"{len(sampled.indices)} texts; the two models differ on {sampled.flips} of {len(test)}")
    explained = {}
    for role in ROLES:
        chosen = [readings[role][index] for index in sampled.indices]
        explained[role] = _explain(run, role, readers[role], chosen, sampled.chosen)
        run.say(f"{role}: {_completeness(explained[role].gradients)}")
    correlations = _correlations(readers[COMPRESSED], readings, sampled, explained, params)
    train = _searched(run, data)
    texts = [
        _record(place, index, test, train, words[index], load_labels(data), explained, correlations[place])
        for place, index in enumerate(sampled.indices)
    ]
    _write(run, texts, readings, readers, sampled, explained)
    return _metrics(sampled, explained, correlations, params)


def _read_all(
    examples: Examples, readers: dict[str, Reader]
) -> tuple[dict[int, list[str]], dict[str, dict[int, Reading]]]:
    """Words, and readings of each model, of the texts that have words enough, by index."""
    words: dict[int, list[str]] = {}
    readings: dict[str, dict[int, Reading]] = {role: {} for role in readers}
    for index, text in enumerate(examples.texts):
        found, read = read_together(text, list(readers.values()))
        if len(found) >= _LEAST_WORDS:
            words[index] = found
            for role, reading in zip(readers, read, strict=True):
                readings[role][index] = reading
    return words, readings


def _sample(
    words: dict[int, list[str]],
    readings: dict[str, dict[int, Reading]],
    readers: dict[str, Reader],
    params: ExplainParams,
    seed: int,
) -> Sampled:
    """Draw flips for up to half of the texts and of the chosen ones, then the rest."""
    indices = list(words)
    if len(indices) < _LEAST_TEXTS:
        raise UserError(
            f"explain: the test split has {len(indices)} texts of {_LEAST_WORDS} words or more, "
            f"at least {_LEAST_TEXTS} are needed; give acquire more texts"
        )
    answers = {
        role: predict_logits(reader.model, [readings[role][i].input_ids for i in indices], reader.pad_id).argmax(dim=1)
        for role, reader in readers.items()
    }
    differs = (answers[TEACHER] != answers[COMPRESSED]).tolist()
    order = numpy.random.default_rng(seed).permutation(len(indices)).tolist()
    flips = [indices[i] for i in order if differs[i]]
    others = [indices[i] for i in order if not differs[i]]
    chosen = _half_and_half(flips, others, params.chosen)
    sampled = _half_and_half(flips, others, params.texts)
    rest = [index for index in sampled if index not in chosen]
    return Sampled([*chosen, *rest][: params.texts], min(len(chosen), params.texts), len(flips))


def _half_and_half(flips: Sequence[int], others: Sequence[int], count: int) -> list[int]:
    first = max(min(len(flips), count // 2), count - len(others))
    return [*flips[:first], *others[: count - first]]


def _explain(run: StageRun, role: str, reader: Reader, readings: Sequence[Reading], chosen: int) -> Explained:
    params, seed = run.params.explain, run.params.seed
    rows = [reading.input_ids for reading in readings]
    layers = layer_probabilities(reader.model, rows, reader.pad_id)
    answers = layers[-1].argmax(axis=1)
    gradients = integrated_gradients(reader, readings, answers.tolist(), params)
    maps = [attention_maps(reader.model, row) for row in rows]
    attributions: dict[str, list[Array]] = {
        GRADIENTS: gradients.words,
        ROLLOUT: [
            sum_by_word(reading, rollout(layer_maps, len(reading.input_ids))[0].numpy())
            for reading, layer_maps in zip(readings, maps, strict=True)
        ],
        SHAPLEY: [],
        LIME: [],
    }
    for reading, answer in zip(readings[:chosen], answers, strict=False):
        value, count = _value(reader, reading, int(answer)), reading.count_words()
        attributions[SHAPLEY].append(shapley_values(value, count, params.shap_rounds, seed))
        attributions[LIME].append(lime_weights(value, count, params.lime_samples, seed))
    trials, controls = _test(reader, readings, answers, attributions, params, seed)
    smooth = softmax(predict_logits(reader.smooth, rows, reader.pad_id).numpy())
    return Explained(
        layers[-1], answers, gradients, attributions, maps[:chosen], layers, settled_at(layers.argmax(axis=2)),
        float(numpy.abs(smooth - layers[-1]).max()), trials, controls,
        _neighbours(run, role, reader, rows[:chosen]),
    )  # fmt: skip


def _value(reader: Reader, reading: Reading, answer: int) -> Value:
    def value(present: Array) -> Array:
        return odds_when_absent(reader, [reading], [answer], [present.astype(bool)])[0]

    return value


def _test(
    reader: Reader,
    readings: Sequence[Reading],
    answers: Array,
    attributions: dict[str, list[Array]],
    params: ExplainParams,
    seed: int,
) -> tuple[dict[str, list[Trial]], list[list[Trial]]]:
    """Try every method's ranking and random ones, all at once: equal variants of a text are asked once."""
    methods = [[name for name, found in attributions.items() if text < len(found)] for text in range(len(readings))]
    orders = [
        [rank(attributions[name][text]) for name in methods[text]]
        + random_orders(reading.count_words(), params.faithfulness.random_orders, seed + text)
        for text, reading in enumerate(readings)
    ]
    tried = try_orders(reader, readings, answers.tolist(), orders, params.faithfulness)
    trials: dict[str, list[Trial]] = {name: [] for name in attributions}
    for names, found in zip(methods, tried, strict=True):
        for name, trial in zip(names, found, strict=False):
            trials[name].append(trial)
    return trials, [found[len(names) :] for names, found in zip(methods, tried, strict=True)]


def _neighbours(run: StageRun, role: str, reader: Reader, rows: Sequence[list[int]]) -> tuple[Array, Array]:
    known = _searched(run, run.inputs["data"], run.inputs[role]).input_ids
    vectors = first_token_vectors(reader.model, rows, reader.pad_id)
    return nearest(vectors, first_token_vectors(reader.model, known, reader.pad_id), run.params.explain.neighbours)


def _searched(run: StageRun, data: Path, checkpoint: Path | None = None) -> Examples:
    """Training texts among which neighbours are looked for: the same ones whatever model reads them."""
    return sample(load_examples(data, "train", checkpoint), run.params.explain.neighbour_texts, run.params.seed)


def _correlations(
    compressed: Reader,
    readings: dict[str, dict[int, Reading]],
    sampled: Sampled,
    explained: dict[str, Explained],
    params: ExplainParams,
) -> list[float | None]:
    """Rank correlation of both models' reasons for the teacher's answer, a text; flips are integrated once more."""
    moved = list(explained[COMPRESSED].gradients.words)
    answers = explained[TEACHER].answers
    flips = numpy.flatnonzero(answers != explained[COMPRESSED].answers).tolist()
    again = [readings[COMPRESSED][sampled.indices[place]] for place in flips]
    words = integrated_gradients(compressed, again, answers[flips].tolist(), params).words
    for place, found in zip(flips, words, strict=True):
        moved[place] = found
    return [rank_correlation(*pair) for pair in zip(explained[TEACHER].gradients.words, moved, strict=True)]


def rank_correlation(first: Array, second: Array) -> float | None:
    """Spearman's correlation; None for fewer than three words, or where all words of a text are equal."""
    if len(first) < _LEAST_CORRELATED or numpy.ptp(first) == 0.0 or numpy.ptp(second) == 0.0:
        return None
    return float(stats.spearmanr(first, second).statistic)


def _record(
    place: int,
    index: int,
    test: Examples,
    train: Examples,
    words: list[str],
    labels: list[str],
    explained: dict[str, Explained],
    correlation: float | None,
) -> dict[str, Any]:
    return {
        "index": index,
        "text": test.texts[index],
        "label": _name(labels, test.labels[index]),
        "flip": bool(explained[TEACHER].answers[place] != explained[COMPRESSED].answers[place]),
        "words": words,
        "correlation": correlation,
        "models": {role: _record_model(place, found, train, labels) for role, found in explained.items()},
    }


def _record_model(place: int, found: Explained, train: Examples, labels: list[str]) -> dict[str, Any]:
    answer = int(found.answers[place])
    after = found.layers[:, place]
    record = {
        "answer": labels[answer],
        "probability": float(found.probabilities[place, answer]),
        "attributions": {name: rows[place].tolist() for name, rows in found.attributions.items() if place < len(rows)},
        "difference": float(found.gradients.differences[place]),
        "completeness_error": float(found.gradients.errors[place]),
        "steps": int(found.gradients.steps[place]),
        "path": [{"answer": labels[layer.argmax()], "probability": float(layer.max())} for layer in after],
        "settled": int(found.settled[place]),
    }
    indices, similarities = found.neighbours
    if place < len(indices):
        record["neighbours"] = [
            {"text": train.texts[near], "label": _name(labels, train.labels[near]), "similarity": float(similarity)}
            for near, similarity in zip(indices[place], similarities[place], strict=True)
        ]
    return record


def _name(labels: list[str], index: int) -> str | None:
    """Name a class; None for a text without a label."""
    return labels[index] if index >= 0 else None


def _write(
    run: StageRun,
    texts: list[dict[str, Any]],
    readings: dict[str, dict[int, Reading]],
    readers: dict[str, Reader],
    sampled: Sampled,
    explained: dict[str, Explained],
) -> None:
    confidence = run.params.explain.faithfulness.confidence
    tokens = {
        role: [
            [readers[role].tokenizer.id_to_token(token) for token in readings[role][index].input_ids]
            for index in sampled.indices[: sampled.chosen]
        ]
        for role in ROLES
    }
    write_json(run.staging / "explanations.json", {"chosen": sampled.chosen, "tokens": tokens, "texts": texts})
    _table(run, "attributions", _attribution_rows(texts))
    _table(
        run,
        "faithfulness",
        pandas.concat([
            pandas.DataFrame(against_random(found.trials, found.controls, confidence)).assign(model=role)
            for role, found in explained.items()
        ]),
    )  # fmt: skip
    _table(
        run,
        "curves",
        pandas.concat([mean_curves(found.trials, found.controls).assign(model=role)
                       for role, found in explained.items()]),
    )  # fmt: skip
    maps = {
        f"{role}.{place}.{layer}": attention.contiguous()
        for role, found in explained.items()
        for place, layers in enumerate(found.maps)
        for layer, attention in enumerate(layers)
        if attention is not None
    }
    safetensors.torch.save_file(maps, run.staging / "attention.safetensors")


def _attribution_rows(texts: list[dict[str, Any]]) -> pandas.DataFrame:
    rows = [
        (text["index"], model, method, place, word, value)
        for text in texts
        for model, found in text["models"].items()
        for method, values in found["attributions"].items()
        for place, (word, value) in enumerate(zip(text["words"], values, strict=True))
    ]
    return pandas.DataFrame(rows, columns=["index", "model", "method", "place", "word", "attribution"])


def _table(run: StageRun, name: str, frame: pandas.DataFrame) -> None:
    frame.to_csv(run.staging / f"{name}.csv", index=False, lineterminator="\n")


def _metrics(
    sampled: Sampled, explained: dict[str, Explained], correlations: list[float | None], params: ExplainParams
) -> dict[str, Any]:
    known = numpy.array([value for value in correlations if value is not None])
    same = explained[TEACHER].answers == explained[COMPRESSED].answers
    return {
        "texts": len(sampled.indices),
        "flips": sampled.flips,
        "flips_explained": int((~same).sum()),
        "correlation": {
            "mean": float(known.mean()) if len(known) else None,
            "lowest": float(known.min()) if len(known) else None,
            "texts": len(known),
        },
        **{role: _model_metrics(found, params) for role, found in explained.items()},
    }


def _model_metrics(found: Explained, params: ExplainParams) -> dict[str, Any]:
    rows = against_random(found.trials, found.controls, params.faithfulness.confidence)
    advantage: dict[str, dict[str, Any]] = {name: {} for name in found.trials}
    for row in rows:
        advantage[str(row["method"])][str(row["measure"])] = {key: row[key] for key in ("advantage", "low", "high")}
    return {
        "completeness": {
            "worst_error": float(found.gradients.errors.max()),
            "share_complete": float((found.gradients.errors <= params.completeness).mean()),
            "most_steps": int(found.gradients.steps.max()),
            "mean_steps": float(found.gradients.steps.mean()),
        },
        "smooth_gap": found.smooth_gap,
        "settled_layer": float(found.settled.mean()),
        "layers": len(found.layers) - 1,
        "against_random": advantage,
    }


def _completeness(gradients: Integrated) -> str:
    return (
        f"integrated gradients add up to {gradients.errors.max():.2%} at worst, "
        f"with {gradients.steps.mean():.0f} steps a text, {gradients.steps.max()} at most"
    )


if __name__ == "__main__":
    command("explain", run_explain, inputs=(TEACHER, COMPRESSED, "data"))
