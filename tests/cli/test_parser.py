"A dataclass becomes a command: options, files of settings, and what is told of errors."

from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import ClassVar

import pytest

from streaming_pathology.cli.parser import COMMANDS, Command, parse, parser_of
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


# ---- one settings file for several commands


@pytest.fixture
def study(told, tmp_path):
    "Write a settings file and run the toy by it."
    path = tmp_path / 'study.toml'

    def run(text, *words):
        path.write_text(text)
        return told('--settings', path, *words)

    return run


SECTION = '[toy]\nimage = "b.png"\nsize = [512, 256]\nlr = 1\namp = ""\nflips = false\n'


@pytest.mark.parametrize(
    'words, printed',
    [
        ([], 'b.png (512, 256) 1.0 None False False'),
        (['--lr', '3', '--flips'], 'b.png (512, 256) 3.0 None True False'),
        (['c.png', '--dry-run'], 'c.png (512, 256) 1.0 None False True'),
    ],
)
def test_settings_from_a_section(study, words, printed):
    assert study(SECTION, *words) == (0, printed, '')


def test_words_that_the_section_leaves_out_are_typed(study):
    assert study('[toy]\nlr = 3\n', 'c.png') == (0, 'c.png None 3.0 None True False', '')


@pytest.mark.parametrize(
    'text, says',
    [
        ('[toy]\nlr = 3', 'study.toml, section [toy], has no line image = "..."; add it, or give'),
        ('[toy]\nimage = "b"\nsise = 3', 'section [toy]: sise is no setting of sp_toy; did you'),
        ('[toy]\nimage = "b"\nxyz = 3', 'xyz is no setting of sp_toy (see sp_toy --help)'),
        ('[toy]\nimage = "b"\nflips = 1', 'flips is 1; it has to be true or false'),
        ('[toy]\nimage = "b"\nlr = "fast"', "section [toy]: lr: 'fast' is not a number"),
        ('[toy]\nimage = ""', 'image is empty; give a value'),
        ('lr = 3\n[toy]\nimage = "b"', 'the line lr = ... is in no section; put it below one'),
        ('[toys]\nlr = 3', '[toys] is no command; did you mean [toy]?'),
        ('[quilt]\nlr = 3', '[quilt] is no command; there are'),
        ('', 'has no section [toy] for sp_toy; it has nothing: add the section, or leave'),
        ('[toy', 'cannot be read'),
    ],
)
def test_sections_that_are_refused(study, text, says):
    status, _, err = study(text)
    assert status == 2
    assert says in err
    assert '\n' not in err


def test_a_value_out_of_range_is_told_with_the_file(tmp_path):
    @dataclass(kw_only=True)
    class Narrow(Settings):
        command: ClassVar[str] = 'sp_narrow'
        places: tuple[str, ...] = argument('folders', several=True)
        n: int = option(3, 'how many', minimum=1, former_names=('number',))

    def go(text, *words):
        (tmp_path / 'a.toml').write_text(text)
        words = ['--settings', str(tmp_path / 'a.toml'), *words]
        return parse((Narrow,), 'sp_narrow', '', '', words)[0]

    assert go('[narrow]\nplaces = ["a", "b"]\nnumber = 2') == Narrow(places=('a', 'b'), n=2)
    assert go('[narrow]\nplaces = "a"', '--n', '4') == Narrow(places=('a',), n=4)
    assert go('[narrow]\nplaces = "a"', 'b', '--n', '4', 'c') == Narrow(places=('b', 'c'), n=4)
    for text, says in [
        ('places = "a"\nn = 0', 'section [narrow]: n is 0; it has to be at least 1'),
        ('places = 3', r'places is 3; give a text, or several as \["...", "..."\]'),
        ('places = "a"\nn = 1\nnumber = 2', 'n is there by two names'),
    ]:
        with pytest.raises(InputError, match=says.replace('[narrow]', r'\[narrow\]')):
            go(f'[narrow]\n{text}')


def test_a_file_of_sections_in_place_of_the_first_word_names_the_option(told, tmp_path):
    (tmp_path / 'study.toml').write_text(SECTION)
    _, _, err = told(tmp_path / 'study.toml')
    assert 'has a section for each command; give it by --settings' in err


def test_help_says_which_section_is_read(told):
    assert 'from its section [toy]' in ' '.join(
        parser_of((Toy,), 'sp_toy', '').format_help().split()
    )
