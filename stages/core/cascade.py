"""Two exported models that answer as one: the small one where it is sure, the larger one for the rest.

How sure a model is of an answer is the largest probability it gives (Jitkrittum et al., 2307.02764, say when that is
enough). The threshold was chosen on validation texts by the stage `cascade`. Whatever serves exported models goes
through `load_exported`, `open_exported` and `predict_exported`, which take a single model as well as a cascade.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy

from stages.core.artifacts import MANIFEST, read_json, verify
from stages.core.errors import UserError
from stages.core.metrics import Array
from stages.core.runtimes import ExportedModel, Goal, Prepared, Runtime, answer, arrange, open_runtime, predict

CASCADE_FILE = "cascade.json"
SMALL, LARGE = "small", "large"
"""Folders of the two models inside that of the cascade."""
NONE_PASSED_ON, ALL_PASSED_ON = 0.0, 1.0
"""Thresholds at which the small model answers everything, and the larger one."""


@dataclass(frozen=True)
class CascadeModel:
    """Two exported text classifiers with the same labels."""

    folder: Path
    """Holds cascade.json and both models."""
    small: ExportedModel
    large: ExportedModel
    threshold: float
    """Answers whose largest probability is at most so much are passed on."""
    same_tokens: bool
    """Whether both models read the same tokens; the small one's vocabulary may have been trimmed."""

    @classmethod
    def load(cls, folder: Path) -> CascadeModel:
        """Load a cascade from its unit folder.

        Raises:
            UserError: if a file of it is missing or altered, or the two models cannot answer for each other.
        """
        verify(folder)
        small, large = ExportedModel.load(folder / SMALL), ExportedModel.load(folder / LARGE)
        require_same_labels(small, large)
        threshold = float(read_json(folder / CASCADE_FILE)["threshold"])
        return cls(folder, small, large, threshold, _same_tokens(small, large))

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, by index."""
        return self.large.labels

    @property
    def pad_id(self) -> int:
        """Token id that fills short texts for the larger model."""
        return self.large.pad_id

    @property
    def parameters(self) -> int:
        """Parameters of both models."""
        return self.small.parameters + self.large.parameters

    @property
    def model_bytes(self) -> int:
        """Size on disk of both ONNX files."""
        return self.small.model_bytes + self.large.model_bytes

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Turn texts into the token ids that the larger model reads."""
        return self.large.encode(texts)


@dataclass(frozen=True)
class CascadeRuntime:
    """Both models of a cascade, each loaded into the same kind of runtime."""

    small: Runtime
    large: Runtime


Exported = ExportedModel | CascadeModel
ExportedRuntime = Runtime | CascadeRuntime


def load_exported(folder: Path) -> Exported:
    """Load an exported model or a cascade from its unit folder, or from the output of a stage with `model/` inside.

    Raises:
        UserError: if the folder holds neither, or a file of it is missing or altered.
    """
    for candidate in (folder, folder / "model"):
        if _mentions_cascade(candidate):
            return CascadeModel.load(candidate)
    return ExportedModel.load(folder)


def models_of(model: Exported) -> tuple[ExportedModel, ...]:
    """Return the single models that answer."""
    return (model.small, model.large) if isinstance(model, CascadeModel) else (model,)


def open_exported(
    name: str,
    model: Exported,
    threads: int | None = None,
    goal: Goal = "latency",
    streams: int | None = None,
    precision: str | None = None,
) -> ExportedRuntime:
    """Load a model, or both of a cascade, into a runtime; see `open_runtime`."""
    opened = [open_runtime(name, part, threads, goal, streams, precision) for part in models_of(model)]
    return CascadeRuntime(*opened) if isinstance(model, CascadeModel) else opened[0]


def predict_exported(
    model: Exported,
    runtime: ExportedRuntime,
    texts: Sequence[str],
    batch_size: int | None = None,
    batch_tokens: int | None = None,
) -> tuple[Array, Array]:
    """Classify texts with what `open_exported` opened for the model; see `predict`.

    Returns:
        label indices, int64 [texts], and probabilities, float32 [texts, labels], in the order of the texts.
    """
    return answer_exported(model, runtime, prepare_exported(model, texts, batch_size, batch_tokens))


