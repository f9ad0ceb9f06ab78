from pathlib import Path

import pytest

from flows.graph import forecast, read_fingerprints, read_graph, stage_table, status_of
from flows.plan import make_plan
from stages.core.errors import UserError


def outlooks(target: str | None = None) -> dict[str, str]:
    return {name: found.outlook for name, found in forecast(target)[1].items()}


def edit_params(old: str, new: str) -> None:
    text = Path("params.yaml").read_text()
    assert old in text
    Path("params.yaml").write_text(text.replace(old, new))


def test_stages_come_after_their_parents_with_what_they_declare(project) -> None:
    found = read_graph()
    names = [stage.name for stage in found.stages]
    assert names == [
        "fingerprint", "acquire", "export@small", "export@large", "evaluate@small", "evaluate@large", "report",
    ]  # fmt: skip
    assert found.stage("report").parents == ("evaluate@small", "evaluate@large")
    assert found.stage("acquire").params == ("seed",)
    assert found.stage("acquire").dependencies == ("input.txt", "artifacts/fingerprint/made.txt")
    assert [stage.name for stage in found.stages if stage.measures] == ["evaluate@small", "evaluate@large"]
    assert [stage.name for stage in found.stages if stage.always] == ["fingerprint"]
    assert found.stage("export@small").description == "the small model"
    assert found.stage("report").folder == Path("artifacts/report")


def test_up_to_takes_a_stage_or_all_its_variants(project) -> None:
    found = read_graph()
    assert [stage.name for stage in found.up_to("export@large")] == ["fingerprint", "acquire", "export@large"]
    assert [stage.name for stage in found.up_to("export")][2:] == ["export@small", "export@large"]
    with pytest.raises(UserError, match="has no stage 'exprot'; the stages are: fingerprint, acquire"):
        found.up_to("exprot")


def test_outside_a_project_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"has no dvc\.yaml"):
        read_graph()
    Path("dvc.yaml").write_text("stages: {}\n")
    with pytest.raises(UserError, match="is not a DVC repository"):
        read_graph()


def test_a_broken_graph_is_one_line(project) -> None:
    Path("dvc.yaml").write_text("stages: [\n")
    with pytest.raises(UserError, match="DVC cannot read it") as caught:
        read_graph()
    assert "\n" not in str(caught.value)


def test_stages_are_cached_until_something_they_read_changes(built) -> None:
    assert set(outlooks().values()) == {"always", "cached"}
    edit_params("opset: 21", "opset: 22")
    _, found = forecast()
    assert found["acquire"].outlook == "cached"
    assert (found["export@small"].outlook, found["export@small"].reasons) == ("run", ("export.opset: 21 -> 22",))
    assert found["evaluate@small"].outlook == "probably"
    assert found["evaluate@small"].reasons == ("export@small runs before it",)
    assert status_of("export@small").state == "changed"
    assert status_of("evaluate@small").state == "cached"  # its input is still the old one


def test_every_kind_of_change_is_named(built) -> None:
    Path("input.txt").write_text("other")
    Path("artifacts/evaluate/small/made.txt").write_text("touched")
    _, found = forecast()
    assert found["acquire"].reasons == ("input.txt is modified",)
    assert found["evaluate@small"].reasons == ("artifacts/evaluate/small is modified",)
    Path("dvc.yaml").write_text(Path("dvc.yaml").read_text().replace("acquire input.txt", "acquire  input.txt"))
    assert "its command or paths in dvc.yaml changed" in status_of("acquire").reasons


def test_a_stage_that_never_ran_says_so(project) -> None:
    _, found = forecast()
    assert found["fingerprint"].outlook == "always"
    assert {found[name].reasons for name in ("acquire", "report")} == {("never ran here",)}


def test_the_fingerprint_counts_only_if_its_content_would_change(built) -> None:
    assert outlooks()["acquire"] == "cached"
    Path("outside.txt").write_text("another machine")
    found = outlooks()
    assert (found["fingerprint"], found["acquire"], found["report"]) == ("always", "probably", "probably")
    assert Path("artifacts/fingerprint/made.txt").read_text() == "fingerprint(outside)"  # only tried out


def test_outputs_that_are_only_gone_come_back_from_the_cache(built, project) -> None:
    for name in ("export", "evaluate"):
        for variant in ("small", "large"):
            built.remove(f"artifacts/{name}/{variant}")
    found = outlooks()
    assert (found["export@small"], found["evaluate@small"], found["report"]) == ("restore", "restore", "cached")
    assert status_of("export@small").state == "restore"


def test_fingerprints_are_those_of_the_lock_file(built) -> None:
    found = read_graph()
    recorded = read_fingerprints()
    assert recorded["report"].endswith(".dir")
    assert {stage.name: stage.fingerprint for stage in found.stages} == recorded


def test_plan_sums_up_what_the_last_runs_took(built) -> None:
    edit_params("opset: 21", "opset: 22")
    plan = make_plan().to_dict()
    assert plan["will_run"] == 5
    assert plan["estimate"]["seconds"] == pytest.approx(7.5)
    assert plan["estimate"]["peak_memory_mb"] == 10.0
    assert plan["estimate"]["unknown"] == []
    assert plan["free"]["disk_mb"] > 0


def test_plan_of_a_new_project_is_unknown(project) -> None:
    plan = make_plan("export@small")
    assert plan.unknown == ["acquire", "export@small"]
    assert [step.seconds for step in plan.steps] == [None, None, None]


def test_a_trial_of_the_fingerprint_that_fails_is_the_users_mistake(built) -> None:
    built.behave("fingerprint", "exit 2")
    with pytest.raises(UserError, match=r"input\.txt: is bad"):
        forecast()


def test_stage_table_has_a_row_a_room(project) -> None:
    lines = stage_table().splitlines()
    assert len(lines) == 2 + 5
    assert (
        "| `export` | the *small* model; variants: small, large | acquire | `export` |".replace("small*", "variant*")
        in lines
    )
