"""Image decoding and preprocessing, the same for training, the engine and the service."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from dverge_serve.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP")
APPLE = (".heic", ".heif")  # of files of one's own, with the extra `heif`; the service takes none
MAX_PIXELS = 16_777_216
MAX_FILE_PIXELS = 134_217_728  # of files of one's own: every camera's; about 400 MB decoded
# A progressive JPEG may repeat its scans without end, each a few bytes of file and a pass over all
# pixels. Encoders write about ten; the rest is room for the previews that phones put inside.
START_OF_SCAN, MOST_SCANS = b"\xff\xda", 128
MOST_SCANNED = 2**29  # pixels over all scans: 32 scans of the largest image that the service takes
# Pillow unpacks a PNG's colour profile, up to a thousand times as long, wherever it finds one; the
# standard allows one. The name may turn up in compressed pixels, too, by chance.
PROFILE, MOST_PROFILES = b"iCCP", 8
# Pillow reads each chunk or segment in Python, a few microseconds for as few as 4 bytes of file.
# Encoders need a read for every 2000 bytes or so. A small file is read through in milliseconds.
LEAST_READS, BYTES_PER_READ, UNMETERED = 2000, 256, 16_384
INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
CHANNELS = {"L": 1, "RGB": 3}

ImageLike = str | Path | bytes | Image.Image | npt.NDArray[np.uint8]

# Our own bound is checked before any pixel is decoded; Pillow's would only warn.
Image.MAX_IMAGE_PIXELS = None
# Comments of a PNG, unpacked.
PngImagePlugin.MAX_TEXT_MEMORY = 4 * PngImagePlugin.MAX_TEXT_CHUNK
# Pillow warns about metadata it cannot read. Once, here: changing the filters around each image
# would not be safe with several threads.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


class ImageError(ValueError):
    """An input that is not an accepted image. `code` is stable; the text is for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class _MeteredFile(io.BytesIO):
    """An image file in memory that may be read only so often, in proportion to its length."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._reads = LEAST_READS + len(data) // BYTES_PER_READ

    def read(self, size: int | None = -1, /) -> bytes:
        self._reads -= 1
        if self._reads < 0:
            raise ImageError("broken_image", "the image consists of too many tiny pieces")
        return super().read(size)


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """The preprocessing that turns an image into the model's input.

    The image is converted to `mode`, scaled (aspect ratio kept) until it just covers `resize`,
    then its centre of size `crop` is taken. An image that already has that size is left untouched.
    """

    mode: Literal["L", "RGB"]
    resize: tuple[int, int]  # height, width in pixels
    crop: tuple[int, int]  # height, width in pixels, each at most resize's
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bilinear"

    def __post_init__(self) -> None:
        if self.mode not in CHANNELS:
            raise UserError(f"image mode '{self.mode}'", "L or RGB")
        if self.interpolation not in INTERPOLATIONS:
            raise UserError(f"interpolation '{self.interpolation}'", ", ".join(INTERPOLATIONS))
        for inner, outer in zip(self.crop, self.resize, strict=True):
            if not 1 <= inner <= outer:
                raise UserError(
                    f"crop {list(self.crop)} and resize {list(self.resize)}",
                    "a crop of at least 1 pixel that fits in the resized image",
                )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the result."""
        return (CHANNELS[self.mode], *self.crop)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form kept in a model's metadata."""
        return asdict(self) | {"resize": list(self.resize), "crop": list(self.crop)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Preprocess:
        """Read `to_json`'s form back."""
        return cls(
            mode=value["mode"],
            resize=(int(value["resize"][0]), int(value["resize"][1])),
            crop=(int(value["crop"][0]), int(value["crop"][1])),
            interpolation=value["interpolation"],
        )


def load(
    data: bytes,
    preprocess: Preprocess,
    *,
    max_pixels: int = MAX_PIXELS,
    admit: Callable[[int], None] | None = None,
) -> npt.NDArray[np.uint8]:
    """Decode one image file and preprocess it.

    Content decides the format. EXIF orientation is applied, alpha composited on white, 16-bit
    scaled, CMYK and palette converted. A JPEG of more than `MAX_PIXELS` is decoded at half, a
    quarter or an eighth of its size, which takes that much less memory.

    Args:
        data: the file's content.
        preprocess: the model's.
        max_pixels: largest image, width x height; from an untrusted caller `MAX_PIXELS` at most.
        admit: called with the image's pixels before they are decoded; may raise an `ImageError`.

    Returns:
        uint8 array `[channels, height, width]`.

    Raises:
        ImageError: not a PNG, JPEG or WebP, broken, animated, or larger than `max_pixels`.
    """
    if not data:
        raise ImageError("empty_image", "the image is empty; expected PNG, JPEG or WebP bytes")
    try:
        if data.count(PROFILE) > MOST_PROFILES:
            raise ImageError("broken_image", "the image holds many colour profiles; expected one")
        file = _MeteredFile(data) if len(data) > UNMETERED else io.BytesIO(data)
        with Image.open(file, formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(
                    "image_too_large",
                    f"the image has {width}x{height} pixels; expected at most {max_pixels}",
                )
            # Phones write JPEGs that hold a preview or a depth map behind the photo (MPO).
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                raise ImageError("animated_image", "the image is animated; expected a single frame")
            if image.format in ("JPEG", "MPO"):
                scans = data.count(START_OF_SCAN)
                if scans > MOST_SCANS or (scans > 1 and scans * width * height > MOST_SCANNED):
                    raise ImageError(
                        "broken_image", f"the JPEG has {scans} scans; expected about ten"
                    )
            if admit is not None:
                admit(width * height)
            if image.format == "PNG":
                _scale_transparent_value(image, bits=data[24])
            reduce = 1
            while width * height > MAX_PIXELS * reduce**2:
                reduce *= 2
            if reduce > 1:
                image.draft(None, (width // reduce, height // reduce))  # JPEG alone can
            image.load()
            return _array(_upright(image), preprocess)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(
            "not_an_image", "the bytes are not an image; expected PNG, JPEG or WebP"
        ) from error
    # Broken files surface as almost any exception from inside the codecs.
    except Exception as error:
        raise ImageError(
            "broken_image", "the image is truncated or corrupt; expected a complete file"
        ) from error


def to_pixels(image: ImageLike, preprocess: Preprocess) -> npt.NDArray[np.uint8]:
    """Preprocess one image, whatever form it has.

    Args:
        image: a file's path or bytes, a Pillow image, or uint8 `[height, width]` (grayscale) or
            `[height, width, channels]` with 1, 3 (RGB) or 4 (RGBA) channels.
        preprocess: the model's.

    Returns:
        uint8 array `[channels, height, width]`.

    Raises:
        ImageError: as `load` raises it, or an array of another kind.
        OSError: the file cannot be read.
    """
    if isinstance(image, bytes):
        return load(image, preprocess)
    if isinstance(image, (str, Path)):
        if str(image).lower().endswith(APPLE):
            return _array(_read_heif(Path(image).read_bytes()), preprocess)
        return load(Path(image).read_bytes(), preprocess, max_pixels=MAX_FILE_PIXELS)
    if isinstance(image, np.ndarray):
        channels = image.shape[2:]
        if image.dtype != np.uint8 or not image.size or channels not in ((), (1,), (3,), (4,)):
            raise ImageError(
                "not_an_image",
                f"the array is {image.dtype} {list(image.shape)}; expected uint8 [height, width] "
                "or [height, width, channels] with 1, 3 or 4 channels",
            )
        image = Image.fromarray(image[..., 0] if channels == (1,) else image)
    return _array(_upright(image), preprocess)


def to_float(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Return 8-bit images as the float32 in `[0,1]` that models take; any shape."""
    return images.astype(np.float32) / np.float32(255)


def _read_heif(data: bytes) -> Image.Image:
    try:
        import pillow_heif
    except ImportError as error:
        raise ImageError("not_an_image", "HEIC; install dverge-serve[heif]") from error
    try:
        found = pillow_heif.open_heif(data)  # its first image, upright; 8 bits; not decoded yet
        width, height = found.size
        if width * height <= MAX_FILE_PIXELS:
            image: Image.Image = found.to_pillow()
            return image
    except Exception as error:  # as in `load`
        raise ImageError("broken_image", "the image is truncated or corrupt") from error
    raise ImageError("image_too_large", f"{width}x{height} pixels; at most {MAX_FILE_PIXELS}")


def _array(image: Image.Image, preprocess: Preprocess) -> npt.NDArray[np.uint8]:
    image = _opaque(image)
    if image.mode != preprocess.mode:  # else the whole image would be copied
        image = image.convert(preprocess.mode)
    if image.size != preprocess.crop[::-1]:
        image = _cover(image, preprocess)
    pixels = np.asarray(image, dtype=np.uint8)
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def _scale_transparent_value(image: Image.Image, bits: int) -> None:
    """Bring the one value that a PNG names as transparent to the depth that Pillow decodes to.

    It does so with the pixels alone: it widens 2 and 4 bits to 8, and cuts 16 bits of colour to 8.
    """
    value = image.info.get("transparency")
    if image.mode == "L" and isinstance(value, int) and bits in (2, 4):
        image.info["transparency"] = value * 255 // (2**bits - 1)
    elif image.mode == "RGB" and isinstance(value, tuple) and bits == 16:
        image.info["transparency"] = tuple(part >> 8 for part in value)


def _upright(image: Image.Image) -> Image.Image:
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image
    except Exception:  # damaged EXIF gives no orientation; the pixels are intact
        return image


def _opaque(image: Image.Image) -> Image.Image:
    """Return the image as 8-bit L or RGB (or CMYK), alpha composited on white."""
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit grayscale
        wide = np.asarray(image).clip(0, 65535).astype(np.uint32)
        gray = ((wide + 128) // 257).astype(np.uint8)
        gray[wide == image.info.get("transparency", -1)] = 255
        return Image.fromarray(gray)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image


def _cover(image: Image.Image, preprocess: Preprocess) -> Image.Image:
    height, width = preprocess.resize
    scale = max(height / image.height, width / image.width)
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    crop_h, crop_w = preprocess.crop
    left, top = (size[0] - crop_w) // 2, (size[1] - crop_h) // 2
    # Resample only what the crop keeps: a 1x16000 image must not become a 16000x16000 one.
    box = (
        left * image.width / size[0],
        top * image.height / size[1],
        (left + crop_w) * image.width / size[0],
        (top + crop_h) * image.height / size[1],
    )
    resampling = INTERPOLATIONS[preprocess.interpolation]
    return image.resize((crop_w, crop_h), resampling, box=box)
