"Public functions say what they take and return, and type checkers are told so."

import ast
import configparser
import json
from pathlib import Path

import pytest
from notebooks import ROOT

LIBRARY = ROOT / 'streaming_pathology'
MODULES = sorted(
    path.relative_to(LIBRARY).as_posix()
    for path in LIBRARY.rglob('*.py')
    if path.name != '_modidx.py'
)


def public_functions(tree: ast.AST, path: str = '') -> list[tuple[str, ast.FunctionDef]]:
    "The functions and methods of a module, by name, without those inside of functions."
    found = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef) and not node.name.startswith('_'):
            found += public_functions(node, f'{path}{node.name}.')
        elif isinstance(node, ast.FunctionDef):
            special = node.name.startswith('__') and node.name.endswith('__')
            if special or not node.name.startswith('_'):
                found.append((path + node.name, node))
    return found


def unannotated(function: ast.FunctionDef) -> list[str]:
    "What a function does not say: the types of parameters, and of what it returns."
    arguments = function.args
    parameters = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    parameters += [each for each in (arguments.vararg, arguments.kwarg) if each is not None]
    missing = [each.arg for each in parameters if each.annotation is None]
    missing = [name for name in missing if name not in ('self', 'cls')]
    if function.returns is None:
        missing.append('return')
    return missing


@pytest.mark.parametrize('module', MODULES)
def test_public_functions_have_types(module):
    tree = ast.parse((LIBRARY / module).read_text(encoding='utf-8'))
    missing = {name: unannotated(function) for name, function in public_functions(tree)}
    assert not {name: parts for name, parts in missing.items() if parts}


def test_what_has_no_types_is_seen():
    source = 'def f(x, *y: int) -> None: ...\nclass A:\n    def g(self, z: int): ...'
    found = {name: unannotated(f) for name, f in public_functions(ast.parse(source))}
    assert found == {'f': ['x'], 'A.g': ['return']}


def test_py_typed_ships():
    assert (LIBRARY / 'py.typed').is_file()
    assert 'streaming_pathology/py.typed' in (ROOT / 'MANIFEST.in').read_text().split()
    calls = [
        n for n in ast.walk(ast.parse((ROOT / 'setup.py').read_text())) if isinstance(n, ast.Call)
    ]
    (data,) = [k.value for call in calls for k in call.keywords if k.arg == 'package_data']
    assert 'py.typed' in ast.literal_eval(data)['streaming_pathology']


def test_pyright_checks_the_library():
    config = json.loads((ROOT / 'pyrightconfig.json').read_text())
    settings = configparser.ConfigParser(delimiters=['='])
    settings.read(ROOT / 'settings.ini', encoding='utf-8')
    assert config['typeCheckingMode'] == 'basic'
    assert config['pythonVersion'] == settings['DEFAULT']['min_python']
    assert [ROOT / folder for folder in config['include']] == [LIBRARY]
    assert [Path(file).name for file in config['exclude']] == ['_modidx.py']
