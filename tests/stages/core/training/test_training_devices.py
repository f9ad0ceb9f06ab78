"""Training on several devices, tried with two processes on the CPU: it must end where one process ends."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
import yaml
from devices_worker import Problem, run_case
from pydantic import ValidationError
from safetensors.torch import load_file
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from transformers import LlamaConfig, LlamaForCausalLM

from stages.core.artifacts import verify, write_manifest
from stages.core.errors import UserError
from stages.core.launch import check_processes, processes_here
from stages.core.params import ParallelAxis, ParallelParams, Params, load_params
from stages.core.stage import _state_key, _to_launch, command
from stages.core.structure import encoder_layers, keep_parts
from stages.core.training.devices import check_recipe
from stages.core.training.pipeline_parallel import check_pipeline, layer_owner
from stages.core.training.tensor_parallel import tensor_plan
from stages.finetune.__main__ import run_finetune

REPOSITORY = Path(__file__).parents[4]
WORKER = Path(__file__).with_name("devices_worker.py")
KINDS: tuple[ParallelAxis, ...] = ("data", "shards", "tensor", "pipeline")
TWO_COPIES = {"data": 2, "shards": 1, "tensor": 1, "pipeline": 1}
TWO = [f"{problem}-{kind}" for problem in ("classify", "language") for kind in KINDS]
MORE = [f"language-{kind}-{what}" for kind in KINDS for what in ("again", "left-stopped")]
PARTS = [f"language-{kind}-parts" for kind in KINDS]


SECONDS = 240


def begin(*command: str, folder: Path, **environment: str) -> subprocess.Popen[str]:
    """Start a command the way a user would, with the code of this repository."""
    threads = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "HEADROOM_EXECUTION": "test"}
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, **threads, "MLFLOW_TRACKING_URI": "http://127.0.0.1:9", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Wait until a command has done what it should; return what it said."""
    try:
        _, said = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    assert process.returncode == 0, said[-3000:]
    return said


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process finds, and in `state` what another left when it was stopped half way."""
    out = tmp_path_factory.mktemp("one")
    results = {name: run_case(out, name) for name in ("classify-one", "language-one")}
    stopped = run_case(out / "stopped", "language-one-stopped")
    assert stopped == {"stopped": True}
    return {**results, "state": out / "stopped" / "state" / "language-one"}


@pytest.fixture(scope="module")
def together(one_process: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes wrote what they found; they are started once, as starting takes longest."""
    out = tmp_path_factory.mktemp("two")
    for kind in KINDS:
        shutil.copytree(one_process["state"], out / "state" / f"language-{kind}-again")
    finish(
        begin(
            "-m", "torch.distributed.run", "--nproc-per-node=2", str(WORKER), str(out), *TWO, *MORE, *PARTS, folder=out
        )
    )
    return out


