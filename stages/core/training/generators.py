"""The random generators of every library that a training step may draw from."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy
import torch


class Generators:
    """The generators of torch (CPU and the GPU in use), numpy and Python, as one thing that has a state."""

    def state_dict(self) -> dict[str, Any]:
        """Where each generator stands."""
        drawn: Any = numpy.random.get_state(legacy=False)
        key = torch.from_numpy(drawn["state"]["key"].astype(numpy.int64))
        version, numbers, gauss = random.getstate()
        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
            "numpy": {**drawn, "state": {**drawn["state"], "key": key}},
            "python": [version, torch.tensor(numbers), gauss],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Bring every generator back to where it stood; that of a GPU only where there is one."""
        torch.set_rng_state(state["torch"])
        if state["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
        drawn = state["numpy"]
        key = drawn["state"]["key"].numpy().astype(numpy.uint32)
        numpy.random.set_state({**drawn, "state": {**drawn["state"], "key": key}})
        version, numbers, gauss = state["python"]
        random.setstate((version, tuple(numbers.tolist()), gauss))
