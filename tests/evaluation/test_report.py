"Reports as folders: whether their pages are in order, what they hold, and what stops them."

import base64
import csv
import html
import io
import json
import re
import shutil

import numpy as np
import pytest
from refusals import refusal
from reports import check_page, check_report

from streaming_pathology.evaluation.heatmaps import FORMAT, save_heatmap
from streaming_pathology.evaluation.report import write_report
from streaming_pathology.evaluation.report_inputs import read_run, toy_run
from streaming_pathology.evaluation.review import CATEGORIES, errors_of, numbered
from streaming_pathology.io import write_csv, write_whole
from streaming_pathology.outputs import REPORT

EVIL = '"><img src=x onerror=alert(1)>\'</title></style></script><script>alert(2)</script>&amp;'
ABOUT = dict(format=FORMAT, model='0', method='occlusion', region_threshold=0.5)
SCALE = dict(seen=[360, 520], step=32, top=1.0)


def files(folder):
    "{path: content} of all files below a folder."
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob('*')
        if path.is_file()
    }


def text_of(index):
    "The text of a report's first page, if all its pages are in order."
    page, _ = check_report(index)
    return page.text


# ---- a report


@pytest.fixture(scope='module')
def report(toy, tmp_path_factory):
    return write_report(toy, tmp_path_factory.mktemp('report') / 'out')


def test_same_run_gives_same_bytes(toy, report, tmp_path):
    assert files(write_report(toy, tmp_path / 'again').parent) == files(report.parent)


def test_pages_are_in_order(report):
    page, slides = check_report(report)
    cards = [item for item in page.all('li') if 'data-name' in item]
    assert len(cards) == 25 and all(card['class'].startswith('card') for card in cards)
    assert len(slides) == 25


def test_what_the_first_page_says(toy, report):
    text = check_page(report).text
    for words in (
        'Synthetic cohort.',
        read_run(toy).metrics.estimate.interval,
        'biopsy_007',
        'resnet18',
        '911 MB',
        'false positive',
        'Unlabelled slides',
        'Brier score',
        'left out: to learn from',
    ):
        assert words in text, words


@pytest.mark.parametrize('name', ['index.html', 'slides/001.html'])
def test_policy_of_every_page(report, name):
    policy = check_page(report.parent / name).policy
    assert policy['default-src'] == ["'none'"]
    assert policy['img-src'] == ['data:', "'self'", 'file:']
    assert policy['style-src'] == ["'unsafe-inline'"]
    assert policy['form-action'] == policy['base-uri'] == ["'none'"]
    assert set(policy) == {
        'default-src',
        'img-src',
        'style-src',
        'form-action',
        'base-uri',
        'script-src',
    }
    assert policy['script-src'][-1].startswith("'sha256-")


# ---- names of others


def test_foreign_texts_stay_texts(small, tmp_path):
    run = shutil.copytree(small, tmp_path / 'run')
    line = io.StringIO()
    csv.writer(line).writerow([EVIL, 1, 'test', 0.5, 1])
    table = run / 'predictions.csv'
    table.write_text(table.read_text() + line.getvalue())
    (run / 'metrics.json').unlink()
    name = json.dumps(EVIL)
    (run / 'settings.toml').write_text(f'title = {name}\n{name} = {name}\n')
    (run / 'environment.json').write_text(json.dumps({EVIL: [EVIL, None]}))
    page, _ = check_report(write_report(run))
    assert page.texts.count(EVIL) >= 5
    assert 'Synthetic' not in page.text


# ---- without names


