"""Rows: as people write them into files and folders, under the names that a task gives them."""

import bz2
import gzip
import json
import lzma
import shutil
from dataclasses import replace

import datasets
import pytest
from small_task import SMALL_CONFIG, task_with

from grpo.data import JsonLines, Rows, read_rows
from grpo.errors import UserError
from grpo.questions import build_questions
from grpo.sources import Reading, Source

# ---- rows


def test_json_lines_may_be_blank_or_begin_with_a_byte_order_mark(tmp_path):
    lines = [b'\xef\xbb\xbf{"answer": "1"}\r\n', b"\r\n", b'{"answer": "\xc3\xa4"}\n', b"  \n", b'{"answer": "3"}']
    (tmp_path / "train.jsonl").write_bytes(b"".join(lines))
    rows = read_rows(str(tmp_path), "train")
    assert isinstance(rows, JsonLines)
    expected = [{"answer": "1"}, {"answer": "ä"}, {"answer": "3"}]
    assert list(rows) == expected == [rows[place] for place in range(len(rows))]
    assert rows[1:] == expected[1:] and rows[-1] == expected[-1]
    with pytest.raises(IndexError):
        rows[3]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b'{"answer": }', "line 3 is not JSON"),
        (b"[1, 2]", r"line 3 is '\[1, 2\]'; each line must be a JSON object"),
        (b'{"answer": "\xff"}', "line 3 is not UTF-8"),
        (b"[" * 200_000, "line 3 is not JSON"),
    ],
)
def test_a_line_that_is_no_row_is_told_with_its_number(tmp_path, line, told):
    (tmp_path / "train.jsonl").write_bytes(b'{"answer": "1"}\n\n' + line + b"\n")
    rows = read_rows(str(tmp_path), "train")
    for read in (list, lambda rows: rows[1]):
        with pytest.raises(UserError, match=told):
            read(rows)


# ---- files as people write them

