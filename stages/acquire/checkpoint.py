"""Checkpoints as Hugging Face folders: checked before anything is trained on them, never unpickled."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from stages.core.artifacts import write_json
from stages.core.errors import UserError
from stages.core.params import ScratchSource

_KEPT = (
    "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt",
    "*.model",
)  # fmt: skip
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_HEADER_BYTES = 8
_LARGEST_HEADER = 100 << 20  # the limit of safetensors itself
_EMBEDDINGS = re.compile(r"(^|\.)(word_embeddings|embed_tokens|wte|tok_embeddings|shared)\.weight$")


def copy_checkpoint(files: Iterable[Path], target: Path, where: str) -> list[str]:
    """Copy what belongs to a checkpoint out of a folder's files, and check the result.

    Args:
        files: the folder's own files, without subfolders.
        target: folder to copy into.
        where: names the source in messages.

    Returns:
        names of the files copied.

    Raises:
        UserError: if it is not a whole checkpoint with safetensors weights and a tokenizer that fits them.
    """
    present = sorted(files)
    _refuse_without_weights([path.name for path in present], where)
    for path in present:
        if any(fnmatch(path.name, pattern) for pattern in _KEPT):
            shutil.copyfile(path, target / path.name)
    check_checkpoint(target, where)
    return sorted(path.name for path in target.iterdir())


def check_checkpoint(folder: Path, where: str) -> None:
    """Check configuration, weights and tokenizer against each other without loading the weights.

    Raises:
        UserError: naming what is missing, damaged or does not fit.
    """
    config = _read_object(folder / "config.json", where)
    if not isinstance(config.get("model_type"), str):
        raise UserError(f"{where}: config.json names no model_type; it should come from save_pretrained")
    shapes = _all_shapes(folder, where)
    tokens = vocabulary_size(folder, where)
    rows = next((shape[0] for name, shape in sorted(shapes.items()) if _EMBEDDINGS.search(name)), None)
    stated = config.get("vocab_size")
    if isinstance(stated, int) and rows is not None and rows != stated:
        raise UserError(f"{where}: config.json says vocab_size {stated}, but the weights embed {rows} tokens")
    embedded = rows if rows is not None else stated
    if isinstance(embedded, int) and tokens > embedded:
        raise UserError(
            f"{where}: its tokenizer has {tokens} tokens and its weights only {embedded}; "
            "the tokenizer must be the one the model was trained with"
        )


def scratch_checkpoint(source: ScratchSource, target: Path, where: str) -> None:
    """Write the configuration of a model to be trained from nothing.

    Raises:
        UserError: if transformers does not know the architecture or refuses a value.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig  # takes seconds to import, so not before it is needed

    values = dict(source.config)
    model_type = values.pop("model_type", None)
    if not isinstance(model_type, str):
        raise UserError(f"{where}.config: names no model_type, such as bert")
    try:
        AutoConfig.for_model(model_type, **values)
    except (ValueError, TypeError, StrictDataclassError) as error:
        reason = re.sub(r"\. Should contain one of.*", "", " ".join(str(error).split()))
        raise UserError(f"{where}.config: {reason[:200]}") from None
    hidden, heads = values.get("hidden_size"), values.get("num_attention_heads")
    if isinstance(hidden, int) and isinstance(heads, int) and (heads < 1 or hidden % heads):
        raise UserError(f"{where}.config: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    write_json(target / "config.json", source.config)


def safetensors_shapes(path: Path, where: str) -> dict[str, list[int]]:
    """Return the shape of every tensor in a safetensors file, from its header.

    Raises:
        UserError: if the file is damaged or cut short.
    """
    damaged = UserError(f"{where}: {path.name} is damaged or cut short; fetch it again")
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(_HEADER_BYTES), "little")
        if not 0 < length <= min(size, _LARGEST_HEADER):
            raise damaged
        try:
            header = json.loads(stream.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise damaged from None
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    if size != _HEADER_BYTES + length + end:
        raise damaged
    return {name: list(entry["shape"]) for name, entry in tensors.items()}


def vocabulary_size(folder: Path, where: str) -> int:
    """Return the number of token ids that a tokenizer may give, its highest id and one.

    Raises:
        UserError: if the folder has no tokenizer that can be read without running code.
    """
    if (folder / "tokenizer.json").exists():
        from tokenizers import Tokenizer

        try:
            ids = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab(with_added_tokens=True).values()
        except Exception as error:  # noqa: BLE001  the library raises nothing narrower
            raise UserError(f"{where}: tokenizer.json cannot be read: {' '.join(str(error).split())[:200]}") from None
        return max(ids, default=-1) + 1
    if (folder / "vocab.txt").exists():
        return len((folder / "vocab.txt").read_text(encoding="utf-8").rstrip("\n").split("\n"))
    if (folder / "vocab.json").exists():
        return max(_read_object(folder / "vocab.json", where).values(), default=-1) + 1
    raise UserError(
        f"{where}: has no tokenizer.json; make one with "
        "`AutoTokenizer.from_pretrained(folder).save_pretrained(folder)`, or point at a folder that has it"
    )


def _refuse_without_weights(names: list[str], where: str) -> None:
    if any(name.endswith(".safetensors") for name in names):
        return
    pickled = [name for name in names if name.endswith(_PICKLED)]
    if pickled:
        raise UserError(
            f"{where}: has only pickled weights ({pickled[0]}), which may run code when loaded; convert them with "
            "`model.save_pretrained(folder)` of transformers, which writes safetensors"
        )
    there = ", ".join(names[:8]) or "nothing"
    raise UserError(f"{where}: has no weights (model.safetensors); there is {there}")


def _all_shapes(folder: Path, where: str) -> dict[str, list[int]]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        for name in sorted(set(_read_object(index, where).get("weight_map", {}).values())):
            if not (folder / name).exists():
                raise UserError(f"{where}: {name} is missing, which {index.name} lists; fetch it again")
    shapes: dict[str, list[int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        shapes.update(safetensors_shapes(path, where))
    if not shapes:
        raise UserError(f"{where}: its safetensors hold no tensor")
    return shapes


def _read_object(path: Path, where: str) -> dict[str, Any]:
    if not path.exists():
        raise UserError(f"{where}: has no {path.name}; point at a folder that save_pretrained wrote")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: {path.name} is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: {path.name} is not a JSON object")
    return value
