"What is measured in a fresh process is measured in one that is fresh, unlike the workers of other tests."

import multiprocessing
from unittest import mock

import pytest


@pytest.fixture(autouse=True)
def fresh_workers():
    "Processes are spawned, as for users."
    spawned = multiprocessing.context.SpawnContext()
    with mock.patch.dict(multiprocessing.context._concrete_contexts, spawn=spawned):
        yield
