"""Where the model puts the texts: the vectors that its output layer reads, how well they part the labels, and a map.

The vectors are taken from the exported file itself, not from the checkpoint behind it: what is drawn is what is served.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
import onnx
import pandas

from stages.core.cascade import Exported
from stages.core.metrics import Array
from stages.core.params import EmbeddingParams
from stages.core.runtimes import ONNX_FILE, REFERENCE_RUNTIME, ExportedModel, open_runtime, prepare

_BATCH_SIZE = 32
_PRODUCTS = ("MatMul", "Gemm")
_PERPLEXITY = 30.0  # van der Maaten & Hinton 2008 found anything from 5 to 50 to do


@dataclass(frozen=True)
class Embedded:
    """Texts as vectors."""

    space: str
    """`hidden`: what the output layer reads; `probabilities`: the answer itself, where there is no one such layer."""
    vectors: Array
    """float32 [texts, features]."""


def embed(model: Exported, texts: Sequence[str], probabilities: Array) -> Embedded:
    """Turn texts into vectors: those that the output layer reads, or else the probabilities [texts, labels].

    A cascade answers with two models, whose vectors lie in two spaces: only its answers lie in one.
    """
    hidden = _hidden(model, texts) if isinstance(model, ExportedModel) else None
    return Embedded("probabilities", probabilities) if hidden is None else Embedded("hidden", hidden)


def silhouette(vectors: Array, labels: Array) -> float | None:
    """Mean silhouette by true label (Rousseeuw 1987): 1 where labels lie far apart, 0 where they touch, below 0 where
    they are mixed up. None where there are not at least two labels and fewer labels than texts.
    """
    from sklearn.metrics import silhouette_score

    if not 1 < len(set(labels.tolist())) < len(labels):
        return None
    return float(silhouette_score(vectors, labels))


def draw_map(vectors: Array, method: str, seed: int) -> tuple[Array, float | None]:
    """Lay vectors [n, features] out in the plane.

    Args:
        vectors: at least three.
        method: `pca`, or `tsne` (van der Maaten & Hinton 2008, JMLR 9), whose distances between groups mean nothing.
        seed: of t-SNE.

    Returns:
        [n, 2], and the share of the variance that it shows; None for t-SNE.
    """
    if method == "pca":
        from sklearn.decomposition import PCA

        if not numpy.ptp(vectors, axis=0).any():  # a model to which all texts are one
            return numpy.zeros((len(vectors), 2)), 0.0
        plane = PCA(2, svd_solver="full").fit(vectors)
        return plane.transform(vectors), float(plane.explained_variance_ratio_.sum())
    from sklearn.manifold import TSNE

    perplexity = min(_PERPLEXITY, (len(vectors) - 1) / 3)
    return TSNE(2, perplexity=perplexity, init="pca", random_state=seed, n_jobs=1).fit_transform(vectors), None


def cluster(
    model: Exported,
    predictions: pandas.DataFrame,
    labels: Array,
    probabilities: Array,
    params: EmbeddingParams,
    seed: int,
) -> tuple[dict[str, float | str | int | None], pandas.DataFrame]:
    """Measure how the vectors of texts part the labels, and draw their map.

    Args:
        model: exported.
        predictions: columns text, label and prediction, a row a text.
        labels: class indices, [texts].
        probabilities: of the model, [texts, classes].
        params: how many texts at most, and the kind of map.
        seed: of the sample and of t-SNE.

    Returns:
        `space`, `texts`, `silhouette`, `map` and `variance_shown`; and the map, columns x, y, label, prediction, text.
    """
    chosen = numpy.sort(numpy.random.default_rng(seed).permutation(len(labels))[: params.texts])
    table = predictions.iloc[chosen].reset_index(drop=True)
    embedded = embed(model, table["text"].tolist(), probabilities[chosen])
    places, shown = draw_map(embedded.vectors, params.map, seed)
    x, y = places.astype("float64").T
    figures: dict[str, float | str | int | None] = {
        "space": embedded.space,
        "texts": len(chosen),
        "silhouette": silhouette(embedded.vectors, labels[chosen]),
        "map": params.map,
        "variance_shown": shown,
    }
    return figures, table[["label", "prediction", "text"]].assign(x=x, y=y)[["x", "y", "label", "prediction", "text"]]


def output_layer_input(graph: onnx.GraphProto) -> str | None:
    """Name of the tensor that the last matrix product before the output reads; None if there is none.

    The way back from the output goes by the one input of each node that is computed: biases and scales are constants.
    """
    makers = {name: node for node in graph.node for name in node.output}
    node = makers.get(graph.output[0].name)
    while node is not None:
        if node.op_type in _PRODUCTS:
            return str(node.input[0])
        computed = [makers[name] for name in node.input if name in makers and makers[name].op_type != "Constant"]
        node = computed[0] if len(computed) == 1 else None
    return None


def _hidden(model: ExportedModel, texts: Sequence[str]) -> Array | None:
    """Vectors [texts, features] before the output layer; None where the graph has none, or one a token."""
    proto = onnx.load(model.onnx_path)
    name = output_layer_input(proto.graph)
    if name is None:
        return None
    del proto.graph.output[:]
    proto.graph.output.append(onnx.ValueInfoProto(name=name))
    with tempfile.TemporaryDirectory() as folder:
        onnx.save(proto, Path(folder) / ONNX_FILE)
        runtime = open_runtime(REFERENCE_RUNTIME, replace(model, folder=Path(folder)))
        prepared = prepare(model, texts, _BATCH_SIZE)
        parts = runtime.logits_many(prepared.batches)
    if parts[0].ndim != 2:
        return None
    vectors = numpy.empty((len(texts), parts[0].shape[1]), dtype=numpy.float32)
    for batch, part in zip(prepared.order, parts, strict=True):
        vectors[batch] = part
    return vectors
