"""The curves of every stage that trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas
from matplotlib.figure import Figure

from stages.core.params import Params
from stages.core.stage import HISTORY
from stages.report import plots
from stages.report.drawing import style
from stages.report.sections import Section
from stages.report.sources import Inputs, read_metrics, read_numbers

_STAGES = {
    "pretrain": "Pretraining",
    "finetune": "Fine-tuning",
    "distill": "Distillation",
    "prune": "Recovery after pruning",
}
"""Stages that may train, in order."""


def section(inputs: Inputs, params: Params) -> Section | None:
    """Tell how the training went."""
    found = {stage: inputs[stage] for stage in _STAGES if stage in inputs}
    if not found:
        return None
    histories = {stage: history(path / HISTORY) for stage, path in found.items() if (path / HISTORY).exists()}
    trained = ", ".join(_STAGES[stage].lower() for stage in histories)
    return Section(
        identifier="training",
        title="Training",
        summary=f"Curves of {trained}." if trained else "No stage trained anything.",
        context={
            "stages": [
                _told(stage, histories.get(stage), read_metrics(inputs, stage) if stage == "finetune" else {})
                for stage in found
            ],
            "sparsity": _sparsity(read_metrics(inputs, "prune")) if "prune" in inputs else None,
        },
        figures={f"curves_{stage}": _curves(stage, table) for stage, table in histories.items()},
        descriptions={
            f"curves_{stage}": f"Training and held-out loss over the steps of {_STAGES[stage].lower()}"
            for stage in histories
        },
    )


def history(path: Path) -> pandas.DataFrame:
    """Read a stage's curves; steps that start again, as in a second training, go on counting."""
    table = read_numbers(path, "step", "train_loss")
    restart = table["step"].shift(fill_value=0).where(table["step"].diff() <= 0, 0)
    return table.assign(step=table["step"] + restart.cumsum())


def _curves(stage: str, table: pandas.DataFrame) -> Figure:
    column, label = ("heldout_loss", "held out") if stage == "pretrain" else ("validation_loss", "validation")
    with style("draw"):
        return plots.curves(table, column, label)


def _told(stage: str, table: pandas.DataFrame | None, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's name and picture, the best value of its curves, and what its repeats and own labels gave."""
    if table is None:
        return {"title": _STAGES[stage], "picture": None, "note": "Trained nothing: handed its model on."}
    if "validation_accuracy" in table and table["validation_accuracy"].notna().any():
        note = f"Best validation accuracy {table['validation_accuracy'].max():.1%}"
    elif "heldout_loss" in table and table["heldout_loss"].notna().any():
        losses = table["heldout_loss"].dropna()
        note = f"Held-out loss {losses.iloc[0]:.3f} to {losses.iloc[-1]:.3f}"
    else:
        note = f"Training loss {table['train_loss'].dropna().iloc[-1]:.3f}"
    return {
        "title": _STAGES[stage],
        "picture": f"curves_{stage}",
        "note": " ".join([f"{note}, {table['step'].max():,.0f} steps.", *_repeats(metrics)]),
    }


def _repeats(metrics: Mapping[str, Any]) -> list[str]:
    """Sentences on the trainings beyond the one, where there were any."""
    said = []
    for name, scores, what in (("seeds", "validation", "on validation"), ("folds", "held_out", "held out")):
        found = metrics.get(name)
        if found:
            said.append(
                f"{len(found[scores])} {name}, {what}: {found['mean']:.1%} on average, "
                f"standard deviation {found['standard_deviation']:.1%}, "
                f"{found['minimum']:.1%} to {found['maximum']:.1%}."
            )
    own = metrics.get("self_training")
    if own:
        taken = ", ".join(f"{found['taken']:,}" for name, found in own["rounds"].items() if name != "0")
        said.append(f"Own labels on {taken} texts a round; kept is round {own['kept_round']}.")
    return said


def _sparsity(metrics: dict[str, Any]) -> str | None:
    """What zeros in full-sized layers bring, where pruning left some; None elsewhere."""
    sparse = metrics.get("sparse")
    if sparse is None:
        return None
    return f"{sparse['overall']:.0%} of the encoder's weights are zero ({sparse['method']}): {sparse['speed']}."
