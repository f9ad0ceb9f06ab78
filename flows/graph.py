"""The DVC graph, read through DVC's own library; nothing else in Headroom reads `dvc.yaml` or `dvc.lock`.

DVC alone decides whether a stage must run. What is added here is words: why it must, and what would follow.
"""

from __future__ import annotations

import hashlib
import shlex
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flows.environment import prepare
from stages.core.errors import UserError

GRAPH_FILE = Path("dvc.yaml")
LOCK_FILE = Path("dvc.lock")

State = Literal["cached", "restore", "changed"]
Outlook = Literal["cached", "restore", "run", "probably", "always"]

_one_at_a_time = threading.RLock()  # DVC's objects are not made for threads


@dataclass(frozen=True)
class Stage:
    """One stage of the graph, as declared and as last recorded."""

    name: str
    """As DVC addresses it: `prune`, `export@quantize`."""
    parents: tuple[str, ...]
    command: str
    description: str
    dependencies: tuple[str, ...]
    """Files and folders it reads."""
    params: tuple[str, ...]
    """Sections of `params.yaml` it reads."""
    outputs: tuple[str, ...]
    measures: bool
    """Whether it times the machine, so that nothing may run beside it."""
    always: bool
    """Whether it runs every time, whatever DVC thinks."""
    fingerprint: str | None
    """MD5 of its outputs in `dvc.lock`; None before the first run."""
    size: int | None
    """Bytes of its outputs in `dvc.lock`."""

    @property
    def folder(self) -> Path:
        """Where its output lies."""
        return Path(self.outputs[0])


@dataclass(frozen=True)
class Status:
    """What DVC says about a stage right now."""

    state: State
    """restore: unchanged, but its output is gone from the workspace and still in DVC's cache."""
    reasons: tuple[str, ...]
    """What differs from the last run, in words."""


@dataclass(frozen=True)
class Forecast:
    """What a run would do with a stage."""

    outlook: Outlook
    """probably: it stands below a stage that runs, and runs too unless that one makes the same output again."""
    reasons: tuple[str, ...]


class Graph:
    """The stages in an order in which they can run."""

    def __init__(self, stages: Sequence[Stage]):
        self.stages = tuple(stages)
        self._by_name = {stage.name: stage for stage in stages}

    def stage(self, name: str) -> Stage:
        """Return the stage of that name."""
        return self._by_name[name]

    def up_to(self, target: str | None) -> list[Stage]:
        """Return the stages needed for `target`, itself included, in order; all of them for None.

        Raises:
            UserError: if there is no such stage.
        """
        if target is None:
            return list(self.stages)
        needed = {name for name in self._by_name if name == target or name.split("@")[0] == target}
        if not needed:
            raise UserError(f"{GRAPH_FILE}: has no stage {target!r}; the stages are: {', '.join(self._by_name)}")
        for stage in reversed(self.stages):
            if stage.name in needed:
                needed.update(stage.parents)
        return [stage for stage in self.stages if stage.name in needed]


def require_project() -> None:
    """Make sure that the working directory is a project.

    Raises:
        UserError: if it is not.
    """
    if not GRAPH_FILE.exists():
        raise UserError(f"{Path.cwd()}: has no {GRAPH_FILE}; run in the folder of a Headroom project")


def read_graph() -> Graph:
    """Read the graph of the project in the working directory.

    Raises:
        UserError: if this is no project, or its graph cannot be read.
    """
    with _repository() as repository:
        return _graph_of(repository)


def status_of(name: str) -> Status:
    """Ask DVC whether a stage must run, as things are on disk now.

    Raises:
        UserError: if the graph cannot be read.
    """
    with _repository() as repository:
        return _status(repository.stage.load_one(name=name))


def forecast(target: str | None = None) -> tuple[Graph, dict[str, Forecast]]:
    """Tell what a run up to `target` would do with each stage, without running any.

    A stage that always runs is tried out into a temporary folder: only what would change counts downstream.

    Raises:
        UserError: if the graph cannot be read, there is no such stage, or trying out a stage finds a user's mistake.
    """
    with _repository() as repository:
        graph = _graph_of(repository)
        forecasts: dict[str, Forecast] = {}
        ahead = _Ahead({}, [])
        for stage in graph.up_to(target):
            found = repository.stage.load_one(name=stage.name)
            forecasts[stage.name] = _forecast(stage, found, ahead)
    return graph, forecasts


