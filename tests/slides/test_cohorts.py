"Manifests, splits, subsets, published cohorts; and what becomes of workers."

import math
import os
import signal
import subprocess
import sys
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from refusals import refusal

from streaming_pathology.core import InputError
from streaming_pathology.slides import cohorts, slides
from streaming_pathology.slides.cohorts import (
    SPLITS,
    Case,
    apportion,
    check_files,
    check_ids,
    interleaved,
    leaks,
    open_slide,
    read_camelyon16,
    read_camelyon17,
    read_manifest,
    read_panda,
    read_split,
    resolve_splits,
    safe_id,
    settled,
    split_cohort,
    subset,
    tiny_cohort,
    tiny_slide,
    with_default_spacing,
)
from streaming_pathology.slides.datasets import check_cohort
from streaming_pathology.slides.readers import open_reader, write_tiff
from streaming_pathology.slides.synthetic import paint_biopsy
from streaming_pathology.slides.trim import Trim, trim_slides

# ---- manifests


@pytest.fixture
def refused_table(folder):
    "A function: what is said about a table of this text beside the slides of the small cohort."

    def refused(text, **options):
        path = folder / 'bad.csv'
        path.write_text(text)
        return refusal(read_manifest, path, **options)

    return refused


@pytest.mark.parametrize(
    'text, says',
    [
        ('', ['is empty']),
        ('\n \n', ['is empty']),
        (',,\n""\n', ['is empty']),
        ('slide_id,label\n', ['has a header but no rows']),
        ('slide_id|label\ns00|0\n', ["separated by '|'"]),
        ('slide_id\tlabel\n', ['has a header but no rows']),
        ('slide_id;Label\ns00;0\n', ["has no column 'label' but 'Label'"]),
        ('slide_id,label,spacing\ns00,0,0,25\n', ['4 values for 3', 'with a point']),
        ('slide_id,label,spacing\ns00,0\n', ['2 values for 3', 'left empty']),
        ('slide_id,label,note\ns00,0,a,b\n', ['4 values for 3', 'quotation marks']),
        ('slide_id;label;spacing\ns00;0;1;25\n', ['4 values for 3 columns']),
        ('Slide_ID,label\n', ["'Slide_ID'; rename it to 'slide_id', or"]),
        ('slide_id,Label,path\n', ["has no column 'label' but 'Label'", 'rename it']),
        ('label,path\n1,x\n', ["has no column 'slide_id'", 'label, path']),
        ('slide_id,label,Split\n', ["no column 'split' but 'Split'"]),
        ('slide_id,label,Patient ID\n', ["but 'Patient ID'"]),
        ('slide_id,label,spaceing\n', ["but 'spaceing'"]),
        ('slide_id,label,Path\n', ["but 'Path'"]),
        ('slide_id,label,label\n', ['twice']),
        ('slide_id,label\n"s00,0\n', ['line 2', 'CSV']),
        ('slide_id,label\ns00,0_1\n', ["'0_1' is no number"]),
        ('slide_id,label\ns00,nan\n', ["line 2: label 'nan' is no number"]),
        ('slide_id,label\ns00,0\ns02,0\n', ['every label is 0']),
        ('slide_id,label\ns00,\n', ['no slide has a label']),
        ('slide_id,label\ns00,0\ns00,1\n', ["line 3: slide_id 's00' was given on line 2"]),
        ('slide_id,label\ns00,0\nmissing,1\n', ["line 3: slide 'missing' has no path"]),
        ('slide_id,label,split\ns00,0,dev\n', ["line 2: split 'dev'", 'train, tuning, test']),
        ('slide_id,label,split\ns00,,train\n', ['no label']),
        ('slide_id,label,spacing\ns00,0,-1\n', ["spacing '-1'"]),
        ('slide_id,label,spacing\ns00,0,0.00025\n', ['if it is in millimetres, write 0.25']),
        ('slide_id,label,spacing\ns00,0,2.5e-5\n', ['if it is in centimetres, write 0.25']),
        ('slide_id,label,spacing\ns00,0,2.5e-7\n', ['if it is in metres, write 0.25']),
        ('slide_id,label,spacing\ns00,0,504\n', ['if it is in nanometres, write 0.504']),
        (
            'slide_id,label,path\ns00,0,slides\\s00.tiff\n',
            ['slides/s00.tiff does: write / for each \\'],
        ),
        (
            'slide_id,label,path\na,0,slides/s00.tiff\nb,1,slides/../slides/s00.tiff\n',
            ['line 3', 'was given on line 2'],
        ),
        ('slide_id,label,path\ns00,0,~nobody9/x.tiff\n', ['nobody9']),
        ('slide_id,label,path\ns00,0,slides/none.tiff\n', ['slides/none.tiff does not exist']),
        (f'slide_id,label,path\ns00,0,{"x" * 5000}\n', ['cannot be a path']),
        ('slide_id,label,path\ns00,0,a\0b\n', ['line 2']),
    ],
)
def test_bad_tables_are_refused_in_one_line(refused_table, text, says):
    message = refused_table(text)
    for part in says:
        assert part in message
    assert '\n' not in message and 'bad.csv' in message


