"A dataclass becomes a command: options, files of settings, and what is told of errors."

from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import ClassVar

import pytest

from streaming_pathology.cli.parser import COMMANDS, Command, parser_of
from streaming_pathology.core import InputError
from streaming_pathology.evaluation.auc import INTERVALS
from streaming_pathology.evaluation.predict import TTA
from streaming_pathology.mil.aggregators import aggregators
from streaming_pathology.runs import settings as names
from streaming_pathology.runs.methods import AUGMENTATIONS
from streaming_pathology.runs.settings import Settings, argument, option, pixels
from streaming_pathology.slides.tissue import STAINS
from streaming_pathology.training.models import pools
from streaming_pathology.training.tasks import TASKS


@dataclass(kw_only=True)
class Toy(Settings):
    command: ClassVar[str] = 'sp_toy'
    image: str = argument('file to look at')
    size: tuple | None = option(None, 'height,width in pixels', read=pixels)
    lr: float = option(2e-4, 'learning rate')
    amp: str | None = option(None, 'bf16 or fp16')
    flips: bool = option(True, 'flip at random')
    dry_run: bool = option(False, 'only look')


def toy(settings):
    "A toy."
    if settings.image == 'bad.png':
        raise InputError('bad.png: no image; give another')
    if settings.image == 'full':
        raise OSError(28, 'No space left on device', 'out.csv')
    if settings.image == 'ctrl-c':
        raise KeyboardInterrupt
    print(*(getattr(settings, name) for name in Toy.options()))


@pytest.fixture
def told():
    command = Command('toy', (Toy,), toy, 'sp_toy a.png')

    def run(*words):
        out, err = StringIO(), StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            status = command([str(word) for word in words])
        return status, out.getvalue().strip(), err.getvalue().strip()

    yield run
    COMMANDS.pop('toy')


def test_options(told):
    found = told('a.png', '--size', '512,256', '--no-flips', '--dry-run')
    assert found == (0, 'a.png (512, 256) 0.0002 None False True', '')


def test_defaults_are_shown_as_they_are_typed():
    @dataclass(kw_only=True)
    class Painting(Settings):
        command: ClassVar[str] = 'sp_painting'
        size: tuple = option((512, 1024), 'of a slide', read=pixels)
        slide_spacing: float = option(2.0, 'microns per pixel')

    text = parser_of((Painting,), 'sp_painting', '').format_help()
    assert '(default: 512,1024)' in text
    assert text.count('options:') == 1
    assert '--slide-spacing' in text and '--slide_spacing' not in text


def test_both_spellings_of_an_option():
    assert parser_of((Toy,), 'sp_toy', '').parse_args(['a.png', '--dry-run']).dry_run


def test_settings_from_a_file(told, tmp_path):
    path = tmp_path / 'a.toml'
    text = 'image = "b.png"\nsize = [512, 256]\nlr = 1\namp = ""\nflips = false\n'
    path.write_text(text + 'command = "sp_toy"\n')
    expected = f'{tmp_path}/b.png (512, 256) 3.0 None False False'
    assert told(path, '--lr', '3') == (0, expected, '')


@pytest.mark.parametrize(
    'words, status',
    [
        (['bad.png'], 2),
        (['full'], 2),
        (['ctrl-c'], 130),
        (['a.png', '--sise', '3'], 2),
        (['a.png', '--size', 'big'], 2),
        (['a.png', '--lr', 'fast'], 2),
        ([], 2),
    ],
)
def test_errors_are_one_line(told, words, status):
    found, _, err = told(*words)
    assert found == status
    assert err.startswith('error: ')
    assert '\n' not in err


@pytest.mark.parametrize(
    'words, says',
    [
        (['--sise', '3'], 'unknown option --sise; did you mean --size? (see sp_toy --help)'),
        (['--size', 'big'], "--size: 'big' is no size; give height,width in pixels, e.g. 512,256"),
        (['--lr', 'fast'], "--lr: 'fast' is not a number"),
    ],
)
def test_errors_say_what_to_do(told, words, says):
    _, _, err = told('a.png', *words)
    assert err.startswith(f'error: {says}')


@pytest.mark.parametrize(
    'text, says',
    [
        ('imgae = "b"', 'has no line image = '),
        ('image = "b"\nsise = 3', 'did you mean size?'),
        ('image = "b"\nflips = 1', 'true or false'),
        ('image = "b"\nlr = "fast"', "lr: 'fast' is not a number"),
        ('lr = 3', 'has no line image = '),
        ('image = 3', 'image is 3; it has to be a text'),
        ('lr', 'cannot be read'),
    ],
)
def test_files_that_are_refused(told, tmp_path, text, says):
    (tmp_path / 'b.toml').write_text(text)
    status, _, err = told(tmp_path / 'b.toml')
    assert status == 2
    assert says in err


def test_the_choices_of_settings_are_those_of_the_library():
    "The settings name them without loading what they name."
    from streaming_pathology.cli import commands
    from streaming_pathology.slides.synthetic import LABELS, LOOKS

    assert (commands.LOOK_NAMES, commands.LABEL_NAMES) == (LOOKS, LABELS)
    assert names.AGGREGATOR_NAMES == tuple(aggregators)
    assert {*names.TASK_NAMES} == {*TASKS}
    assert names.AUGMENTATION_NAMES == tuple(AUGMENTATIONS)
    assert names.STAIN_NAMES == tuple(STAINS)

    def choices(kind, name):
        return {*kind.options()[name].metadata['option'].choices}

    assert {*names.POOL_NAMES} == {*pools}
    assert choices(commands.EvaluateSettings, 'interval') == {*INTERVALS}
    assert choices(commands.PredictSettings, 'tta') == {*TTA}
