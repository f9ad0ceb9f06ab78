"""The Hugging Face hub: data sets become Parquet files, model repositories a folder; no code of theirs is run."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stages.acquire.splits import split_of
from stages.core.errors import UserError
from stages.core.observe.progress import say
from stages.core.params import HubSource

CHECKPOINT_FILES = ("*.safetensors", "*.json", "*.txt", "*.model")
"""What is fetched of a model repository: never a pickle."""

_SECONDS_TO_WAIT = 15.0
_UNLABELLED = -1  # how data sets on the hub mark the labels of a hidden test split


def fetch_dataset(source: HubSource, folder: Path, where: str) -> tuple[dict[str, Path], dict[str, Any]]:
    """Fetch a data set and write each of its splits as a Parquet file; class numbers become class names.

    Args:
        source: repository, configuration and revision.
        folder: where the files go.
        where: name of the param, for messages.

    Returns:
        the files by name, and what is to be remembered of their origin.

    Raises:
        UserError: if the hub cannot be reached or has no such data set.
    """
    _quiet()
    with _explained(source, where, "data set"):
        import datasets  # takes a second to import, so not before it is needed

        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        say(f"acquire: fetching data set {source.name} from the hub")
        commit = _resolve(source)
        loaded = datasets.load_dataset(source.name, source.config, revision=commit or source.revision)
    folder.mkdir(parents=True)
    files, hidden = {}, []
    for split, rows in loaded.items():
        if _has_hidden_labels(rows):
            hidden.append(split)
            continue
        name = f"{split_of(split) or split}.parquet"
        _with_class_names(rows).to_parquet(folder / name)
        files[name] = folder / name
    return files, {"commit": commit, "splits": sorted(loaded), "splits_without_labels": hidden}


def fetch_model(source: HubSource, where: str) -> tuple[Path, dict[str, Any]]:
    """Fetch a model repository; return its folder in the hub's own cache, and what is to be remembered.

    Args:
        source: repository and revision.
        where: name of the param, for messages.

    Raises:
        UserError: if the hub cannot be reached or has no such model.
    """
    _quiet()
    with _explained(source, where, "model"):
        import huggingface_hub
        from huggingface_hub.utils.tqdm import disable_progress_bars

        if not sys.stderr.isatty():
            disable_progress_bars()
        say(f"acquire: fetching model {source.name} from the hub")
        patterns = list(CHECKPOINT_FILES)
        folder = Path(huggingface_hub.snapshot_download(source.name, revision=source.revision, allow_patterns=patterns))
    return folder, {"commit": folder.name}


def _quiet() -> None:
    """No telemetry, and the hub is asked only when a source names it."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def _resolve(source: HubSource) -> str | None:
    """Return the commit that a revision stands for; None where the user chose to work offline from the hub's cache.

    Asked first, because it fails at once where `datasets` would try for half a minute.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        return HfApi().dataset_info(source.name, revision=source.revision, timeout=_SECONDS_TO_WAIT).sha
    except OfflineModeIsEnabled:
        return None


@contextmanager
def _explained(source: HubSource, where: str, what: str) -> Iterator[None]:
    """Turn what the hub's libraries raise into one line; whatever else is raised is a fault and passes."""
    try:
        yield
    except Exception as error:
        expected = isinstance(error, OSError | ValueError | RuntimeError) or _is_of_the_hub(error)
        if not expected or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
            raise
        raise UserError(f"{where}: {what} {source.name} at {source.revision}: {_reason(error)}") from None


def _is_of_the_hub(error: BaseException) -> bool:
    """The HTTP client under the hub's library has changed its name before."""
    return type(error).__module__.partition(".")[0] in {"datasets", "huggingface_hub", "httpx", "httpx2", "requests"}


def _reason(error: BaseException) -> str:
    names = {kind.__name__ for cause in _causes(error) for kind in type(cause).__mro__}
    if names & {"RepositoryNotFoundError", "DatasetNotFoundError", "RevisionNotFoundError"}:
        return "the hub has no such repository or revision, or it is private (then log in with `hf auth login`)"
    if names & {
        "ConnectionError",
        "ConnectError",
        "OfflineModeIsEnabled",
        "LocalEntryNotFoundError",
        "TimeoutException",
    }:
        return "the hub cannot be reached; go online, or set kind to local or wheel"
    return " ".join(str(error).split())[:300]


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _class_columns(rows: Any) -> dict[str, Any]:
    return {name: feature for name, feature in rows.features.items() if type(feature).__name__ == "ClassLabel"}


def _has_hidden_labels(rows: Any) -> bool:
    return any(len(rows) and set(rows.unique(name)) <= {_UNLABELLED, None} for name in _class_columns(rows))


def _with_class_names(rows: Any) -> Any:
    """Replace class numbers by names, an unlabelled row's by none."""
    import datasets

    for name, feature in _class_columns(rows).items():
        numbers = rows[name]
        texts = [None if number in (None, _UNLABELLED) else feature.int2str(number) for number in numbers]
        rows = rows.remove_columns([name]).add_column(name, texts, feature=datasets.Value("string"))
    return rows
