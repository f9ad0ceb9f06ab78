"""Command line: `python -m benchmarks --help`."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.calls import repeatable_call
from benchmarks.contenders import PEERS, REFERENCE, Contender, choose, headroom_contenders
from benchmarks.headroom import chosen
from benchmarks.measure import Plan, mean_tokens, measure, read_results
from benchmarks.page import render_page, render_section
from benchmarks.picture import draw
from benchmarks.summary import Row, fastest, make_rows, victories
from benchmarks.workers import contenders_seconds, thread_settings
from stages.core.artifacts import ARTIFACTS, write_json
from stages.core.ceilings import measure_ceilings, operations_per_text
from stages.core.choice import Setting
from stages.core.errors import UserError
from stages.core.examples import load_examples
from stages.core.hardware import describe_hardware, package_versions, usable_processors
from stages.core.observe.progress import say
from stages.core.runtimes import ONNX_FILE, ExportedModel, open_runtime
from stages.core.timing import watch_other_load

_RESULTS = "results.json"
_FOLDERS = ("task_artifacts", "environments", "work", "results", "docs")


def main() -> int:
    """Measure, write the results, the page and the picture."""
    arguments = _parser().parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stopped workers must be ended, not left behind
    try:
        _run(arguments)
    except UserError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("benchmarks: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def _run(arguments: argparse.Namespace) -> None:
    artifacts = Path(arguments.task_artifacts)
    plan = Plan(
        artifacts,
        Path(arguments.environments).absolute(),
        Path(arguments.work).absolute() / arguments.name,
        arguments.rounds,
        arguments.texts,
        arguments.single_texts,
        arguments.seed,
    )
    if not (plan.checkpoint / "config.json").exists():
        raise UserError(
            f"{plan.checkpoint}: no fine-tuned model; `make run` makes one, or name another --task-artifacts"
        )
    contenders = choose([*PEERS, *headroom_contenders(artifacts)], arguments.only)
    started, spent = time.monotonic(), contenders_seconds()
    with watch_other_load() as load:
        measured = measure(plan, contenders)
    minutes = (time.monotonic() - started) / 60
    share = (contenders_seconds() - spent) / ((time.monotonic() - started) * len(usable_processors()))
    if "error" in measured[REFERENCE]:
        raise UserError(f"{REFERENCE}: {measured[REFERENCE]['error']}; without it there is nothing to compare with")
    test = load_examples(plan.data, "test")
    result = {
        "command": repeatable_call(_parser(), arguments, _FOLDERS),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "contenders": [dataclasses.asdict(contender) for contender in contenders],
        "measured": measured,
        "labels": test.labels.tolist(),
        "metric": arguments.metric,
        "floor": arguments.floor,
        "seed": plan.seed,
        "rounds": plan.rounds,
        "texts": min(plan.texts, len(test)),
        "test_texts": len(test),
        "tokens": mean_tokens(plan),
        "minutes": minutes,
        "other_load": max(0.0, load.share - share),
        "threads": thread_settings(),
        "hardware": describe_hardware(),
        "versions": _versions(contenders, measured),
        "ceilings": measure_ceilings(),
    }
    rows = _rows(result)
    single = [row for row in rows if not row.headroom or row.name in _single_models(plan, contenders)]
    result["used"] = _used(plan, fastest(single, arguments.floor, headroom=True), contenders, measured, result)
    results = {**read_results(Path(arguments.results)), arguments.name: result}
    write_json(Path(arguments.results), results)
    _write_docs(results, Path(arguments.docs))
    failures = [row for row in rows if row.error]
    say(f"{len(rows) - len(failures)} contenders measured, {len(failures)} failed; {arguments.docs}/benchmarks.md")
    for row in failures:
        say(f"failed: {row.title}: {row.error}")


def _write_docs(results: Mapping[str, Any], docs: Path) -> None:
    """Write page and picture of all tasks measured so far."""
    rows = {name: _rows(result) for name, result in results.items()}
    sections = {
        name: render_section(
            rows[name],
            victories(rows[name], result["floor"]),
            next(row for row in rows[name] if row.name == REFERENCE),
            result,
        )
        for name, result in results.items()
    }
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "benchmarks.md").write_text(render_page(sections), encoding="utf-8")
    draw(rows, max(result["floor"] for result in results.values()), docs / "benchmarks.png")


def _rows(result: Mapping[str, Any]) -> list[Row]:
    contenders = [
        Contender(**{**fields, "batch_sizes": tuple(fields["batch_sizes"])}) for fields in result["contenders"]
    ]
    return make_rows(contenders, result["measured"], result["labels"], result["metric"], result["seed"])


def _versions(contenders: Sequence[Contender], measured: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Versions by peer of those that ran, and Headroom's own."""
    found = {
        contender.peer: measured[contender.name]["versions"]
        for contender in contenders
        if contender.peer and "error" not in measured[contender.name]
    }
    ours = package_versions()
    return {**found, "headroom": {name: ours[name] for name in ("onnxruntime", "openvino", "tokenizers")}}