@pytest.mark.parametrize(
    'name, split',
    [
        ('training', 'train'),
        ('train', 'train'),
        ('validation', 'tuning'),
        ('valid', 'tuning'),
        ('val', 'tuning'),
        ('tuning', 'tuning'),
        ('test', 'test'),
        ('', ''),
    ],
)
def test_splits_have_other_names(name, split):
    assert read_split(name) == split


def test_a_manifest_with_other_names_of_splits(tmp_path):
    path = tiny_cohort(tmp_path / 'cohort')
    expected = read_manifest(path)
    text = path.read_text().replace(',train', ',training').replace(',tuning', ',validation')
    path.write_text(text)
    assert 'validation' in text
    assert read_manifest(path) == expected


def test_a_slide_to_learn_from_needs_a_label_whatever_its_split_is_called(refused_table):
    message = refused_table('slide_id,label,split\ns00,,val\ns01,1,test\n')
    assert "slide 's00' is in the split val but has no label" in message


def test_all_problems_of_a_row_are_told(refused_table):
    text = 'slide_id,label,path,patient_id,split,spacing\n../s,yes,none.tiff,p,dev,0\n'
    message = refused_table(text)
    for part in ('4 problems', "slide_id '../s'", "label 'yes'", "split 'dev'", "spacing '0'"):
        assert part in message
    assert 'none.tiff' not in message  # not looked for without an id


def test_problems_between_rows_are_told(refused_table):
    message = refused_table(
        'slide_id,label,path,patient_id,split\n'
        's00,0,slides/s00.tiff,p,train\nS00,1,slides/s00.tiff,p,test\n'
    )
    for part in ("'S00' was given on line 2", 'is the slide that', "patient 'p' is in test"):
        assert part in message
    assert message.count('line 3: ') == 3


def test_many_problems_are_counted(refused_table):
    message = refused_table('slide_id,label\n' + 's00,x\n' * 20)
    assert '20 problems' in message and 'and 12 more' in message


def test_only_some_labels_are_allowed(refused_table):
    message = refused_table('slide_id,label\ns00,0\ns01,2\n', labels=(0, 1))
    assert "label '2' is none of 0, 1" in message


def test_files_that_are_no_tables_are_refused(folder, tmp_path):
    utf16 = tmp_path / 'utf16.csv'
    utf16.write_text((folder / 'manifest.csv').read_text(), encoding='utf-16')
    assert 'not UTF-8' in refusal(read_manifest, utf16)
    assert 'does not exist' in refusal(read_manifest, tmp_path / 'none.csv')
    assert 'is a folder' in refusal(read_manifest, tmp_path)


def test_what_spreadsheets_do_is_harmless(folder, cases):
    "Byte-order mark, Windows line ends, blank lines, spaces."
    text = (folder / 'manifest.csv').read_text().replace(',', ', ').replace('\n', '\r\n\r\n')
    path = folder / 'excel.csv'
    path.write_bytes(b'\xef\xbb\xbf' + text.encode())
    assert read_manifest(path) == cases
    assert read_manifest(path, need_label=False) == cases


@pytest.mark.parametrize('separator, name', [(';', 'semicolons'), ('\t', 'tabs')])
@pytest.mark.parametrize('mark', ['', '\ufeff'])
def test_columns_without_commas(folder, separator, name, mark):
    "With a byte-order mark as spreadsheets write it, and decimal commas: 0,2325 is .2325."
    lines = ['slide_id,label,size; mm,spacing', 's00,0,"1,5",0,2325', 's01,1,x,+2,0', 's04,,,']
    lines = [line.replace('"1,5"', '1.5').replace(',', separator) for line in lines]
    lines[0] = lines[0].replace('size; mm', '"size, mm"')
    for row, value in ((1, '0,2325'), (2, '+2,0')):
        lines[row] = lines[row].replace(value.replace(',', separator), value)
    path = folder / 'table.csv'
    path.write_bytes((mark + '\r\n'.join(lines)).encode())
    with pytest.warns(UserWarning) as caught:
        cases = read_manifest(path)
    assert [case.spacing for case in cases] == [0.2325, 2, None]
    assert [case.label for case in cases] == [0, 1, None]
    (told,) = [str(each.message) for each in caught]
    assert told == (
        f"{path}: its columns are separated by {name}, and 0,2325 in 'spacing' is read as 0.2325"
    )


def test_commas_stay_the_separator_where_they_are(folder):
    "As soon as slide_id is a column by commas, semicolons are text."
    path = folder / 'notes.csv'
    path.write_text('slide_id,label,a;b;c;d\ns00,0,1;2\ns01,1,\n')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert [case.label for case in read_manifest(path)] == [0, 1]


def test_times_with_a_decimal_comma(folder):
    path = folder / 'time.csv'
    path.write_text('slide_id;months;event\ns00;12,5;1\ns01;3;0\n')
    with pytest.warns(UserWarning, match=r"12,5 in 'months' is read as 12\.5"):
        cases = read_manifest(path, columns=('months', 'event'))
    assert [case.label for case in cases] == [(12.5, 1), (3, 0)]


# ---- labels by name


