"Slides of every format that can be made here, from the same pixels."

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
    'hamamatsu.vms': Format(levels=2, is_lossy=True),
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
TIFFS = dict(photometric='rgb', metadata=None)  # of tifffile


def pixels(size=(700, 540)):
    "A painted biopsy, uint8 (height, width, 3)."
    return paint_biopsy(size, SPACING, 0.3, seed=11).image


def vips(rgb):
    return pyvips.Image.new_from_array(np.ascontiguousarray(rgb)).copy(
        interpretation='srgb', xres=1000 / SPACING, yres=1000 / SPACING
    )


def jpeg(rgb, quality=95):
    return vips(rgb).jpegsave_buffer(Q=quality, subsample_mode='off')


def ome(path, rgb, planar=False, **metadata):
    "An OME-TIFF in tiles with two more levels as SubIFDs; `planar`: each channel an image of its own."
    with tifffile.TiffWriter(path, bigtiff=True) as t:
        levels = [rgb, rgb[::2, ::2], rgb[::4, ::4]]
        if planar:
            levels = [np.moveaxis(l, -1, 0) for l in levels]
        kwargs = (
            dict(photometric='minisblack', tile=(128, 128), compression='deflate')
            if planar
            else dict(photometric='rgb', tile=(128, 128), compression='deflate')
        )
        t.write(
            levels[0],
            subifds=2,
            metadata=dict(
                axes='CYX' if planar else 'YXS',
                PhysicalSizeX=SPACING,
                PhysicalSizeXUnit='µm',
                PhysicalSizeY=SPACING * 1000,
                PhysicalSizeYUnit='nm',
                UUID='urn:uuid:00000000-0000-0000-0000-000000000001',  # the same bytes each time
                **metadata,
            ),
            **kwargs,
        )
        for l in levels[1:]:
            t.write(l, subfiletype=1, metadata=None, **kwargs)


def svs(path, rgb):
    "As Aperio's scanners write: level, thumbnail, level, label and macro, with the spacing in the description."
    said = f'Aperio Image Library v11.2.1 \r\n{rgb.shape[1]}x{rgb.shape[0]} [0,0 {rgb.shape[1]}x{rgb.shape[0]}] (256x256) JPEG/RGB Q=95|AppMag = 20|MPP = {SPACING}'
    kwargs = dict(photometric='rgb', metadata=None, software=False)
    with tifffile.TiffWriter(path) as t:
        t.write(rgb, tile=(256, 256), description=said, **kwargs)
        t.write(
            rgb[::8, ::8], rowsperstrip=16, description='Aperio Image Library v11.2.1', **kwargs
        )
        t.write(
            rgb[::4, ::4], tile=(256, 256), description='Aperio Image Library v11.2.1', **kwargs
        )
        t.write(
            np.full((60, 60, 3), 7, np.uint8),
            rowsperstrip=60,
            description='Aperio Image Library v11.2.1\r\nlabel 60x60',
            subfiletype=1,
            **kwargs,
        )
        t.write(
            np.full((60, 160, 3), 9, np.uint8),
            rowsperstrip=60,
            description='Aperio Image Library v11.2.1\r\nmacro 160x60',
            subfiletype=9,
            **kwargs,
        )


