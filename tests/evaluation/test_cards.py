"Models for others: their cards, without anything of the machine, and the check of a file."

import json
import re
import shutil

import pytest
import torch
import yaml
from refusals import refusal

from streaming_pathology.cli.commands import sp_export
from streaming_pathology.evaluation.cards import (
    CARD_BEGINS,
    Differs,
    Statements,
    as_yaml,
    card_text,
    check_export,
    differences,
    export_with_card,
    head_of,
    headlines,
    summary_of_cohort,
    summary_of_labels,
    without_folders,
)
from streaming_pathology.evaluation.predict import (
    load_model,
    model_hash,
    read_sealed,
    with_code_beside,
    write_sealed,
)
from streaming_pathology.io import write_csv, write_whole
from streaming_pathology.training.checkpoints import load_checkpoint, save_checkpoint
from streaming_pathology.training.models import StreamingClassifier

pytestmark = pytest.mark.usefixtures('small_resnet')

NETWORK = dict(arch='resnet18', n_out=1, strip=64)
SECRET = 'Clinic North'  # a folder that nothing that is exported may name
METRICS = dict(
    auc=0.875, low=0.7, high=0.95, split='test', n=40, average_precision=dict(value=0.8, low=0.6)
)
BAGS = dict(size=64, stride=None, tissue=0.1, factors=[1], k=1, batch=8)


def save(folder, **card):
    "The best checkpoint of a network with random weights."
    torch.manual_seed(0)
    weights = dict(StreamingClassifier(**NETWORK).state_dict())
    if 'bags' in card:
        weights = {f'network.{name}': value for name, value in weights.items()}
    settings = dict(model=NETWORK, spacing=0.5, size=[2048, 2048], amp=None) | card
    return save_checkpoint(
        folder / 'checkpoints/best.pt', model=weights, settings=settings, epoch=1, seed=0
    )


@pytest.fixture(scope='module')
def run(tmp_path_factory, small_resnet):
    "The folder of a run, whose files hold paths in many places."
    folder = tmp_path_factory.mktemp('cards') / SECRET / 'study 7/run'
    settings = dict(
        command='sp_train',
        manifest=str(folder.parent / 'slides.csv'),
        weights=f'../{SECRET}/resnet.pt',
        features=f'/mnt/{SECRET}/features',
        epochs=3,
        size=[2048, 2048],
        left_out=['H2026-4711 Smith', 'H2026-4712'],
    )
    save(folder, settings=settings, labels=['label'])
    environment = dict(
        date='2026-01-01',
        git_commit='abc',
        packages={},
        machine=dict(system='Linux', cpu='a', host=SECRET),
        resumed=[f'2026-01-02, abc; --manifest was {folder.parent}/old.csv and is not'],
    )
    write_whole(folder / 'environment.json', json.dumps(environment))
    notes = [f'{folder}/predictions.csv has no patient_id', f'see {folder}']
    notes.append("1 of 4 slides have nothing in 'site' ('H2026-4713' is the first).")
    write_whole(folder / 'metrics.json', json.dumps(METRICS | dict(notes=notes)))
    rows = []
    for number in range(12):
        row = dict(slide_id=f's{number}', patient_id=f'p{number // 2}', label=number % 2)
        split = 'test' if number > 7 else 'train'
        rows.append(row | dict(path=f'/mnt/{SECRET}/s{number}.svs', split=split))
    write_csv(folder / 'cohort.csv', rows)
    return folder


@pytest.fixture(scope='module')
def exported(run, tmp_path_factory):
    "The folder that a model was exported into."
    folder = tmp_path_factory.mktemp('exported')
    statements = Statements(
        license='apache-2.0', data_license='CC BY-NC-SA 4.0', changes='the first: "one"'
    )
    export_with_card(run, folder / 'm.safetensors', folder / 'm.md', statements)
    return folder


# ---- nothing of the machine


@pytest.mark.parametrize(
    'text, expected',
    [
        ('/data/x y/slides.csv', 'slides.csv'),
        ('~/slides.csv', 'slides.csv'),
        ('C:\\Users\\me\\slides.csv', 'slides.csv'),
        ('/data/x/vit.py:make', 'vit.py:make'),
        ('weights of /data/x/a.pt and /data/y/b.pt', 'weights of a.pt and b.pt'),
        ('lies in /known/folder/a.pt', 'lies in a.pt'),
        ('lies in /known/folder', 'lies in a folder'),
        ('lies in /known/folders', 'lies in folders'),
        ('https://example.org/a/b', 'https://example.org/a/b'),
        ('1/2 of it', '1/2 of it'),
        ('timm:hf-hub:a/b', 'timm:hf-hub:a/b'),
        (3, 3),
        (None, None),
    ],
)
def test_paths_lose_their_folders(text, expected):
    assert without_folders([text, dict(a=text)], ['/known/folder']) == [expected, dict(a=expected)]


