"Slides that a user names: all that `Slide` opens is found in a folder, and nothing vanishes."

import json
import shutil

import made
import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread
from refusals import refusal

from streaming_pathology.core import InputError
from streaming_pathology.io import read_table
from streaming_pathology.runs.inputs import FoundSlides, Outcome, find_slides, model_file
from streaming_pathology.slides.cohorts import Case, open_slide, tiny_cohort, tiny_slide
from streaming_pathology.slides.readers import SUFFIXES, slide_files

RGB = np.full((128, 96, 3), 200, np.uint8)
CT = '1.2.840.10008.5.1.4.1.1.2'  # CT Image Storage


def files(folder, *names):
    "Empty files: whether a file is a slide is told by its name."
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def ids(found):
    return [case.slide_id for case in found.cases]


def told(entries):
    "Name -> kind, of what was left out or cannot be used."
    return {each.path.name: each.kind for each in entries}


@pytest.fixture(scope='module')
def series(tmp_path_factory):
    "Two folders of a DICOM slide each."
    folder = tmp_path_factory.mktemp('series')
    for name in 'ab':
        made.dicom(folder / name, RGB)
    return folder


def ct(series, path):
    "A CT image."
    dataset = dcmread(series / 'a/level0.dcm')
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = CT
    dataset.SeriesInstanceUID = '1.2.3'
    dataset.save_as(path)


# ---- by the names of files


def test_every_ending_of_slides(tmp_path):
    assert {'.qptiff', '.btf', '.czi', '.vms', '.svs', '.dcm', '.webp'} <= SUFFIXES
    names = [f'a{number}{suffix}' for number, suffix in enumerate(sorted(SUFFIXES))]
    found = find_slides(files(tmp_path, *names))
    assert sorted(case.path.name for case in found.cases) == sorted(names)
    assert not found.left_out and not found.unusable


def test_endings_in_capitals(tmp_path):
    assert ids(find_slides(files(tmp_path, 'A.SVS', 'b.Ome.TIF'))) == ['A', 'b.Ome']


def test_what_is_no_slide_is_told(tmp_path):
    found = find_slides(files(tmp_path, 'a.svs', 'a.xml', 'b.TXT', 'c', '.DS_Store', 'Thumbs.db'))
    assert ids(found) == ['a']
    assert told(found.left_out) == {'a.xml': '.xml', 'b.TXT': '.txt', 'c': 'no ending'}


def test_folders_below_are_part_of_the_name(tmp_path):
    names = ['b.svs', 'p1/slide.svs', 'p2/slide.svs', 'p2/deep/a.tif', '.hidden/c.svs']
    found = find_slides(files(tmp_path, *names))
    assert ids(found) == ['b', 'p1_slide', 'p2_slide', 'p2_deep_a']
    shutil.rmtree(tmp_path / 'p1')  # whatever else is there, a name stays
    assert ids(find_slides(tmp_path)) == ['b', 'p2_slide', 'p2_deep_a']


def test_what_is_hidden_is_told(tmp_path):
    "Files that macOS puts beside those of a foreign drive are none, but others may be slides."
    names = ['a.svs', '.a.tif', '._a.svs', '.old/b.svs', 'p/._c.txt', 'p/c.svs', '.DS_Store']
    found = find_slides(files(tmp_path, *names))
    assert ids(found) == ['a', 'p_c']
    hidden = dict.fromkeys(['.a.tif', '._a.svs', '._c.txt'], 'hidden file')
    assert told(found.left_out) == hidden | {'.old': 'hidden folder'}
    assert str(Outcome(found, {})).endswith('; 3 hidden files left out; 1 hidden folder left out')
    reasons = {each.path.name: each.reason for each in found.left_out}
    assert 'rename it if it is a slide' in reasons['.a.tif']
    assert 'macOS' in reasons['._a.svs']
    assert 'is a hidden folder' in reasons['.old']
    assert ids(find_slides(tmp_path / '.a.tif')) == ['_a'], 'a file that is named is taken'


def test_a_folder_of_hidden_slides(tmp_path):
    says = refusal(find_slides, files(tmp_path, '.a.svs', '.b.svs', 'c.txt'))
    assert 'no slides in this folder' in says and 'It holds .txt 1, hidden file 2' in says


