from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from stages.core.errors import UserError
from stages.core.params import LabelBin, Params, load_params, parse_params

REPOSITORY = Path(__file__).parents[3]
DEFAULT = yaml.safe_load((REPOSITORY / "params.yaml").read_text())


def changed(path: str, value: object) -> dict[str, Any]:
    """The default params with one value replaced or added."""
    raw = copy.deepcopy(DEFAULT)
    *parents, last = path.split(".")
    inner = raw
    for name in parents:
        inner = inner[int(name)] if isinstance(inner, list) else inner[name]
    inner[last] = value
    return raw


def without(path: str) -> dict[str, Any]:
    raw = copy.deepcopy(DEFAULT)
    *parents, last = path.split(".")
    inner = raw
    for name in parents:
        inner = inner[name]
    del inner[last]
    return raw


def complaint(raw: object) -> str:
    with pytest.raises(UserError) as caught:
        parse_params(raw, "params.yaml")
    return str(caught.value)


def every_path(value: Any, prefix: str = "") -> list[str]:
    if not isinstance(value, dict):
        return [prefix]
    return [path for name, child in value.items() for path in every_path(child, f"{prefix}.{name}" if prefix else name)]


def test_the_default_file_and_every_preset_are_valid() -> None:
    files = [REPOSITORY / "params.yaml", *sorted((REPOSITORY / "presets").glob("*.yaml"))]
    for path in files:
        assert load_params(path).task.kind == "text-classification"


@pytest.mark.parametrize("path", every_path(DEFAULT))
def test_nothing_has_a_default_every_value_must_be_written(path: str) -> None:
    assert f"params.yaml: {path}: missing" in complaint(without(path))


@pytest.mark.parametrize("section", ["", *(name for name, value in DEFAULT.items() if isinstance(value, dict))])
def test_an_unknown_name_is_refused_in_every_section(section: str) -> None:
    prefix = f"{section}." if section else ""
    assert f"params.yaml: {prefix}zzz: unknown name; " in complaint(changed(f"{prefix}zzz", 1))


def test_all_mistakes_are_reported_together_a_line_each() -> None:
    raw = changed("quality.metric", "acuracy")
    raw["seed"] = "seventeen"
    raw["finetune"]["epoch"] = raw["finetune"].pop("epochs")
    raw["clean"]["near_duplicates"]["treshold"] = 1
    raw["evaluate"]["latency"]["rounds"] = 1
    lines = complaint(raw).splitlines()
    assert all(line.startswith("params.yaml: ") for line in lines)
    text = "\n".join(lines)
    for part in (
        "seed: Input should be a valid integer, got 'seventeen'",
        "quality.metric: got 'acuracy'; did you mean accuracy?",
        "finetune.epochs: missing",
        "finetune.epoch: unknown name; did you mean epochs?",
        "clean.near_duplicates.treshold: unknown name; did you mean threshold?",
        "evaluate.latency.rounds: Input should be greater than or equal to 2, got 1",
    ):
        assert part in text
    assert len(lines) == 6


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("acquire.data.source.packge", "x", "acquire.data.source.packge: unknown name; did you mean package?"),
        ("acquire.corpus.0.source.memebr", "x", "acquire.corpus[0].source.memebr: unknown name; did you mean member?"),
        ("acquire.corpus.1.source.kind", "weel", "acquire.corpus[1].source.kind: got 'weel'; did you mean wheel?"),
        ("acquire.data.format", "cvs", "acquire.data.format: got 'cvs'; did you mean csv?"),
        ("prune.saliency", "second", "prune.saliency: got 'second'; did you mean second_order?"),
        ("finetune.optimizer.learning_rat", 1.0, "finetune.optimizer.learning_rat: unknown name; did you mean lear"),
        ("distill.student.layer", [0], "distill.student.layer: unknown name; did you mean layers?"),
        ("trakcing", {}, "trakcing: unknown name; did you mean tracking?"),
    ],
)
def test_the_nearest_valid_name_is_offered_at_the_place_the_file_has_it(path: str, value: object, message: str) -> None:
    assert f"params.yaml: {message}" in complaint(changed(path, value))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("clean.minimum_characters", 5000, "clean: minimum_characters must not exceed maximum_characters"),
        ("distill.student.layers", [2, 0], "distill.student: layers must ascend, each once"),
        ("distill.student.layers", [0, 0], "distill.student: layers must ascend, each once"),
        ("distill.student.layers", [], "distill.student.layers: List should have at least 1 item"),
        ("distill.student", {"kind": "narow"}, "distill.student.kind: got 'narow'; did you mean narrow?"),
        (
            "distill.student",
            {"kind": "narrow", "layers": 2, "hidden": 100, "heads": 12, "neurons": 400},
            "distill.student: hidden 100 must be a multiple of heads 12",
        ),
        ("distill.weights", dict.fromkeys(DEFAULT["distill"]["weights"], 0.0), "soft and hard must not both be 0"),
        ("quantize.recipes", ["bf16", "bf16"], "quantize: recipes must each be named once"),
        ("quantize.smoothing.strengths", [0.5], "quantize.smoothing: strengths must hold 0.0"),
        ("tokenize.tokenizer", {"kind": "bpe", "vocabulary_size": 999, "lowercase": True}, "trains a new vocabulary"),
        ("acquire.checkpoint", {"kind": "scratch", "config": {}}, "scratch has no tokenizer"),
        (
            "acquire.data.slice_columns",
            ["label"],
            "acquire.data: slice_columns: 'label' is a name of the pipeline's own",
        ),
        ("acquire.data.slice_columns", ["a", "a"], "acquire.data: slice_columns must each be named once"),
        (
            "evaluate.slices.rules",
            [{"name": "money", "pattern": "(dollar"}],
            "evaluate.slices.rules[0]: money: pattern '(dollar' is no regular expression: missing ), "
            "unterminated subpattern",
        ),
        ("distill.transfer.pattern", "(what", "distill.transfer: pattern is no regular expression: missing ), "),
        (
            "evaluate.slices.rules",
            [{"name": "money", "pattern": "dollar"}] * 2,
            "evaluate.slices: rules must each have a name of their own",
        ),
    ],
)
def test_values_must_fit_each_other(path: str, value: object, message: str) -> None:
    assert message in complaint(changed(path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("seed", -1),
        ("seed", 1.5),
        ("seed", True),
        ("clean.fix_unicode", "yes"),
        ("quality.floor", 1.2),
        ("quality.floor", float("nan")),
        ("acquire.splits.test", 0.0),
        ("acquire.splits.test", 0.5),
        ("acquire.data.source.sha256", "0" * 63),
        ("acquire.data.source.version", ">=0.5"),
        ("finetune.optimizer.learning_rate", 0.0),
        ("prune.sparsity.heads", 1.0),
        ("prune.sparse", {"method": "wanda", "pattern": {"kind": "n_of_m", "n": 4, "m": 4}}),
        ("prune.vocabulary.minimum_count", 0),
        ("quantize.activations.percentile", 50.0),
        ("evaluate.latency.batch_sizes", []),
        ("evaluate.latency.batch_sizes", [8, 0]),
        ("evaluate.confidence", 95),
        ("distill.student.layers", "012"),
        ("distill.teachers", "somewhere"),
        ("distill.relations.heads", 0),
        ("distill.transfer.augmentation.mask_probability", 0.0),
    ],
)
def test_values_out_of_range_or_of_another_type_are_refused(path: str, value: object) -> None:
    assert f"params.yaml: {path}" in complaint(changed(path, value))