WANTED = [{"question": "a,\nb", "answer": "007"}, {"question": "ä", "answer": "NA"}, {"question": "c", "answer": ""}]
LINES = "".join(json.dumps(row) + "\r\n" for row in WANTED).encode()
CSV = '\ufeffquestion,answer\r\n"a,\nb",007\r\n\r\nä,NA\r\nc,\r\n'.encode()
COLUMNS = {name: [row[name] for row in WANTED] for name in WANTED[0]}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", b"\xef\xbb\xbf" + LINES),
        ("rows.json", LINES),
        ("rows.ndjson", b"\n" + LINES),
        ("rows.json", json.dumps(WANTED).encode()),
        ("rows.jsonl", json.dumps(WANTED, indent=1).encode()),
        ("rows.json", b"\xef\xbb\xbf" + json.dumps({"version": "1.1", "data": WANTED}).encode()),
        ("rows.json", json.dumps({"data": WANTED}, indent=2).encode()),
        ("rows.json", json.dumps(COLUMNS, indent=2).encode()),
        ("rows.json", json.dumps({"examples": WANTED, "split": "train"}).encode()),
        ("rows.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("rows.json.bz2", bz2.compress(json.dumps(WANTED).encode())),
        ("rows.csv", CSV),
        ("ROWS.CSV.gz", gzip.compress(CSV, mtime=0)),
        ("rows.csv", CSV.replace(b'"a,', b"'").replace(b",", b";").replace(b"'", b'"a,')),
        ("rows.tsv", CSV.replace(b'"a,', b"'").replace(b",", b"\t").replace(b"'", b'"a,')),
        ("rows.csv", CSV.replace(b"question,answer", b",question, answer").replace(b'"a', b'0, "a').replace(
            b"\xc3\xa4,", b"1, \xc3\xa4, ").replace(b"c,", b"2, c, ").replace(b",007", b", 007")),
    ],
)  # fmt: skip
def test_a_file_gives_its_values_as_they_stand(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    rows = read_rows(str(tmp_path / name), "train")
    assert list(rows) == WANTED == [rows[place] for place in range(3)]


def test_json_keeps_what_columns_of_one_type_would_change(tmp_path):
    rows = [
        {"a": "2024-01-01"},
        {"a": 72},
        {"a": 72.0},
        {"a": "72"},
        {"a": None},
        {},
        {"a": {"x": [1, "b"]}},
        {"a": 10**30},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    read = list(read_rows(str(tmp_path / "rows.json"), "train"))
    assert read == rows and [type(row.get("a")) for row in read] == [type(row.get("a")) for row in rows]


@pytest.mark.parametrize("name", ["rows.parquet", "train-00000-of-00001.arrow"])
def test_arrow_s_own_files(tmp_path, name):
    table = datasets.Dataset.from_list(WANTED)
    if name.endswith("parquet"):
        table.to_parquet(tmp_path / name)
    else:
        table.save_to_disk(tmp_path / "saved")
        shutil.copy(tmp_path / "saved" / "data-00000-of-00001.arrow", tmp_path / name)
    assert list(read_rows(str(tmp_path / name), "train")) == WANTED


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("r.csv", b"a,b,a\n1,2,3\n", "2 columns called 'a'"),
        (
            "r.csv",
            b"a,b\n1,2\n1,2,3\n",
            r"line 3 has 3 values, but the header names 2 columns\. A value with ',' in it",
        ),
        ("r.csv", b'a,b\n1,2\n"1,2\n', "line 3 is not CSV: unexpected end of data"),
        ("r.csv", "a,b\nä,2\n".encode("latin-1"), "is not UTF-8"),
        ("r.csv", "a,b\n1,2\n".encode("utf-16"), "iconv -f UTF-16"),
        ("r.json", b'{"meta": {"x": 1}, "more": {"y": 2}}', r"one object with 'meta', 'more', and nobody says"),
        ("r.json", b'[{"a": 1}, 2]', r"has '2' \(int\) as row 1"),
        ("r.json", b'[{"a": 1},', "is not JSON"),
        ("r.jsonl", b'{\n "a": 1\n}\n', "line 1 is not JSON"),
        ("r.jsonl.gz", b"no gzip", "cannot be read: BadGzipFile"),
        ("r.jsonl", gzip.compress(LINES, mtime=0), "it is compressed by gzip. If so, call it r.jsonl.gz"),
        ("r.json", lzma.compress(LINES), "it is compressed by xz"),
        ("r.tsv", b"PK\x03\x04\x14", "it is a ZIP archive, or a sheet of Excel"),
        ("r.csv", b"PAR1\x15", "it is Parquet. If so, call it r.parquet"),
        ("r.parquet", b"no parquet", "cannot be read"),
        ("r.txt", b"a\n", "is no file of rows by its name"),
        ("r.tar.gz", gzip.compress(b"a\n", mtime=0), "is no file of rows by its name"),
    ],
)
def test_a_file_that_is_none_is_told(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=told):
        list(read_rows(str(tmp_path / name), "train"))


# ---- splits and folders


def folder(path, files):
    for name, rows in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(rows if isinstance(rows, str) else "\n".join(map(json.dumps, rows)))
    return str(path)


ONE, TWO = [{"a": 1}], [{"a": 2}, {"a": 3}]
CARD = """---
configs:
- config_name: main
  data_files: [{split: train, path: main/a.jsonl}, {split: test, path: main/b.jsonl}]
- config_name: other
  data_files: [{split: train, path: other/a.jsonl}]
---
"""
CONFIGURATIONS = {"README.md": CARD, "main/a.jsonl": TWO, "main/b.jsonl": ONE, "other/a.jsonl": ONE}


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"train.jsonl": TWO, "test.jsonl": ONE, "README.md": "# Data", "LICENSE": "MIT"}, {}),
        ({"train.jsonl": TWO, "dev.jsonl": ONE}, {}),
        ({"train.jsonl": TWO, "test.csv": "a\n1\n"}, {}),
        ({"data/train_sft-00000-of-00001.jsonl": TWO, "data/test_sft-00000-of-00001.jsonl": ONE}, {}),
        ({"train/0.json": TWO[:1], "train/1.json": TWO[1:], "validation/0.json": ONE}, {}),
        (CONFIGURATIONS, {}),
        (
            {f"data/{name}-00000-of-00001.jsonl": ONE for name in ("train_gen", "test_gen", "test_sft")}
            | {"data/train_sft-00000-of-00001.jsonl": TWO},
            {"train": "train_sft", "test": "test_sft"},
        ),
    ],
)
def test_the_splits_of_a_folder_are_found_by_their_names(tmp_path, files, said):
    source = Source(folder(tmp_path, files), Reading(splits=said))
    train, test = (read_rows(source, split, name="main") for split in ("train", "test"))
    assert [train[place] for place in range(len(train))] == list(train) == TWO
    assert [{"a": int(row["a"])} for row in test] == ONE


