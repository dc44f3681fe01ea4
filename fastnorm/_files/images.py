"""Images by Pillow: formats from a list, numbers as they are stored or not at all."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, BinaryIO

import numpy as np

from fastnorm._files.parts import BLOCK, MOST, Array, Block, Options, Part, axes_of

# Readers of Pillow's that are let at a file, whatever its name: none that starts another program,
# as that of EPS does, and none that asks for nothing at a file's beginning and so takes any. TIFF
# is not among them (tiff.py).
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "WEBP")
# What --mode takes.
MODES = ("L", "LA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV")
_EIGHT_BITS = ("L", "LA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
GREY = ("L", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")

# Image.open refuses large images by a limit that is the whole process's.
_opening = threading.Lock()


def open_image(file: BinaryIO, formats: tuple[str, ...], max_pixels: int, frame: int = 0) -> Any:
    """Open an image of one of these formats, and of so many pixels at most."""
    from PIL import Image

    with _opening:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(file, formats=formats)
            if frame:
                image.seek(frame)
        except Image.UnidentifiedImageError:
            raise ValueError("this is no image of a kind that is read") from None
        finally:
            Image.MAX_IMAGE_PIXELS = before
    check_pixels(image.height, image.width, max_pixels)
    return image


def check_pixels(height: int, width: int, max_pixels: int) -> None:
    """Refuse an image that is too large."""
    if height * width > max_pixels:
        raise ValueError(
            f"it has {width} x {height} = {width * height:,} pixels, more than {max_pixels:,}; "
            f"write --max-pixels {width * height} if it is to be trusted"
        )


def pillow_blocks(part: Part, file: BinaryIO, options: Options) -> Iterator[Block]:
    """Read the first frame, some rows at a time once it is decoded."""
    image = open_image(file, FORMATS, options.max_pixels)
    _check_depth(image, file)
    tile = image.tile[0] if image.tile else None
    raw = tile[3] if tile else None
    if image.format == "PNG" and isinstance(raw, str) and raw.endswith("16B") and raw != "I;16B":
        array = _deep_png(image, file, raw, options)
        colour = {2: "LA", 3: "RGB", 4: "RGBA"}[array.shape[2]]
        yield from pieces(part.path, array, colour, options)
        return
    with image:
        yield from frame_blocks(part.path, image, options)


def frame_blocks(path: str, image: Any, options: Options) -> Iterator[Block]:
    """Return the numbers of an image of Pillow's."""
    mode = image.mode
    if mode in ("P", "1"):  # numbers of colours, and bits
        mode = "L" if mode == "1" else "RGBA" if image.has_transparency_data else "RGB"
        image = image.convert(mode)
    if options.mode is not None and mode in _EIGHT_BITS:
        image = image if options.mode == mode else image.convert(options.mode)
        mode = image.mode
        options = replace(options, mode=None)
    height = max(1, BLOCK // (4 * image.width))
    if not in_pieces(options):
        height = image.height
    image.load()
    for top in range(0, image.height, height):
        box = (0, top, image.width, min(top + height, image.height))
        rows = np.asarray(image if height >= image.height else image.crop(box))
        yield from pieces(path, rows, name_of(mode), options)


def in_pieces(options: Options) -> bool:
    """Whether rows and columns are both reduced, so that an image need not be there as a whole."""
    return options.axis is None or {0, 1} <= {a % 3 for a in options.axis}


def pieces(path: str, array: Array, colour: str, options: Options, **own: Any) -> Iterator[Block]:
    """Return rows of an image (height, width, channels) as a block, in the mode that is wanted."""
    array = array if array.ndim == 3 else array[..., np.newaxis]
    axes_of(3, (), options, path)
    if options.mode is not None:
        array, colour = _converted(array, colour, options.mode)
    yield Block(array, f"{array.dtype.newbyteorder('=').name} {colour}", **own)


def name_of(mode: str) -> str:
    """What the colours of a mode of Pillow's are called: all grey ones alike."""
    return "grey" if mode in GREY else mode


def _converted(array: Array, colour: str, mode: str) -> tuple[Array, str]:
    """Rows in another mode: 8 bits as Pillow has it, others where that changes no number."""
    own = "L" if colour == "grey" else colour
    if own == mode:
        return array, colour
    if array.dtype == np.uint8 and own in _EIGHT_BITS:
        from PIL import Image

        image = Image.fromarray(array[..., 0] if own == "L" else array, own).convert(mode)
        found = np.asarray(image)
        return (found if found.ndim == 3 else found[..., np.newaxis]), name_of(mode)
    if (own, mode) == ("L", "RGB"):
        return np.repeat(array, 3, axis=2), "RGB"
    if (own, mode) in (("RGBA", "RGB"), ("LA", "L")):
        return array[..., :-1], name_of(mode)
    raise ValueError(
        f"it is {array.dtype} {colour}, and --mode {mode} converts images of 8 bits, and grey ones "
        "to RGB"
    )


def _deep_png(image: Any, file: BinaryIO, raw: str, options: Options) -> Array:
    """16 bits for each of several channels, which Pillow cuts to 8: read twice, half by half.

    Its unpackers of big- and little-endian numbers keep the first byte of each and the second.
    There is none of the second kind for grey with alpha: this is read as four channels of 8 bits.
    """
    if raw == "LA;16B":
        both = _bytes_of(image, "RGBA")
        return np.ascontiguousarray(both).view(">u2")
    both = _bytes_of(image, raw).astype(np.uint16)
    both <<= 8
    file.seek(0)
    both |= _bytes_of(open_image(file, ("PNG",), options.max_pixels), raw.replace("16B", "16L"))
    return both


def _bytes_of(image: Any, raw: str) -> Array:
    tile = image.tile[0]
    image.tile = [tile._replace(args=raw) if hasattr(tile, "_replace") else (*tile[:3], raw)]
    with image:
        return np.asarray(image)


def _check_depth(image: Any, file: BinaryIO) -> None:
    """Refuse what Pillow would bring to 8 or 16 bits."""
    if image.format == "JPEG2000":
        depths = _jpeg2000_depths(file)
        if depths not in ({7}, {15}) or (depths == {15} and image.mode != "I;16"):
            raise ValueError(
                "it is JPEG 2000 of another depth than 8 bits, or 16 of grey, which cannot be read "
                "as it is stored; convert it to TIFF or PNG"
            )
    elif image.format == "PPM" and image.tile and image.tile[0][0] != "raw":
        args = image.tile[0][3]
        most = args[-1] if isinstance(args, tuple) else 255
        if isinstance(most, int) and most != (65535 if image.mode == "I" else 255):
            raise ValueError(
                f"its largest value is {most}, which cannot be read as it is stored; convert it to "
                "PNG or TIFF"
            )


def _jpeg2000_depths(file: BinaryIO) -> set[int]:
    """Return the depths of all components, less 1, and with bit 7 for signed ones."""
    file.seek(0)
    data = file.read(MOST)
    start = data.find(b"\xff\x4f\xff\x51") + 2  # the codestream's first marker, and SIZ
    count = int.from_bytes(data[start + 38 : start + 40], "big")
    return set(data[start + 40 : start + 40 + 3 * count : 3])
