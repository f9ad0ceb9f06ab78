"""Is the file as small as the parameters say?

An exporter may write a tensor twice, as a tied table once transposed, or keep folded copies in float32
(optimum#2241): the file is then larger than parameters times bits, and nobody notices.
"""

from __future__ import annotations

from torch import nn

_BYTES_PER_NODE = 400
"""Generous for a node with its names and the shapes of its values."""


def expected_bytes(model: nn.Module) -> int:
    """Bytes of a checkpoint's parameters and buffers, each tensor with its own bits, tied ones once."""
    tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values() if tensor.numel()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def largest_bytes(model: nn.Module, nodes: int, allowance: float) -> int:
    """Size above which a file holds more than the model: the share `allowance` over its bytes, and room for the graph.

    Args:
        model: the checkpoint.
        nodes: of the graph.
        allowance: such as 0.02.
    """
    return round(expected_bytes(model) * (1 + allowance)) + nodes * _BYTES_PER_NODE
