"""The table of all that was measured: means and spreads over seeds, differences to plain fine-tuning, time."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scipy.stats import t as student_t

from benchmarks.methods.declared import METHODS, PLAIN, Method

Lines = Sequence[Mapping[str, Any]]
_CONFIDENCE = 0.95


def render(lines: Lines, hardware: Mapping[str, Any]) -> str:
    """Write what was measured: how, a table with a row for each method and four columns for each task, and the params.

    Args:
        lines: of `results.jsonl`. Of a task, those count that share inputs and params with its last one.
        hardware: of `describe_hardware`.
    """
    tasks = {task: latest(lines, task) for task in dict.fromkeys(line["task"] for line in lines)}
    measured = {name for results in tasks.values() for name, _ in results}
    methods = [method for method in METHODS if method.name in measured]
    heads = ["method"]
    for task in tasks:
        heads += [f"{task}: accuracy, %", "macro F1, %", "against plain, points", "time"]
    gains = _table(heads, [_row(method, list(tasks.values())) for method in methods])
    settings = _table(["method", "params of `finetune`"], [[each.title, _changes(each)] for each in methods])
    how = "\n".join(_how(task, results, hardware) for task, results in tasks.items())
    return f"{how}\n\n{gains}\n\n{settings}\n"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [heads, ["---"] * len(heads), *rows])


def _how(task: str, results: Mapping[tuple[str, int], Mapping[str, Any]], hardware: Mapping[str, Any]) -> str:
    """How the trainings of a task were done, in one line."""
    last = list(results.values())[-1]
    commands = ", ".join(dict.fromkeys(f"`{line['command']}`" for line in results.values()))
    texts = f"{last['texts']:,} training texts, drawn once for all" if last.get("texts") else "all training texts"
    seeds = len({seed for _, seed in results})
    return (
        f"- {task}: {commands}, {last['date']}, on {hardware['cpu']['model']}; threads a training: "
        f"{last['threads']}; seeds: {seeds}; epochs: {last['epochs']} at most; {texts}."
    )


def latest(lines: Lines, task: str) -> dict[tuple[str, int], Mapping[str, Any]]:
    """Results of a task by method and seed, all from the same inputs and params as its last line."""
    own = [line for line in lines if line["task"] == task]
    return {(line["method"], line["seed"]): line for line in own if line["base"] == own[-1]["base"]}


def _row(method: Method, tasks: Sequence[Mapping[tuple[str, int], Mapping[str, Any]]]) -> list[str]:
    cells = [method.title]
    for results in tasks:
        own, plain = _of(results, method.name), _of(results, PLAIN)
        accuracy = [line["test"]["accuracy"] for line in own.values()]
        f1 = [line["test"]["f1_macro"] for line in own.values()]
        cells += [spread(accuracy), spread(f1)]
        seeds = [seed for seed in own if seed in plain]
        if method.name == PLAIN or not seeds:
            cells += ["", ""]
            continue
        differences = [own[seed]["test"]["accuracy"] - plain[seed]["test"]["accuracy"] for seed in seeds]
        times = [sum(of[seed]["processor_minutes"] for seed in seeds) for of in (own, plain)]
        cells += [difference(differences), f"{times[0] / times[1]:.2f} x"]
    return cells


def _of(results: Mapping[tuple[str, int], Mapping[str, Any]], name: str) -> dict[int, Mapping[str, Any]]:
    return {seed: line for (method, seed), line in results.items() if method == name}


def _changes(method: Method) -> str:
    shown = [f"`{path.removeprefix('finetune.')}: {_value(value)}`" for path, value in method.changes.items()]
    return "<br>".join(shown)


def _value(value: Any) -> str:
    """A value as one would write it into params.yaml."""
    return json.dumps(value).replace('"', "")


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds, in percent; empty where nothing was measured."""
    if not values:
        return ""
    mean = f"{100 * statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.2f}"


def difference(differences: Sequence[float]) -> str:
    """Mean of differences paired by seed, in points, with Student's 95 % interval where there are two seeds or more."""
    mean = statistics.mean(differences)
    if len(differences) == 1:
        return f"{100 * mean:+.2f}"
    low, high = interval(differences)
    return f"{100 * mean:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Student's 95 % interval of a mean of paired differences; of two values at least."""
    count, mean = len(differences), statistics.mean(differences)
    reach = student_t.ppf(0.5 + _CONFIDENCE / 2, count - 1) * statistics.stdev(differences) / count**0.5
    return mean - float(reach), mean + float(reach)
