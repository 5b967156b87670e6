"""Window geometry against loops over single tokens, in two and three dimensions."""

import itertools
import math

import pytest
import torch

from swinv2_scale.ops import windows

CPU = torch.device("cpu")

# grid, window: dividing, not dividing, rectangular, one axis covered by a window, window larger than the grid, 3-D
LAYOUTS = [
    ((8, 8), (4, 4)),
    ((7, 9), (3, 4)),
    ((5, 6), (1, 1)),
    ((3, 17), (1, 8)),
    ((10, 11), (7, 9)),
    ((4, 9), (4, 2)),
    ((3, 2), (5, 4)),
    ((2, 4, 6), (2, 2, 3)),
    ((3, 8, 7), (2, 7, 7)),
]
SHIFTED = pytest.mark.parametrize("shifted", [False, True], ids=["flat", "shifted"])
LAYOUT = pytest.mark.parametrize(("grid", "window"), LAYOUTS, ids=str)


def half(window: tuple[int, ...], shifted: bool) -> tuple[int, ...]:
    return tuple(w // 2 if shifted else 0 for w in window)


def places(grid, window, shift) -> list[list[tuple[tuple[int, ...], tuple[bool, ...]]]]:
    """For every window and token: its place on the padded map, and on which axes the roll wrapped it."""
    padded = [math.ceil(g / w) * w for g, w in zip(grid, window, strict=True)]
    found = []
    for corner in itertools.product(*(range(0, p, w) for p, w in zip(padded, window, strict=True))):
        tokens = []
        for inside in itertools.product(*map(range, window)):
            moved = [c + i + s for c, i, s in zip(corner, inside, shift, strict=True)]
            origin = tuple(m % p for m, p in zip(moved, padded, strict=True))
            tokens.append((origin, tuple(m >= p for m, p in zip(moved, padded, strict=True))))
        found.append(tokens)
    return found


@LAYOUT
@SHIFTED
def test_partition_takes_every_token_from_its_place(grid, window, shifted) -> None:
    shift = half(window, shifted)
    x = torch.randn(2, *grid, 3)
    cut = windows.partition(x, window, shift)
    absent = windows.absent_tokens(grid, window, shift, CPU)
    expected = places(grid, window, shift)
    assert cut.shape == (2, len(expected), math.prod(window), 3)
    assert absent.shape == cut.shape[1:3]
    for m, tokens in enumerate(expected):
        for n, (origin, _) in enumerate(tokens):
            inside = all(o < g for o, g in zip(origin, grid, strict=True))
            value = x[(slice(None), *origin)] if inside else torch.zeros(2, 3)
            assert torch.equal(cut[:, m, n], value)
            assert absent[m, n] == (not inside)
    assert torch.equal(windows.merge(cut, grid, window, shift), x)


@LAYOUT
def test_regions_separate_exactly_what_the_roll_brought_together(grid, window) -> None:
    shift = half(window, True)
    region = windows.regions(grid, window, shift, CPU)
    wrapped = [[w for _, w in tokens] for tokens in places(grid, window, shift)]
    for m, n, k in itertools.product(range(len(region)), *[range(region.shape[1])] * 2):
        assert (region[m, n] == region[m, k]) == (wrapped[m][n] == wrapped[m][k])


@pytest.mark.parametrize("window", [(1, 1), (1, 4), (3, 2), (5, 5), (2, 3, 4)], ids=str)
def test_relative_index_finds_the_offset_in_the_flattened_table(window) -> None:
    index = windows.relative_index(window, CPU)
    table = torch.arange(math.prod(2 * w - 1 for w in window)).view(*(2 * w - 1 for w in window))
    tokens = list(itertools.product(*map(range, window)))
    assert index.shape == (len(tokens), len(tokens))
    for n, query in enumerate(tokens):
        for k, key in enumerate(tokens):
            assert index[n, k] == table[tuple(q - p + w - 1 for q, p, w in zip(query, key, window, strict=True))]


@pytest.mark.parametrize(
    ("grid", "window", "shift", "expected"),
    [
        ((16, 16), (8, 8), (4, 4), ([8, 8], [4, 4])),
        ((8, 16), (8, 8), (4, 4), ([8, 8], [0, 4])),
        ((4, 16), (8, 8), (4, 4), ([4, 8], [0, 4])),
        ((16, 4), (8, 8), (4, 4), ([8, 4], [4, 0])),
        ((9, 7), (7, 9), (3, 4), ([7, 7], [3, 0])),
        ((1, 1), (7, 9), (3, 4), ([1, 1], [0, 0])),
        ((2, 10, 3), (8, 4, 4), (4, 2, 2), ([2, 4, 3], [0, 2, 0])),
    ],
    ids=str,
)
def test_fit_window_decides_per_axis(grid, window, shift, expected) -> None:
    assert windows.fit_window(grid, window, shift) == expected
