"""`results.json`: everything the report came to, for programs, in the form that `results.schema.json` publishes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema

from stages.core.artifacts import MANIFEST, digest, read_json, text_sha256
from stages.core.ladder import CHAIN, VARIANTS, LadderRow, fastest_within_floor, headline, ladder_rows, times_smaller
from stages.core.params import Params
from stages.core.stage import MEASURED, METRICS
from stages.core.tables import read_table

SCHEMA = Path(__file__).with_name("results.schema.json")
_EXPORTED = (*CHAIN, "quantize_finetuned")
"""Variants that are exported before they are measured; a cascade is made of exported models."""
_COMPARISONS = {"reference": "against_reference", "parent": "against_parent"}


def collect_results(inputs: Mapping[str, Path], params: Params) -> dict[str, Any]:
    """Gather the results of a run from the outputs of its stages.

    Args:
        inputs: of the report, by role.
        params: of the whole pipeline.

    Raises:
        UserError: if a file is missing or malformed.
    """
    evaluations = {
        name: read_json(inputs[f"evaluate@{name}"] / METRICS) for name in VARIANTS if f"evaluate@{name}" in inputs
    }
    rows, final = ladder_rows(evaluations), next(name for name in reversed(CHAIN) if name in evaluations)
    deployment = read_json(inputs["deploy_check"] / METRICS)
    best = fastest_within_floor(rows)
    return {
        "schema": read_json(SCHEMA)["$id"],
        "params_sha256": _params_digest(params),
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
    """Digest of every unit that a stage handed on, and of the exported models that were measured."""
    sums = {
        (role, manifest.parent.name): digest(manifest.parent)
        for role, folder in inputs.items()
        for manifest in sorted(folder.glob(f"*/{MANIFEST}"))
    }
    # Exported models may be no input of the report; those who measured them noted what they were given.
    for variant in (name for name in VARIANTS if f"evaluate@{name}" in inputs):
        made_by = variant if variant in inputs and variant not in _EXPORTED else f"export@{variant}"
        given = read_json(inputs[f"evaluate@{variant}"] / MEASURED)["inputs"]["model"]
        sums.setdefault((made_by, "model"), given)
    return [{"stage": stage, "unit": unit, "sha256": sum_} for (stage, unit), sum_ in sums.items()]


def _params_digest(params: Params) -> str:
    """Sum of every value that changes a result; where runs are recorded changes none."""
    return text_sha256(json.dumps(params.model_dump(mode="json", exclude={"tracking"}), sort_keys=True))
