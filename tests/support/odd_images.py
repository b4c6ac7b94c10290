"""31 unusual image files with what reading each must give: the expected pixels, or the error."""

import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


HEIGHT, WIDTH = 24, 40
RAMP = np.linspace(0, 255, HEIGHT * WIDTH).round().astype(np.uint8).reshape(HEIGHT, WIDTH)
SCENE = np.stack((RAMP, RAMP[::-1], np.broadcast_to(np.linspace(0, 255, WIDTH).astype(np.uint8), RAMP.shape)), axis=-1)
GRAY = np.repeat(RAMP[..., None], 3, axis=-1)
LEFT_HALF = np.arange(WIDTH) < WIDTH // 2
JPEG_LOSS = 12  # of 255, at quality 95 on smooth ramps


def saved(image, path, **options):
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def on_white(colors, alpha):
    return (colors * (alpha / 255) + 255 * (1 - alpha / 255)).round().astype(np.uint8)


def half_clear(bands):
    alpha = np.where(LEFT_HALF, 0, 255)[None, :, None] * np.ones((HEIGHT, 1, 1))
    return np.concatenate((bands, alpha.astype(np.uint8)), axis=-1), alpha


def save_palette(path, **options):
    Image.fromarray(GRAY).quantize(256, kmeans=3).save(path, **options)