@pytest.fixture(scope="module")
def two_processes(together: Path) -> list[dict[str, Any]]:
    """What each of the two processes has to say of all cases."""
    return [json.loads((together / f"process{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", [*TWO, *PARTS])
def test_two_processes_give_the_curve_of_one(
    case: str, two_processes: list[dict[str, Any]], one_process: dict[str, Any]
) -> None:
    wanted = one_process[case.split("-")[0] + "-one"]
    for found in (results[case] for results in two_processes):
        assert found["train_loss"] == pytest.approx(wanted["train_loss"], abs=1e-5)
        assert found["validation_loss"] == pytest.approx(wanted["validation_loss"], abs=1e-5)
        assert found["weights"] == pytest.approx(wanted["weights"], abs=1e-4)
        assert found["plain"]


@pytest.mark.parametrize("problem", ["classify", "language"])
@pytest.mark.parametrize(("kind", "process"), [("tensor", 0), ("tensor", 1), ("pipeline", 1)])
def test_a_cut_model_gives_the_same_logits(
    problem: str, kind: str, process: int, two_processes: list[dict[str, Any]], one_process: dict[str, Any]
) -> None:
    found = torch.tensor(two_processes[process][f"{problem}-{kind}"]["logits"])
    assert torch.allclose(found, torch.tensor(one_process[f"{problem}-one"]["logits"]), atol=1e-5, rtol=0.0)


def test_only_the_last_process_of_a_pipeline_sees_logits(two_processes: list[dict[str, Any]]) -> None:
    assert two_processes[0]["classify-pipeline"]["logits"] == []


def test_a_replica_learns_from_its_share_of_the_rows(two_processes: list[dict[str, Any]]) -> None:
    first, second = (results["classify-data"]["logits"][:4] for results in two_processes)
    assert first != second


@pytest.mark.parametrize("kind", KINDS)
def test_what_one_process_saved_goes_on_in_two(
    kind: str, two_processes: list[dict[str, Any]], one_process: dict[str, Any]
) -> None:
    for found in (results[f"language-{kind}-again"] for results in two_processes):
        _assert_whole(found, one_process)
        assert f"saved by one process and goes on with {kind} 2" in found["said"][1]


@pytest.mark.parametrize("kind", KINDS)
def test_what_two_processes_saved_goes_on_in_one(
    kind: str, together: Path, two_processes: list[dict[str, Any]], one_process: dict[str, Any], tmp_path: Path
) -> None:
    """Only one of the two was interrupted, and both stopped."""
    assert [results[f"language-{kind}-left-stopped"] for results in two_processes] == 2 * [{"stopped": True}]
    shutil.copytree(together / "state" / f"language-{kind}-left", tmp_path / "state" / "language-one")
    found = run_case(tmp_path, "language-one")
    _assert_whole(found, one_process)
    assert f"saved by {kind} 2 and goes on with one process" in found["said"][1]


def _assert_whole(found: dict[str, Any], one_process: dict[str, Any]) -> None:
    """The curve and the weights are those of an unbroken run, which they are not without the optimizer's state."""
    wanted = one_process["language-one"]
    assert found["train_loss"] == pytest.approx(wanted["train_loss"], abs=1e-5)
    assert found["weights"] == pytest.approx(wanted["weights"], abs=1e-4)


@pytest.fixture
def project(tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path) -> Path:
    """A project folder with the inputs of the finetune stage; the model has no dropout."""
    for source, name in ((tiny_checkpoint, "checkpoint"), (tiny_data, "data")):
        shutil.copytree(source, tmp_path / name)
    config = tmp_path / "checkpoint" / "config.json"
    values = json.loads(config.read_text()) | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config.write_text(json.dumps(values))
    (tmp_path / "checkpoint" / "manifest.json").unlink()
    write_manifest(tmp_path / "checkpoint")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    pandas.DataFrame({"text": ["where is the town ?"]}).to_parquet(corpus / "corpus.parquet")
    write_manifest(corpus)
    return tmp_path


OPTIONS = ["--model", "checkpoint", "--data", "data", "--corpus", "corpus", "--out"]


def write_params(project: Path, parallel: dict[str, int] | None) -> None:
    params = yaml.safe_load((REPOSITORY / "presets" / "tiny.yaml").read_text())
    params["training"]["parallel"] = parallel
    params["finetune"]["epochs"] = 2
    params["finetune"]["optimizer"]["precision"] = "fp32"
    (project / "params.yaml").write_text(yaml.safe_dump(params))


def finetune_here(project: Path, out: str, monkeypatch: pytest.MonkeyPatch, **environment: str) -> int:
    """Run the stage in this process, which the environment may say is one of several."""
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "argv", ["stages.finetune", *OPTIONS, out])
    for name, value in {
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
        "HEADROOM_EXECUTION": "test",
        **environment,
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        command("finetune", run_finetune, ("model", "data", "corpus"), parallel=KINDS)
    return int(ended.value.code or 0)


def test_the_stage_starts_what_params_ask_for(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_params(project, None)
    assert finetune_here(project, "alone", monkeypatch) == 0
    write_params(project, TWO_COPIES)
    said = finish(begin("-m", "stages.finetune", *OPTIONS, "together", folder=project))
    assert len([line for line in said.splitlines() if line.startswith("finetune: ")]) == 3, said
    _assert_same_training(project / "alone", project / "together")
    assert list((project / "artifacts" / ".state" / "staging").iterdir()) == []
    assert len(list((project / "artifacts" / ".runs").rglob("run.json"))) == 2


def _assert_same_training(alone: Path, together: Path) -> None:
    verify(together)
    one, two = (pandas.read_csv(out / "history.csv") for out in (alone, together))
    pandas.testing.assert_frame_equal(one, two, rtol=0.0, atol=1e-4)
    before, after = (load_file(out / "model" / "model.safetensors") for out in (alone, together))
    assert max(float((before[name] - after[name]).abs().max()) for name in before) < 1e-3


def test_two_machines_train_together(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two launchers with folders of their own, which meet as two machines do: by torchrun's variables alone."""
    write_params(project, None)
    assert finetune_here(project, "alone", monkeypatch) == 0
    write_params(project, TWO_COPIES)
    other = tmp_path / "other machine"
    for name in ("checkpoint", "data", "corpus"):
        shutil.copytree(project / name, other / name)
    shutil.copy(project / "params.yaml", other)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    machines = [
        begin(
            *("-m", "stages.finetune", *OPTIONS, "together"),
            folder=folder,
            PET_NNODES="2",
            PET_NODE_RANK=rank,
            PET_MASTER_ADDR="127.0.0.1",
            PET_MASTER_PORT=port,
        )
        for rank, folder in (("0", project), ("1", other))
    ]
    try:
        first, second = map(finish, machines)
    finally:
        for machine in machines:
            machine.kill()
    assert len([line for line in first.splitlines() if line.startswith("finetune: ")]) == 3, first
    assert "finetune: " not in second
    assert not (other / "together").exists()
    _assert_same_training(project / "alone", project / "together")


@pytest.mark.parametrize(("rank", "said"), [("0", 1), ("1", 0)])
def test_a_mistake_is_told_once_a_machine(
    rank: str, said: int, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_params(project, TWO_COPIES)
    (project / "data" / "labels.json").write_text("[]")  # the sums of the manifest no longer hold
    assert finetune_here(project, "out", monkeypatch, WORLD_SIZE="2", RANK=rank, LOCAL_RANK=rank) == 2
    assert len(capsys.readouterr().err.splitlines()) == said


def sizes(**changes: int) -> ParallelParams:
    return ParallelParams(**{"data": 1, "shards": 1, "tensor": 1, "pipeline": 1} | changes)


def test_processes_must_be_as_many_as_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match=r"3 processes were started where data 2 x .* asks for 2; start 2"):
        check_processes(sizes(data=2))
    with pytest.raises(UserError, match="runs in one"):
        check_processes(None)
    check_processes(sizes(data=3))


def test_a_room_is_spread_as_far_as_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    params = load_params(REPOSITORY / "presets" / "tiny.yaml")

    def asking(wanted: ParallelParams | None) -> Params:
        return params.model_copy(update={"training": params.training.model_copy(update={"parallel": wanted})})

    assert _to_launch(params, ("data",)) is None
    assert _to_launch(asking(sizes()), ("data",)) is None
    assert _to_launch(asking(sizes(data=2)), ()) is None  # a room that does not train
    assert _to_launch(asking(sizes(data=2)), ("data", "shards")) == sizes(data=2)
    with pytest.raises(UserError, match=r"training.parallel.tensor: this stage knows data and shards alone"):
        _to_launch(asking(sizes(tensor=2)), ("data", "shards"))


def test_machines_share_the_processes_evenly() -> None:
    assert processes_here(sizes(data=4, tensor=2), "2") == 4
    assert processes_here(sizes(data=4), "1:1") == 4
    with pytest.raises(UserError, match="PET_NNODES: 4 processes .* by 3 machines"):
        processes_here(sizes(data=4), "3")
    with pytest.raises(UserError, match="PET_NNODES"):
        processes_here(sizes(data=4), "1:2")


def test_shards_and_pipeline_do_not_go_together() -> None:
    with pytest.raises(ValidationError, match="shards and pipeline do not go together"):
        sizes(shards=2, pipeline=2)


def test_what_cannot_be_shared_evenly_is_refused() -> None:
    model = Problem("classify").model
    assert len(tensor_plan(model, 2)) == 4 * 6
    with pytest.raises(UserError, match="3 processes cannot share the 4 heads and 32 neurons of layer 0 evenly"):
        tensor_plan(model, 3)
    with pytest.raises(UserError, match="5 processes for 4 layers; take 4 at most"):
        check_pipeline(model, 5)
    keep_parts(encoder_layers(model)[1], torch.arange(3), torch.arange(32))
    with pytest.raises(UserError, match="the 3 heads and 32 neurons of layer 1"):
        tensor_plan(model, 2)


def test_other_families_are_cut_as_transformers_says() -> None:
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    plan = tensor_plan(LlamaForCausalLM(config), 2)
    assert len(plan) == 2 * 7
    assert isinstance(plan["model.layers.0.self_attn.q_proj"], ColwiseParallel)
    assert isinstance(plan["model.layers.1.mlp.down_proj"], RowwiseParallel)
    with pytest.raises(UserError, match="4 processes cannot share the 4 heads and 2 key heads"):
        tensor_plan(LlamaForCausalLM(config), 4)


@pytest.mark.parametrize(("layers", "count"), [(6, 2), (6, 4), (5, 3), (4, 4)])
def test_layers_are_spread_in_order_and_evenly(layers: int, count: int) -> None:
    owners = [layer_owner(layer, layers, count) for layer in range(layers)]
    shares = [owners.count(process) for process in range(count)]
    assert owners == sorted(owners)
    assert max(shares) - min(shares) <= 1


def test_a_loss_that_looks_into_the_model_is_not_spread_over_processes() -> None:
    recipe = Problem("classify").recipe()
    with pytest.raises(UserError, match="each process needs all of it; set tensor and pipeline to 1"):
        check_recipe(sizes(pipeline=2), replace(recipe, divisible=False), "fp32")
    with pytest.raises(UserError, match="adversarial steps need whole embeddings"):
        check_recipe(sizes(shards=2), replace(recipe, adversary=lambda backward: None), "fp32")
    with pytest.raises(UserError, match="take bf16 or fp32"):
        check_recipe(sizes(pipeline=2), recipe, "fp16")
    check_recipe(sizes(data=2), replace(recipe, divisible=False), "fp16")


def test_the_state_of_a_run_is_found_by_other_processes(tmp_path: Path) -> None:
    params = load_params(REPOSITORY / "presets" / "tiny.yaml")
    training = params.training.model_copy(update={"parallel": sizes(data=2)})
    other = params.model_copy(update={"training": training})
    assert _state_key("finetune", params, {}) == _state_key("finetune", other, {})
