"""Command line: `python -m benchmarks.training --help`."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import random
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.calls import repeatable_call
from benchmarks.markers import put_between
from benchmarks.training.contenders import Contender, choose
from benchmarks.training.page import MARKER, render
from benchmarks.training.settings import SHARED, WARM_UP_STEPS
from benchmarks.workers import WorkerError, contenders_seconds, run_once, thread_settings
from stages.core.artifacts import ARTIFACTS, read_json, write_json
from stages.core.errors import UserError
from stages.core.hardware import describe_hardware, usable_processors
from stages.core.observe.progress import say
from stages.core.timing import watch_other_load

_WORKER = "benchmarks.training.worker"
_LONGEST_RUN_SECONDS = 1800.0
_JUDGEMENTS = 4
_EVALUATIONS_AN_EPOCH = 8
_SEEDS_A_ROUND = {"pretrain": 1, "finetune": 2}
_FEWEST_TIMED_STEPS = 2
_PROFILED = {"pretrain": (4, 4), "finetune": (20, 39)}
"""First and last step; the short ones of fine-tuning differ in length."""
_FOLDERS = ("artifacts", "work", "results", "docs", "params")
_PAGE, _PICTURE = "training.md", "training.png"
_NEEDED = ("acquire/checkpoint/config.json", "clean/corpus/corpus.parquet", "tokenize/tokenizer/tokenizer.json")


def main() -> int:
    """Measure, write the results, the page and the picture, and one line of JSON."""
    arguments = _parser().parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a contender at work must be ended, not left behind
    try:
        headline = _run(arguments)
    except (UserError, WorkerError) as error:
        print(f"benchmarks.training: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("benchmarks.training: interrupted; nothing was written", file=sys.stderr)
        return 130
    print(json.dumps(headline))
    return 0


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    contenders = choose(arguments.only)
    page = Path(arguments.docs) / _PAGE
    _check(arguments, page)

    from benchmarks.training.picture import draw  # slow to import, and a wrong option is to be told at once
    from benchmarks.training.summary import finetune_row, pretrain_row, targets

    started, spent = time.monotonic(), contenders_seconds()
    with watch_other_load() as load:
        result = _measure(arguments, contenders)
    seconds = time.monotonic() - started
    share = (contenders_seconds() - spent) / (seconds * len(usable_processors()))
    result |= {"minutes": seconds / 60, "other_load": max(0.0, load.share - share)}
    write_json(Path(arguments.results), result)
    ran = [each for each in contenders if each.name not in result["failures"]]
    pretrain = [pretrain_row(each, result["runs"][each.name], result) for each in ran if each.task == "pretrain"]
    finetune = [
        finetune_row(each, result["runs"][each.name], arguments.accuracy) for each in ran if each.task == "finetune"
    ]
    reached = targets(pretrain, finetune)
    text = render(pretrain, finetune, reached, result)
    page.write_text(put_between(page.read_text(encoding="utf-8"), MARKER, text, str(page)), encoding="utf-8")
    draw(pretrain, result["runs"], contenders, page.with_name(_PICTURE))
    for target in reached:
        say(f"{target.what}: {target.ratio['median']:.2f}, wanted {target.wanted}")
    say(f"{len(ran)} contenders measured, {len(result['failures'])} failed; {page}, {arguments.results}")
    return {target.what: target.ratio for target in reached} | {"failures": result["failures"]}


def _check(arguments: argparse.Namespace, page: Path) -> None:
    """Refuse what would fail after the measurement."""
    for name in _NEEDED:
        path = Path(arguments.artifacts) / name
        if not path.exists():
            raise UserError(f"{path}: no such file; `make run` makes it, or name another --artifacts")
    for path in (Path(arguments.params), page):
        if not path.exists():
            raise UserError(f"{path}: no such file; start in the project's folder")
    put_between(page.read_text(encoding="utf-8"), MARKER, "", str(page))
    if arguments.rounds < 1 or arguments.tokens < 1:
        raise UserError("--rounds and --tokens must be 1 or more")


def _measure(arguments: argparse.Namespace, contenders: Sequence[Contender]) -> dict[str, Any]:
    """Prepare, then let all take turns; who fails drops out, and its failure is reported."""
    work = Path(arguments.work).absolute()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    say("preparing the texts and the start that all share")
    facts = _ask(
        work,
        "prepare",
        do="prepare",
        artifacts=str(Path(arguments.artifacts).absolute()),
        params=str(Path(arguments.params).absolute()),
        folder=str(work),
        tokens=arguments.tokens,
        seed=arguments.seed,
        evaluations=_EVALUATIONS_AN_EPOCH,
    )
    runs: dict[str, list[dict[str, Any]]] = {each.name: [] for each in contenders}
    ceilings: list[dict[str, float]] = []
    failures: dict[str, str] = {}
    generator, order = random.Random(arguments.seed), list(contenders)
    for number in range(arguments.rounds):
        ceilings.append(_ask(work, "ceiling", do="ceiling", shapes=facts["pretrain"]["shapes"]))
        generator.shuffle(order)
        for contender in [each for each in order if each.name not in failures]:
            try:
                for turn in range(_SEEDS_A_ROUND[contender.task]):
                    seed = arguments.seed + number * _SEEDS_A_ROUND[contender.task] + turn
                    runs[contender.name].append(_turn(work, contender, number, seed, facts, arguments))
            except WorkerError as error:
                failures[contender.name] = str(error)
                say(f"{contender.title}: {error}")
    profiles = _profiles(work, contenders, facts, arguments, failures) if arguments.profile else {}
    return {
        "command": repeatable_call(_parser(), arguments, _FOLDERS),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "rounds": arguments.rounds,
        "accuracy": arguments.accuracy,
        "shared": dataclasses.asdict(SHARED),
        "facts": facts,
        "runs": {name: found for name, found in runs.items() if name not in failures},
        "ceilings": ceilings,
        "profiles": profiles,
        "failures": failures,
        "threads": thread_settings(),
        "hardware": describe_hardware(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "accelerate")},
    }


def _turn(
    work: Path,
    contender: Contender,
    number: int,
    seed: int,
    facts: Mapping[str, Any],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """One run of a contender."""
    last = _last_step(contender, facts)
    # The slow ones run to the end once, for their loss; after that a part of it tells their speed.
    whole = contender.share == 1.0 or (contender.whole_once and number == 0)
    least = WARM_UP_STEPS + _FEWEST_TIMED_STEPS
    last = last if whole else min(last, max(least, round(contender.share * last)))
    started = time.monotonic()
    run = _train(work, contender, seed, facts, last, judgements=_JUDGEMENTS if whole else 0)
    told = f"{run['tokens'][-1] / run['seconds'][-1]:,.0f} tokens/s"
    if run["curve"]:
        told += f", judged {run['curve'][-1][2]:.3f} after {run['curve'][-1][1]:.1f} s of training"
    say(
        f"round {number + 1}/{arguments.rounds}, {contender.task}, {contender.title}: {told}, "
        f"{time.monotonic() - started:.0f} s"
    )
    return run


def _last_step(contender: Contender, facts: Mapping[str, Any]) -> int:
    if contender.task == "pretrain":
        return int(facts["pretrain"]["steps"])
    return SHARED.finetuned_epochs * -(-int(facts["finetune"]["texts"]) // SHARED.finetune_batch_texts)


def _train(
    work: Path,
    contender: Contender,
    seed: int,
    facts: Mapping[str, Any],
    last: int,
    judgements: int = 0,
    profiled: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Let a contender train up to a step, judged on the way: in pretraining so many times, else every few steps."""
    return _ask(
        work,
        contender.name,
        do=contender.task,
        folder=str(work / contender.task),
        form=contender.form,
        compiled=contender.compiled,
        seed=seed,
        last_step=last,
        judgements=judgements,
        judge_every=facts["finetune"]["judge_every"],
        profiled=profiled,
    )