def test_names_that_cannot_be_ids_fail_alone(tmp_path):
    found = find_slides(
        files(tmp_path, 'a.svs', f'{"n" * 190}.svs', 'x.svs', 'X.ndpi', 'p/b_.tif', 'p_b_.tif')
    )
    assert ids(found) == ['a']
    assert told(found.unusable) == dict.fromkeys(
        [f'{"n" * 190}.svs', 'x.svs', 'X.ndpi', 'b_.tif', 'p_b_.tif'], 'name'
    )
    reasons = ' '.join(each.reason for each in found.unusable)
    assert 'cannot be part of a file name' in reasons
    assert "2 slides have the name 'x'" in reasons and 'or give a manifest' in reasons


def test_characters_that_cannot_be_in_an_id_are_replaced(tmp_path):
    names = ['#1.svs', '=cmd.tif', 'semi;colon.tif', 'a*b?.svs', 'u\u0308.svs', 'dot..svs']
    found = find_slides(files(tmp_path, *names))
    assert not found.unusable
    assert sorted(ids(found)) == ['_1', '_cmd', 'a_b_', 'dot', 'semi_colon', '\u00fc']
    assert ids(find_slides(files(tmp_path / 'p q', '#1.svs'))) == ['_1']
    both = find_slides(files(tmp_path / 'both', '#1.svs', '_1.svs', 'c.svs'))
    assert ids(both) == ['c'] and len(both.unusable) == 2


def test_a_thumbnail_beside_a_slide_does_not_spoil_it(tmp_path):
    found = find_slides(files(tmp_path, 'a.svs', 'a.jpg', 'A.png', 'b.jpg'))
    assert sorted(ids(found)) == ['A_png', 'a', 'a_jpg', 'b']
    flat = find_slides(files(tmp_path / 'flat', 'a.jpg', 'a.png', 'c.svs'))
    assert ids(flat) == ['c'] and len(flat.unusable) == 2


def test_the_file_itself_is_taken_and_not_a_link_to_it(tmp_path):
    files(tmp_path, 'z.svs', 'z/a.svs')
    (tmp_path / 'a_link.svs').symlink_to(tmp_path / 'z.svs')
    (tmp_path / 'b_link').symlink_to(tmp_path / 'z')
    found = find_slides(tmp_path)
    assert ids(found) == ['z', 'z_a']
    assert told(found.left_out) == {'a_link.svs': 'link', 'b_link': 'link'}


def test_wrong_rows_of_a_manifest_row_by_row(tmp_path):
    files(tmp_path, 'a.svs', 'b.svs')
    manifest = tmp_path / 'm.csv'
    rows = ['slide_id,path', 'a,a.svs', 'none,none.svs', 'b,b.svs', 'a,b.svs', 'c']
    manifest.write_text('\n'.join(rows) + '\n')
    found = find_slides(manifest, labels=None, columns=(), row_by_row=True)
    assert ids(found) == ['a', 'b']
    reasons = [each.reason for each in found.unusable]
    assert len(reasons) == 4 and all(reason.startswith('line ') for reason in reasons)
    assert 'none.svs does not exist' in ' '.join(reasons)
    assert 'has 4 problems' in refusal(find_slides, manifest, labels=None, columns=())


def test_links(tmp_path):
    files(tmp_path, 'a.svs', 'p/b.svs')
    (tmp_path / 'c.svs').symlink_to(tmp_path / 'a.svs')
    (tmp_path / 'gone.svs').symlink_to(tmp_path / 'none.svs')
    (tmp_path / 'q').symlink_to(tmp_path / 'p')
    (tmp_path / 'p/round').symlink_to(tmp_path)
    found = find_slides(tmp_path)
    assert ids(found) == ['a', 'p_b']
    assert told(found.left_out) == {'c.svs': 'link', 'q': 'link', 'round': 'link'}
    assert told(found.unusable) == {'gone.svs': 'link'}


def test_a_linked_folder_elsewhere_is_searched(tmp_path):
    files(tmp_path, 'there/a.svs', 'here/b.svs')
    (tmp_path / 'here/more').symlink_to(tmp_path / 'there')
    assert ids(find_slides(tmp_path / 'here')) == ['b', 'more_a']


# ---- slides of several files


def test_mirax_is_one_slide(tmp_path):
    found = find_slides(files(tmp_path, 'm.mrxs', 'm/Slidedat.ini', 'm/Data0000.dat', 'n/x.dat'))
    assert ids(found) == ['m']
    assert told(found.left_out) == {'x.dat': '.dat'}


