import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import onnx
import pandas
import pytest
from onnx import TensorProto, helper, numpy_helper

from flows.history import read_history, run_history
from flows.registry import CHALLENGER, CHAMPION, REASON, Contender, decide, run_register
from flows.tracking import FINGERPRINT
from stages.core.artifacts import write_json, write_manifest
from stages.core.champions import CHAMPIONS, Champion, read_champions
from stages.core.errors import UserError
from stages.core.observe.tracking import open_client, tracking_uri
from stages.core.params import load_params
from stages.core.stage import open_stage

GOOD = Contender("accuracy", 0.96, 8.0, "split")


def make_model(folder: Path, scale: float = 1.0) -> None:
    """A classifier of two labels: sums up a row of a table for each token."""
    table = numpy.linspace(-scale, scale, 20, dtype=numpy.float32).reshape(10, 2)
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["mask3"]),
        helper.make_node("Mul", ["rows", "mask3"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "first"], ["logits"], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["b", "l"])
            for name in ("input_ids", "attention_mask")
        ],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", 2])],
        [
            numpy_helper.from_array(table, "table"),
            numpy_helper.from_array(numpy.array([2]), "last"),
            numpy_helper.from_array(numpy.array([1]), "first"),
        ],
    )
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), folder / "model.onnx"
    )
    (folder / "tokenizer.json").write_text("{}")
    about = {"labels": ["no", "yes"], "inputs": ["input_ids", "attention_mask"], "output": "logits"}
    write_json(folder / "headroom.json", {**about, "maximum_length": 16, "task": "text-classification"})
    write_manifest(folder)


def make_inputs(
    folder: Path, quality: float = 0.96, speedup: float = 8.0, verdict: str = "passed", text: str = "why?"
) -> dict[str, Path]:
    inputs = {role: folder / role for role in ("model", "evaluation", "deploy_check", "report")}
    make_model(inputs["model"], scale=quality)
    evaluation = {
        "quality": {"accuracy": quality},
        "against_reference": {"within_floor": True},
        "speedup": {"throughput_over_fair": {"median": speedup, "low": speedup, "high": speedup}},
        "best": {"texts_per_second": 100.0 * speedup},
    }
    write_json(inputs["evaluation"] / "metrics.json", evaluation)
    predictions = {"text": [text, None], "label": ["no", "yes"], "prediction": ["no", "no"], "score": [0.9, 0.6]}
    pandas.DataFrame(predictions).to_parquet(inputs["evaluation"] / "predictions.parquet")
    write_json(inputs["deploy_check"] / "metrics.json", {"verdict": verdict})
    write_json(inputs["deploy_check"] / "details.json", {"inventory": {"cpu": {"model": "Made-up CPU"}}})
    write_json(inputs["report"] / "metrics.json", {})
    (inputs["report"] / "model_card.md").write_text(f"# Accuracy {quality}")
    for role in ("evaluation", "deploy_check", "report"):
        write_manifest(inputs[role])
    return inputs


def register(folder: Path, **changes: Any) -> dict[str, Any]:
    with open_stage("register", load_params(Path("params.yaml")), make_inputs(folder, **changes), Path("out")) as run:
        metrics = run_register(run)
        write_json(run.staging / "metrics.json", metrics)
        write_manifest(run.staging)
    return metrics


def ask_history(model: Path) -> tuple[list[Champion], dict[str, Any]]:
    with open_stage("history", load_params(Path("params.yaml")), {"model": model}, Path("history")) as run:
        about = run_history(run)
        champions = read_champions(run.staging / CHAMPIONS)
        write_manifest(run.staging)
    return champions, about


@pytest.mark.parametrize(
    ("contender", "champion", "passed", "within", "alias", "reason"),
    [
        (GOOD, None, True, True, CHAMPION, "first champion"),
        (GOOD, None, False, True, CHALLENGER, "deployment check"),
        (GOOD, None, True, False, CHALLENGER, "below the fine-tuned"),
        (GOOD, GOOD, True, True, CHAMPION, "against the champion"),
        (replace(GOOD, quality=0.951), GOOD, True, True, CHAMPION, "0.9510"),
        (replace(GOOD, quality=0.949), GOOD, True, True, CHALLENGER, "more than 0.01 lower"),
        (replace(GOOD, speedup=7.7), GOOD, True, True, CHAMPION, "7.70 times"),
        (replace(GOOD, speedup=7.5), GOOD, True, True, CHALLENGER, "slower by more than 5%"),
        (replace(GOOD, quality=0.99, test_split="other"), GOOD, True, True, CHALLENGER, "test split"),
        (replace(GOOD, metric="f1_macro"), GOOD, True, True, CHALLENGER, "judged by accuracy"),
    ],
)
def test_alias_follows_the_rules(
    contender: Contender, champion: Contender | None, passed: bool, within: bool, alias: str, reason: str
) -> None:
    decision = decide(contender, champion, floor=0.01, passed=passed, within_floor=within)
    assert decision.alias == alias
    assert reason in decision.reason


