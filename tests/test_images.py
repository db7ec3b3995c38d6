"""Pictures of every kind become the right RGB pixels, or an error that says why."""

import pickle
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vt_trl.errors import DataError
from vt_trl.images import load_image, local_path

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def halves(left, right, mode: str = "RGB", size=(8, 4)) -> Image.Image:
    image = Image.new(mode, size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image


def corners(image: Image.Image) -> list[tuple]:
    right, bottom = image.width - 1, image.height - 1
    return [image.getpixel(place) for place in ((0, 0), (right, 0), (0, bottom), (right, bottom))]


def declared_png(width: int, height: int) -> bytes:
    """A PNG of under 100 bytes that says it has ``width`` x ``height`` pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def palette_with_hole() -> bytes:
    image = Image.new("P", (8, 4), 0)
    image.putpalette([*RED, *BLUE])
    image.paste(1, (4, 0, 8, 4))
    return encoded(image, transparency=0)


def sixteen_bit(kind: str) -> bytes:
    return encoded(Image.fromarray(np.array([[0, 257 * 100, 65535, 200]], dtype=np.uint16)), kind)


@pytest.mark.parametrize(
    ("data", "left", "right"),
    [
        (encoded(halves(RED, BLUE)), RED, BLUE),
        (encoded(halves(RED, BLUE), "BMP"), RED, BLUE),
        (encoded(halves(40, 200, "L")), (40,) * 3, (200,) * 3),
        (encoded(halves(0, 1, "1")), (0,) * 3, WHITE),
        (encoded(halves((10, 0), (10, 255), "LA")), WHITE, (10,) * 3),
        (encoded(halves((*RED, 0), (*BLUE, 255), "RGBA")), WHITE, BLUE),
        (encoded(halves((0, 0, 0, 51), (*BLUE, 255), "RGBA")), (204,) * 3, BLUE),  # a fifth of black on white
        (encoded(halves(RED, BLUE), transparency=RED), WHITE, BLUE),
        (encoded(halves(40, 200, "L"), transparency=40), WHITE, (200,) * 3),
        (encoded(halves(RED, BLUE).quantize(2)), RED, BLUE),
        (palette_with_hole(), WHITE, BLUE),
        (encoded(halves((0, 255, 255, 0), (255, 255, 0, 0), "CMYK"), "TIFF"), RED, BLUE),
        (encoded(halves((0, 0, 0, 255), (0, 0, 0, 0), "CMYK", (32, 16)), "JPEG"), (0,) * 3, WHITE),
        (encoded(halves(RED, BLUE), "GIF"), RED, BLUE),
        (encoded(halves(RED, BLUE), "WEBP", lossless=True), RED, BLUE),
    ],
)
def test_every_mode_becomes_the_right_rgb(data, left, right):
    image = load_image(data)
    assert image.mode == "RGB" and type(image) is Image.Image
    assert image.getpixel((0, 0)) == left
    assert image.getpixel((image.width - 1, image.height - 1)) == right


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_and_not_clipped_to_white(kind):
    assert [pixel[0] for pixel in np.asarray(load_image(sixteen_bit(kind)))[0]] == [0, 100, 255, 1]


def test_wide_integers_are_sixteen_bit_or_refused():
    assert load_image(Image.fromarray(np.array([[65535, 0]], dtype=np.int32))).getpixel((0, 0)) == WHITE
    for values in (np.array([[70000, 0]], dtype=np.int32), np.array([[0.5]], dtype=np.float32)):
        with pytest.raises(DataError, match="no agreed white"):
            load_image(Image.fromarray(values))


# Where the stored picture's corners (top left, top right, bottom left, bottom right) end up; from the EXIF standard.
TURNED = {1: "ABCD", 2: "BADC", 3: "DCBA", 4: "CDAB", 5: "ACBD", 6: "CADB", 7: "DBCA", 8: "BDAC"}


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_exif_orientation_is_applied_once(orientation, kind):
    colours = dict(zip("ABCD", [(250, 0, 0), (0, 250, 0), (0, 0, 250), (9, 9, 9)], strict=True))
    stored = Image.new("RGB", (6, 4))
    for name, place in zip("ABCD", ((0, 0), (5, 0), (0, 3), (5, 3)), strict=True):
        stored.putpixel(place, colours[name])
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = load_image(encoded(stored, kind, exif=exif))
    assert corners(image) == [colours[name] for name in TURNED[orientation]]
    assert image.size == ((4, 6) if orientation >= 5 else (6, 4))
    assert load_image(image) is image  # not turned again


def test_broken_exif_is_no_broken_picture():
    assert load_image(encoded(halves(RED, BLUE), exif=b"Exif\0\0nonsense")).getpixel((0, 0)) == RED


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    for kind in ("GIF", "WEBP"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        assert load_image(data).getpixel((0, 0)) == RED


def test_sources(tmp_path):
    picture = halves(RED, BLUE)
    (tmp_path / "sub").mkdir()
    path = tmp_path / "sub" / "a.png"
    path.write_bytes(encoded(picture))
    by_name = [load_image("sub/a.png", base_dir=tmp_path), load_image(Path("sub/../sub/a.png"), base_dir=tmp_path)]
    by_dict = [
        load_image({"bytes": encoded(picture), "path": "gone.png"}),
        load_image({"bytes": None, "path": str(path)}),
    ]
    for image in (
        *by_name,
        *by_dict,
        load_image(path),
        load_image(str(path)),
        load_image(bytearray(encoded(picture))),
    ):
        assert np.array_equal(np.asarray(image), np.asarray(picture))
    assert load_image(picture) is picture


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (None, "missing"),
        (b"", "no bytes"),
        ("", "empty"),
        ("a\0b.png", "NUL"),
        ({"bytes": None, "path": None}, "missing"),
        ({"bytes": b"", "path": "x.png"}, "no bytes"),
        (17, "it is a int"),
        (b"this is text", "none of the formats"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "none of the formats"),
        ("nowhere.png", "No such file"),
        (".", "not a file"),
        ("../outside.png", "leaves the data set's folder"),
        ("sub/../../outside.png", "leaves the data set's folder"),
        ("/etc/hostname", "leaves the data set's folder"),
        ("https://example.org/a.png", "no local path"),
        (Path("https://example.org/a.png"), "no local path"),
        ("FILE:///etc/hostname", "no local path"),
        ("s3://bucket/a.png", "no local path"),
        ("data:image/png;base64,AAAA", "no local path"),
    ],
)
def test_what_is_no_picture_is_refused_with_the_reason(tmp_path, source, reason):
    (tmp_path.parent / "outside.png").write_bytes(encoded(halves(RED, BLUE)))
    with pytest.raises(DataError, match=reason):
        load_image(source, base_dir=tmp_path)


def test_a_sibling_folder_with_the_same_beginning_is_outside(tmp_path):
    with pytest.raises(DataError, match="leaves"):
        local_path(f"../{tmp_path.name}-private/a.png", tmp_path)


def test_damaged_files_are_refused():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for kind in ("JPEG", "PNG", "WEBP"):
        data = encoded(noise, kind)
        assert load_image(data).size == (64, 64)
        with pytest.raises(DataError, match="cannot read the image"):
            load_image(data[: len(data) // 2])
    with pytest.raises(DataError, match="cannot read the image"):
        load_image(Image.open(BytesIO(encoded(noise, "JPEG")[:2000])))  # opened, not yet decoded


@pytest.mark.parametrize("side", [9_500, 12_000, 60_000])  # below Pillow's warning's double, and above its error
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_are_refused_before_decoding(side, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(DataError, match="declares|bomb"):
        load_image(declared_png(side, side))
    assert before == Image.MAX_IMAGE_PIXELS


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_pillows_warning_as_error_is_a_data_error():
    with pytest.raises(DataError, match="bomb"):
        load_image(declared_png(12_000, 12_000))


def test_the_limit_on_decoded_pixels_is_exact():
    data = encoded(Image.new("RGB", (10, 10)))
    assert load_image(data, max_decoded_pixels=100).size == (10, 10)
    with pytest.raises(DataError, match="10 x 10 pixels"):
        load_image(data, max_decoded_pixels=99)


def test_data_error_names_the_row_and_survives_pickling():
    error = DataError("too dark").at(row=17, id="x")
    assert str(error) == "row 17 (id 'x'): too dark"
    assert str(error.at(row=3)) == str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
