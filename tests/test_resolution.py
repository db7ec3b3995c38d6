"""One rule gives every size: its bounds, its exactness and the pixels of both views."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vt_trl.errors import ConfigError, DataError
from vt_trl.images import MAX_ASPECT, ResolutionRule

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def halves(left, right, mode: str = "RGB", size=(8, 4)) -> Image.Image:
    image = Image.new(mode, size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image


def corners(image: Image.Image) -> list[tuple]:
    right, bottom = image.width - 1, image.height - 1
    return [image.getpixel(place) for place in ((0, 0), (right, 0), (0, bottom), (right, bottom))]


@pytest.mark.parametrize(
    ("original", "full"),
    [
        ((1024, 768), (1024, 768)),
        ((1025, 769), (1024, 768)),  # sides become even
        ((512, 512), (512, 512)),
        ((256, 256), (512, 512)),  # floor by area
        ((4096, 4096), (2048, 2048)),  # cap by area
        ((8192, 2048), (4096, 1024)),
        ((10, 10), (512, 512)),
        ((1, 1), (512, 512)),
        ((4000, 20), (11200, 56)),  # 200:1, so the short side decides
        ((20, 4000), (56, 11200)),
        ((513, 511), (514, 512)),  # even below would be under the floor
    ],
)
def test_full_size_of_known_pictures(original, full):
    assert ResolutionRule().full_size(*original) == full


@st.composite
def rules(draw):
    scale, min_side = draw(st.integers(2, 5)), draw(st.sampled_from([1, 7, 14, 28, 32]))
    most = draw(st.integers((scale * min_side) ** 2, 5_000_000))
    return ResolutionRule(most, draw(st.integers(1, most)), scale, min_side)


sizes = st.tuples(st.integers(1, 20_000), st.integers(1, 20_000)).filter(lambda s: max(s) <= MAX_ASPECT * min(s))


def check_rule(rule: ResolutionRule, size: tuple[int, int]) -> None:
    width, height = rule.full_size(*size)
    low = rule.low_size((width, height))
    assert (low[0] * rule.scale, low[1] * rule.scale) == (width, height)
    assert min(low) >= rule.min_side
    assert width * height <= rule.max_pixels
    # below the floor only when one grid step more would break the cap
    step = rule.scale
    assert width * height >= rule.min_pixels or (width + step) * (height + step) > rule.max_pixels
    # the exact aspect lies among those of sides moved by less than one step
    exact = size[0] / size[1]
    assert (width - step) / (height + step) < exact < (width + step) / max(height - step, 1e-9)
    assert max(width, height) <= MAX_ASPECT * min(width, height)
    assert rule.full_size(width, height) == (width, height)
    assert rule.full_size(size[1], size[0]) == (height, width)


@given(sizes)
def test_the_default_rule_shows_every_picture(size):
    check_rule(ResolutionRule(), size)


@settings(max_examples=400)
@given(rules(), sizes)
def test_any_rule_keeps_its_promises_or_refuses(rule, size):
    try:
        rule.full_size(*size)
    except DataError as error:
        # only long pictures cannot be shown: those whose least short side already costs too many pixels
        least = rule.scale * rule.min_side
        long_side = least * max(size) / min(size)
        assert "raise max_pixels" in str(error)
        assert least * long_side > 0.1 * rule.max_pixels
        return
    check_rule(rule, size)


def test_long_pictures_are_refused_with_their_ratio():
    with pytest.raises(DataError, match=r"201\.0"):
        ResolutionRule().full_size(2010, 10)
    with pytest.raises(DataError, match="raise max_pixels"):
        ResolutionRule(max_pixels=56 * 56, min_pixels=1).full_size(300, 100)
    with pytest.raises(DataError, match="empty"):
        ResolutionRule().full_size(0, 5)


@pytest.mark.parametrize(
    "setting",
    [
        {"min_pixels": 100, "max_pixels": 99},
        {"max_pixels": 3135, "min_pixels": 1},
        {"scale": 1},
        {"scale": 2.0},
        {"min_side": 0},
        {"max_pixels": True},
    ],
)
def test_rules_that_cannot_work_are_refused(setting):
    with pytest.raises(ConfigError, match=next(iter(setting))):
        ResolutionRule(**setting)


def test_low_size_is_exactly_half_or_an_error():
    assert ResolutionRule().low_size((1024, 770)) == (512, 385)
    with pytest.raises(ValueError, match="full_size"):
        ResolutionRule().low_size((1024, 769))


def test_views_show_the_picture_at_both_sizes():
    picture = halves(RED, BLUE, size=(1024, 600))
    views = ResolutionRule().views(picture)
    assert (views.full_size, views.low_size) == ((1024, 600), (512, 300))
    assert views.full is picture
    assert views.low is views.low and views.low.size == (512, 300)
    assert corners(views.low) == [RED, BLUE, RED, BLUE]
    expected = picture.resize((512, 300), Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(views.low), np.asarray(expected))


def test_tiny_pictures_are_enlarged_and_other_modes_converted():
    views = ResolutionRule(min_pixels=1).views(halves((*RED, 0), (*BLUE, 255), "RGBA", (10, 20)))
    assert views.full.size == (56, 112) and views.low.size == (28, 56)
    assert corners(views.low) == [WHITE, BLUE, WHITE, BLUE]
