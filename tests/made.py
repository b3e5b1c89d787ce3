"Slides of every format that can be made here, from the same pixels."
import struct, zipfile
from pathlib import Path
import numpy as np, pydicom, pyvips, tifffile
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian, JPEGBaseline8Bit, generate_uid
from streaming_pathology.files import sample_slide, write_tiff
from streaming_pathology.synthetic import paint_biopsy

SPACING = .5

def pixels(size=(700, 540)):
    "A painted biopsy, uint8 (height, width, 3)."
    return paint_biopsy(size, SPACING, .3, seed=11).image

def vips(rgb): return pyvips.Image.new_from_array(np.ascontiguousarray(rgb)).copy(interpretation='srgb', xres=1000/SPACING, yres=1000/SPACING)

def jpeg(rgb, quality=95): return vips(rgb).jpegsave_buffer(Q=quality, subsample_mode='off')

def ome(path, rgb, planar=False, **metadata):
    "An OME-TIFF in tiles with two more levels as SubIFDs; `planar`: each channel an image of its own."
    with tifffile.TiffWriter(path, bigtiff=True) as t:
        levels = [rgb, rgb[::2, ::2], rgb[::4, ::4]]
        if planar: levels = [np.moveaxis(l, -1, 0) for l in levels]
        kwargs = dict(photometric='minisblack', tile=(128, 128), compression='deflate') if planar else dict(photometric='rgb', tile=(128, 128), compression='deflate')
        t.write(levels[0], subifds=2, metadata=dict(axes='CYX' if planar else 'YXS', PhysicalSizeX=SPACING, PhysicalSizeXUnit='µm', PhysicalSizeY=SPACING*1000, PhysicalSizeYUnit='nm', **metadata), **kwargs)
        for l in levels[1:]: t.write(l, subfiletype=1, metadata=None, **kwargs)

def svs(path, rgb):
    "As Aperio's scanners write: level, thumbnail, level, label and macro, with the spacing in the description."
    said = f'Aperio Image Library v11.2.1 \r\n{rgb.shape[1]}x{rgb.shape[0]} [0,0 {rgb.shape[1]}x{rgb.shape[0]}] (256x256) JPEG/RGB Q=95|AppMag = 20|MPP = {SPACING}'
    kwargs = dict(photometric='rgb', metadata=None, software=False)
    with tifffile.TiffWriter(path) as t:
        t.write(rgb, tile=(256, 256), description=said, **kwargs)
        t.write(rgb[::8, ::8], rowsperstrip=16, description='Aperio Image Library v11.2.1', **kwargs)
        t.write(rgb[::4, ::4], tile=(256, 256), description='Aperio Image Library v11.2.1', **kwargs)
        t.write(np.full((60, 60, 3), 7, np.uint8), rowsperstrip=60, description='Aperio Image Library v11.2.1\r\nlabel 60x60', subfiletype=1, **kwargs)
        t.write(np.full((60, 160, 3), 9, np.uint8), rowsperstrip=60, description='Aperio Image Library v11.2.1\r\nmacro 160x60', subfiletype=9, **kwargs)

