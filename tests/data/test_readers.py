from pathlib import Path

import pytest

from llama_mcore.data.readers import check_inputs, read_jsonl, read_records
from llama_mcore.errors import DataError, MissingInputError


def test_records_carry_line_and_size(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n  \n{"text": "two", "id": 2}')
    records = list(read_jsonl(path))
    assert [(record.line, record.size, record.text("text")) for record in records] == [
        (1, 16, "one"),
        (4, 24, "two"),
    ]


def test_files_are_read_in_the_order_given(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text(f'{{"text": "{name}"}}\n')
    texts = [record.text("text") for record in read_records([tmp_path / "b", tmp_path / "a"])]
    assert texts == ["b", "a"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"Once upon a time", "is not JSON .* it starts 'Once upon a time'"),
        (b'{"text": "cut off', "is not JSON"),
        (b'{"text": "\xff"}', "is not JSON"),
        (b'["text"]', "holds a JSON list, not an object"),
    ],
)
def test_unusable_line_is_named(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(DataError, match=rf"a\.jsonl line 2: {reason}"):
        list(read_jsonl(path))


def test_missing_key_names_the_keys_that_are_there(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"content": "x", "id": 3}\n')
    (record,) = read_jsonl(path)
    with pytest.raises(DataError, match="line 1: has no key 'text'; keys there: content, id"):
        record.text("text")
    with pytest.raises(DataError, match="holds int under 'id', not a string"):
        record.text("id")


def test_every_missing_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError) as error:
        check_inputs([tmp_path / "no.jsonl", tmp_path, tmp_path / ("x" * 300)])
    assert {str(problem.value) for problem in error.value.problems} == {
        str(tmp_path / "no.jsonl"),
        str(tmp_path),
        str(tmp_path / ("x" * 300)),
    }
