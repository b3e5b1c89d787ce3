"What is made from the notebooks is what they say, and the notebooks are fit to be read: nothing here changes the checkout."

import ast
import configparser
import importlib
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from execnb.nbio import nb2str, read_nb
from nbdev.clean import clean_nb
from notebooks import NBS, ROOT, cells, flags, name, notebooks

CONFIG = configparser.ConfigParser(delimiters=['='])
CONFIG.read(ROOT / 'settings.ini', encoding='utf-8')
CONFIG = CONFIG['DEFAULT']
LIBRARY = ROOT / CONFIG['lib_path']

each_notebook = pytest.mark.parametrize('path', notebooks(), ids=name)


def python(*args, cwd=ROOT):
    "Run Python on a script or module; its status and all it printed."
    env = {
        k: v for k, v in os.environ.items() if k != 'IN_TEST'
    }  # nbdev exports nothing while that is set
    done = subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


# ---- what is made from the notebooks


def test_library_is_exported(tmp_path):
    "Exporting the notebooks into an empty library gives the library that is here, _modidx.py included, and no module besides."
    shutil.copytree(
        NBS, tmp_path / 'nbs', symlinks=True, ignore=shutil.ignore_patterns('.*', '_*', 'images')
    )
    shutil.copy(ROOT / 'settings.ini', tmp_path)
    (tmp_path / LIBRARY.name).mkdir()
    status, out = python(
        '-c', 'from nbdev.doclinks import nbdev_export; nbdev_export()', cwd=tmp_path
    )
    assert not status, out

    def modules(folder):
        return {
            p.relative_to(folder).as_posix(): p.read_text(encoding='utf-8')
            for p in folder.rglob('*.py')
            if p.name != '__init__.py' or p.parent == folder  # those of folders are not exported
        }

    made, here = modules(tmp_path / LIBRARY.name), modules(LIBRARY)
    differ = sorted(f for f in made.keys() | here.keys() if made.get(f) != here.get(f))
    assert not differ, (
        f'not what the notebooks say: {", ".join(differ)}; run nbdev_export and edit only notebooks'
    )


def test_folders_say_what_they_are_for():
    "In the `__init__.py` of a folder stands its line of the table in README.md, and nothing else."
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    lines = dict(re.findall(r'^\| `(\w+)` \| ([^|]+) \|', text, re.M))
    files = [*LIBRARY.glob('*/__init__.py')]
    assert files
    for path in files:
        line = lines[path.parent.name]
        expected = f'"{line[0].upper()}{line[1:]}."\n'
        assert path.read_text(encoding='utf-8') == expected, path


@pytest.mark.parametrize('command', ['format --check', 'check'])
def test_layout(command):
    "Notebooks, tests and tools are formatted and free of small faults."
    status, out = python('-m', 'ruff', *command.split(), '.')
    assert status == 0, out


def test_readme_is_the_index():
    "README.md is what nbs/index.ipynb says."
    status, out = python('tools/readme.py', '--check')
    assert not status, out


def test_public_names_are_listed():
    "tests/api.txt has the public names of the library with their parameters."
    status, out = python('tools/api.py', '--check')
    assert not status, out


def test_readme_links():
    "Files that README.md points to are there."
    links = re.findall(
        r'\]\((?!\w+:|#)([^)#\s]+)', (ROOT / 'README.md').read_text(encoding='utf-8')
    )
    assert links and not (missing := [l for l in links if not (ROOT / l).exists()]), (
        f'README.md links to {missing}'
    )


# ---- the two commands


def commands():
    "The commands of README.md: its shell blocks, in order."
    return re.findall(
        r'^```sh\n(.*?)\n```$', (ROOT / 'README.md').read_text(encoding='utf-8'), re.M | re.S
    )


def test_two_commands():
    "They stand at the top, before any heading but the title."
    assert commands()[:2] == [
        'pip install -c constraints.txt -e . && sp_demo',
        "pip install -c constraints.txt -e '.[dev]' && pytest",
    ]
    top = (ROOT / 'README.md').read_text(encoding='utf-8').split('\n## ')[0]
    assert all(command in top for command in commands()[:2])


