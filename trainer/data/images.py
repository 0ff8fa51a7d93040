"""The image member of a sample: how its bytes are made and read. Nothing is ever unpickled."""

from __future__ import annotations

import io
import struct
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trainer.errors import UserError

RAW_EXTENSION = "npy"
PIL_FORMATS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}
IMAGE_EXTENSIONS = (RAW_EXTENSION, *PIL_FORMATS)
PIL_MODES = {1: "L", 3: "RGB"}
# What Pillow raises for bytes that are no image: header parsers leak struct and index errors.
PIL_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, Image.DecompressionBombError)


def image_extension(spans: dict[str, list[int]]) -> str | None:
    """The member that holds a sample's image; None where there is not exactly one."""
    found = [extension for extension in spans if extension in IMAGE_EXTENSIONS]
    return found[0] if len(found) == 1 else None


def encode_image(image_HWC: NDArray[np.uint8], format: str) -> tuple[str, bytes]:
    """Extension and bytes of an image's member; `format` is `png` or `raw`."""
    buffer = io.BytesIO()
    if format == "raw":
        np.save(buffer, np.ascontiguousarray(image_HWC.transpose(2, 0, 1)), allow_pickle=False)
        return RAW_EXTENSION, buffer.getvalue()
    assert format == "png", format
    Image.fromarray(image_HWC[:, :, 0] if image_HWC.shape[2] == 1 else image_HWC).save(buffer, "PNG")
    return "png", buffer.getvalue()


def decode_image(data: bytes, extension: str, image_size: int, channels: int) -> NDArray[np.uint8]:
    """The image of a member, uint8 (C,H,W), a view where it can be.

    Raises:
        UserError: not such an image, or of another size or channel count (found before its pixels are decoded, so
            that a decompression bomb is not unpacked). The message names no file: the caller knows it.
    """
    if extension == RAW_EXTENSION:
        return _decode_raw(data, (channels, image_size, image_size))
    try:
        with Image.open(io.BytesIO(data), formats=(PIL_FORMATS[extension],)) as image:
            if image.size != (image_size, image_size) or image.mode != PIL_MODES.get(channels):
                found, wanted = f"{image.size[0]}x{image.size[1]} {image.mode}", PIL_MODES.get(channels)
                raise UserError(f"image is {found}, {image_size}x{image_size} {wanted} expected")
            pixels = np.asarray(image)
    except UserError:
        raise
    except PIL_ERRORS as error:
        raise UserError(f"not a readable {extension} image ({error})") from None
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def _decode_raw(data: bytes, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    start = len(raw_header(shape))
    if data[:start] != raw_header(shape):
        raise UserError(f"not a .npy file of uint8 {shape}")
    if len(data) != start + shape[0] * shape[1] * shape[2]:
        raise UserError(f"a .npy file of {len(data)} bytes, too few or too many for uint8 {shape}")
    return np.frombuffer(data, dtype=np.uint8, offset=start).reshape(shape)


@lru_cache(maxsize=16)
def raw_header(shape: tuple[int, int, int]) -> bytes:
    """The only header of a raw image (C,H,W) that is accepted, in front of its pixels: comparing bytes needs no parser
    (numpy's evaluates the header as a literal)."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return buffer.getvalue()
