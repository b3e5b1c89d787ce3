"Small TIFF files with something unusual about them, of pixels whose place can be told."

import struct

import numpy as np
import tifffile
from PIL import Image

SPACING = 0.5


def resolution(spacing=SPACING):
    "Resolution tags of a spacing in microns per pixel, for tifffile."
    return dict(resolution=(1e4 / spacing, 1e4 / spacing), resolutionunit='CENTIMETER')


def pixels(size=(300, 420), seed=0):
    "Blocks of random colours on glass, with a red corner: uint8 (height, width, 3)."
    height, width = size
    rng = np.random.default_rng(seed)
    cells = rng.integers(60, 220, (-(-height // 12), -(-width // 12), 3), dtype=np.uint8)
    rgb = np.kron(cells, np.ones((12, 12, 1), np.uint8))[:height, :width]
    rgb[:20, :30] = (255, 0, 0)
    rgb[-25:, -40:] = 245
    return rgb


def smooth(size, seed=0):
    "Blobs of some dozen pixels, as tissue has at any level: uint8 (height, width, 3)."
    height, width = size
    rng = np.random.default_rng(seed)
    cells = rng.integers(60, 220, (height // 40 + 2, width // 40 + 2, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC))


def write(path, rgb, tile=(64, 64), spacing=SPACING, photometric='rgb', **kwargs):
    "A TIFF of one image."
    kwargs = {'metadata': None, **kwargs}
    tags = {} if spacing is None else resolution(spacing)
    tifffile.imwrite(path, rgb, photometric=photometric, tile=tile, **tags, **kwargs)
    return path


def write_pages(path, pages, **common):
    "A TIFF of several pages, each (pixels, keyword arguments of tifffile)."
    with tifffile.TiffWriter(path, ome=False) as file:
        for rgb, kwargs in pages:
            file.write(rgb, **{'metadata': None, 'photometric': 'rgb', **common, **kwargs})
    return path


def entries(data):
    "Byte of each entry of the first directory of a classic TIFF in little-endian order."
    (first,) = struct.unpack_from('<I', data, 4)
    (n,) = struct.unpack_from('<H', data, first)
    return [first + 2 + 12 * i for i in range(n)]


def change_tag(path, tag, value, kind=3):
    "Change the value of a tag that is one number (type 3: of 2 bytes)."
    data = bytearray(path.read_bytes())
    for at in entries(data):
        if struct.unpack_from('<H', data, at)[0] == tag:
            struct.pack_into('<HII', data, at + 2, kind, 1, value)
    path.write_bytes(data)
    return path


def swap_last_tags(path):
    "Put the last two tags of a file out of order."
    data = bytearray(path.read_bytes())
    last, before = entries(data)[-1], entries(data)[-2]
    data[before : before + 12], data[last : last + 12] = (
        data[last : last + 12],
        data[before : before + 12],
    )
    path.write_bytes(data)
    return path


def places(path, page=0):
    "(byte where it begins, bytes) of each tile or strip of a page."
    with tifffile.TiffFile(path) as file:
        found = file.pages[page]
        return list(zip(found.dataoffsets, found.databytecounts, strict=True))


def leave_out(path, numbers, page=0):
    "Set the offsets and lengths of tiles of a page to 0."
    with tifffile.TiffFile(path) as file:
        tags = file.pages[page].tags
        changes = []
        for tag in (tags[324], tags[325]):
            size = tag.valuebytecount // tag.count
            changes += [(tag.valueoffset + size * number, size) for number in numbers]
    data = bytearray(path.read_bytes())
    for at, size in changes:
        data[at : at + size] = bytes(size)
    path.write_bytes(data)
    return path


def damage(path, number, page=0, n=64):
    "Overwrite bytes in the middle of a tile or strip."
    begins, length = places(path, page)[number]
    data = bytearray(path.read_bytes())
    at = begins + length // 2
    data[at : at + n] = np.random.default_rng(number).bytes(n)
    path.write_bytes(data)
    return path


def change_piece(path, number, change, page=0):
    "Replace the bytes of a tile or strip by `change(bytes)`, which may be longer; they go to the end."
    with tifffile.TiffFile(path) as file:
        found = file.pages[page]
        tags = [found.tags[code] for code in ((324, 325) if found.is_tiled else (273, 279))]
        sizes = [tag.valuebytecount // tag.count for tag in tags]
        entries = [tag.valueoffset + size * number for tag, size in zip(tags, sizes, strict=True)]
        order = file.byteorder
    begins, length = places(path, page)[number]
    data = bytearray(path.read_bytes())
    changed = change(bytes(data[begins : begins + length]))
    for at, size, value in zip(entries, sizes, (len(data), len(changed)), strict=True):
        data[at : at + size] = struct.pack(order + {2: 'H', 4: 'I', 8: 'Q'}[size], value)
    path.write_bytes(data + changed)
    return path