def test_ci_runs_the_readme():
    "What .ci/run runs is the second command of README.md."
    shown = subprocess.run(
        ['bash', ROOT / '.ci' / 'run', '--show'],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert shown.stdout.strip() == commands()[1], shown.stdout + shown.stderr


def test_commands_exist():
    "Every sp_ command that README.md names is one that is installed."
    named = set(re.findall(r'\bsp_\w+', (ROOT / 'README.md').read_text(encoding='utf-8')))
    assert named <= {entry.split('=')[0] for entry in CONFIG['console_scripts'].split()}


def test_constraints():
    "constraints.txt pins each package once and exactly, and every package that settings.ini asks for."

    def normal(requirement):
        return re.sub(r'[-_.]+', '-', re.match(r'[\w.-]+', requirement)[0]).lower()

    lines = [l for l in (ROOT / 'constraints.txt').read_text().splitlines() if l and l[0] != '#']
    assert all(re.fullmatch(r'[\w.-]+==[\w.]+', l) for l in lines), [
        l for l in lines if not re.fullmatch(r'[\w.-]+==[\w.]+', l)
    ]
    pinned = [normal(l) for l in lines]
    assert len(set(pinned)) == len(pinned)
    asked = {
        normal(r) for key in CONFIG if key.endswith('requirements') for r in CONFIG[key].split()
    }
    assert asked <= set(pinned), f'not in constraints.txt: {sorted(asked - set(pinned))}'


SHIPPED = """
from pathlib import Path
import setuptools
from distutils.core import run_setup
build = run_setup('setup.py', stop_after='init').get_command_obj('build_py')
build.ensure_finalized()
build.manifest_files = {}
library = Path('streaming_pathology')
for path in build.find_data_files(str(library), str(library)):
    print(Path(path).relative_to(library).as_posix())
"""


def test_templates_are_installed():
    "A wheel holds every template, style sheet and script of the pages; a source archive too."
    status, out = python('-W', 'ignore', '-c', SHIPPED)
    assert not status, out
    shipped = set(out.splitlines())
    templates = {
        path.relative_to(LIBRARY).as_posix()
        for path in (LIBRARY / 'templates').rglob('*')
        if path.is_file()
    }
    assert len(templates) > 15
    assert templates <= shipped
    assert 'recursive-include streaming_pathology/templates *' in (ROOT / 'MANIFEST.in').read_text()


# ---- the site


def test_sidebar():
    "The sidebar lists every notebook once, and nothing that is not there."
    listed = SIDEBAR
    there = [p.relative_to(NBS).as_posix() for p in notebooks()]
    assert sorted(listed) == sorted(there), (
        f'listed but missing: {sorted(set(listed) - set(there))}; not listed: {sorted(set(there) - set(listed))}'
    )
    assert (
        (NBS / '_quarto.yml').resolve() == ROOT / '_quarto.yml'
    )  # one configuration, where nbdev and where Quarto look for it


# ---- each notebook


@each_notebook
def test_clean(path):
    "nbdev_clean would change nothing."
    nb = read_nb(path)
    clean_nb(nb, clean_ids=True)
    assert nb2str(nb) == path.read_text(encoding='utf-8'), (
        f'run nbdev_clean --fname {path.relative_to(ROOT)}'
    )


@each_notebook
def test_size(path):
    "It can be read at one go: at most 60 cells and 200 KB."
    n, size = len(json.loads(path.read_text(encoding='utf-8'))['cells']), path.stat().st_size
    assert n <= 60 and size <= 200_000, f'{n} cells, {size:,} bytes'


@each_notebook
def test_beginning(path):
    "It begins with its title and one line that says what it is for; a notebook's module has its name."
    top = cells(path, 'markdown')[0]['source']
    assert re.match(r'# [^\s#].*\n+> \S', top), top
    if re.match(r'\d\d_\w+$', path.stem):
        assert module_of(path) == named_module(path), f'no default_exp {named_module(path)}'


@each_notebook
def test_imports(path):
    "Imports stand in cells of their own: to build the site, nbdev runs every cell that holds one, and not the cells before it."
    mixed = []
    for cell in cells(path):
        if flags(cell) & {'export', 'exports', 'exporti', 'eval'}:
            continue
        tree = ast.parse(
            '\n'.join(l for l in cell['source'].split('\n') if not l.startswith(('%', '!')))
        )
        holds = any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.walk(tree))
        if holds and not all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in tree.body):
            mixed.append(re.search(r'.*\bimport\b.*', cell['source'])[0].strip())
    assert not mixed, f'imports beside other code: {mixed}'


@each_notebook
def test_executed(path):
    "Cells that show something were run before they were committed, slow ones too, and none failed."
    shows = {
        m[0]: c
        for c in cells(path)
        if not flags(c) & {'hide', 'export', 'exporti', 'eval', 'cuda'}
        and (m := re.search(r'^(print|show_doc|display|plt\.show)\(.*', c['source'], re.M))
    }
    empty = [line for line, c in shows.items() if not c['outputs']]
    assert not empty, f'without output: {empty}'
    failed = [o['evalue'] for c in cells(path) for o in c['outputs'] if o['output_type'] == 'error']
    assert not failed, f'outputs that are errors: {failed}'


