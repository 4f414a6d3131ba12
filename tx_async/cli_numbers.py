"""Kinds of numbers that flags take."""

from __future__ import annotations

import argparse


def at_least_one(text: str) -> int:
    """For argparse, whose usage error names the flag."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return number
