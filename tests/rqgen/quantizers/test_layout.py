"""Layouts of codes: what all that depends on their shape goes by."""

import pytest
import torch

from rqgen.quantizers import CodeLayout

STACKS = CodeLayout.stacks([2, 3, 4], 9)
MAPS = CodeLayout.maps([[1, 1], [1, 2], [2, 3]], 9)


def codes_of(layout, num=5):
    return layout.unflatten(torch.randint(0, 9, (num, layout.count)))


def same(one, two):
    return all(map(torch.equal, *((part if isinstance(part, list) else [part]) for part in (one, two))))


def test_numbers():
    assert (STACKS.axis, STACKS.levels, STACKS.count, STACKS.level_sizes) == ("depth", 4, 24, [6] * 4)
    assert (MAPS.axis, MAPS.levels, MAPS.count, MAPS.level_sizes) == ("scale", 3, 9, [1, 2, 6])
    assert STACKS.in_words() == "2x3x4 codes" and MAPS.in_words() == "token maps of 1x1, 1x2, 2x3"
    assert CodeLayout.stacks((2, 3, 4), 9) == STACKS and hash(MAPS) == hash(CodeLayout.maps(MAPS.shape, 9))


def test_steps():
    assert [level for level, _ in STACKS.steps] == [0, 1, 2, 3] * 6
    assert [places for _, places in STACKS.steps] == [slice(i, i + 1) for i in range(24)]
    assert MAPS.steps == [(0, slice(0, 1)), (1, slice(1, 3)), (2, slice(3, 9))]


@pytest.mark.parametrize("layout", [STACKS, MAPS], ids=["stacks", "maps"])
def test_there_and_back(layout):
    codes = codes_of(layout)
    assert CodeLayout.of(codes, 9) == layout and CodeLayout.from_json(layout.to_json(), 9) == layout
    assert same(layout.unflatten(layout.flatten(codes)), codes)
    parts = [layout.select(codes, rows) for rows in (slice(0, 2), slice(2, 2), slice(2, 5))]
    assert same(layout.concatenate(parts), codes)
    assert same(layout.map(lambda part: part + 1, codes), layout.unflatten(layout.flatten(codes) + 1))
    levels = layout.by_level(codes)
    assert [part[0].numel() for part in levels] == layout.level_sizes
    with pytest.raises(ValueError, match=rf"codes: expected \(N, {layout.count}\), got \(5, {layout.count - 1}\)"):
        layout.unflatten(layout.flatten(codes)[:, 1:])


def test_the_order_of_flat_codes():
    stack = torch.arange(24).view(1, 2, 3, 4)
    assert STACKS.flatten(stack).tolist() == [list(range(24))]
    assert [part.flatten().tolist() for part in STACKS.by_level(stack)] == [list(range(d, 24, 4)) for d in range(4)]
    maps = [torch.tensor([[[0]]]), torch.tensor([[[1, 2]]]), torch.arange(3, 9).view(1, 2, 3)]
    assert MAPS.flatten(maps).tolist() == [list(range(9))]


@pytest.mark.parametrize(
    "shape", [None, [], 3, [2, 3], [2, 3, 0], [[1, 1], 5], [[1, 1, 1]], [[]], "2x3x4", [True, 1, 1]]
)
def test_shapes_that_are_none(shape):
    with pytest.raises(ValueError, match="code_shape: expected"):
        CodeLayout.from_json(shape, 9)


@pytest.mark.parametrize(
    ("layout", "change", "error", "message"),
    [
        (STACKS, lambda codes: [codes], TypeError, "codes: expected a tensor, got list"),
        (STACKS, lambda codes: codes.int(), TypeError, "codes: expected int64, got torch.int32"),
        (STACKS, lambda codes: codes[..., :3], ValueError, r"codes: expected shape \(B, 2, 3, 4\), got \(5, 2, 3, 3\)"),
        (STACKS, lambda codes: codes + 9, IndexError, r"codes: expected values in \[0, 9\), got"),
        (STACKS, lambda codes: codes.to("meta"), ValueError, "codes: expected on cpu, where the model is, got meta"),
        (MAPS, lambda codes: codes[0], TypeError, "codes: expected a list of token maps, got Tensor"),
        (MAPS, lambda codes: codes[:2], ValueError, "codes: expected 3 token maps, got 2"),
        (
            MAPS,
            lambda codes: [*codes[:2], codes[2][:4]],
            ValueError,
            r"codes\[2\]: expected shape \(B, 2, 3\), got \(4,",
        ),
        (MAPS, lambda codes: [*codes[:2], codes[2] - 9], IndexError, r"codes\[2\]: expected values in \[0, 9\), got -"),
        (MAPS, lambda codes: [codes[0], None, codes[2]], TypeError, r"codes\[1\]: expected a tensor, got NoneType"),
    ],
)
def test_codes_that_do_not_fit(layout, change, error, message):
    codes = codes_of(layout)
    layout.check(codes, device=torch.device("cpu"))
    with pytest.raises(error, match=message):
        layout.check(change(codes), device=torch.device("cpu"))