MACHINE_PATH = re.compile(r'(?<![\w.])/(?:tmp|work|home|root|Users|var/folders)/[^\s\'",)]*')


def strings(value):
    "All texts in an output of a cell."
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for kind, each in value.items():
            if not kind.startswith('image/'):
                yield from strings(each)
    elif isinstance(value, list):
        for each in value:
            yield from strings(each)


@each_notebook
def test_no_machine_paths(path):
    "No output names a folder of the machine that it was made on."
    found = {
        f'cell {cell["id"]}: {match[0]}'
        for cell in cells(path)
        for text in strings(cell['outputs'])
        for match in MACHINE_PATH.finditer(text)
    }
    assert not found, sorted(found)


# ---- CONTRIBUTING.md


def exists(name):
    "Whether a module of the package, or what is in it, has this dotted name."
    parts = name.split('.')
    found = importlib.import_module(LIBRARY.name)
    for n, part in enumerate(parts, 1):
        fields = getattr(found, '__dataclass_fields__', {})
        if hasattr(found, part):
            found = getattr(found, part)
        elif part in fields:
            found = fields[part]
        else:
            try:
                found = importlib.import_module('.'.join([LIBRARY.name, *parts[:n]]))
            except ModuleNotFoundError:
                return False
    return True


def test_contributing_names_what_is_there():
    "Files and names in CONTRIBUTING.md exist: `nbs/engine/09_streaming.ipynb`, `engine.rules.rule`."
    text = (ROOT / 'CONTRIBUTING.md').read_text(encoding='utf-8')
    quoted = re.findall(r'`([^`\n]+)`', text)
    files = [q for q in quoted if re.fullmatch(r'[\w./-]+\.(ipynb|py|md|ini|txt|toml|yml)', q)]
    folders = {module.split('.')[0] for module in MODULES}
    names = [q for q in quoted if re.fullmatch(r'\w+(\.\w+)+', q) and q.split('.')[0] in folders]
    assert files and names
    missing = [f for f in files if not (ROOT / f).exists()]
    missing += [q for q in names if q not in files and not exists(q)]
    assert not missing, f'CONTRIBUTING.md names {missing}, which is not there'


# ---- the order of the modules


def named_module(path):
    "The module that a notebook exports by its name: 02_graph.ipynb in engine/ is engine.graph."
    return '.'.join([*path.relative_to(NBS).parts[:-1], path.stem[3:]])


def module_of(path):
    "The module that a notebook says that it exports."
    found = [
        m[1]
        for c in cells(path)
        if (m := re.search(r'^#\s*\|\s*default_exp ([\w.]+)$', c['source'], re.M))
    ]
    return found[0] if found else None


def files(contents):
    "The notebooks of the sidebar, in order."
    for entry in contents:
        if isinstance(entry, str):
            yield entry
        elif 'contents' in entry:
            yield from files(entry['contents'])
        else:
            yield entry['href']


SIDEBAR = list(
    files(
        yaml.safe_load((ROOT / '_quarto.yml').read_text(encoding='utf-8'))['website']['sidebar'][
            'contents'
        ]
    )
)
MODULES = {
    module: i for i, module in enumerate(module_of(NBS / f) for f in SIDEBAR) if module
}  # in reading order


def imported(source, module):
    "The modules of this package that the Python source of `module` imports; nbdev writes them as relative imports."
    package, folder = CONFIG['lib_name'], [CONFIG['lib_name'], *module.split('.')[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = (
                '.'.join(filter(None, [*folder[: len(folder) - node.level + 1], node.module or '']))
                if node.level
                else node.module
            )
            names = (
                [base]
                if base.removeprefix(package + '.') in MODULES
                else [f'{base}.{a.name}' for a in node.names]
            )
        else:
            names = []
        yield from (n.removeprefix(package + '.') for n in names if n.startswith(package + '.'))


@pytest.mark.parametrize('module', MODULES)
def test_order(module):
    "A module imports only from notebooks before its own, in the order of the sidebar."
    source = (LIBRARY / f'{module.replace(".", "/")}.py').read_text(encoding='utf-8')
    wrong = [m for m in imported(source, module) if MODULES.get(m, 99) >= MODULES[module]]
    assert not wrong, f'{module} imports {wrong}'


def test_order_sees_imports():
    assert [
        *imported(
            'from ..core import a\nfrom .graph import b\nfrom .. import core\nfrom . import layers\nimport streaming_pathology.plan, torch',
            'engine.rules',
        )
    ] == ['core', 'engine.graph', 'core', 'engine.layers', 'plan']
