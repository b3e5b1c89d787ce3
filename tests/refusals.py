"What is said of input that is refused"

import pytest

from streaming_pathology.core import InputError


def refusal(function, *args, **options):
    "What a function says when it refuses its input."
    with pytest.raises(InputError) as caught:
        function(*args, **options)
    return str(caught.value)