@pytest.fixture
def named(folder):
    "A function: the labels of a table with these texts as labels, and all that was warned."

    def read(texts, **options):
        path = folder / 'named.csv'
        lines = [f's{number:02},{label}' for number, label in enumerate(texts)]
        path.write_text('\n'.join(['slide_id,diagnosis', *lines]))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            cases = read_manifest(path, columns=('diagnosis',), **options)
        return [case.label for case in cases], [str(each.message) for each in caught]

    return read


@pytest.mark.parametrize('positive', ['tumour', ' TUMOUR', ('Tumour',)])
def test_labels_by_name(named, positive):
    "Capitals and blanks do not count; an empty label stays unknown; what became of each is told."
    texts = ['benign', 'Tumour', '', 'tumour', 'no  sample', 'benign']
    labels, told = named(texts, positive=positive, labels=(0, 1))
    assert labels == [0, 1, None, 1, 0, 0]
    (sentence,) = told
    assert "1 is 'Tumour' (1) and 'tumour' (1); 0 is 'benign' (2) and 'no  sample' (1)" in sentence


def test_several_names_and_numbers_are_positive(named):
    assert named(['3+4', '4+3', '3+3'], positive='3+4,4+3')[0] == [1, 1, 0]
    assert named(['0', '2.0', '3', '1'], positive='2,3')[0] == [0, 1, 1, 0]


def test_numbers_are_numbers_whatever_is_positive(named):
    "A table whose labels are 0 and 1 already, as those that are written here."
    labels, told = named(['0', '1', ''], positive='tumour', labels=(0, 1))
    assert labels == [0, 1, None]
    assert 'are numbers, so --positive tumour is not used' in told[0]


def test_slides_to_predict_need_no_positive_one(named):
    assert named(['benign', 'benign'], positive='tumour', need_label=False)[0] == [0, 0]
    assert named(['', ''], positive='tumour', need_label=False) == ([None, None], [])


@pytest.mark.parametrize(
    'texts, positive, says',
    [
        (['benign', 'tumour', 'benign'], None, ["'benign' (2) and 'tumour' (1)", '--positive']),
        (['benign', 'tumour'], 'tumor', ["no label in 'diagnosis' is tumor", "'tumour' (1)"]),
        (['benign', 'tumour'], ' ,', ['names no label']),
        (['tumour', 'tumour'], 'tumour', ['every label is 1']),
        (['benign', 'tumour', 'NA'], 'tumour', ["line 4: diagnosis 'NA' is no label", 'empty']),
        (['benign', 'tumour', '?'], 'tumour', ["'?' is no label"]),
        ([*'abcdefghij'], None, ["'h' (1) and 2 more"]),
    ],
)
def test_labels_by_name_that_are_refused(named, texts, positive, says):
    message = refusal(named, texts, positive=positive)
    for part in says:
        assert part in message


def test_a_number_that_is_none_gets_no_hint_of_names(named):
    assert '--positive' not in refusal(named, ['0', '1', 'nan'])


def test_several_columns_have_no_names(survival):
    message = refusal(read_manifest, survival, columns=('months', 'event'), positive='dead')
    assert 'not in months and event' in message


@pytest.mark.parametrize('name', ['cohort.xlsx', 'cohort.ODS'])
def test_spreadsheets_are_refused_with_the_way_out(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b'PK\3\4')
    assert f'{path} is a spreadsheet; open it, save the sheet as CSV' in refusal(
        read_manifest, path
    )


def test_masks_and_annotations_are_paths(folder):
    path = folder / 'masks.csv'
    path.write_text(
        'slide_id,label,mask,marks\ns00,0,slides/s02.tiff,\ns01,1,,slides/s03.tiff\ns04,1,,\n'
    )
    read = read_manifest(path, annotation='marks')
    slides = folder / 'slides'
    assert [case.mask for case in read] == [slides / 's02.tiff', None, None]
    assert [case.annotation for case in read] == [None, slides / 's03.tiff', None]
    assert "has no column 'none'" in refusal(read_manifest, path, annotation='none')


@pytest.fixture
def survival(folder):
    "A table with two columns of labels."
    path = folder / 'time.csv'
    path.write_text('slide_id,months,event\ns00,12.5,1\ns01,3,\ns02,,\n')
    return path


def test_a_label_in_several_columns(survival):
    labels = [case.label for case in read_manifest(survival, columns=('months', 'event'))]
    assert (labels[0], labels[1][0], labels[2]) == ((12.5, 1), 3, None)
    assert math.isnan(labels[1][1])


@pytest.mark.parametrize(
    'columns, says',
    [
        (('time', 'event'), "has no column 'time'"),
        (('months', 'months'), 'named twice'),
        (('months', 'split'), 'is something else'),
        (('Event',), "'Event' but 'event'"),
    ],
)
def test_columns_that_hold_no_label(survival, columns, says):
    assert says in refusal(read_manifest, survival, columns=columns)


@pytest.mark.parametrize(
    'slide_id',
    ['../x', 'a/b', 'a\\b', '.hidden', '', 'a:b', 'x' * 300, 'a\0b', '-rf', 'con.', ' '],
)
def test_ids_that_cannot_be_file_names(slide_id):
    with pytest.raises(ValueError):
        safe_id(slide_id)


