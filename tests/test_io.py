"Tables for people; reading and writing files is tested in the notebook."

from streaming_pathology.io import markdown_table


def test_tables_are_markdown():
    text = markdown_table([['a', 'b'], [1, None]])
    assert text.splitlines() == ['| a | b |', '|---|---|', '| 1 | None |']
