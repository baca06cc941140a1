"""What can go wrong, by whose input it went wrong; each class carries the exit code of the command line.

A message has four parts: the place, what was got, what was expected and what to do.
"""

from __future__ import annotations

import re

# A command that is spelt out, which stays as it is; an option by itself; the place of a recipe that was made of arguments.
_WORDS = re.compile(r"compress [a-z]+ [^`;,)]*|(?<![\w-])--([a-z][a-z-]*)|^command line(?=:)")
_ARGUMENTS = {"set": "changes", "format": "formats", "no-reload": "reload=False", "command line": "arguments"}


def in_python(message: str) -> str:
    """Name the options in a message as Python's arguments: `--group-size 7` as `group_size 7`."""

    def argument(found: re.Match[str]) -> str:
        option = found[1] or found[0]
        return _ARGUMENTS.get(option, option.replace("-", "_") if found[1] else option)

    return _WORDS.sub(argument, message)


_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Spell out control characters but tabs and ends of lines, and those that turn the direction of a text, as \\x1b."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class CompressError(Exception):
    """Something the user can act on; everything else is a bug and keeps its traceback.

    A message names options as the command line has them. `str`, which is what Python shows, names them as arguments.
    """

    exit_code = 1

    def __str__(self) -> str:
        return in_python(self.message)

    @property
    def message(self) -> str:
        """The message as the command line has it."""
        return printable(super().__str__())  # names in it come from files of other people


class RecipeError(CompressError):
    """A recipe or a command line option is wrong: unknown key, impossible value, a pattern that matches nothing."""

    exit_code = 2


class CheckpointError(CompressError):
    """A checkpoint cannot be read: missing files, hostile headers, unknown tensors, values that are not finite."""

    exit_code = 3


class FamilyError(CheckpointError):
    """Nothing is known of the architecture of a checkpoint that is whole otherwise."""


class FormatError(CheckpointError):
    """Packed tensors do not fit their description."""


class CalibrationError(CompressError):
    """The calibration data cannot be had or does not suffice."""

    exit_code = 4


class ResumeError(CompressError):
    """A job folder belongs to a different job than the one asked for."""

    exit_code = 5


class OutputError(CompressError):
    """The result cannot be written: the disk is full, or the folder belongs to something else."""

    exit_code = 6


class VerificationError(CompressError):
    """A checkpoint that was written does not give what was recorded when it was written."""

    exit_code = 7


class KernelError(CompressError):
    """A kernel cannot be compiled or does not take these shapes."""

    exit_code = 8
