"""Boxes in all frames: there and back, always inside, always on the grid, and every way to write a bad one."""

from __future__ import annotations

import json

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from vt_trl.boxes import FRAMES, Sight, from_frame, overlap, read_box, to_frame, whole_pixels, zoom_of
from vt_trl.envs.album import Album, Bounds, View
from vt_trl.errors import ConfigError, DataError
from vt_trl.types import Fault as F

SIGHTS = st.builds(
    Sight,
    st.sampled_from(list(FRAMES)),
    st.sampled_from([28, 32]),
    st.sampled_from([784, 3136, 65_536]),
    st.sampled_from([1_003_520, 12_845_056]),
)
SIZES = st.tuples(st.integers(30, 4000), st.integers(30, 4000))
SHARES = st.tuples(*[st.floats(0, 1)] * 4)


def shown_size(sight: Sight, size: tuple[int, int]) -> tuple[int, int]:
    return sight.fit(*size, 4, 4096)


@given(SIGHTS, SIZES, SHARES)
def test_whole_pixels_come_back_within_one_from_every_frame(sight, size, shares):
    (left, right), (top, bottom) = sorted(shares[::2]), sorted(shares[1::2])
    width, height = size
    box = tuple(round(value) for value in (left * width, top * height, right * width, bottom * height))
    assume(box[0] < box[2] and box[1] < box[3])
    sides, region = sight.sides(shown_size(sight, size)), (0, 0, *size)
    written = json.loads(json.dumps(list(to_frame(box, sides, region))))
    read = read_box(written, sides, 0.01)
    back = from_frame(read, sides, region)
    assert back == pytest.approx(box, abs=1e-6)
    assert whole_pixels(back, region) == box


@given(SIGHTS, SIZES, SHARES)
def test_a_crop_covers_its_box_by_less_than_a_pixel_and_lies_inside(sight, size, shares):
    (left, right), (top, bottom) = sorted(shares[::2]), sorted(shares[1::2])
    sides = sight.sides(shown_size(sight, size))
    box = read_box([left * sides[0], top * sides[1], right * sides[0], bottom * sides[1]], sides, 0.0)
    assume(not isinstance(box, F))
    exact = from_frame(box, sides, (0, 0, *size))
    crop = whole_pixels(exact, (0, 0, *size))
    assert 0 <= crop[0] <= crop[2] <= size[0] and 0 <= crop[1] <= crop[3] <= size[1]
    for side, (inner, outer) in enumerate(zip(exact, crop, strict=True)):
        assert -1e-5 <= (inner - outer if side < 2 else outer - inner) < 1


@settings(max_examples=40)  # every one resamples a picture
@given(SIGHTS, st.tuples(st.integers(60, 600), st.integers(60, 600)), SHARES, SHARES)
def test_a_part_of_a_part_is_mapped_through_both(sight, size, first, second):
    album = Album([Image.new("L", size)], sight, Bounds((4, 4096), (4, 1024)))
    region, view = (0, 0, *size), album.views[0]
    for shares in (first, second):
        (left, right), (top, bottom) = sorted(shares[::2]), sorted(shares[1::2])
        sides = sight.sides(view.size)
        box = read_box([left * sides[0], top * sides[1], right * sides[0], bottom * sides[1]], sides, 0.01)
        assume(not isinstance(box, F))
        inner = whole_pixels(from_frame(box, sides, view.region), view.region)
        assert region[0] <= inner[0] and region[1] <= inner[1] and inner[2] <= region[2] and inner[3] <= region[3]
        view = album.crop(0, inner, 8)
        assume(isinstance(view, View))
        region = inner