def test_contender_survives_its_tags() -> None:
    assert Contender.from_tags(GOOD.tags()) == GOOD


def test_a_champion_registered_by_hand_keeps_its_place() -> None:
    decision = decide(GOOD, Contender.from_tags({"owner": "me"}), floor=0.01, passed=True, within_floor=True)
    assert decision.alias == CHALLENGER


def test_registered_model_loads_back_and_aliases_move(tracked: Path) -> None:
    import mlflow

    (tracked / "dvc.lock").write_text("stages:\n  finetune:\n    outs:\n    - path: a\n      md5: abc.dir\n")
    first = register(tracked / "one")
    assert (first["version"], first["alias"]) == (1, CHAMPION)
    worse = register(tracked / "two", quality=0.9)
    assert (worse["version"], worse["alias"]) == (2, CHALLENGER)
    failed = register(tracked / "three", quality=0.99, verdict="failed")
    assert (failed["version"], failed["alias"]) == (3, CHALLENGER)
    elsewhere = register(tracked / "four", quality=0.99, text="who?")
    assert (elsewhere["alias"], "test split" in elsewhere["reason"]) == (CHALLENGER, True)
    better = register(tracked / "five", quality=0.97)
    assert (better["version"], better["alias"]) == (5, CHAMPION)

    params = load_params(Path("params.yaml"))
    uri, name = tracking_uri(params), params.tracking.model_name
    client = open_client(uri)
    aliases = client.get_registered_model(name).aliases
    assert {alias: int(version) for alias, version in aliases.items()} == {"champion": 5, "challenger": 4}
    assert "0.9000" in client.get_model_version(name, "2").tags[REASON]

    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    model = mlflow.pyfunc.load_model(f"models:/{name}@champion")
    signature = model.metadata.signature
    assert signature.inputs.input_names() == ["input_ids", "attention_mask"]
    example = {column: numpy.array([[1, 2, 0]]) for column in signature.inputs.input_names()}
    example["attention_mask"] = numpy.array([[1, 1, 0]])
    table = numpy.linspace(-0.97, 0.97, 20, dtype=numpy.float32).reshape(10, 2)
    assert numpy.allclose(model.predict(example)["logits"], [table[1] + table[2]])
    assert model.metadata.saved_input_example_info
    assert "tokenizer.json" in json.dumps(model.metadata.flavors["onnx"])
    card = mlflow.artifacts.download_artifacts(f"models:/{name}@champion/extra_files/model_card.md")
    assert Path(card).read_text() == "# Accuracy 0.97"

    # Champions in their order; the model that is asked about is left out, and its first day counts for it.
    history = read_history(client, name)
    assert [(champion.version, champion.texts_per_second) for champion in history.values()] == [(1, 800.0), (5, 800.0)]
    assert list(history.values())[1].quality == 0.97
    before, about = ask_history(tracked / "one" / "model")
    assert [champion.version for champion in before] == [5]
    assert about == {"champions": 1, "reached": 1, "day": next(iter(history.values())).day.isoformat()}
    make_model(tracked / "new", scale=0.5)
    before, about = ask_history(tracked / "new")
    assert [champion.version for champion in before] == [1, 5]
    # Registered once more, the same model is no new champion: a second run changes nothing.
    register(tracked / "again", quality=0.97)
    assert {model: champion.version for model, champion in read_history(client, name).items()} == {
        model: champion.version for model, champion in history.items()
    }


def test_fingerprints_reach_the_runs_of_the_execution(tracked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADROOM_EXECUTION", "one")
    params = load_params(Path("params.yaml"))
    (tracked / "dvc.lock").write_text("stages:\n  prune:\n    outs:\n    - path: a\n      md5: abc.dir\n")
    with open_stage("prune", params, {}, tracked / "artifacts" / "prune") as run:
        write_manifest(run.staging)
    register(tracked / "one")
    client = open_client(tracking_uri(params))
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    tagged = client.search_runs(experiments, f"tags.`{FINGERPRINT}` = 'abc.dir'")
    assert [run.info.run_name for run in tagged] == ["prune"]


def test_unreachable_registry_is_one_line(tracked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match="only this stage will run") as caught:
        register(tracked / "one")
    assert "\n" not in str(caught.value)


def test_a_history_out_of_reach_is_empty_and_says_so(
    tracked: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    make_model(tracked / "model")
    champions, about = ask_history(tracked / "model")
    assert (champions, about["champions"], about["reached"]) == ([], 0, 0)
    assert "goes without a history" in capfd.readouterr().err


def test_a_registry_without_the_model_has_no_history(tracked: Path) -> None:
    assert read_history(open_client(tracking_uri(load_params(Path("params.yaml")))), "unheard of") == {}
