"""One training run on several devices, a process for each (`training.parallel`).

Every process prepares the same batches and takes its rows of each; what a row weighs in the loss is told by the whole
batch, so that the gradients are those of one process with that batch. torch and accelerate do the rest: DDP copies the
model, FSDP2 shards it, and `tensor_parallel` and `pipeline_parallel` say what of it is cut and how it is spread.

Where the model is cut, the loop trains a copy of its parts and the caller's model waits on the CPU; it is put together
to be judged, to be saved, and at the end.
"""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from stages.core.errors import UserError
from stages.core.hardware import TrainingPrecision
from stages.core.launch import check_processes, is_first_of_machine, is_first_process, process_count
from stages.core.observe.progress import say
from stages.core.params import ParallelParams
from stages.core.training.pipeline_parallel import Pipeline, PipelinePart, check_pipeline
from stages.core.training.precision import autocast, build_accelerator, clip_gradients
from stages.core.training.recipe import Recipe, Tensors, split
from stages.core.training.tensor_parallel import tensor_plan

Found = TypeVar("Found")

_ONE = ParallelParams(data=1, shards=1, tensor=1, pipeline=1)
_AXES = ("pipeline", "data", "shards", "tensor")  # from those that talk least to those that talk most: neighbours
# It tells of every sum over two axes that takes two steps, once for each process and layout.
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
_PATIENCE = timedelta(hours=1)  # the first process judges the model alone, and the others wait that long for it


