"""Affine maps and light: against closed forms, and drawn only where they are asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dverge_serve.errors import UserError
from training.config import Augment, Data
from training.data.augmentation import jitter
from training.data.splits import Split, batches
from training.seeds import generator


def ramp(count: int, height: int = 24, width: int = 24) -> Tensor:
    """Return images of which channel 0 is the column, channel 1 the row, from 0.25 to 0.75."""
    rows, columns = (torch.linspace(0.25, 0.75, side) for side in (height, width))
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))
    return grid.flip(0).expand(count, -1, -1, -1).contiguous()


def changed(images: Tensor, **settings: float) -> Tensor:
    return jitter(images, Augment(**settings), generator("jitter"))


@pytest.mark.parametrize(("height", "width"), [(24, 24), (16, 32)])
def test_rotation_turns_places_about_the_centre(height: int, width: int) -> None:
    """The image holds its own coordinates: they say where each pixel came from."""
    found = changed(ramp(200, height, width), rotate=20)
    middle = slice(height // 4, 3 * height // 4), slice(width // 4, 3 * width // 4)
    x, y = found[:, :, *middle].unbind(1)
    # In pixels, where a rotation keeps lengths.
    across = (
        x.diff(dim=2).mean((1, 2)) * 2 * (width - 1),
        y.diff(dim=2).mean((1, 2)) * 2 * (height - 1),
    )
    down = (
        x.diff(dim=1).mean((1, 2)) * 2 * (width - 1),
        y.diff(dim=1).mean((1, 2)) * 2 * (height - 1),
    )
    for one, other in (across, down):
        assert torch.allclose(one**2 + other**2, torch.ones(200), atol=1e-3)
    assert torch.allclose(across[0], down[1], atol=1e-3)
    assert torch.allclose(across[1], -down[0], atol=1e-3)
    degrees = torch.atan2(across[1], across[0]).rad2deg()
    assert float(degrees.abs().max()) <= 20.01
    assert float(degrees.max()) > 18
    assert float(degrees.min()) < -18
    assert torch.allclose(
        found[:, :, height // 2 - 1 : height // 2 + 1, width // 2 - 1 : width // 2 + 1].mean(
            (2, 3)
        ),
        torch.full((200, 2), 0.5),
        atol=1e-3,
    )


def test_scale_and_shear_change_the_slopes_they_name() -> None:
    across, down = (ramp(1)[0, at].diff(dim=1 - at).mean() for at in (0, 1))
    found = changed(ramp(300), scale=0.25)[:, :, 8:16, 8:16]
    wide, tall = (found[:, at].diff(dim=2 - at).mean((1, 2)) for at in (0, 1))
    assert torch.allclose(wide / across, tall / down, atol=1e-3)
    sizes = across / wide
    assert 0.74 < float(sizes.min()) < 0.78
    assert 1.22 < float(sizes.max()) < 1.26
    found = changed(ramp(300), shear=30)[:, :, 8:16, 8:16]
    assert torch.allclose(found[:, 1], ramp(300)[:, 1, 8:16, 8:16], atol=1e-3)
    slopes = (found[:, 0].diff(dim=1).mean((1, 2)) / across).atan().rad2deg()
    assert 28 < float(slopes.abs().max()) < 30.01


def test_brightness_multiplies_and_contrast_stretches_about_the_mean() -> None:
    images = ramp(400)
    brighter = changed(images, brightness=0.3)
    factors = brighter[:, 0, 0, 0] / images[:, 0, 0, 0]
    assert torch.allclose(brighter, images * factors[:, None, None, None], atol=1e-6)
    assert 0.69 < float(factors.min()) < 0.72
    assert 1.28 < float(factors.max()) < 1.31
    stretched = changed(images, contrast=0.3)
    assert torch.allclose(stretched.mean((1, 2, 3)), images.mean((1, 2, 3)), atol=1e-5)
    spread = stretched.std((1, 2, 3)) / images.std((1, 2, 3))
    assert 0.69 < float(spread.min()) < 0.72
    assert 1.28 < float(spread.max()) < 1.31
    lit = changed(torch.ones(50, 1, 4, 4), brightness=0.9, contrast=0.9)
    assert float(lit.min()) >= 0
    assert float(lit.max()) <= 1


def test_switched_off_nothing_is_drawn_and_nothing_changes() -> None:
    images, draw = ramp(4), generator("off")
    before = draw.get_state()
    assert jitter(images, Augment(), draw) is images
    assert torch.equal(draw.get_state(), before)


def test_batches_are_augmented_by_their_seeds() -> None:
    split = Split((ramp(40) * 255).byte(), torch.arange(40))

    def first(epoch: int, **settings: Any) -> Tensor:
        data = Data(pad=0, flip=False, augment=Augment(**settings))
        images, labels = next(batches(split, 40, data, 0, epoch))
        return images[labels.argsort()]

    assert torch.equal(first(0, rotate=9, contrast=0.2), first(0, rotate=9, contrast=0.2))
    assert not torch.equal(first(0, rotate=9), first(1, rotate=9))
    assert torch.equal(first(0), (ramp(40) * 255).byte() / 255)


@pytest.mark.parametrize("changes", [{"rotate": 46}, {"scale": -0.1}, {"contrast": 1}])
def test_what_leaves_no_image_is_refused(changes: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"data\.augment\."):
        Augment(**changes)
