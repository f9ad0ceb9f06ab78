"""Times by part and width, from whole models that differ in nothing else."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from stages.core.latency import LatencyTable, open_bare, seconds_a_text, texts_a_second, without_noise
from stages.core.observe.progress import track
from stages.core.runtimes import ONNX_FILE, REFERENCE_RUNTIME, Batch, Goal, OpenVino, Runtime
from stages.core.structure import LayerWidth
from stages.latency_table.graphs import VOCABULARY, EncoderShape, write_encoder

RUNTIMES = (REFERENCE_RUNTIME, OpenVino.name)

_LAYERS = 4  # enough to tell a layer from the rest, and to leave a core's cache as a whole model does
_ROUNDS = 7
_MOST_HEAD_COUNTS, _MOST_NEURON_COUNTS = 8, 9
_SECONDS_A_PASS = 0.25


def grid(largest: int, multiple: int, points: int) -> list[int]:
    """Widths to measure: multiples of `multiple` spread evenly from the smallest, and the largest itself."""
    count = min(points, max(1, largest // multiple))
    steps = [round(largest * index / count / multiple) * multiple for index in range(1, count)]
    return sorted({min(multiple, largest), *(step for step in steps if step), largest})


def measure_table(
    shape: EncoderShape,
    largest: LayerWidth,
    multiple: int,
    runtime: str | None,
    goal: Goal,
    batches: Sequence[Batch],
    seed: int,
) -> LatencyTable:
    """Time attention at several head counts and feed-forward at several widths.

    Args:
        shape: of the models.
        largest: widths of the widest layer.
        multiple: feed-forward widths in between are multiples of it.
        runtime: to measure on; None for the faster of `RUNTIMES`.
        goal: one text at a time, or batches.
        batches: real texts.
        seed: of the order of measurement.
    """
    batches = [(ids % VOCABULARY, mask) for ids, mask in batches]
    nothing = LayerWidth(0, 0)
    heads = grid(largest.heads, 1, _MOST_HEAD_COUNTS)
    neurons = grid(largest.neurons, multiple, _MOST_NEURON_COUNTS)
    models = {
        "no layers": [],
        "nothing": [nothing] * _LAYERS,
        **{f"heads {count}": [LayerWidth(count, 0)] * _LAYERS for count in heads},
        **{f"neurons {count}": [LayerWidth(0, count)] * _LAYERS for count in neurons},
    }
    with tempfile.TemporaryDirectory(prefix="headroom-") as name:
        folder = Path(name)
        chosen = runtime or _faster_runtime(shape, [largest] * _LAYERS, folder, goal, batches, seed)
        opened = _open_all(shape, models, folder, chosen, goal)
        full = opened["full"] = _open(shape, [largest] * _LAYERS, folder, chosen, goal)
        opened["short"] = _open(shape, [largest] * _LAYERS, folder, chosen, goal, last_for_first_only=True)
        batches = _few_enough(full, batches, goal, seed)
        speeds = texts_a_second(opened, batches, goal, _ROUNDS, seed)
    seconds = {name: seconds_a_text(values) for name, values in speeds.items()}
    layer = (seconds["full"] - seconds["nothing"]) / _LAYERS
    saved = (seconds["full"] - seconds["short"]) / layer if layer > 0 else 0.0
    return without_noise(
        LatencyTable(
            runtime=chosen,
            deployment=shape.deployment,
            rest=seconds["no layers"],
            shell=max(0.0, seconds["nothing"] - seconds["no layers"]) / _LAYERS,
            heads={count: (seconds[f"heads {count}"] - seconds["nothing"]) / _LAYERS for count in heads},
            neurons={count: (seconds[f"neurons {count}"] - seconds["nothing"]) / _LAYERS for count in neurons},
            last=min(1.0, max(0.0, 1.0 - saved)),
        )
    )


def _faster_runtime(
    shape: EncoderShape,
    widths: Sequence[LayerWidth],
    folder: Path,
    goal: Goal,
    batches: Sequence[Batch],
    seed: int,
) -> str:
    opened = {name: _open(shape, widths, folder, name, goal) for name in RUNTIMES}
    speeds = texts_a_second(opened, batches, goal, 3, seed)
    return min(speeds, key=lambda name: seconds_a_text(speeds[name]))


def _open_all(
    shape: EncoderShape, models: Mapping[str, Sequence[LayerWidth]], folder: Path, runtime: str, goal: Goal
) -> dict[str, Runtime]:
    names = list(track(list(models), "build"))
    return {name: _open(shape, models[name], folder, runtime, goal) for name in names}


def _open(
    shape: EncoderShape,
    widths: Sequence[LayerWidth],
    folder: Path,
    runtime: str,
    goal: Goal,
    last_for_first_only: bool = False,
) -> Runtime:
    own = folder / str(len(list(folder.iterdir())))  # one each: a runtime may read its file as long as it lives
    own.mkdir()
    write_encoder(shape, widths, own / ONNX_FILE, last_for_first_only)
    return open_bare(own, runtime, goal)


def _few_enough(full: Runtime, batches: Sequence[Batch], goal: Goal, seed: int) -> list[Batch]:
    """Thin the batches out evenly where the widest model takes long, so that the whole table takes a minute."""
    speed = texts_a_second({"full": full}, batches, goal, 1, seed)["full"][0]
    seconds = sum(len(ids) for ids, _ in batches) / speed
    step = max(1, min(len(batches) // 2, round(seconds / _SECONDS_A_PASS)))
    return list(batches[step // 2 :: step])
