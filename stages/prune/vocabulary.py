"""Tokens that the texts never need leave the embedding and the tokenizer.

No text at hand is encoded differently, because the three algorithms in use never miss a token that they did not choose:
WordPiece takes the longest token that matches, BPE the merge of the lowest rank, Unigram the likeliest path, and a
choice that won among all tokens wins among fewer. What the rule must keep beside the tokens in use is said where it is
kept. Every encoding is compared all the same. Unseen text still encodes: special tokens, single characters and bytes
always stay.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from tokenizers import Tokenizer
from torch import nn

from stages.core.artifacts import read_json, write_json
from stages.core.encoding import TOKENIZER_FILE, encode
from stages.core.errors import UserError
from stages.core.examples import load_dataset, load_examples
from stages.core.observe.progress import track
from stages.core.stage import StageRun

SETTINGS_FILE = "tokenizer_config.json"

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_TEXTS_PER_BATCH = 1000

Json = dict[str, Any]


@dataclass(frozen=True)
class TrimmedVocabulary:
    """The tokenizer of a model whose embedding was trimmed."""

    tokenizer: Json
    """Contents of tokenizer.json."""
    settings: Json
    """Contents of tokenizer_config.json."""
    metrics: dict[str, int]

    def write(self, folder: Path) -> None:
        """Write the tokenizer over the one that `folder` has."""
        text = json.dumps(self.tokenizer, ensure_ascii=False, indent=2)  # the order of its keys carries meaning
        (folder / TOKENIZER_FILE).write_text(text, encoding="utf-8")
        write_json(folder / SETTINGS_FILE, self.settings)


def trim_to_texts(model: nn.Module, run: StageRun) -> TrimmedVocabulary | None:
    """Trim a model's embedding, in place, to the training texts and the corpus, as params ask; None where they do not.

    Validation texts are no reason to keep a token: their quality after the cut tells what it costs unseen text.
    """
    params, data = run.params.prune.vocabulary, run.inputs["data"]
    if params is None:
        return None
    own = load_examples(data, "train").texts
    corpus = load_dataset(run.inputs["corpus"] / "corpus.parquet")["text"]
    trimmed = trim_vocabulary(model, data / "tokenizer", own, list(corpus), params.minimum_count)
    counts = trimmed.metrics
    run.say(f"vocabulary {counts['tokens_before']} to {counts['tokens_after']} tokens")
    return trimmed


def trim_vocabulary(
    model: nn.Module, folder: Path, own: Sequence[str], corpus: Sequence[str], minimum_count: int
) -> TrimmedVocabulary:
    """Trim a model's embedding, in place, and its tokenizer.

    Args:
        model: whose input embedding has a row for every token.
        folder: of the tokenizer's files.
        own: texts of the task; none is encoded differently.
        corpus: other texts; none is encoded differently where `minimum_count` is 1.
        minimum_count: how often the corpus must need a token that the task's texts do not need.

    Returns:
        the new tokenizer, and metrics: tokens, texts, how many of the texts are encoded differently, bytes saved.

    Raises:
        UserError: if the tokenizer's kind cannot be trimmed, or a text that must not change does.
    """
    path = folder / TOKENIZER_FILE
    whole = json.loads(path.read_text(encoding="utf-8"))
    before = _open(whole)
    own_rows, corpus_rows = _encode_all(before, own), _encode_all(before, corpus)
    size = 1 + max(before.get_vocab().values())
    needed = count_tokens(before, whole, own, own_rows, size) > 0
    needed |= count_tokens(before, whole, corpus, corpus_rows, size) >= minimum_count
    chosen = {*numpy.flatnonzero(needed).tolist(), *ids_in_config(model)}
    kept = tokens_to_keep(whole, chosen, str(path))
    tokenizer, settings = trim_tokenizer(whole, kept), trim_settings(read_json(folder / SETTINGS_FILE), kept)

    after = _open(tokenizer)
    renumbered = numpy.full(size, -1)
    renumbered[kept] = range(len(kept))
    stayed = {token: renumbered[index] for token, index in before.get_vocab().items() if renumbered[index] >= 0}
    if after.get_vocab() != stayed:
        raise UserError(f"{path}: numbers its added tokens in a way that cannot be kept; set prune.vocabulary: null")
    changed = _changed(after, own, own_rows, renumbered), _changed(after, corpus, corpus_rows, renumbered)
    if changed[0] or (minimum_count == 1 and changed[1]):
        raise UserError(f"{path}: {sum(changed)} texts would be encoded differently; set prune.vocabulary: null")
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    rows = embedding.num_embeddings
    trim_embedding(model, kept)
    return TrimmedVocabulary(
        tokenizer,
        settings,
        {
            "tokens_before": rows,
            "tokens_after": len(kept),
            "embedding_bytes_saved": (rows - len(kept)) * embedding.embedding_dim * embedding.weight.element_size(),
            "own_texts": len(own),
            "own_texts_encoded_differently": changed[0],
            "corpus_texts": len(corpus),
            "corpus_texts_encoded_differently": changed[1],
        },
    )


def count_tokens(
    tokenizer: Tokenizer, description: Json, texts: Sequence[str], rows: Sequence[numpy.ndarray], size: int
) -> numpy.ndarray:
    """Count how often texts need each token, int64 [size].

    WordPiece gives a word up as unknown when no token goes on from where it stands. The tokens that lead there are
    needed too: without them it might go another way, and get through.
    """
    counts = numpy.bincount(numpy.concatenate([*rows, numpy.zeros(0, numpy.int32)]), minlength=size)
    model = description["model"]
    if model["type"] != "WordPiece":
        return counts
    unknown = model["vocab"][model["unk_token"]]
    for text, row in zip(texts, rows, strict=True):
        if unknown in row:
            for word in _words(tokenizer, text, model["max_input_chars_per_word"]):
                for piece in _pieces_before_unknown(tokenizer, word, unknown):
                    counts[piece] += 1
    return counts


def ids_in_config(model: nn.Module) -> set[int]:
    """Token ids that a model's configuration names, such as `pad_token_id`.

    RoBERTa counts positions from the padding token's id, so there all tokens up to it stay, and it keeps its id.
    """
    ids = {value for value in _config_ids(model).values() if value is not None}
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            padding: Any = module.padding_idx
            ids |= set(range(padding + 1))
    return ids


def tokens_to_keep(description: Json, needed: Iterable[int], where: str) -> list[int]:
    """Choose the tokens that stay: those needed, and those without which other text could not be encoded.

    Args:
        description: contents of tokenizer.json.
        needed: token ids that texts need; ids that the tokenizer does not have are left out.
        where: names the tokenizer in messages.

    Returns:
        token ids, ascending.

    Raises:
        UserError: if the kind of tokenizer has no smaller pieces to fall back on.
    """
    model, wanted = description["model"], set(needed)
    tokens = _model_tokens(model, where)
    kept = {token["id"] for token in description["added_tokens"]}
    kept |= {index for token, index in tokens.items() if index in wanted or _is_elementary(token, model)}
    if model["type"] == "BPE":
        kept |= _merged_from(model, {token for token, index in tokens.items() if index in kept})
    if model["type"] == "Unigram":
        # An unknown character costs ten less than the least likely piece, so the scale hangs on that piece.
        kept.add(min(range(len(model["vocab"])), key=lambda index: model["vocab"][index][1]))
        kept |= {model["unk_id"]} - {None}
    if model["type"] == "WordPiece":
        kept.add(tokens[model["unk_token"]])
    return sorted(kept)


def trim_tokenizer(description: Json, kept: Sequence[int]) -> Json:
    """Remove tokens from the contents of a tokenizer.json and number the rest anew, in their order.

    Args:
        description: left as it is.
        kept: token ids that stay, ascending.
    """
    new_ids = {old: new for new, old in enumerate(kept)}
    trimmed = copy.deepcopy(description)
    model = trimmed["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [entry for index, entry in enumerate(model["vocab"]) if index in new_ids]
        model["unk_id"] = new_ids.get(model["unk_id"])
    else:
        ordered = sorted(model["vocab"].items(), key=lambda item: item[1])
        model["vocab"] = {token: new_ids[index] for token, index in ordered if index in new_ids}
    if model["type"] == "BPE":
        vocabulary = model["vocab"]
        model["merges"] = [
            merge for merge in model["merges"] if all(part in vocabulary for part in _parts_and_product(merge, model))
        ]
    for token in trimmed["added_tokens"]:
        token["id"] = new_ids[token["id"]]
    if trimmed.get("padding"):
        trimmed["padding"]["pad_id"] = new_ids[trimmed["padding"]["pad_id"]]
    _renumber_processor(trimmed.get("post_processor"), new_ids)
    return trimmed


def trim_settings(settings: Json, kept: Sequence[int]) -> Json:
    """Number the added tokens in the contents of a tokenizer_config.json anew."""
    if "added_tokens_decoder" not in settings:
        return settings
    new_ids = {str(old): str(new) for new, old in enumerate(kept)}
    decoder = {new_ids[old]: token for old, token in settings["added_tokens_decoder"].items()}
    return {**settings, "added_tokens_decoder": decoder}


def trim_embedding(model: nn.Module, kept: Sequence[int]) -> None:
    """Keep some rows of a model's input embedding, in place, and renumber the token ids of its configuration."""
    new_ids = {old: new for new, old in enumerate(kept)}
    ids = {name: None if old is None else new_ids.get(old) for name, old in _config_ids(model).items()}
    old: Any = model.get_input_embeddings()  # type: ignore[operator]
    padding = None if old.padding_idx is None else new_ids.get(old.padding_idx)
    weight = old.weight.detach()[list(kept)].clone()
    embedding = nn.Embedding(len(kept), old.embedding_dim, padding_idx=padding, _weight=weight)
    model.set_input_embeddings(embedding)  # type: ignore[operator]
    config: Any = model.config
    config.vocab_size = len(kept)
    for name, new in ids.items():
        setattr(config, name, new)