def test_the_only_split_is_trained_on_and_told_where_it_is_not_called_so(tmp_path):
    source = Source(folder(tmp_path, {"test.jsonl": ONE}))
    assert list(read_rows(source, "train")) == ONE
    assert "has only one split, test: it is what is trained on" in next(iter(source.reading.notes))


def test_a_configuration_stands_behind_a_colon(tmp_path):
    data = folder(tmp_path, CONFIGURATIONS)
    assert list(read_rows(f"{data}:other", "train", name="main")) == ONE
    with pytest.raises(UserError, match="has no configuration 'mian', but main, other"):
        read_rows(f"{data}:mian", "train")
    with pytest.raises(UserError, match=r"several configurations: main, other\. .*:main"):
        read_rows(data, "train")


@pytest.mark.parametrize("splits", [("train", "validation"), ("train",)])
def test_folders_of_save_to_disk(tmp_path, splits):
    held = datasets.DatasetDict({name: datasets.Dataset.from_list(TWO) for name in splits})
    (held if len(splits) > 1 else held["train"]).save_to_disk(tmp_path / "saved")
    source = Source(str(tmp_path / "saved"))
    assert list(read_rows(source, "train")) == TWO
    if len(splits) > 1:
        assert list(read_rows(source, "test")) == TWO
        assert "The held-out prompts are those of the split validation" in next(iter(source.reading.notes))


@pytest.mark.parametrize(
    ("files", "split", "told"),
    [
        ({"rows.jsonl": ONE}, "test", "only one split, train, and none .* --held-out 100"),
        ({}, "train", r"No data is found .* It is empty"),
        ({"README.md": "# nothing"}, "train", r"No data is found .* It holds README\.md"),
        (
            {f"data/{name}-00000-of-00001.jsonl": ONE for name in ("train_a", "train_b")},
            "train",
            "Which is meant by train.* --splits train=train_",
        ),
        (
            {f"data/{name}-00000-of-00001.jsonl": ONE for name in ("one", "two")},
            "train",
            "nobody says .* --splits train=",
        ),
    ],
)
def test_a_folder_without_such_a_split_is_told(tmp_path, files, split, told):
    with pytest.raises(UserError, match=told):
        read_rows(folder(tmp_path, files), split)


def test_what_lies_beside_the_splits_is_told(tmp_path):
    source = Source(folder(tmp_path, {"train.jsonl": ONE, "test.jsonl": ONE, "more.jsonl": ONE}))
    read_rows(source, "train")
    assert "nothing reads more.jsonl: its splits are train, test" in next(iter(source.reading.notes))


def test_what_is_not_there_is_told(tmp_path):
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "gone.jsonl")
    (tmp_path / "rows.jsonl").write_text("{}")
    folder(tmp_path / "broken", {"test.jsonl": ONE})
    (tmp_path / "broken" / "train.jsonl").symlink_to(tmp_path / "gone.jsonl")
    for data, told in {
        str(tmp_path / "broken"): r"train\.jsonl is a link to .*gone\.jsonl, and nothing is there",
        str(tmp_path / "link.jsonl"): r"is a link to .*gone\.jsonl, and nothing is there",
        str(tmp_path / "row.jsonl"): r"There is no file or folder .* Did you mean `rows\.jsonl`",
        "gone.csv": "There is no file or folder",
        "org/name:main": r"data set org/name:main is neither .* nor to be had from the hub",
    }.items():
        with pytest.raises(UserError, match=told):
            read_rows(data, "train")


