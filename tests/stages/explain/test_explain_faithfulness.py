from __future__ import annotations

import numpy
import pandas
import pytest
from scipy import stats

from stages.core.judging import predict_logits
from stages.core.metrics import softmax
from stages.core.params import ExplainParams
from stages.explain.attribution import integrated_gradients
from stages.explain.faithfulness import (
    BETTER,
    Trial,
    against_random,
    mean_curves,
    mean_interval,
    random_orders,
    rank,
    try_orders,
)
from stages.explain.reader import Reader, read_together
from stages.report.sections.explanations import SHADED, found_wanting


def test_measures_of_curves_solved_by_hand() -> None:
    trial = Trial(numpy.array([1.0, 0.5, 0.0]), numpy.array([0.0, 0.8, 1.0]), 0.3, 0.1)
    measures = trial.measures()
    assert measures["deletion"] == pytest.approx(0.5)
    assert measures["insertion"] == pytest.approx(0.65)


def test_trials_ask_what_the_papers_ask(reader: Reader, explain_params: ExplainParams) -> None:
    _, (reading,) = read_together("what is the cat", [reader])
    params = explain_params.faithfulness.model_copy(update={"points": 2, "shares": [0.1, 0.5]})
    ((trial,),) = try_orders(reader, [reading], [0], [[numpy.array([3, 0, 1, 2])]], params)

    def ask(text: str) -> float:
        ids = [2, *(reader.tokenizer.token_to_id(word) for word in text.split()), 3]
        return float(softmax(predict_logits(reader.model, [ids], reader.pad_id).numpy())[0, 0])

    mask = "[MASK]"
    whole, none = ask("what is the cat"), ask(f"{mask} {mask} {mask} {mask}")
    half, rest = ask(f"what {mask} {mask} cat"), ask(f"{mask} is the {mask}")
    first, others = ask(f"{mask} {mask} {mask} cat"), ask(f"what is the {mask}")
    numpy.testing.assert_allclose(trial.deletion, [whole, rest, none], rtol=1e-4)
    numpy.testing.assert_allclose(trial.insertion, [none, half, whole], rtol=1e-4)
    # A tenth of four words is one word.
    assert trial.comprehensiveness == pytest.approx(whole - (others + rest) / 2, abs=1e-5)
    assert trial.sufficiency == pytest.approx(whole - (first + half) / 2, abs=1e-5)


def test_intervals_are_those_of_scipy() -> None:
    values = numpy.random.default_rng(0).normal(0.2, 1.0, 12)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.9)
    numpy.testing.assert_allclose(mean_interval(values, 0.9), [values.mean(), expected.low, expected.high])


def test_good_attributions_beat_random_and_shuffled_ones_do_not(
    reader: Reader, texts: list[str], explain_params: ExplainParams
) -> None:
    readings = [read_together(text, [reader])[1][0] for text in texts[:30]]

    answers = predict_logits(reader.model, [reading.input_ids for reading in readings], 0).argmax(dim=1).tolist()
    good = integrated_gradients(reader, readings, answers, explain_params).words
    generator = numpy.random.default_rng(1)
    shuffled = [generator.permutation(shares) for shares in good]
    reversed_words = [-shares for shares in good]
    params = explain_params.faithfulness
    orders = [
        [rank(own), rank(mixed), rank(worst), *random_orders(len(own), 5, seed)]
        for seed, (own, mixed, worst) in enumerate(zip(good, shuffled, reversed_words, strict=True))
    ]
    tried = try_orders(reader, readings, answers, orders, params)
    trials = {name: [found[place] for found in tried] for place, name in enumerate(("good", "shuffled", "reversed"))}
    controls = [found[3:] for found in tried]
    rows = against_random(trials, controls, params.confidence)
    assert [row["better"] for row in rows if row["method"] == "good"] == [True] * len(BETTER)
    assert not any(row["better"] for row in rows if row["method"] == "shuffled")
    assert all(row["high"] < 0.0 for row in rows if row["method"] == "reversed")
    for name, alarms in (("good", 0), ("shuffled", len(BETTER))):
        shown = against_random({SHADED: trials[name]}, controls, params.confidence)
        assert len(found_wanting(pandas.DataFrame(shown).assign(model="compressed"))) == alarms
    curves = mean_curves(trials, controls)
    assert set(curves["method"]) == {"good", "shuffled", "reversed", "random"}
    whole = curves[curves["share"] == 0.0]["deletion"]
    numpy.testing.assert_allclose(whole, whole.iloc[0])


def test_ties_keep_the_order_of_the_text() -> None:
    assert rank(numpy.array([0.0, 2.0, 0.0, 2.0])).tolist() == [1, 3, 0, 2]
    assert [order.tolist() for order in random_orders(5, 2, 3)] == [order.tolist() for order in random_orders(5, 2, 3)]
