"""How a benchmark tells the call that made a figure."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Collection


def repeatable_call(parser: argparse.ArgumentParser, arguments: argparse.Namespace, folders: Collection[str]) -> str:
    """The call as another machine would repeat it: what differs from the defaults, folders left out.

    Args:
        parser: whose `prog` is the command.
        arguments: what it read.
        folders: names of arguments that mean nothing on another machine.
    """
    words = shlex.split(parser.prog)
    for name, value in vars(arguments).items():
        if name in folders or value == parser.get_default(name):
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words += map(str, value if isinstance(value, list) else [value])
    return shlex.join(words)
