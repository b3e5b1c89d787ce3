"The errors of models, the categories that a reviewer gives them, and their table."

import pytest
from refusals import refusal

from streaming_pathology.evaluation.evaluation import Prediction, read_predictions
from streaming_pathology.evaluation.review import (
    category_table,
    errors_of,
    markdown_of,
    numbered,
    read_categories,
)
from streaming_pathology.io import write_csv

FALSE_POSITIVE, FALSE_NEGATIVE = 'false positive', 'false negative'
LABELS = [0, 0, 0, 1, 1, 1, 1, 0, None]


def write_predictions(path, probabilities):
    rows = [
        dict(slide_id=slide_id, label=label, split='test', probability=probability)
        for slide_id, label, probability in zip('abcdefghi', LABELS, probabilities)
    ]
    return write_csv(path, rows)


@pytest.fixture
def table(tmp_path):
    return write_predictions(
        tmp_path / 'predictions.csv', [0.1, 0.7, 0.2, 0.9, 0.3, 0.8, 0.65, 0.8, 0.9]
    )


@pytest.fixture
def other(tmp_path):
    return write_predictions(tmp_path / 'other.csv', [0.8, 0.7, 0.9, 0.9, 0.1, 0.8, 0.95, 0.1])


@pytest.fixture
def write_categories(tmp_path):
    def write(rows, column='slide_id'):
        columns = (column, 'error', 'category')
        return write_csv(tmp_path / 'c.csv', [dict(zip(columns, row)) for row in rows], columns)

    return write


def test_errors(table):
    wrong, threshold = errors_of(table)
    assert [(each.slide_id, each.kind) for each in wrong] == [
        ('h', FALSE_POSITIVE),
        ('b', FALSE_POSITIVE),
    ]
    assert threshold == 0.3
    assert errors_of(read_predictions(table)) == (wrong, threshold)


def test_errors_at_another_threshold(table):
    wrong, _ = errors_of(table, threshold=0.75)
    assert [(each.slide_id, each.kind) for each in wrong] == [
        ('h', FALSE_POSITIVE),
        ('e', FALSE_NEGATIVE),
        ('g', FALSE_NEGATIVE),
    ]


def test_no_errors_of_a_split_without_slides(table):
    assert 'no labelled slides' in refusal(errors_of, table, 'tuning')


def test_numbers_of_slides():
    predictions = [
        Prediction('other split', 1.0, 'tuning', 0.0),
        Prediction('unlabelled', None, 'test', 0.9),
        Prediction('unlabelled, other split', None, 'tuning', 0.9),
        Prediction('right', 1.0, 'test', 0.9),
        Prediction('wrong', 0.0, 'test', 0.9),
    ]
    assert numbered(predictions) == {
        'wrong': 1,
        'right': 2,
        'unlabelled': 3,
        'unlabelled, other split': 4,
        'other split': 5,
    }


@pytest.mark.parametrize(
    ('rows', 'says'),
    [
        ([('d', FALSE_POSITIVE, 'x')], "'d' is no error"),
        (
            [('h', FALSE_NEGATIVE, 'x')],
            "is a false positive of this model, and the table says 'false negative'",
        ),
        ([('h', FALSE_POSITIVE, 'x'), ('h', FALSE_POSITIVE, 'y')], 'twice'),
    ],
)
def test_categories_of_another_run_are_refused(table, write_categories, rows, says):
    wrong, _ = errors_of(table)
    assert says in refusal(read_categories, write_categories(rows), wrong)


def test_tables_that_have_no_categories_are_refused(table, tmp_path):
    wrong, _ = errors_of(table)
    assert 'error' in refusal(read_categories, table, wrong)
    both = [dict(slide_id='h', number=1, error=FALSE_POSITIVE, category='x')]
    write_csv(tmp_path / 'c.csv', both)
    assert 'one of the columns' in refusal(read_categories, tmp_path / 'c.csv', wrong)


def test_numbers_that_no_error_has_are_refused(other, write_categories):
    wrong, _ = errors_of(other, threshold=0.75)
    path = write_categories([(9, FALSE_POSITIVE, 'x')], 'number')
    numbers = numbered(read_predictions(other))
    assert "'9' is no error" in refusal(read_categories, path, wrong, numbers)
    assert "'9' is no error" in refusal(read_categories, path, wrong)


def test_categories_that_went_through_a_spreadsheet(table, tmp_path):
    wrong, _ = errors_of(table)
    path = tmp_path / 'excel.csv'
    text = '\ufeffslide_id;error;category\r\nh;false positive;Entzündung, dicht\r\n'
    path.write_text(text, encoding='utf-8')
    assert read_categories(path, wrong) == dict(h='Entzündung, dicht')


def test_table_of_categories(table, other, write_categories):
    wrong, _ = errors_of(table)
    rows = [('h', FALSE_POSITIVE, 'Inflammation'), ('b', FALSE_POSITIVE, '')]
    categories = read_categories(write_categories(rows), wrong)
    other_wrong, _ = errors_of(other, threshold=0.75)
    rows = [
        (3, FALSE_POSITIVE, 'inflammation'),
        (1, FALSE_POSITIVE, "'colon  epithelium"),
        (2, FALSE_NEGATIVE, 'unclear'),
    ]
    numbers = numbered(read_predictions(other))
    other_categories = read_categories(write_categories(rows, 'number'), other_wrong, numbers)
    models = {'streaming': (wrong, categories), 'MIL': (other_wrong, other_categories)}
    assert category_table(models) == [
        (
            FALSE_POSITIVE,
            [2, 2],
            [('Inflammation', [1, 1]), ('colon epithelium', [0, 1]), ('not looked at yet', [1, 0])],
        ),
        (FALSE_NEGATIVE, [0, 1], [('unclear', [0, 1])]),
    ]
    assert markdown_of(models).splitlines()[:3] == [
        '| false positives | streaming (2) | MIL (2) |',
        '|---|---|---|',
        '| Inflammation | 1 | 1 |',
    ]


def test_table_of_no_errors():
    assert category_table({'one': ([], {})}) == [
        (FALSE_POSITIVE, [0], []),
        (FALSE_NEGATIVE, [0], []),
    ]