@pytest.mark.parametrize(
    'slide_id', ['s1', 'TCGA-2A-A8VL-01Z-00-DX1.2C6D', 'Präparat 3 (b)', '0005f7aa']
)
def test_ids_that_can_be_file_names(slide_id):
    assert safe_id(slide_id) == slide_id


def test_two_slides_of_one_id_are_refused(cases):
    twice = [cases[0], replace(cases[1], slide_id='S00')]
    message = refusal(check_ids, twice)
    assert "have the id 's00'" in message and f'{cases[0].path} and {cases[1].path}' in message
    check_ids(cases)


def test_one_slide_of_two_ids_is_refused(cases, tmp_path):
    link = tmp_path / 'link.tiff'
    os.symlink(cases[0].path, link)
    twice = [*cases, replace(cases[1], slide_id='other', path=link)]
    assert "'other'" in refusal(check_files, twice)
    check_files(cases)


# ---- splits


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 12),
            st.sampled_from([None, 0.0, 0.0, 1.0, 1.0, 2.0]),
            st.sampled_from(['', '3', '4']),
        ),
        min_size=1,
        max_size=60,
    ),
    st.tuples(st.floats(0.1, 1), st.floats(0, 1), st.floats(0, 1)),
    st.integers(0, 9),
    st.sampled_from(['label', 'grade']),
)
def test_splits_never_leak_a_patient(rows, fractions, seed, by):
    """Whatever the patients, labels and shares: every labelled slide is in one split, every patient
    too, and the order of rows does not matter."""
    cases = [
        Case(f's{i}', label, Path('x'), f'p{patient}', grade=grade)
        for i, (patient, label, grade) in enumerate(rows)
    ]
    if all(case.label is None for case in cases):
        return
    drawn = split_cohort(cases, fractions, seed, by)
    assert leaks(drawn) == []
    assert [case.slide_id for case in drawn] == [case.slide_id for case in cases]
    for case in drawn:
        assert (case.split in SPLITS) == (case.label is not None)
    assert splits_of(split_cohort(cases[::-1], fractions, seed, by)) == splits_of(drawn)


def splits_of(cases):
    return {case.slide_id: case.split for case in cases}


@pytest.mark.parametrize(
    'n, parts',
    [(1, [1, 0, 0]), (2, [1, 1, 0]), (3, [1, 1, 1]), (6, [4, 1, 1]), (20, [14, 3, 3])],
)
def test_apportion(n, parts):
    assert apportion(n, (0.7, 0.15, 0.15)).tolist() == parts


def test_a_share_of_nothing_gets_nothing():
    assert apportion(10, (0.8, 0.2, 0)).tolist() == [8, 2, 0]


def test_parts_are_mixed_evenly():
    assert interleaved(10, (0.6, 0.2, 0.2)) == [0, 1, 0, 2, 0, 0, 1, 0, 2, 0]


@pytest.fixture
def alone():
    "40 slides without patients, half of them positive."
    return [Case(f's{i}', float(i % 2), Path('x')) for i in range(40)]


def test_without_patients_slides_are_split(alone):
    drawn = split_cohort(alone)
    assert Counter(case.split for case in drawn) == dict(train=28, tuning=6, test=6)


def test_each_grade_is_in_each_split(alone):
    "Six grades of six slides, and the shares hold."
    graded = [replace(case, grade=str(i % 6)) for i, case in enumerate(alone[:36])]
    drawn = split_cohort(graded, (4, 1, 1), by='grade')
    for split, n in zip(SPLITS, (24, 6, 6), strict=True):
        grades = [case.grade for case in drawn if case.split == split]
        assert (len(grades), len(set(grades))) == (n, 6)


def test_measures_are_spread_evenly(alone):
    drawn = split_cohort([replace(case, label=i / 7) for i, case in enumerate(alone)])
    assert Counter(case.split for case in drawn) == dict(train=28, tuning=6, test=6)
    for split in SPLITS:
        mean = np.mean([case.label for case in drawn if case.split == split])
        assert abs(mean - 39 / 14) < 0.7


def test_events_keep_their_share(alone):
    "Of times and events."
    followed = []
    for i, case in enumerate(alone):
        followed.append(replace(case, label=(i * 1.5 + 1, float(i % 4 == 0))))
    drawn = split_cohort(followed)
    for split, n in zip(SPLITS, (28, 6, 6), strict=True):
        events = [case.label[1] for case in drawn if case.split == split]
        assert abs(len(events) - n) <= 1 and abs(sum(events) - n / 4) <= 1


def test_labels_of_several_findings(alone):
    "Of which some are unknown."
    findings = []
    for i, case in enumerate(alone):
        second = math.nan if i % 8 == 1 else float(i % 4 == 0)
        findings.append(replace(case, label=(float(i % 2), second)))
    drawn = split_cohort(findings)
    positive = Counter(case.split for case in drawn if case.label[1] == 1)
    assert positive == dict(train=7, tuning=2, test=1)


@pytest.mark.parametrize(
    'fractions', [(math.nan, 1, 1), (1, math.inf, 0), 'abc', 0.7, (0.5, 0.5), (0, 1, 1), (1, -1, 1)]
)
def test_bad_fractions_are_refused(alone, fractions):
    assert 'give three' in refusal(split_cohort, alone, fractions)


