"""Who takes part: the peers at their best documented settings, and every model that Headroom has exported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.core.artifacts import read_json
from stages.core.errors import UserError

BATCH_SIZES = (8, 32, 128)
"""Tried for each contender; its fastest counts."""

PLAIN_BATCH = 32
NAIVE_LENGTH = 512
NAIVE_TEXTS = 32
REFERENCE = "pytorch-fp32"
"""The fine-tuned model in PyTorch, texts as they come, padded to the longest in a batch of 32: the fair baseline."""
NAIVE = "pytorch-padded"

_CASCADE_FILE = "cascade.json"


@dataclass(frozen=True)
class Contender:
    """A model and the way to serve it."""

    name: str
    title: str
    """For the table."""
    peer: str
    """Module of `benchmarks.peers`, whose environment it runs in; empty for Headroom."""
    variant: str
    """Of what the peer can do; for Headroom the folder of the export."""
    made_by: str = ""
    """Name of the contender whose compressed model it shares; empty if it has its own."""
    by_length: bool = True
    """Texts of similar length share a batch."""
    padded_to: int | None = None
    """Tokens; None pads to the longest text in the batch."""
    batch_sizes: tuple[int, ...] = BATCH_SIZES
    texts: int | None = None
    """Answered in a round at most; None for all."""
    own_quality: bool = True
    """Whether its answers are its own; the naive baseline answers too few texts to be scored."""

    @property
    def headroom(self) -> bool:
        """Whether it is one of Headroom's models."""
        return not self.peer


PEERS = (
    Contender(
        REFERENCE,
        "PyTorch fp32, longest in batch",
        "pytorch",
        "fp32",
        by_length=False,
        batch_sizes=(PLAIN_BATCH,),
    ),
    Contender(
        NAIVE,
        "PyTorch fp32, padded to 512",
        "pytorch",
        "fp32",
        made_by=REFERENCE,
        by_length=False,
        padded_to=NAIVE_LENGTH,
        batch_sizes=(PLAIN_BATCH,),
        texts=NAIVE_TEXTS,
        own_quality=False,
    ),
    Contender("pytorch-sorted", "PyTorch fp32, by length", "pytorch", "fp32", made_by=REFERENCE),
    Contender("pytorch-compiled", "PyTorch fp32, compiled", "pytorch", "compiled", made_by=REFERENCE),
    Contender("pytorch-bf16", "PyTorch bf16", "pytorch", "bf16", made_by=REFERENCE),
    Contender("pytorch-compiled-bf16", "PyTorch bf16, compiled", "pytorch", "compiled-bf16", made_by=REFERENCE),
    Contender("optimum-fp32", "Optimum ONNX fp32", "optimum", "fp32"),
    Contender("optimum-o1", "Optimum ONNX O1", "optimum", "O1"),
    Contender("optimum-o2", "Optimum ONNX O2", "optimum", "O2"),
    Contender("optimum-o3", "Optimum ONNX O3", "optimum", "O3"),
    Contender("optimum-int8", "Optimum int8, dynamic, AVX512-VNNI", "optimum", "int8"),
    Contender("olive-int8", "Olive auto-opt, int8", "olive", "int8"),
    Contender("neural-compressor-static", "Neural Compressor int8, static", "neural_compressor", "static"),
    Contender("neural-compressor-dynamic", "Neural Compressor int8, dynamic", "neural_compressor", "dynamic"),
    Contender("openvino-fp32", "OpenVINO fp32", "nncf", "fp32"),
    Contender("openvino-bf16", "OpenVINO bf16", "nncf", "bf16", made_by="openvino-fp32"),
    Contender("nncf-int8", "NNCF int8 on OpenVINO", "nncf", "int8"),
    Contender("textpruner", "TextPruner, training-free, two thirds kept", "textpruner", "8/12"),
)


def headroom_contenders(artifacts: Path) -> list[Contender]:
    """Find Headroom's exported models: every folder of `export` and, where it was made, the cascade."""
    folders = sorted(path.parents[1] for path in artifacts.glob("export/*/model/headroom.json"))
    folders += [path.parents[1] for path in artifacts.glob(f"cascade/model/{_CASCADE_FILE}")]
    return [
        Contender(f"headroom-{folder.name}", f"Headroom, {folder.name}", "", str(folder.relative_to(artifacts)))
        for folder in folders
    ]


def choose(contenders: Sequence[Contender], only: Sequence[str]) -> list[Contender]:
    """Keep the contenders whose name starts with one of `only`, with the reference and whose models they share.

    All of them stay if `only` is empty.

    Raises:
        UserError: if a name fits nobody.
    """
    for name in only:
        if not any(contender.name.startswith(name) for contender in contenders):
            raise UserError(f"--only {name}: no such contender; {', '.join(each.name for each in contenders)}")
    wanted = [each for each in contenders if not only or each.name.startswith(tuple(only))]
    needed = {REFERENCE, *(each.name for each in wanted), *(each.made_by for each in wanted)}
    return [each for each in contenders if each.name in needed]


def compressing_minutes(artifacts: Path, contender: Contender) -> float | None:
    """Minutes that Headroom's stages took after fine-tuning, by their own clocks; None where a stage tells none.

    The lineage of the export names them: distill, prune, quantize and the like, then export itself.
    """
    descriptions = sorted((artifacts / contender.variant / "model").rglob("headroom.json"))
    stages = {contender.variant}
    for path in descriptions:  # a cascade holds two models, which share the stages of their parents
        names = [step["stage"].replace("@", "/") for step in read_json(path).get("lineage", [])]
        stages.update(names[names.index("finetune") + 1 :] if "finetune" in names else names)
    measured = [artifacts / stage / "measured.json" for stage in sorted(stages)]
    if not all(path.exists() for path in measured):
        return None
    return float(sum(read_json(path)["wall_seconds"] for path in measured) / 60)
