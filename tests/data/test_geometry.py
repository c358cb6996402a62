import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dreambooth_lab.config import enums
from dreambooth_lab.data.preparation import geometry, mask
from dreambooth_lab.data.spec import Shaping

side = st.integers(20, 3000)
size = st.tuples(side, side)
unit = st.floats(0, 1)


@given(size, st.integers(32, 1024), st.sampled_from([8, 16, 32, 64]), st.floats(1, 4))
def test_bucket_shape(size, edge, stride, max_aspect):
    height, width = geometry.bucket_shape(size, edge, stride, max_aspect)
    assert height % stride == width % stride == 0 and min(height, width) >= stride
    aspect = min(max(size[1] / size[0], 1 / max_aspect), max_aspect)
    assert abs(width - edge * aspect**0.5) <= stride / 2 + 1e-6 or width == stride
    assert abs(height - edge / aspect**0.5) <= stride / 2 + 1e-6 or height == stride


@given(size, st.tuples(st.integers(8, 512), st.integers(8, 512)), st.tuples(unit, unit), st.booleans())
def test_crop_lies_inside_the_smallest_covering_image(size, target, at, mirror):
    g = geometry.place(size, target, at, mirror)
    for resized, crop, cut in zip(g.resized, g.crop, g.target, strict=True):
        assert 0 <= crop <= resized - cut
    assert any(abs(resized - cut) <= 1 for resized, cut in zip(g.resized, g.target, strict=True))
    assert g.size().original == size and g.size().target == target


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("at", [(0, 0), (0.5, 0.5), (1, 0.3)])
def test_image_used_as_its_own_mask_stays_aligned(at, mirror):
    image = torch.zeros(3, 60, 90, dtype=torch.uint8)
    image[:, 10:35, 20:70] = 255
    g = geometry.place((60, 90), (48, 48), at, mirror)
    assert torch.equal(geometry.apply(g, image)[:1], geometry.apply(g, image[:1]))


def test_mirrored_crop_reports_its_position_in_the_mirrored_image():
    image = torch.arange(40, dtype=torch.uint8).expand(3, 20, 40)
    plain, mirrored = (geometry.place((20, 40), (20, 20), (0.5, 0.25), m) for m in (False, True))
    left = mirrored.size().crop[1]
    assert torch.equal(geometry.apply(mirrored, image), image.flip(-1)[..., left : left + 20])
    assert plain.size().crop == (0, 5) and left == 15


def test_geometry_refuses_an_image_of_another_size():
    with pytest.raises(ValueError, match="its geometry is for"):
        geometry.apply(geometry.place((10, 10), (8, 8), (0, 0), False), torch.zeros(3, 9, 10, dtype=torch.uint8))


def test_nearest_shape_is_nearest_in_aspect_ratio():
    assert geometry.nearest_shape((64, 64), [(96, 48), (80, 64), (32, 128)]) == (80, 64)


units = st.sampled_from(list(enums.ResolutionType))


@given(size, units, st.sampled_from([16, 32, 64]), st.floats(1, 4), st.sampled_from(list(enums.CropAspect)))
def test_target_has_the_requested_resolution_and_aspect(size, unit, stride, max_aspect, aspect):
    resolution = {enums.ResolutionType.area: 0.25}.get(unit, 512)
    rule = Shaping(resolution, unit, aspect=aspect, aspects=(0.5, 1.0, 1.5), max_aspect=max_aspect)
    shapes = geometry.target(size, rule, stride, (0.1, 0.9, 0.5))
    assert shapes and len(set(shapes)) == len(shapes)
    for height, width in shapes:
        assert height % stride == width % stride == 0 and min(height, width) >= stride
        slack = (1 + stride / min(height, width)) ** 2
        assert max(height / width, width / height) <= max_aspect * slack
        if unit is enums.ResolutionType.pixel:
            assert min(height, width) == 512
        else:
            assert 512**2 / slack <= height * width <= 512**2 * slack
        if aspect is enums.CropAspect.square:
            assert height == width


@given(size, units, st.floats(0.01, 4), st.floats(0.01, 4))
def test_image_above_the_maximum_is_downsampled(size, unit, most, share):
    scale = 1.0 if unit is enums.ResolutionType.area else 1000.0
    rule = Shaping(64, unit, maximum=most * scale, downsample=min(share, most) * scale)
    factor = geometry.shrunk(size, rule)
    if geometry.measure(size, unit) <= rule.maximum:
        assert factor == 0
    else:
        shrunk = [side * factor for side in size]
        goal = geometry.edge(rule.downsample, unit)
        measured = min(shrunk) if unit is enums.ResolutionType.pixel else math.sqrt(shrunk[0] * shrunk[1])
        assert measured == pytest.approx(goal) and factor < 1.05


@given(size, st.tuples(unit, unit), st.floats(0, 3))
def test_image_resized_before_the_crop_covers_its_target(size, at, least):
    g = geometry.place(size, (48, 64), at, False, least)
    assert all(r >= t for r, t in zip(g.resized, g.target, strict=True))
    assert all(0 <= c <= r - t for c, r, t in zip(g.crop, g.resized, g.target, strict=True))
    if least * min(size) > 64:
        assert g.resized == tuple(round(side * max(least, 48 / size[0], 64 / size[1])) for side in size)


def test_minimum_size_is_in_the_unit_of_the_resolution():
    for unit, minimum in (
        (enums.ResolutionType.pixel, 500),
        (enums.ResolutionType.pixel_area, 500),
        (enums.ResolutionType.area, 0.25),
    ):
        rule = Shaping(0.25 if unit is enums.ResolutionType.area else 512, unit, minimum=minimum)
        assert geometry.reason_against((500, 500), rule, 16) is None
        assert "minimum_image_size" in geometry.reason_against((499, 499), rule, 16)
    assert geometry.reason_against((250, 1000), Shaping(512, minimum=500), 16) is None, "its area is sufficient"
    square = Shaping(512, minimum=500, aspect=enums.CropAspect.square)
    assert "square crops" in geometry.reason_against((250, 1000), square, 16)


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("least", [0.0, 1.3])
@pytest.mark.parametrize("at", [(0.5, 0.5), (0.0, 0.0), (0.137, 0.861), (1.0, 0.25)], ids=["center", "corner", "random", "far"])
def test_thresholded_image_and_mask_agree_to_the_pixel(at, least, mirror):
    """Every crop style, with and without resizing before the crop, mirrored and not."""
    torch.manual_seed(0)
    blocks = torch.randint(0, 2, (1, 9, 13), dtype=torch.uint8) * 255
    image = blocks.repeat_interleave(11, 1).repeat_interleave(7, 2)
    g = geometry.place(tuple(image.shape[1:]), (64, 48), at, mirror, least)
    cut = geometry.apply(g, image.expand(3, -1, -1))
    assert torch.equal(geometry.apply(g, image)[0], cut[0])
    grid = mask.to_grid(image, g, 8)
    assert torch.allclose(grid[0], torch.nn.functional.avg_pool2d(cut[:1].float() / 255, 8)[0])
    assert tuple(grid.shape) == (1, 8, 6) and grid.min() >= 0 and grid.max() <= 1 and 0 < grid.mean() < 1
