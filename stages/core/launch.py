"""Several processes for one stage, as `training.parallel` asks, started the way torchrun starts them.

A command that torchrun has started runs as it is. One that was typed, or that DVC ran, becomes the launcher: torchrun's
own, in this process, with its own `PET_*` variables for several machines.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from stages.core.errors import UserError
from stages.core.params import ParallelParams

EXIT_FAULT, EXIT_USER_ERROR, EXIT_INTERRUPTED = 1, 2, 130


def process_count() -> int | None:
    """Count the processes that were started together; None where nothing started several."""
    count = os.environ.get("WORLD_SIZE")
    return int(count) if count else None


def is_first_process() -> bool:
    """Tell whether this process speaks and writes for all."""
    return int(os.environ.get("RANK") or 0) == 0


def is_first_of_machine() -> bool:
    """Tell whether this process is the first of those on its machine."""
    return int(os.environ.get("LOCAL_RANK") or 0) == 0


def check_processes(parallel: ParallelParams | None) -> None:
    """Check that as many processes were started as the params ask for.

    Raises:
        UserError: if not.
    """
    asked, started = parallel.processes if parallel else 1, process_count() or 1
    if asked == started:
        return
    if parallel is None:
        raise UserError(f"WORLD_SIZE: {started} processes were started for what runs in one; start one")
    sizes = " x ".join(f"{axis} {size}" for axis, size in parallel.model_dump().items())
    raise UserError(
        f"training.parallel: {started} processes were started where {sizes} asks for {asked}; start {asked}"
    )


def launch(parallel: ParallelParams, module: str) -> int:
    """Run this command again in as many processes as asked for, and return its exit status.

    Args:
        parallel: what the params ask for.
        module: of the command, such as `stages.finetune`; it gets the arguments of this one.

    Raises:
        UserError: if the processes cannot be shared evenly by the machines.
    """
    from torch.distributed import run  # data stages never import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    torchrun: Any = run
    count = processes_here(parallel, torchrun.parse_args([module]).nnodes)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP warns that looking for unused weights may be in vain
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _processors() // count)))
    logging.disable(logging.ERROR)  # the processes say themselves what went wrong
    try:
        torchrun.run(torchrun.parse_args([f"--nproc-per-node={count}", "--module", module, *sys.argv[1:]]))
    except ChildFailedError as error:
        return _exit_status(error)
    except (SignalException, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    return 0


def processes_here(parallel: ParallelParams, machines: str) -> int:
    """Count the processes that each of the machines starts.

    Raises:
        UserError: if they cannot be shared evenly, or the number of machines may vary.
    """
    fewest, _, most = machines.partition(":")
    if (most or fewest) != fewest or not fewest.isdigit() or parallel.processes % max(1, int(fewest)):
        raise UserError(
            f"PET_NNODES: {parallel.processes} processes of training.parallel cannot be shared evenly by {machines} "
            "machines; name a number that divides them"
        )
    return parallel.processes // max(1, int(fewest))


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _exit_status(error: Any) -> int:
    """What the process that failed first ended with; a user's mistake, or an interruption, goes before the rest."""
    statuses = [failure.exitcode for failure in error.failures.values()]
    return next((status for status in (EXIT_USER_ERROR, EXIT_INTERRUPTED) if status in statuses), EXIT_FAULT)
