"""`python -m flows.registry`, the stage `register`: the final model into the MLflow registry.

Goes in: the exported model, its evaluation, the verdict of the deployment check, the report. Comes out: a version of
the registered model in MLflow's ONNX flavor, with signature, input example, tokenizer and model card, and an alias.
`champion` goes to a model that passed the deployment check, meets the quality floor, and is as good and as fast as the
champion it takes the place of, measured on the same test split; any other model is the `challenger`, with the reason.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flows.environment import prepare
from flows.graph import read_fingerprints
from flows.tracking import record_fingerprints, send_fingerprints
from stages.core.artifacts import digest, read_json
from stages.core.champions import digest_of_test_split
from stages.core.choice import RUNTIME_FILE
from stages.core.errors import UserError
from stages.core.observe.tracking import mirror, open_client, tracking_uri
from stages.core.stage import METRICS, StageRun, command

Alias = Literal["champion", "challenger"]
CHAMPION: Alias = "champion"
CHALLENGER: Alias = "challenger"
REASON = "headroom.reason"
ALIAS = "headroom.alias"
"""Tag of a version: the alias it took when it was registered, which another may have taken since."""
MODEL = "headroom.model"
"""Tag of a version: digest of the exported model."""
TEXTS_PER_SECOND = "headroom.texts_per_second"
MACHINE = "headroom.machine"
"""Tag of a version: the processor that its speed was measured on."""
MODEL_CARD = "model_card.md"

_DETAILS = "details.json"  # of the deployment check
_SPEED_KEPT = 0.95  # throughput over the fair baseline wobbles by a few percent between runs
_EXAMPLE_SHAPE = (1, 8)
_LARGEST_IN_ONE_FILE = 2**31  # a protobuf message ends there

_TAGS = {
    "metric": "headroom.metric",
    "quality": "headroom.quality",
    "speedup": "headroom.speedup_over_fair",
    "test_split": "headroom.test_split",
}


@dataclass(frozen=True)
class Contender:
    """What decides between two models."""

    metric: str
    """Which quality counts, such as accuracy."""
    quality: float
    speedup: float
    """Throughput over that of the fair PyTorch baseline, timed in the same run."""
    test_split: str
    """Sum of the texts and labels that `quality` was measured on."""

    def tags(self) -> dict[str, str]:
        """Return the tags that keep these values on a model version."""
        return {tag: str(getattr(self, name)) for name, tag in _TAGS.items()}

    @classmethod
    def from_tags(cls, tags: Mapping[str, str]) -> Contender:
        """Read the values back; a version that was not registered by this stage has no test split to compare on."""
        values = {name: tags.get(tag, "nan") for name, tag in _TAGS.items()}
        return cls(values["metric"], float(values["quality"]), float(values["speedup"]), values["test_split"])


@dataclass(frozen=True)
class Decision:
    """Which alias a model takes, and why."""

    alias: Alias
    reason: str


def decide(
    contender: Contender, champion: Contender | None, floor: float, passed: bool, within_floor: bool
) -> Decision:
    """Decide between a model and the champion.

    Args:
        contender: the model.
        champion: None where there is none yet.
        floor: quality that may be lost, such as 0.01.
        passed: whether the deployment check passed.
        within_floor: whether the model scores at most `floor` below the fine-tuned one.
    """
    if not passed:
        return Decision(CHALLENGER, "the deployment check did not pass")
    if not within_floor:
        return Decision(CHALLENGER, f"it scores more than {floor:g} below the fine-tuned model")
    if champion is None:
        return Decision(CHAMPION, "it passed the deployment check and meets the quality floor; the first champion")
    if champion.test_split != contender.test_split:
        return Decision(CHALLENGER, "the champion was not measured on this test split; move the alias by hand to go on")
    if champion.metric != contender.metric:
        return Decision(CHALLENGER, f"the champion was judged by {champion.metric}, this model by {contender.metric}")
    return _compare(contender, champion, floor)


def _compare(contender: Contender, champion: Contender, floor: float) -> Decision:
    quality = f"{contender.metric} {contender.quality:.4f} against the champion's {champion.quality:.4f}"
    speed = f"{contender.speedup:.2f} times the fair baseline against the champion's {champion.speedup:.2f}"
    if contender.quality < champion.quality - floor:
        return Decision(CHALLENGER, f"{quality}, more than {floor:g} lower")
    if contender.speedup < _SPEED_KEPT * champion.speedup:
        return Decision(CHALLENGER, f"{speed}, slower by more than {1 - _SPEED_KEPT:.0%}")
    return Decision(CHAMPION, f"{quality}, {speed}")


def run_register(run: StageRun) -> dict[str, Any]:
    """Register the model; the body of the stage.

    Raises:
        UserError: if MLflow cannot be reached, or an input lacks a value.
    """
    contender, passed, within_floor = _read_contender(run)
    uri = tracking_uri(run.params)
    client = connect(uri)
    from mlflow.exceptions import MlflowException

    try:
        run_id = mirror(run.record.folder, client, uri)
        champion = _champion(client, run.params.tracking.model_name)
        decision = decide(contender, champion, run.params.quality.floor, passed, within_floor)
        version = _register(run, client, run_id, contender, decision)
        record_fingerprints(run.record.folder.parent.name, read_fingerprints())
        send_fingerprints(client, uri)
    except (MlflowException, OSError) as problem:
        raise _unreachable(problem) from None
    name = run.params.tracking.model_name
    run.say(f"{name} version {version} is the {decision.alias}: {decision.reason}")
    return {"model": name, "version": version, "alias": decision.alias, "reason": decision.reason}


def save_onnx_model(model: Path, folder: Path) -> None:
    """Write an exported model as an MLflow model, ONNX flavor, with signature, input example and tokenizer.

    Args:
        model: unit of the export stage.
        folder: to create.
    """
    import mlflow.onnx
    import numpy
    import onnx
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    about = read_json(model / "headroom.json")
    integers, floats = numpy.dtype("int64"), numpy.dtype("float32")
    signature = ModelSignature(
        inputs=Schema([TensorSpec(integers, (-1, -1), name) for name in about["inputs"]]),
        outputs=Schema([TensorSpec(floats, (-1, len(about["labels"])), about["output"])]),
    )
    graph = onnx.load(model / "model.onnx")
    mlflow.onnx.save_model(
        graph,
        folder,
        signature=signature,
        input_example={name: numpy.ones(_EXAMPLE_SHAPE, integers) for name in about["inputs"]},
        pip_requirements=[_requirement(name) for name in ("mlflow", "onnx", "onnxruntime", "tokenizers")],
        onnx_execution_providers=["CPUExecutionProvider"],
        metadata={"labels": about["labels"], "maximum_length": about["maximum_length"]},
        save_as_external_data=graph.ByteSize() >= _LARGEST_IN_ONE_FILE,
        extra_files=[str(path) for path in sorted(model.iterdir()) if not path.name.startswith("model.onnx")],
    )


def _read_contender(run: StageRun) -> tuple[Contender, bool, bool]:
    evaluation = read_json(run.inputs["evaluation"] / METRICS)
    verdict = read_json(run.inputs["deploy_check"] / METRICS)
    metric = run.params.quality.metric
    try:
        contender = Contender(
            metric=metric,
            quality=float(evaluation["quality"][metric]),
            speedup=float(evaluation["speedup"]["throughput_over_fair"]["median"]),
            test_split=digest_of_test_split(run.inputs["evaluation"] / "predictions.parquet"),
        )
        return contender, verdict["verdict"] == "passed", bool(evaluation["against_reference"]["within_floor"])
    except KeyError as missing:
        raise UserError(
            f"{run.inputs['evaluation']}, {run.inputs['deploy_check']}: {METRICS} has no {missing}; "
            "run `headroom run --force --stage deploy_check`"
        ) from None


def connect(uri: str) -> Any:
    """Open a client and make sure that the store answers.

    Raises:
        UserError: if it does not.
    """
    prepare()
    try:
        client = open_client(uri)
        client.search_experiments(max_results=1)
    except Exception as problem:  # noqa: BLE001  each store raises its own; whatever it is, the registry is out of reach
        raise _unreachable(problem) from None
    return client


def _unreachable(problem: BaseException) -> UserError:
    """Say in one line that MLflow is away."""
    reason = " ".join(str(problem).split())[:200]
    return UserError(f"MLflow cannot be reached ({reason}); when it can, run again: only this stage will run")


def _champion(client: Any, name: str) -> Contender | None:
    """Values of the current champion; None where there is none yet."""
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name, description="Registered by the stage `register` of Headroom.")
        return None
    aliases = client.get_registered_model(name).aliases
    if CHAMPION not in aliases:
        return None
    return Contender.from_tags(client.get_model_version(name, aliases[CHAMPION]).tags)


def _register(run: StageRun, client: Any, run_id: str, contender: Contender, decision: Decision) -> int:
    """Store the model with the stage's run, make a version of it, then give it its alias."""
    name = run.params.tracking.model_name
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "model")
        save_onnx_model(run.inputs["model"], folder)
        choice = run.inputs["evaluation"] / RUNTIME_FILE
        card = run.inputs["report"] / MODEL_CARD
        for beside in (choice, card):
            if beside.exists():
                shutil.copyfile(beside, folder / "extra_files" / beside.name)
        client.log_artifacts(run_id, str(folder), "model")
    tags = {**contender.tags(), **_measured(run), REASON: decision.reason, ALIAS: decision.alias}
    tags[MODEL] = digest(run.inputs["model"])
    source = f"{client.get_run(run_id).info.artifact_uri}/model"
    version = client.create_model_version(name, source, run_id, tags=tags, description=decision.reason)
    client.set_registered_model_alias(name, decision.alias, version.version)
    return int(version.version)


def _measured(run: StageRun) -> dict[str, str]:
    """Tags of the speed and of the machine it was measured on."""
    evaluation = read_json(run.inputs["evaluation"] / METRICS)
    machine = read_json(run.inputs["deploy_check"] / _DETAILS)["inventory"]
    return {TEXTS_PER_SECOND: str(evaluation["best"]["texts_per_second"]), MACHINE: machine["cpu"]["model"]}


def _requirement(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    for name in (package, f"{package}-gpu"):
        try:
            return f"{name}=={version(name)}"
        except PackageNotFoundError:
            continue
    return package


if __name__ == "__main__":
    command("register", run_register, inputs=("model", "evaluation", "deploy_check", "report"))
