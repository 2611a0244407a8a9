"""Pictures of every odd and broken kind: the right RGB values, or one sentence that names the file."""

from __future__ import annotations

import http.server
import io
import os
import pickle
import stat
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.datasets.folder import default_loader

import pictures

ORIENTATION = 0x0112


def colourful(height: int = 40, width: int = 60, seed: int = 0) -> Image.Image:
    """A smooth picture in which no two corners look alike."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


def refusal(source: object, **options: int) -> str:
    """Return the message of the error that opening `source` raises: one line, a full sentence."""
    with pytest.raises(pictures.PictureError) as caught:
        pictures.open_picture(source, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


# ---------------------------------------------------------------- what is opened


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr"])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".gif", ".bmp", ".webp"])
def test_every_mode_equals_the_loader_of_imagefolder(tmp_path: Path, mode: str, suffix: str) -> None:
    path = tmp_path / f"picture{suffix}"
    picture = colourful()
    if mode in ("RGBA", "LA"):
        picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    try:
        picture.convert(mode).save(path)
        expected = pixels(default_loader(str(path)))
    except (OSError, KeyError, ValueError):
        pytest.skip(f"Pillow cannot write and read {mode} as {suffix}")
    opened = pictures.open_picture(path)
    assert opened.mode == "RGB"
    assert opened.size == (60, 40)
    assert np.array_equal(pixels(opened), expected)


@pytest.mark.parametrize("transparency", [0, bytes([0, 128, 255])])
def test_palette_with_transparency_keeps_the_colours_under_it(tmp_path: Path, transparency: int | bytes) -> None:
    palette = Image.new("P", (4, 2))
    palette.putpalette([10, 20, 30, 200, 100, 50, 1, 2, 3])
    palette.putdata([0, 1, 2, 0, 1, 2, 0, 1])
    palette.save(tmp_path / "palette.png", transparency=transparency)
    opened = pictures.open_picture(tmp_path / "palette.png")
    assert pixels(opened)[0].tolist() == [[10, 20, 30], [200, 100, 50], [1, 2, 3], [10, 20, 30]]


def test_transparent_colours_are_kept(tmp_path: Path) -> None:
    Image.new("RGBA", (3, 3), (90, 120, 150, 0)).save(tmp_path / "clear.png")
    assert pixels(pictures.open_picture(tmp_path / "clear.png")).reshape(-1, 3).tolist() == [[90, 120, 150]] * 9


def test_sixteen_bit_png_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 257, 1000, 32768], [65535, 65278, 128, 129]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "sixteen.png")
    opened = pictures.open_picture(tmp_path / "sixteen.png")
    assert np.array_equal(pixels(opened)[..., 0], np.rint(values / 257))
    assert np.array_equal(pixels(opened)[..., 0], pixels(opened)[..., 2])


def test_a_dark_sixteen_bit_picture_stays_dark(tmp_path: Path) -> None:
    Image.fromarray(np.full((3, 3), 200, dtype=np.uint16)).save(tmp_path / "dark.png")
    assert pixels(pictures.open_picture(tmp_path / "dark.png")).max() == 1


def test_sixteen_bit_colour_keeps_its_high_bytes(tmp_path: Path) -> None:
    """Pillow cannot write 16-bit RGB, so the PNG is put together here."""
    rows = b"".join(b"\0" + struct.pack(">6H", 0x1234, 0x8000, 0xFFFF, 0, 0x4321, 0x00FF) for _ in range(2))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0))
    path = tmp_path / "colour16.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    assert pixels(pictures.open_picture(path))[0].tolist() == [[0x12, 0x80, 0xFF], [0, 0x43, 0]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 65535], [257, 514]], np.int32), [[0, 255], [1, 2]]),  # fits 16 bits
        (np.array([[-5, 95], [55, 0]], np.int32), [[0, 255], [153, 13]]),  # stretched
        (np.array([[0, 2**31 - 1], [0, 0]], np.int32), [[0, 255], [0, 0]]),
        (np.array([[7, 7], [7, 7]], np.int32), [[0, 0], [0, 0]]),
        (np.array([[0.0, 1.0], [0.5, 0.2]], np.float32), [[0, 255], [128, 51]]),
        (np.array([[0.0, 255.0], [100.4, 99.6]], np.float32), [[0, 255], [100, 100]]),
        (np.array([[-1.0, 3.0], [1.0, 0.0]], np.float32), [[0, 255], [128, 64]]),
        (np.array([[np.nan, 1.0], [np.inf, -np.inf]], np.float32), [[0, 255], [0, 0]]),
    ],
)
def test_wide_grey_tiff(tmp_path: Path, values: np.ndarray, expected: list[list[int]]) -> None:
    Image.fromarray(values).save(tmp_path / "wide.tif")
    assert pixels(pictures.open_picture(tmp_path / "wide.tif"))[..., 1].tolist() == expected


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, suffix: str) -> None:
    upright = Image.new("RGB", (64, 32), "white")
    upright.paste((255, 0, 0), (0, 0, 32, 16))  # red in the upper left corner, so every orientation differs
    # Turning an upright picture by the inverse of what a viewer will do gives what the camera stores.
    undo = {2: 0, 3: 1 + 2, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored.save(tmp_path / f"turned{suffix}", exif=exif, quality=95)
    opened = pictures.open_picture(tmp_path / f"turned{suffix}")
    assert opened.size == (64, 32)
    assert np.abs(pixels(opened) - pixels(upright)).mean() < 4


def test_damaged_exif_does_not_matter(tmp_path: Path) -> None:
    colourful().save(tmp_path / "exif.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12garbage")
    assert pictures.open_picture(tmp_path / "exif.jpg").size == (60, 40)


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp", ".tif"])
def test_the_first_frame_of_an_animation(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    frames[0].save(tmp_path / f"moving{suffix}", save_all=True, append_images=frames[1:], lossless=True)
    assert pixels(pictures.open_picture(tmp_path / f"moving{suffix}"))[0, 0].tolist() == [255, 0, 0]


def test_an_open_file_and_a_pipe(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    colourful().save(buffer, "PNG")
    assert np.array_equal(pixels(pictures.open_picture(io.BytesIO(buffer.getvalue()))), pixels(colourful()))
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as end:
        end.write(buffer.getvalue())
    with os.fdopen(reading, "rb") as end:
        assert np.array_equal(pixels(pictures.open_picture(end)), pixels(colourful()))


# ---------------------------------------------------------------- what is refused


def test_missing(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "nothing.jpg")
    assert "nothing.jpg" in refusal(str(tmp_path / "nothing.jpg"))


def test_a_folder_called_like_a_picture(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").mkdir()
    assert "is a folder" in refusal(tmp_path / "x.jpg")


def test_zero_bytes(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    assert "is empty" in refusal(tmp_path / "empty.jpg")
    assert "is empty" in refusal(io.BytesIO())


def test_no_picture_at_all(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("<!doctype html><title>404</title>")
    assert "is not a picture" in refusal(tmp_path / "text.jpg")


def test_postscript_is_not_run(tmp_path: Path) -> None:
    colourful().save(tmp_path / "page.eps")
    assert "is not a picture" in refusal(tmp_path / "page.eps")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".gif", ".tif", ".webp"])
def test_truncated(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"half{suffix}"
    colourful(200, 300).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    message = refusal(path)
    assert f"half{suffix}" in message
    assert "damaged" in message or "not a picture" in message


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".gif", ".tif", ".webp"])
def test_any_flipped_bytes_are_opened_or_refused(tmp_path: Path, suffix: str) -> None:
    """A damaged file gives some picture or a PictureError, never another exception."""
    buffer = io.BytesIO()
    colourful().save(buffer, Image.registered_extensions()[suffix])
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(60):
        data = bytearray(buffer.getvalue())
        for place in rng.integers(0, min(len(data), 400), 4):
            data[place] = int(rng.integers(0, 256))
        try:
            assert pictures.open_picture(io.BytesIO(bytes(data)), max_pixels=10**6).mode == "RGB"
        except pictures.PictureError:
            refused += 1
    assert refused > 0


def test_too_many_pixels(tmp_path: Path) -> None:
    colourful(100, 101).save(tmp_path / "large.png")
    assert pictures.open_picture(tmp_path / "large.png", max_pixels=10100).size == (101, 100)
    assert "101 x 100 pixels" in refusal(tmp_path / "large.png", max_pixels=10099)


@pytest.mark.parametrize(("width", "height"), [(10_000, 10_000), (16_000, 16_000), (65_000, 65_000)])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(width: int, height: int) -> None:
    """A BMP header that promises much, without the pixels: decoding it would say "damaged" instead."""
    header = struct.pack("<2sIHHI", b"BM", 100, 0, 0, 54)
    header += struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    message = refusal(io.BytesIO(header + bytes(46)))
    expected = "damaged" if width * height <= pictures.MAX_PIXELS else "that are accepted"
    assert expected in message


def test_permission_denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read everything, so the refusal is made here."""

    def refuse(path: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(pictures, "open", refuse, raising=False)
    assert "permission denied" in refusal(tmp_path / "secret.jpg").lower()


@pytest.mark.skipif(os.name == "nt" or getattr(os, "geteuid", lambda: 0)() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path: Path) -> None:
    colourful().save(tmp_path / "secret.png")
    (tmp_path / "secret.png").chmod(stat.S_IWUSR)
    assert "permission denied" in refusal(tmp_path / "secret.png").lower()


def test_a_name_that_no_file_can_have() -> None:
    assert "Cannot open" in refusal("a\0b.jpg")
    assert "Cannot open" in refusal("x" * 5000 + ".jpg")


def test_streams_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_BYTES", 1000)
    assert "is larger than" in refusal(io.BytesIO(bytes(1001)))
    if Path("/dev/zero").exists():
        assert refusal("/dev/zero") == "'/dev/zero' is larger than 0 MiB."


# ---------------------------------------------------------------- the web


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A web server on this machine; its pictures have made-up names."""
    buffer = io.BytesIO()
    colourful().save(buffer, "PNG")
    bodies = {
        "/cat.png": buffer.getvalue(),
        "/my%20cat%C3%A9.png": buffer.getvalue(),
        "/page": b"<html>",
        "/large": bytes(5000),
    }

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = bodies.get(self.path)
            self.send_response(200 if body is not None else 404)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *arguments: object) -> None:
            pass

    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


def test_download(server: str) -> None:
    assert np.array_equal(pixels(pictures.open_picture(f"{server}/cat.png")), pixels(colourful()))
    assert pictures.open_picture(f"{server}/my caté.png").size == (60, 40)


def test_failing_downloads(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "404" in refusal(f"{server}/dog.png")
    assert "is not a picture" in refusal(f"{server}/page")
    assert "Cannot download" in refusal("http://127.0.0.1:1/cat.png")
    assert "Cannot download" in refusal("http://[broken/cat.png")
    assert "Cannot download" in refusal("http://")
    monkeypatch.setattr(pictures, "MAX_BYTES", 4999)
    assert "is larger than" in refusal(f"{server}/large")


# ---------------------------------------------------------------- finding pictures


def test_find_pictures(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.png", "notes.txt", ".hidden.png", "sub/c.png", "odd[1].png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    here = str(tmp_path)
    in_folder = [os.path.join(here, name) for name in ("a.png", "b.JPG", "odd[1].png")]
    assert pictures.find_pictures([here]) == in_folder
    assert pictures.find_pictures([os.path.join(here, "*.png")]) == [in_folder[0], in_folder[2]]
    assert pictures.find_pictures([in_folder[2]]) == [in_folder[2]]
    assert pictures.find_pictures([in_folder[0], here, "-", "HTTPS://x/y?*"]) == [
        *in_folder,
        "-",
        "HTTPS://x/y?*",
    ]
    assert pictures.find_pictures(["gone.png"]) == ["gone.png"]
    (tmp_path / "void").mkdir()
    nothing = [os.path.join(here, "*.webp"), os.path.join(here, "void")]
    assert pictures.find_pictures(nothing) == nothing
    assert "No such file" in refusal(nothing[0])
    assert "there is none in it" in refusal(nothing[1])


# ---------------------------------------------------------------- the transform


def torchvision_transform(size: int, crop_ratio: float) -> transforms.Compose:
    """The transform of the specification, from torchvision's parts."""
    return transforms.Compose(
        [
            transforms.Resize(int(size / crop_ratio), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )


@pytest.mark.parametrize("shape", [(300, 400), (401, 299), (64, 64), (37, 211), (1, 1), (3, 2), (256, 256)])
@pytest.mark.parametrize(("size", "crop_ratio"), [(224, 0.875), (64, 0.9), (48, 1.0), (40, 1.25), (41, 1.25)])
def test_square_transform_equals_torchvision(shape: tuple[int, int], size: int, crop_ratio: float) -> None:
    picture = colourful(*shape)
    ours = pictures.eval_transform(size, crop_ratio)(picture)
    assert ours.shape == (3, size, size)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, torchvision_transform(size, crop_ratio)(picture))
    without_torch = pictures.eval_transform(size, crop_ratio).array(picture)
    assert without_torch.dtype == np.float32
    assert np.array_equal(without_torch, ours.numpy())


def test_small_models_see_the_whole_picture() -> None:
    plain = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    )
    same = colourful(32, 32)
    assert torch.equal(pictures.eval_transform(32)(same), plain(same))
    assert torch.equal(pictures.eval_transform(32)(colourful(64, 64)), plain(colourful(64, 64).resize((32, 32), 3)))


def test_rectangles_are_covered_without_distortion() -> None:
    crop = pictures.eval_transform((48, 96), 1.0).crop
    assert np.array_equal(pixels(crop(colourful(48, 96))), pixels(colourful(48, 96)))
    # Half as high and half as wide again: only the middle is kept.
    tall = colourful(96, 96)
    assert np.array_equal(pixels(crop(tall)), pixels(tall)[24:72])
    wide = colourful(96, 384)
    assert np.array_equal(pixels(crop(wide)), pixels(wide.resize((192, 48), Image.Resampling.BICUBIC))[:, 48:144])


@pytest.mark.parametrize("shape", [(1, 30_000), (30_000, 1), (2, 4_000), (16, 5_000), (700, 3)])
def test_extreme_aspect_ratios(shape: tuple[int, int]) -> None:
    assert pictures.eval_transform(224)(Image.new("RGB", shape[::-1], "red")).shape == (3, 224, 224)


def test_extreme_aspect_ratio_keeps_the_middle_like_torchvision() -> None:
    picture = colourful(30, 900)
    ours, theirs = pictures.eval_transform(64)(picture), torchvision_transform(64, 0.875)(picture)
    assert (ours - theirs).abs().max() <= 0.02  # one step of 1/255, divided by the deviation


def test_transform_can_be_pickled_and_refuses_nonsense() -> None:
    transform = pickle.loads(pickle.dumps(pictures.eval_transform((64, 32))))
    assert transform(colourful()).shape == (3, 64, 32)
    with pytest.raises(ValueError, match="at least 1 pixel"):
        pictures.eval_transform(0)
    for ratio in (0.0, 1e-9, -1.0, float("nan")):
        with pytest.raises(ValueError, match="crop_ratio"):
            pictures.eval_transform(224, ratio)


def test_a_small_crop_ratio_costs_no_memory() -> None:
    """At 0.01 the whole picture would become 22,400 pixels high; what is kept is its middle hundredth."""
    picture = Image.new("RGB", (300, 200), "red")
    picture.paste((0, 0, 255), (140, 90, 160, 110))
    middle = pictures.eval_transform(224, 0.01).crop(picture)
    assert middle.size == (224, 224)
    assert (pixels(middle) == (0, 0, 255)).all()
