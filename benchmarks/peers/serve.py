"""A process that serves one model and answers the benchmark's requests: a line of JSON in, a line of JSON out.

Requests are `{"do": "sweep" | "predict" | "throughput" | "latency", ...}`. The clock is read in here, so that neither
starting the process nor talking to it counts. `python -m benchmarks.peers.serve REQUEST` starts it.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from benchmarks.peers.service import (
    Answering,
    Classifier,
    Service,
    load_tokenizer,
    milliseconds_for_each,
    peak_memory_mb,
    seconds_for,
)

_SWEEP_PASSES = 5


class Server:
    """Both services of a contender; the one for single texts opens when first asked, after memory was read.

    Args:
        open_classifier: loads the model for `throughput` or `latency`.
    """

    def __init__(self, open_classifier: Callable[[str], Classifier]):
        self._open = open_classifier
        self._opened: dict[str, Classifier] = {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what a request asks."""
        handlers = {
            "sweep": self._sweep,
            "predict": self._predict,
            "throughput": self._throughput,
            "latency": self._latency,
        }
        return handlers[request["do"]](request)

    def _sweep(self, request: dict[str, Any]) -> dict[str, Any]:
        """Try batch sizes, smallest first, so that the peak read after each belongs to it; the best pass counts."""
        classifier, texts = self._classifier("throughput"), request["texts"]
        sizes = []
        for size in sorted(request["batch_sizes"]):
            classifier.classify(texts, size)  # warms up
            seconds = [seconds_for(classifier, texts, size) for _ in range(_SWEEP_PASSES)]
            sizes.append(
                {
                    "batch_size": size,
                    "texts_per_second": len(texts) / min(seconds),
                    "peak_memory_mb": peak_memory_mb(),
                }
            )
        return {"sizes": sizes}

    def _predict(self, request: dict[str, Any]) -> dict[str, Any]:
        return {"predictions": self._classifier("throughput").classify(request["texts"], request["batch_size"])}

    def _throughput(self, request: dict[str, Any]) -> dict[str, Any]:
        classifier, texts, size = self._classifier("throughput"), request["texts"], request["batch_size"]
        classifier.classify(texts[: 2 * size], size)  # others used the caches since the last turn
        return {"texts_per_second": len(texts) / seconds_for(classifier, texts, size)}

    def _latency(self, request: dict[str, Any]) -> dict[str, Any]:
        classifier, texts = self._classifier("latency"), request["texts"]
        for text in request["warm_up"]:
            classifier.classify([text], 1)
        return {"milliseconds": milliseconds_for_each(classifier, texts)}

    def _classifier(self, goal: str) -> Classifier:
        if goal not in self._opened:
            self._opened[goal] = self._open(goal)
        return self._opened[goal]


def serve(open_classifier: Callable[[str], Classifier]) -> None:
    """Answer requests until the input ends."""
    with _own_stdout() as answers:
        server = Server(open_classifier)
        for line in sys.stdin:
            print(json.dumps(server.answer(json.loads(line))), file=answers, flush=True)


def _own_stdout() -> TextIO:
    """Take stdout for the answers; what libraries print goes to stderr, even from C."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def _open_peer(request: dict[str, Any]) -> Callable[[str], Classifier]:
    peer = importlib.import_module(f"benchmarks.peers.{request['peer']}")
    tokenizer = load_tokenizer(Path(request["tokenizer"]), request["maximum_length"])

    def open_classifier(goal: str) -> Classifier:
        service: Service = peer.open_service(request["variant"], Path(request["model"]), goal, request["threads"])
        return Answering(service, tokenizer, request["pad_id"], request["by_length"], request["padded_to"])

    return open_classifier


if __name__ == "__main__":
    serve(_open_peer(json.loads(sys.argv[1])))