def test_no_file_of_a_report_without_names_has_one(toy, tmp_path):
    index = write_report(toy, tmp_path / 'handed', anonymous=True)
    check_report(index)
    texts = [path.read_text() for path in index.parent.rglob('*.html')]
    figures = [
        base64.b64decode(figure).decode()
        for text in texts
        for figure in re.findall('svg[+]xml;base64,([^"]*)', text)
    ]
    # without pictures and the numbers of maps, in whose letters any short word may occur
    plain = [re.sub('base64,[^"]*|[A-Za-z0-9+/=]{100,}', '', text) for text in texts]
    paths = [str(path.relative_to(index.parent)) for path in index.parent.rglob('*')]
    assert figures
    assert 'Slide 3' in ' '.join(plain)
    names = 'biopsy_|(?<!re)sample|train_(?!loss)|Toy'
    assert not re.search(names, ' '.join([*plain, *figures, *paths]))
    for path in index.parent.rglob('*.jpg'):
        content = path.read_bytes()
        assert b'biopsy_' not in content and b'spacing' not in content


@pytest.mark.parametrize('slide_id', ['biopsy_003', "biopsy 'O'"])
def test_notes_on_groups_name_no_slide(part, tmp_path, slide_id):
    "A slide without a site is counted, and only a report with names says which it is."
    for name in ('predictions.csv', 'cohort.csv'):
        path = part / name
        path.write_text(path.read_text().replace('biopsy_003', slide_id))
    rows = []
    for number, each in enumerate(read_run(part).predictions):
        site = '' if each.slide_id == slide_id else 'ab'[number // 2 % 2]
        rows.append(dict(slide_id=each.slide_id, site=site))
    write_csv(tmp_path / 'sites.csv', rows)
    options = dict(subgroups=['site'], cohort=tmp_path / 'sites.csv')
    named = html.unescape(write_report(part, tmp_path / 'named', **options).read_text())
    index = write_report(part, tmp_path / 'handed', anonymous=True, **options)
    text = html.unescape(index.read_text())
    assert f'({slide_id!r} is the first)' in named
    assert "slides have nothing in 'site' and are in none of its subgroups." in text
    assert slide_id not in text


def test_groups_that_show_names_are_refused(toy, tmp_path):
    message = refusal(write_report, toy, tmp_path / 'out', anonymous=True, subgroups=['patient_id'])
    assert 'would show names' in message


def test_a_damaged_cohort_is_told_without_an_auc_too(part, tmp_path):
    (part / 'metrics.json').unlink()
    cohort = part / 'cohort.csv'
    cohort.write_text(cohort.read_text() + 'biopsy_001,1,test,another\n')
    message = refusal(write_report, part, tmp_path / 'out', anonymous=True)
    assert "has the patient_id 'another' here" in message


@pytest.mark.parametrize('anonymous', [False, True])
def test_masks_are_named_only_where_names_are_shown(part, tmp_path, anonymous):
    settings = part / 'settings.toml'
    settings.write_text('command = "sp_mil"\nannotation = "masks"\n' + settings.read_text())
    text = text_of(write_report(part, tmp_path / 'out', anonymous=anonymous))
    assert 'Bulten et al.' in text
    shown = text.partition('Settings')[2].partition('Bulten')[0].replace('learn from masks', '')
    assert ('masks' in shown) != anonymous


# ---- what else it can hold


@pytest.fixture
def more(toy, tmp_path):
    "Groups, maps of another method, a comparison, and the categories of a reviewer."
    run = read_run(toy)
    slide_ids = [each.slide_id for each in run.predictions]
    write_maps(tmp_path / 'maps', slide_ids[:3])
    sites = [
        dict(slide_id=slide_id, site='ab'[number % 2])
        for number, slide_id in enumerate(sorted(slide_ids))
    ]
    write_csv(tmp_path / 'manifest.csv', sites)
    wrong, _ = errors_of(run.predictions)
    values = [(each.slide_id, each.kind, 'inflammation') for each in wrong[:2]]
    write_csv(tmp_path / 'given.csv', [dict(zip(CATEGORIES, row)) for row in values])
    write_compared(tmp_path / 'compared', run)
    return dict(
        subgroups=['site'],
        cohort=tmp_path / 'manifest.csv',
        maps=[tmp_path / 'maps'],
        comparison=tmp_path / 'compared',
        error_review=tmp_path / 'given.csv',
    )


def write_maps(folder, slide_ids):
    "A folder of maps, as sp_heatmap writes it."
    heat = np.random.default_rng(0).random((12, 17))
    write_whole(folder / 'heatmaps.json', json.dumps(ABOUT))
    for slide_id in slide_ids:
        save_heatmap(folder / f'maps/{slide_id}.npy', heat)
        write_whole(folder / f'maps/{slide_id}.json', json.dumps(SCALE))


def write_compared(folder, run):
    "A comparison, as sp_compare writes it."
    rows = [
        dict(
            slide_id=each.slide_id,
            label=each.label,
            probability_a=each.probability,
            probability_b=(number + 10) / 100,
        )
        for number, each in enumerate(run.labelled)
    ]
    write_csv(folder / 'comparison.csv', rows)
    values = dict(
        names=['mine', 'other'],
        difference=0.1,
        paired=dict(low=0, high=0.2, level=0.95),
        auc=[dict(auc=0.9, low=0.8, high=1), dict(auc=0.8, low=0.7, high=0.9)],
        delong=dict(p=0.03),
        permutation_p=0.04,
    )
    write_whole(folder / 'comparison.json', json.dumps(values))


def test_all_that_it_can_hold(toy, more, tmp_path):
    page, slides = check_report(write_report(toy, tmp_path / 'out', **more))
    for words in ('By site', 'No difference is shown', 'inflammation', 'Comparison'):
        assert words in page.text, words
    assert sum('occlusion' in slide.text for slide in slides) == 3


def test_maps_of_one_method_are_numbered(toy, more, tmp_path):
    again = shutil.copytree(tmp_path / 'maps', tmp_path / 'again')
    _, slides = check_report(write_report(toy, tmp_path / 'out', maps=[*more['maps'], again]))
    assert sum('occlusion 2' in slide.text for slide in slides) == 3


def test_a_folder_of_maps_is_given_once(toy, more, tmp_path):
    message = refusal(write_report, toy, tmp_path / 'out', maps=more['maps'] * 2)
    assert 'is given twice' in message


def test_slides_of_one_patient_are_taken_as_alike(toy, tmp_path):
    slide_ids = sorted(each.slide_id for each in read_run(toy).predictions)
    rows = [
        dict(slide_id=slide_id, patient_id=f'p{number // 2}')
        for number, slide_id in enumerate(slide_ids)
    ]
    write_csv(tmp_path / 'patients.csv', rows)
    index = write_report(toy, tmp_path / 'out', cohort=tmp_path / 'patients.csv')
    text = text_of(index)
    assert 'of 12 patients' in text and 'as one each' not in text
    assert 'slides of one patient are taken as alike in its interval' in text


def test_no_slide_is_shown_where_none_is_asked_for(toy, tmp_path):
    text = text_of(write_report(toy, tmp_path / 'out', max_slides=0))
    assert 'No slide was asked for' in text


# ---- what a reviewer wrote


@pytest.fixture
def renamed(tmp_path):
    "A run whose slides are called as a report without names calls them, but with other numbers."
    run = toy_run(tmp_path / 'few', n=12, seed=4)
    table = run / 'predictions.csv'
    text = table.read_text()
    for number, name in enumerate(sorted(re.findall('biopsy_[0-9]+', text)), 1):
        text = text.replace(name, f'Slide {number}')
    table.write_text(text)
    (run / 'metrics.json').unlink()
    (run / 'cohort.csv').unlink()
    return run


@pytest.mark.parametrize('column', ['slide_id', 'number'])
def test_categories_beyond_the_slides_shown_are_saved_with_the_rest(renamed, tmp_path, column):
    "In a report without names by numbers, which nobody takes for names."
    wrong, _ = errors_of(renamed / 'predictions.csv')
    assert len(wrong) == 3
    numbers = numbered(read_run(renamed).predictions)
    rows, expected = [], set()
    for number, each in enumerate(wrong):
        category = f'because {number}'
        shown = numbers[each.slide_id] if column == 'number' else each.slide_id
        rows.append({column: shown, 'error': each.kind, 'category': category})
        expected.add((numbers[each.slide_id], each.kind, category))
    write_csv(tmp_path / 'given.csv', rows)
    index = write_report(
        renamed,
        tmp_path / 'out',
        max_slides=1,
        anonymous=column == 'number',
        error_review=tmp_path / 'given.csv',
    )
    page, _ = check_report(index)
    fields = [field for field in page.all('input') if field.get('class') == 'category']
    written = {(int(each['data-number']), each['data-error'], each['value']) for each in fields}
    assert written == expected
    save = next(button for button in page.all('button') if button.get('id') == 'save')
    assert save['data-by'] == column


def test_categories_of_another_run_are_refused(toy, tmp_path):
    write_whole(tmp_path / 'given.csv', ','.join(CATEGORIES) + '\nx,false positive,y\n')
    message = refusal(write_report, toy, tmp_path / 'out', error_review=tmp_path / 'given.csv')
    assert 'no error of this model' in message


# ---- other tasks


def task_table(task):
    "The head and the lines of a table of predictions, and what the report says of it."
    rng = np.random.default_rng(0)
    shares = rng.dirichlet([1, 1, 1], 40)
    months = rng.exponential(20, 40) + 0.1
    if task == 'multiclass':
        head = 'slide_id,isup,split,probability_0,probability_1,probability_2'
        lines = [
            f'{number % 3},test,{one},{two},{1 - one - two}'
            for number, (one, two, _) in enumerate(shares)
        ]
        return head, lines, 'Macro-averaged AUC'
    if task == 'ordinal':
        return *task_table('multiclass')[:2], 'Quadratic kappa'
    head = 'slide_id,months,event,split,log_risk'
    lines = [f'{months[number]},{number % 2},test,{rng.normal()}' for number in range(40)]
    return head, lines, 'Concordance index'


@pytest.mark.parametrize('task', ['multiclass', 'ordinal', 'survival'])
def test_other_tasks(tmp_path, task):
    head, lines, says = task_table(task)
    run = tmp_path / task
    write_whole(run / 'settings.toml', f'task = "{task}"\n')
    numbered_lines = [f's{number},{line}' for number, line in enumerate(lines)]
    write_whole(run / 'predictions.csv', '\n'.join([head, *numbered_lines]) + '\n')
    page, _ = check_report(write_report(run))
    assert says in page.text and len(page.all('img')) == 1
    assert 'script-src' not in page.policy and not page.all('script')
    assert 'two classes' in refusal(write_report, run, error_review=tmp_path / 'given.csv')


# ---- what is missing is said


@pytest.mark.parametrize('name', ['log.csv', 'environment.json', 'cohort.csv', 'metrics.json'])
def test_missing_files_are_told(part, name):
    (part / name).unlink()
    assert f'There is no {name}' in text_of(write_report(part))


def test_missing_heatmaps_are_told(part):
    shutil.rmtree(part / 'heatmaps')
    assert 'Heatmaps were made of 0 of 5 slides' in text_of(write_report(part))


def test_missing_pictures_are_told(part):
    (part / 'images/sample.jpg').unlink()
    assert 'Pictures were made of 4 of 5 slides' in text_of(write_report(part))


def test_no_labels(part):
    head = 'slide_id,label,split,probability,seconds\n'
    (part / 'predictions.csv').write_text(head + 'sample,,test,.7,\n')
    (part / 'metrics.json').unlink()
    text = text_of(write_report(part))
    assert 'No AUC: predictions.csv has no labelled slide' in text
    assert 'There are no labelled slides' in text


def test_no_epochs(part):
    (part / 'log.csv').write_text('epoch,train_loss\n')
    assert 'no epochs yet' in text_of(write_report(part))


def test_empty_cells_of_the_log(part):
    (part / 'log.csv').write_text('epoch,train_loss,tuning_auc\n0,.5,\n')
    assert 'training loss nan' not in text_of(write_report(part))


# ---- what is damaged stops the report, and the one that was there before stays


def assert_refused(run, says):
    before = f'<meta {REPORT.says}>'
    write_whole(run / 'report/index.html', before)
    assert says in refusal(write_report, run)
    assert (run / 'report/index.html').read_text() == before
    assert not [path for path in run.iterdir() if path.name.startswith('.')]


@pytest.mark.parametrize('name', ['settings.toml', 'predictions.csv'])
def test_needed_files(part, name):
    (part / name).unlink()
    assert_refused(part, name)


@pytest.mark.parametrize('name', ['images/sample.jpg', 'heatmaps/sample.npy'])
def test_files_that_are_cut_off(part, name):
    path = part / name
    path.write_bytes(path.read_bytes()[:300])
    assert_refused(part, name)


@pytest.mark.parametrize(
    'name, text',
    [
        ('settings.toml', 'a = = 1'),
        ('predictions.csv', 'slide_id\n'),
        ('metrics.json', '{"auc": '),
        ('metrics.json', '[]'),
        ('metrics.json', '{"auc": 1}'),
        ('environment.json', '\x00'),
        ('log.csv', 'epoch,train_loss\n1,much\n'),
        ('log.csv', 'loss\n1\n'),
        ('cohort.csv', 'slide_id,label,split\na,x,test\n'),
        ('cohort.csv', 'slide_id\na\n'),
    ],
)
def test_damaged_files(part, name, text):
    (part / name).write_text(text)
    assert_refused(part, name)


@pytest.mark.parametrize(
    'change, says',
    [
        ({}, 'metrics.json'),
        (dict(draws='many'), 'metrics.json'),
        (dict(seed=-1), 'metrics.json'),
        (dict(auc=None), 'metrics.json'),
        (dict(level=2), 'level 2'),
        (dict(split='none'), 'predictions.csv has no labelled slide'),
    ],
)
def test_metrics_of_other_predictions(part, change, says):
    metrics = dict(auc=0.123, draws=1000, seed=0, level=0.95, split='test') | change
    (part / 'metrics.json').write_text(json.dumps(metrics))
    assert_refused(part, says)


# ---- where it is written


def test_no_folder_of_a_run(tmp_path):
    assert 'nowhere is no folder' in refusal(write_report, tmp_path / 'nowhere')


@pytest.mark.parametrize(
    'out, says',
    [
        ('part/log.csv/report', 'lies in the run'),
        ('part/mine', 'lies in the run'),
        ('file/report', 'cannot be written'),
        ('other', 'which no former run wrote'),
    ],
)
def test_places_that_are_refused(part, tmp_path, out, says):
    (tmp_path / 'file').write_text('x')
    write_whole(tmp_path / 'other/mine.txt', 'x')
    assert says in refusal(write_report, part, tmp_path / out)


def test_a_file_beside_a_former_report_is_not_replaced(part):
    write_whole(part / 'report/mine.txt', 'a')
    assert 'holds mine.txt' in refusal(write_report, part)


def test_unknown_columns_are_refused(part):
    assert 'grade' in refusal(write_report, part, subgroups=['grade'])


@pytest.mark.parametrize('name', ['maps', 'comparison'])
def test_missing_folders_of_others(part, tmp_path, name):
    given = [tmp_path / 'none'] if name == 'maps' else tmp_path / 'none'
    file = 'heatmaps.json' if name == 'maps' else 'comparison.json'
    assert f'{file} does not exist' in refusal(write_report, part, **{name: given})