def read_fingerprints() -> dict[str, str]:
    """Return the MD5 of each stage's outputs that `dvc.lock` records, by stage."""
    import yaml

    if not LOCK_FILE.exists():
        return {}
    stages = (yaml.safe_load(LOCK_FILE.read_text(encoding="utf-8")) or {}).get("stages", {})
    return {
        name: ",".join(out["md5"] for out in entry.get("outs", ()) if "md5" in out) for name, entry in stages.items()
    }


def stage_table() -> str:
    """Render the graph as the Markdown table of the README; the variants of a stage share a row.

    Raises:
        UserError: if the graph cannot be read.
    """
    rooms: dict[str, list[Stage]] = {}
    for stage in read_graph().stages:
        rooms.setdefault(stage.name.split("@")[0], []).append(stage)
    lines = ["| stage | what it does | needs | params |", "| --- | --- | --- | --- |"]
    for room, stages in rooms.items():
        needs = dict.fromkeys(parent.split("@")[0] for stage in stages for parent in stage.parents)
        lines.append(
            f"| `{room}` | {_shared_description(stages)} | {', '.join(needs) or '-'} "
            f"| {', '.join(f'`{name}`' for name in stages[0].params) or '-'} |"
        )
    return "\n".join(lines)


def _shared_description(stages: Sequence[Stage]) -> str:
    first = stages[0]
    _, mark, variant = first.name.partition("@")
    if not mark:
        return first.description
    variants = ", ".join(stage.name.partition("@")[2] for stage in stages)
    return f"{first.description.replace(f' {variant} ', ' *variant* ')}; variants: {variants}"


@contextmanager
def _repository() -> Iterator[Any]:
    """Open the project's DVC repository afresh, so that what is read is what is on disk; hold its lock meanwhile."""
    prepare()
    from dvc.exceptions import DvcException, NotDvcRepoError
    from dvc.repo import Repo

    require_project()
    with _one_at_a_time:
        try:
            with Repo(_wait_for_lock=True) as repository, repository.lock:
                yield repository
        except NotDvcRepoError:
            raise UserError(f"{Path.cwd()}: is not a DVC repository; `git init && dvc init` makes it one") from None
        except DvcException as error:
            raise UserError(f"{GRAPH_FILE}: DVC cannot read it: {_explain(error)}") from None


def _explain(error: BaseException | None) -> str:
    """Put an error and what caused it in one line."""
    parts = []
    while error is not None:
        parts.append(" ".join(str(error).split()))
        error = error.__cause__
    return "; ".join(part for part in parts if part)


def _graph_of(repository: Any) -> Graph:
    """Sort the stages so that parents come first; among the free ones the order of `dvc.yaml` holds."""
    import networkx

    index = repository.index
    place: dict[str, int] = {found.addressing: number for number, found in enumerate(index.stages)}
    parents = {
        found.addressing: tuple(
            sorted((parent.addressing for parent in index.graph.successors(found)), key=place.__getitem__)
        )
        for found in index.stages
    }
    graph = networkx.DiGraph((parent, name) for name, names in parents.items() for parent in names)
    graph.add_nodes_from(place)
    by_name = {found.addressing: found for found in index.stages}
    order = networkx.lexicographical_topological_sort(graph, key=place.__getitem__)
    return Graph([_describe(by_name[name], parents[name]) for name in order])


def _describe(found: Any, parents: tuple[str, ...]) -> Stage:
    params = [dependency for dependency in found.deps if _is_params(dependency)]
    sums = [out.hash_info.value for out in found.outs if out.hash_info.value]
    sizes = [out.meta.size for out in found.outs if out.hash_info.value and out.meta.size is not None]
    return Stage(
        name=found.addressing,
        parents=parents,
        command=found.cmd,
        description=found.desc or "",
        dependencies=tuple(str(dependency) for dependency in found.deps if not _is_params(dependency)),
        params=tuple(name for dependency in params for name in dependency.params),
        outputs=tuple(str(out) for out in found.outs),
        measures=bool((found.meta or {}).get("measures")),
        always=bool(found.always_changed),
        fingerprint=",".join(sums) or None,
        size=sum(sizes) if sizes else None,
    )


def _is_params(dependency: Any) -> bool:
    return hasattr(dependency, "read_params")