def dicom(folder, rgb, tile=128, series=None):
    "A slide in DICOM (VL Whole Slide Microscopy Image, TILED_FULL, JPEG), a file for each of two levels, a label and an overview."
    folder = Path(folder); folder.mkdir(parents=True, exist_ok=True)
    series, study, frame = series or generate_uid(), generate_uid(), generate_uid()
    kinds = [('level0', rgb, ['ORIGINAL', 'PRIMARY', 'VOLUME', 'NONE'], SPACING), ('level1', rgb[::2, ::2], ['DERIVED', 'PRIMARY', 'VOLUME', 'RESAMPLED'], 2*SPACING),
             ('label', np.full((60, 60, 3), 7, np.uint8), ['ORIGINAL', 'PRIMARY', 'LABEL', 'NONE'], 20.), ('overview', np.full((60, 160, 3), 9, np.uint8), ['ORIGINAL', 'PRIMARY', 'OVERVIEW', 'NONE'], 20.)]
    for k, (name, image, kind, spacing) in enumerate(kinds, 1):
        (h, w), t = image.shape[:2], tile if 'VOLUME' in kind else max(image.shape[:2])
        d = Dataset()
        d.file_meta = FileMetaDataset()
        d.file_meta.MediaStorageSOPClassUID = d.SOPClassUID = '1.2.840.10008.5.1.4.1.1.77.1.6'
        d.file_meta.MediaStorageSOPInstanceUID = d.SOPInstanceUID = generate_uid()
        d.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
        d.StudyInstanceUID, d.SeriesInstanceUID, d.FrameOfReferenceUID, d.Modality, d.InstanceNumber, d.PatientID, d.ImageType = study, series, frame, 'SM', k, 'secret', kind
        d.Rows = d.Columns = t
        d.TotalPixelMatrixRows, d.TotalPixelMatrixColumns = h, w
        d.SamplesPerPixel, d.PhotometricInterpretation, d.PlanarConfiguration, d.BitsAllocated, d.BitsStored, d.HighBit, d.PixelRepresentation = 3, 'YBR_FULL_422', 0, 8, 8, 7, 0
        d.LossyImageCompression, d.DimensionOrganizationType, d.NumberOfOpticalPaths, d.TotalPixelMatrixFocalPlanes = '01', 'TILED_FULL', 1, 1
        d.ImagedVolumeWidth, d.ImagedVolumeHeight = w*spacing/1000, h*spacing/1000
        origin, measures, group, path = Dataset(), Dataset(), Dataset(), Dataset()
        origin.XOffsetInSlideCoordinateSystem = origin.YOffsetInSlideCoordinateSystem = 0
        d.TotalPixelMatrixOriginSequence = [origin]
        measures.PixelSpacing, measures.SliceThickness = [spacing/1000]*2, .001
        group.PixelMeasuresSequence = [measures]; d.SharedFunctionalGroupsSequence = [group]
        path.OpticalPathIdentifier = '1'; d.OpticalPathSequence = [path]
        padded = np.pad(image, ((0, -h % t), (0, -w % t), (0, 0)), mode='edge')
        frames = [vips(padded[i:i+t, j:j+t]).jpegsave_buffer(Q=95) for i in range(0, padded.shape[0], t) for j in range(0, padded.shape[1], t)]
        d.NumberOfFrames = len(frames)
        d.PixelData = encapsulate(frames); d['PixelData'].is_undefined_length = True
        d.save_as(folder/f'{name}.dcm', enforce_file_format=True)
    return folder

def every_format(folder):
    "Dict: name -> path of a slide, all of the same pixels but for `sample.svs`, and what a format loses."
    folder, rgb = Path(folder), pixels()
    folder.mkdir(parents=True, exist_ok=True)
    tiled = dict(tile=True, tile_width=128, tile_height=128, resunit='cm')
    vips(rgb).tiffsave(str(folder/'pages.tif'), pyramid=True, compression='deflate', **tiled)
    vips(rgb).tiffsave(str(folder/'children.tif'), pyramid=True, subifd=True, compression='lzw', **tiled)
    vips(rgb).tiffsave(str(folder/'bigtiff.tif'), pyramid=True, bigtiff=True, compression='jpeg', Q=95, **tiled)
    vips(rgb).tiffsave(str(folder/'strips.tif'), compression='deflate', resunit='cm')
    ome(folder/'ome.ome.tif', rgb); ome(folder/'planar.ome.tif', rgb, planar=True)
    svs(folder/'aperio.svs', rgb)
    dicom(folder/'dicom', rgb)
    Image.fromarray(rgb).save(folder/'image.png'); (folder/'image.jpg').write_bytes(jpeg(rgb)); vips(rgb).webpsave(str(folder/'image.webp'), lossless=True)
    (folder/'sample.svs').write_bytes(sample_slide().read_bytes())
    return {p.name: p for p in sorted(folder.iterdir())}
