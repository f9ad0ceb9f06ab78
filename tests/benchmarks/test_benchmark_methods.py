"""The benchmark of ways to fine-tune: its list, its plan, one real training, its table."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from scipy import stats

from benchmarks.methods import __main__ as command
from benchmarks.methods.declared import METHODS, NOTHING, PLAIN, changed, choose
from benchmarks.methods.job import ANSWER, REQUEST, SPENT, _answer
from benchmarks.methods.table import difference, interval, render, spread
from stages.core.artifacts import read_json, write_json, write_manifest
from stages.core.checkpoints import load_tokenizer
from stages.core.errors import UserError
from stages.core.examples import load_examples
from stages.core.params import parse_params

ROOT = Path(__file__).parents[2]
PRESETS = sorted((ROOT / "presets").glob("*.yaml"))
TINY = yaml.safe_load((ROOT / "presets" / "tiny.yaml").read_text())


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_every_method_is_a_valid_change_of_every_preset(preset: Path) -> None:
    raw = yaml.safe_load(preset.read_text())
    seen = {}
    for method in METHODS:
        if "augmentation.edits" in str(method.changes) and raw["acquire"]["lexicon"] is None:
            continue
        params = parse_params(method.params(raw), method.name)
        seen[method.name] = params.finetune.model_dump_json()
    others = [dump for name, dump in seen.items() if name != "shipped"]
    assert len(set(others)) == len(others)
    taught = parse_params(choose(["self_training"])[1].params(raw), "").finetune.self_training
    assert taught is not None and taught.pattern == raw["distill"]["transfer"]["pattern"]
    assert parse_params(METHODS[1].params(raw), "").model_dump() == parse_params(raw, "").model_dump()


def test_names_are_unique_and_plain_is_always_chosen() -> None:
    names = [method.name for method in METHODS]
    assert len(set(names)) == len(names)
    assert [method.name for method in choose(["mixup"])] == [PLAIN, "mixup"]
    assert len(choose([])) == len(METHODS)
    with pytest.raises(UserError, match="--only mixdown: no such method; there are plain, "):
        choose(["mixdown"])


def test_changes_leave_the_params_of_the_task_alone_and_must_exist() -> None:
    raw = {"finetune": {"mixup": 0.0, "augmentation": {"edits": None}}}
    assert changed(raw, {"finetune.augmentation.edits": 1})["finetune"]["augmentation"]["edits"] == 1
    assert raw["finetune"]["augmentation"] == {"edits": None}
    with pytest.raises(UserError, match="finetune.adapters.width: no such param"):
        changed(raw, {"finetune.adapters.width": 8})


@pytest.fixture(scope="module")
def artifacts(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertConfig, BertForMaskedLM

    folder = tmp_path_factory.mktemp("artifacts")
    config = BertConfig(
        vocab_size=len(load_tokenizer(tiny_data / "tokenizer")), hidden_size=16, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=32,
    )  # fmt: skip
    torch.manual_seed(3)
    (folder / "pretrain").mkdir()
    BertForMaskedLM(config).save_pretrained(folder / "pretrain" / "model")
    write_manifest(folder / "pretrain" / "model")
    (folder / "tokenize").mkdir()
    (folder / "tokenize" / "data").symlink_to(tiny_data)
    return folder


def arguments(artifacts: Path, work: Path, **changes: Any) -> argparse.Namespace:
    given = {
        "task_name": "tiny", "artifacts": str(artifacts), "params": str(ROOT / "presets" / "tiny.yaml"), "seeds": 2,
        "only": ["mixup"], "epochs": 1, "jobs": 2, "work": str(work), "texts": None, "page": str(work / "page.md"),
        **changes,
    }  # fmt: skip
    return argparse.Namespace(**given)


def test_the_plan_goes_seed_by_seed_and_tells_trainings_apart(artifacts: Path, tmp_path: Path) -> None:
    jobs = command.plan(arguments(artifacts, tmp_path))
    seed = TINY["seed"]
    assert [(job.method.name, job.seed) for job in jobs] == [
        (PLAIN, seed), ("mixup", seed), (PLAIN, seed + 1), ("mixup", seed + 1)
    ]  # fmt: skip
    assert len({job.key for job in jobs}) == 4
    assert len({job.base for job in jobs}) == 1
    longer = command.plan(arguments(artifacts, tmp_path, epochs=2))
    assert not {job.key for job in jobs} & {job.key for job in longer}
    assert longer[0].base != jobs[0].base
    with pytest.raises(UserError, match="pretrain/model: no such folder"):
        command.plan(arguments(tmp_path, tmp_path))


def test_a_training_answers_with_the_quality_of_its_model(artifacts: Path, tmp_path: Path) -> None:
    job = command.plan(arguments(artifacts, tmp_path, epochs=12))[1]
    write_json(tmp_path / REQUEST, {"params": job.params, "inputs": job.inputs})
    answer = _answer(tmp_path)
    assert set(answer["test"]) == set(answer["validation"]) == {"accuracy", "f1_macro"}
    assert 0.0 <= answer["test"]["f1_macro"] <= 1.0
    spent = read_json(tmp_path / SPENT)["wall"]
    assert answer["minutes"] == pytest.approx(spent / 60)
    again = _answer(tmp_path)  # nothing is trained again, and the clock goes on
    assert again["test"] == answer["test"]
    assert read_json(tmp_path / SPENT)["wall"] > spent


class Pretended(command.Processes):
    """Answers without training, or fails."""

    def __init__(self, failing: str = ""):
        super().__init__()
        self.started: list[str] = []
        self._failing = failing

    def run(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> int | None:
        request = read_json(log.parent / REQUEST)
        self.started.append(log.parent.name)
        log.write_text("Traceback\nUserError: finetune.augmentation.edits: no lexicon\n")
        if self._failing and log.parent.name.startswith(self._failing):
            return 1
        score = 0.9 + request["params"]["finetune"]["mixup"] / 10 + request["params"]["seed"] / 1000
        quality = {"accuracy": score, "f1_macro": score}
        write_json(
            log.parent / ANSWER,
            {"validation": quality, "test": quality, "best_epoch": 1, "minutes": 2.0, "processor_minutes": 3.0},
        )
        return 0


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "page.md"
    path.write_text("# Title\n<!-- bench-methods -->\nold\n<!-- /bench-methods -->\n")
    return path


def run(monkeypatch: pytest.MonkeyPatch, given: argparse.Namespace, failing: str = "") -> tuple[Pretended, list[str]]:
    pretended = Pretended(failing)
    monkeypatch.setattr(command, "Processes", lambda: pretended)
    return pretended, command._run(given)


def test_what_is_done_is_not_done_again_and_a_failure_does_not_stop_the_rest(
    artifacts: Path, tmp_path: Path, page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, failures = run(monkeypatch, arguments(artifacts, tmp_path), failing="mixup-17")
    assert failures == ["mixup, seed 17: UserError: finetune.augmentation.edits: no lexicon"]
    assert len(first.started) == 4
    assert len(command.read_lines(tmp_path / "results.jsonl")) == 3
    second, failures = run(monkeypatch, arguments(artifacts, tmp_path))
    assert not failures
    assert [name.rsplit("-", 1)[0] for name in second.started] == ["mixup-17"]
    assert not list((tmp_path / "jobs").iterdir())
    table = (tmp_path / "table.md").read_text()
    assert "| mixup of embeddings | 95.75 ± 0.07 | 95.75 ± 0.07 | +4.00 (+4.00 to +4.00) | 1.00 x |" in table
    assert "| mixup of embeddings | `mixup: 0.4` |" in table
    assert table.startswith("- tiny: `python -m benchmarks.methods --task-name tiny --params ")
    assert "tiny.yaml --seeds 2 --only mixup --epochs 1`" in table.splitlines()[0]
    assert "seeds: 2; epochs: 1 at most; all training texts." in table.splitlines()[0]
    assert page.read_text() == f"# Title\n<!-- bench-methods -->\n{table}<!-- /bench-methods -->\n"


def test_fewer_texts_are_the_same_at_every_call(artifacts: Path, tmp_path: Path) -> None:
    data = artifacts / "tokenize" / "data"
    whole = command.plan(arguments(artifacts, tmp_path))
    some = command.plan(arguments(artifacts, tmp_path, texts=20))
    assert some[0].base != whole[0].base
    folder = Path(some[0].inputs["data"])
    chosen = load_examples(folder, "train")
    assert len(chosen) == 20
    assert set(chosen.texts) < set(load_examples(data, "train").texts)
    assert load_examples(folder, "test").texts == load_examples(data, "test").texts
    again = command.plan(arguments(artifacts, tmp_path, texts=20))
    assert [job.key for job in again] == [job.key for job in some]
    with pytest.raises(UserError, match="--texts 9999: there are"):
        command.plan(arguments(artifacts, tmp_path, texts=9999))


def test_a_page_without_marks_is_refused_before_anything_is_trained(artifacts: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"page\.md: no such file"):
        command._run(arguments(artifacts, tmp_path))
    (tmp_path / "page.md").write_text("# Title\n")
    with pytest.raises(UserError, match=r"page\.md: needs the lines <!-- bench-methods -->"):
        command._run(arguments(artifacts, tmp_path))
    assert "<!-- bench-methods -->" in (ROOT / "docs" / "training.md").read_text()


def test_a_line_cut_off_by_a_kill_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"key": "a"}\n{"key": "b"}\n{"ke')
    assert [line["key"] for line in command.read_lines(path)] == ["a", "b"]
    command._add_line(path, {"key": "c"})
    assert [line["key"] for line in command.read_lines(path)] == ["a", "b", "c"]


def test_the_interval_is_that_of_a_paired_t_test() -> None:
    own, plain = [0.951, 0.944, 0.955, 0.949], [0.947, 0.945, 0.946, 0.948]
    differences = [one - other for one, other in zip(own, plain, strict=True)]
    wanted = stats.ttest_rel(own, plain).confidence_interval(0.95)
    assert interval(differences) == pytest.approx((wanted.low, wanted.high))
    assert difference([0.01]) == "+1.00"
    assert difference([0.01, -0.01]) == "+0.00 (-12.71 to +12.71)"
    assert spread([0.5]) == "50.00"
    assert spread([0.5, 0.52]) == "51.00 ± 1.41"
    assert spread([]) == ""


def line(task: str, method: str, seed: int, accuracy: float, base: str = "b", minutes: float = 1.0) -> dict[str, Any]:
    quality = {"accuracy": accuracy, "f1_macro": accuracy / 2}
    how = {"command": "make bench-methods", "date": "2026-01-02", "threads": 1, "epochs": 3, "texts": None}
    about = {"task": task, "method": method, "seed": seed, "base": base, **how}
    return {**about, "test": quality, "processor_minutes": minutes}


def test_the_table_has_a_row_for_each_method_and_pairs_seeds() -> None:
    lines = [
        line("questions", PLAIN, 1, 0.1, base="older"),
        line("questions", "mixup", 1, 0.1, base="older"),
        line("questions", PLAIN, 1, 0.90, minutes=2.0),
        line("questions", PLAIN, 2, 0.92, minutes=2.0),
        line("questions", "r_drop", 2, 0.93, minutes=4.0),
        line("reviews", PLAIN, 1, 0.80),
    ]
    how, gains, settings = render(lines, {"cpu": {"model": "A processor"}}).split("\n\n")
    assert how.splitlines() == [
        f"- {task}: `make bench-methods`, 2026-01-02, on A processor; threads a training: 1; seeds: {seeds}; "
        "epochs: 3 at most; all training texts."
        for task, seeds in (("questions", 2), ("reviews", 1))
    ]
    table = gains.splitlines()
    assert len(table) == 4
    assert table[0].count("|") == table[2].count("|") == 10
    assert table[2] == "| plain fine-tuning | 91.00 ± 1.41 | 45.50 ± 0.71 |  |  | 80.00 | 40.00 |  |  |"
    assert table[3] == "| R-Drop | 93.00 | 46.50 | +1.00 | 2.00 x |  |  |  |  |"
    assert settings.splitlines()[3] == "| R-Drop | `r_drop: 1.0` |"
    assert json.loads(json.dumps(NOTHING)) == NOTHING
