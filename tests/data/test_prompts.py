"""Prompts of an evaluation."""

import pytest

from flaxkd.data import prompts


def test_prompts_come_from_lines_or_a_column(tmp_path):
    text = tmp_path / "prompts.txt"
    text.write_text("a dog\n\n  two cats, one mat \nein Bär\n", encoding="utf-8")
    assert prompts.read(text) == ["a dog", "two cats, one mat", "ein Bär"]
    assert prompts.read(text, 2) == ["a dog", "two cats, one mat"]
    table = tmp_path / "metadata.csv"
    table.write_text('file_name,text\n1.jpg,"a dog, barking"\n2.jpg,a cat\n')
    assert prompts.read(table) == ["a dog, barking", "a cat"]
    with pytest.raises(ValueError, match=r"prompts.txt has 3 prompts, 4 are needed"):
        prompts.read(text, 4)
    assert prompts.read(text, 1) == ["a dog"]
    for none in (0, -1):
        with pytest.raises(ValueError, match=f"the first {none} prompts .*: 1 is the least"):
            prompts.read(text, none)
    table.write_text("file_name,text\n1.jpg,a dog\n")
    assert prompts.read(table) == ["a dog"]
    table.write_text("file_name,text\n1.jpg,a dog\n2.jpg,\n")
    with pytest.raises(ValueError, match=r"metadata.csv, line 3: the column text is empty"):
        prompts.read(table)
    table.write_text("file_name,label\n1.jpg,dog\n")
    with pytest.raises(ValueError, match=r"columns file_name, label: one has to be called text"):
        prompts.read(table)
    with pytest.raises(ValueError, match=r"neither .txt"):
        text.rename(tmp_path / "prompts.json")
        prompts.read(tmp_path / "prompts.json")
    with pytest.raises(FileNotFoundError, match=r"no file .*absent.txt"):
        prompts.read(tmp_path / "absent.txt")
