from __future__ import annotations

import random
import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import load_image
from PIL import Image

from edgedit.errors import InputError
from edgedit.image import from_image, latent_preview, open_image, to_uint8


def picture(rng: random.Random, mode: str = "RGB") -> Image.Image:
    size = rng.randint(3, 90), rng.randint(3, 90)
    channels = len(Image.new(mode, (1, 1)).getbands())
    return Image.frombytes(mode, size, rng.randbytes(size[0] * size[1] * channels))


def diffusers_pictures(array: npt.NDArray[np.float32]) -> list[Image.Image]:
    pictures: list[Image.Image] = VaeImageProcessor().postprocess(torch.from_numpy(array), output_type="pil")
    return pictures


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pictures_have_the_very_pixels_of_diffusers(channels: int, rng: random.Random) -> None:
    generator = np.random.default_rng(rng.randrange(2**32))
    shape = (rng.randint(1, 3), channels, rng.randint(1, 70), rng.randint(1, 70))
    array = generator.normal(0, 0.8, shape).astype(np.float32)
    for ours, theirs in zip(to_uint8(array), diffusers_pictures(array), strict=True):
        assert ours.mode == theirs.mode
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))


def test_values_halfway_between_two_levels_are_rounded_as_diffusers_rounds_them() -> None:
    halves = ((np.arange(255, dtype=np.float64) + 0.5) / 255 * 2 - 1).astype(np.float32)
    near = np.concatenate([halves, np.nextafter(halves, np.float32(2)), np.nextafter(halves, np.float32(-2)), [-9, 9]])
    array = np.broadcast_to(near.astype(np.float32), (1, 3, 1, near.size)).copy()
    assert np.array_equal(np.asarray(to_uint8(array)[0]), np.asarray(diffusers_pictures(array)[0]))


def test_a_half_precision_picture_is_computed_in_float32() -> None:
    array = np.linspace(-1, 1, 3 * 64, dtype=np.float16).reshape(1, 3, 8, 8)
    assert np.array_equal(np.asarray(to_uint8(array)[0]), np.asarray(diffusers_pictures(array.astype(np.float32))[0]))


@pytest.mark.parametrize("bad", [np.zeros((3, 4, 4)), np.zeros((1, 2, 4, 4)), np.full((1, 3, 2, 2), np.nan)])
def test_what_is_no_picture_is_refused(bad: npt.NDArray[np.float64]) -> None:
    with pytest.raises(InputError) as caught:
        to_uint8(bad)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "CMYK", "P"])
def test_a_picture_is_prepared_as_diffusers_prepares_it(mode: str, rng: random.Random) -> None:
    for _ in range(4):
        image = picture(rng, mode)
        multiple = rng.choice([8, 32])
        width, height = (multiple * rng.randint(1, 5) for _ in range(2))
        theirs = VaeImageProcessor(vae_scale_factor=multiple).preprocess(load_image(image), height, width).numpy()
        ours = from_image(image, width, height)
        assert ours.dtype == np.float32
        assert ours.shape == (1, 3, height, width)
        assert np.array_equal(ours, theirs)


def test_a_picture_is_turned_upright_by_its_orientation(tmp_path: Path, rng: random.Random) -> None:
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}.png"
        picture(rng).save(path, exif=exif)
        theirs = VaeImageProcessor().preprocess(load_image(str(path)), 32, 48).numpy()
        assert np.array_equal(from_image(open_image(path), 48, 32), theirs)
        with Image.open(path) as image:
            assert np.array_equal(from_image(image, 48, 32), theirs)


def test_sixteen_bit_grey_is_scaled_and_not_clipped(tmp_path: Path) -> None:
    levels = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(levels).save(tmp_path / "grey.png")
    image = open_image(tmp_path / "grey.png")
    assert np.abs(np.asarray(image)[..., 0].astype(float) - levels / 257).max() <= 1


def test_a_picture_survives_the_way_there_and_back(rng: random.Random) -> None:
    image = picture(rng)
    (again,) = to_uint8(from_image(image, *image.size))
    assert np.array_equal(np.asarray(again), np.asarray(image))


def test_a_size_below_one_is_refused(rng: random.Random) -> None:
    with pytest.raises(InputError, match="0x8"):
        from_image(picture(rng), 0, 8)


def test_a_file_that_is_no_whole_picture_is_refused_in_one_line(tmp_path: Path, rng: random.Random) -> None:
    for suffix in ("png", "jpg", "webp", "gif", "bmp", "tiff"):
        path = tmp_path / f"picture.{suffix}"
        Image.frombytes("RGB", (80, 80), rng.randbytes(80 * 80 * 3)).save(path)
        open_image(path)
        data = path.read_bytes()
        for cut in (0, 1, 10, len(data) // 2):
            path.write_bytes(data[:cut])
            with pytest.raises(InputError) as caught:
                open_image(path)
            assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="no such picture"):
        open_image(tmp_path / "nothing.png")
    with pytest.raises(InputError, match="cannot be read"):
        open_image(tmp_path)


def test_a_picture_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "bomb.png")
    data = bytearray((tmp_path / "bomb.png").read_bytes())
    data[16:24] = struct.pack(">II", 30_000, 30_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (tmp_path / "bomb.png").write_bytes(data)
    with pytest.raises(InputError, match="too large"):
        open_image(tmp_path / "bomb.png")


def test_a_preview_is_the_linear_map_of_the_manifest(rng: random.Random) -> None:
    generator = np.random.default_rng(rng.randrange(2**32))
    channels, height, width = rng.choice([4, 16, 32]), rng.randint(2, 20), rng.randint(2, 20)
    latents = generator.normal(size=(1, channels, height, width)).astype(np.float32)
    factors, bias = generator.normal(0, 0.2, (channels, 3)), generator.normal(0, 0.1, 3)
    linear = torch.nn.Conv2d(channels, 3, 1)
    linear.weight.data = torch.from_numpy(factors.T[:, :, None, None].astype(np.float32))
    linear.bias = torch.nn.Parameter(torch.from_numpy(bias.astype(np.float32)))
    with torch.no_grad():
        expected = np.asarray(diffusers_pictures(linear(torch.from_numpy(latents)).numpy())[0]).astype(int)
    preview = latent_preview(latents, factors.tolist(), bias.tolist())
    assert preview.size == (width, height)
    assert np.abs(np.asarray(preview).astype(int) - expected).max() <= 1
    assert latent_preview(latents[0], factors, bias).tobytes() == preview.tobytes()
    assert latent_preview(latents, factors, bias, scale=8).size == (8 * width, 8 * height)


def test_preview_factors_of_another_latent_space_are_refused() -> None:
    with pytest.raises(InputError, match="do not fit"):
        latent_preview(np.zeros((1, 4, 8, 8), np.float32), np.zeros((16, 3)), np.zeros(3))
