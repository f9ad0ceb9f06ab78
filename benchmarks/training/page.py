"""The measured half of docs/training.md: what stands between its markers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy

from benchmarks.training.profile import KINDS
from benchmarks.training.summary import FinetuneRow, PretrainRow, Target, loss_difference, reached_ratio
from stages.core.timing import ratios

MARKER = "bench-training"


def render(
    pretrain: Sequence[PretrainRow],
    finetune: Sequence[FinetuneRow],
    reached: Sequence[Target],
    result: Mapping[str, Any],
) -> str:
    """Write the measured half.

    Args:
        pretrain: rows, in the order of the table.
        finetune: rows, in the order of the table.
        reached: targets as far as measured.
        result: all that was measured; see `benchmarks.training.__main__`.
    """
    parts = [_conditions(result), _targets(reached)]
    if pretrain:
        parts += [_pretraining(pretrain, result), _ceiling(pretrain, result)]
    if finetune:
        parts.append(_finetuning(finetune, result))
    if result["profiles"]:
        parts.append(_profiles(result))
    parts += [f"Failed: {name}: {' '.join(error.split())}" for name, error in result["failures"].items()]
    return "\n\n".join(part for part in parts if part)


def _conditions(result: Mapping[str, Any]) -> str:
    hardware = result["hardware"]
    cpu = hardware["cpu"]
    threads = ", ".join(f"{name}={value}" for name, value in result["threads"].items())
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (
        f"`{result['command']}`, {result['date']}, on {cpu['model']}, {cpu['logical_cores']} processors "
        f"({', '.join(cpu['features'])}), {hardware['memory_gib']} GiB, {hardware['system']['os']}, "
        f"Python {hardware['system']['python']}; {versions}. {result['rounds']} rounds, "
        f"{result['minutes']:.0f} minutes. Other processes used {100 * result['other_load']:.0f} % of the processors "
        "meanwhile." + (f" Set for all: {threads}." if threads else "")
    )


def _targets(reached: Sequence[Target]) -> str:
    if not reached:
        return ""
    lines = [
        f"| {each.what} | {each.wanted} | {_spread(each.ratio)} | {'yes' if each.met else '**no**'} |"
        for each in reached
    ]
    return "\n".join(["| target | wanted | measured | reached |", "| --- | --- | --- | --- |", *lines])


def _pretraining(rows: Sequence[PretrainRow], result: Mapping[str, Any]) -> str:
    facts, shared = result["facts"]["pretrain"], result["shared"]
    mine = next((row for row in rows if row.contender.headroom), None)
    lines = [_pretrain_line(row, mine) for row in rows]
    return "\n".join(
        [
            "### Pretraining",
            "",
            f"Masked language model, {facts['steps']} steps of about {shared['pretrain_batch_tokens']:,} tokens at "
            f"length {facts['length']}, {shared['precision']}, {100 * shared['mask_probability']:.0f} % of the tokens "
            f"hidden, AdamW at {shared['pretrain_learning_rate']:g} with {100 * shared['warmup']:.0f} % warm-up and "
            f"linear decay. {facts['texts']:,} texts of the corpus, {facts['mean_tokens']:.1f} tokens each, cut at "
            f"{facts['length'] - 2}. Tokens are those of the texts: padding and special tokens do not count. The loss "
            f"is of {facts['heldout_texts']} held-out texts, the same tokens hidden for everybody, one text a row and "
            "(second) joined to blocks; its difference is ours less theirs with the same seeds, and beside it stands "
            "how far our own seeds lie apart.",
            "",
            "| | tokens/s | Headroom is | not text | tokens a step | held-out loss | in blocks | ours less theirs "
            "| peak memory, MiB | less imports, MiB | of the bf16 ceiling |",
            "| --- |" + " --- |" * 10,
            *lines,
        ]
    )


def _pretrain_line(row: PretrainRow, mine: PretrainRow | None) -> str:
    difference = loss_difference(mine.heldout, row.heldout) if mine and row is not mine else None
    times = ratios(mine.tokens_per_second, row.tokens_per_second) if mine and row is not mine else None
    cells = [
        _title(row),
        _values(row.tokens_per_second, ",.0f"),
        f"{_spread(times)} x" if times else "",
        f"{100 * row.padding:.0f} %",
        f"{row.tokens_per_step:,.0f}",
        _values(list(row.heldout.values()), ".3f"),
        _values(list(row.blocks.values()), ".3f"),
        f"{difference['mean']:+.3f} ({difference['low']:+.3f} to {difference['high']:+.3f}); "
        f"seeds {difference['spread']:.3f}"
        if difference
        else "",
        _values(row.memory_mb, ",.0f"),
        f"{numpy.median(row.memory_mb) - numpy.median(row.imports_mb):,.0f}",
        f"{100 * float(numpy.median(row.ceiling)):.0f} %",
    ]
    return f"| {' | '.join(cells)} |"


def _ceiling(rows: Sequence[PretrainRow], result: Mapping[str, Any]) -> str:
    facts = result["facts"]["pretrain"]
    square = float(numpy.median([each["square"] for each in result["ceilings"]]))
    shapes = float(numpy.median([each["shapes"] for each in result["ceilings"]]))
    own = ", ".join(f"{row.contender.title} {100 * float(numpy.median(row.shapes_ceiling)):.0f} %" for row in rows)
    return (
        f"The bf16 ceiling: products of square matrices of 2,048 reach {square:.0f} billion operations a second "
        f"(median of the rounds). The products of this model's own shapes, one after the other and nothing between "
        f"them, reach {shapes:.0f}; of that, needed operations make up: {own}. Needed are 6 operations a weight and "
        f"token, the head's only at hidden tokens, and attention inside a text ({facts['context']:.0f} tokens of "
        "context on average). An engine gets nothing for what it computes beyond."
    )


def _finetuning(rows: Sequence[FinetuneRow], result: Mapping[str, Any]) -> str:
    facts, shared = result["facts"]["finetune"], result["shared"]
    mine = next((row for row in rows if row.contender.headroom), None)
    return "\n".join(
        [
            "### Fine-tuning",
            "",
            f"{facts['labels']} labels, {facts['texts']:,} training texts of {facts['mean_tokens']:.1f} tokens, "
            f"scheduled for {shared['finetune_epochs']} epochs and stopped after {shared['finetuned_epochs']}, batches "
            f"of {shared['finetune_batch_texts']} texts (Headroom: {shared['finetune_batch_tokens']} tokens), "
            f"{shared['precision']}, AdamW at {shared['finetune_learning_rate']:g}, warm-up and decay as above. Every "
            f"{facts['judge_every']} steps the "
            f"clock stops and the model is judged on {facts['validation_texts']} validation texts. One such curve "
            f"jumps by a point from one judgement to the next; {100 * result['accuracy']:.1f} % accuracy is reached "
            f"where the mean curve of all {max(len(row.curves) for row in rows)} seeds first does. In brackets stands "
            "what leaving out one seed at a time makes of it. The whole process is from its start to its last step, "
            "imports and evaluations included.",
            "",
            f"| | seconds to {100 * result['accuracy']:.1f} % | Headroom is | accuracy then, % "
            "| whole process, s | tokens/s | Headroom is | not text | peak memory, MiB |",
            "| --- |" + " --- |" * 8,
            *(_finetune_line(row, mine) for row in rows),
        ]
    )


def _finetune_line(row: FinetuneRow, mine: FinetuneRow | None) -> str:
    sooner = reached_ratio(mine, row) if mine and row is not mine else None
    times = ratios(mine.tokens_per_second, row.tokens_per_second) if mine and row is not mine else None
    seconds = row.seconds()
    cells = [
        _title(row),
        "not reached" if seconds is None else f"{seconds:.1f}",
        f"{_spread(sooner)} x" if sooner else "",
        _values([100 * curve[-1][2] for curve in row.curves if curve], ".1f"),
        _values(row.process_seconds, ".1f"),
        _values(row.tokens_per_second, ",.0f"),
        f"{_spread(times)} x" if times else "",
        f"{100 * row.padding:.0f} %",
        _values(row.memory_mb, ",.0f"),
    ]
    return f"| {' | '.join(cells)} |"


def _profiles(result: Mapping[str, Any]) -> str:
    tasks = dict.fromkeys(each["task"] for each in result["profiles"].values())
    parts = [
        "### Where the time of a step goes",
        "PyTorch's profiler, time of the operations themselves. Those of the thread that prepares the next batch count "
        "too, so that a column can add up to more than its step, and Python between operations is in none.",
        *(_profile([each for each in result["profiles"].values() if each["task"] == task]) for task in tasks),
    ]
    return "\n\n".join(parts)


def _profile(profiles: Sequence[Mapping[str, Any]]) -> str:
    count = profiles[0]["steps"]
    task = {"pretrain": "pretraining", "finetune": "fine-tuning"}[profiles[0]["task"]]
    header = " | ".join(each["title"] for each in profiles)
    lines = [
        f"| {kind} | {' | '.join(_profile_cell(each, each['kinds'][kind]) for each in profiles)} |" for kind in KINDS
    ]
    steps = " | ".join(f"{1e3 * each['step_seconds']:,.0f} ms" for each in profiles)
    return "\n".join(
        [
            f"| {task}, {f'mean of {count} steps' if count > 1 else 'one step'} | {header} |",
            "| --- |" + " --- |" * len(profiles),
            *lines,
            f"| the step | {steps} |",
        ]
    )


def _profile_cell(profile: Mapping[str, Any], seconds: float) -> str:
    return f"{1e3 * seconds:,.0f} ms, {100 * seconds / profile['step_seconds']:.0f} %"


def _title(row: PretrainRow | FinetuneRow) -> str:
    return f"**{row.contender.title}**" if row.contender.headroom else row.contender.title


def _values(values: Sequence[float], form: str) -> str:
    """Median, with the least and greatest where there are several."""
    if not values:
        return ""
    middle = f"{float(numpy.median(values)):{form}}"
    return middle if len(values) == 1 else f"{middle} ({min(values):{form}} to {max(values):{form}})"


def _spread(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
