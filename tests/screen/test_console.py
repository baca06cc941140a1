"""What a terminal is shown: names from models and recipes as text, whatever is in them."""

from __future__ import annotations

import pytest

from compress.errors import CheckpointError, printable
from compress.screen.console import console, table_of

EVIL = "a\x1b[2Jb\x9b31m\u202ec\x07"
SHOWN = r"a\x1b[2Jb\x9b31m\u202ec\x07"


def test_control_characters_are_spelt_out() -> None:
    assert printable(EVIL) == SHOWN
    assert printable("two\nlines\tand ümläuts, 中文 and 👍") == "two\nlines\tand ümläuts, 中文 and 👍"
    error = CheckpointError(f"{EVIL}: fetch it again")
    assert error.message == str(error) == f"{SHOWN}: fetch it again"


def test_tables_and_sentences_print_them_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    table = table_of(EVIL, "weights")
    table.add_row(EVIL)
    console().print(table)
    console().print(EVIL, markup=False)
    out = capsys.readouterr().out
    assert out.count(r"a\x1b[2Jb") == 3
    assert not {"\x1b", "\x9b", "\u202e", "\x07"} & set(out)
