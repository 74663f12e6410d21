"""Text in any encoding, lists of pictures in any usual form, and what is said of those that cannot be read."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flaxkd.data import metadata, prompts, text


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252", "latin-1"]
)
def test_text_in_any_encoding(encoding):
    words = "café, naïve señor ÄÖÜ" + ("" if encoding == "latin-1" else " – it’s 5 €")
    mark = {"utf-16-be": b"\xfe\xff"}.get(encoding, b"")  # without a mark its zeros tell
    assert text.decode(mark + words.encode(encoding)) == words
    assert text.decode(b"plain " + words.encode("utf-8")) == f"plain {words}"


def test_lines_may_differ_in_encoding():
    assert text.decode("é\n".encode() + "é’".encode("cp1252")) == "é\né’"


@pytest.mark.parametrize(
    "content",
    ["Привет, мир".encode("cp1251"), b"\x00\x01\x02\xff", bytes(range(256)), b"\xff\xfea", b"ab\0c", b"\x81\x8d"],
)
def test_what_is_no_text_is_refused(content):
    with pytest.raises(ValueError, match=r"text|UTF-8"):
        text.decode(content)


def test_json_that_cannot_be_used():
    for content, message in [("[" * 100_000, "too deeply"), ("{", "Expecting"), ('{"a": 1, "a": 2}', "twice")]:
        with pytest.raises(ValueError, match=message):
            text.parse(content)


def rows(name, content):
    return metadata.rows(name, content.encode() if isinstance(content, str) else content)


def captions(name, content):
    return [row.about.get("text") if not row.fault else row.fault for row in rows(name, content)]


LONG = "x" * 140_000


@pytest.mark.parametrize(
    ("content", "want"),
    [
        ("file_name,text\n0.png,a thing\n1.png,red, and blue, thing\n", ["a thing", "red, and blue, thing"]),
        ("text,file_name\na thing,0.png\nred, blue,1.png\n", ["a thing", "red, blue"]),
        ("file_name,text,score\n0.png,a thing,5\n1.png,red, blue,6.5\n", ["a thing", "red, blue"]),
        ("file_name,text,title\n0.png,a,b\n1.png,c,d,e\n", ["a", "it has 4 columns, not 3: put its text into quotes"]),
        ("file_name;text;score\n0.png;a, thing;5\n1.png;b;6\n", ["a, thing", "b"]),
        ("file_name\ttext\n0.png\ta; b, c\n", ["a; b, c"]),
        ('file_name,text\r\n0.png,"a, ""big"" thing"\r\n1.png,"two\r\nlines"\r\n', ['a, "big" thing', "two\nlines"]),
        ('file_name,text\n0.png,"never closed\n1.png,b\n2.png,c\n', ['"never closed', "b", "c"]),
        ('file_name,text\n0.png,12" pizza\n1.png,b\n', ['12" pizza', "b"]),
        (f"file_name,text\n0.png,{LONG}\n", [LONG]),
        ("file_name,text\n0.png\n1.png,b\n", [None, "b"]),
        ("file_name,text\n0.png,a1.png,b\n2.png,c\n", ["it has 3 columns, not 2: put its text into quotes", "c"]),
    ],
)
def test_csv_as_people_have_it(content, want):
    assert captions("metadata.csv", content) == want
    assert captions("metadata.csv", content.encode("utf-16")) == want


def test_lines_of_json():
    content = '{"text": "a"}\n\n{not json\n[1]\n{"text": "b", "text": "c"}\n{"text": "d"}'
    found = rows("metadata.jsonl", content)
    assert [row.place for row in found] == ["line 1", "line 3", "line 4", "line 5", "line 6"]
    assert [bool(row.fault) for row in found] == [False, True, True, True, False]
    assert rows("metadata.jsonl", '{"text": "café"}'.encode("latin-1"))[0].about == {"text": "café"}


def test_a_metadata_file_that_cannot_be_read_is_named():
    content = io.BytesIO()
    pq.write_table(pa.table({"file_name": ["0.png"], "text": ["a"]}), content)
    assert captions("metadata.parquet", content.getvalue()) == ["a"]
    for name, damaged in [
        ("metadata.parquet", content.getvalue()[:-40]),
        ("metadata.csv", b"\x00\xff\x81"),
        ("metadata.csv", b"0.png,a\n1.png,b\n"),
        ("metadata.jsonl", b""),
        ("metadata.jsonl", "ÿþ".encode("utf-16")[:-1]),
    ]:
        with pytest.raises(ValueError, match=name):
            rows(name, damaged)


def test_prompts_in_other_encodings(tmp_path):
    (tmp_path / "p.txt").write_bytes("a café\na dog\n".encode("utf-16"))
    (tmp_path / "p.csv").write_bytes("prompt;n\na café, big;1\na dog;2\n".encode("cp1252"))
    assert prompts.read(tmp_path / "p.txt") == ["a café", "a dog"]
    assert prompts.read(tmp_path / "p.csv") == ["a café, big", "a dog"]