def test_bad_settings_of_a_split_are_refused(cases):
    assert 'is no seed' in refusal(split_cohort, cases, seed=-1)
    assert "not by 'site'" in refusal(split_cohort, cases, by='site')


def test_a_seed_gives_other_splits(alone):
    assert split_cohort(alone, seed=1) != split_cohort(alone)


def test_cases_without_a_label_get_no_split(cases):
    unknown = Case('u', None, Path('x'), 'p00')
    assert split_cohort([*cases, unknown])[-1].split == ''


def test_leaks_names_the_slides(alone):
    same = [
        replace(alone[0], patient_id='p0', split='train'),
        replace(alone[1], patient_id='p0', split='test'),
    ]
    assert leaks(same) == ["patient 'p0' is in train (s0) and in test (s1)"]


# ---- splits that a manifest gives


def without_splits(cases):
    return [replace(case, split='') for case in cases]


def test_given_splits_stay(cases):
    assert resolve_splits(cases) == cases


def test_missing_splits_are_drawn(cases):
    without = without_splits(cases)
    assert resolve_splits(without, seed=3) == split_cohort(without, seed=3)


def test_a_validation_set_is_taken_from_train(cases):
    with pytest.warns(UserWarning, match="has no split 'tuning': 2 of the 8"):
        resolved = resolve_splits([case for case in cases if case.split != 'tuning'])
    tests = [case for case in cases if case.split == 'test']
    assert [case for case in resolved if case.split == 'test'] == tests
    assert {case.label for case in resolved if case.split == 'tuning'} == {0, 1}
    assert leaks(resolved) == []


def test_splits_of_some_are_refused(cases):
    some = without_splits(cases[:1]) + cases[1:]
    assert "no split ('s00' is the first)" in refusal(resolve_splits, some)


def test_other_names_of_splits_are_refused(cases):
    renamed = [replace(case, split='valid') if case.split == 'tuning' else case for case in cases]
    assert "split 'valid'" in refusal(resolve_splits, renamed)


def test_a_validation_set_is_needed(cases):
    without = without_splits(cases)
    assert 'nothing for tuning' in refusal(resolve_splits, without, (0.7, 0, 0.3))


def test_slides_to_train_on_are_needed(cases):
    tests = [case for case in cases if case.split == 'test']
    assert "split 'train'" in refusal(resolve_splits, tests)


def test_two_classes_to_train_on_are_needed(cases):
    positive = [case for case in cases if case.split != 'train' or case.label]
    assert 'every label is 1' in refusal(resolve_splits, positive)


def test_a_patient_in_two_splits_is_refused(cases):
    one_patient = [replace(case, patient_id='one') for case in cases]
    assert 'more than one split' in refusal(resolve_splits, one_patient)


# ---- subsets


@pytest.fixture
def graded():
    "320 slides to train on, 80 to test; a quarter is negative, the others of three grades."
    cases = []
    for i in range(400):
        grade = ('', '3', '3', '4' if i % 8 > 3 else '5')[i % 4]
        split = 'train' if i < 320 else 'test'
        cases.append(Case(f's{i}', float(i % 4 > 0), Path('x'), f'p{i}', split, grade=grade))
    return cases


def test_a_subset_is_balanced(graded):
    small = subset(graded, 60)
    counts = Counter((case.label, case.grade) for case in small if case.split == 'train')
    assert counts == {(0.0, ''): 30, (1.0, '3'): 10, (1.0, '4'): 10, (1.0, '5'): 10}
    assert len([case for case in small if case.split == 'test']) == 80


def test_a_smaller_subset_is_part_of_a_larger_one(graded):
    small, large = subset(graded, 60), subset(graded, 120)
    assert {case.slide_id for case in small} < {case.slide_id for case in large}


def test_grades_give_what_they_have(graded):
    "As many of each as there are of the rarest, then of the others."
    few = [case for case in graded if case.grade != '5' or case.slide_id in ('s3', 's11')]
    counts = Counter(case.grade for case in subset(few, 40) if case.split == 'train')
    assert counts == {'': 20, '3': 9, '4': 9, '5': 2}


@pytest.mark.parametrize(
    'args, says',
    [
        ((200,), '80 negatives'),
        ((0,), 'cannot be drawn'),
        ((60, -1), 'is no seed'),
        ((9.5,), 'whole number'),
        ((60, 0, 'train', 'x'), 'share'),
        ((60, 0, 'train', 1.5), 'share'),
    ],
)
def test_subsets_that_cannot_be_drawn(graded, args, says):
    assert says in refusal(subset, graded, *args)


# ---- PANDA


PANDA_HEADER = 'image_id,data_provider,isup_grade,gleason_score\n'
SCORES = ['negative', '0+0', '3+3', '3+4', '4+3', '5+4']
ISUP_GRADES = [0, 0, 1, 2, 3, 5]


def panda_table(providers):
    "The table of six slides, of these providers in turn."
    rows = []
    for i, (isup, score) in enumerate(zip(ISUP_GRADES, SCORES, strict=True)):
        rows.append(f'i{i},{providers[i % len(providers)]},{isup},{score}\n')
    return PANDA_HEADER + ''.join(rows)


