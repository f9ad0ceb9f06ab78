"""Adversarial training: gradients on embeddings moved to where the loss is larger.

An adversary computes the gradients of a batch in its own way. It gets a function that adds those of the batch, times a
share, to the parameters and returns the loss times that share; see `Recipe.adversary`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stages.core.errors import UserError
from stages.core.params import FastGradient, FreeAdversary

Backward = Callable[[float], float]
_TINY = 1e-12


def build_adversary(
    model: Any, params: FastGradient | FreeAdversary | None, pad_id: int
) -> Callable[[Backward], float] | None:
    """Make the adversary that params ask for; None for none.

    Raises:
        UserError: if it cannot work on this model.
    """
    if params is None:
        return None
    embeddings = model.get_input_embeddings()
    if params.kind == "freelb":
        if model.config.model_type == "xlnet":  # its embeddings come as [length, texts, width]
            raise UserError("finetune.adversarial: freelb does not know the order of xlnet's embeddings; take fgm")
        # What is trained may stand in for the embeddings of now, so each looks them up when it works.
        return lambda backward: free_adversary(model.get_input_embeddings(), params, pad_id, backward)
    if not embeddings.weight.requires_grad:
        raise UserError("finetune.adversarial: fgm needs word embeddings that are trained; take freelb, or null")
    return lambda backward: fast_gradient(model.get_input_embeddings().weight, params.epsilon, backward)


def fast_gradient(embeddings: Tensor, epsilon: float, backward: Backward) -> float:
    """Add the gradients of a batch, and once more those on embeddings moved by `epsilon` along the first (FGM).

    Args:
        embeddings: the table of word embeddings, [vocabulary, width].
        epsilon: length of the move, over the whole table.
        backward: of the batch.

    Returns:
        the loss before the move.
    """
    earlier = None if embeddings.grad is None else embeddings.grad.clone()  # of other parts of the batch
    loss = backward(1.0)
    if embeddings.grad is None:
        raise ValueError("the word embeddings took no part in the loss")
    with moved(embeddings, embeddings.grad if earlier is None else embeddings.grad - earlier, epsilon):
        backward(1.0)
    return loss


@contextmanager
def moved(weight: Tensor, direction: Tensor, distance: float) -> Iterator[None]:
    """Move a parameter so far in a direction, and back to the same bits on leaving."""
    length = direction.norm()
    before = weight.detach().clone()
    with torch.no_grad():
        weight.add_(direction, alpha=float(distance / (length + _TINY)))
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(before)


def free_adversary(embeddings: nn.Module, params: FreeAdversary, pad_id: int, backward: Backward) -> float:
    """Add the mean of the gradients on embeddings that move uphill from step to step (FreeLB, algorithm 1).

    All steps see the same dropout masks (section 3.3), so that they differ by the move alone.

    Args:
        embeddings: module of the word embeddings.
        params: how many steps, how long, how far.
        pad_id: token whose embeddings stay.
        backward: of the batch.

    Returns:
        the mean loss of the steps.
    """
    device = next(embeddings.parameters()).device
    devices = [device] if device.type == "cuda" else []
    move, share = Move(params.epsilon, pad_id, seed=int(torch.randint(2**62, ()))), 1.0 / params.steps
    with move.added_to(embeddings):
        loss = 0.0
        for _ in range(params.steps - 1):
            with torch.random.fork_rng(devices):
                loss += backward(share)
            move.climb(params.step_size)
        return loss + backward(share)


class Move:
    """What is added to the embeddings of a batch: within a ball around each text, nothing where it is padded.

    Args:
        epsilon: radius of the ball.
        pad_id: token that fills short texts.
        seed: of where in the ball it starts.
    """

    def __init__(self, epsilon: float, pad_id: int, seed: int):
        self._epsilon, self._pad_id, self._seed = epsilon, pad_id, seed
        self.delta: Tensor | None = None
        """[texts, length, width]; None until the embeddings of the batch are known."""

    @contextmanager
    def added_to(self, embeddings: nn.Module) -> Iterator[None]:
        """Add it to all that the embeddings give."""
        handle = embeddings.register_forward_hook(lambda _, inputs, output: output + self._for(inputs[0], output))
        try:
            yield
        finally:
            handle.remove()

    def _for(self, ids: Tensor, output: Tensor) -> Tensor:
        if self.delta is None:
            self.delta = start(ids != self._pad_id, output.shape[-1], self._epsilon, self._seed).requires_grad_()
        return self.delta

    def climb(self, step_size: float) -> None:
        """Go one step along the gradient that the last pass left."""
        if self.delta is None or self.delta.grad is None:
            raise ValueError("the word embeddings took no part in the loss")
        self.delta = climbed(self.delta.detach(), self.delta.grad, step_size, self._epsilon).requires_grad_()


def start(tokens: Tensor, width: int, epsilon: float, seed: int) -> Tensor:
    """Draw where the moves start: evenly from -epsilon to epsilon, over the root of a text's number of values.

    Args:
        tokens: where there is text, bool [texts, length].
        width: of the embeddings.
        epsilon: radius of the ball that it thereby lies in.
        seed: of the draw.

    Returns:
        float [texts, length, width], zero where there is no text.
    """
    generator = torch.Generator(tokens.device).manual_seed(seed)
    drawn = torch.rand(*tokens.shape, width, generator=generator, device=tokens.device) * 2.0 - 1.0
    values = tokens.sum(dim=1).clamp(min=1) * width
    return drawn * tokens[:, :, None] * (epsilon / values.sqrt())[:, None, None]


def climbed(delta: Tensor, gradient: Tensor, step_size: float, epsilon: float) -> Tensor:
    """Step along the gradient of each text and come back into its ball; all [texts, length, width]."""
    stepped = delta + step_size * gradient / (_lengths(gradient) + _TINY)
    return stepped * (epsilon / (_lengths(stepped) + _TINY)).clamp(max=1.0)


def _lengths(values: Tensor) -> Tensor:
    """Frobenius norm of each text's values, [texts, 1, 1]."""
    lengths: Tensor = values.flatten(1).norm(dim=1)[:, None, None]
    return lengths
