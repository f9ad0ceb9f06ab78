"""`python -m flows.history`, the stage `history`: the champions before this model, from the MLflow registry.

Goes in: the exported model. Comes out: `champions.csv`, a line for every model of the registry that became champion,
oldest first, but for the model at hand, which the report draws from its own evaluation; and in `metrics.json` the `day`
that counts for that model, on which it was registered first or, if it never was, this one. Leaving the model out keeps
a second run still: registering it does not change the history that its report was made from.

It runs when the final model or the `tracking` section changes. A registry that cannot be reached gives an empty
table and `reached: 0`, and the run goes on; `dvc repro --force --single-item history` asks again.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from flows.registry import ALIAS, CHAMPION, MACHINE, MODEL, TEXTS_PER_SECOND, Contender, connect
from stages.core.artifacts import digest
from stages.core.champions import CHAMPIONS, Champion, write_champions
from stages.core.errors import UserError
from stages.core.observe.tracking import tracking_uri
from stages.core.stage import StageRun, command


def run_history(run: StageRun) -> dict[str, Any]:
    """Write the earlier champions; the body of the stage."""
    name = run.params.tracking.model_name
    try:
        known, reached = read_history(connect(tracking_uri(run.params)), name), True
    except UserError as problem:
        run.say(f"{problem}; the report goes without a history")
        known, reached = {}, False
    own = known.pop(digest(run.inputs["model"]), None)
    write_champions(run.staging / CHAMPIONS, list(known.values()))
    run.say(f"{name}: {len(known)} champions before this model")
    day = own.day if own else datetime.now(UTC).date()
    return {"champions": len(known), "reached": int(reached), "day": day.isoformat()}


def read_history(client: Any, name: str) -> dict[str, Champion]:
    """Champions of a registered model by digest, oldest first; of versions of the same model the first counts.

    Raises:
        UserError: if the registry stops answering.
    """
    from mlflow.exceptions import MlflowException

    try:
        versions = sorted(_versions(client, name), key=lambda version: int(version.version))
    except MlflowException as problem:
        raise UserError(f"MLflow's registry cannot be read ({' '.join(str(problem).split())[:200]})") from None
    first: dict[str, Any] = {}
    for version in versions:
        first.setdefault(version.tags[MODEL], version)
    return {model: _champion(version) for model, version in first.items()}


def _versions(client: Any, name: str) -> Iterator[Any]:
    """Versions that became champion and tell how fast they were; earlier ones of this stage did not."""
    found, page = [], None
    while page != "":
        answer = client.search_model_versions(f"name = '{name}'", page_token=page)
        found.extend(answer)
        page = answer.token or ""
    for version in found:
        if version.tags.get(ALIAS) == CHAMPION and {MODEL, TEXTS_PER_SECOND, MACHINE} <= set(version.tags):
            yield version


def _champion(version: Any) -> Champion:
    measured = Contender.from_tags(version.tags)
    return Champion(
        version=int(version.version),
        day=datetime.fromtimestamp(version.creation_timestamp / 1000, UTC).date(),
        metric=measured.metric,
        quality=measured.quality,
        texts_per_second=float(version.tags[TEXTS_PER_SECOND]),
        speedup=measured.speedup,
        machine=version.tags[MACHINE],
        test_split=measured.test_split,
    )


if __name__ == "__main__":
    command("history", run_history, inputs=("model",))