@pytest.fixture
def panda(tmp_path):
    "Six slides, every second one from Karolinska and with a mask."
    folder = tmp_path / 'panda'
    for name in ('train_images', 'train_label_masks'):
        (folder / name).mkdir(parents=True)
    for i in range(6):
        tiny_slide(folder / f'train_images/i{i}.tiff', seed=i)
        if i % 2:
            tiny_slide(folder / f'train_label_masks/i{i}_mask.tiff', seed=i)
    (folder / 'train.csv').write_text(panda_table(['radboud', 'karolinska']))
    return folder


def test_panda_labels(panda):
    assert [(case.label, case.grade, case.mask is not None) for case in read_panda(panda)] == [
        (0, '', False),
        (0, '', True),
        (1, '3', False),
        (1, '3', True),
        (1, '4', False),
        (1, '5', True),
    ]
    assert [case.label for case in read_panda(panda, 'isup', 'radboud')] == [0, 1, 3]
    assert [case.label for case in read_panda(panda, 'secondary')] == [0, 0, 3, 4, 3, 4]


def test_panda_with_a_file_missing(panda):
    (panda / 'train_images/i3.tiff').unlink()
    assert "'i3' is the first" in refusal(read_panda, panda)
    assert len(read_panda(panda, missing=True)) == 5
    assert len(read_panda(panda, providers=['radboud'])) == 3


@pytest.mark.parametrize(
    'options', [dict(label='grade'), dict(providers=('mayo',)), dict(providers=())]
)
def test_bad_settings_of_panda_are_refused(panda, options):
    refusal(read_panda, panda, **options)


@pytest.mark.parametrize(
    'rows, says',
    [
        ('i0,radboud,1,3+9', "'3+9'"),
        ('i0,radboud,99,3+3', "line 2: isup_grade '99'"),
        (
            'i0,radboud,1,3+3\n\ni0,karolinska,1,3+3',
            "line 4: image_id 'i0' was given on line 2",
        ),
        ('i0,radbout,1,3+3', "'radbout'"),
        ('i0,radboud,0,3+3', 'contradict'),
    ],
)
def test_bad_rows_of_panda_are_refused(panda, rows, says):
    (panda / 'train.csv').write_text(f'{PANDA_HEADER}{rows}\n')
    assert says in refusal(read_panda, panda)


# ---- CAMELYON


@pytest.fixture
def camelyon16(tmp_path):
    folder = tmp_path / 'c16'
    for name in (
        'training/normal/normal_001',
        'training/tumor/tumor_001',
        'testing/images/test_001',
        'testing/images/test_002',
    ):
        path = folder / f'{name}.tif'
        path.parent.mkdir(parents=True, exist_ok=True)
        tiny_slide(path)
    reference(folder).write_text('test_001,Tumor,IDC,Macro\ntest_002,Normal,None,None\n')
    return folder


def reference(folder):
    "The table of CAMELYON16's test set."
    return folder / 'testing/reference.csv'


def test_camelyon16_labels(camelyon16):
    read = read_camelyon16(camelyon16)
    assert [(case.slide_id, case.label, case.split) for case in read] == [
        ('normal_001', 0, 'train'),
        ('tumor_001', 1, 'train'),
        ('test_001', 1, 'test'),
        ('test_002', 0, 'test'),
    ]


def test_the_first_line_of_camelyon16_is_no_header(camelyon16):
    reference(camelyon16).write_text('test_001,Tumr\n')
    assert 'line 1' in refusal(read_camelyon16, camelyon16)


def test_camelyon16_names_a_slide_twice(camelyon16):
    reference(camelyon16).write_text('test_001,Tumor\ntest_001.tif,Normal\n')
    assert "line 2: 'test_001' was given before" in refusal(read_camelyon16, camelyon16)


def test_camelyon16_with_a_header(camelyon16):
    reference(camelyon16).write_text('name,kind\ntest_001,Tumor\n')
    with pytest.warns(UserWarning, match="does not name them; 'test_002' is the first"):
        read_camelyon16(camelyon16)


def test_camelyon16_without_reference(camelyon16):
    reference(camelyon16).unlink()
    with pytest.warns(UserWarning, match='2 of 2 slides are left out'):
        read_camelyon16(camelyon16)


def test_camelyon16_with_a_file_missing(camelyon16, tmp_path):
    (camelyon16 / 'testing/images/test_002.tif').unlink()
    assert 'test_002' in refusal(read_camelyon16, camelyon16)
    assert len(read_camelyon16(camelyon16, missing=True)) == 3
    assert 'training/normal' in refusal(read_camelyon16, tmp_path)


@pytest.fixture
def camelyon16_of_aws(tmp_path):
    "All slides in one folder, masks in another, and a table with a header and the training slides."
    folder = tmp_path / 'aws'
    for name in ('images', 'masks', 'evaluation'):
        (folder / name).mkdir(parents=True)
    for name in ('normal_001', 'tumor_001', 'test_001', 'test_002'):
        tiny_slide(folder / f'images/{name}.tif')
    tiny_slide(folder / 'masks/tumor_001_mask.tif')
    (folder / 'evaluation/reference.csv').write_text(
        'image,type,class,center\nnormal_001.tif,normal,negative,0\ntumor_001.tif,tumor,macro,1\n'
        'test_001.tif,tumor,micro,0\ntest_002.tif,normal,negative,1\n'
    )
    return folder


