"Pictures that know their scale, tiles, layers, and the page of a slide."

import base64
import json

import numpy as np
import pytest
from PIL import Image

from streaming_pathology.core import InputError
from streaming_pathology.evaluation.viewer import (
    Layer,
    in_microns,
    map_values,
    outline_of,
    read_picture,
    save_picture,
    scale_length,
    slide_page,
    write_layer,
    write_tiles,
)


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)


# ---- pictures


def test_a_picture_that_is_made_smaller_has_larger_pixels(pixels, tmp_path):
    picture = read_picture(save_picture(tmp_path / 'a.jpg', pixels, 0.5, max_side=45))
    assert (picture.size, picture.spacing, picture.seen) == ((30, 45), 1.0, (60, 90))


@pytest.mark.parametrize('spacing', [None, 0.0])
def test_a_scale_that_is_not_known_is_not_written(pixels, tmp_path, spacing):
    picture = read_picture(save_picture(tmp_path / 'a.jpg', pixels, spacing))
    assert (picture.size, picture.spacing, picture.seen) == ((60, 90), None, (60, 90))


@pytest.mark.parametrize(
    'comment',
    [
        'x',
        'null',
        '[1]',
        '{}',
        '{"spacing": 0, "seen": [1, 2]}',
        '{"spacing": NaN, "seen": [1, 2]}',
        '{"spacing": 1, "seen": [1]}',
    ],
)
def test_other_comments_are_no_scale(pixels, tmp_path, comment):
    Image.fromarray(pixels).save(tmp_path / 'a.jpg', comment=comment)
    picture = read_picture(tmp_path / 'a.jpg')
    assert (picture.size, picture.spacing, picture.seen) == ((60, 90), None, (60, 90))


def test_damaged_and_missing_pictures_are_refused(pixels, tmp_path):
    whole = save_picture(tmp_path / 'a.jpg', pixels, 0.5).read_bytes()
    (tmp_path / 'cut.jpg').write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match='cut.jpg is damaged'):
        read_picture(tmp_path / 'cut.jpg')
    with pytest.raises(InputError):
        read_picture(tmp_path / 'no.jpg')
    with pytest.raises(InputError, match='cannot be cut into tiles'):
        write_tiles(tmp_path / 'no.jpg', tmp_path / 'tiles')


# ---- layers


def test_layers_are_no_larger_than_asked_for(tmp_path):
    path = write_layer(
        tmp_path / 'map.webp', np.random.default_rng(0).random((40, 80)), max_side=20
    )
    assert Image.open(path).size == (20, 10)


def test_outlines_are_in_thousandths_of_the_picture():
    heat = np.zeros((10, 20))
    heat[2:6, 4:10] = 1
    path = outline_of(heat, 0.5, extent=(1.0, 1.0))
    assert path.startswith('M') and path.endswith('Z') and path.count('M') == 1
    points = np.array([point.split() for point in path.strip('MZ').split('L')], float)
    assert np.allclose(points.min(0), [200, 200])
    assert np.allclose(points.max(0), [500, 600])
    assert outline_of(heat, 2.0) == ''


@pytest.mark.parametrize('largest', [1.0, 3e-9, 0.0])
def test_values_are_those_of_the_map(largest):
    heat = np.random.default_rng(0).random((10, 20)) * largest
    values = map_values(heat)
    numbers = np.frombuffer(base64.b64decode(values.numbers), '<u2').reshape(10, 20)
    assert np.allclose(numbers / 65535 * values.full, heat, rtol=0, atol=1e-5 * largest)
    assert (values.rows, values.columns) == (10, 20)
    large = map_values(np.zeros((1, 1000)))
    assert (large.rows, large.columns) == (1, 256)


# ---- the page


@pytest.mark.parametrize(
    'wanted, length', [(0.013, 0.01), (1, 1), (1.9, 1), (2, 2), (4.9, 2), (7, 5), (1234, 1000)]
)
def test_scale_bars_are_round(wanted, length):
    assert scale_length(wanted) == pytest.approx(length)


def test_lengths_in_words():
    assert in_microns(500) == '500 µm'
    assert in_microns(2000) == '2 mm'


def test_page_without_tiles_loads_no_script_beside_it():
    page = slide_page('a', 'A run', 'a.jpg', (30, 40))
    assert 'src="openseadragon' not in page
    assert 'a.jpg' in page


def test_page_has_its_layers_and_their_outlines():
    layers = [Layer('first', 'b.webp', outline='M0 0L1 1Z'), Layer('second', 'c.webp', shown=False)]
    page = slide_page('<a>', 'A run', 'a.jpg', (30, 40), layers, spacing=2.0)
    assert '<a>' not in page
    assert 'b.webp' in page and 'c.webp' in page
    assert page.count('<svg') == 1 and 'M0 0L1 1Z' in page
    assert '20 µm' in page  # a quarter of 40 pixels of 2 microns


def test_layers_of_one_map_share_its_values():
    heat = np.eye(3)
    layers = [Layer(name, f'{name}.webp', values=map_values(heat)) for name in ('a', 'b')]
    layers += [
        Layer('c', 'c.webp', (1.5, 1.0)),
        Layer('d', 'd.webp', values=map_values(heat.T * 2)),
    ]
    page = slide_page('a', 'A run', 'a.jpg', (30, 40), layers, seen=(60, 80))
    text = page[page.index('id="said">') + len('id="said">') :]
    settings = json.loads(text[: text.index('</script>')])
    assert [each['values'] for each in settings['maps']] == [0, 0, None, 1]
    assert settings['maps'][2]['extent'] == [1.5, 1.0]
    assert len(settings['values']) == 2 and settings['values'][1]['full'] == 2
    assert settings['seen'] == [60, 80]


def test_what_the_script_reads_cannot_end_its_element():
    tiles = dict(width=10, height=20, tile=510, levels=3, path='</script>')
    page = slide_page('a', '', 'a.jpg', (30, 40), tiles=tiles)
    start = page.index('id="said">') + len('id="said">')
    settings = json.loads(page[start : page.index('</script>', start)])
    assert settings.pop('tiles') == tiles
    nothing = dict(spacing=None, size=[30, 40], seen=[30, 40], maps=[], values=[])
    assert settings == nothing