def test_what_lies_here_comes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "openai" / "gsm8k", {"train.jsonl": ONE})
    assert list(read_rows("openai/gsm8k", "train", name="main")) == ONE


def test_the_hub_s_configuration_is_the_one_that_is_said_else_the_task_s_else_its_only_one(monkeypatch):
    """What the hub has is made up here: there is no network."""
    asked = []

    def load_dataset(name, configuration=None, **arguments):
        asked.append((name, configuration, arguments))
        if configuration not in (None, "socratic"):
            raise ValueError(f"BuilderConfig '{configuration}' not found. Available: ['default']")
        held = datasets.Dataset.from_list(TWO)
        return datasets.DatasetDict({"train": held, "validation": held})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(read_rows("me/gsm:socratic", "train", name="main", revision="r")) == TWO
    assert asked == [("me/gsm", "socratic", {"revision": "r"})]
    source = Source("me/gsm")
    assert list(read_rows(source, "test", name="main")) == TWO and "split validation" in next(
        iter(source.reading.notes)
    )
    assert [configuration for _, configuration, _ in asked[1:]] == ["main", None]
    with pytest.raises(UserError, match=r"me/gsm:none is neither .* BuilderConfig 'none' not found"):
        read_rows("me/gsm:none", "train", name="main")


# ---- columns


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"question": "problem"}, {"question": "p", "answer": "own", "x": {"y": ["z", {"w": 4}]}}),
        ({"answer": "problem"}, {"answer": "p", "x": {"y": ["z", {"w": 4}]}}),
        ({"answer": "problem", "problem": "answer"}, {"answer": "p", "problem": "own", "x": {"y": ["z", {"w": 4}]}}),
        ({"answer": "x.y.1.w"}, {"answer": 4, "problem": "p", "x": {"y": ["z", {"w": 4}]}}),
        ({"a": "problem", "b": "problem", "c": "x.y"}, {"a": "p", "b": "p", "c": ["z", {"w": 4}], "answer": "own",
                                                       "x": {"y": ["z", {"w": 4}]}}),
    ],
)  # fmt: skip
def test_columns_get_the_names_that_the_task_gives_them(tmp_path, columns, expected):
    row = {"problem": "p", "answer": "own", "x": {"y": ["z", {"w": 4}]}}
    source = Source(folder(tmp_path, {"train.jsonl": [row, row]}), Reading(columns=columns))
    rows = read_rows(source, "train")
    assert list(rows) == [rows[0], rows[1]] == [expected] * 2


def test_a_column_that_is_not_there_is_told(tmp_path):
    data = folder(tmp_path, {"train.jsonl": [{"problem": "p", "x": {"y": 1}}]})
    for old in ("problems", "x.z", "x.y.z", "problem.0"):
        with pytest.raises(UserError, match=rf"question={old}, but .* has the columns problem, x\."):
            read_rows(Source(data, Reading(columns={"question": old})), "train")
    task = task_with(rows=lambda split, data: [{"q": row["question"]} for row in read_rows(data, split)])
    with pytest.raises(UserError, match=r"no column 'question', .* They have problem, x\. .* --columns question=NAME"):
        Rows(task, "train", data)


def test_flags_that_would_have_no_effect_are_refused():
    with pytest.raises(UserError, match=r"--columns is given, but `rows` of task small does not read embedded by"):
        Rows(task_with(), "train", Source("embedded", Reading(columns={"question": "problem"})))


# ---- bad rows


def reads(split, data):
    for row in read_rows(data, split):
        yield {"question": row["question"], "answer": row["solution"].rsplit("#", 1)[1]}


def reads_at_once(split, data):
    return list(reads(split, data))