def test_camelyon16_in_one_folder(camelyon16_of_aws):
    read = read_camelyon16(camelyon16_of_aws)
    assert [(case.slide_id, case.label, case.split, case.grade) for case in read] == [
        ('normal_001', 0, 'train', ''),
        ('tumor_001', 1, 'train', 'macro'),
        ('test_001', 1, 'test', 'micro'),
        ('test_002', 0, 'test', ''),
    ]
    annotated = {case.slide_id: case.annotation.name for case in read if case.annotation}
    assert annotated == {'tumor_001': 'tumor_001_mask.tif'}
    assert all(case.mask is None for case in read)


@pytest.mark.parametrize(
    'old, new, says',
    [
        ('normal_001.tif,normal,negative', 'normal_001.tif,tumor,macro', 'contradicts'),
        ('normal_001.tif,normal,negative', 'normal_001.tif,normal,macro', 'line 2: normal and mac'),
        ('test_002.tif', 'test_003.tif', "'test_003' is the first"),
        ('tumor,micro', 'x,y', 'line 4: the slide is neither'),
    ],
)
def test_bad_rows_of_camelyon16_are_refused(camelyon16_of_aws, old, new, says):
    table = camelyon16_of_aws / 'evaluation/reference.csv'
    table.write_text(table.read_text().replace(old, new))
    assert says in refusal(read_camelyon16, camelyon16_of_aws)


def test_other_slides_among_those_of_camelyon16_are_refused(camelyon16_of_aws):
    tiny_slide(camelyon16_of_aws / 'images/patient_000_node_0.tif')
    assert 'is not named normal_, tumor_ or test_' in refusal(read_camelyon16, camelyon16_of_aws)


@pytest.fixture
def camelyon17(tmp_path):
    folder = tmp_path / 'c17'
    (folder / 'center_0').mkdir(parents=True)
    for node in range(2):
        tiny_slide(folder / f'center_0/patient_000_node_{node}.tif')
    (folder / 'stage_labels.csv').write_text(
        'patient,stage\npatient_000.zip,pN1\npatient_000_node_0.tif,negative\n'
        'patient_000_node_1.tif,micro\n'
    )
    return folder


def test_camelyon17_labels(camelyon17):
    read = read_camelyon17(camelyon17)
    assert [(case.slide_id, case.label, case.patient_id, case.grade) for case in read] == [
        ('patient_000_node_0', 0, 'patient_000', ''),
        ('patient_000_node_1', 1, 'patient_000', 'micro'),
    ]


@pytest.mark.parametrize(
    'row, says',
    [
        ('patient_000_node_1.tif,pN1\n', "line 5: stage 'pN1' is none of"),
        ('patient_000_node_1.tif,macro\n', "line 5: 'patient_000_node_1' was given before"),
        ('patient_000_node_2.tif,macro\n', "'patient_000_node_2' is the first"),
    ],
)
def test_bad_rows_of_camelyon17_are_refused(camelyon17, row, says):
    with open(camelyon17 / 'stage_labels.csv', 'a') as table:
        table.write(row)
    assert says in refusal(read_camelyon17, camelyon17)


# ---- from a published cohort to slides that can be trained on


def published(folder, slides):
    "Painted slides under the names of a published cohort: {path: tumour fraction}."
    for seed, (name, tumour) in enumerate(slides.items()):
        biopsy = paint_biopsy((300, 520), 2.0, tumour, seed=seed)
        path = folder / name
        write_tiff(biopsy.image, path, 2.0, 'jpeg')
        if 'train_images' in name:
            mask = folder / 'train_label_masks' / f'{path.stem}_mask.tiff'
            write_tiff(biopsy.mask, mask, 2.0, nearest=True)
    return folder


def test_panda_is_split_and_trimmed(tmp_path):
    "Read, split by grade, trimmed by the masks that come with it, and read again."
    panda = published(
        tmp_path / 'panda', {f'train_images/i{i}.tiff': 0.5 * (i > 1) for i in range(6)}
    )
    (panda / 'train.csv').write_text(panda_table(['radboud']))
    cases = read_panda(panda, providers='radboud')
    assert [case.label for case in cases] == [0, 0, 1, 1, 1, 1]
    assert all(case.mask.exists() for case in cases)
    done = trim_slides(
        split_cohort(cases, by='grade'),
        tmp_path / 'out',
        Trim(spacing=4.0, min_area_mm2=0.01),
        progress=False,
    )
    assert done['slides'] == 6 and not done['failed'] and not done['warnings']
    trimmed = read_manifest(tmp_path / 'out/manifest.csv')
    assert leaks(trimmed) == []
    assert {case.grade for case in trimmed} == {'', '3', '4', '5'}
    assert len(trimmed) == done['biopsies']
    data = check_cohort(trimmed, 4.0, progress=False)
    assert len(data) == len(trimmed) and data[0]['image'].dtype.itemsize == 1


