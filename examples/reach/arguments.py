"""Types of command-line arguments: numbers with a range, files of a kind."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
    """Return a type for argparse: a whole number from ``low`` to ``high``."""

    def parse(text: str) -> int:
        wanted = f"a whole number of {low} or more" if high is None else f"{low} to {high}"
        try:
            number = int(text)
        except ValueError as e:
            raise argparse.ArgumentTypeError(f"expected {wanted}, got {text}") from e
        if number < low or (high is not None and number > high):
            raise argparse.ArgumentTypeError(f"expected {wanted}, got {number}")
        return number

    return parse


def file_to_write(*suffixes: str) -> Callable[[str], Path]:
    """Return a type for argparse: a file with one of ``suffixes``, in a folder that is there."""

    def parse(text: str) -> Path:
        path = Path(text)
        if path.suffix.lower() not in suffixes:
            raise argparse.ArgumentTypeError(f"{path}: expected a name in {', '.join(suffixes)}")
        if not path.resolve().parent.is_dir():
            raise argparse.ArgumentTypeError(f"{path}: its folder does not exist")
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"{path}: is a folder")
        return path

    return parse
