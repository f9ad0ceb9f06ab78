"""What the answers of a model and of the reference say, as rows of tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy
import pandas

from stages.core.metrics import Array
from stages.core.params import Perturbation, RobustnessParams
from stages.robustness.answers import Answers
from stages.robustness.measures import (
    accuracy_interval,
    detection,
    each_of_many,
    lost_copies,
    mean_intervals,
    perturbation_measures,
)
from stages.robustness.texts import CORPUS, TEST, Texts

NO_FOREIGN = "there is no foreign text: no corpus, or robustness.foreign_texts is 0, and no other domain"
CASCADE_ENERGY = "the energies of the two models of a cascade are on different scales"


def keeping_label(texts: Texts, params: RobustnessParams) -> list[Perturbation]:
    """Perturbations after which what was right is right."""
    return [name for name in texts.perturbed if name not in params.label_changing]


def perturbation_rows(
    texts: Texts, answers: Mapping[str, Answers], reference: Mapping[str, Answers], params: RobustnessParams, seed: int
) -> dict[str, dict[str, Any]]:
    """What each perturbation that keeps the label costs the model, and how much more than the reference."""
    names = keeping_label(texts, params)
    if not names:
        return {}
    labels, strengths = texts.test.labels, params.strengths()
    own, theirs = (
        numpy.stack([lost_copies(said[TEST].labels, texts.of_copies(name, said), labels) for name in names], axis=1)
        for said in (answers, reference)
    )
    low, high = mean_intervals(own, params.bootstrap_samples, params.confidence, seed)
    strict = each_of_many(params.confidence, len(names))
    extra_low, extra_high = mean_intervals(own - theirs, params.bootstrap_samples, strict, seed)
    rows: dict[str, dict[str, Any]] = {}
    for place, name in enumerate(names):
        base = perturbation_measures(reference[TEST].labels, texts.of_copies(name, reference), labels)
        rows[name] = {
            "strength": strengths[name],
            "changed": texts.changed(name),
            **perturbation_measures(answers[TEST].labels, texts.of_copies(name, answers), labels),
            "drop_low": float(low[place]) / params.copies,
            "drop_high": float(high[place]) / params.copies,
            "reference_accuracy": base["accuracy"],
            "reference_drop": base["drop"],
            "reference_worst_case": base["worst_case"],
            "extra_drop": float((own - theirs)[:, place].mean()) / params.copies,
            "extra_low": float(extra_low[place]) / params.copies,
            "extra_high": float(extra_high[place]) / params.copies,
            "hurts_more": bool(extra_low[place] > 0.0),
        }
    return rows


def sensitivity_rows(
    texts: Texts, answers: Mapping[str, Answers], reference: Mapping[str, Answers], params: RobustnessParams
) -> dict[str, dict[str, Any]]:
    """How many answers change with what may change the right one."""
    strengths = params.strengths()
    return {
        name: {
            "strength": strengths[name],
            "changed": texts.changed(name),
            "answers_changed": float((texts.of_copies(name, answers) != answers[TEST].labels).mean()),
            "reference_answers_changed": float((texts.of_copies(name, reference) != reference[TEST].labels).mean()),
        }
        for name in texts.perturbed
        if name in params.label_changing
    }


def shift_rows(
    texts: Texts, answers: Mapping[str, Answers], reference: Mapping[str, Answers], params: RobustnessParams, seed: int
) -> dict[str, dict[str, Any]]:
    """Accuracy at home and in every other domain, and its difference to the reference's there."""
    rows = {}
    for name, labels in {TEST: texts.test.labels, **{name: own.labels for name, own in texts.shifted.items()}}.items():
        right, theirs = answers[name].labels == labels, reference[name].labels == labels
        difference = right.astype(float) - theirs
        low, high = mean_intervals(difference[:, None], params.bootstrap_samples, params.confidence, seed)
        rows[name] = {
            "texts": len(labels),
            **accuracy_interval(right, params.confidence),
            "reference_accuracy": float(theirs.mean()),
            "difference": float(difference.mean()),
            "difference_low": float(low[0]),
            "difference_high": float(high[0]),
        }
    return rows


def detection_rows(texts: Texts, answers: Mapping[str, Answers], params: RobustnessParams, seed: int) -> dict[str, Any]:
    """How well the model's doubt tells foreign texts from the task's own, by where they come from."""
    foreign = [*texts.shifted, *([CORPUS] if texts.corpus else [])]
    if not foreign:
        return {"reason": NO_FOREIGN}
    home, settings = answers[TEST], (params.bootstrap_samples, params.confidence, seed)
    rows: dict[str, Any] = {}
    for name in foreign:
        away = answers[name]
        rows[name] = {
            "texts": len(away.labels),
            "max_probability": detection(home.confidence, away.confidence, *settings),
            "energy": {"reason": CASCADE_ENERGY}
            if home.energy is None or away.energy is None
            else detection(-home.energy, -away.energy, *settings),
        }
    return rows


def overall(rows: Mapping[str, Mapping[str, Any]], right_everywhere: Array) -> dict[str, Any]:
    """Over all perturbations that keep the label: mean accuracy, the worst one, and texts right however changed.

    Args:
        rows: of `perturbation_rows`.
        right_everywhere: whether the answers to all copies of all perturbations are right, [texts].
    """
    if not rows:
        return {}
    worst = min(rows, key=lambda name: float(rows[name]["accuracy"]))
    return {
        "mean_accuracy": float(numpy.mean([row["accuracy"] for row in rows.values()])),
        "worst_perturbation": worst,
        "worst_accuracy": rows[worst]["accuracy"],
        "right_everywhere": float(right_everywhere.mean()),
    }


def right_everywhere(texts: Texts, answers: Mapping[str, Answers], params: RobustnessParams) -> Array:
    """Whether a text is answered right however it is changed, [texts]; the clean text counts too."""
    right: Array = answers[TEST].labels == texts.test.labels
    for name in keeping_label(texts, params):
        right = right & (texts.of_copies(name, answers) == texts.test.labels).all(axis=0)
    return right


def flipped(
    texts: Texts, answers: Mapping[str, Answers], names: Sequence[str], params: RobustnessParams
) -> pandas.DataFrame:
    """Texts that were right and are wrong once perturbed, a few of each perturbation, the surest mistakes first."""
    rows = [row for name in keeping_label(texts, params) for row in _mistakes(texts, answers, name, params.examples)]
    labelled = [[*row[:3], names[row[3]], names[row[4]], row[5]] for row in rows]
    columns = ["perturbation", "text", "perturbed", "label", "prediction", "confidence"]
    return pandas.DataFrame(labelled, columns=columns)


def _mistakes(texts: Texts, answers: Mapping[str, Answers], name: Perturbation, count: int) -> list[list[Any]]:
    """Perturbation, text, copy, right label, answer and its confidence; each text once."""
    labels, found = texts.test.labels, []
    for number, copies in enumerate(texts.perturbed[name]):
        said = answers[f"{name}/{number}"]
        for place in numpy.flatnonzero((answers[TEST].labels == labels) & (said.labels != labels)).tolist():
            confidence = float(said.confidence[place])
            found.append([name, texts.test.texts[place], copies[place], labels[place], said.labels[place], confidence])
    found.sort(key=lambda row: (-row[5], row[1], row[2]))
    surest = {row[1]: row for row in reversed(found)}
    return sorted(surest.values(), key=lambda row: (-row[5], row[1]))[:count]
