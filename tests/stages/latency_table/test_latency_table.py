from collections import Counter
from pathlib import Path

import numpy
import onnx
import pytest

from stages.core.latency import Deployment, open_bare
from stages.core.runtimes import Goal
from stages.core.structure import LayerWidth
from stages.latency_table.graphs import EncoderShape, write_encoder
from stages.latency_table.measure import RUNTIMES, grid

WIDTHS = [LayerWidth(2, 48), LayerWidth(0, 16), LayerWidth(3, 0), LayerWidth(0, 0)]


def _shape(quantized: bool) -> EncoderShape:
    return EncoderShape(hidden=32, head_size=8, classes=3, deployment=Deployment(quantized, quantized, 21))


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_every_runtime_runs_the_timed_models_at_any_width(runtime: str, quantized: bool, tmp_path: Path) -> None:
    write_encoder(_shape(quantized), WIDTHS, tmp_path / "model.onnx")
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)
    ids = numpy.arange(10, dtype=numpy.int64).reshape(2, 5)
    goals: tuple[Goal, ...] = ("latency", "throughput")
    for goal in goals:
        opened = open_bare(tmp_path, runtime, goal)
        (logits,) = opened.logits_many([(ids, numpy.ones_like(ids))])
        assert logits.shape == (2, 3)
        assert numpy.isfinite(logits).all()


def test_a_block_without_parts_is_not_in_the_graph(tmp_path: Path) -> None:
    write_encoder(_shape(True), WIDTHS, tmp_path / "model.onnx")
    nodes = Counter(node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node)
    assert nodes["Softmax"] == 2
    assert nodes["Gelu"] == 2
    assert nodes["LayerNormalization"] == 1 + 2 * len(WIDTHS)
    # Query, key, value, product with keys, with values, output; two of feed-forward; pooler and head.
    assert nodes["MatMul"] == 2 * 6 + 2 * 2 + 2


def test_the_grid_holds_multiples_and_both_ends() -> None:
    assert grid(12, 1, 20) == list(range(1, 13))
    assert grid(1536, 16, 4) == [16, 384, 768, 1152, 1536]
    assert grid(10, 16, 4) == [10]
    assert all(width % 16 == 0 or width == 1500 for width in grid(1500, 16, 9))
