"""What an answer costs, without a clock: the same on every machine, so that the threshold is too."""

from __future__ import annotations

from pathlib import Path

import onnx


def multiplied_weights(path: Path) -> int:
    """Count the weights of an ONNX model that every token is multiplied with.

    Those are its matrices, but for the tables that tokens and positions are looked up in.
    """
    graph = onnx.load(str(path), load_external_data=False).graph
    looked_up = {node.input[0] for node in graph.node if node.op_type == "Gather"}
    # A table may be int8 and become float on its way.
    looked_up |= {node.input[0] for node in graph.node if set(node.output) & looked_up}
    matrices = [tensor for tensor in graph.initializer if len(tensor.dims) == 2 and tensor.name not in looked_up]
    return sum(tensor.dims[0] * tensor.dims[1] for tensor in matrices)
