"""`model_card.md`: the deployed model's card, with the front matter of the Hugging Face hub (1810.03993).

The model's own folder is hashed and made before anything is measured, so the card is written here and packaged with
the model by the stage `register`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from stages.core.ladder import CHAIN, TITLES, points, rate, times
from stages.core.params import Params

MODEL_CARD = "model_card.md"
_HUB = "hub"


def write_card(results: Mapping[str, Any], params: Params) -> str:
    """Render the card of the deployed variant.

    Args:
        results: of `collect_results`.
        params: of the whole pipeline.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # it is Markdown
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        cell=_cell, percent=lambda share: f"{share:.1%}", points=points, rate=rate, times=times, source=_source
    )
    deployed = results["verdict"]["deployed"]
    variants = {variant["name"]: variant for variant in results["variants"]}
    body = environment.get_template(MODEL_CARD).render(
        results=results,
        params=params,
        model=variants[deployed],
        reference=results["variants"][0],
        steps=[TITLES[name] for name in CHAIN[: CHAIN.index(deployed) + 1] if name in variants],
        against=variants[deployed]["against"]["reference"],
        sources=results["data"]["sources"],
    )
    return f"---\n{card_data(results, params).to_yaml()}\n---\n\n{body}"


def card_data(results: Mapping[str, Any], params: Params) -> ModelCardData:
    """Front matter of the card: what the hub and its tools read."""
    sources, task = results["data"]["sources"], results["task"]
    model = next(variant for variant in results["variants"] if variant["name"] == results["verdict"]["deployed"])
    evaluations = [
        EvalResult(
            task_type=task["kind"],
            dataset_type=_dataset(sources["data"]),
            dataset_name=task["name"],
            dataset_split="test",
            metric_type=metric.partition("_")[0],
            metric_name=metric.replace("_", " "),
            metric_value=round(model["quality"][metric], 6),
        )
        for metric in ("accuracy", "f1_macro", "f1_weighted")
    ]
    return ModelCardData(
        model_name=params.tracking.model_name,
        license=_license(sources),
        library_name="onnx",
        pipeline_tag=task["kind"],
        base_model=sources["checkpoint"]["name"] if sources["checkpoint"]["kind"] == _HUB else None,
        datasets=[sources["data"]["name"]] if sources["data"]["kind"] == _HUB else None,
        metrics=["accuracy", "f1"],
        tags=["headroom", "onnx", "text-classification"],
        eval_results=evaluations,
    )


def _license(sources: Mapping[str, Any]) -> str | None:
    """The licence of checkpoint and data where they agree, in the hub's spelling; None where they do not say."""
    named = {str(sources[part].get("license") or "").lower() for part in ("checkpoint", "data")}
    if "" in named:
        return None
    return named.pop() if len(named) == 1 else "other"


def _dataset(source: Mapping[str, Any]) -> str:
    return str(source.get("name") or source.get("package") or source.get("path") or source["kind"])


def _source(source: Mapping[str, Any]) -> str:
    """Name a source in words, with its version and sum."""
    kept = ("name", "config", "revision", "package", "version", "member", "path", "license", "sha256")
    told = [f"{name} `{source[name]}`" for name in kept if source.get(name)]
    return f"{source['kind']}: {', '.join(told)}" if told else str(source["kind"])


def _cell(text: object) -> str:
    """Keep a label from ending a cell of a Markdown table."""
    return str(text).replace("|", "\\|").replace("\n", " ")
