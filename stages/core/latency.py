"""What the parts of an encoder cost on the machine at hand, and the timing of exported models against each other.

Removing parameters need not remove time: a narrower matrix can take as long as a wide one. So pruning asks a table of
measured times, one entry per kind of part and width (ZipLM, 2302.04089), and in the end the clock.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy
from tokenizers import Tokenizer

from stages.core.artifacts import read_json, write_json
from stages.core.batches import length_batches, pad
from stages.core.examples import Examples, sample
from stages.core.runtimes import Batch, ExportedModel, Goal, Runtime, open_runtime
from stages.core.structure import LayerWidth
from stages.core.timing import interleave

TABLE_FILE = "latency.json"
INPUTS = ("input_ids", "attention_mask")

_BATCH_SIZE = 32
_SINGLE_TEXTS = 48
_BATCHES = 8


@dataclass(frozen=True)
class Deployment:
    """The form in which models are deployed, and so timed."""

    quantized: bool
    """Linear layers in int8."""
    int8_embeddings: bool
    opset: int
    """Of the exported file."""


@dataclass(frozen=True)
class LatencyTable:
    """Seconds a text on one runtime, by part and width."""

    runtime: str
    """Name of the deployment runtime."""
    deployment: Deployment
    rest: float
    """Everything outside the encoder layers: embeddings, pooler, head, the call itself."""
    shell: float
    """What stays of a layer without parts: its two norms."""
    heads: dict[int, float]
    """Attention by number of heads; 0 costs nothing."""
    neurons: dict[int, float]
    """Feed-forward by number of neurons; 0 costs nothing."""
    last: float
    """What the last layer's parts cost as a share of another layer's: exported, it answers for the first token only."""

    def attention_seconds(self, heads: int) -> float:
        """Time of a layer's attention, between measured widths by straight lines."""
        return _interpolate(self.heads, heads)

    def feed_forward_seconds(self, neurons: int) -> float:
        """Time of a layer's feed-forward, between measured widths by straight lines."""
        return _interpolate(self.neurons, neurons)

    def model_seconds(self, widths: Sequence[LayerWidth]) -> float:
        """Time of a whole model."""
        parts = [self.attention_seconds(width.heads) + self.feed_forward_seconds(width.neurons) for width in widths]
        weighted = sum(share * part for share, part in zip(self.shares(len(widths)), parts, strict=True))
        return self.rest + self.shell * len(widths) + weighted

    def shares(self, layers: int) -> list[float]:
        """What each layer's parts cost as a share of an ordinary layer's."""
        return [1.0] * (layers - 1) + [self.last] * min(layers, 1)

    def largest_speedup(self, widths: Sequence[LayerWidth]) -> float:
        """How many times faster the model would be without any heads and neurons."""
        return self.model_seconds(widths) / self.model_seconds([LayerWidth(0, 0)] * len(widths))


def write_table(table: LatencyTable | None, folder: Path) -> None:
    """Write a table, or None where nothing was measured."""
    write_json(folder / TABLE_FILE, {"table": None if table is None else asdict(table)})


def read_table(folder: Path) -> LatencyTable | None:
    """Read what `write_table` wrote."""
    entry: dict[str, Any] | None = read_json(folder / TABLE_FILE)["table"]
    if entry is None:
        return None
    by_width = {name: {int(width): time for width, time in entry[name].items()} for name in ("heads", "neurons")}
    return LatencyTable(**{**entry, **by_width, "deployment": Deployment(**entry["deployment"])})


def workload(examples: Examples, goal: Goal, pad_id: int, seed: int) -> list[Batch]:
    """Draw real texts as they would be served.

    Args:
        examples: of the task.
        goal: one text at a time, or batches of similar length whose lengths spread over all that occur.
        pad_id: token id that fills short texts.
        seed: of the draw.

    Returns:
        token ids and mask of each call.
    """
    size, calls = (1, _SINGLE_TEXTS) if goal == "latency" else (_BATCH_SIZE, _BATCHES)
    rows = sample(examples, size * calls, seed).input_ids
    return [pad([rows[i] for i in batch], pad_id) for batch in length_batches([len(row) for row in rows], size)]


def open_bare(folder: Path, name: str, goal: Goal) -> Runtime:
    """Load `model.onnx` with the inputs `INPUTS` for timing; it needs no tokenizer, so it gets an empty one."""
    from tokenizers.models import WordLevel

    model = ExportedModel(
        folder=folder,
        labels=(),
        maximum_length=0,
        inputs=INPUTS,
        quantized=False,
        weight_bits=None,
        parameters=0,
        tokenizer=Tokenizer(WordLevel({}, unk_token="")),
        pad_id=0,
    )
    return open_runtime(name, model, goal=goal)


def texts_a_second(
    contenders: Mapping[str, Runtime], batches: Sequence[Batch], goal: Goal, rounds: int, seed: int
) -> dict[str, list[float]]:
    """Time models in turns, after a warm-up.

    Args:
        contenders: by name.
        batches: of `workload`; every contender answers all of them in every round.
        goal: whether to answer calls one by one or side by side.
        rounds: that count.
        seed: of the order.

    Returns:
        one number a round, by name.
    """
    texts = sum(len(ids) for ids, _ in batches)

    def work(runtime: Runtime) -> Callable[[], int]:
        def answer() -> int:
            if goal == "throughput":
                runtime.logits_many(batches)
            else:
                for batch in batches:
                    runtime.logits(*batch)
            return texts

        return answer

    return interleave({name: work(runtime) for name, runtime in contenders.items()}, rounds, seed)


def without_noise(table: LatencyTable) -> LatencyTable:
    """Make no width cost more than a larger one: what little a measurement says otherwise is noise to a search."""
    return replace(table, heads=_rising(table.heads), neurons=_rising(table.neurons))


def seconds_a_text(speeds: Sequence[float]) -> float:
    """Turn texts a second into seconds: of the rounds the fast quartile, as what else runs can only slow one down."""
    return 1.0 / float(numpy.quantile(numpy.asarray(speeds), 0.75))


def _interpolate(measured: Mapping[int, float], width: int) -> float:
    widths = sorted({0, *measured})
    return float(numpy.interp(width, widths, [measured.get(at, 0.0) for at in widths]))


def _rising(measured: Mapping[int, float]) -> dict[int, float]:
    """Least-squares fit that never falls (pool adjacent violators)."""
    pools: list[tuple[float, list[int]]] = []
    for width in sorted(measured):
        pools.append((max(0.0, measured[width]), [width]))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (left, first), (right, second) = pools[-2:]
            mean = (left * len(first) + right * len(second)) / (len(first) + len(second))
            pools[-2:] = [(mean, first + second)]
    return {width: mean for mean, widths in pools for width in widths}