def _status(found: Any, restored: Sequence[str] = ()) -> Status:
    """Judge a stage; inputs that are gone but among the `restored` paths count as there again."""
    inputs = [*_command_reasons(found), *(reason for dep in found.deps for reason in _dependency_reasons(dep))]
    inputs = [reason for reason in inputs if not any(_mentions(reason, path, "deleted") for path in restored)]
    outputs = {name: state for out in found.outs for name, state in out.status().items()}
    reasons = (*inputs, *(f"{name} is {state}" for name, state in outputs.items()))
    if not reasons:
        return Status("cached", ())
    gone_only = not inputs and set(outputs.values()) == {"deleted"}
    if gone_only and not any(out.changed_cache() for out in found.outs):
        return Status("restore", reasons)
    return Status("changed", reasons if any(out.hash_info.value for out in found.outs) else ("never ran here",))


def _command_reasons(found: Any) -> list[str]:
    return ["its command or paths in dvc.yaml changed"] if found.changed_stage() else []


def _dependency_reasons(dependency: Any) -> list[str]:
    if not _is_params(dependency):
        return [f"{name} is {state}" for name, state in dependency.status().items()]
    status = dependency.status().get(str(dependency), {})
    if not isinstance(status, dict):
        return [f"{dependency} is {status}"]
    before, now = dependency.hash_info.value or {}, dependency.read_params()
    return [reason for name in status for reason in _value_reasons(name, before.get(name), now.get(name))]


def _value_reasons(name: str, before: Any, now: Any) -> list[str]:
    """Name the values that differ, as deep as they lie."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = dict.fromkeys([*before, *now])
        return [
            reason
            for inner in names
            if before.get(inner) != now.get(inner)
            for reason in _value_reasons(f"{name}.{inner}", before.get(inner), now.get(inner))
        ]
    return [f"{name}: {_short(before)} -> {_short(now)}"]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


@dataclass
class _Ahead:
    """What the stages looked at so far would do to their outputs."""

    made: dict[str, str]
    """Path of an output that may change, to the stage that makes it."""
    restored: list[str]


def _forecast(stage: Stage, found: Any, ahead: _Ahead) -> Forecast:
    if stage.always:
        ahead.made.update(dict.fromkeys(_would_change(stage, found), stage.name))
        return Forecast("always", ("runs every time",))
    above = dict.fromkeys(
        name for path in stage.dependencies for output, name in ahead.made.items() if _overlap(path, output)
    )
    status = _status(found, ahead.restored)
    if status.state == "cached" and not above:
        return Forecast("cached", ())
    if status.state == "restore" and not above:
        ahead.restored.extend(stage.outputs)
        return Forecast("restore", status.reasons)
    own = [reason for reason in status.reasons if not any(_mentions(reason, path) for path in ahead.made)]
    ahead.made.update(dict.fromkeys(stage.outputs, stage.name))
    if status.state == "changed" and own:
        return Forecast("run", tuple(own))
    return Forecast("probably", tuple(f"{name} runs before it" for name in above))


def _mentions(reason: str, path: str, state: str = "") -> bool:
    """Tell whether a reason says of this path, or of one in or around it, that it is in some state."""
    name, mark, found = reason.partition(" is ")
    return bool(mark) and found.startswith(state) and _overlap(name, path)


def _overlap(one: str, other: str) -> bool:
    first, second = Path(one), Path(other)
    return first == second or first in second.parents or second in first.parents


def _would_change(stage: Stage, found: Any) -> list[str]:
    """Run a stage's command into a temporary folder; return the outputs that would not be as `dvc.lock` has them."""
    words = shlex.split(stage.command)
    if "--out" not in words:
        return list(stage.outputs)
    place = words.index("--out") + 1
    target = Path(words[place])
    with tempfile.TemporaryDirectory() as folder:
        trial = [*words[:place], folder, *words[place + 1 :]]
        trial[0] = sys.executable if trial[0] == "python" else trial[0]
        done = subprocess.run(trial, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise UserError(done.stderr.strip() or f"{stage.name}: `{stage.command}` failed with {done.returncode}")
        made = {str(out): Path(folder, Path(str(out)).relative_to(target)) for out in found.outs}
        return [str(out) for out in found.outs if _md5(made[str(out)]) != out.hash_info.value]


def _md5(path: Path) -> str | None:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() if path.is_file() else None