@dataclass(frozen=True)
class PreparedExported:
    """Texts in batches for the model that sees them first."""

    texts: Sequence[str]
    rows: list[list[int]]
    """Token ids of each text, as that model reads them."""
    batches: Prepared
    batch_size: int | None
    batch_tokens: int | None


def prepare_exported(
    model: Exported, texts: Sequence[str], batch_size: int | None = None, batch_tokens: int | None = None
) -> PreparedExported:
    """Encode texts for the model that sees them first and batch them; see `prepare`."""
    first = _first(model)
    rows = first.encode(texts)
    return PreparedExported(texts, rows, arrange(first, rows, batch_size, batch_tokens), batch_size, batch_tokens)


def answer_exported(model: Exported, runtime: ExportedRuntime, prepared: PreparedExported) -> tuple[Array, Array]:
    """Classify prepared texts; see `predict_exported`."""
    if isinstance(model, CascadeModel) and isinstance(runtime, CascadeRuntime):
        return _answer_cascade(model, runtime, prepared)
    if isinstance(model, CascadeModel) or isinstance(runtime, CascadeRuntime):
        raise TypeError("a cascade runs on what `open_exported` opened for it, and nothing else does")
    return answer(model, runtime, prepared.batches)


def passed_on(probabilities: Array, threshold: float) -> Array:
    """Tell which answers of the small model are too unsure, bool [texts], from its probabilities [texts, labels].

    No largest probability is 0 or above 1, so 0 passes none on and 1 all. Compared in double precision: a threshold
    may lie between two neighbours of single precision.
    """
    unsure: Array = confidence_of(probabilities) <= threshold
    return unsure


def confidence_of(probabilities: Array) -> Array:
    """Largest probability of each text, float64 [texts]."""
    largest: Array = probabilities.max(axis=1).astype(numpy.float64)
    return largest


def share_passed_on(model: CascadeModel, runtime: CascadeRuntime, texts: Sequence[str], batch_size: int) -> float:
    """Share of the texts for which the small model is too unsure."""
    probabilities = predict(model.small, runtime.small, texts, batch_size)[1]
    return float(passed_on(probabilities, model.threshold).mean())


def require_same_labels(small: ExportedModel, large: ExportedModel) -> None:
    """Make sure that an answer of one model means the same as that of the other.

    Raises:
        UserError: if their labels differ.
    """
    if small.labels != large.labels:
        raise UserError(
            f"{small.folder}: has labels {', '.join(small.labels)}, {large.folder} has {', '.join(large.labels)}; "
            "a cascade needs two models of the same data, run `dvc repro` to make both"
        )


def _first(model: Exported) -> ExportedModel:
    """The model that sees every text."""
    if isinstance(model, ExportedModel):
        return model
    return model.large if model.threshold >= ALL_PASSED_ON else model.small


def _answer_cascade(model: CascadeModel, runtime: CascadeRuntime, prepared: PreparedExported) -> tuple[Array, Array]:
    if model.threshold >= ALL_PASSED_ON:
        return answer(model.large, runtime.large, prepared.batches)
    labels, probabilities = answer(model.small, runtime.small, prepared.batches)
    unsure = numpy.flatnonzero(passed_on(probabilities, model.threshold)).tolist() if prepared.rows else []
    if unsure:
        rows, texts = prepared.rows, prepared.texts
        again = [rows[i] for i in unsure] if model.same_tokens else model.large.encode([texts[i] for i in unsure])
        batches = arrange(model.large, again, prepared.batch_size, prepared.batch_tokens)
        labels[unsure], probabilities[unsure] = answer(model.large, runtime.large, batches)
    return labels, probabilities


def _mentions_cascade(folder: Path) -> bool:
    """A folder whose cascade.json was lost is still a cascade, and its manifest then says what is missing."""
    if (folder / CASCADE_FILE).exists():
        return True
    return (folder / MANIFEST).exists() and CASCADE_FILE in read_json(folder / MANIFEST)["files"]


def _same_tokens(small: ExportedModel, large: ExportedModel) -> bool:
    files = [(model.folder / "tokenizer.json").read_bytes() for model in (small, large)]
    limits = [(model.maximum_length, model.pad_id) for model in (small, large)]
    return files[0] == files[1] and limits[0] == limits[1]