class Devices:
    """Where a training run takes place; in one process all of this does nothing."""

    def __init__(self, parallel: ParallelParams | None, recipe: Recipe, precision: TrainingPrecision):
        """Join the other processes.

        Raises:
            UserError: if there are more or fewer than the params ask for, or the recipe cannot be spread so.
        """
        self.parallel = parallel or _ONE
        check_processes(self.parallel)
        check_recipe(self.parallel, recipe, precision)
        _join()
        self.accelerator, self._precision = build_accelerator(precision), precision
        self.sizes = self.parallel.model_dump() if self.parallel.processes > 1 else {}
        """Of the axes, where there are several processes."""
        self.mesh = _mesh(self.parallel, self.accelerator.device)
        places = {axis: self.mesh.get_local_rank(axis) if self.mesh else 0 for axis in _AXES}
        self.first = not any(places.values())
        """Whether this process speaks and writes for all."""
        self.replicas = self.parallel.data * self.parallel.shards
        self._replica = places["data"] * self.parallel.shards + places["shards"]
        self._place = places["pipeline"]
        self._seed = torch.initial_seed() % 2**31
        self._cut: Cut | None = None
        self._pipeline: Pipeline | None = None
        self._tied: Tied | None = None

    def place(self, loss: nn.Module, model: nn.Module, recipe: Recipe) -> nn.Module:
        """Bring a model, and the module that computes its loss, to where they are trained.

        Raises:
            UserError: if the model's family cannot be cut so.
        """
        if self.mesh is None:
            return loss.to(self.accelerator.device)
        _check_same(model)
        if self.replicas == self.parallel.processes == self.parallel.data:
            ids = [self.accelerator.device] if self.accelerator.device.type == "cuda" else None
            loss.to(self.accelerator.device)
            return DistributedDataParallel(loss, ids, forward_sync_buffers=False, find_unused_parameters=True)
        return self._spread(loss, model, recipe)

    def shares(self, tensors: Tensors, parts: int, weight: Callable[[Tensors], float]) -> list[tuple[Tensors, float]]:
        """Cut this process's rows of a batch into micro-batches, and say how large a share of the batch each is.

        With others to keep step with, every process gets as many; one without rows or weight of its own computes
        another's and lets it count for nothing.
        """
        cut = [split(rows, parts) for rows in split(tensors, self.replicas)]
        weights = [[weight(part) if _count(part) else 0.0 for part in rows] for rows in cut]
        total = sum(map(sum, weights))
        own = [(part, part_weight / total) for part, part_weight in self._own(cut, weights) if part_weight]
        if self.replicas == 1 or not total:
            return own
        every = zip(cut, weights, strict=True)
        stand_in = next(part for row in every for part, part_weight in zip(*row, strict=True) if part_weight)
        return own + [(stand_in, 0.0)] * (parts - len(own))

    def _own(self, cut: Sequence[list[Tensors]], weights: Sequence[list[float]]) -> list[tuple[Tensors, float]]:
        return list(zip(cut[self._replica], weights[self._replica], strict=True))

    def add_gradients(self, loss: nn.Module, tensors: Tensors, share: float) -> float:
        """Add the gradients of a micro-batch that is so large a share of its batch; return its share of the loss."""
        if self._pipeline is not None:
            return self._pipeline.add_gradients(tensors, share)
        with self.autocast():
            value = loss(tensors) * share
        self.accelerator.backward(value * self.replicas)  # torch takes the mean over the replicas; fp16 is scaled
        return float(value.detach())

    def waiting(self, loss: nn.Module, more: bool) -> AbstractContextManager[None]:
        """Leave gradients where they are while more are to be added, instead of exchanging them each time."""
        if more and isinstance(loss, DistributedDataParallel):
            return cast(AbstractContextManager[None], loss.no_sync())
        if isinstance(loss, FSDPModule):
            loss.set_requires_gradient_sync(not more)
        return nullcontext()

    def autocast(self) -> AbstractContextManager[object]:
        """Compute in the precision of the run."""
        return autocast(self._precision, self.accelerator.device.type)

    def clip(self, model: nn.Module, optimizer: torch.optim.Optimizer, maximum: float) -> float:
        """Finish the gradients of a batch, and scale them down to a norm of at most `maximum` over all parameters.

        Returns:
            the norm that they had.
        """
        if self._pipeline is not None:
            self._finish_pipeline(model)
        if self._cut is None:
            return clip_gradients(self.accelerator, optimizer, model.parameters(), maximum)
        groups: dict[Any, list[nn.Parameter]] = defaultdict(list)
        for parameter in model.parameters():
            if parameter.grad is not None:
                layout = (parameter.device_mesh, parameter.placements) if isinstance(parameter, DTensor) else None
                groups[layout].append(parameter)
        counted_elsewhere = self._tied.weight if self._tied is not None and self._place else None
        counted = [
            [parameter for parameter in group if parameter is not counted_elsewhere] for group in groups.values()
        ]
        squares = [_square(group) for group in counted if group]
        total = torch.stack([torch.zeros((), device=self.accelerator.device), *squares]).sum()
        if self.parallel.pipeline > 1:
            torch.distributed.all_reduce(total, group=self._group("pipeline"))
        for group in groups.values():
            clip_grads_with_norm_(group, maximum, total.sqrt())
        return float(total.sqrt())

    def _finish_pipeline(self, model: nn.Module) -> None:
        """Add up what the copies of a pipeline, and both its ends, have of the gradients."""
        if self._tied is not None:
            self._tied.add_gradients()
        gradients = [_local(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
        if self.parallel.data > 1:
            for gradient in gradients:
                torch.distributed.all_reduce(gradient, group=self._group("data"))

    def total(self, value: float) -> float:
        """Add up what the processes have of a batch's loss."""
        if self.mesh is None:
            return value
        summed = torch.tensor(value, dtype=torch.float64, device=self.accelerator.device)
        torch.distributed.all_reduce(summed)
        return summed.item() / self.parallel.tensor  # those have the same loss

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Tell of each flag whether it is set in any process."""
        if self.mesh is None:
            return flags
        raised = torch.tensor(flags, dtype=torch.int32, device=self.accelerator.device)
        torch.distributed.all_reduce(raised, torch.distributed.ReduceOp.MAX)
        return tuple(map(bool, raised.tolist()))

    def check_alone(self, problem: str) -> None:
        """Refuse to go on after a problem that one process has and the others wait for.

        Raises:
            UserError: if there are others.
        """
        if self.mesh is None:
            return
        line = f"{problem} in one of several processes; lower batch_tokens, or spread the model further"
        if not is_first_of_machine():  # the stage tells errors in that one alone
            say(line)
        raise UserError(line)

    def meet(self) -> None:
        """Wait until all processes have come here."""
        if self.mesh is not None:
            torch.distributed.barrier()

    def seed(self, step: int) -> None:
        """Draw dropout anew at every step: unlike in the replicas, alike in processes that compute a layer together.

        So nothing of the generators needs to be saved, and a run can go on with other processes.
        """
        if self.mesh is not None:
            place = self._replica * self.parallel.pipeline + self._place
            torch.manual_seed((self._seed * 1_000_003 + step) * 4_099 + place)

    @contextmanager
    def whole(self, changed: bool = False) -> Iterator[None]:
        """Have the caller's model whole for as long as the block lasts; all processes must come here.

        Args:
            changed: whether the block sets its weights, which then go to the parts.
        """
        if self._cut is None:
            yield
            return
        model, state = self._cut.model, self._merged(whole_tensors(self._cut.parts.state_dict()))
        model.__dict__ = self._cut.whole
        try:
            model.load_state_dict(state)
            model.to(self.accelerator.device)
            yield
            if changed:
                _fill(self._cut.parts, model.state_dict())
        finally:
            model.to("cpu")
            model.__dict__ = self._cut.parts.__dict__

    def leave(self) -> None:
        """Give the caller's model back whole, on the CPU; the parts are done with."""
        if self._cut is not None:
            with self.whole():
                pass
            self._cut.model.__dict__ = self._cut.whole
            self._cut = None

    def optimizer(self, optimizer: torch.optim.Optimizer) -> Any:
        """The optimizer as one process would have it, whose state can be read and set; all processes must come here."""
        names = {} if self._cut is None else self._cut.names
        return NamedOptimizer(optimizer, names, self._merged)

    def _spread(self, loss: nn.Module, model: nn.Module, recipe: Recipe) -> nn.Module:
        """Cut a copy of the model by tensor, then by pipeline or shards, and let it stand in for the model."""
        sizes, mesh, device = self.parallel, cast(DeviceMesh, self.mesh), self.accelerator.device
        plan = tensor_plan(model, sizes.tensor) if sizes.tensor > 1 else {}
        if sizes.pipeline > 1:
            check_pipeline(model, sizes.pipeline)
        parts = copy.deepcopy(model).to(device)
        for tensor in parts.state_dict().values():
            torch.distributed.broadcast(tensor, src=0)
        if plan:
            parallelize_module(parts, mesh["tensor"], plan)
        self._cut = Cut(model, parts, model.__dict__, _first_names(model))
        model.__dict__ = parts.__dict__
        if sizes.pipeline > 1:
            tied, group = _tied_names(model), _ends_of_pipelines(mesh)
            part = PipelinePart(model, recipe, self._place, sizes.pipeline, self.autocast)
            self._pipeline = Pipeline(part, self._group("pipeline"), device)
            own = dict(model.named_parameters())
            self._tied = next((Tied(own[name], group) for name in tied if group and name in own), None)
            return part
        if self.replicas > 1:
            replicas = mesh["data", "shards"] if sizes.data > 1 else mesh["shards"]
            for block in _blocks(model):
                fully_shard(block, mesh=replicas)
            fully_shard(loss, mesh=replicas)
        return loss

    def _group(self, axis: str) -> torch.distributed.ProcessGroup:
        return cast(DeviceMesh, self.mesh).get_group(axis)

    def _merged(self, found: dict[Any, Found]) -> dict[Any, Found]:
        """Put together what the processes of a pipeline have."""
        if self.parallel.pipeline == 1:
            return found
        every: list[Any] = [None] * self.parallel.pipeline
        torch.distributed.all_gather_object(every, found, group=self._group("pipeline"))
        return {key: value for one in every for key, value in one.items()}


@dataclass
class Cut:
    """A model of which each process trains parts."""

    model: nn.Module
    """The caller's, with the attributes of `parts` while it is trained."""
    parts: nn.Module
    whole: dict[str, Any]
    """The attributes of the caller's model that wait."""
    names: dict[str, str]
    """First name of every parameter by each of its names."""


class NamedOptimizer:
    """The state of an optimizer by the names of its parameters, whole, so that a saved one fits any processes."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        first_names: Mapping[str, str],
        merged: Callable[[dict[Any, Any]], dict[Any, Any]],
    ):
        """Args are the optimizer, the first of all names of what has several, and what puts processes together."""
        self._optimizer = optimizer
        found = [name for group in optimizer.param_groups for name in group["param_names"]]
        self._names = [first_names.get(name, name) for name in found]
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        state = optimizer.state_dict()["state"]
        self._state = merged({self._names[index]: whole_tensors(entry) for index, entry in state.items()})

    def state_dict(self) -> dict[str, Any]:
        """State by name of the parameter."""
        return self._state

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take this process's parts of a state."""
        own = {
            index: {key: _part(value, like=parameter) for key, value in saved[name].items()}
            for index, (name, parameter) in enumerate(zip(self._names, self._parameters, strict=True))
            if name in saved
        }
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": own})


@dataclass
class Tied:
    """What the first and the last process of a pipeline both have: the embeddings that are also the head."""

    weight: nn.Parameter
    group: torch.distributed.ProcessGroup

    def add_gradients(self) -> None:
        """Give both the sum of their gradients; a batch without weight leaves none in either."""
        if self.weight.grad is not None:
            torch.distributed.all_reduce(_local(self.weight.grad), group=self.group)


def on_first(act: Callable[[], Found]) -> Found:
    """Let the first process act, and tell all what it found: what a clock says is no fact to others."""
    if not _join():
        return act()
    found = [act() if is_first_process() else None]
    torch.distributed.broadcast_object_list(found, src=0)
    return cast(Found, found[0])


def _join() -> bool:
    """Meet the processes that were started with this one; False where there are none."""
    if (process_count() or 1) == 1:
        return False
    PartialState(timeout=_PATIENCE)
    return True


def describe(sizes: Mapping[str, int]) -> str:
    """Say how a run is spread, in words of the params."""
    return ", ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one process"


def whole_tensors(tensors: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
    """Put sharded tensors together; all processes must come here."""
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()
        for name, tensor in tensors.items()
    }


def _part(whole: Tensor, like: Tensor) -> Tensor:
    """This process's part of a tensor, cut like another; what has another shape is not cut."""
    if not isinstance(like, DTensor) or whole.shape != like.shape:
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def _fill(parts: nn.Module, state: Mapping[str, Tensor]) -> None:
    for name, tensor in parts.state_dict().items():
        tensor.copy_(_part(state[name], like=tensor))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _square(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Square of the norm of the gradients of parameters that are cut alike."""
    norm = get_total_norm([cast(Tensor, parameter.grad) for parameter in parameters])
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm) ** 2


def _count(tensors: Tensors) -> int:
    return len(next(iter(tensors.values())))


def _mesh(parallel: ParallelParams, device: torch.device) -> DeviceMesh | None:
    if parallel.processes == 1:
        return None
    return init_device_mesh(device.type, tuple(getattr(parallel, axis) for axis in _AXES), mesh_dim_names=_AXES)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Layers of the longest stack: each is gathered for its own computation, and only then."""
    stacks = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    longest = max(stacks, key=len, default=nn.ModuleList())
    return [layer for layer in longest if next(layer.parameters(), None) is not None]


def _first_names(model: nn.Module) -> dict[str, str]:
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    return {name: first[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}


def _tied_names(model: nn.Module) -> list[str]:
    """All names of an embedding that is also the head; none where there is none."""
    names: dict[str, list[str]] = defaultdict(list)
    for name, first in _first_names(model).items():
        names[first].append(name)
    return next((all_ for first, all_ in names.items() if ".embeddings." in first and len(all_) > 1), [])


def _ends_of_pipelines(mesh: DeviceMesh) -> torch.distributed.ProcessGroup | None:
    """The group of the first and the last process of this process's pipeline; none to those between."""
    ranks = mesh.mesh.flatten(1)
    pairs = [[int(ranks[0, column]), int(ranks[-1, column])] for column in range(ranks.shape[1])]
    found: Any = torch.distributed.new_subgroups_by_enumeration(pairs)  # type: ignore[no-untyped-call]
    group: torch.distributed.ProcessGroup | None = found[0]
    return group


def check_recipe(parallel: ParallelParams, recipe: Recipe, precision: str) -> None:
    """Check that a recipe can be trained so.

    Raises:
        UserError: if not.
    """
    computed_together = parallel.tensor * parallel.pipeline > 1
    if computed_together and not recipe.divisible:
        raise UserError(
            "training.parallel: what is trained here looks into the model, so each process needs all of it; "
            "set tensor and pipeline to 1"
        )
    if recipe.adversary is not None and (computed_together or parallel.shards > 1):
        raise UserError("training.parallel: adversarial steps need whole embeddings; use data alone, or turn them off")
    if parallel.processes > parallel.data:
        if precision == "fp16":
            raise UserError("training.parallel: fp16 is scaled for whole models only; take bf16 or fp32, or data alone")
        if recipe.optimizer.averaging is not None:
            raise UserError("training.parallel: weights are averaged whole; set averaging to null, or use data alone")


def _check_same(model: nn.Module) -> None:
    """Processes with models of different shapes would wait for each other forever."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    every: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, shapes)
    if any(other != every[0] for other in every):
        raise UserError("training.parallel: the processes made models of different shapes; train in one process")