def test_vms_names_its_pictures(tmp_path):
    files(tmp_path, 'v.vms', 'v_map.jpg', 'v-1.jpg', 'v.opt', 'photo.jpg', 'sub/w.jpg')
    text = '[Virtual Microscope Specimen]\nMapFile=v_map.jpg\nImageFile=v-1.jpg\nOptimisationFile=v.opt\n'
    (tmp_path / 'v.vms').write_text(text + 'MacroImage=../sub/w.jpg\nImageFile(1,0)=none.jpg\n')
    assert ids(find_slides(tmp_path)) == ['photo', 'v', 'sub_w']
    names = [path.name for path in slide_files(tmp_path / 'v.vms')]
    assert names == ['v-1.jpg', 'v.opt', 'v.vms', 'v_map.jpg']


def test_dicom_beside_other_slides(series, tmp_path):
    "One DICOM file in a folder hides nothing."
    shutil.copy(series / 'a/level0.dcm', tmp_path)
    files(tmp_path, 'b.svs', 'c.tif')
    found = find_slides(tmp_path)
    assert ids(found) == ['b', 'c', 'level0']
    assert found.cases[2].path == tmp_path / 'level0.dcm'


def test_a_case_for_each_series_whatever_the_names(series, tmp_path):
    for name in 'ab':
        for number, path in enumerate(sorted((series / name).iterdir())):
            shutil.copy(path, tmp_path / f'1.2.{name}.{number}')
    ct(series, tmp_path / '1.2.c')
    found = find_slides(tmp_path)
    assert ids(found) == ['1.2.a.0', '1.2.b.0']
    assert told(found.left_out) == {'1.2.c': 'CT Image Storage'}


def test_a_folder_of_one_series_is_called_as_the_folder(series):
    found = find_slides(series)
    assert ids(found) == ['a', 'b']
    assert [case.path for case in found.cases] == [series / 'a', series / 'b']
    assert ids(find_slides(series / 'a')) == ['a']


def test_a_damaged_dicom_file_is_a_slide_that_fails(series, tmp_path):
    (tmp_path / 'cut.dcm').write_bytes((series / 'a/level0.dcm').read_bytes()[:300])
    files(tmp_path, 'b.svs')
    assert ids(find_slides(tmp_path)) == ['b', 'cut']


def test_only_a_ct(series, tmp_path):
    ct(series, tmp_path / 'a.dcm')
    with pytest.raises(InputError, match=r'no slides in this folder.*CT Image Storage 1'):
        find_slides(tmp_path)


# ---- what commands wrote


def test_of_what_commands_wrote_only_slides_are_taken(tmp_path):
    files(tmp_path, 'a.svs', 't/biopsies/b_1.tiff', 't/masks/b_1.tiff', 't/overview/b.jpg')
    (tmp_path / 't/trim.json').write_text(json.dumps(dict(override_spacing=False)))
    files(tmp_path, 'painted/slides/s.tiff', 'painted/masks/s.tiff', 'run/images/a.jpg')
    (tmp_path / 'painted/cohort.json').write_text('{"tumour_fractions": []}')
    (tmp_path / 'run/environment.json').write_text('{"streaming_pathology": 1}')
    files(tmp_path, 'maps/overlay/a.png')
    (tmp_path / 'maps/heatmaps.json').write_text('{"format": "streaming_pathology heatmaps 1"}')
    found = find_slides(tmp_path)
    assert ids(found) == ['a', 'painted_s', 't_b_1']
    assert found.cases[2].mask == tmp_path / 't/masks/b_1.tiff'
    assert told(found.left_out) == {
        't': 'what sp_trim wrote',
        'painted': 'what sp_synth wrote',
        'run': 'what sp_train wrote',
        'maps': 'what sp_heatmap wrote',
    }
    assert ids(find_slides(tmp_path / 't')) == ['b_1']


# ---- several at once


def test_manifests_folders_and_slides_together(tmp_path):
    manifest = tiny_cohort(tmp_path / 'cohort', 2)
    files(tmp_path, 'more/a.svs', 'b.tif')
    found = find_slides([manifest, tmp_path / 'more', tmp_path / 'b.tif'])
    assert ids(found) == ['s00', 's01', 'a', 'b']
    assert [case.label for case in found.cases] == [0, 1, None, None]


