"""The layout that kernels read: golden words, and back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.kernels._tiles import COLUMNS, ROWS, places, plane_widths, tile, untile

ROW, COLUMN = torch.arange(ROWS).view(-1, 1), torch.arange(COLUMNS)


def golden(bits: int) -> Tensor:
    """A tile's codes from a formula."""
    return ((5 * ROW + 3 * COLUMN + ROW * COLUMN // 8 + COLUMN // 16) % (1 << bits)).to(torch.uint8)


def hexadecimal(words: Tensor) -> str:
    return " ".join(f"{word & 0xFFFFFFFF:08x}" for word in words.tolist())


def checksum(words: Tensor) -> str:
    return f"{sum((i + 1) * (word & 0xFFFFFFFF) for i, word in enumerate(words.tolist())) & 0xFFFFFFFF:08x}"


@pytest.mark.parametrize(
    ("bits", "field", "lane", "words"),
    [
        (4, 16, 0, ["cbc38880 dcd49991 ede5aaa2 fef6bbb3"]),
        (4, 16, 5, ["a79e645b dac1978e 0df4cab1 3027fde4"]),
        (3, 16, 0, ["aa990000 ffee5555", "a5a5f0f0"]),
        (3, 16, 5, ["987333e9 472eee94", "9696c3c3"]),
        (4, 8, 0, ["4906c380 5a17d491 6b28e5a2 7c39f6b3"]),
        (4, 8, 5, ["9a5714d1 cd8a4704 f0bd7a37 23e0ad6a"]),
        (2, 8, 0, ["61724350 cbd8e9fa"]),
        (8, 16, 0, ["2c032800 4c1b4818 6d346931 8d4c8949 ae65aa62 ce7dca7a ef96eb93 0fae0bab"]),
    ],
)
def test_golden_words(bits: int, field: int, lane: int, words: list[str]) -> None:
    planes = tile(golden(bits), bits, field).split([32 * p for p in plane_widths(bits)])
    assert [hexadecimal(plane.view(32, -1)[lane]) for plane in planes] == words


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        (16, ["0f009590", "1f6b47f6", "b9f46664", "3382df38", "e08c6543", "0f009590", "1e58b448"]),
        (8, ["f2e8dd44", "e36cecd4", "4665a380", "38ca4ea8", "da49ae26", "f2e8dd44", "c7074700"]),
    ],
)
def test_golden_checksums(field: int, expected: list[str]) -> None:
    planes = [
        plane for bits in (1, 2, 4, 7, 8) for plane in tile(golden(bits), bits, field).split([32 * p for p in plane_widths(bits)])
    ]
    assert [checksum(plane) for plane in planes] == expected


@pytest.mark.parametrize("field", [16, 8])
def test_places_name_each_element_once(field: int) -> None:
    assert sorted(places(field).flatten().tolist()) == list(range(ROWS * COLUMNS))


@pytest.mark.parametrize("field", [16, 8])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(1, 1), (16, 64), (17, 65), (37, 200), (48, 63)])
def test_untile_gives_back_what_was_tiled(bits: int, field: int, shape: tuple[int, int]) -> None:
    codes = torch.randint(0, 1 << bits, shape, generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    words = tile(codes, bits, field)
    tiles = -(-shape[0] // ROWS) * -(-shape[1] // COLUMNS)
    assert words.shape == (tiles * 32 * bits,)  # not a bit more than the codes of whole tiles
    assert torch.equal(untile(words, shape, bits, field), codes)