def dicom(folder, rgb, tile=128, series=None):
    "A slide in DICOM (VL Whole Slide Microscopy Image, TILED_FULL, JPEG), a file for each of two levels, a label and an overview; the same bytes for the same name of the folder."
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)

    def uid(what):
        return generate_uid(entropy_srcs=[folder.name, what])

    series, study, frame = series or uid('series'), uid('study'), uid('frame')
    kinds = [
        ('level0', rgb, ['ORIGINAL', 'PRIMARY', 'VOLUME', 'NONE'], SPACING),
        ('level1', rgb[::2, ::2], ['DERIVED', 'PRIMARY', 'VOLUME', 'RESAMPLED'], 2 * SPACING),
        (
            'label',
            np.full((60, 60, 3), 7, np.uint8),
            ['ORIGINAL', 'PRIMARY', 'LABEL', 'NONE'],
            20.0,
        ),
        (
            'overview',
            np.full((60, 160, 3), 9, np.uint8),
            ['ORIGINAL', 'PRIMARY', 'OVERVIEW', 'NONE'],
            20.0,
        ),
    ]
    for k, (name, image, kind, spacing) in enumerate(kinds, 1):
        (h, w), t = image.shape[:2], tile if 'VOLUME' in kind else max(image.shape[:2])
        d = Dataset()
        d.file_meta = FileMetaDataset()
        d.file_meta.MediaStorageSOPClassUID = d.SOPClassUID = '1.2.840.10008.5.1.4.1.1.77.1.6'
        d.file_meta.MediaStorageSOPInstanceUID = d.SOPInstanceUID = uid(name)
        d.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
        (
            d.StudyInstanceUID,
            d.SeriesInstanceUID,
            d.FrameOfReferenceUID,
            d.Modality,
            d.InstanceNumber,
            d.PatientID,
            d.ImageType,
        ) = study, series, frame, 'SM', k, 'secret', kind
        d.Rows = d.Columns = t
        d.TotalPixelMatrixRows, d.TotalPixelMatrixColumns = h, w
        (
            d.SamplesPerPixel,
            d.PhotometricInterpretation,
            d.PlanarConfiguration,
            d.BitsAllocated,
            d.BitsStored,
            d.HighBit,
            d.PixelRepresentation,
        ) = 3, 'YBR_FULL_422', 0, 8, 8, 7, 0
        (
            d.LossyImageCompression,
            d.DimensionOrganizationType,
            d.NumberOfOpticalPaths,
            d.TotalPixelMatrixFocalPlanes,
        ) = '01', 'TILED_FULL', 1, 1
        d.ImagedVolumeWidth, d.ImagedVolumeHeight = w * spacing / 1000, h * spacing / 1000
        origin, measures, group, path = Dataset(), Dataset(), Dataset(), Dataset()
        origin.XOffsetInSlideCoordinateSystem = origin.YOffsetInSlideCoordinateSystem = 0
        d.TotalPixelMatrixOriginSequence = [origin]
        measures.PixelSpacing, measures.SliceThickness = [spacing / 1000] * 2, 0.001
        group.PixelMeasuresSequence = [measures]
        d.SharedFunctionalGroupsSequence = [group]
        path.OpticalPathIdentifier = '1'
        d.OpticalPathSequence = [path]
        padded = np.pad(image, ((0, -h % t), (0, -w % t), (0, 0)), mode='edge')
        frames = [
            vips(padded[i : i + t, j : j + t]).jpegsave_buffer(Q=95)
            for i in range(0, padded.shape[0], t)
            for j in range(0, padded.shape[1], t)
        ]
        d.NumberOfFrames = len(frames)
        d.PixelData = encapsulate(frames)
        d['PixelData'].is_undefined_length = True
        d.save_as(folder / f'{name}.dcm', enforce_file_format=True)
    return folder


def philips(path, rgb):
    "As Philips' software exports: levels in tiles, the sizes of their pixels in XML; label and macro photograph as pages."

    def one(name, text):
        return f'<Attribute Name="{name}" Group="0x301D" Element="0x1004" PMSVR="IString">{text}</Attribute>'

    levels = ''.join(
        f'<DataObject ObjectType="PixelDataRepresentation">{one("DICOM_PIXEL_SPACING", f"&quot;{SPACING * f / 1000}&quot; &quot;{SPACING * f / 1000}&quot;")}{one("PIIM_PIXEL_DATA_REPRESENTATION_NUMBER", k)}</DataObject>'
        for k, f in enumerate((1, 2))
    )
    image = f'<DataObject ObjectType="DPScannedImage">{one("PIM_DP_IMAGE_TYPE", "WSI")}{one("DICOM_PIXEL_SPACING", f"&quot;{SPACING / 1000}&quot; &quot;{SPACING / 1000}&quot;")}<Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE" Group="0x1001" Element="0x8B01" PMSVR="IDataObjectArray"><Array>{levels}</Array></Attribute></DataObject>'
    xml = f'<?xml version="1.0" encoding="UTF-8" ?><DataObject ObjectType="DPUfsImport"><Attribute Name="PIM_DP_SCANNED_IMAGES" Group="0x301D" Element="0x1003" PMSVR="IDataObjectArray"><Array>{image}</Array></Attribute></DataObject>'
    kwargs = dict(TIFFS, software='Philips DP v1.0')
    with tifffile.TiffWriter(path, bigtiff=True) as t:
        t.write(rgb, tile=(256, 256), description=xml, **kwargs)
        t.write(rgb[::2, ::2], tile=(256, 256), subfiletype=1, **kwargs)
        for name, value in (('Macro', 9), ('Label', 7)):
            t.write(
                np.full((60, 160, 3), value, np.uint8), rowsperstrip=60, description=name, **kwargs
            )