def _profiles(
    work: Path,
    contenders: Sequence[Contender],
    facts: Mapping[str, Any],
    arguments: argparse.Namespace,
    failures: Mapping[str, str],
) -> dict[str, Any]:
    """Profile some steps of each contender."""
    profiles: dict[str, Any] = {}
    for contender in contenders:
        if contender.name in failures:
            continue
        most = _last_step(contender, facts)
        first, last = (min(step, most) for step in _PROFILED[contender.task])
        run = _train(work, contender, arguments.seed, facts, last, profiled=(first, last))
        say(f"profiled: {contender.title}")
        seconds = (run["seconds"][last - 1] - run["seconds"][first - 2]) / (last - first + 1)
        about = {"title": contender.title, "task": contender.task, "steps": last - first + 1}
        profiles[contender.name] = {**about, "step_seconds": seconds, **run["profile"]}
    return profiles


def _ask(work: Path, name: str, **request: Any) -> dict[str, Any]:
    """Run a worker to its end and read its answer.

    Raises:
        WorkerError: if it fails; the message is one line.
    """
    answer = work / f"{name}.json"
    run_once(Path(sys.executable), _WORKER, {**request, "answer": str(answer)}, _LONGEST_RUN_SECONDS)
    found: dict[str, Any] = read_json(answer)
    return found


def _parser() -> argparse.ArgumentParser:
    results = ARTIFACTS / "benchmarks" / "training"
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training",
        description="Train with Headroom's engine and with the transformers Trainer: the same model, texts, batches "
        "and schedule, each run in a process of its own, in turns. Writes the measured half of docs/training.md, a "
        "picture and a file of results.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--artifacts", default=str(ARTIFACTS), help="artifacts folder of a finished run; only read")
    parser.add_argument("--params", default="presets/questions.yaml", help="params file to start from")
    parser.add_argument("--work", default=str(results / "work"), help="scratch folder, emptied first")
    parser.add_argument("--results", default=str(results / "results.json"), help="file for the results")
    parser.add_argument("--docs", default="docs", help=f"folder of {_PAGE} and {_PICTURE}")
    parser.add_argument("--rounds", type=int, default=3, help="in which all take turns, twice in fine-tuning")
    parser.add_argument("--tokens", type=int, default=24576, help="to pretrain on in a run")
    parser.add_argument("--accuracy", type=float, default=0.93, help="validation accuracy to time in fine-tuning")
    parser.add_argument("--seed", type=int, default=0, help="of the texts, and of the first round")
    parser.add_argument("--only", nargs="*", default=[], help="names of contenders, or their beginnings")
    parser.add_argument("--profile", action="store_true", help="also profile steps of each")
    return parser


if __name__ == "__main__":
    sys.exit(main())
