"""Optimizers by name: torch's own where it has one, fused where it can, and pytorch_optimizer's Lion and AdaBelief.

Parameters that share a learning rate and a decay are one group, so that a step costs a few calls and not one for each
parameter. The groups carry the parameters' names, and every value that a resumed run needs is a tensor in the state
of its parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from pytorch_optimizer import AdaBelief, Lion
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stages.core.errors import UserError
from stages.core.params import OptimizerParams

Group = dict[str, Any]
"""A group of parameters as torch takes it: `params`, pairs of name and parameter, `scale` and `weight_decay`."""


def build_optimizer(model: nn.Module, params: OptimizerParams, scale: Callable[[str], float]) -> torch.optim.Optimizer:
    """Build the optimizer of the parameters that require gradients.

    Args:
        model: what is trained.
        params: kind of the optimizer and its values.
        scale: share of the learning rate that a parameter of this name gets; each group has it as `scale`.

    Raises:
        UserError: if it is Muon and the model has no hidden matrices to train.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if params.kind != "muon":
        return _BUILDERS[params.kind](grouped(named, params.weight_decay, scale), params)
    hidden = hidden_matrices(model)
    matrices = grouped([pair for pair in named if pair[0] in hidden], params.weight_decay, scale)
    rest = grouped([pair for pair in named if pair[0] not in hidden], params.weight_decay, scale)
    if not matrices:
        raise UserError("optimizer.kind: muon is for matrices of hidden layers, and none is trained here; use adamw")
    return MuonAndAdamW(matrices, rest, params)


def grouped(
    named: Iterable[tuple[str, nn.Parameter]], weight_decay: float, scale: Callable[[str], float]
) -> list[Group]:
    """Group parameters by their share of the learning rate and their decay, in order of appearance.

    Biases and norms are not decayed, as in BERT's own optimizer. A group is stepped as one, so what is sharded in some
    way is not in one with what is not.
    """
    groups: dict[tuple[float, float, Any], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in named:
        layout = (parameter.device_mesh, parameter.placements) if isinstance(parameter, DTensor) else None
        key = (scale(name), weight_decay if parameter.ndim > 1 else 0.0, layout)
        groups.setdefault(key, []).append((name, parameter))
    return [{"params": pairs, "scale": share, "weight_decay": decay} for (share, decay, _), pairs in groups.items()]


def hidden_matrices(model: nn.Module) -> set[str]:
    """Names of the matrices inside a model's repeated layers, embeddings left out: what Muon is for."""
    repeated = (part for part in model.modules() if isinstance(part, nn.ModuleList))
    inside = [part for layers in repeated for part in layers.modules() if not isinstance(part, nn.Embedding)]
    matrices = {id(weight) for part in inside for weight in part.parameters(recurse=False) if weight.ndim == 2}
    return {name for name, parameter in model.named_parameters() if id(parameter) in matrices}


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for hidden matrices and AdamW for everything else, as one optimizer with one list of groups and one state.

    Muon (Jordan et al. 2024) makes the momentum of a matrix orthogonal, which means nothing for a row of an embedding,
    a bias or the directions of a head.
    """

    def __init__(self, matrices: list[Group], rest: list[Group], params: OptimizerParams):
        momentum, *betas = params.betas
        muon = torch.optim.Muon(
            matrices, lr=params.learning_rate, momentum=momentum, nesterov=True, adjust_lr_fn="match_rms_adamw"
        )
        self._parts: list[torch.optim.Optimizer] = [muon]
        if rest:
            self._parts.append(_adamw(rest, params, betas))
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share()

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step with both."""
        for part in self._parts:
            part.step(closure)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state that `state_dict` gave."""
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        """Let both parts work on this optimizer's own groups and state."""
        groups = iter(self.param_groups)
        for part in self._parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state


class CountingAdaBelief(AdaBelief):  # type: ignore[misc]
    """AdaBelief (2010.07468) that saves its count of steps with each parameter, as torch's optimizers do.

    pytorch_optimizer counts in the group, which is not part of the state that a resumed run is given.
    """

    def state_dict(self) -> dict[str, Any]:
        """Tell the state, with the count of steps of each parameter that has taken any."""
        told: dict[str, Any] = super().state_dict()
        counts = {index: group.get("step", 0) for group in told["param_groups"] for index in group["params"]}
        steps = {index: torch.tensor(float(counts[index])) for index in told["state"]}
        return {**told, "state": {index: {**entry, "step": steps[index]} for index, entry in told["state"].items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state that `state_dict` gave."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            counts = [self.state[one].pop("step") for one in group["params"] if one in self.state]
            group["step"] = int(max(counts, default=torch.tensor(0.0)))


def _sgd(groups: list[Group], params: OptimizerParams) -> torch.optim.Optimizer:
    (momentum,) = params.betas
    # Where the first step of all overflows in fp16, torch 2.13's fused form leaves its momentum unset: any numbers.
    fused = params.precision in ("fp32", "bf16")
    return torch.optim.SGD(groups, lr=params.learning_rate, momentum=momentum, nesterov=momentum > 0.0, fused=fused)


def _adam(groups: list[Group], params: OptimizerParams) -> torch.optim.Optimizer:
    return torch.optim.Adam(groups, lr=params.learning_rate, betas=_pair(params.betas), fused=True)


def _adamw(groups: list[Group], params: OptimizerParams, betas: list[float] | None = None) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=params.learning_rate, betas=_pair(betas or params.betas), fused=True)


def _adabelief(groups: list[Group], params: OptimizerParams) -> torch.optim.Optimizer:
    return CountingAdaBelief(groups, lr=params.learning_rate, betas=_pair(params.betas), eps=1e-16)


def _adafactor(groups: list[Group], params: OptimizerParams) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(groups, lr=params.learning_rate)


def _lion(groups: list[Group], params: OptimizerParams) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = Lion(groups, lr=params.learning_rate, betas=_pair(params.betas))
    return optimizer


def _pair(betas: list[float]) -> tuple[float | Tensor, float | Tensor]:
    first, second = betas
    return first, second


_BUILDERS: dict[str, Callable[[list[Group], OptimizerParams], torch.optim.Optimizer]] = {
    "sgd": _sgd,
    "adam": _adam,
    "adamw": _adamw,
    "adabelief": _adabelief,
    "adafactor": _adafactor,
    "lion": _lion,
}
