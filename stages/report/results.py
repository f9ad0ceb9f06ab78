"""`results.json`: everything the report came to, for programs, in the form that `results.schema.json` publishes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema

from stages.core.artifacts import read_json
from stages.core.ladder import LadderRow, fastest_within_floor, headline, ladder_rows, times_smaller
from stages.core.params import Params
from stages.core.stage import METRICS
from stages.core.tables import read_table
from stages.report.sections.lineage import lineage
from stages.report.sections.reproduce import settings_digest
from stages.report.sources import final_variant, read_evaluations

SCHEMA = Path(__file__).with_name("results.schema.json")
_COMPARISONS = {"reference": "against_reference", "parent": "against_parent"}


def collect_results(inputs: Mapping[str, Path], params: Params) -> dict[str, Any]:
    """Gather the results of a run from the outputs of its stages.

    Args:
        inputs: of the report, by role.
        params: of the whole pipeline.

    Raises:
        UserError: if a file is missing or malformed.
    """
    evaluations, final = read_evaluations(inputs), final_variant(inputs)
    rows = ladder_rows(evaluations)
    deployment = read_json(inputs["deploy_check"] / METRICS)
    best = fastest_within_floor(rows)
    return {
        "schema": read_json(SCHEMA)["$id"],
        "params_sha256": settings_digest(params),
        "task": {
            "kind": params.task.kind,
            "name": params.tracking.experiment,
            "labels": list(evaluations[final]["per_class"]),
            "metric": params.quality.metric,
            "floor": params.quality.floor,
        },
        "data": {
            "texts": _texts(inputs["tokenize"] / "lengths.csv"),
            "sources": read_json(inputs["acquire"] / "provenance.json"),
            "corrections": read_json(inputs["clean"] / METRICS).get("corrections"),
        },
        "machine": read_json(inputs["deploy_check"] / "details.json")["inventory"],
        "verdict": {
            "best": best.name if best else None,
            "deployed": final,
            "within_floor": bool(evaluations[final]["against_reference"]["within_floor"]),
            "deployment_check": deployment["verdict"],
            "headline": headline(rows),
        },
        "baselines": [{"name": row.name, **_speed(row)} for row in rows if row.baseline],
        "variants": [_variant(row, rows, evaluations[row.name]) for row in rows if not row.baseline],
        "lineage": _lineage(inputs),
    }


def check_results(results: Mapping[str, Any]) -> None:
    """Hold results to the published schema.

    Raises:
        jsonschema.ValidationError: if they do not fit, which is a fault of the project and no mistake of the user.
    """
    schema = read_json(SCHEMA)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(results, schema, cls=jsonschema.Draft202012Validator)


def _variant(row: LadderRow, rows: list[LadderRow], evaluation: Mapping[str, Any]) -> dict[str, Any]:
    found = {
        "name": row.name,
        "title": row.title,
        "parent": row.parent,
        "texts": evaluation["texts"],
        "quality": evaluation["quality"],
        "per_class": evaluation["per_class"],
        "against": {name: evaluation[key] for name, key in _COMPARISONS.items() if key in evaluation},
        "speed": _speed(row),
        "size": {
            "model_bytes": row.model_bytes,
            "parameters": row.parameters,
            "times_smaller": times_smaller(row, rows),
            "peak_memory_mb": row.peak_memory_mb,
        },
    }
    return {**found, "cost": evaluation["cost"]} if "cost" in evaluation else found


def _speed(row: LadderRow) -> dict[str, Any]:
    flat = row.to_dict()
    gains = ("over_fair", "over_naive", "latency_over_fair", "latency_over_naive")
    return {
        "texts_per_second": row.texts_per_second,
        "batch_size": row.batch_size,
        "throughput_runtime": row.throughput_runtime,
        "latency_p50_ms": row.latency_p50_ms,
        "latency_p95_ms": row.latency_p95_ms,
        "latency_runtime": row.latency_runtime,
        "over_parent": row.over_parent,
        **{name: flat[name] for name in gains},
    }


def _texts(lengths: Path) -> dict[str, int]:
    table = read_table(lengths, "csv", "utf-8")
    counts: dict[str, int] = {}
    for split, count in zip(table["split"], table["count"], strict=True):
        counts[split] = counts.get(split, 0) + int(count)
    return counts


def _lineage(inputs: Mapping[str, Path]) -> list[dict[str, str]]:
    """Digest of every unit that a stage handed on."""
    units = [unit for link in lineage(inputs) for unit in link.made]
    return [{"stage": unit.stage, "unit": unit.name, "sha256": unit.digest} for unit in units]
