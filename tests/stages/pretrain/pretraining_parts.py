"""A tiny corpus, and random configurations of every family that pretraining takes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from stages.core.artifacts import write_json, write_manifest
from stages.core.params import Params, load_params

LENGTH = 24
_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_PLACES = {"max_position_embeddings": 64}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": {**_SMALL, **_PLACES},
    "roberta": {**_SMALL, **_PLACES},
    "albert": {**_SMALL, **_PLACES, "embedding_size": 16},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, **_PLACES},
    "electra": {**_SMALL, **_PLACES, "num_attention_heads": 4, "embedding_size": 16},
    "modernbert": {**_SMALL, **_PLACES},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "llama": {**_SMALL, **_PLACES},
    "t5": {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2},
    "bart": {
        **{
            f"{part}_{name}": value
            for part in ("encoder", "decoder")
            for name, value in (("layers", 1), ("ffn_dim", 64))
        },
        **{"d_model": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2, **_PLACES},
    },
}
_MASKING = {"mask_probability": 0.15, "final_mask_probability": None, "whole_words": False}
_SPANS = {"noise_density": 0.15, "mean_span_length": 3.0}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "masked": _MASKING,
    "next_sentence": _MASKING,
    "causal": {},
    "span_corruption": _SPANS,
    "denoising": {"noise_density": 0.3, "mean_span_length": 3.0, "permute_sentences": True},
    "replaced_tokens": {
        **_MASKING,
        **{"generator_share": 0.5, "generator_config": None, "discriminator_weight": 50.0, "keep_generator": True},
    },
}
_SUBJECTS = ("the cat", "a dog", "one horse", "the small bird", "an old fish")
_VERBS = ("sees", "follows", "never meets", "remembers")
_PLACES_TO_BE = ("the river", "a hill in london", "the town", "paris", "many unbelievable houses")


def sentences() -> list[str]:
    """A hundred short sentences, each a text of the corpus."""
    return [f"{one} {verb} {place}." for one in _SUBJECTS for verb in _VERBS for place in _PLACES_TO_BE]


def scratch(folder: Path, family: str, **values: Any) -> Path:
    """A checkpoint folder that holds a configuration only."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {"model_type": family, **CONFIGS[family], **values})
    write_manifest(folder)
    return folder


def params_for(kind: str, steps: int = 12, **values: Any) -> Params:
    """The tiny preset with another objective and few steps."""
    preset = load_params(Path("presets/tiny.yaml")).model_dump()
    preset["pretrain"] |= {"steps": steps, "objective": {"kind": kind, **OBJECTIVES[kind], **values}}
    preset["pretrain"]["optimizer"] |= {"batch_tokens": 16 * LENGTH, "learning_rate": 3e-3, "precision": "fp32"}
    return Params.model_validate(preset)


class FakeRun:
    """A stage's run without a stage."""

    def __init__(self, folder: Path, params: Params, **inputs: Path):
        self.name, self.params, self.inputs = "pretrain", params, inputs
        self.staging, self.state = folder / "out", folder / "state"
        self.history: list[dict[str, float]] = []
        self.record = SimpleNamespace(log=lambda step, values: None)
        torch.manual_seed(0)

    def unit(self, name: str) -> Path:
        """Create a part of the output."""
        folder = self.staging / name
        folder.mkdir(parents=True)
        return folder

    def log(self, step: int, **values: float) -> None:
        """Keep a point of the curves."""
        self.history.append({"step": step, **values})

    def say(self, message: str) -> None:
        """Say nothing."""