def test_nothing_that_is_exported_names_a_folder(run, exported):
    files = list(exported.iterdir())
    assert {path.name for path in files} == {'m.safetensors', 'm.md'}
    for path in files:
        content = path.read_bytes()
        names = (SECRET, 'study 7', str(run), str(exported), 'old.csv', '/mnt/', '.svs', 'H2026')
        for name in names:
            assert name.encode() not in content, name
    card, _ = read_sealed(exported / 'm.safetensors')
    assert card['settings']['manifest'] == 'slides.csv'
    assert card['settings']['weights'] == 'resnet.pt'
    assert card['settings']['epochs'] == 3
    assert card['settings']['left_out'] == 2
    text = (exported / 'm.md').read_text()
    assert '\nSlides that cannot be read or have no tissue were left out before: 2.\n' in text
    assert 'host' not in card['environment']['machine']


def test_somebodys_code_is_found_beside_the_model(tmp_path):
    "And the name of a model does not depend on where that code lies."
    encoder = dict(backbone=f'/gone/{SECRET}/vit.py:make', code='0', sha256='1')
    card = dict(model={}, features=dict(encoder=encoder, aggregator={}))
    moved = dict(model={}, features=dict(encoder=encoder | dict(backbone='vit.py:make')))
    moved['features']['aggregator'] = {}
    assert model_hash({}, card) == model_hash({}, moved)
    assert with_code_beside(moved, tmp_path / 'm.safetensors') == moved
    (tmp_path / 'vit.py').write_text('')
    found = with_code_beside(moved, tmp_path / 'm.safetensors')
    assert found['features']['encoder']['backbone'] == f'{tmp_path}/vit.py:make'
    assert model_hash({}, found) == model_hash({}, card)


# ---- what a card says


def test_the_card_of_a_run(exported):
    card, _ = read_sealed(exported / 'm.safetensors')
    assert card['schema_version'] == 3
    assert card['checkpoint']['file'] == 'best.pt' and card['checkpoint']['epoch'] == 1
    assert 'not a medical device' in card['intended_use'].lower()
    assert (card['license'], card['data_license']) == ('apache-2.0', 'CC BY-NC-SA 4.0')
    assert card['training_data'] == dict(
        train=dict(slides=8, patients=4, labels=dict(label={'0': 4, '1': 4})),
        test=dict(slides=4, patients=2, labels=dict(label={'0': 2, '1': 2})),
    )
    assert card['metrics']['auc'] == 0.875
    assert [each['changes'] for each in card['changelog']] == ['the first: "one"']
    assert card['changelog'][0]['model'] == card['sha256'][:16]


def test_an_exported_model_is_that_of_the_run(run, exported):
    model, card = load_model(exported / 'm.safetensors')
    former, former_card = load_model(run / 'checkpoints/best.pt')
    assert card['sha256'] == former_card['sha256']
    for now, before in zip(model.parameters(), former.parameters(), strict=True):
        assert torch.equal(now, before)


def test_exporting_again_adds_to_the_changelog(run, exported, tmp_path):
    path = shutil.copy(exported / 'm.safetensors', tmp_path / 'm.safetensors')
    card = export_with_card(run, path, None, Statements(changes='more slides'))
    assert [each['changes'] for each in card['changelog']] == ['the first: "one"', 'more slides']


def test_the_card_says_which_checkpoint_it_is_of(tmp_path, capsys):
    path = save(tmp_path / 'run')
    history = [dict(epoch=1, tuning_loss=0.7), dict(epoch=2, tuning_loss=0.25)]
    save_checkpoint(path, **load_checkpoint(path) | dict(epoch=2, history=history))
    assert sp_export([str(tmp_path / 'run'), str(tmp_path / 'm.safetensors')]) == 0
    words = 'best.pt: epoch 2, the lowest tuning loss (tuning loss 0.25)'
    assert f'took {words}\n' in capsys.readouterr().out
    assert f'The weights are those of {words}.' in (tmp_path / 'm.md').read_text()
    card, _ = read_sealed(tmp_path / 'm.safetensors')
    assert card['checkpoint'] == dict(
        file='best.pt', epoch=2, chosen_by='tuning_loss', value=0.25, why='the lowest tuning loss'
    )


