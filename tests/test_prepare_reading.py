"""Reading whatever a set holds: paths that lead elsewhere, odd texts, broken files."""

import csv
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.formats import FORMATS
from data_prep.importing import Reader
from data_prep.reading import open_table, read_unit
from vt_trl.errors import DataError

_READER = Reader(FORMATS["rows"], {"image": "image", "question": "question", "answer": "answer"}, "/set")
_TEXT = st.text(st.characters(blacklist_categories=["Cs"]), max_size=40)


@given(
    st.lists(st.sampled_from(["..", ".", "a", "", "~", "\0", "b.png", "C:", "%2e%2e", "…"]), max_size=6), st.booleans()
)
def test_no_path_leaves_the_folder(tmp_path_factory, parts, absolute):
    """A picture is read only below the root, however the path is written."""
    top = tmp_path_factory.mktemp("paths")
    (top / "set" / "a").mkdir(parents=True)
    for folder in (top, top / "a", top / "set", top / "set" / "a"):
        folder.mkdir(exist_ok=True)
        (folder / "b.png").write_bytes(b"inside" if "set" in folder.parts else b"outside")
    reader = Reader(FORMATS["rows"], _READER.chosen, str(top / "set"))
    made = reader.row({"image": ("/" if absolute else "") + "/".join(parts), "question": "?", "answer": "a"})
    assert (made["image"] == b"inside") != ("image_error" in made)


@given(_TEXT, st.lists(_TEXT, min_size=1, max_size=3), st.binary(max_size=20))
def test_ids_depend_on_content_alone(question, answers, picture):
    record = {"image": {"bytes": picture, "path": "x"}, "question": question, "answer": answers}
    one = _READER.row(record)
    assert one["id"] == _READER.row({**record, "image": picture, "other": 1})["id"]
    assert one["id"] != _READER.row({**record, "image": picture + b"!"})["id"]
    assert one["id"] != _READER.row({**record, "answer": [*answers, "one more answer"]})["id"]
    assert one["id"] != _READER.row({**record, "question": "Is it another one? " + question.strip() + "!"})["id"]


@given(
    st.lists(st.fixed_dictionaries({"a": _TEXT, "b": _TEXT | st.none() | st.integers(-9, 9)}), min_size=1, max_size=9)
)
def test_json_lines_and_json_come_back(tmp_path_factory, records):
    folder = tmp_path_factory.mktemp("tables")
    (folder / "x.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    (folder / "y.json").write_text(
        json.dumps({"info": {"v": 1}, "data": records}, ensure_ascii=False), encoding="utf-8"
    )
    (folder / "z.json").write_text(json.dumps({str(n): one for n, one in enumerate(records)}), encoding="utf-8")
    for name in ("x.jsonl", "y.json", "z.json"):
        table = open_table([folder / name], 2, folder)
        found = [one for unit in table.units for one in read_unit(unit)]
        assert [number for number, _ in found] == list(range(len(records))) and table.rows == len(records)
        assert [{key: one[key] for key in "ab"} for _, one in found] == records


@given(st.lists(st.tuples(_TEXT, _TEXT), min_size=1, max_size=6))
def test_csv_comes_back(tmp_path_factory, cells):
    cells = [tuple(text.replace("\0", "") for text in pair) for pair in cells]
    folder = tmp_path_factory.mktemp("tables")
    with (folder / "x.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("a", "b"), *cells])
    table = open_table([folder / "x.csv"], 2, folder)
    assert [tuple(one.values()) for unit in table.units for _, one in read_unit(unit)] == cells


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("x.jsonl", '{"a": 1}\n[1]\n\n7', "2 of its 3 lines are no JSON objects.*line 2: it is no JSON object"),
        ("x.jsonl", '{"a"', "1 of its 1 lines are no JSON objects.*Expecting"),
        ("x.json", '{"a": 1', "cannot read"),
        ("x.json", '{"a": 1}', "no list of rows"),
        ("x.json", "[1, 2]", "one JSON object is needed"),
        ("x.csv", "a,b\n1,2,3\n", "line 2 has more cells"),
        ("x.csv", 'a,b\n"1,2\n', "cannot read"),
        ("x.parquet", "PAR1", "cannot read"),
        ("x.arrow", "ARROW1", "cannot read"),
        ("x.jsonl", "\n", "no rows"),
    ],
)
def test_broken_files_are_named(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=words) as error:
        [*map(list, map(read_unit, open_table([tmp_path / name], 1, tmp_path / "w").units))]
    assert name in str(error.value)
