"""From the raw data to the model: what every stage was given, by digest, and whether that is what stands there now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.core.artifacts import MANIFEST, digest, read_json
from stages.core.ladder import CHAIN, TITLES, VARIANTS
from stages.core.observe.tracking import flatten
from stages.core.params import Params
from stages.core.stage import MEASURED
from stages.report.sections import Section
from stages.report.sources import Inputs, final_variant

_STAGES = (
    *("acquire", "clean", "tokenize", "pretrain", "finetune", "distill", "latency_table", "prune"),
    *("quantize", "quantize_finetuned"),
    *(f"export@{variant}" for variant in (*CHAIN, "quantize_finetuned")),
    "cascade",
    *(f"evaluate@{variant}" for variant in VARIANTS),
    "deploy_check",
)
"""In the order in which they run; others follow as the graph gives them."""


@dataclass(frozen=True)
class Unit:
    """A part of a stage's output that others read."""

    stage: str
    name: str
    digest: str
    """SHA-256 of the unit's manifest."""

    @property
    def title(self) -> str:
        """As its folder is called."""
        return f"{self.stage}/{self.name}"


@dataclass(frozen=True)
class Given:
    """What a stage noted of one of its inputs when it ran."""

    role: str
    digest: str
    source: str | None
    """The unit that has this digest now; None where none does."""


@dataclass(frozen=True)
class Link:
    """One stage: what it was given, and what it made."""

    stage: str
    given: list[Given]
    made: list[Unit]
    whole: str
    """Digest of all that the stage left behind, for those that read the whole of it."""


def section(inputs: Inputs, params: Params) -> Section:
    """Tell the lineage; an input that is no more what it was is an alarm."""
    links = lineage(inputs)
    changed = [f"{link.stage} ({given.role})" for link in links for given in link.given if given.source is None]
    # An evaluation also reads models that it compares with: the way is that of the model, and ends in its evaluation.
    trail = trail_to(f"export@{final_variant(inputs)}", links) | {f"evaluate@{final_variant(inputs)}"}
    units = sum(len(link.made) for link in links)
    checked = sum(len(link.given) for link in links)
    summary = f"{units} units with their digests; all {checked} inputs are what stands there now."
    if changed:
        summary = f"Inputs that are no more what the stage was given: {', '.join(changed)}."
    return Section(
        identifier="lineage",
        title="From raw data to model",
        summary=summary,
        context={
            "trail": [link for link in links if link.stage in trail],
            "aside": [link for link in links if link.stage not in trail],
            "links": links,
            "final": TITLES[final_variant(inputs)],
            "provenance": flatten(read_json(inputs["acquire"] / "provenance.json")),
        },
        alarm=bool(changed),
    )


def lineage(inputs: Inputs) -> list[Link]:
    """Follow every stage's inputs, as noted when it ran, to the units that stand there now.

    Raises:
        UserError: if a stage's `measured.json` is missing or malformed.
    """
    stages = [stage for stage in dict.fromkeys((*_STAGES, *inputs)) if stage in inputs]
    links: list[Link] = []
    for stage in stages:
        noted = read_json(inputs[stage] / MEASURED)["inputs"]
        given = [Given(role, sum_, _source(sum_, links)) for role, sum_ in noted.items()]
        links.append(Link(stage, given, _units(stage, inputs[stage]), digest(inputs[stage])))
    return links


def trail_to(stage: str, links: Sequence[Link]) -> set[str]:
    """Name the stage and all those whose units led to it."""
    by_stage = {link.stage: link for link in links}
    found: set[str] = set()
    waiting = [stage]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += [given.source.partition("/")[0] for given in by_stage[name].given if given.source]
    return found


def _source(wanted: str, links: Sequence[Link]) -> str | None:
    """The last unit, or whole output, made with this digest: a stage that hands a unit on makes it anew."""
    for link in reversed(links):
        titles = {link.whole: link.stage, **{unit.digest: unit.title for unit in link.made}}
        if wanted in titles:
            return titles[wanted]
    return None


def _units(stage: str, folder: Path) -> list[Unit]:
    """The parts of an output that carry a manifest of their own, by name."""
    found = sorted(path.parent for path in folder.glob(f"*/{MANIFEST}"))
    return [Unit(stage, path.name, digest(path)) for path in found]
