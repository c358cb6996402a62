import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dreambooth_lab.data import geometry

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
def test_the_crop_lies_inside_a_picture_that_just_covers_it(size, target, at, mirror):
    g = geometry.place(size, target, at, mirror)
    for resized, crop, cut in zip(g.resized, g.crop, g.target, strict=True):
        assert 0 <= crop <= resized - cut
    assert any(abs(resized - cut) <= 1 for resized, cut in zip(g.resized, g.target, strict=True))
    assert g.size().original == size and g.size().target == target


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("at", [(0, 0), (0.5, 0.5), (1, 0.3)])
def test_a_picture_that_is_its_own_mask_stays_aligned(at, mirror):
    picture = torch.zeros(3, 60, 90, dtype=torch.uint8)
    picture[:, 10:35, 20:70] = 255
    g = geometry.place((60, 90), (48, 48), at, mirror)
    assert torch.equal(geometry.apply(g, picture)[:1], geometry.apply(g, picture[:1]))


def test_a_mirrored_crop_tells_where_it_lies_in_the_mirrored_picture():
    picture = torch.arange(40, dtype=torch.uint8).expand(3, 20, 40)
    plain, mirrored = (geometry.place((20, 40), (20, 20), (0.5, 0.25), m) for m in (False, True))
    left = mirrored.size().crop[1]
    assert torch.equal(geometry.apply(mirrored, picture), picture.flip(-1)[..., left : left + 20])
    assert plain.size().crop == (0, 5) and left == 15


def test_a_geometry_refuses_another_picture():
    with pytest.raises(ValueError, match="its geometry is for"):
        geometry.apply(geometry.place((10, 10), (8, 8), (0, 0), False), torch.zeros(3, 9, 10, dtype=torch.uint8))


def test_nearest_shape_is_nearest_in_ratio():
    assert geometry.nearest_shape((64, 64), [(96, 48), (80, 64), (32, 128)]) == (80, 64)
