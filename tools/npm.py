"""Packages of the npm registry: fetched once with `npm pack`, held against the registry's own hash, and kept in the user's cache.

python tools/npm.py          # puts the slide viewer where the library looks for it, as an installation does
"""

import base64
import hashlib
import io
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

PACKAGES = {  # version, and what `npm view NAME@VERSION dist.integrity` says
    'katex': (
        '0.16.11',
        'sha512-RQrI8rlHY92OLf3rho/Ts8i/XvjgguEjOkO1BEXcU3N8BqPpSzBNwV/G0Ukr+P/l3ivvJUE/Fa/CwbS6HesGNQ==',
    ),
    'openseadragon': (
        '6.1.1',
        'sha512-g4iKe2q8B642SaBT3+x4ZF3/8b1TxPPydyjmtrOLgDrlYWMKd9ZXM+1Cb/xa9DVySkvs/7l6HR1nHKfD5F3Tsw==',
    ),
    'axe-core': (
        '4.14.1',
        'sha512-FHfa+lmNjQZfJz1q8wKqIDwC6DExcHt/pkjNQb09a3NPjCKg2rhu5qb2S4r76ASyFNNtuFooJpZe37OgudVGtQ==',
    ),
}
CACHE = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'streaming_pathology'
VIEWER = {
    'build/openseadragon/openseadragon.min.js': 'openseadragon.min.js',
    'LICENSE.txt': 'LICENSE.txt',
}


def package(name):  # {path in the package: bytes}
    "The files of a package; `OSError` says what is wrong."
    version, integrity = PACKAGES[name]
    archive = CACHE / f'{name}-{version}.tgz'
    if not archive.exists():
        with tempfile.TemporaryDirectory() as folder:
            try:
                subprocess.run(
                    ['npm', 'pack', '--silent', f'{name}@{version}'],
                    cwd=folder,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    check=True,
                    timeout=300,
                )
            except (OSError, subprocess.SubprocessError) as e:
                raise OSError(
                    f'{name} could not be fetched ({e}); install npm, or put the file of `npm pack {name}@{version}` at {archive}'
                ) from None
            CACHE.mkdir(parents=True, exist_ok=True)
            shutil.copy(
                Path(folder) / archive.name,
                part := archive.with_name(f'{archive.name}.{os.getpid()}'),
            )
            part.replace(archive)
    data = archive.read_bytes()
    if (found := 'sha512-' + base64.b64encode(hashlib.sha512(data).digest()).decode()) != integrity:
        raise OSError(f'{archive} is not {name} {version} ({found}); delete it')
    with tarfile.open(fileobj=io.BytesIO(data)) as files:
        return {
            m.name.removeprefix('package/'): files.extractfile(m).read()
            for m in files
            if m.isfile()
        }


def fetch_viewer():
    "Put OpenSeadragon and its licence into the library; nothing is fetched where they are already."
    folder = Path(__file__).resolve().parent.parent / 'streaming_pathology/data/openseadragon'
    version = folder / 'version'
    if (
        version.exists()
        and version.read_text() == PACKAGES['openseadragon'][0]
        and all((folder / f).exists() for f in VIEWER.values())
    ):
        return
    files = package('openseadragon')
    folder.mkdir(parents=True, exist_ok=True)
    for name, to in VIEWER.items():
        (folder / to).write_bytes(files[name])
    version.write_text(PACKAGES['openseadragon'][0])


if __name__ == '__main__':
    fetch_viewer()