def _config_ids(model: nn.Module) -> dict[str, int | None]:
    config: Any = model.config
    return {name: value for name, value in config.to_dict().items() if name.endswith("_token_id")}


def _open(description: Json) -> Tokenizer:
    """A tokenizer that neither pads nor cuts: what must not change is the whole text's encoding."""
    tokenizer = Tokenizer.from_str(json.dumps(description))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _encode_all(tokenizer: Tokenizer, texts: Sequence[str]) -> list[numpy.ndarray]:
    rows = (encode(tokenizer, batch) for batch in _batches(texts))
    return [numpy.array(row, dtype=numpy.int32) for batch in rows for row in batch]


def _changed(
    tokenizer: Tokenizer, texts: Sequence[str], rows: Sequence[numpy.ndarray], renumbered: numpy.ndarray
) -> int:
    """Count the texts whose encoding is no longer that of `rows`."""
    again = (row for batch in _batches(texts) for row in encode(tokenizer, batch))
    return sum(renumbered[row].tolist() != new for row, new in zip(rows, again, strict=True))


def _batches(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in track(range(0, len(texts), _TEXTS_PER_BATCH), "encode texts"):
        yield texts[start : start + _TEXTS_PER_BATCH]


def _words(tokenizer: Tokenizer, text: str, longest: int) -> list[str]:
    """Cut a text into the words that the tokenizer's model sees; longer ones are unknown whatever they hold."""
    normalized = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
    if tokenizer.pre_tokenizer is None:
        return [normalized]
    return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normalized) if len(word) <= longest]


