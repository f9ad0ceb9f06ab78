"""Command line of the quantize stage."""

from __future__ import annotations

from typing import Any

from stages.core.artifacts import write_json
from stages.core.checkpoints import count_parameters, extend_lineage, load_model, save_model
from stages.core.hardware import saturates_here
from stages.core.judging import validation_quality
from stages.core.params import INT8_PRODUCTS
from stages.core.quantized import quantized_parts, weight_bits
from stages.core.stage import StageRun, command
from stages.quantize.bits import needed_bits
from stages.quantize.gate import Verdict
from stages.quantize.recipes import RECIPES, Attempt, Kitchen

FLOAT = "float"
LAYERS_FILE = "layers.json"


def run_quantize(run: StageRun) -> dict[str, Any]:
    """Take the first recipe that passes the gate; hand the checkpoint on in float where none does."""
    model = load_model(run.inputs["model"])
    kitchen = Kitchen(run, model)
    before = validation_quality(model, kitchen.task, kitchen.validation, kitchen.pad_id)
    _tell_of_saturation(run)
    taken, attempt, verdicts = _first_that_passes(run, kitchen)
    save_model(attempt.model, run.unit("model"), run.inputs["model"], extend_lineage(run.inputs["model"], "quantize"))
    write_json(run.staging / LAYERS_FILE, attempt.layers)
    return {
        "recipe": taken,
        "attempts": {
            name: {"place": place, **verdict.to_json()} for place, (name, verdict) in enumerate(verdicts.items(), 1)
        },
        "parameters": count_parameters(attempt.model),
        "stored_bytes": sum(tensor.nbytes for tensor in attempt.model.state_dict().values()),
        "before": before,
        "validation": validation_quality(attempt.model, kitchen.task, kitchen.validation, kitchen.pad_id),
        "quantized_parts": len(quantized_parts(attempt.model)),
        "float_layers": attempt.in_float,
        **_bits(attempt),
    }


def _bits(attempt: Attempt) -> dict[str, int]:
    """Bits of the weights that int8 products take; nothing where there are no such products."""
    bits = weight_bits(attempt.model)
    return {} if bits is None else {"weight_bits": bits}


def _first_that_passes(run: StageRun, kitchen: Kitchen) -> tuple[str, Attempt, dict[str, Verdict]]:
    verdicts: dict[str, Verdict] = {}
    for name in run.params.quantize.recipes:
        attempt = RECIPES[name](kitchen)
        verdict = verdicts[name] = kitchen.verdict(attempt.model)
        if verdict.passed:
            cost = f"{verdict.loss:.4f} {run.params.quality.metric} ({verdict.low:+.4f} to {verdict.high:+.4f})"
            run.say(f"{name} is taken: it costs {cost}, {len(attempt.in_float)} layers stay in float")
            return name, attempt, verdicts
        run.say(f"{name} fails: {verdict.reason}")
    run.say("the model stays in float")
    return FLOAT, Attempt(kitchen.model), verdicts


def _tell_of_saturation(run: StageRun) -> None:
    """Say what a CPU that saturates does to the recipes; other machines may not."""
    params = run.params.quantize
    if not (INT8_PRODUCTS & set(params.recipes) and saturates_here()):
        return
    if needed_bits(params.weight_bits) == 7:
        run.say("this CPU has no VNNI: weights of int8 products get 7 bits, so that sums of two of them fit 16 bits")
    else:
        run.say(
            "this CPU has no VNNI and would saturate int8 products of 8-bit weights; it will compute them in float, "
            "which is slow. quantize.weight_bits: auto avoids that"
        )


if __name__ == "__main__":
    command("quantize", run_quantize, inputs=("model", "data"), parallel=("data", "shards"))