def test_camelyon16_is_split_and_read(tmp_path):
    slides = {'testing/images/test_001.tif': 0.4, 'testing/images/test_002.tif': 0.0}
    for i in range(4):
        slides[f'training/normal/normal_{i:03}.tif'] = 0.0
        slides[f'training/tumor/tumor_{i:03}.tif'] = 0.4
    folder = published(tmp_path, slides)
    reference(folder).write_text('test_001,Tumor,IDC,Macro\ntest_002,Normal,None,None\n')
    with pytest.warns(UserWarning, match='of the 8 slides of train are taken'):
        cases = resolve_splits(read_camelyon16(folder))
    for split in SPLITS:
        assert {case.label for case in cases if case.split == split} == {0, 1}
    assert len(check_cohort(cases, 4.0, progress=False)) == 10


def test_camelyon17_is_split_and_read(tmp_path):
    slides, rows = {}, ['patient,stage']
    for patient in range(6):
        rows.append(f'patient_{patient:03}.zip,pN1')
        for node, stage in enumerate(('negative', 'macro')):
            name = f'patient_{patient:03}_node_{node}.tif'
            slides[f'training/{name}'] = 0.4 * node
            rows.append(f'{name},{stage}')
    folder = published(tmp_path, slides)
    (folder / 'stage_labels.csv').write_text('\n'.join(rows) + '\n')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        cases = resolve_splits(read_camelyon17(folder))
    assert len(cases) == 12 and leaks(cases) == []
    assert len({case.patient_id for case in cases}) == 6
    assert len(check_cohort(cases, 4.0, progress=False)) == 12


# ---- workers


WAITS = """
import sys, time
from streaming_pathology.slides.trim import each_apart
if __name__ == '__main__':
    tasks = ['__import__("os").getpid()'] * 2 + ['__import__("time").sleep(600)'] * 4
    for t, value, e in each_apart(eval, tasks, workers=2):
        print(value, flush=True)
"""


def test_workers_end_with_their_parent(tmp_path):
    "Also where it is killed and can tell them nothing."
    (tmp_path / 'waits.py').write_text(WAITS)
    p = subprocess.Popen([sys.executable, tmp_path / 'waits.py'], stdout=subprocess.PIPE, text=True)
    for _ in range(2):
        p.stdout.readline()
    children = psutil.Process(p.pid).children(recursive=True)
    assert len(children) >= 2
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert not psutil.wait_procs(children, timeout=20)[1]


@pytest.mark.parametrize(
    'says, own, override, expected',
    [
        (False, None, False, 4.0),
        (False, 2.0, False, 2.0),
        (True, None, False, None),
        (True, None, True, 4.0),
        (True, 2.0, True, 2.0),
    ],
)
def test_a_spacing_for_cases_that_have_none(tmp_path, says, own, override, expected):
    """That of the manifest counts most, and that of the file more than the one for all slides.
    `expected`: the spacing of the case once its slide is read; None: that of its file."""
    path = tmp_path / ('a.tif' if says else 'a.png')
    pixels = np.full((50, 60, 3), 200, np.uint8)
    if says:
        write_tiff(pixels, path, 0.5)
    else:
        Image.fromarray(pixels).save(path)
    case = with_default_spacing(Case('a', None, path, spacing=own), 4.0)
    assert case.spacing_is_default == (own is None)
    with open_slide(case, override) as slide:
        assert slide.says_spacing == says
        assert slide.contradictions == [] or own is not None or override
        if override or not says:
            assert slide.spacing == expected
        else:
            assert slide.spacing == pytest.approx(0.5)
    if not override:
        once_read = settled(case, says)
        assert (once_read.spacing, once_read.spacing_is_default) == (expected, False)


def test_a_spacing_for_a_slide_that_cannot_be_opened(tmp_path):
    "What is wrong with it is told when it is read."
    case = with_default_spacing(Case('a', None, tmp_path / 'none.svs'), 4.0)
    assert case.spacing == 4.0
    with pytest.raises(InputError, match=r'none\.svs does not exist'):
        open_slide(case)


def test_a_cohort_is_opened_once_and_keeps_the_spacings_that_count(tmp_path, monkeypatch):
    "A spacing for all slides is that of those which say none, and is no contradiction of others."
    tiny_slide(tmp_path / 'a.tiff', spacing=8.0)
    pixels = np.asarray(open_slide(Case('a', None, tmp_path / 'a.tiff')).read(8.0))
    Image.fromarray(pixels).save(tmp_path / 'b.png')
    opened = []

    def counted(path):
        opened.append(path.name)
        return open_reader(path)

    for module in (cohorts, slides):
        monkeypatch.setattr(module, 'open_reader', counted)
    cases = [Case(name[0], None, tmp_path / name) for name in ('a.tiff', 'b.png')]
    cases = [with_default_spacing(case, 4.0) for case in cases]
    assert opened == []
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        data = check_cohort(cases, 8.0, progress=False)
    assert opened == ['a.tiff', 'b.png']
    assert [case.spacing for case in data.cases] == [None, 4.0]
    heights = [height for height, _ in (data.boxes['a'], data.boxes['b'])]
    assert heights[1] == pytest.approx(heights[0] / 2, abs=2)
