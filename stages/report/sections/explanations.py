"""Why the models answer as they do, whether the reasons given hold, and where compression moved them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import pandas
import safetensors.numpy
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from stages.core.artifacts import read_json
from stages.core.params import Params
from stages.report.drawing import ACCENT, MUTED, SECOND, new_figure, settle, style
from stages.report.sections import Section
from stages.report.sources import read_mixed

MODELS = {"teacher": "fine-tuned", "compressed": "compressed"}
METHODS = {
    "integrated_gradients": "Integrated gradients",
    "shapley": "Shapley values",
    "lime": "LIME",
    "rollout": "Attention rollout",
}
MEASURES = {
    "comprehensiveness": "Comprehensiveness",
    "sufficiency": "Sufficiency",
    "deletion": "Deletion",
    "insertion": "Insertion",
}
SHADED = "integrated_gradients"
"""The method that the page shades words by; the alarm is about this one."""

_MOST_MOVED = 10
_MOST_MAPPED_TOKENS = 40  # a map of more has no legible labels
_LONGEST_TEXT = 160
_COLOURS = {"integrated_gradients": ACCENT, "rollout": SECOND, "random": MUTED}


def section(inputs: Mapping[str, Path], params: Params) -> Section | None:
    """Tell the explanations of the fine-tuned and the compressed model, and what they are worth."""
    if "explain" not in inputs:
        return None
    folder = inputs["explain"]
    metrics, explanations = read_json(folder / "metrics.json"), read_json(folder / "explanations.json")
    faithfulness = read_mixed(folder / "faithfulness.csv")
    curves = read_mixed(folder / "curves.csv")
    maps = safetensors.numpy.load_file(folder / "attention.safetensors")
    wanting = found_wanting(faithfulness)
    chosen, texts = explanations["chosen"], explanations["texts"]
    mapped = _text_to_map(explanations["tokens"], chosen)
    with style("draw"):
        figures = {"explain_curves": draw_curves(curves)}
        if mapped is not None and maps:
            figures["explain_attention"] = draw_attention(maps, explanations["tokens"], mapped, metrics)
        for figure in figures.values():
            settle(figure)
    return Section(
        identifier="explanations",
        title="Why the models answer as they do",
        summary=summarize(metrics, wanting),
        context={
            "settings": params.explain,
            "metrics": metrics,
            "models": MODELS,
            "methods": METHODS,
            "measures": MEASURES,
            "wanting": wanting,
            "faithfulness": _faithfulness_rows(faithfulness),
            "texts": [_shown(text) for text in texts[:chosen]],
            "moved": _most_moved(texts),
            "settled": _settled(texts, metrics),
            "mapped_text": None if mapped is None else texts[mapped]["text"],
        },
        figures=figures,
        descriptions={
            "explain_curves": "Probability of the answer as words are masked and as they are shown, most important "
            "first, for integrated gradients, attention rollout and random orders; the areas are in the table",
            "explain_attention": "Attention of every layer, mean of its heads, for one text and both models",
        },
        alarm=bool(wanting),
    )  # fmt: skip


def found_wanting(faithfulness: pandas.DataFrame) -> list[str]:
    """Name what the shaded attributions do no better than random orders, such as `deletion of the compressed model`."""
    shaded = faithfulness[faithfulness["method"] == SHADED]
    failed = shaded[~(shaded["low"] > 0.0)]
    return [f"{row['measure']} of the {MODELS[str(row['model'])]} model" for row in failed.to_dict(orient="records")]


def summarize(metrics: Mapping[str, Any], wanting: Sequence[str]) -> str:
    """Say in a sentence or two whether the explanations hold and how far they moved."""
    mean, compared = metrics["correlation"]["mean"], metrics["correlation"]["texts"]
    moved = (
        "No text is long enough to compare the two models' reasons."
        if mean is None
        else f"Mean rank correlation of the two models' word attributions: {mean:.2f} over {compared} texts."
    )
    if wanting:
        return f"The attributions are not shown to be better than random: {', '.join(wanting)}. {moved}"
    return f"The attributions name words that the answers depend on, by all four tests against random. {moved}"


def draw_curves(curves: pandas.DataFrame) -> Figure:
    """Draw deletion and insertion curves, a column per model.

    Args:
        curves: columns model, method, share, deletion and insertion.
    """
    figure = new_figure(7.2, 4.6)
    axes = figure.subplots(2, 2, sharex=True, sharey=True)
    for column, (model, title) in enumerate(MODELS.items()):
        for row, kind in enumerate(("deletion", "insertion")):
            panel: Axes = axes[row, column]
            for method, colour in _COLOURS.items():
                line = curves[(curves["model"] == model) & (curves["method"] == method)]
                dashes: Any = (0, (4, 2)) if method == "random" else "-"
                name = METHODS.get(method, "Random order")
                panel.plot(line["share"], line[kind], color=colour, linestyle=dashes, linewidth=1.6, label=name)
            panel.set_title(f"{title}: words {'masked' if kind == 'deletion' else 'shown'}")
            panel.xaxis.set_major_formatter(PercentFormatter(1.0))
            panel.yaxis.set_major_formatter(PercentFormatter(1.0))
            panel.grid(axis="y")
    for panel in axes[1]:
        panel.set_xlabel("share of the words, most important first")
    axes[0, 0].set_ylabel("probability")
    axes[1, 0].set_ylabel("probability")
    axes[0, 1].legend(loc="upper right")
    return figure


def draw_attention(
    maps: Mapping[str, numpy.ndarray], tokens: Mapping[str, Sequence[Sequence[str]]], text: int, metrics: Any
) -> Figure:
    """Draw the attention of one text, mean of the heads, a row per model and a column per layer.

    Args:
        maps: by `model.text.layer`, [heads, tokens, tokens]; layers without heads have none.
        tokens: by model and text.
        text: which.
        metrics: with the number of layers of each model.
    """
    layers = max(int(metrics[model]["layers"]) for model in MODELS)
    figure = new_figure(max(1.45 * layers, 4.5) + 0.6, 4.4)
    axes = figure.subplots(2, layers, squeeze=False)
    # From nothing to the page's accent, so that it reads on light and on dark paper.
    shade = LinearSegmentedColormap.from_list("attention", [to_rgba(ACCENT, 0.0), to_rgba(ACCENT, 1.0)])
    for row, (model, title) in enumerate(MODELS.items()):
        names = tokens[model][text]
        for layer in range(layers):
            panel: Axes = axes[row, layer]
            if layer >= int(metrics[model]["layers"]):
                panel.set_visible(False)
                continue
            panel.set_title(f"{title} {layer + 1}" if layer == 0 else str(layer + 1))
            panel.set_xticks([])
            panel.set_yticks(range(len(names)), names if layer == 0 else [], fontsize=6)
            panel.tick_params(length=0)
            attention = maps.get(f"{model}.{text}.{layer}")
            if attention is None:
                panel.text(0.5, 0.5, "no heads", color=MUTED, ha="center", transform=panel.transAxes)
                continue
            panel.imshow(attention.mean(axis=0), cmap=shade, vmin=0.0, vmax=1.0, interpolation="nearest")
    return figure


def _text_to_map(tokens: Mapping[str, Sequence[Sequence[str]]], chosen: int) -> int | None:
    """First chosen text whose tokens can be labelled; None where all are too long."""
    short = [text for text in range(chosen) if max(len(tokens[model][text]) for model in MODELS) <= _MOST_MAPPED_TOKENS]
    return short[0] if short else None


def _faithfulness_rows(table: pandas.DataFrame) -> list[dict[str, Any]]:
    rows = []
    for (model, method), found in table.groupby(["model", "method"], sort=False):
        measures = {row["measure"]: row for row in found.to_dict(orient="records")}
        rows.append(
            {
                "model": MODELS[str(model)],
                "method": METHODS[str(method)],
                "texts": found["texts"].iloc[0],
                "measures": measures,
            }
        )
    return rows


def _shown(text: Mapping[str, Any]) -> dict[str, Any]:
    """A chosen text with its words shaded for both models."""
    columns = [
        {"title": f"{METHODS[method]}, {name}", "values": found["attributions"][method]}
        for model, name in MODELS.items()
        for found in [text["models"][model]]
        for method in METHODS
        if method in found["attributions"]
    ]
    sides = [
        {"name": name, **text["models"][model], "shades": shades(text["words"], text["models"][model]["attributions"])}
        for model, name in MODELS.items()
    ]
    values = [
        {"word": word, "values": [column["values"][place] for column in columns]}
        for place, word in enumerate(text["words"])
    ]
    return {**text, "sides": sides, "columns": [column["title"] for column in columns], "values": values}


def shades(words: Sequence[str], attributions: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """Words with the strength of their attribution, from 0 to 1 for the strongest of the text, and its sign."""
    values = attributions[SHADED]
    strongest = max((abs(value) for value in values), default=0.0) or 1.0
    return [
        {"word": word, "weight": abs(value) / strongest, "side": "for" if value >= 0 else "against", "value": value}
        for word, value in zip(words, values, strict=True)
    ]


def _most_moved(texts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    known = sorted((text for text in texts if text["correlation"] is not None), key=lambda text: text["correlation"])
    return [
        {
            "text": _cut(text["text"]),
            "correlation": text["correlation"],
            "sides": [
                {
                    "answer": found["answer"],
                    "word": text["words"][int(numpy.argmax(found["attributions"][SHADED]))],
                }
                for found in (text["models"][model] for model in MODELS)
            ],
        }
        for text in known[:_MOST_MOVED]
    ]


def _settled(texts: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Share of the texts whose answer is settled by each layer, for both models; None beyond a model's last layer."""
    depth = {model: int(metrics[model]["layers"]) for model in MODELS}
    settled = {model: numpy.array([text["models"][model]["settled"] for text in texts]) for model in MODELS}
    return [
        {
            "layer": layer,
            "shares": [float((settled[model] <= layer).mean()) if layer <= depth[model] else None for model in MODELS],
        }
        for layer in range(max(depth.values()) + 1)
    ]


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else f"{text[: _LONGEST_TEXT - 1]}…"