def _single_models(plan: Plan, contenders: Sequence[Contender]) -> set[str]:
    """Names of Headroom's contenders with one graph; how much a cascade computes depends on the texts."""
    ours = [contender for contender in contenders if contender.headroom]
    return {each.name for each in ours if (plan.artifacts / each.variant / "model" / ONNX_FILE).exists()}


def _used(
    plan: Plan,
    winner: Row | None,
    contenders: Sequence[Contender],
    measured: Mapping[str, Any],
    result: Mapping[str, Any],
) -> dict[str, Any] | None:
    """How much of the machine the fastest model uses, against the ceiling of the arithmetic that it runs in."""
    if winner is None:
        return None
    contender = next(each for each in contenders if each.name == winner.name)
    model = ExportedModel.load(plan.artifacts / contender.variant)
    setting = Setting(**chosen(plan.artifacts, contender.variant)["throughput"])
    runtime = open_runtime(setting.runtime, model, goal="throughput", precision=setting.precision)
    precision = "int8" if model.quantized else {"bf16": "bf16", "f32": "fp32"}.get(runtime.precision, "fp32")
    operations = operations_per_text(model.onnx_path, result["tokens"])
    rate = operations * winner.texts_per_second
    return {
        "title": winner.title,
        "operations": operations,
        "rate": rate,
        "precision": precision,
        "share": rate / (result["ceilings"][precision] * 1e9),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure Headroom's models beside PyTorch, Optimum, Olive, Neural Compressor, NNCF with OpenVINO "
        "and TextPruner: same checkpoint, same texts, in turns. The first call installs the peers, which takes some "
        "minutes and gigabytes. A peer that fails is reported in the table, and the others go on.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--name", default="questions", help="of the task, the title of its section")
    parser.add_argument("--task-artifacts", default=str(ARTIFACTS), help="artifacts folder of a finished run")
    parser.add_argument("--environments", default="benchmarks/.environments", help="folder of the peers' environments")
    parser.add_argument("--work", default=str(ARTIFACTS / "benchmarks" / "work"), help="for the peers' models and logs")
    parser.add_argument(
        "--results", default=str(ARTIFACTS / "benchmarks" / _RESULTS), help="file to add the results to"
    )
    parser.add_argument("--docs", default="docs", help="folder for benchmarks.md and benchmarks.png")
    parser.add_argument("--rounds", type=int, default=5, help="in which all take turns")
    parser.add_argument("--texts", type=int, default=512, help="of the test split answered in a round, at most")
    parser.add_argument("--single-texts", type=int, default=200, help="answered one by one over all rounds, at most")
    parser.add_argument("--metric", default="accuracy", choices=("accuracy", "f1_macro", "f1_weighted"))
    parser.add_argument(
        "--floor", type=float, default=0.01, help="quality that a contender may lose to count as the best"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the orders and draws")
    parser.add_argument("--only", nargs="*", default=[], help="names of contenders, or their beginnings")
    return parser


if __name__ == "__main__":
    sys.exit(main())