def test_a_checkpoint_without_its_run(tmp_path):
    path = save(tmp_path / 'a')
    path.rename(tmp_path / 'alone.pt')
    card = export_with_card(tmp_path / 'alone.pt', tmp_path / 'm.safetensors', tmp_path / 'm.md')
    assert card['training_data'] == {} and card['metrics'] == {}
    text = (tmp_path / 'm.md').read_text()
    assert 'made from a checkpoint without its run' in text and 'no results' in text


def test_labels_are_counted_or_their_range_is_told():
    assert summary_of_labels(['1', '0', '1', '']) == {'0': 1, '1': 2}
    many = summary_of_labels([str(number) for number in range(31)])
    assert many == dict(lowest=0, median=15, highest=30)
    assert summary_of_cohort([dict(slide_id='a', label='1')], ['label']) == {
        'no split': dict(slides=1, patients=1, labels=dict(label={'1': 1}))
    }


# ---- as text


def head_in(path):
    "What the Hugging Face Hub reads of a file."
    text = path.read_text()
    assert text.startswith(CARD_BEGINS)
    return yaml.safe_load(text.split('---\n')[1])


def test_the_head_is_what_the_hub_reads(exported):
    head = head_in(exported / 'm.md')
    assert head['library_name'] == 'streaming_pathology'
    assert head['license'] == 'apache-2.0'
    assert 'whole-slide-image' in head['tags']
    assert head['metrics'] == ['roc_auc', 'average_precision']
    (model,) = head['model-index']
    (result,) = model['results']
    assert model['name'] == 'm'
    assert {'type'} <= result['task'].keys() and {'type', 'name'} <= result['dataset'].keys()
    assert [(each['type'], each['value']) for each in result['metrics']] == [
        ('roc_auc', 0.875),
        ('average_precision', 0.8),
    ]


def test_the_text_has_its_parts(exported):
    text = (exported / 'm.md').read_text()
    for heading in ('Intended use', 'Licences', 'Training data', 'Evaluation', 'Changes'):
        assert f'\n## {heading}\n' in text
    assert '| train | 8 | 4 | label: 0: 4, 1: 4 |' in text
    assert '| area under the ROC curve | 0.875 | 0.700 to 0.950 |' in text
    assert '\n\n\n' not in text


@pytest.mark.parametrize(
    'value',
    [
        dict(a='x: y # z', b=['- c', '"', '\\n\\', 'ä 漢 😀', '*a', 'yes', '1', ''], c=[], d={}),
        dict(a=[dict(b=[dict(c=1, d=[1.5, None, True])]), 'e'], f=dict(g=dict(h=1e-9))),
    ],
)
def test_yaml_is_read_as_it_was_meant(value):
    assert yaml.safe_load(as_yaml(value)) == value


@pytest.mark.parametrize(
    'text',
    ['1e-9', '0o17', '1_000', 'null', 'yes', 'off', '~', '', '---', '...', '- a', 'a: b', 'a #b']
    + ['?', '!a', '%a', '@a', '`a`', '[a', '{a', '>', '|', "'", '"', '\\', 'C:\\new', ' a ', 'a\tb']
    + [
        'a\nb\n---\n',
        'a\r\n\r\nb',
        '\x00\x07\x7f\x85',
        '\u2028\ufeff',
        '漢 😀',
        '\ud800',
        'a ' * 300,
    ],
    ids=ascii,
)
def test_any_text_is_one_line_of_the_head_and_stays_a_text(text):
    """Also in YAML 1.2, which the Hub reads and which has other numbers: what is no plain word is
    in double quotes, whose escapes are those of JSON and a few more."""
    (line,) = as_yaml(dict(license=text)).splitlines()
    line.encode()
    assert line.startswith('license: ')
    assert yaml.safe_load(line) == dict(license=text)
    shown = line.removeprefix('license: ')
    assert shown[0] in '"\'' or re.fullmatch('[a-z][a-z_-]*', shown)
    assert not (shown[0] == "'" and '\\' in shown)


def test_the_head_of_any_licence_ends_where_the_text_begins(exported):
    card, _ = read_sealed(exported / 'm.safetensors')
    text = card_text(card | dict(license='x\n---\n# y: z'), 'a "b": c.safetensors')
    head, body = text.split('\n---\n', 1)
    found = yaml.safe_load(head)
    assert found['license'] == 'x\n---\n# y: z'
    assert found['model-index'][0]['name'] == 'a "b": c'
    assert body.startswith('\n# ')


