"""tests/api.txt, the public names of every module with their parameters.

A change of this list is a change that users see: it belongs into CHANGELOG.md.

python tools/api.py                      # write the list
python tools/api.py --check              # say how the library differs from it
"""

import ast
import difflib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / 'streaming_pathology'
LIST = ROOT / 'tests/api.txt'


def public_names(path):
    "The `__all__` of a module, which is not imported."
    for node in ast.parse(path.read_text(encoding='utf-8')).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == '__all__':
            return set(ast.literal_eval(node.value))
    return set()


def parameters(function):
    "The parameters of a function as text, without types."
    arguments = function.args
    for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
        each.annotation = None
    for each in (arguments.vararg, arguments.kwarg):
        if each is not None:
            each.annotation = None
    return f'({ast.unparse(arguments)})'


def lines_of(name, node):
    "A function, or a class with its public methods and fields."
    if isinstance(node, ast.FunctionDef):
        yield name + parameters(node)
        return
    yield name
    for each in node.body:
        if isinstance(each, ast.FunctionDef) and not each.name.startswith('_'):
            yield f'{name}.{each.name}{parameters(each)}'
        elif isinstance(each, ast.FunctionDef) and each.name == '__init__':
            yield f'{name}.__init__{parameters(each)}'
        elif isinstance(each, ast.AnnAssign):
            yield f'{name}.{ast.unparse(each.target)}'


def module_lines(path):
    "The public names of one module, one a line."
    tree = ast.parse(path.read_text(encoding='utf-8'))
    names = public_names(path)
    module = '.'.join(path.relative_to(PACKAGE.parent).with_suffix('').parts)
    module = module.removesuffix('.__init__')
    lines = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in names:
            lines.update(lines_of(f'{module}.{node.name}', node))
            names.discard(node.name)
    lines.update(f'{module}.{name}' for name in names)
    return sorted(lines)


def api():
    "All modules."
    paths = [p for p in sorted(PACKAGE.rglob('*.py')) if p.name != '_modidx.py']
    return [line for path in paths for line in module_lines(path)]


def changes():
    "How the library differs from the list."
    expected = LIST.read_text(encoding='utf-8').splitlines()
    return '\n'.join(
        difflib.unified_diff(expected, api(), 'tests/api.txt', 'now', n=0, lineterm='')
    )


if __name__ == '__main__':
    if sys.argv[1:] != ['--check']:
        LIST.write_text('\n'.join(api()) + '\n', encoding='utf-8')
    elif found := changes():
        sys.exit(f'{found}\npython tools/api.py writes the list again')
