"""A contender's process: `python -m benchmarks.training.worker REQUEST`, a JSON text; the answer goes to a file."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from stages.core.artifacts import ARTIFACTS, read_json, write_json
from stages.core.checkpoints import load_tokenizer
from stages.core.errors import UserError
from stages.core.hardware import peak_memory_mb, resident_memory_mb


def main() -> int:
    """Do what the request says and write the answer."""
    request = json.loads(sys.argv[1])
    try:
        answer = {"prepare": _prepare, "ceiling": _ceiling, "pretrain": _pretrain, "finetune": _finetune}[
            request["do"]
        ](request)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    write_json(Path(request["answer"]), answer)
    return 0


def _prepare(request: dict[str, Any]) -> dict[str, Any]:
    from benchmarks.training.prepare import CHECKPOINT, prepare_finetuning, prepare_pretraining

    artifacts, work = Path(request["artifacts"]), Path(request["folder"])
    params = yaml.safe_load(Path(request["params"]).read_text(encoding="utf-8"))
    pretrain = prepare_pretraining(artifacts, params, request["tokens"], work / "pretrain", request["seed"])
    start = work / "pretrain" / CHECKPOINT
    finetune = prepare_finetuning(artifacts, params, work / "finetune", start, request["evaluations"])
    return {"pretrain": pretrain, "finetune": finetune}


def _ceiling(request: dict[str, Any]) -> dict[str, Any]:
    from benchmarks.training.arithmetic import measure_ceiling

    return measure_ceiling(request["shapes"])


def _pretrain(request: dict[str, Any]) -> dict[str, Any]:
    from benchmarks.training import engine, peer
    from benchmarks.training.judge import HeldOut, join
    from benchmarks.training.prepare import CHECKPOINT, ROWS, read_facts
    from benchmarks.training.watch import Asked, Enough, Watch

    baseline = resident_memory_mb()
    folder, seed, form = Path(request["folder"]), request["seed"], request["form"]
    facts, rows = read_facts(folder), read_json(folder / ROWS)
    tokenizer = load_tokenizer(folder / CHECKPOINT)
    special = torch.tensor(tokenizer.all_special_ids)
    heldout = HeldOut(rows["heldout"], special, tokenizer.mask_token_id, tokenizer.pad_token_id)
    last: int = request["last_step"]
    judged = [last * part // request["judgements"] for part in range(1, request["judgements"] + 1)]
    watch = Watch(
        Asked(last, judged, heldout.loss, profiled=request["profiled"]),
        special[special != tokenizer.mask_token_id],
    )
    try:
        if form == "headroom":
            engine.train_stage("pretrain", folder, seed, watch, request["compiled"])
        else:
            peer.train_masked(form, folder / CHECKPOINT, rows["train"], facts, seed, watch)
    except Enough:
        pass
    answer = _answer(watch, baseline)
    if judged:
        joined = join(rows["heldout"], facts["length"])
        blocks = HeldOut(joined, special, tokenizer.mask_token_id, tokenizer.pad_token_id)
        answer["blocks_loss"] = blocks.loss(watch.model.eval())
    return answer


def _finetune(request: dict[str, Any]) -> dict[str, Any]:
    from benchmarks.training import engine, peer
    from benchmarks.training.judge import accuracy_judge
    from benchmarks.training.watch import Asked, Enough, Watch

    baseline = resident_memory_mb()
    folder, seed, form = Path(request["folder"]), request["seed"], request["form"]
    data, every = folder / ARTIFACTS / "tokenize" / "data", request["judge_every"]
    tokenizer = load_tokenizer(data / "tokenizer")
    last = request["last_step"]
    asked = Asked(last, [*range(every, last, every), last], accuracy_judge(data), profiled=request["profiled"])
    watch = Watch(asked, torch.tensor(tokenizer.all_special_ids))
    try:
        if form == "headroom":
            engine.train_stage("finetune", folder, seed, watch)
        else:
            peer.train_classifier(form, folder, seed, watch)
    except Enough:
        pass
    return _answer(watch, baseline)


def _answer(watch: Any, baseline: float) -> dict[str, Any]:
    """What was seen of a run.

    Raises:
        UserError: if there was nothing to see.
    """
    if not watch.seconds or not watch.tokens[-1]:
        raise UserError("the run trained nothing that the clock could see")
    return {
        "seconds": watch.seconds,
        "tokens": watch.tokens,
        "positions": watch.positions,
        "curve": watch.curve,
        "peak_memory_mb": watch.peak_memory_mb,
        "imports_memory_mb": baseline,
        "whole_peak_memory_mb": peak_memory_mb(),
        "process_seconds": time.time() - psutil.Process().create_time(),
        "profile": {"kinds": watch.profile.seconds, "operations": watch.profile.operations},
    }


if __name__ == "__main__":
    sys.exit(main())
