"""Slides of every format that can be made here, from the same pixels.

Each is written as its maker's software writes it, as far as OpenSlide and libvips look: the same
bytes each time. `every_format` writes all of them."""

import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyvips
import tifffile
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGBaseline8Bit, generate_uid

from streaming_pathology.slides.readers import sample_slide
from streaming_pathology.slides.synthetic import paint_biopsy

SPACING = 0.5
TIFFS = dict(photometric='rgb', metadata=None)  # of tifffile
LABEL = np.full((60, 60, 3), 7, np.uint8)
MACRO = np.full((60, 160, 3), 9, np.uint8)


class Format(NamedTuple):
    "What a slide of `every_format` is like."

    levels: int = 1
    is_lossy: bool = False
    gives_spacing: bool = True


FORMATS = {
    'aperio.svs': Format(levels=2),
    'bigtiff.tif': Format(levels=4, is_lossy=True),
    'children.tif': Format(levels=4),
    'dicom': Format(levels=2, is_lossy=True),
    'hamamatsu.ndpi': Format(levels=3, is_lossy=True),
    'hamamatsu.vms': Format(levels=7, is_lossy=True),
    'image.jpg': Format(is_lossy=True, gives_spacing=False),
    'image.png': Format(gives_spacing=False),
    'image.webp': Format(gives_spacing=False),
    'leica.scn': Format(levels=2),
    'mirax.mrxs': Format(levels=2, is_lossy=True),
    'ome.ome.tif': Format(levels=3),
    'pages.tif': Format(levels=4),
    'philips.tiff': Format(levels=2),
    'planar.ome.tif': Format(levels=3),
    'sample.svs': Format(),
    'strips.tif': Format(),
    'ventana.bif': Format(levels=2),
}


def pixels(size=(700, 540)):
    "A painted biopsy, uint8 (height, width, 3)."
    return paint_biopsy(size, SPACING, 0.3, seed=11).image


def vips(rgb):
    "Pixels as an image of libvips with their spacing."
    return pyvips.Image.new_from_array(np.ascontiguousarray(rgb)).copy(
        interpretation='srgb', xres=1000 / SPACING, yres=1000 / SPACING
    )


def jpeg(rgb, quality=95):
    "The bytes of a JPEG."
    return vips(rgb).jpegsave_buffer(Q=quality, subsample_mode='off')


def ome(path, rgb, planar=False, **metadata):
    "An OME-TIFF in tiles with two more levels as sub-images; `planar`: each channel an image."
    levels = [rgb, rgb[::2, ::2], rgb[::4, ::4]]
    options = dict(photometric='rgb', tile=(128, 128), compression='deflate')
    if planar:
        levels = [np.moveaxis(level, -1, 0) for level in levels]
        options['photometric'] = 'minisblack'
    about = dict(
        axes='CYX' if planar else 'YXS',
        PhysicalSizeX=SPACING,
        PhysicalSizeXUnit='µm',
        PhysicalSizeY=SPACING * 1000,
        PhysicalSizeYUnit='nm',
        UUID='urn:uuid:00000000-0000-0000-0000-000000000001',  # the same bytes each time
        **metadata,
    )
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        file.write(levels[0], subifds=2, metadata=about, **options)
        for level in levels[1:]:
            file.write(level, subfiletype=1, metadata=None, **options)


def svs(path, rgb):
    """As Aperio's scanners write: level, thumbnail, level, label and macro photograph, with the
    spacing in the description."""
    height, width = rgb.shape[:2]
    scanner = 'Aperio Image Library v11.2.1'
    size = f'{width}x{height} [0,0 {width}x{height}] (256x256) JPEG/RGB Q=95'
    options = dict(TIFFS, software=False)
    tiles, strips = dict(tile=(256, 256)), dict(rowsperstrip=16)
    with tifffile.TiffWriter(path) as file:
        about = f'{scanner} \r\n{size}|AppMag = 20|MPP = {SPACING}'
        file.write(rgb, description=about, **tiles, **options)
        file.write(rgb[::8, ::8], description=scanner, **strips, **options)
        file.write(rgb[::4, ::4], description=scanner, **tiles, **options)
        about = f'{scanner}\r\nlabel 60x60'
        file.write(LABEL, rowsperstrip=60, description=about, subfiletype=1, **options)
        about = f'{scanner}\r\nmacro 160x60'
        file.write(MACRO, rowsperstrip=60, description=about, subfiletype=9, **options)