def _pieces_before_unknown(tokenizer: Tokenizer, word: str, unknown: int) -> list[int]:
    """Pieces that WordPiece matched before it gave a word up; none for a word that it knows."""
    for length in range(len(word), 0, -1):
        pieces = [token.id for token in tokenizer.model.tokenize(word[:length])]
        if pieces != [unknown]:
            return [] if length == len(word) else pieces
    return []


def _model_tokens(model: Json, where: str) -> dict[str, int]:
    if model["type"] == "Unigram":
        return {piece: index for index, (piece, _) in enumerate(model["vocab"])}
    if model["type"] in ("WordPiece", "BPE"):
        tokens: dict[str, int] = model["vocab"]
        return tokens
    raise UserError(
        f"{where}: a {model['type']} tokenizer has no smaller pieces for unseen words, so it cannot be trimmed; "
        "set prune.vocabulary: null"
    )


def _is_elementary(token: str, model: Json) -> bool:
    """Tell whether a token is a single character, wherever in a word it may stand, or a byte."""
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    bare = token.removeprefix(prefix).removesuffix(suffix)
    return len(token) == 1 or len(bare) <= 1 or _BYTE.fullmatch(token) is not None


def _merged_from(model: Json, kept: set[str]) -> set[int]:
    """Ids of all tokens from which BPE merges the kept ones, step by step."""
    parts: dict[str, set[str]] = {}
    for merge in model["merges"]:
        first, second, product = _parts_and_product(merge, model)
        parts.setdefault(product, set()).update((first, second))
    found: set[str] = set()
    waiting = list(kept)
    while waiting:
        token = waiting.pop()
        if token not in found:
            found.add(token)
            waiting.extend(parts.get(token, ()))
    return {model["vocab"][token] for token in found}


def _parts_and_product(merge: str | Sequence[str], model: Json) -> tuple[str, str, str]:
    """A merge, written "a b" in older files and [a, b] in newer ones, with the token it makes."""
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second, first + second.removeprefix(model.get("continuing_subword_prefix") or "")


def _renumber_processor(processor: Json | None, new_ids: Mapping[int, int]) -> None:
    """Renumber the special tokens that a post-processor puts around a text, in place."""
    if processor is None:
        return
    for part in processor.get("processors", ()):
        _renumber_processor(part, new_ids)
    if processor["type"] == "TemplateProcessing":
        for token in processor["special_tokens"].values():
            token["ids"] = [new_ids[index] for index in token["ids"]]
    if processor["type"] in ("BertProcessing", "RobertaProcessing"):
        for name in ("sep", "cls"):
            token, index = processor[name]
            processor[name] = [token, new_ids[index]]
