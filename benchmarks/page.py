"""docs/benchmarks.md, made from the results of every task measured so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.summary import Row, Victory

MEBI = 2**20
_HEADER = (
    "| | {metric} | against fine-tuned, points | p50, ms | p99, ms | texts/s | over PyTorch | file, MiB "
    "| peak memory, MiB | compressing, minutes | batch |\n| --- |" + " --- |" * 10
)
_INTRODUCTION = """# Benchmarks

Headroom beside the tools that people use today, on one machine, in one run: the same fine-tuned checkpoint, the same
test texts, each tool in an environment of its own. `make bench` makes this page and its picture again.

![Throughput against quality, one panel a task](benchmarks.png)

How it is measured:

- Every contender runs in a process of its own and is timed inside it, from text to label, tokenization included.
- They take turns: in each round every contender answers the same texts once, in an order drawn anew. Who is not at work
  is stopped (SIGSTOP), so that threads which wait by spinning disturb nobody, and each runtime waits as it does by
  itself.
- Speeds are medians of the rounds, the least and greatest round in brackets. p50 and p99 are of single texts.
- Everybody may sort texts by length and gets the fastest of the batch sizes 8, 32 and 128, except the two plain PyTorch
  rows, which answer texts as they come in batches of 32. All use the same Rust tokenizer; OpenVINO keeps several
  requests in flight.
- Quality is on the whole test split; its difference to the fine-tuned model in PyTorch carries a paired bootstrap
  interval (95 %).
- Peers calibrate on 512 training texts. Minutes are those of the peer's whole process; Headroom's are its stages' own
  clocks from after fine-tuning to the export, training of the student included.
- A file is weights and graph, without the tokenizer. Peak memory is that of the process that serves many texts.
- Optimum's O4 is its O3 in half precision, which it does only on a GPU, so that it has no row here.
"""


def render_page(sections: Mapping[str, str]) -> str:
    """Put the sections of the tasks under the introduction."""
    return "\n".join([_INTRODUCTION, *(f"## {name}\n\n{text}" for name, text in sections.items())])


def render_section(rows: Sequence[Row], wins: Sequence[Victory], reference: Row, facts: Mapping[str, Any]) -> str:
    """Write a task's section.

    Args:
        rows: of the table.
        wins: of Headroom's best over the rest.
        reference: the row that speeds are divided by.
        facts: `command`, `date`, `metric`, `floor`, `rounds`, `texts`, `test_texts`, `minutes`, `other_load`,
            `hardware`, `versions` by peer, `threads`, `ceilings`, `used`.
    """
    parts = [
        _conditions(facts),
        "\n".join([_HEADER.format(metric=facts["metric"]), *(table_line(row, reference) for row in rows)]),
        _failures(rows),
        _wins(wins, facts["floor"]),
        _ceilings(facts["ceilings"], facts["used"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def table_line(row: Row, reference: Row) -> str:
    """One contender's line."""
    if row.error:
        return f"| {row.title} | failed: {_cell(row.error)} |" + " |" * 9
    title = f"**{row.title}**" if row.headroom else row.title
    cells = [
        title,
        f"{100 * row.quality:.1f} %",
        "" if row.name == reference.name else difference(row),
        f"{row.p50:.2f}",
        f"{row.p99:.2f}",
        f"{_rate(row.texts_per_second)} ({_rate(min(row.throughput))} to {_rate(max(row.throughput))})",
        f"{row.texts_per_second / reference.texts_per_second:.2f}",
        f"{row.model_bytes / MEBI:.1f}",
        f"{row.peak_memory_mb:.0f}",
        "" if row.compress_minutes is None else f"{row.compress_minutes:.1f}",
        str(row.batch_size),
    ]
    return f"| {' | '.join(cells)} |"


def difference(row: Row) -> str:
    """Points of quality gained or lost, with the interval."""
    return f"{_points(row.difference)} ({_points(row.low)} to {_points(row.high)})"


def _conditions(facts: Mapping[str, Any]) -> str:
    cpu = facts["hardware"]["cpu"]
    versions = "; ".join(
        f"{peer}: {', '.join(f'{name} {version}' for name, version in packages.items())}"
        for peer, packages in facts["versions"].items()
    )
    threads = ", ".join(f"{name}={value}" for name, value in facts["threads"].items())
    # Results that an earlier version kept do not tell how long they took.
    took = f"All of it took {facts['minutes']:.0f} minutes. " if "minutes" in facts else ""
    lines = [
        f"`{facts['command']}`, {facts['date']}, on {cpu['model']}, {cpu['logical_cores']} processors "
        f"({', '.join(cpu['features'])}), {facts['hardware']['memory_gib']} GiB, "
        f"{facts['hardware']['system']['os']}, Python {facts['hardware']['system']['python']}. "
        f"{facts['rounds']} rounds of {facts['texts']:,} texts, {facts['test_texts']:,} texts in the test split, "
        f"{facts['tokens']:.1f} tokens a text.",
        f"{took}Other processes used {100 * facts['other_load']:.0f} % of the processors meanwhile."
        + (f" Set for all: {threads}." if threads else ""),
        f"Versions: {versions}.",
    ]
    return "\n\n".join(lines)


def _failures(rows: Sequence[Row]) -> str:
    count = sum(bool(row.error) for row in rows)
    return f"{count} of {len(rows)} contenders could not take part; their rows say why." if count else ""


def _wins(wins: Sequence[Victory], floor: float) -> str:
    if not wins:
        return f"No model of Headroom is within {100 * floor:.1f} points of the fine-tuned one."
    lines = [
        f"Best against best, among those that lose at most {100 * floor:.1f} points (median of the rounds, least and "
        "greatest in brackets):",
        "",
        "| | best of Headroom | against | times better |\n| --- | --- | --- | --- |",
        *(
            f"| {win.what} | {win.winner} | {win.over} | {win.median:.2f} ({win.low:.2f} to {win.high:.2f}) |"
            for win in wins
        ),
    ]
    return "\n".join(lines)


def _ceilings(ceilings: Mapping[str, float], used: Mapping[str, Any] | None) -> str:
    lines = [
        "The machine's ceilings, measured after the rounds: products of square matrices of 2,048 reach "
        f"{ceilings['fp32']:.0f} billion operations a second in fp32, {ceilings['bf16']:.0f} in bf16, "
        f"{ceilings['int8']:.0f} in int8; memory copies {ceilings['bandwidth']:.1f} GB/s.",
    ]
    if used:
        lines.append(
            f"{used['title']} needs {used['operations'] / 1e6:.1f} million operations a text, so that it does "
            f"{used['rate'] / 1e9:.1f} billion a second: {100 * used['share']:.0f} % of the {used['precision']} "
            "ceiling, tokenization and everything else included in its time."
        )
    return " ".join(lines)


def _points(share: float) -> str:
    sign = "−" if round(100 * share, 1) < 0 else "+" if round(100 * share, 1) > 0 else ""
    return f"{sign}{abs(100 * share):.1f}"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())
