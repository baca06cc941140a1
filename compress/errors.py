"""What can go wrong, by whose input it went wrong; each class carries the exit code of the command line.

A message has four parts: the place, what was got, what was expected and what to do.
"""

from __future__ import annotations


class CompressError(Exception):
    """Something the user can act on; everything else is a bug and keeps its traceback."""

    exit_code = 1


class RecipeError(CompressError):
    """A recipe or a command line option is wrong: unknown key, impossible value, a pattern that matches nothing."""

    exit_code = 2


class CheckpointError(CompressError):
    """A checkpoint cannot be read: missing files, hostile headers, unknown tensors, values that are not finite."""

    exit_code = 3


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