def save_animation(path):
    frames = [Image.fromarray(GRAY).quantize(256, kmeans=3), Image.new("P", (WIDTH, HEIGHT), 3)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def read_right():
    """Return {file name: (writer, expected RGB, tolerance)} for the odd files that are images."""
    rgba, alpha = half_clear(SCENE)
    la, _ = half_clear(RAMP[..., None])
    unit = (RAMP / 255).astype(np.float32)
    flipped = {
        "upside_down.jpg": (SCENE[::-1, ::-1], 3),
        "on_its_side.png": (np.rot90(SCENE, 1), 6),
        "on_its_side.tif": (np.rot90(SCENE, 3), 8),
        "mirrored.webp": (SCENE[:, ::-1], 2),
    }
    files = {
        "color.jpg": (lambda p: saved(SCENE, p, quality=95), SCENE, JPEG_LOSS),
        "progressive.jpg": (lambda p: saved(SCENE, p, quality=95, progressive=True), SCENE, JPEG_LOSS),
        "gray.jpg": (lambda p: saved(RAMP, p, quality=95), GRAY, JPEG_LOSS),
        "cmyk.jpg": (lambda p: saved(Image.fromarray(SCENE).convert("CMYK"), p, quality=95), SCENE, 2 * JPEG_LOSS),
        "gray.png": (lambda p: saved(RAMP, p), GRAY, 0),
        "palette.png": (save_palette, GRAY, 1),
        "palette_with_clear_color.png": (lambda p: save_palette(p, transparency=bytes([255] * 256)), GRAY, 1),
        "color_with_alpha.png": (lambda p: saved(rgba, p), on_white(SCENE, alpha), 0),
        "gray_with_alpha.png": (lambda p: saved(la, p), on_white(GRAY, alpha), 0),
        "one_bit.png": (lambda p: saved(RAMP > 127, p), np.where(GRAY > 127, 255, 0), 0),
        "deep.png": (lambda p: saved(RAMP.astype(np.uint16) * 257, p), GRAY, 0),
        "deep.pgm": (lambda p: p.write_bytes(b"P5 40 24 65535\n" + (RAMP.astype(">u2") * 257).tobytes()), GRAY, 0),
        "float.tif": (lambda p: saved(unit, p), GRAY, 0),
        "animation.gif": (save_animation, GRAY, 1),
        "bitmap.bmp": (lambda p: saved(SCENE, p), SCENE, 0),
        "png_named.jpg": (lambda p: saved(SCENE, p, format="PNG"), SCENE, 0),
        "one_pixel.png": (lambda p: saved(SCENE[:1, :1], p), SCENE[:1, :1], 0),
    }
    for name, (stored, orientation) in flipped.items():
        options = {"lossless": True} if name.endswith("webp") else {"quality": 95} if name.endswith("jpg") else {}
        exif = turned(orientation)
        image = Image.fromarray(np.ascontiguousarray(stored))
        writer = lambda p, image=image, exif=exif, options=options: image.save(p, exif=exif, **options)  # noqa: E731
        files[name] = (writer, SCENE, JPEG_LOSS if name.endswith("jpg") else 0)
    return files


def png(width, height, rows):
    """Return a one-bit PNG with this width and height in its header, whatever its rows are."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(array, *, planar=False, order="<", rows=7, deflate=False, predictor=False, tile=None, orientation=1):
    """Return a TIFF file of an array (H, W, bands), laid out as the options say."""
    height, width, bands = array.shape
    array = array.astype(array.dtype.newbyteorder(order))
    chunks = []
    for plane in np.split(array, bands, axis=2) if planar else [array]:
        tops = range(0, height, tile or rows)
        lefts = range(0, width, tile) if tile else [0]
        for top, left in ((top, left) for top in tops for left in lefts):
            part = plane[top : top + (tile or rows), left : left + (tile or width)]
            if tile:
                part = np.pad(part, ((0, tile - part.shape[0]), (0, tile - part.shape[1]), (0, 0)))
            if predictor:
                part = np.concatenate((part[:, :1], part[:, 1:] - part[:, :-1]), axis=1).astype(array.dtype)
            content = np.ascontiguousarray(part).tobytes()
            chunks.append(zlib.compress(content) if deflate else content)
    body = b"".join(chunks)
    offsets = [8 + sum(map(len, chunks[:number])) for number in range(len(chunks))]
    tags = {256: [width], 257: [height], 258: [array.dtype.itemsize * 8] * bands, 259: [8 if deflate else 1]}
    tags |= {262: [1], 274: [orientation], 277: [bands], 284: [1 + planar], 317: [1 + predictor]}
    tags |= {339: ["uif".index(array.dtype.kind) + 1] * bands}
    sizes = [len(chunk) for chunk in chunks]
    tags |= {322: [tile], 323: [tile], 324: offsets, 325: sizes} if tile else {273: offsets, 278: [rows], 279: sizes}
    entries, values, start = b"", b"", 8 + len(body)
    for tag, numbers in sorted(tags.items()):
        data = struct.pack(f"{order}{len(numbers)}L", *numbers)
        if len(data) > 4:
            place = start + 2 + 12 * len(tags) + 4 + len(values)
            data, values = struct.pack(f"{order}L", place), values + data
        entries += struct.pack(f"{order}HHL", tag, 4, len(numbers)) + data
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}L", start)
    return head + body + struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + values


def truncate(path, share, **options):
    saved(SCENE, path, **options)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def save_zip(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("image.txt", "not an image")


REFUSED = {
    "float_of_bytes.tif": (
        lambda p: saved(RAMP.astype(np.float32), p),
        r"values 0\.\.\.255: expected 0\.\.\.1; give the",
    ),
    "truncated.jpg": (lambda p: truncate(p, 0.6), "truncated|not processed|incomplete"),
    "truncated.png": (lambda p: truncate(p, 0.6), "truncated|not processed"),
    "cut_header.gif": (lambda p: truncate(p, 0.01), "expected one complete image|expected an image"),
    "empty.jpg": (lambda p: p.write_bytes(b""), "got an empty file"),
    "text.jpg": (lambda p: p.write_text("this is not an image"), "begins with b'this is not an i'; convert it"),
    "drawing.eps": (lambda p: saved(SCENE, p), "expected an image"),
    "archive.png": (save_zip, "begins with b'PK"),
    "bomb.png": (lambda p: p.write_bytes(png(12000, 12000, bytes(1501) * 12000)), "89,?478,?485"),
    "not_a_number.tif": (
        lambda p: saved(np.full((4, 4), np.nan, dtype=np.float32), p),
        "that are NaN or infinite",
    ),
}
READ_RIGHT = read_right()


def write_odd_files(root: Path, files: dict) -> None:
    for number, (name, (write, *_)) in enumerate(files.items()):
        folder = root / ("even" if number % 2 else "odd")
        folder.mkdir(exist_ok=True)
        write(folder / name)
