"""The console script `headroom`.

Imports are lazy: Prefect, DVC and MLflow take seconds to load, and `--help` needs none of them.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.environment import prepare
from stages.core.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

app = typer.Typer(
    help="How small and how fast can this language model get before it gets worse? Start with `headroom plan`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of text.")]
StageName = Annotated[
    str | None, typer.Option("--stage", metavar="NAME", help="Only what this stage needs, and it; such as `prune`.")
]
Workers = Annotated[
    int,
    typer.Option(
        min=1,
        max=16,
        help="Stages that may run side by side; measuring ones never do, and training ones get slower.",
    ),
]


@app.command()
def run(
    stage: StageName = None,
    workers: Workers = 1,
    force: Annotated[bool, typer.Option("--force", help="Run the stages even if nothing changed.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for a run that is going, instead of refusing.")] = False,
    json_: Json = False,
) -> None:
    """Bring everything up to date: run the stages that changed, and what follows from them.

    Ctrl-C stops within seconds; the next run goes on from there. Ends with 0 only when all is done, 2 for a mistake in
    params or data, 130 when interrupted.

    Example: `headroom run`, or `headroom run --stage evaluate@quantize`
    """
    from flows.run import execute

    summary = execute(stage=stage, workers=workers, force=force, wait=wait)
    if json_:
        _print_json(summary.to_dict())
    else:
        from flows.summary import print_ladder, print_summary, read_ladder

        print_summary(summary, _console())
        if summary.status == "done" and summary.ladder:
            print_ladder(read_ladder(), _console())
    codes = {"done": 0, "refused": EXIT_USER_ERROR, "interrupted": EXIT_INTERRUPTED}
    raise typer.Exit(codes.get(summary.status, EXIT_FAILED))


@app.command()
def plan(stage: StageName = None, json_: Json = False) -> None:
    """Show what a run would do and why, and what it would take; nothing is started.

    Time, memory and disk are those of each stage's last run here.

    Example: `headroom plan`, or `headroom plan --json`
    """
    from flows.graph import require_project
    from flows.plan import make_plan, print_plan
    from stages.core.params import load_params
    from stages.core.stage import PARAMS

    require_project()
    load_params(PARAMS)
    found = make_plan(stage)
    if json_:
        _print_json(found.to_dict())
    else:
        print_plan(found, _console())


@app.command()
def schedule(
    cron: Annotated[str | None, typer.Option(help='Five cron fields, such as "0 2 * * *" for two at night.')] = None,
    interval: Annotated[int | None, typer.Option(metavar="SECONDS", help="Seconds between two starts.")] = None,
    stage: StageName = None,
    workers: Workers = 1,
) -> None:
    """Serve the pipeline on a schedule until interrupted; needs a Prefect server, see `make ui`.

    Example: `headroom schedule --cron "0 2 * * *"`, or `headroom schedule --interval 3600`
    """
    from flows.graph import read_graph
    from flows.schedule import check_schedule, serve

    read_graph().up_to(stage)
    check_schedule(cron, interval)
    serve(cron, interval, stage, workers)


@app.command()
def predict(
    model: Annotated[
        Path,
        typer.Argument(help="Folder of an exported model, such as artifacts/export/quantize."),
    ],
    source: Annotated[str, typer.Argument(metavar="INPUT", help="CSV, TSV, JSONL, Parquet or text file; - for stdin.")],
    output: Annotated[str, typer.Option("--output", "-o", help="File to write; - for stdout.")] = "-",
    text_column: Annotated[str | None, typer.Option(help="Column that holds the texts.")] = None,
    input_format: Annotated[str | None, typer.Option("--format", help="csv, tsv, jsonl, parquet, txt.")] = None,
    runtime: Annotated[
        str | None, typer.Option(help="Such as onnxruntime-cpu; without it, the one `evaluate` found fastest.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Texts per batch.")] = None,
    json_: Json = False,
) -> None:
    """Label texts with an exported model: adds the columns `label` and `score`, keeps every row and its place.

    Example: `headroom predict artifacts/export/quantize questions.csv -o labelled.csv`, or
    `echo "Who wrote it?" | headroom predict artifacts/export/quantize -`
    """
    from flows.predict import run_predict

    run_predict(model, source, output, text_column, input_format, runtime, batch_size, json_)


@app.command()
def report(
    open_: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    json_: Json = False,
) -> None:
    """Show the performance ladder and where the HTML report lies; rebuild the report if it alone is out of date.

    Example: `headroom report --open`
    """
    from flows.report import current_report
    from flows.summary import print_ladder, read_ladder

    page = current_report()
    rows = read_ladder()
    if json_:
        _print_json([row.to_dict() for row in rows])
    else:
        print_ladder(rows, _console())
        typer.echo(str(page))
    if open_:
        typer.launch(page.resolve().as_uri())


@app.command()
def use(
    preset: Annotated[str, typer.Argument(metavar="PRESET", help="Name of a file in presets/, such as reviews.")],
    force: Annotated[bool, typer.Option("--force", help="Also over edits, kept in params.yaml.bak.")] = False,
    json_: Json = False,
) -> None:
    """Write a preset over params.yaml, with its comments; refuses to drop edits unless forced.

    Example: `headroom use reviews && headroom run`
    """
    from flows.graph import require_project
    from flows.presets import use_preset

    require_project()
    backup = use_preset(preset, force)
    if json_:
        _print_json({"preset": preset, "backup": str(backup) if backup else None})
        return
    kept = f"; the old file is {backup}" if backup else ""
    typer.echo(f"params.yaml is now the preset {preset}{kept}. Next: `headroom run`")


def main() -> None:
    """Run the console script and exit."""
    prepare()
    for number in _INTERRUPTS:
        signal.signal(number, _exit_interrupted)
    try:
        app()
    except UserError as error:
        for line in str(error).splitlines():
            print(f"headroom: {line}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_FAILED)


def _exit_interrupted(number: int, frame: FrameType | None) -> None:
    """End with one line; the flow takes signals itself as long as stages run."""
    print("headroom: interrupted", file=sys.stderr)
    sys.exit(EXIT_INTERRUPTED)


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
