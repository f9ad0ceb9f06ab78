"""`headroom predict`: classify the rows of a table with an exported model or a cascade.

Rows come out as they went in, in order, with two more columns: `label` and `score`, the probability of that label.
An empty or missing text is a text like any other and gets its answer too.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.core.errors import UserError
from stages.core.observe.progress import say, track

if TYPE_CHECKING:
    import pandas

    from stages.core.cascade import Exported, ExportedRuntime, PreparedExported
    from stages.core.choice import Setting

STANDARD_STREAM = "-"

_CHUNK = 4096  # texts between two signs of progress; sorted by length within
_DIGITS = 6


def run_predict(
    model: Path,
    input: str,
    output: str,
    text_column: str | None,
    input_format: str | None,
    runtime: str | None,
    batch_size: int | None,
    json_: bool,
) -> None:
    """Classify every row of `input` and write the rows with `label` and `score` to `output`, whole or not at all.

    Args:
        model: an exported model or a cascade, as a folder of its stage or the `model/` inside.
        input: a file in one of the formats of `stages.core.tables`, or `-` for stdin, which holds lines of text
            unless `input_format` says otherwise.
        output: a file whose name tells the format, or `-` for stdout in the input's format, csv for plain lines.
        text_column: the column to classify; None takes `text`, or the only column.
        input_format: None goes by the file's name.
        runtime: None takes the one that `evaluate` found fastest for this model on this machine, or ONNX Runtime.
        batch_size: texts in a batch; None takes as many tokens a batch as `evaluate` found fastest.
        json_: write the summary as JSON; with `output` on stdout, the rows as JSON lines instead.

    Raises:
        UserError: if the model, the input or an option cannot be used.
    """
    from stages.core.cascade import load_exported
    from stages.core.choice import DEFAULT, open_setting
    from stages.core.tables import table_format

    format = input_format or ("txt" if input == STANDARD_STREAM else table_format(Path(input)))
    if output == STANDARD_STREAM:
        output_format = "jsonl" if json_ else {"txt": "csv"}.get(format, format)
    else:
        output_format = _writable_format(Path(output))
    exported = load_exported(model)
    setting = _fastest(exported.folder)
    if runtime is not None and runtime != setting.runtime:
        setting = replace(DEFAULT, runtime=runtime)
    if batch_size is not None and batch_size < 1:
        raise UserError(f"--batch-size: {batch_size} is not a number of texts; 1 or more")
    frame = _read(input, format)
    column = _text_column(frame, text_column, input)
    texts = _texts(frame, column, input)
    started = time.monotonic()
    engine = open_setting(setting, exported, "throughput")
    batch_tokens = None if batch_size else setting.batch_tokens
    labels, scores = classify(exported, engine, texts, batch_size, batch_tokens)
    seconds = time.monotonic() - started
    _add(frame, labels, scores)
    _write(frame, output, output_format)
    name = setting.runtime
    sizes = {"batch_size": batch_size, "batch_tokens": batch_tokens}
    summary = {"rows": len(frame), "output": output, "runtime": name, **sizes, "seconds": round(seconds, 3)}
    if json_ and output != STANDARD_STREAM:
        print(json.dumps(summary))
    else:
        say(f"{len(frame)} rows -> {'stdout' if output == STANDARD_STREAM else output} in {seconds:.1f} s on {name}")


def classify(
    model: Exported,
    runtime: ExportedRuntime,
    texts: Sequence[str],
    batch_size: int | None = None,
    batch_tokens: int | None = None,
) -> tuple[list[str], list[float]]:
    """Return the label and its probability of every text, in order; a thread encodes one chunk ahead of the runtime."""
    from stages.core.cascade import answer_exported, prepare_exported

    labels: list[str] = []
    scores: list[float] = []
    starts = range(0, len(texts), _CHUNK)
    with ThreadPoolExecutor(1) as encoder:

        def encode(start: int) -> Future[PreparedExported]:
            return encoder.submit(prepare_exported, model, texts[start : start + _CHUNK], batch_size, batch_tokens)

        coming = encode(0)
        for start in track(starts, f"predict, {_CHUNK} texts each"):
            prepared, coming = coming.result(), encode(start + _CHUNK)
            indices, probabilities = answer_exported(model, runtime, prepared)
            labels += [model.labels[index] for index in indices.tolist()]
            scores += [round(float(score), _DIGITS) for score in probabilities.max(axis=1)]
    return labels, scores


def _fastest(folder: Path) -> Setting:
    """What `evaluate` found fastest for the model in `folder`, if it did, on this machine.

    For models inside `artifacts/export/<variant>`, for `artifacts/cascade`, and where a runtime.json lies beside the
    model's folder.
    """
    from stages.core.choice import DEFAULT, RUNTIME_FILE, read_choice

    variant = folder.resolve().parent if folder.name == "model" else folder.resolve()
    exported = variant.parent.name == "export"
    ours = exported or (variant.name == "cascade" and not (variant / RUNTIME_FILE).exists())
    evaluated = variant.parents[1 if exported else 0] / "evaluate" / variant.name / RUNTIME_FILE
    path = evaluated if ours else variant / RUNTIME_FILE
    if not path.exists():
        return DEFAULT
    setting, problem = read_choice(path, "throughput")
    if problem is not None:
        say(f"{problem}; taking {setting.runtime}. `dvc repro` measures again")
    return setting


def _read(input: str, format: str) -> pandas.DataFrame:
    from stages.core.tables import parse_table, read_bytes

    if input == STANDARD_STREAM:
        data, where = sys.stdin.buffer.read(), "stdin"
    else:
        data, where = read_bytes(Path(input)), input
    return parse_table(data, where, format, "utf-8", keep_blank_lines=True)


def _text_column(frame: pandas.DataFrame, wanted: str | None, where: str) -> str:
    names = [str(name) for name in frame.columns]
    if wanted is None and (len(names) == 1 or "text" in names):
        return "text" if "text" in names else names[0]
    if wanted is None:
        raise UserError(f"{where}: has columns {', '.join(names)}; say which one holds the text with --text-column")
    if wanted not in names:
        near = difflib.get_close_matches(wanted, names, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"{where}: has no column {wanted}; {hint}its columns are {', '.join(names)}")
    return wanted


def _texts(frame: pandas.DataFrame, column: str, where: str) -> list[str]:
    """Cells as texts: a missing one is empty, a number is its digits."""
    missing = frame[column].isna().tolist()
    texts = []
    for row, cell in enumerate(frame[column].tolist(), start=1):
        if missing[row - 1]:
            texts.append("")
        elif isinstance(cell, str | int | float):
            texts.append(str(cell))
        else:
            raise UserError(f"{where}: row {row}: {column} holds a {type(cell).__name__} where a text was expected")
    return texts


def _add(frame: pandas.DataFrame, labels: Sequence[str], scores: Sequence[float]) -> None:
    """Add the two columns; where the input has such columns of its own they are kept and the new ones named anew."""
    taken = [name for name in ("label", "score") if name in frame.columns]
    names = [f"prediction_{name}" if taken else name for name in ("label", "score")]
    again = [name for name in names if name in frame.columns]
    if again:
        raise UserError(f"the input already has columns {', '.join([*taken, *again])}; rename or remove one pair")
    if taken:
        say(f"the input has its own {' and '.join(taken)}; the predictions are in {names[0]} and {names[1]}")
    frame[names[0]] = list(labels)
    frame[names[1]] = list(scores)


def _writable_format(path: Path) -> str:
    """Check before any work that the output can be written."""
    from stages.core.tables import table_format

    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file in it, such as {path / 'predictions.csv'}")
    format = table_format(path)
    if format == "txt":
        raise UserError(f"{path}: txt has no columns for label and score; choose .csv, .tsv, .jsonl or .parquet")
    return format


def _write(frame: pandas.DataFrame, output: str, format: str) -> None:
    from stages.core.tables import render_table, write_table

    if output != STANDARD_STREAM:
        try:
            write_table(frame, Path(output), format)
        except OSError as error:
            raise UserError(f"{output}: cannot be written ({error.strerror}); nothing was changed") from None
        return
    data: Any = render_table(frame, format, "stdout")
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        # Whoever reads, such as `head`, has seen enough; Python must not complain when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