@pytest.mark.parametrize(("written", "right"), [("1e-4", "1.0e-4"), ("2E5", "2.0e+5"), ("3.5e-3", "3.5e-3")])
def test_numbers_that_yaml_takes_for_text_get_a_hint(written: str, right: str) -> None:
    message = complaint(changed("finetune.optimizer.learning_rate", written))
    assert message.endswith(f"finetune.optimizer.learning_rate: {written!r} is text to YAML; write {right}")
    assert isinstance(yaml.safe_load(right), float)


def test_whole_numbers_are_fine_where_decimals_are_expected() -> None:
    assert parse_params(changed("distill.temperature", 3), "here").distill.temperature == 3.0


def test_a_trained_tokenizer_goes_with_a_model_from_scratch() -> None:
    raw = changed("acquire.checkpoint", {"kind": "scratch", "config": {"model_type": "bert", "hidden_size": 64}})
    raw["tokenize"]["tokenizer"] = {"kind": "wordpiece", "vocabulary_size": 1000, "lowercase": True}
    assert parse_params(raw, "params.yaml").tokenize.tokenizer.kind == "wordpiece"


def test_params_cannot_be_changed_after_reading() -> None:
    params = parse_params(DEFAULT, "params.yaml")
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        params.finetune.optimizer.batch_size = 1  # type: ignore[misc]


def test_params_survive_the_way_through_json() -> None:
    params = parse_params(DEFAULT, "params.yaml")
    assert Params.model_validate_json(params.model_dump_json()) == params


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file; run in the project's folder"),
        (b"", "is not a mapping of sections"),
        (b"- seed\n", "is not a mapping of sections"),
        (b"seed: [1\n", "is not valid YAML"),
        (b"seed: \xff\xfe\n", "is not valid YAML"),
        (b"!!python/object/apply:os.getcwd []\n", "is not valid YAML"),
    ],
)
def test_an_unreadable_file_is_one_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "params.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_params(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


@given(st.floats(-10, 10), st.none() | st.floats(-10, 10), st.none() | st.floats(-10, 10))
def test_a_bin_holds_its_ends_and_what_lies_between(score: float, low: float | None, high: float | None) -> None:
    bin_ = LabelBin(label="x", minimum=low, maximum=high)
    inside = (low is None or low <= score) and (high is None or score <= high)
    assert bin_.holds(score) is inside


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    )
)
def test_rubbish_never_raises_anything_but_a_user_error(rubbish: object) -> None:
    for raw in (rubbish, {**DEFAULT, "acquire": rubbish}, {**DEFAULT, "tokenize": {"tokenizer": rubbish}}):
        with pytest.raises(UserError):
            parse_params(raw, "params.yaml")


EDITS = {"copies": 1, "synonyms": 0.1, "insertions": 0.0, "swaps": 0.0, "deletions": 0.0}


def test_ways_to_finetune_that_cannot_work_are_refused() -> None:
    raw = changed("finetune.mixup", 0.4)
    raw["finetune"]["adversarial"] = {"kind": "freelb", "steps": 3, "step_size": 0.1, "epsilon": 0.6}
    assert "finetune: mixup and adversarial.kind freelb both move the embeddings" in complaint(raw)
    nothing = {**EDITS, "synonyms": 0.0}
    assert "write null for no edits" in complaint(changed("finetune.augmentation.edits", nothing))
    raw = changed("finetune.augmentation.edits", EDITS)
    parse_params(raw, "params.yaml")
    raw["acquire"]["lexicon"] = None
    raw["robustness"]["perturbations"]["synonyms"] = 0.0
    assert "finetune.augmentation.edits.synonyms needs words that mean the same" in complaint(raw)
    raw["finetune"]["augmentation"]["edits"] = {**nothing, "swaps": 0.1}
    parse_params(raw, "params.yaml")
