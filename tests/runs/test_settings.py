"Options of commands: their present and former names, their help, and what may change on resume."

import dataclasses

import pytest

from streaming_pathology.cli import commands
from streaming_pathology.cli.parser import COMMANDS, PAPER, help_of, parse, parser_of
from streaming_pathology.core import InputError
from streaming_pathology.runs.records import COMPUTATION, FIXED, FREE, changes
from streaming_pathology.runs.settings import (
    ON_RESUME,
    MILSettings,
    StreamingSettings,
    flag,
    from_values,
    read_toml,
    with_present_names,
)

KINDS = {kind.__name__: kind for command in COMMANDS.values() for kind in command.kinds}
KINDS = [*KINDS.values(), commands.DemoSettings]
OPTIONS = [(kind, name, each) for kind in KINDS for name, each in kind.options().items()]
FORMER = [
    (kind, former, name)
    for kind, name, each in OPTIONS
    for former in each.metadata['option'].former_names
]


def arguments(kind):
    "Values of the arguments of a command that have no default."
    fields = kind.options().values()
    return {each.name: 'x' for each in fields if each.default is dataclasses.MISSING}


def another_value(kind, name):
    "A value that is not the default, as a settings file has it."
    default = kind.options()[name].default
    if isinstance(default, bool):
        return not default
    if isinstance(default, float):
        return default + 0.5
    if isinstance(default, int) or name == 'top_k':
        return 42
    return '0.5'


# ---- former names


@pytest.mark.parametrize(('kind', 'former', 'name'), FORMER)
def test_a_former_name_is_no_name_of_now(kind, former, name):
    assert former not in kind.options()
    assert kind.former_names()[former] == name


@pytest.mark.parametrize('kind', KINDS, ids=lambda kind: kind.__name__)
def test_a_former_name_is_of_one_setting(kind):
    names = [former for other, former, _ in FORMER if other is kind]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(('kind', 'former', 'name'), FORMER)
def test_the_former_option_is_understood_and_not_shown(kind, former, name):
    value = another_value(kind, name)
    words = [*arguments(kind).values()]
    if value is True:
        words.append(flag(former))
    elif value is False:
        words.append(flag(f'no_{former}'))
    else:
        words += [flag(former), str(value)]
    (settings,) = parse((kind,), 'sp_toy', '', '', words, files=False)
    present = str(getattr(settings, name))
    assert present == str(value)
    assert f'{flag(former)} ' not in parser_of((kind,), 'sp_toy', '').format_help()


@pytest.mark.parametrize(('kind', 'former', 'name'), FORMER)
def test_a_settings_file_with_the_former_name_is_read(kind, former, name):
    value = another_value(kind, name)
    settings = from_values(kind, {former: value}, 'settings.toml', **arguments(kind))
    again = from_values(kind, {name: value}, 'settings.toml', **arguments(kind))
    assert settings == again
    assert not settings.is_default(name)


def test_a_settings_file_is_read_and_written_anew(tmp_path):
    path = tmp_path / 'settings.toml'
    path.write_text('command = "sp_train"\npen = false\nbatch = 4\nsave_minutes = 1.5\n')
    settings = from_values(StreamingSettings, read_toml(path), path, manifest='slides.csv')
    assert (settings.exclude_pen, settings.batch_size, settings.checkpoint_minutes) == (
        False,
        4,
        1.5,
    )
    assert not {'pen', 'batch', 'save_minutes'} & settings.as_dict().keys()


def test_a_setting_by_two_names_is_refused():
    with pytest.raises(InputError, match='batch is a former name of batch_size'):
        values = dict(batch=4, batch_size=8)
        from_values(StreamingSettings, values, 'settings.toml', manifest='slides.csv')


def test_names_that_are_no_former_ones_stay():
    values = dict(draws=3, title='a demo')
    assert with_present_names(MILSettings, values) == dict(patches_per_slide=3, title='a demo')
    assert with_present_names(StreamingSettings, values) == values


def test_a_misspelt_option_is_corrected_to_the_name_of_now():
    with pytest.raises(InputError, match='did you mean --batch-size?'):
        parse((StreamingSettings,), 'sp_train', '', '', ['slides.csv', '--batch-sise', '4'])
    with pytest.raises(InputError) as refusal:
        parse((StreamingSettings,), 'sp_train', '', '', ['slides.csv', '--copie', '4'])
    assert '--copies' not in str(refusal.value)


@pytest.mark.parametrize('kind', [StreamingSettings, MILSettings, commands.TrimSettings])
def test_pen_is_kept_or_excluded(kind):
    words = [*arguments(kind).values()]

    def excludes(*more):
        (settings,) = parse((kind,), 'sp_toy', '', '', [*words, *more], files=False)
        return settings.exclude_pen

    assert excludes() and excludes('--exclude-pen') and excludes('--pen')
    assert not excludes('--keep-pen') and not excludes('--no-pen')
    shown = parser_of((kind,), 'sp_toy', '').format_help()
    assert '--exclude-pen, --keep-pen' in shown


# ---- help


@pytest.mark.parametrize(('kind', 'name', 'each'), OPTIONS)
def test_help_says_the_default(kind, name, each):
    if each.default is dataclasses.MISSING or each.default is False:
        return
    assert '(default' in help_of(each)


@pytest.mark.parametrize('name', ['train', 'mil', 'heatmap', 'evaluate'])
def test_help_names_the_paper_that_it_speaks_of(name, capsys):
    with pytest.raises(SystemExit):
        COMMANDS[name](['--help'])
    shown = ' '.join(capsys.readouterr().out.split()).replace('- ', '-')  # lines end at hyphens
    assert 'the paper' in shown
    assert PAPER in shown
    assert 'example: sp_' in shown


def test_help_names_no_paper_without_need():
    assert 'arXiv' not in parser_of((commands.SynthSettings,), 'sp_synth', '').format_help()


# ---- what may change on resume


@pytest.mark.parametrize(('kind', 'name', 'each'), OPTIONS)
def test_each_option_has_a_rule_for_resuming(kind, name, each):
    assert kind.on_resume()[name] in ON_RESUME


def test_the_two_ways_to_train_agree_on_what_may_change():
    "And so does the demo, with other defaults."
    streaming, mil = StreamingSettings.on_resume(), MILSettings.on_resume()
    for name in streaming.keys() & mil.keys():
        assert streaming[name] == mil[name], name
    demo = commands.DemoSettings.on_resume()
    assert {
        name: demo[name] for name in demo.keys() & streaming.keys()
    }.items() <= streaming.items()


def test_what_may_change_on_resume():
    assert {'command', 'spacing', 'arch', 'patch_size', 'exclude_pen', 'stain'} <= FIXED
    assert {'workers', 'heatmaps', 'manifest', 'mean'} <= FREE
    assert COMPUTATION == {'strip', 'memory', 'patch_batch_size', 'device'}
    assert not {'lr', 'epochs', 'cohort_sha256', 'amp'} & (FIXED | FREE | COMPUTATION)


def test_a_run_of_a_version_without_stains_is_resumed():
    now = StreamingSettings(manifest='slides.csv').as_dict() | dict(weights_sha256=None)
    former = {name: value for name, value in now.items() if name != 'stain'}
    assert changes(former, now) == {}
    assert changes(former, now | dict(stain='ihc')) == dict(stain='he')