class DicomImage(NamedTuple):
    "One file of a slide in DICOM."

    name: str
    pixels: np.ndarray
    kind: tuple[str, ...]  # Image Type
    spacing: float  # microns per pixel
    tile: int  # pixels of a side


def dicom(folder, rgb, tile=128):
    """A slide in DICOM (VL Whole Slide Microscopy Image, TILED_FULL, JPEG): a file for each of two
    levels, a label and an overview. The same bytes for the same name of the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    original, derived = ('ORIGINAL', 'PRIMARY'), ('DERIVED', 'PRIMARY')
    half = rgb[::2, ::2]
    images = [
        DicomImage('level0', rgb, (*original, 'VOLUME', 'NONE'), SPACING, tile),
        DicomImage('level1', half, (*derived, 'VOLUME', 'RESAMPLED'), 2 * SPACING, tile),
        DicomImage('label', LABEL, (*original, 'LABEL', 'NONE'), 20.0, 60),
        DicomImage('overview', MACRO, (*original, 'OVERVIEW', 'NONE'), 20.0, 160),
    ]
    for number, image in enumerate(images, 1):
        write_dicom(folder, image, number)
    return folder


def write_dicom(folder, image, number):
    "A file of a slide in DICOM."

    def uid(what):
        return generate_uid(entropy_srcs=[folder.name, what])

    height, width = image.pixels.shape[:2]
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.SOPClassUID = '1.2.840.10008.5.1.4.1.1.77.1.6'
    data.SOPInstanceUID = uid(image.name)
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    data.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    data.StudyInstanceUID, data.SeriesInstanceUID = uid('study'), uid('series')
    data.FrameOfReferenceUID = uid('frame')
    data.Modality, data.InstanceNumber, data.PatientID = 'SM', number, 'secret'
    data.ImageType = list(image.kind)
    data.Rows = data.Columns = image.tile
    data.TotalPixelMatrixRows, data.TotalPixelMatrixColumns = height, width
    data.SamplesPerPixel, data.PhotometricInterpretation = 3, 'YBR_FULL_422'
    data.PlanarConfiguration, data.PixelRepresentation = 0, 0
    data.BitsAllocated, data.BitsStored, data.HighBit = 8, 8, 7
    data.LossyImageCompression, data.DimensionOrganizationType = '01', 'TILED_FULL'
    data.NumberOfOpticalPaths, data.TotalPixelMatrixFocalPlanes = 1, 1
    data.ImagedVolumeWidth = width * image.spacing / 1000
    data.ImagedVolumeHeight = height * image.spacing / 1000
    origin, measures, shared, optics = Dataset(), Dataset(), Dataset(), Dataset()
    origin.XOffsetInSlideCoordinateSystem = origin.YOffsetInSlideCoordinateSystem = 0
    data.TotalPixelMatrixOriginSequence = [origin]
    measures.PixelSpacing, measures.SliceThickness = [image.spacing / 1000] * 2, 0.001
    shared.PixelMeasuresSequence = [measures]
    data.SharedFunctionalGroupsSequence = [shared]
    optics.OpticalPathIdentifier = '1'
    data.OpticalPathSequence = [optics]
    frames = dicom_frames(image)
    data.NumberOfFrames = len(frames)
    data.PixelData = encapsulate(frames)
    data['PixelData'].is_undefined_length = True
    data.save_as(folder / f'{image.name}.dcm', enforce_file_format=True)


def dicom_frames(image):
    "The tiles of an image as JPEG, row by row."
    n = image.tile
    height, width = image.pixels.shape[:2]
    padded = np.pad(image.pixels, ((0, -height % n), (0, -width % n), (0, 0)), mode='edge')
    return [
        vips(padded[top : top + n, left : left + n]).jpegsave_buffer(Q=95)
        for top in range(0, height, n)
        for left in range(0, width, n)
    ]


def philips_attribute(name, text):
    "An attribute of Philips' XML."
    place = 'Group="0x301D" Element="0x1004" PMSVR="IString"'
    return f'<Attribute Name="{name}" {place}>{text}</Attribute>'


def philips_array(name, place, content):
    "An array of objects in Philips' XML."
    begins = f'<Attribute Name="{name}" {place} PMSVR="IDataObjectArray"><Array>'
    return f'{begins}{content}</Array></Attribute>'


def philips(path, rgb):
    """As Philips' software exports: levels in tiles, the sizes of their pixels in XML; label and
    macro photograph as pages."""

    def spacing(step):
        side = SPACING * step / 1000
        return philips_attribute('DICOM_PIXEL_SPACING', f'&quot;{side}&quot; &quot;{side}&quot;')

    levels = ''
    for number, step in enumerate((1, 2)):
        ident = philips_attribute('PIIM_PIXEL_DATA_REPRESENTATION_NUMBER', number)
        levels += f'<DataObject ObjectType="PixelDataRepresentation">{spacing(step)}{ident}'
        levels += '</DataObject>'
    name = 'PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE'
    array = philips_array(name, 'Group="0x1001" Element="0x8B01"', levels)
    kind = philips_attribute('PIM_DP_IMAGE_TYPE', 'WSI')
    image = f'<DataObject ObjectType="DPScannedImage">{kind}{spacing(1)}{array}</DataObject>'
    array = philips_array('PIM_DP_SCANNED_IMAGES', 'Group="0x301D" Element="0x1003"', image)
    begins = '<?xml version="1.0" encoding="UTF-8" ?><DataObject ObjectType="DPUfsImport">'
    xml = f'{begins}{array}</DataObject>'
    options = dict(TIFFS, software='Philips DP v1.0')
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        file.write(rgb, tile=(256, 256), description=xml, **options)
        file.write(rgb[::2, ::2], tile=(256, 256), subfiletype=1, **options)
        for name, value in (('Macro', 9), ('Label', 7)):
            photo = np.full((60, 160, 3), value, np.uint8)
            file.write(photo, rowsperstrip=60, description=name, **options)


def leica_image(name, sizes, view, first):
    """An image in Leica's XML, of levels of some sizes in the pages from `first` on; `view`: its
    (top, left, height, width) on the glass in pixels."""
    nm = SPACING * 1000
    height, width = sizes[0]
    levels = ''.join(
        f'<dimension sizeX="{w}" sizeY="{h}" r="{number}" ifd="{first + number}"/>'
        for number, (h, w) in enumerate(sizes)
    )
    size = f'sizeX="{view[3] * nm:.0f}" sizeY="{view[2] * nm:.0f}"'
    place = f'offsetX="{view[1] * nm:.0f}" offsetY="{view[0] * nm:.0f}"'
    return (
        f'<image name="{name}" uuid="urn:uuid:{name}">'
        '<creationDate>2020-01-01T00:00:00Z</creationDate>'
        '<device model="Leica SCN400" version="1"/>'
        f'<pixels sizeX="{width}" sizeY="{height}">{levels}</pixels>'
        f'<view {size} {place} spacingZ="0"/>'
        '<scanSettings><objectiveSettings><objective>20</objective></objectiveSettings>'
        '<illuminationSettings><numericalAperture>0.4</numericalAperture>'
        '<illuminationSource>brightfield</illuminationSource></illuminationSettings>'
        '</scanSettings></image>'
    )


def leica(path, rgb, at=(200, 300)):
    """As Leica's SCN400 writes: an image on a larger collection, whose photograph is the macro
    image."""
    height, width = rgb.shape[:2]
    glass = height + 2 * at[0], width + 2 * at[1]
    photo = np.full((glass[0] // 10, glass[1] // 10, 3), 9, np.uint8)
    nm = SPACING * 1000
    levels = [(height, width), (height // 2, width // 2)]
    xml = (
        '<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01" '
        'uuid="urn:uuid:scn"><collection name="c" uuid="urn:uuid:c" '
        f'sizeX="{glass[1] * nm:.0f}" sizeY="{glass[0] * nm:.0f}"><barcode>c2VjcmV0</barcode>'
        + leica_image('macro', [photo.shape[:2]], (0, 0, *glass), 0)
        + leica_image('main', levels, (*at, height, width), 1)
        + '</collection></scn>'
    )

    def options(step):
        per_cm = 1e4 / (SPACING * step)
        spacing = dict(resolution=(per_cm, per_cm), resolutionunit='CENTIMETER')
        return dict(TIFFS, tile=(128, 128), description=xml, **spacing)

    with tifffile.TiffWriter(path, bigtiff=True) as file:
        file.write(photo, **options(10))
        for step in (1, 2):
            cropped = rgb[: height // step * step, : width // step * step]
            file.write(cropped[::step, ::step], **options(step))


def ventana_joints(rows, columns):
    """How the tiles of Ventana's XML join: (one, the next, direction). They are numbered from the
    lower left in a meander."""

    def number(row, column):
        from_below = rows - 1 - row
        along = column if from_below % 2 == 0 else columns - 1 - column
        return 1 + from_below * columns + along

    joints = []
    for row in range(rows):
        for column in range(columns - 1):
            joints.append((number(row, column), number(row, column + 1), 'RIGHT'))
    for row in range(rows - 1):
        for column in range(columns):
            joints.append((number(row + 1, column), number(row, column), 'UP'))
    return joints


def ventana(path, rgb, tile=128):
    "As Ventana's iScan writes (BIF): tiles of one region, and how each joins the next."
    rows, columns = (side // tile for side in rgb.shape[:2])
    rgb = rgb[: rows * tile, : columns * tile]
    joints = ''.join(
        f'<TileJointInfo FlagJoined="1" Confidence="99" Direction="{direction}" '
        f'Tile1="{one}" Tile2="{other}" OverlapX="0" OverlapY="0"/>'
        for one, other, direction in ventana_joints(rows, columns)
    )
    info = (
        '<?xml version="1.0"?><EncodeInfo Ver="2"><SlideInfo/><SlideStitchInfo>'
        f'<ImageInfo AOIScanned="1" AOIIndex="0" NumRows="{rows}" NumCols="{columns}" '
        f'Width="{tile}" Height="{tile}" Pos-X="0" Pos-Y="0">{joints}</ImageInfo>'
        '</SlideStitchInfo><AoiOrigin><AOI0 OriginX="0" OriginY="0"/></AoiOrigin></EncodeInfo>'
    ).encode()
    scan = (
        f'<?xml version="1.0"?><Metadata><iScan ScanRes="{SPACING}" Magnification="20" '
        'UnitNumber="1"/></Metadata>'
    ).encode()

    def xml(text):
        return [(700, 1, len(text), text, True)]

    with tifffile.TiffWriter(path, bigtiff=True) as file:
        about = dict(description='Label Image', extratags=xml(scan))
        file.write(MACRO, rowsperstrip=60, **about, **TIFFS)
        for level, step in enumerate((1, 2)):
            about = f'level={level} mag={20 / step:g} quality=95'
            extra = xml(info) if level == 0 else []
            options = dict(TIFFS, tile=(tile, tile), description=about, extratags=extra)
            file.write(rgb[::step, ::step], **options)


NDPI_TYPES = {  # (number of the type, how it is packed)
    'short': (3, '<H'),
    'long': (4, '<I'),
    'place': (5, '<I'),
    'signed': (9, '<i'),
    'float': (11, '<f'),
}


def hamamatsu(path, rgb):
    "As Hamamatsu's NanoZoomer writes (NDPI): one JPEG a level, and the macro photograph."
    with open(path, 'wb') as file:
        file.write(b'II*\0\0\0\0\0')
        pointer = 4
        for step, lens in ((1, 20.0), (2, 10.0), (8, -1.0)):
            image = rgb[::step, ::step] if lens > 0 else MACRO
            pointer = write_ndpi_page(file, image, step, lens, pointer)


def write_ndpi_page(file, image, step, lens, pointer):
    "A page of an NDPI, to which the number at byte `pointer` is to point; where its own lies."
    height, width = image.shape[:2]
    begins, data = file.tell(), jpeg(image)
    file.write(data)
    resolution = file.tell()
    file.write(struct.pack('<II', round(1e4 / (SPACING * step)), 1))
    tags = [
        (256, 'long', width),
        (257, 'long', height),
        (259, 'short', 7),
        (262, 'short', 6),
        (273, 'long', begins),
        (277, 'short', 3),
        (278, 'long', height),
        (279, 'long', len(data)),
        (282, 'place', resolution),
        (283, 'place', resolution),
        (296, 'short', 3),
        (65420, 'long', 1),
        (65421, 'float', lens),
        (65424, 'signed', 0),
    ]
    directory = file.tell()
    file.write(struct.pack('<H', len(tags)))
    for tag, kind, value in tags:
        number, form = NDPI_TYPES[kind]
        file.write(struct.pack('<HHI', tag, number, 1) + struct.pack(form, value).ljust(4, b'\0'))
    end = file.tell()
    file.write(bytes(8))
    file.seek(pointer)
    file.write(struct.pack('<I', directory))
    file.seek(0, 2)
    return end


def vms(path, rgb):
    """As Hamamatsu's NanoZoomer writes (VMS): a text that names a JPEG in tiles of restart
    intervals, a small one of the whole, and the macro photograph."""
    rgb = rgb[:640, :512]
    images = {'ImageFile': rgb, 'MapFile': rgb[::8, ::8], 'MacroImage': MACRO}
    lines = ['[Virtual Microscope Specimen]', 'NoLayers=1', 'NoJpegColumns=1', 'NoJpegRows=1']
    for key, image in images.items():
        file = path.with_name(f'{path.stem}-{key}.jpg')
        data = vips(image).jpegsave_buffer(Q=95, subsample_mode='off', restart_interval=4)
        file.write_bytes(data)
        lines.append(f'{key}={file.name}')
    lines.append(f'PhysicalWidth={512 * SPACING * 1000:.0f}')
    lines.append(f'PhysicalHeight={640 * SPACING * 1000:.0f}')
    lines.append('SourceLens=20')
    path.write_text('\n'.join(lines) + '\n')


def ini_section(name, **values):
    "A section of an INI file."
    return f'[{name}]\n' + ''.join(f'{key} = {value}\n' for key, value in values.items())


def mirax_level(rgb, step, tile, start):
    """(data, records) of a level of a MIRAX slide: its tiles as JPEG, and for each its number,
    where it begins (the data are from byte `start` on) and its bytes."""
    rows, columns = (side // tile for side in rgb.shape[:2])
    blocks = rgb.reshape(rows * tile // step, step, columns * tile // step, step, 3)
    level = blocks.mean((1, 3)).astype(np.uint8)
    data, records = b'', []
    for row in range(0, rows, step):
        for column in range(0, columns, step):
            top, left = row * tile // step, column * tile // step
            part = jpeg(level[top : top + tile, left : left + tile])
            records.append((row * columns + column, start + len(data), len(part), 0))
            data += part
    return data, records


def mirax(path, rgb, tile=64):
    """As 3DHISTECH's scanners write (MRXS): tiles of two levels in a data file, where they lie in
    an index, and what they mean in an INI file."""
    folder, ident = path.with_suffix(''), 'AB' * 16
    folder.mkdir()
    path.write_bytes(jpeg(rgb[::8, ::8]))
    rows, columns = (side // (2 * tile) * 2 for side in rgb.shape[:2])
    data, pages = b'', []
    for step in (1, 2):
        part, records = mirax_level(rgb[: rows * tile, : columns * tile], step, tile, len(data))
        data += part
        packed = b''.join(struct.pack('<4i', *record) for record in records)
        pages.append(struct.pack('<ii', len(records), 0) + packed)
    (folder / 'Data0000.dat').write_bytes(data)
    (folder / 'Index.dat').write_bytes(mirax_index(ident, pages))
    (folder / 'Slidedat.ini').write_text(mirax_ini(ident, rows, columns, tile))


def mirax_index(ident, pages):
    "The index of a MIRAX slide, with a page of records for each level."
    head = b'01.02' + ident.encode()
    table = len(head) + 8
    lists = table + 4 * len(pages)
    first = lists + 8 * len(pages)
    begins = [first + sum(map(len, pages[:number])) for number in range(len(pages))]
    return (
        head
        + struct.pack('<ii', table, 0)
        + b''.join(struct.pack('<i', lists + 8 * number) for number in range(len(pages)))
        + b''.join(struct.pack('<ii', 0, place) for place in begins)
        + b''.join(pages)
    )


def mirax_ini(ident, rows, columns, tile):
    "The INI file of a MIRAX slide of two levels."
    text = ini_section(
        'GENERAL',
        SLIDE_ID=ident,
        IMAGENUMBER_X=columns,
        IMAGENUMBER_Y=rows,
        OBJECTIVE_MAGNIFICATION=20,
    )
    text += ini_section(
        'HIERARCHICAL',
        HIER_COUNT=1,
        NONHIER_COUNT=0,
        INDEXFILE='Index.dat',
        HIER_0_NAME='Slide zoom level',
        HIER_0_COUNT=2,
        HIER_0_VAL_0_SECTION='LAYER_0_LEVEL_0_SECTION',
        HIER_0_VAL_1_SECTION='LAYER_0_LEVEL_1_SECTION',
    )
    text += ini_section('DATAFILE', FILE_COUNT=1, FILE_0='Data0000.dat')
    for level in (0, 1):
        text += ini_section(
            f'LAYER_0_LEVEL_{level}_SECTION',
            OVERLAP_X=0,
            OVERLAP_Y=0,
            MICROMETER_PER_PIXEL_X=SPACING * 2**level,
            MICROMETER_PER_PIXEL_Y=SPACING * 2**level,
            IMAGE_FILL_COLOR_BGR=16777215,
            DIGITIZER_WIDTH=tile,
            DIGITIZER_HEIGHT=tile,
            IMAGE_CONCAT_FACTOR=level,
            IMAGE_FORMAT='JPEG',
        )
    return text


def every_format(folder):
    """Dict: name -> path of a slide, the names of `FORMATS`.

    All are of the same pixels but for `sample.svs`, what a format loses, and rows and columns that
    do not fill a tile where a format has whole tiles only."""
    folder, rgb = Path(folder), pixels()
    folder.mkdir(parents=True, exist_ok=True)
    tiles = dict(tile=True, tile_width=128, tile_height=128, pyramid=True, resunit='cm')
    image = vips(rgb)
    image.tiffsave(str(folder / 'pages.tif'), compression='deflate', **tiles)
    image.tiffsave(str(folder / 'children.tif'), subifd=True, compression='lzw', **tiles)
    image.tiffsave(str(folder / 'bigtiff.tif'), bigtiff=True, compression='jpeg', Q=95, **tiles)
    image.tiffsave(str(folder / 'strips.tif'), compression='deflate', resunit='cm')
    image.webpsave(str(folder / 'image.webp'), lossless=True)
    Image.fromarray(rgb).save(folder / 'image.png')
    (folder / 'image.jpg').write_bytes(jpeg(rgb))
    ome(folder / 'ome.ome.tif', rgb)
    ome(folder / 'planar.ome.tif', rgb, planar=True)
    svs(folder / 'aperio.svs', rgb)
    dicom(folder / 'dicom', rgb)
    philips(folder / 'philips.tiff', rgb)
    leica(folder / 'leica.scn', rgb)
    ventana(folder / 'ventana.bif', rgb)
    hamamatsu(folder / 'hamamatsu.ndpi', rgb)
    vms(folder / 'hamamatsu.vms', rgb)
    mirax(folder / 'mirax.mrxs', rgb)
    (folder / 'sample.svs').write_bytes(sample_slide().read_bytes())
    return {name: folder / name for name in FORMATS}