def test_metrics_of_other_tasks_and_those_that_are_nan():
    assert headlines(dict(auc=float('nan'), kappa=0.5))[0].kind == 'cohen_kappa'
    assert [each.value for each in headlines(dict(concordance=dict(value=0.6)))] == [0.6]
    card = dict(license='unknown', task=dict(name='survival'), metrics=dict(concordance=0.6))
    assert 'pipeline_tag' not in head_of(card, 'm')


# ---- the check


@pytest.mark.parametrize(
    'patients, high, interval',
    [
        (None, 0.9, '0.800 to 0.900'),
        (12, 0.9, '0.800 to 0.900'),
        (2, 0.9, 'no interval, as it would be of 2 patients only'),
        (None, 0.8, 'no interval, as it would have no width'),
    ],
)
def test_a_card_leaves_out_intervals_that_say_nothing_about_other_slides(patients, high, interval):
    limits = dict(low=0.8, high=high)
    metrics = dict(auc=0.8, **limits, average_precision=dict(value=0.8, **limits))
    assert [each.interval for each in headlines(metrics | dict(patients=patients))] == [
        interval
    ] * 2


def test_a_file_that_gives_what_its_card_says(exported):
    assert 'as the card says' in check_export(exported / 'm.safetensors')


def test_a_network_of_patches_is_checked_too(tmp_path):
    path = save(tmp_path / 'a', bags=BAGS)
    export_with_card(path, tmp_path / 'm.safetensors')
    assert 'as the card says' in check_export(tmp_path / 'm.safetensors')


def changed(source, target, **entries):
    "A file whose card says something else."
    card, weights = read_sealed(source)
    write_sealed(target, card | entries, weights)
    return target


@pytest.mark.parametrize(
    'noted, says',
    [
        (dict(logits=[0.51]), 'output 0 is 0.5, the card says 0.51'),
        (dict(logits=[0.5, 1.0]), 'it has 1 outputs, the card says 2'),
        (dict(logits=[float('nan')]), 'the card says nan'),
        (dict(logits=[9.0], mean_color=[1, 2, 3]), 'the painted slide is another one here'),
    ],
)
def test_where_outputs_differ(noted, says):
    found = dict(logits=[0.5], mean_color=[9, 9, 9])
    assert says in ' '.join(differences(found | noted, found))
    assert differences(found | dict(mean_color=[1, 2, 3]), found) == []
    assert (
        differences(dict(logits=[1000.5], mean_color=[9, 9, 9]), found | dict(logits=[1000])) == []
    )


def test_a_file_of_another_name_or_without_a_check(exported, tmp_path):
    path = exported / 'm.safetensors'
    other = changed(path, tmp_path / 'a.safetensors', sha256='0' * 64)
    with pytest.raises(Differs, match='the card says 0000000000000000'):
        check_export(other)
    other = changed(path, tmp_path / 'b.safetensors', check=None)
    assert 'former version' in refusal(check_export, other)


# ---- the command


def test_the_command_writes_checks_and_tells_by_its_status(run, tmp_path, capsys):
    out = tmp_path / 'm.safetensors'
    words = [str(run), str(out), '--check', '--card', str(tmp_path / 'README.md')]
    assert sp_export([*words, '--intended-use', 'tests', '--license', 'mit']) == 0
    told = capsys.readouterr().out
    assert 'README.md' in told and 'as the card says' in told
    assert head_in(tmp_path / 'README.md')['license'] == 'mit'
    assert sp_export([str(out), '--check']) == 0
    card, _ = read_sealed(out)
    assert card['intended_use'] == 'tests'
    changed(out, out, check=card['check'] | dict(logits=[99.0]))
    assert sp_export([str(out), '--check']) == 1
    assert 'the card says 99' in capsys.readouterr().err
    assert sp_export([str(out)]) == 2
    assert 'give the .safetensors file to write, or --check' in capsys.readouterr().err
    assert sp_export([str(run), '--check']) == 2
    assert '--check alone takes a .safetensors file; name a file' in capsys.readouterr().err


def test_the_command_overwrites_no_text_of_somebody_else(run, tmp_path, capsys):
    (tmp_path / 'm.md').write_text('# Mine')
    assert sp_export([str(run), str(tmp_path / 'm.safetensors')]) == 2
    assert 'm.md exists and is something else' in capsys.readouterr().err
    assert (tmp_path / 'm.md').read_text() == '# Mine' and not (tmp_path / 'm.safetensors').exists()