def leica(path, rgb, at=(200, 300)):
    "As Leica's SCN400 writes: an image on a larger collection, whose photograph is the macro image."
    (h, w), nm = rgb.shape[:2], SPACING * 1000
    H, W = h + 2 * at[0], w + 2 * at[1]
    settings = '<scanSettings><objectiveSettings><objective>20</objective></objectiveSettings><illuminationSettings><numericalAperture>0.4</numericalAperture><illuminationSource>brightfield</illuminationSource></illuminationSettings></scanSettings>'

    def image(name, sizes, view, first):
        return (
            f'<image name="{name}" uuid="urn:uuid:{name}"><creationDate>2020-01-01T00:00:00Z</creationDate><device model="Leica SCN400" version="1"/><pixels sizeX="{sizes[0][1]}" sizeY="{sizes[0][0]}">'
            + ''.join(
                f'<dimension sizeX="{b}" sizeY="{a}" r="{k}" ifd="{first + k}"/>'
                for k, (a, b) in enumerate(sizes)
            )
            + f'</pixels><view sizeX="{view[3] * nm:.0f}" sizeY="{view[2] * nm:.0f}" offsetX="{view[1] * nm:.0f}" offsetY="{view[0] * nm:.0f}" spacingZ="0"/>{settings}</image>'
        )

    xml = (
        f'<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01" uuid="urn:uuid:scn"><collection name="c" uuid="urn:uuid:c" sizeX="{W * nm:.0f}" sizeY="{H * nm:.0f}"><barcode>c2VjcmV0</barcode>'
        + image('macro', [(H // 10, W // 10)], (0, 0, H, W), 0)
        + image('main', [(h, w), (h // 2, w // 2)], (*at, h, w), 1)
        + '</collection></scn>'
    )

    def resolution(f):
        return dict(
            resolution=(1e4 / (SPACING * f), 1e4 / (SPACING * f)), resolutionunit='CENTIMETER'
        )

    with tifffile.TiffWriter(path, bigtiff=True) as t:
        t.write(
            np.full((H // 10, W // 10, 3), 9, np.uint8),
            tile=(128, 128),
            description=xml,
            **resolution(10),
            **TIFFS,
        )
        for f in (1, 2):
            t.write(
                rgb[: h // f * f : f, : w // f * f : f],
                tile=(128, 128),
                description=xml,
                **resolution(f),
                **TIFFS,
            )


def ventana(path, rgb, tile=128):
    "As Ventana's iScan writes (BIF): tiles of one region, numbered from the lower left in a meander, and how each joins the next."
    (h, w), n = rgb.shape[:2], tile
    rgb = rgb[: h // n * n, : w // n * n]
    rows, columns = h // n, w // n

    def number(r, c):
        r = rows - 1 - r
        return 1 + r * columns + (c if r % 2 == 0 else columns - 1 - c)

    joints = [
        (number(r, c), number(r, c + 1), 'RIGHT') for r in range(rows) for c in range(columns - 1)
    ] + [(number(r + 1, c), number(r, c), 'UP') for r in range(rows - 1) for c in range(columns)]
    joined = ''.join(
        f'<TileJointInfo FlagJoined="1" Confidence="99" Direction="{d}" Tile1="{a}" Tile2="{b}" OverlapX="0" OverlapY="0"/>'
        for a, b, d in joints
    )
    info = (
        f'<?xml version="1.0"?><EncodeInfo Ver="2"><SlideInfo/><SlideStitchInfo><ImageInfo AOIScanned="1" AOIIndex="0" NumRows="{rows}" NumCols="{columns}" Width="{n}" Height="{n}" Pos-X="0" Pos-Y="0">{joined}</ImageInfo></SlideStitchInfo>'
        '<AoiOrigin><AOI0 OriginX="0" OriginY="0"/></AoiOrigin></EncodeInfo>'
    ).encode()
    scan = f'<?xml version="1.0"?><Metadata><iScan ScanRes="{SPACING}" Magnification="20" UnitNumber="1"/></Metadata>'.encode()
    with tifffile.TiffWriter(path, bigtiff=True) as t:
        t.write(
            np.full((60, 160, 3), 9, np.uint8),
            rowsperstrip=60,
            description='Label Image',
            extratags=[(700, 1, len(scan), scan, True)],
            **TIFFS,
        )
        for k, f in enumerate((1, 2)):
            t.write(
                rgb[::f, ::f],
                tile=(n, n),
                description=f'level={k} mag={20 / f:g} quality=95',
                extratags=[(700, 1, len(info), info, True)] * (not k),
                **TIFFS,
            )


def hamamatsu(path, rgb):
    "As Hamamatsu's NanoZoomer writes (NDPI): one JPEG a level, and the macro photograph."
    with open(path, 'wb') as f:
        f.write(b'II*\0\0\0\0\0')
        pointer = 4
        for step, lens in ((1, 20.0), (2, 10.0), (8, -1.0)):
            x = rgb[::step, ::step] if lens > 0 else np.full((60, 160, 3), 9, np.uint8)
            at, data = f.tell(), jpeg(x)
            f.write(data)
            rational = f.tell()
            f.write(struct.pack('<II', round(1e4 / (SPACING * step)), 1))
            tags = [
                (256, 'I', x.shape[1]),
                (257, 'I', x.shape[0]),
                (259, 'H', 7),
                (262, 'H', 6),
                (273, 'I', at),
                (277, 'H', 3),
                (278, 'I', x.shape[0]),
                (279, 'I', len(data)),
                (282, 'R', rational),
                (283, 'R', rational),
                (296, 'H', 3),
                (65420, 'I', 1),
                (65421, 'f', lens),
                (65424, 'i', 0),
            ]
            here = f.tell()
            f.write(struct.pack('<H', len(tags)))
            for tag, kind, value in tags:
                f.write(
                    struct.pack('<HHI', tag, {'I': 4, 'H': 3, 'R': 5, 'f': 11, 'i': 9}[kind], 1)
                    + struct.pack('<' + {'R': 'I'}.get(kind, kind), value).ljust(4, b'\0')
                )
            end = f.tell()
            f.write(bytes(8))
            f.seek(pointer)
            f.write(struct.pack('<I', here))
            f.seek(0, 2)
            pointer = end


def vms(path, rgb):
    "As Hamamatsu's NanoZoomer writes (VMS): a text that names a JPEG in tiles of restart intervals, a small one of the whole, and the macro photograph."
    rgb = rgb[:640, :512]
    images = {
        'ImageFile': rgb,
        'MapFile': rgb[::8, ::8],
        'MacroImage': np.full((60, 160, 3), 9, np.uint8),
    }
    lines = ['[Virtual Microscope Specimen]', 'NoLayers=1', 'NoJpegColumns=1', 'NoJpegRows=1']
    for key, image in images.items():
        file = path.with_name(f'{path.stem}-{key}.jpg')
        data = vips(image).jpegsave_buffer(Q=95, subsample_mode='off', restart_interval=4)
        file.write_bytes(data)
        lines.append(f'{key}={file.name}')
    lines += [f'PhysicalWidth={512 * SPACING * 1000:.0f}']
    lines += [f'PhysicalHeight={640 * SPACING * 1000:.0f}', 'SourceLens=20']
    path.write_text('\n'.join(lines) + '\n')


def mirax(path, rgb, tile=64):
    "As 3DHISTECH's scanners write (MRXS): tiles of two levels in a data file, where they lie in an index, and what they mean in an INI file."
    folder, ident = path.with_suffix(''), 'AB' * 16
    folder.mkdir()
    path.write_bytes(jpeg(rgb[::8, ::8]))
    rows, columns = (n // (2 * tile) * 2 for n in rgb.shape[:2])
    data, pages = b'', []
    for f in (1, 2):
        x, entries = (
            rgb[: rows * tile, : columns * tile]
            .reshape(rows * tile // f, f, columns * tile // f, f, 3)
            .mean((1, 3))
            .astype(np.uint8),
            [],
        )
        for r in range(0, rows, f):
            for c in range(0, columns, f):
                part = jpeg(x[r * tile // f :][:tile, c * tile // f :][:, :tile])
                entries.append((r * columns + c, len(data), len(part), 0))
                data += part
        pages.append(
            struct.pack('<ii', len(entries), 0) + b''.join(struct.pack('<4i', *e) for e in entries)
        )
    (folder / 'Data0000.dat').write_bytes(data)
    head = b'01.02' + ident.encode()
    table = len(head) + 8
    records = table + 4 * len(pages)
    first = records + 8 * len(pages)
    at = [first + sum(map(len, pages[:k])) for k in range(len(pages))]
    (folder / 'Index.dat').write_bytes(
        head
        + struct.pack('<ii', table, 0)
        + b''.join(struct.pack('<i', records + 8 * k) for k in range(len(pages)))
        + b''.join(struct.pack('<ii', 0, a) for a in at)
        + b''.join(pages)
    )

    def section(name, **values):
        return f'[{name}]\n' + ''.join(f'{k} = {v}\n' for k, v in values.items())

    levels = ''.join(
        section(
            f'LAYER_0_LEVEL_{k}_SECTION',
            OVERLAP_X=0,
            OVERLAP_Y=0,
            MICROMETER_PER_PIXEL_X=SPACING * 2**k,
            MICROMETER_PER_PIXEL_Y=SPACING * 2**k,
            IMAGE_FILL_COLOR_BGR=16777215,
            DIGITIZER_WIDTH=tile,
            DIGITIZER_HEIGHT=tile,
            IMAGE_CONCAT_FACTOR=k,
            IMAGE_FORMAT='JPEG',
        )
        for k in (0, 1)
    )
    (folder / 'Slidedat.ini').write_text(
        section(
            'GENERAL',
            SLIDE_ID=ident,
            IMAGENUMBER_X=columns,
            IMAGENUMBER_Y=rows,
            OBJECTIVE_MAGNIFICATION=20,
        )
        + section(
            'HIERARCHICAL',
            HIER_COUNT=1,
            NONHIER_COUNT=0,
            INDEXFILE='Index.dat',
            HIER_0_NAME='Slide zoom level',
            HIER_0_COUNT=2,
            HIER_0_VAL_0_SECTION='LAYER_0_LEVEL_0_SECTION',
            HIER_0_VAL_1_SECTION='LAYER_0_LEVEL_1_SECTION',
        )
        + section('DATAFILE', FILE_COUNT=1, FILE_0='Data0000.dat')
        + levels
    )


def every_format(folder):
    "Dict: name -> path of a slide, all of the same pixels but for `sample.svs`, what a format loses, and rows and columns that do not fill a tile where it has whole tiles only."
    folder, rgb = Path(folder), pixels()
    folder.mkdir(parents=True, exist_ok=True)
    tiled = dict(tile=True, tile_width=128, tile_height=128, resunit='cm')
    vips(rgb).tiffsave(str(folder / 'pages.tif'), pyramid=True, compression='deflate', **tiled)
    vips(rgb).tiffsave(
        str(folder / 'children.tif'), pyramid=True, subifd=True, compression='lzw', **tiled
    )
    vips(rgb).tiffsave(
        str(folder / 'bigtiff.tif'), pyramid=True, bigtiff=True, compression='jpeg', Q=95, **tiled
    )
    vips(rgb).tiffsave(str(folder / 'strips.tif'), compression='deflate', resunit='cm')
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
    Image.fromarray(rgb).save(folder / 'image.png')
    (folder / 'image.jpg').write_bytes(jpeg(rgb))
    vips(rgb).webpsave(str(folder / 'image.webp'), lossless=True)
    (folder / 'sample.svs').write_bytes(sample_slide().read_bytes())
    return {name: folder / name for name in FORMATS}
