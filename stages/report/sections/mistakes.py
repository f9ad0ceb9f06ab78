"""What the final model takes for what."""

from __future__ import annotations

from pathlib import Path

import pandas

from stages.core.ladder import TITLES
from stages.core.params import Params
from stages.report import plots
from stages.report.drawing import style
from stages.report.sections import Section
from stages.report.sources import Inputs, final_variant, read_evaluations, read_table


def section(inputs: Inputs, params: Params) -> Section:
    """Tell the mistakes of the final model."""
    final = final_variant(inputs)
    folder, metrics = inputs[f"evaluate@{final}"], read_evaluations(inputs)[final]
    table = confusion(folder / "confusion.csv", list(metrics["per_class"]))
    with style("draw"):
        figures = {"confusion": plots.confusion(table)}
    right, texts = int(table.to_numpy().diagonal().sum()), int(table.to_numpy().sum())
    return Section(
        identifier="mistakes",
        title=f"Mistakes of the {TITLES[final]} model",
        summary=f"{right:,} of {texts:,} test texts right.",
        context={},
        figures=figures,
        descriptions={
            "confusion": f"Confusion matrix: {right} of {texts} texts on the diagonal",
        },
    )


def confusion(path: Path, labels: list[str]) -> pandas.DataFrame:
    """Count texts by actual (rows) and predicted (columns) class, both in the order of `labels`."""
    table = read_table(path, "actual", "predicted")
    counts = table.value_counts(["actual", "predicted"]).unstack(fill_value=0)
    return counts.reindex(index=labels, columns=labels, fill_value=0)