@given(SIGHTS, st.floats(1, 20_000), st.floats(1, 20_000), st.integers(1, 300), st.integers(2, 20))
def test_a_fitted_size_is_one_that_the_processor_leaves_alone(sight, width, height, least, times):
    assume(max(width, height) <= 200 * min(width, height))
    low = max(least, -(-sight.min_pixels // sight.factor**2))
    most = low * times
    wide, high = sight.fit(width, height, least, most)
    assert least <= sight.visual_tokens((wide, high)) <= most
    assert smart_resize(high, wide, sight.factor, sight.min_pixels, sight.max_pixels) == (high, wide)


@given(SIGHTS, SIZES)
def test_where_no_bound_bites_sides_are_rounded_to_the_grid(sight, size):
    step = sight.factor
    assume(sight.min_pixels < (size[0] - step) * (size[1] - step) and min(size) > step)
    assume((size[0] + step) * (size[1] + step) < sight.max_pixels)
    wide, high = sight.fit(*size, 1, 100_000)
    assert abs(wide - size[0]) <= step / 2 and abs(high - size[1]) <= step / 2


BAD = {
    "text": ("[1, 2, 3, 4]", F.BOX_NO_NUMBERS),
    "texts": (["1", "2", "3", "4"], F.BOX_NO_NUMBERS),
    "object": ({"x1": 1}, F.BOX_NO_NUMBERS),
    "nothing": (None, F.BOX_NO_NUMBERS),
    "truth values": ([False, False, True, True], F.BOX_NO_NUMBERS),
    "three": ([1, 2, 3], F.BOX_NO_NUMBERS),
    "five": ([1, 2, 3, 4, 5], F.BOX_NO_NUMBERS),
    "empty list": ([], F.BOX_NO_NUMBERS),
    "one nested": ([[1, 2, 3, 4]], F.BOX_NO_NUMBERS),
    "several": ([[1, 2, 3, 4], [5, 6, 7, 8]], F.SEVERAL_BOXES),
    "NaN": ([float("nan"), 2, 3, 4], F.BOX_NOT_FINITE),
    "infinite": ([1, 2, float("inf"), 4], F.BOX_NOT_FINITE),
    "no float": ([1, 2, 10**400, 4], F.BOX_NOT_FINITE),
    "reversed across": ([30, 2, 20, 40], F.BOX_REVERSED),
    "reversed down": ([3, 50, 20, 40], F.BOX_REVERSED),
    "no width": ([3, 5, 3, 40], F.BOX_EMPTY),
    "no height": ([3, 5, 30, 5], F.BOX_EMPTY),
    "right of it": ([3, 5, 101.1, 40], F.BOX_OUTSIDE),
    "above it": ([3, -0.6, 30, 40], F.BOX_OUTSIDE),
    "wholly outside": ([300, 300, 400, 400], F.BOX_OUTSIDE),
    "within the tolerance, but nothing is left": ([100, 5, 101, 40], F.BOX_EMPTY),
}


@pytest.mark.parametrize(("written", "fault"), BAD.values(), ids=BAD)
def test_every_bad_box_has_a_fault(written, fault):
    assert read_box(written, (100.0, 50.0), 0.01) is fault


def test_only_the_tolerance_is_mended():
    assert read_box([-1, -0.5, 101, 50.5], (100.0, 50.0), 0.01) == (0, 0, 100, 50)
    assert read_box([-1, 0, 100, 50], (100.0, 50.0), 0.0) is F.BOX_OUTSIDE
    assert read_box([1.5, 2, 30, 40], (100.0, 50.0), 0.0) == (1.5, 2, 30, 40)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=8))
def test_reading_never_raises(written):
    box = read_box(written, (1000.0, 1000.0), 0.01)
    assert isinstance(box, F) or (0 <= box[0] < box[2] <= 1000 and 0 <= box[1] < box[3] <= 1000)


@pytest.mark.parametrize(
    ("share", "zoom"), [(0.0, 2), (0.125, 2), (0.2, 1.8), (0.3125, 1.5), (0.4, 1.2666667), (0.5, 1), (1, 1)]
)
def test_the_zoom_by_area(share, zoom):
    assert zoom_of(share) == pytest.approx(zoom)


@pytest.mark.parametrize(
    ("one", "other", "value"),
    [
        ((0, 0, 10, 10), (0, 0, 10, 10), 1.0),
        ((0, 0, 10, 10), (5, 0, 15, 10), 50 / 150),
        ((0, 0, 10, 10), (2, 2, 4, 4), 4 / 100),
        ((0, 0, 10, 10), (10, 0, 20, 10), 0.0),
        ((0, 0, 10, 10), (20, 20, 30, 30), 0.0),
    ],
)
def test_intersection_over_union(one, other, value):
    assert overlap(one, other) == pytest.approx(value) == overlap(other, one)


def test_an_unknown_frame_and_an_impossible_size_say_so():
    with pytest.raises(ConfigError, match="Did you mean 'per_mille'"):
        Sight("per_mile")
    with pytest.raises(DataError, match="64 to 63 visual tokens"):
        Sight(factor=32, min_pixels=65_536).fit(100, 100, 4, 63)