@pytest.mark.parametrize("rows", [reads, reads_at_once])
def test_bad_rows_are_left_out_counted_and_named(tmp_path, rows):
    """Lines that are no JSON, rows that the task fails on, that ask nothing, have no answer, or are too long."""
    good = [{"question": f"{n}?", "solution": f"x#{n}"} for n in range(6)]
    bad = [
        {"question": "no number", "solution": "x#many"},
        {"question": "no mark", "solution": "x"},
        {"question": None, "solution": "x#1"},
        {"question": "", "solution": "x#1"},
        {"question": "no answer", "solution": "x#"},
        {"question": "long " * 2000, "solution": "x#1"},
        {"solution": "x#1"},
        {"question": "not unicode \ud83d", "solution": "x#1"},
    ]
    good, bad = list(map(json.dumps, good)), [*map(json.dumps, bad), '{"question": ', "[]", "3"]
    (tmp_path / "rows.jsonl").write_text("\n".join([*good[:3], *bad, *good[3:]]))
    notes = []

    def equal(completion, answer):
        return float(int(completion) == int(answer))

    task = task_with(rows=rows, rewards={equal: 1.0}, solved=("equal", 1.0))
    config = replace(SMALL_CONFIG, data=str(tmp_path / "rows.jsonl"), held_out=2, skip_bad_rows=True)
    questions = build_questions(task, config, note=notes.append)
    asked = [prompt.fields["question"] for prompt in (*questions.train, *questions.test)]
    assert sorted(asked) == [f"{n}?" for n in range(6)]
    [told] = [note for note in notes if "left out" in note]
    assert f"{len(bad)} rows of {config.data} (train) left out, 6 used" in told
    assert "line 12 is not JSON" in told
    with pytest.raises(UserError):
        build_questions(task, replace(config, skip_bad_rows=False), note=list)


def test_of_a_table_only_the_bad_records_are_left_out(tmp_path):
    (tmp_path / "rows.csv").write_text('question,answer\na,1\nb,2,3\n"c"d,4\ne,\nf,5\n')
    source = Source(str(tmp_path / "rows.csv"), Reading(skip_bad_rows=True))
    assert [row["question"] for row in read_rows(source, "train")] == ["a", "e", "f"]
    assert ["line 3" in source.reading.bad[0], "line 4" in source.reading.bad[1]] == [True, True]


def test_where_no_row_is_good_the_first_bad_one_is_told(tmp_path):
    data = folder(tmp_path, {"train.jsonl": [{"question": "a", "solution": "no mark"}] * 3})
    config = replace(SMALL_CONFIG, data=data, held_out=2, skip_bad_rows=True)
    with pytest.raises(UserError, match=r"is empty.* Left out was all of it: .*IndexError.* on row 0"):
        build_questions(task_with(rows=reads), config, note=list)


def test_rows_without_an_end_are_refused():
    def endless(split, data):
        while True:
            yield {"question": "?", "answer": "2"}

    with pytest.raises(UserError, match=r"more than 1,000 rows of embedded .* Does it ever end\?"):
        Rows(task_with(rows=endless), "train", "embedded", most=1000)
    assert len(Rows(task_with(rows=endless), "test", "embedded", first=30)) == 30


def test_rows_that_fill_one_dict_again_and_again_are_different_rows():
    def rows(split, data):
        row = {}
        for number in range(3):
            row["answer"] = str(number)
            yield row

    assert list(Rows(task_with(rows=rows), "train", "embedded")) == [{"answer": "0"}, {"answer": "1"}, {"answer": "2"}]


@pytest.mark.parametrize(("name", "told"), [(5, r"5 \(int\)"), (None, r"None .*csv\.DictReader")])
def test_a_column_has_a_name(name, told):
    with pytest.raises(UserError, match=rf"A column of embedded \(train\) is called {told}"):
        build_questions(task_with(rows=lambda split, data: [{"answer": "2", "question": "?", name: 6}]), SMALL_CONFIG)


def test_rows_of_the_hub_stay_where_they_are():
    """A data set in Arrow's memory: nested columns, missing values, and rows that are asked for by place."""
    table = datasets.Dataset.from_dict(
        {"question": ["a?", "b?", "c?"], "answer": [1, 2, 3], "more": [{"x": [1]}, {"x": []}, None]}
    )
    rows = Rows(task_with(rows=lambda split, data: table), "train", "hub", first=2)
    assert rows._rows is table
    assert list(rows) == rows[:] == [table[0], table[1]]
