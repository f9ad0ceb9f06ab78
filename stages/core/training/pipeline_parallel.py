"""A model whose layers are spread over the processes of `training.parallel.pipeline` (GPipe, 1811.06965).

Every process runs the stage's own loss on a model of which it has only some layers: the hidden states that it received
stand in for the embeddings, and at the first layer that it lacks it stops and hands its own on. So a loss needs to know
nothing of all this, as long as it calls the model once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Never

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from stages.core.errors import UserError
from stages.core.structure import encoder_layers, hidden_width, is_compressible
from stages.core.training.recipe import Recipe, Tensors

_PARTS_PER_PROCESS = 2  # micro-batches in the pipeline; more leave less idle time and make smaller matrices


class _HandedOn(Exception):  # noqa: N818  it is no error
    """The model has come to a layer that another process has."""

    def __init__(self, hidden: Tensor):
        super().__init__()
        self.hidden = hidden


class _Received(nn.Module):
    """In place of the embeddings: hidden states from the process before."""

    hidden: Tensor

    def forward(self, *_: Any, **__: Any) -> Tensor:
        """Hidden states, [texts, length, hidden]."""
        return self.hidden


class _Earlier(nn.Module):
    """In place of a layer that an earlier process has computed."""

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        """Hidden states as they are."""
        return hidden


class _Later(nn.Module):
    """In place of a layer that a later process will compute."""

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Never:
        """Stop here."""
        raise _HandedOn(hidden)


class PipelinePart(nn.Module):
    """The layers of one process, with embeddings in the first and the head in the last, and the loss."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        index: int,
        count: int,
        autocast: Callable[[], AbstractContextManager[Any]],
    ):
        super().__init__()
        self.model, self.index, self.count = model, index, count
        self.hidden = hidden_width(model)
        self.received = _Received()
        self.scale = 0.0
        """Weight of an example or token in the loss of the batch."""
        self.recipe, self._autocast = recipe, autocast
        _keep_own(model, index, count, self.received)

    def forward(self, *received: Tensor, **tensors: Tensor) -> Tensor:
        """Hidden states for the next process, [texts, length, hidden], or in the last a micro-batch's loss, [1]."""
        if received:
            self.received.hidden = received[0]
        with self._autocast():
            return self._loss(received[0], tensors) if self.index == self.count - 1 else self._hidden(tensors)

    def _loss(self, received: Tensor, tensors: Tensors) -> Tensor:
        weight = self.recipe.weight(tensors)
        # The mean over nothing is no number, but the hidden states still need a gradient: of zero.
        loss = self.recipe.loss(tensors) * (weight * self.scale) if weight else 0.0 * received.sum()
        return loss.float().reshape(1)

    def _hidden(self, tensors: Tensors) -> Tensor:
        try:
            self.recipe.loss(tensors)
        except _HandedOn as handed:
            return handed.hidden.float()
        raise RuntimeError("the loss did not call the model's layers")


class Pipeline:
    """Runs micro-batches through the parts of a model."""

    def __init__(self, part: PipelinePart, group: ProcessGroup, device: torch.device):
        self._part, self._group, self._device = part, group, device

    def add_gradients(self, tensors: Tensors, share: float) -> float:
        """Add the gradients of rows that are so large a share of their batch's weight.

        All processes of the pipeline are given the same rows. The last one returns their share of the batch's loss, and
        the others 0.
        """
        part, rows = self._part, len(next(iter(tensors.values())))
        part.scale = share / part.recipe.weight(tensors)
        count = min(rows, _PARTS_PER_PROCESS * part.count)
        even = rows - rows % count  # all micro-batches of a pass have the same shape
        value = self._pass({name: tensor[:even] for name, tensor in tensors.items()}, count)
        if even < rows:
            value += self._pass({name: tensor[even:] for name, tensor in tensors.items()}, 1)
        return value

    def _pass(self, tensors: Tensors, count: int) -> float:
        shape = next(tensor.shape for tensor in tensors.values() if tensor.ndim > 1)
        hidden = torch.empty(shape[0] // count, shape[1], self._part.hidden, device="meta", requires_grad=True)
        last = self._part.index == self._part.count - 1
        stage = PipelineStage(
            self._part,
            self._part.index,
            self._part.count,
            self._device,
            input_args=(hidden,) if self._part.index else (),
            output_args=torch.empty(1, device="meta", requires_grad=True) if last else hidden,
            group=self._group,
        )
        kind = Schedule1F1B if count >= self._part.count else ScheduleGPipe
        schedule = kind(stage, count, loss_fn=lambda loss, _: loss.sum(), scale_grads=False)
        losses: list[Tensor] = []
        places = torch.zeros(count, device=self._device)  # there is nothing left to compare the loss with
        schedule.step(target=places, losses=losses, return_outputs=False, **dict[str, Any](tensors))
        return sum(float(loss.detach()) for loss in losses)


def check_pipeline(model: nn.Module, count: int) -> None:
    """Check that a model's layers can be spread.

    Raises:
        UserError: if its family is not known here, or there are fewer layers than processes.
    """
    config: Any = model.config
    if not is_compressible(model):
        raise UserError(
            f"training.parallel.pipeline: nothing is known of how to spread the layers of a {config.model_type}; "
            "set it to 1 and use shards"
        )
    layers = len(encoder_layers(model))
    if layers < count:
        raise UserError(f"training.parallel.pipeline: {count} processes for {layers} layers; take {layers} at most")


def layer_owner(layer: int, layers: int, count: int) -> int:
    """Process that has a layer: runs of nearly equal length, in order."""
    return layer * count // layers


def _keep_own(model: Any, index: int, count: int, received: _Received) -> None:
    """Put stand-ins for all that other processes have, in place."""
    body = getattr(model, model.base_model_prefix, model)
    layers = body.encoder.layer
    for number in range(len(layers)):
        owner = layer_owner(number, len(layers), count)
        if owner != index:
            layers[number] = _Earlier() if owner < index else _Later()
    if index:
        body.embeddings = received
        if hasattr(body, "embeddings_project"):
            body.embeddings_project = _Earlier()
    if index < count - 1:
        for owner, name, part in [(model, *child) for child in model.named_children()]:
            if part is not body:
                setattr(owner, name, _Earlier())
        if getattr(body, "pooler", None) is not None:
            body.pooler = _Earlier()
