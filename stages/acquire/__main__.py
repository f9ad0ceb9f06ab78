"""`python -m stages.acquire`: sources in params -> raw splits, other domains, corpus, lexicon and checkpoint."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas

from stages.acquire.corpus import read_corpus
from stages.acquire.lexicon import read_lexicon
from stages.acquire.sources import Fetched, check_local_sources, fetch_checkpoint, fetch_files, fetch_texts
from stages.acquire.splits import complete, given_splits
from stages.acquire.text import check_classes, labelled
from stages.core.artifacts import write_json
from stages.core.errors import UserError
from stages.core.params import CorpusParams, DataParams, HubSource, LabelledParams, LexiconParams, ShiftedParams
from stages.core.stage import StageRun, command
from stages.core.tables import frame_of, read_table, write_table


def run_acquire(run: StageRun) -> dict[str, Any]:
    """Collect everything, what is cheap to check first; return counts."""
    params = run.params.acquire
    check_local_sources(params)
    work = run.staging / "fetched"
    fetched = fetch_texts(params.data.source, params.data.format, work / "data", "acquire.data.source")
    given, left_out = read_data(fetched, params.data)
    shares = {"validation": params.splits.validation, "test": params.splits.test}
    splits = complete(given, shares, run.params.seed, "acquire.data")
    origin = fetch_checkpoint(params.checkpoint, run.unit("checkpoint"), work / "checkpoint", "acquire.checkpoint")
    known = sorted(set(splits["train"]["label"]))
    domains, domain_origins = collect_shifted(params.shifted, known, work / "shifted")
    texts, corpus_origins = collect_corpus(params.corpus, work / "corpus")
    lexicon, lexicon_origin = collect_lexicon(params.lexicon, work / "lexicon")
    data, corpus = run.unit("data"), run.unit("corpus")
    for name, frame in splits.items():
        write_table(frame, data / f"{name}.parquet")
    write_table(frame_of(["text"], [[text] for text in texts]), corpus / "corpus.parquet")
    write_table(domains, run.unit("shifted") / "shifted.parquet")
    write_json(run.unit("lexicon") / "synonyms.json", lexicon)
    rows = {name: len(frame) for name, frame in splits.items()}
    data_origin = {**fetched.provenance, "rows": rows, "left_out": left_out, "given_splits": sorted(given)}
    origins = {"data": data_origin, "shifted": domain_origins, "corpus": corpus_origins, "lexicon": lexicon_origin}
    write_json(run.staging / "provenance.json", {**origins, "checkpoint": origin})
    shutil.rmtree(work, ignore_errors=True)
    run.say(f"{sum(rows.values())} labelled texts, {len(texts)} texts in the corpus")
    return {
        "rows": rows,
        "left_out": left_out,
        "labels": int(splits["train"]["label"].nunique()),
        "characters": sum(map(len, pandas.concat(splits.values())["text"])),
        "shifted": {domain["name"]: domain["rows"] for domain in domain_origins},
        "corpus": {"texts": len(texts), "characters": sum(map(len, texts))},
        "synonyms": len(lexicon),
    }


def read_data(fetched: Fetched, params: DataParams) -> tuple[dict[str, pandas.DataFrame], int]:
    """Read labelled texts; return the given splits, or everything as train, and the number of rows left out.

    Raises:
        UserError: if the files are not what the params say.
    """
    where = "acquire.data"
    split_of = given_splits(list(fetched.files), f"{where}.source")
    frames, left_out = defaultdict(list), 0
    for name, frame, without_label in _labelled_files(fetched, params, params.slice_columns, where):
        frames[split_of[name] if split_of else "train"].append(frame)
        left_out += without_label
    given = {split: pandas.concat(parts, ignore_index=True) for split, parts in frames.items()}
    check_classes(given, where)
    return given, left_out


def collect_shifted(
    params: list[ShiftedParams], known: list[str], work: Path
) -> tuple[pandas.DataFrame, list[dict[str, Any]]]:
    """Read the other domains; return domain, text and label of every row, and where they came from.

    Args:
        params: of each domain.
        known: labels of the task; other domains must have no others.
        work: folder for copies.

    Raises:
        UserError: if a source cannot be had or has a label that the task does not know.
    """
    rows: list[list[str]] = []
    origins = []
    for number, domain in enumerate(params):
        where = f"acquire.shifted[{number}]"
        fetched = fetch_texts(domain.source, domain.format, work / str(number), f"{where}.source")
        parts = [frame for _, frame, _ in _labelled_files(fetched, domain, [], where)]
        frame = pandas.concat(parts, ignore_index=True)
        strange = sorted(set(frame["label"]) - set(known))
        if strange:
            raise UserError(f"{where}: has the label {strange[0]!r}; the labels of the task are {', '.join(known)}")
        rows += [[domain.name, text, label] for text, label in zip(frame["text"], frame["label"], strict=True)]
        origins.append({"name": domain.name, **fetched.provenance, "rows": len(frame)})
    return frame_of(["domain", "text", "label"], rows), origins


def collect_lexicon(params: LexiconParams | None, work: Path) -> tuple[dict[str, list[str]], dict[str, Any] | None]:
    """Read the synonyms of each word, none where there is no lexicon; return them and where they came from.

    Raises:
        UserError: if the source cannot be had or is not a lexicon.
    """
    if params is None:
        return {}, None
    fetched = fetch_files(params.source, work, "acquire.lexicon.source")
    synonyms = read_lexicon(fetched.files, params.format, "acquire.lexicon")
    return synonyms, {**fetched.provenance, "rows": len(synonyms)}


def collect_corpus(params: list[CorpusParams], work: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Read all sources of the corpus, in their order; return the texts and where they came from.

    Raises:
        UserError: if a source cannot be had or holds no text.
    """
    texts: list[str] = []
    origins = []
    for number, source in enumerate(params):
        where = f"acquire.corpus[{number}]"
        fetched = fetch_texts(source.source, source.format, work / str(number), f"{where}.source")
        files = fetched.files
        if isinstance(source.source, HubSource):
            source = source.model_copy(update={"format": None})
            files = {name: path for name, path in files.items() if name == "train.parquet"} or files
        before = len(texts)
        for name, path in files.items():
            texts += read_corpus(path, name, source, where)
        origins.append({**fetched.provenance, "rows": len(texts) - before})
    return texts, origins


def _labelled_files(
    fetched: Fetched, params: LabelledParams, slice_columns: Sequence[str], where: str
) -> Iterator[tuple[str, pandas.DataFrame, int]]:
    """Text, label and slice columns of each file, with its name and the number of rows left out."""
    format = None if isinstance(params.source, HubSource) else params.format
    columns: dict[str, list[str]] = {}
    for name, path in fetched.files.items():
        table = read_table(path, format, params.encoding, params.line_pattern)
        columns[name] = list(table.columns)
        _check_same_columns(columns, name, where)
        yield name, *labelled(table, params, slice_columns, f"{where}: {name}")


def _check_same_columns(columns: dict[str, list[str]], name: str, where: str) -> None:
    first = next(iter(columns))
    if sorted(columns[name]) != sorted(columns[first]):
        raise UserError(
            f"{where}: {name} has the columns {', '.join(columns[name])} and {first} has "
            f"{', '.join(columns[first])}; give all files the same"
        )


if __name__ == "__main__":
    command("acquire", run_acquire, inputs=())
