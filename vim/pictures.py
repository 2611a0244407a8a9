"""Pictures from disk, standard input or the web, as RGB; and the evaluation transform of the model.

Evaluation and inference, in PyTorch and in ONNX Runtime, open and transform pictures here, so that the same picture
gives the same result in all of them. Needs Pillow and numpy; torch only where a tensor is asked for.
"""

from __future__ import annotations

import glob
import io
import os
import stat
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from PIL import Image

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

PICTURE_SUFFIXES = frozenset(
    (
        ".jpg",
        ".jpeg",
        ".jpe",
        ".png",
        ".bmp",
        ".gif",
        ".webp",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
    )
)
# The formats that are opened. Not every one that Pillow knows: its EPS reader, for one, runs a program.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "DIB", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "TGA", "PCX")
MAX_PIXELS = 178_956_970  # where Pillow itself, and so torchvision's loader, refuses a picture
MAX_BYTES = 256 * 2**20  # of a download or of standard input
WAIT_SECONDS = 20.0  # for a web server to answer, and between two pieces of its answer
DOWNLOAD_SECONDS = 120.0  # for a whole download

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LONGEST_SIDES = 8  # a picture that would become longer than this many crops is resized only where the crop looks
LEAST_CROP_RATIO = 0.01

_SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {  # EXIF orientation -> what turns the picture upright (Exif 2.32, tag 0x0112)
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class PictureError(ValueError):
    """A picture cannot be had; the message is one sentence that names it and says why."""


def is_url(source: str) -> bool:
    """Tell whether `source` is an http or https address."""
    return source.lower().startswith(("http://", "https://"))


def find_pictures(sources: Sequence[str]) -> list[str]:
    """Expand folders (their pictures, sorted, not those of sub-folders) and glob patterns.

    Files, addresses and "-" (standard input) stand for themselves, and so does what holds or matches nothing:
    opening it says why. What is named twice is kept once.
    """
    found: list[str] = []
    for source in sources:
        if source == "-" or is_url(source):
            found.append(source)
        elif os.path.isdir(source):
            found += _pictures_in(source) or [source]
        elif not os.path.lexists(source) and glob.has_magic(source):
            matches = sorted(path for path in glob.glob(source, recursive=True) if not os.path.isdir(path))
            found += matches or [source]
        else:
            found.append(source)
    return list(dict.fromkeys(found))


def _pictures_in(folder: str) -> list[str]:
    """Return the paths of what ends like a picture in `folder`; nothing if it cannot be read."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    shown = (name for name in names if not name.startswith("."))
    return [os.path.join(folder, name) for name in shown if Path(name).suffix.lower() in PICTURE_SUFFIXES]


def open_picture(source: str | Path | BinaryIO, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open a picture as 8-bit RGB, upright.

    The first frame of an animation; EXIF orientation applied; transparency dropped as torchvision's
    ImageFolder drops it (the colours under it are kept); CMYK and palettes converted; 16-bit grey scaled by
    1/257, 32-bit and floating-point grey by its range (see `_grey_from_wide`).

    Args:
        source: path, http or https address, or an open binary file.
        max_pixels: refuse a picture of more pixels than this before decoding it; Pillow's own limit, which
            is the default, stays in force.
    Raises:
        PictureError: it is missing, unreadable, no picture, damaged or too large; names it and says which.
    """
    if isinstance(source, (str, Path)):
        name = repr(str(source))
        file = _download(str(source)) if is_url(str(source)) else _open_file(Path(source))
    else:
        name = repr(str(getattr(source, "name", "the given file")))
        file = _into_memory(source, name)
    with file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of things that are handled here: size, transparency, EXIF
        return _decode(file, name, max_pixels)


def _open_file(path: Path) -> BinaryIO:
    name = repr(str(path))
    try:
        file = open(path, "rb")  # noqa: SIM115 - the caller closes it
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return file
        with file:  # a pipe, such as the shell's <(command)
            return _into_memory(file, name)
    except PictureError:
        raise
    except FileNotFoundError as error:
        raise PictureError(f"No such file: {name}.") from error
    except (IsADirectoryError, PermissionError) as error:  # Windows says the second of a folder
        if not path.is_dir():
            raise PictureError(f"{name} may not be read: permission denied.") from error
        also = "" if _pictures_in(str(path)) else ", and there is none in it that can be read"
        raise PictureError(f"{name} is a folder, not a picture{also}.") from error
    except OSError as error:
        raise PictureError(f"Cannot open {name}: {error.strerror or error}.") from error
    except ValueError as error:  # a zero byte in the name
        raise PictureError(f"Cannot open {name}: {error}.") from error


def _into_memory(file: BinaryIO, name: str) -> BinaryIO:
    """Read a stream that may not be seekable."""
    try:
        data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise PictureError(f"Cannot read {name}: {error.strerror or error}.") from error
    if len(data) > MAX_BYTES:
        raise PictureError(f"{name} is larger than {MAX_BYTES // 2**20} MiB.")
    return io.BytesIO(data)


def _download(url: str) -> BinaryIO:
    """Fetch `url` within `DOWNLOAD_SECONDS` seconds and `MAX_BYTES` bytes."""
    import http.client
    import urllib.error
    import urllib.parse
    import urllib.request

    address = urllib.parse.quote(url, safe="%/:?#[]@!$&'()*+,;=~")
    end = time.monotonic() + DOWNLOAD_SECONDS
    data = io.BytesIO()
    try:
        # Some picture hosts refuse Python's own name.
        request = urllib.request.Request(address, headers={"User-Agent": "vim-cpu/1 (picture classification)"})
        with urllib.request.urlopen(request, timeout=WAIT_SECONDS) as answer:
            while piece := answer.read(2**16):
                data.write(piece)
                if data.tell() > MAX_BYTES:
                    raise PictureError(f"{url!r} is larger than {MAX_BYTES // 2**20} MiB.")
                if time.monotonic() > end:
                    raise PictureError(f"{url!r} took longer than {DOWNLOAD_SECONDS:.0f} seconds to download.")
    except PictureError:
        raise
    except urllib.error.HTTPError as error:
        error.close()
        raise PictureError(f"Cannot download {url!r}: the server answered {error.code} {error.reason}.") from error
    except urllib.error.URLError as error:
        raise PictureError(f"Cannot download {url!r}: {error.reason}.") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise PictureError(f"Cannot download {url!r}: {error or type(error).__name__}.") from error
    data.seek(0)
    return data


def _decode(file: BinaryIO, name: str, max_pixels: int) -> Image.Image:
    try:
        file.seek(0)
        if not file.read(1):
            raise PictureError(f"{name} is empty (0 bytes).")
        file.seek(0)
        Image.init()  # registers the formats of this Pillow; old ones have no AVIF
        with Image.open(file, formats=[known for known in FORMATS if known in Image.OPEN]) as picture:
            width, height = picture.size
            if width * height > max_pixels:
                raise PictureError(
                    f"{name} has {width} x {height} pixels, more than the {max_pixels:,} that are accepted; "
                    "make it smaller first."
                )
            picture.load()
            return _upright_rgb(picture)
    except PictureError:
        raise
    except Image.UnidentifiedImageError as error:
        raise PictureError(
            f"{name} is not a picture, or not in a format that is read here ({', '.join(FORMATS)})."
        ) from error
    except Image.DecompressionBombError as error:
        raise PictureError(f"{name} has more than the {MAX_PIXELS:,} pixels that are accepted.") from error
    except MemoryError as error:
        raise PictureError(f"There is not enough memory to open {name}; make it smaller first.") from error
    except Exception as error:  # a decoder that meets a damaged file raises anything, from KeyError to SyntaxError
        raise PictureError(f"{name} is a damaged picture: {_one_line(error)}.") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _upright_rgb(picture: Image.Image) -> Image.Image:
    orientation = _orientation(picture)
    if picture.mode in _SIXTEEN_BIT_MODES or picture.mode in ("I", "F"):
        picture = _grey_from_wide(picture)
    picture.info.pop("transparency", None)  # else converting a palette would look at it
    rgb = picture.convert("RGB")
    return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb


def _orientation(picture: Image.Image) -> int:
    """Return the EXIF orientation, 1 (upright) if there is none that can be read."""
    try:
        return int(picture.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # damaged EXIF data is no reason to refuse a whole picture, whatever its reader raises
        return 1


def _grey_from_wide(picture: Image.Image) -> Image.Image:
    """Scale grey of 16 bits, 32 bits or floating point to 8 bits; Pillow itself would clip it at 255.

    16 bits: 0..65535 becomes 0..255. 32-bit integers: likewise if they fit 16 bits (PNG and PGM arrive so).
    Floating point within 0..1 is multiplied by 255, within 0..255 kept. Anything wider is stretched from its
    least to its greatest value; what is not finite counts as 0.
    """
    import numpy as np

    values = np.nan_to_num(np.asarray(picture, dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if picture.mode != "F" and low >= 0 and high <= 65535:
        low, high = 0.0, 65535.0
    elif picture.mode == "F" and low >= 0 and high <= 255:
        low, high = 0.0, (1.0 if high <= 1 else 255.0)
    scale = 255.0 / (high - low) if high > low else 0.0
    return Image.fromarray(np.rint((values - low) * scale).astype(np.uint8))


def _middle(side: int, kept: int) -> int:
    """Return where the middle `kept` of `side` pixels begin, rounded as torchvision does; below 0 if kept > side."""
    return round((side - kept) / 2) if kept <= side else -((kept - side) // 2)


class EvalTransform:
    """What a picture goes through before the model sees it: resize, centre crop, tensor, normalise.

    The shorter side is resized to int(size / crop_ratio) pixels with bicubic interpolation, the middle `size`
    is cut out and normalised with ImageNet's mean and standard deviation. A rectangle (h, w) is covered the
    same way without distortion. Models of at most 32 pixels (CIFAR) see the whole shorter side: it is resized
    to the model's size, and left alone if it has that already. Data loaders may pickle instances.
    """

    def __init__(self, size: int | tuple[int, int], crop_ratio: float = 0.875) -> None:
        self.size = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        if min(self.size) < 1:
            raise ValueError(f"`size` must be at least 1 pixel on each side, got {size}")
        if not crop_ratio >= LEAST_CROP_RATIO:
            raise ValueError(f"`crop_ratio` must be {LEAST_CROP_RATIO} or more (0.875 is usual), got {crop_ratio}")
        self.crop_ratio = crop_ratio if max(self.size) > 32 else 1.0

    def __call__(self, picture: Image.Image) -> Tensor:
        """Return the RGB picture as a normalised fp32 tensor of shape (3, height, width)."""
        import torch

        return torch.from_numpy(self.array(picture))

    def array(self, picture: Image.Image) -> NDArray[np.float32]:
        """Return the RGB picture as a normalised fp32 array of shape (3, height, width)."""
        import numpy as np

        values = np.asarray(self.crop(picture)).transpose(2, 0, 1).astype(np.float32, order="C")
        values /= 255
        values -= np.array(IMAGENET_MEAN, np.float32)[:, None, None]
        values /= np.array(IMAGENET_STD, np.float32)[:, None, None]
        return values

    def crop(self, picture: Image.Image) -> Image.Image:
        """Resize the picture and cut out its middle; what the model looks at, before normalisation.

        Where the picture is smaller than the crop, for a crop_ratio above 1, the rest is black.
        """
        height, width = self._covering_size(picture.height, picture.width)
        if max(height, width) > LONGEST_SIDES * max(self.size):
            picture = self._resize_middle(picture, height, width)
        elif (picture.height, picture.width) != (height, width):
            picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        top, left = _middle(picture.height, self.size[0]), _middle(picture.width, self.size[1])
        return picture.crop((left, top, left + self.size[1], top + self.size[0]))

    def _covering_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) of the whole picture after resizing, rounded down as in torchvision."""
        least_height, least_width = (int(side / self.crop_ratio) for side in self.size)
        least_height, least_width = max(1, least_height), max(1, least_width)
        if least_height * width <= least_width * height:  # the width decides
            return max(least_height, least_width * height // width), least_width
        return least_height, max(least_width, least_height * width // height)

    def _resize_middle(self, picture: Image.Image, height: int, width: int) -> Image.Image:
        """Resize only the part that the crop keeps: a 1 x 30,000 picture would become gigabytes."""
        kept_height, kept_width = min(self.size[0], height), min(self.size[1], width)
        top, left = _middle(height, kept_height), _middle(width, kept_width)
        tall, wide = picture.height / height, picture.width / width
        box = (left * wide, top * tall, (left + kept_width) * wide, (top + kept_height) * tall)
        box = (*box[:2], min(box[2], picture.width), min(box[3], picture.height))
        return picture.resize((kept_width, kept_height), Image.Resampling.BICUBIC, box=box)

    def __repr__(self) -> str:
        return f"EvalTransform(size={self.size}, crop_ratio={self.crop_ratio})"


def eval_transform(size: int | tuple[int, int], crop_ratio: float = 0.875) -> EvalTransform:
    """Return the evaluation transform for `size` pixels or (height, width) pixels; see `EvalTransform`."""
    return EvalTransform(size, crop_ratio)
