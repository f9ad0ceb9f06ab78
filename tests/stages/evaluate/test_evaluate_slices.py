from __future__ import annotations

import math

import numpy
import pytest
from fairlearn.metrics import (
    MetricFrame,
    demographic_parity_difference,
    equalized_odds_difference,
    selection_rate,
)
from scipy.stats import binomtest

from stages.core.params import RuleParams, SliceParams
from stages.evaluate.fairness import GAPS, _resample, measure_fairness, rates_by_group
from stages.evaluate.slices import (
    Grouping,
    Texts,
    judge_slices,
    log_frequencies,
    make_groupings,
    paired_interval,
    summarize_slices,
)

RULES = [RuleParams(name="mentions money", pattern=r"\$|dollar")]
PARAMS = SliceParams(rules=RULES, groups=2, column_values=3, smallest=10)
WORDS = ("cat", "river", "dollar", "hill", "paris", "many")


def grouping(groups: list[str], kind: str = "column", name: str = "country") -> Grouping:
    return Grouping(kind, name, numpy.array(groups, dtype=object), tuple(dict.fromkeys(groups)))  # type: ignore[arg-type]


def texts_of(count: int, **columns: list[str]) -> Texts:
    texts = [
        f"the {WORDS[number % 6]} and the {WORDS[number * 7 // 3 % 6]} {'again ' * (number % 4)}"
        for number in range(count)
    ]
    labels = ["x" if number % 2 else "y" for number in range(count)]
    return Texts(texts, labels, [len(text.split()) + 2 for text in texts], columns, texts[:20])


def of(groupings: list[Grouping], kind: str) -> Grouping:
    return next(each for each in groupings if each.kind == kind)


def test_slices_as_worked_by_hand() -> None:
    labels = numpy.zeros(24, dtype=int)
    reference = numpy.array([0] * 11 + [1] + [0] * 12)
    variant = numpy.array([1] * 3 + [0] * 9 + [0] * 12)
    table = judge_slices([grouping(["de"] * 12 + ["fr"] * 12)], variant, reference, labels, 10, 0.95)
    first = table.iloc[0]
    assert (first["value"], first["texts"], first["lost"], first["gained"]) == ("de", 12, 3, 1)
    assert first["difference"] == pytest.approx(-2 / 12)
    assert (first["accuracy"], first["reference_accuracy"]) == (pytest.approx(9 / 12), pytest.approx(11 / 12))
    assert first["p"] == pytest.approx((4 + 1) / 16)  # three or four of four changes are losses
    assert first["p_holm"] == pytest.approx(2 * 5 / 16)
    # Bonett and Price: shares 4/14 and 2/14.
    reach = 1.959964 * math.sqrt((6 / 14 - (2 / 14) ** 2) / 14)
    assert (first["low"], first["high"]) == (pytest.approx(-2 / 14 - reach), pytest.approx(-2 / 14 + reach))
    assert table.iloc[1]["difference"] == 0.0
    assert not table["hurt"].any()


def test_a_slice_made_worse_comes_first_and_is_called_hurt() -> None:
    count = 600
    texts = texts_of(count, country=[("de", "fr", "it")[number % 3] for number in range(count)])
    labels = numpy.array([label == "x" for label in texts.labels]).astype(int)
    reference = labels.copy()
    reference[::25] = 1 - reference[::25]
    variant = reference.copy()
    broken = numpy.flatnonzero((numpy.arange(count) % 3 == 1) & (numpy.arange(count) % 5 == 0))
    variant[broken] = 1 - labels[broken]
    table = judge_slices(make_groupings(texts, PARAMS), variant, reference, labels, 10, 0.95)
    assert (table.iloc[0]["name"], table.iloc[0]["value"]) == ("country", "fr")
    assert table.iloc[0]["hurt"]
    summary = summarize_slices(table)
    assert summary["hurt"] >= 1
    assert summary["worst"] == "country: fr"
    assert summary["worst_difference"] == pytest.approx(-(reference == labels)[broken].sum() / 200)


