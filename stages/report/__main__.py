"""Command line of the report stage."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

import pandas

from stages.core.artifacts import write_json
from stages.core.ladder import CHAIN, VARIANTS, LadderRow, fastest_within_floor, headline, times_smaller
from stages.core.stage import StageRun, command
from stages.report.card import MODEL_CARD, write_card
from stages.report.drawing import save
from stages.report.page import NARROW, read_sections, render, settled
from stages.report.results import SCHEMA, check_results, collect_results
from stages.report.sections.ladder import steps_of
from stages.report.sources import read_ladder

_INPUTS = (
    *("acquire", "clean", "tokenize", "pretrain", "finetune", "distill", "latency_table", "prune"),
    *("quantize", "quantize_finetuned"),
    *(f"export@{variant}" for variant in (*CHAIN, "quantize_finetuned")),
    "cascade",
    *(f"evaluate@{variant}" for variant in VARIANTS),
    *("deploy_check", "review", "history"),
)
# What the page tells more of where the graph has it.
_OPTIONAL = (*(f"robustness@{variant}" for variant in VARIANTS), "explain")

_MOST_BYTES = 3_000_000


def run_report(run: StageRun) -> dict[str, Any]:
    """Write the page, its pictures and the ladder; return the headline numbers."""
    rows = read_ladder(run.inputs)
    sections = read_sections(run.inputs, run.params)
    plots = run.staging / "plots"
    plots.mkdir()
    for name, figure in settled(sections).items():
        if not name.endswith(NARROW):
            save(figure, plots, name)
    page = render(rows, sections, run.params)
    (run.staging / "report.html").write_text(page, encoding="utf-8")
    if (size := len(page.encode())) > _MOST_BYTES:
        run.say(
            f"report.html has {size / 1e6:.1f} MB, more than the {_MOST_BYTES / 1e6:.0f} it should; see its pictures"
        )
    pandas.DataFrame([row.to_flat() for row in rows]).to_csv(
        run.staging / "ladder.csv", index=False, lineterminator="\n"
    )
    steps = [{"step": step.what, "factor": step.factor, "points": 100 * step.points} for step in steps_of(rows)]
    pandas.DataFrame(steps).to_csv(run.staging / "waterfall.csv", index=False, lineterminator="\n")
    write_json(run.staging / "ladder.json", [row.to_dict() for row in rows])
    write_results(run)
    run.say(headline(rows))
    return summarize(rows)


def write_results(run: StageRun) -> None:
    """Write what programs and registries read: results.json with its schema, and the model card."""
    results = collect_results(run.inputs, run.params)
    check_results(results)
    write_json(run.staging / "results.json", results)
    shutil.copyfile(SCHEMA, run.staging / SCHEMA.name)
    (run.staging / MODEL_CARD).write_text(write_card(results, run.params), encoding="utf-8")


def summarize(rows: Sequence[LadderRow]) -> dict[str, Any]:
    """The headline numbers: those of the fastest model that meets the floor, null where there is none."""
    best = fastest_within_floor(rows)
    if best is None:
        return {"best": None, "headline": headline(rows)}
    return {
        "best": best.name,
        "headline": headline(rows),
        best.metric: best.quality,
        "difference": best.difference,
        "texts_per_second": best.texts_per_second,
        "latency_p50_ms": best.latency_p50_ms,
        "throughput_over_fair": best.over_fair.median,
        "throughput_over_naive": best.over_naive.median,
        "times_smaller": times_smaller(best, rows),
    }


if __name__ == "__main__":
    command("report", run_report, inputs=_INPUTS, optional=_OPTIONAL)
