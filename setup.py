"Everything is in settings.ini; this hands it to setuptools."

import runpy
import sys
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.develop import develop

if sys.platform == 'win32':
    # locks of folders and signals that stop a run are those of POSIX
    sys.exit('streaming_pathology runs on Linux and macOS; on Windows, install it in WSL')

here = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(here / 'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
readme = here / 'README.md'


def with_viewer(command):
    "A step of an installation that first fetches the viewer of reports, as tools/npm.py says; without it all but zooming works, and reports say so."

    def run(self):
        try:
            runpy.run_path(str(here / 'tools/npm.py'))['fetch_viewer']()
        except OSError as e:
            self.warn(f'reports will not zoom: {e}')
        command.run(self)

    return type(command.__name__, (command,), dict(run=run))


setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    keywords=cfg['keywords'],
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else '',
    long_description_content_type='text/markdown',
    author=cfg['author'],
    license='Apache-2.0',
    url=cfg['git_url'],
    classifiers=['Operating System :: POSIX :: Linux', 'Operating System :: MacOS'],
    packages=find_packages(include=['streaming_pathology*']),
    include_package_data=True,
    package_data={
        'streaming_pathology': [
            'py.typed',
            'data/*',
            'data/openseadragon/*',
            'templates/*',
            'templates/compare/*',
            'templates/report/*',
        ]
    },
    cmdclass={'build_py': with_viewer(build_py), 'develop': with_viewer(develop)},
    python_requires=f'>={cfg["min_python"]}',
    install_requires=cfg['requirements'].split(),
    extras_require={
        'dev': cfg['dev_requirements'].split(),
        'bench': cfg['bench_requirements'].split(),
        'notebooks': cfg['notebooks_requirements'].split(),
        'codecs': cfg['codecs_requirements'].split(),
        'timm': cfg['timm_requirements'].split(),
        'weights': cfg['weights_requirements'].split(),
    },
    entry_points={
        'console_scripts': cfg['console_scripts'].split(),
        'nbdev': [f'{cfg["lib_path"]}={cfg["lib_path"]}._modidx:d'],
    },
)