def test_noise_alone_hurts_nothing() -> None:
    count = 400
    texts, generator = texts_of(count, country=["de", "fr"] * (count // 2)), numpy.random.default_rng(0)
    labels = numpy.array([label == "x" for label in texts.labels]).astype(int)
    found = []
    for _ in range(20):
        answers = [numpy.where(generator.random(count) < 0.1, 1 - labels, labels) for _ in range(2)]
        found.append(
            judge_slices(make_groupings(texts, PARAMS), answers[0], answers[1], labels, 10, 0.95)["hurt"].any()
        )
    assert sum(found) <= 2


def test_small_slices_are_listed_and_not_judged() -> None:
    labels = numpy.zeros(40, dtype=int)
    variant = numpy.array([1] * 9 + [0] * 31)
    table = judge_slices([grouping(["de"] * 9 + ["fr"] * 31)], variant, labels, labels, 10, 0.95)
    last = table.iloc[-1]
    assert (last["value"], last["difference"], bool(last["judged"]), bool(last["hurt"])) == ("de", -1.0, False, False)
    assert math.isnan(last["p_holm"])
    assert summarize_slices(table) == {
        "looked_at": 2, "judged": 1, "hurt": 0, "worst": "country: fr", "worst_difference": 0.0,
    }  # fmt: skip


def test_a_rule_that_finds_nothing_is_a_slice_of_no_texts() -> None:
    texts = Texts(["a cat", "a dog"] * 6, ["x", "y"] * 6, [4] * 12, {}, ["a cat"])
    labels = numpy.array([0, 1] * 6)
    table = judge_slices(make_groupings(texts, PARAMS), labels, labels, labels, 1, 0.95)
    money = table[table["name"] == "mentions money"].iloc[0]
    assert (money["texts"], bool(money["judged"])) == (0, False)


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (0, 3), (3, 0), (5, 5), (9, 2), (40, 21)])
def test_the_test_is_the_exact_one(lost: int, gained: int) -> None:
    labels = numpy.zeros(100, dtype=int)
    variant = numpy.array([1] * lost + [0] * (100 - lost))
    reference = numpy.array([0] * lost + [1] * gained + [0] * (100 - lost - gained))
    found = judge_slices([grouping(["de"] * 100)], variant, reference, labels, 10, 0.95).iloc[0]["p"]
    exact = binomtest(lost, lost + gained, 0.5, alternative="greater").pvalue if lost + gained else 1.0
    assert found == pytest.approx(exact, abs=1e-12)


def test_the_paired_interval_covers_what_is_true() -> None:
    generator, covered = numpy.random.default_rng(1), 0
    for lost, gained, _ in generator.multinomial(60, [0.08, 0.03, 0.89], size=1000):
        low, high = paired_interval(int(lost), int(gained), 60, 0.95)
        covered += low <= -0.05 <= high
    assert 930 <= covered <= 985


def test_texts_fall_into_columns_rules_labels_lengths_and_rarities() -> None:
    ages = [str(number) for number in range(60)]
    cities = [f"city {number % 12}" if number % 4 else "rome" for number in range(60)]
    groupings = make_groupings(texts_of(60, age=ages, city=cities, device=["a", ""] * 30), PARAMS)
    by_name = {each.name: each for each in groupings}
    assert list(by_name) == ["age", "city", "device", "mentions money", "label", "length", "rarity"]
    assert by_name["age"].shown == ("0 to 29", "30 to 59")
    assert by_name["city"].shown[0] == "rome"
    assert by_name["city"].shown[-1] == "others"
    assert len(by_name["city"].shown) == 4
    assert by_name["device"].shown == ("a", "missing")
    assert set(by_name["mentions money"].groups) == {"matches", "others"}
    assert by_name["mentions money"].shown == ("matches",)
    assert by_name["length"].shown[0].endswith("tokens")
    assert by_name["rarity"].shown == ("1 of 2, rarest words", "2 of 2, commonest words")


def test_texts_of_equal_length_are_one_group() -> None:
    texts = Texts(["a b"] * 12, ["x", "y"] * 6, [4] * 12, {}, ["a"])
    assert of(make_groupings(texts, PARAMS), "length").shown == ("4 tokens",)


def test_rarity_is_the_mean_log_frequency_among_training_texts() -> None:
    # a: 3 of 4 words, b: 1; one added to each count and one for the unseen: 4/7, 2/7, 1/7.
    found = log_frequencies(["a", "A b!", "new", ""], ["a b", "a a"])
    expected = [math.log(4 / 7), (math.log(4 / 7) + math.log(2 / 7)) / 2, math.log(1 / 7), math.log(1 / 7)]
    assert found == pytest.approx(expected)