@pytest.mark.parametrize(
    'words, says',
    [
        (['a.svs', 'a.svs'], "is the same slide as 'a'"),
        (['.', 'p'], "is the same slide as 'p_a'"),
        (['a.svs', 'p/a.svs'], "have one name, 'a'"),
        (['none'], 'there is no such'),
        (['a.svs', 'empty'], 'empty: no slides in this folder; their names end in .bif'),
    ],
)
def test_what_is_refused(tmp_path, words, says):
    files(tmp_path, 'a.svs', 'p/a.svs', 'p/c.svs')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(InputError, match=says):
        find_slides([tmp_path / word for word in words])


def test_a_spacing_for_slides_that_say_none(tmp_path):
    tiny_slide(tmp_path / 'a.tiff', spacing=4.0)
    Image.fromarray(RGB).save(tmp_path / 'b.png')
    cases = find_slides(tmp_path, 2.0).cases
    assert [open_slide(case).spacing for case in cases] == pytest.approx([4.0, 2.0])
    assert [open_slide(case, override=True).spacing for case in cases] == [2.0, 2.0]


def test_no_slide_is_opened_for_its_spacing(tmp_path):
    "Not even those of a folder of thousands on a network drive: these files could not be opened."
    cases = find_slides(files(tmp_path, 'a.svs', 'b.tif', 'c.png'), 2.0).cases
    assert [case.spacing for case in cases] == [2.0, 2.0, 2.0]
    assert all(case.spacing_is_default for case in cases)


# ---- the network


def test_the_network_of_a_run(tmp_path):
    files(tmp_path, 'run/checkpoints/best.pt', 'other/checkpoints/point_1.pt')
    assert model_file(tmp_path / 'run') == tmp_path / 'run/checkpoints/best.pt'
    assert model_file(tmp_path / 'any.pt') == tmp_path / 'any.pt'
    with pytest.raises(InputError, match='other is a folder without checkpoints/best.pt'):
        model_file(tmp_path / 'other')


# ---- what became of slides


def test_the_counts_add_up(tmp_path):
    found = find_slides(files(tmp_path, 'a.svs', 'b.svs', 'c.svs', 'c.ndpi', 'x.txt', 'y.txt'))
    outcome = Outcome(found, dict(b='b is damaged'))
    assert str(outcome) == '4 slides found: 1 done, 3 failed; 2 left out as no slides (.txt 2)'
    assert outcome.problem().startswith('3 of 4 slides failed: b is damaged; ')
    rows = read_table(outcome.write(tmp_path / 'slides.csv'), ['name', 'status', 'reason', 'path'])
    statuses = {row['name']: row['status'] for row in rows}
    assert statuses == {
        'a': 'done',
        'b': 'failed',
        'c.svs': 'failed',
        'c.ndpi': 'failed',
        'x.txt': 'left out',
        'y.txt': 'left out',
    }
    assert all(bool(row['reason']) == (row['status'] != 'done') for row in rows)


@pytest.mark.parametrize(
    'n_links, n_hidden, says',
    [
        (1, 0, '; 1 link left out, as it leads to what is there already'),
        (0, 1, '; 1 hidden file left out'),
        (
            2,
            2,
            '; 2 links left out, as they lead to what is there already; 2 hidden files left out',
        ),
    ],
)
@pytest.mark.parametrize('n_others', [0, 1])
def test_slides_that_are_left_out_are_not_called_no_slides(
    tmp_path, n_links, n_hidden, n_others, says
):
    files(tmp_path, 'plain.tif', *(f'.{number}.tif' for number in range(n_hidden)))
    for number in range(n_links):
        (tmp_path / f'link{number}.tif').symlink_to('plain.tif')
    if n_others:
        files(tmp_path, 'x.txt')
        says = f'; 1 left out as no slides (.txt 1){says}'
    found = find_slides(tmp_path)
    assert [case.path.name for case in found.cases] == ['plain.tif']
    outcome = Outcome(found, {})
    assert str(outcome) == f'1 slide found: 1 done{says}'
    statuses = [row['status'] for row in outcome.rows()]
    assert statuses.count('left out') == n_links + n_hidden + n_others


def test_all_went_well():
    outcome = Outcome(FoundSlides([Case('a', None, 'a.svs')]), {})
    assert str(outcome) == '1 slide found: 1 done'
    assert (outcome.n_done, outcome.n_failed) == (1, 0)
