"""What the tests of the finetune room share: the ways to train few parameters, and a model trained with one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import TypeAdapter
from torch import Tensor, nn

from stages.core.checkpoints import load_model
from stages.core.params import EfficientParams
from stages.core.stage import StageRun
from stages.finetune.efficient import make_efficient

TINY = yaml.safe_load((Path(__file__).parents[3] / "presets" / "tiny.yaml").read_text(encoding="utf-8"))

Stage = Callable[..., tuple[dict[str, Any], StageRun]]

HIDDEN, NEURONS, HEADS, LAYERS, LABELS = 32, 64, 4, 2, 3
HEAD = (HIDDEN + 1) * HIDDEN + (HIDDEN + 1) * LABELS
ALL = [(HIDDEN, HIDDEN)] * 4 + [(HIDDEN, NEURONS), (NEURONS, HIDDEN)]
LORA = {"kind": "lora", "rank": 3, "alpha": 6.0, "dropout": 0.1, "targets": "all"}
ADALORA = {
    **LORA,
    "kind": "adalora",
    "rank": 2,
    "start_rank": 4,
    "orthogonality": 0.1,
    "warmup": 0.1,
    "cooldown": 0.3,
}
KINDS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "adalora": ADALORA,
    "ia3": {"kind": "ia3"},
    "adapters": {"kind": "adapters", "width": 5},
    "prefix": {"kind": "prefix", "length": 3},
}
ADDED = {
    "lora": LAYERS * sum(3 * (first + second) for first, second in ALL),
    "adalora": LAYERS * sum(4 * (first + second) + 4 for first, second in ALL),
    "ia3": LAYERS * (2 * HIDDEN + NEURONS),
    "adapters": LAYERS * 2 * (2 * HIDDEN * 5 + 5 + HIDDEN),
    "prefix": LAYERS * 2 * 3 * HIDDEN,
}
MERGED = ("lora", "adalora", "ia3")
STEPS = 20


class Silent:
    """A run record that keeps nothing."""

    def log(self, step: int, values: dict[str, float]) -> None:
        pass


def params_of(raw: dict[str, Any]) -> EfficientParams:
    found: EfficientParams = TypeAdapter(EfficientParams).validate_python(raw)
    return found


def batch() -> dict[str, Tensor]:
    """Three texts of 9, 5 and 2 tokens."""
    ids = torch.randint(5, 40, (3, 9), generator=torch.Generator().manual_seed(5))
    mask = (torch.arange(9) < torch.tensor([9, 5, 2])[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model.eval()(**batch()).logits
    return found


def trained(kind: str, checkpoint: Path) -> tuple[Any, Any]:
    """A model after some steps with the given parameters, and what remains to be done."""
    model: Any = load_model(checkpoint)
    torch.manual_seed(2)
    tuning = make_efficient(model, params_of(KINDS[kind]), STEPS)
    optimizer = torch.optim.AdamW([part for part in model.parameters() if part.requires_grad], lr=1e-2)
    model.train()
    for step in range(1, STEPS + 1):
        loss = nn.functional.cross_entropy(model(**batch()).logits, torch.tensor([0, 1, 2]))
        optimizer.zero_grad()
        (loss if tuning.penalty is None else loss + tuning.penalty()).backward()
        optimizer.step()
        if tuning.after_step is not None:
            tuning.after_step(step)
    return model, tuning
