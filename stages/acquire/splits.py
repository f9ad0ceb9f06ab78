"""Train, validation and test: given by file names, or drawn by label over unique texts."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

import pandas

from stages.core.artifacts import text_sha256
from stages.core.errors import UserError
from stages.core.texts import comparable

SPLITS = ("train", "validation", "test")

_NAMES = {"train": "train", "validation": "validation", "valid": "validation", "dev": "validation", "test": "test"}
_SPLIT_NAME = re.compile(rf"({'|'.join(_NAMES)})([-_.]\d.*)?", re.I)  # `train`, and parts such as train-00000-of-00002


def split_of(name: str) -> str | None:
    """Return the split that a file's or a folder's name stands for, or None."""
    match = _SPLIT_NAME.fullmatch(name.partition(".")[0])
    return _NAMES[match[1].lower()] if match else None


def given_splits(names: Sequence[str], where: str) -> dict[str, str] | None:
    """Tell which split each of several files is, by its name or that of a folder it is in.

    Args:
        names: of the files, relative to their source.
        where: name of the param, for messages.

    Returns:
        split by name, or None where no file is named like a split.

    Raises:
        UserError: if some files are named like splits and others are not, or none is train.
    """
    if len(names) == 1:
        return None
    found = {name: next(filter(None, map(split_of, PurePosixPath(name).parts)), None) for name in names}
    if not any(found.values()):
        return None
    strange = [name for name, split in found.items() if split is None]
    if strange:
        raise UserError(
            f"{where}: {strange[0]} lies beside given splits and is none of train, validation, test; move it"
        )
    if "train" not in found.values():
        raise UserError(
            f"{where}: there is {', '.join(found)} but no train; add it, or rename the files to have them split"
        )
    return {name: split for name, split in found.items() if split is not None}


def complete(
    given: Mapping[str, pandas.DataFrame], shares: Mapping[str, float], seed: int, where: str
) -> dict[str, pandas.DataFrame]:
    """Return all three splits; those not given are drawn from train.

    Args:
        given: frames with text and label; the key train holds everything where nothing is given.
        shares: of validation and test, of the unique texts of each class.
        seed: of the draw.
        where: name of the param, for messages.

    Raises:
        UserError: if a class has fewer unique texts than there are splits to fill.
    """
    missing = {name: shares[name] for name in ("test", "validation") if name not in given}
    drawn = draw(given["train"], missing, seed, where) if missing else {"train": given["train"]}
    return {name: drawn.get(name, given.get(name)) for name in SPLITS}  # type: ignore[misc]


def draw(frame: pandas.DataFrame, shares: Mapping[str, float], seed: int, where: str) -> dict[str, pandas.DataFrame]:
    """Split rows so that each class is shared out alike and copies of a text stay together.

    Texts are compared without case, punctuation and spacing. Blank texts go to train.

    Args:
        frame: text and label.
        shares: of the splits beside train, of the unique texts of each class; every class gets at least one.
        seed: of the draw.
        where: name of the param, for messages.

    Returns:
        train and the splits in `shares`, rows in their first order.

    Raises:
        UserError: if a class has fewer unique texts than there are splits.
    """
    keys = [comparable(text) for text in frame["text"]]
    first_label: dict[str, str] = {}
    for key, label in zip(keys, frame["label"], strict=True):
        if key:
            first_label.setdefault(key, label)
    texts_of = defaultdict(list)
    for key, label in first_label.items():
        texts_of[label].append(key)
    side = {"": "train"}
    for label in sorted(set(frame["label"])):
        texts = texts_of[label]
        if len(texts) < len(shares) + 1:
            raise UserError(
                f"{where}: class {label!r} has {len(texts)} different texts, too few for {len(shares) + 1} splits; "
                "add some or leave the class out"
            )
        texts.sort(key=lambda text: text_sha256(f"{seed}\n{text}"))
        side.update(_share_out(texts, shares))
    sides = [side[key] for key in keys]
    return {
        name: frame[[own == name for own in sides]].reset_index(drop=True)
        for name in SPLITS
        if name in ("train", *shares)
    }


def _share_out(texts: Sequence[str], shares: Mapping[str, float]) -> dict[str, str]:
    """Give each split its share of the texts, at least one, and train the rest, at least one."""
    sides = {}
    start, reserved = 0, len(shares)
    for name, share in shares.items():
        count = min(max(1, round(len(texts) * share)), len(texts) - start - reserved)
        sides.update(dict.fromkeys(texts[start : start + count], name))
        start, reserved = start + count, reserved - 1
    sides.update(dict.fromkeys(texts[start:], "train"))
    return sides