def simulated(count: int = 900) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray, Grouping]:
    """Labels, answers of a variant and of the reference, and three groups; the variant is worse in the first."""
    generator = numpy.random.default_rng(5)
    groups = generator.integers(0, 3, count)
    labels = generator.integers(0, 3, count)
    reference = numpy.where(generator.random(count) < 0.1, (labels + 1) % 3, labels)
    variant = numpy.where((groups == 0) & (generator.random(count) < 0.3), 2, reference)
    return labels, variant, reference, grouping([f"g{number}" for number in groups])


def test_rates_and_gaps_agree_with_fairlearn() -> None:
    labels, variant, reference, groups = simulated()
    found = measure_fairness([groups], variant, reference, labels, 3, 10, 50, 0.95, seed=1)["column country"]
    names = groups.groups.astype(str)
    accuracy = MetricFrame(
        metrics=lambda y_true, y_pred: float((y_true == y_pred).mean()),
        y_true=labels, y_pred=variant, sensitive_features=names,
    )  # fmt: skip
    assert found["accuracy"]["value"] == pytest.approx(accuracy.difference(), abs=1e-12)
    for name, function in (
        ("demographic_parity", demographic_parity_difference),
        ("equalized_odds", equalized_odds_difference),
    ):
        for key, answers in (("value", variant), ("reference", reference)):
            gaps = [
                function((labels == label).astype(int), (answers == label).astype(int), sensitive_features=names)
                for label in range(3)
            ]
            assert found[name][key] == pytest.approx(max(gaps), abs=1e-12)


def test_a_group_made_worse_widens_the_gaps() -> None:
    labels, variant, reference, groups = simulated()
    found = measure_fairness([groups], variant, reference, labels, 3, 10, 400, 0.95, seed=1)["column country"]
    assert found["groups"] == 3
    for name in GAPS:
        gap = found[name]
        assert gap["low"] <= gap["value"] <= gap["high"]
        assert gap["change"] == pytest.approx(gap["value"] - gap["reference"])
        assert gap["change_low"] > 0.05
    same = measure_fairness([groups], reference, reference, labels, 3, 10, 50, 0.95, seed=1)["column country"]
    assert all((same[name]["change_low"], same[name]["change_high"]) == (0.0, 0.0) for name in GAPS)


def test_resampled_rates_are_centred_on_the_rates_of_fairlearn() -> None:
    labels, variant, reference, groups = simulated()
    codes = numpy.unique(groups.groups.astype(str), return_inverse=True)[1]
    drawn = _resample(codes, variant, reference, labels, 3, 3, 2000, seed=2)[0]
    rates = rates_by_group(codes, variant, labels, 3)
    for name in ("accuracy", "selection", "true_positive", "false_positive"):
        assert getattr(drawn, name).mean(axis=0) == pytest.approx(getattr(rates, name), abs=0.005)
    # The spread of a share p over n texts is sqrt(p (1 - p) / n).
    share, size = rates.selection[0, 0], (codes == 0).sum()
    assert drawn.selection[:, 0, 0].std() == pytest.approx(math.sqrt(share * (1 - share) / size), rel=0.1)
    frame = MetricFrame(
        metrics=selection_rate, y_true=labels == 0, y_pred=(variant == 0).astype(int), sensitive_features=codes
    )
    assert rates.selection[:, 0] == pytest.approx(frame.by_group.to_numpy())


def test_groups_too_small_to_judge_open_no_gap() -> None:
    labels, variant, reference, _ = simulated()
    few = grouping(["tiny"] * 9 + ["most"] * (len(labels) - 9))
    assert measure_fairness([few], variant, reference, labels, 3, 10, 50, 0.95, seed=1) == {}


def test_where_every_slice_is_small_none_is_the_worst() -> None:
    labels = numpy.zeros(24, dtype=int)
    table = judge_slices([grouping(["NA"] * 12 + ["01"] * 12)], labels, labels, labels, 20, 0.95)
    assert table["p_holm"].isna().all()
    assert summarize_slices(table)["worst"] is None
