"""Prompts from files and data sets: all formats say the same, and what is wrong is named with its place."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest

from calibri_lightning.errors import UserError
from calibri_lightning.prompts import Prompt, check_source, read_prompts

ROWS = [
    {"prompt": "a red circle", "negative": "blur", "tag": "single"},
    {"prompt": 'ein "grünes" Dreieck, 三', "negative": "", "tag": "x,y"},
]
ENCODED = {
    "txt": "a red circle\n" + 'ein "grünes" Dreieck, 三\n',
    "json": json.dumps(ROWS),
    "jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS),
    "csv": 'prompt,negative,tag\na red circle,blur,single\n"ein ""grünes"" Dreieck, 三",,"x,y"\n',
}


def write(path: Path, text: str | bytes) -> str:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def texts(prompts: tuple[Prompt, ...]) -> list[str]:
    return [prompt.text for prompt in prompts]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte-order-mark"])
@pytest.mark.parametrize("suffix", list(ENCODED))
def test_all_formats_say_the_same(tmp_path: Path, suffix: str, mark: str, ending: str) -> None:
    source = write(tmp_path / f"prompts.{suffix}", mark + ENCODED[suffix].replace("\n", ending))
    prompts = read_prompts(source)
    assert texts(prompts) == [row["prompt"] for row in ROWS]
    assert [p.index for p in prompts] == [0, 1]
    if suffix != "txt":
        assert [p.negative for p in prompts] == ["blur", ""]
        assert [dict(p.metadata) for p in prompts] == [{"tag": "single"}, {"tag": "x,y"}]


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "prompts.parquet")
    prompts = read_prompts(str(tmp_path / "prompts.parquet"))
    assert [(p.text, p.negative, dict(p.metadata)) for p in prompts] == [
        (row["prompt"], row["negative"], {"tag": row["tag"]}) for row in ROWS
    ]
    with pytest.raises(UserError, match="not a parquet file"):
        read_prompts(write(tmp_path / "broken.parquet", b"PAR1 no"))


@pytest.mark.parametrize(("source", "module"), [("p.parquet", "pyarrow"), ("hf:some/set", "datasets")])
def test_a_missing_optional_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, module: str
) -> None:
    for name in (module, f"{module}.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "p.parquet", b"")
    with pytest.raises(UserError, match=rf"needs the package '{module}'.*calibri-lightning\[data\]"):
        read_prompts(source)


def test_json_lists_of_strings_and_other_column_names(tmp_path: Path) -> None:
    assert texts(read_prompts(write(tmp_path / "a.json", '["one", " two "]'))) == ["one", "two"]
    assert texts(read_prompts(write(tmp_path / "a.jsonl", '"one"\n{"caption": "two"}\n{"text": "three"}'))) == [
        "one",
        "two",
        "three",
    ]
    # The first of the known columns is the prompt; the others are metadata, as in OCR prompt lists.
    both = read_prompts(write(tmp_path / "b.jsonl", '{"text": "OPEN", "prompt": "a sign", "negative_prompt": null}'))
    assert (both[0].text, dict(both[0].metadata), both[0].negative) == ("a sign", {"text": "OPEN"}, "")


class FakeDataset:
    """The part of datasets.Dataset that is used."""

    def __init__(self, rows: list[dict[str, object]]) -> None:
        self.rows = rows
        self.column_names = list(rows[0])
        kinds = {"picture": type("Image", (), {})()}
        self.features = {name: kinds.get(name, "string") for name in self.column_names}

    def remove_columns(self, names: list[str]) -> FakeDataset:
        return FakeDataset([{k: v for k, v in row.items() if k not in names} for row in self.rows])

    def __iter__(self) -> object:
        return iter(self.rows)


def test_hugging_face_sources_are_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, split: str) -> FakeDataset:
        asked.append((name, split))
        if name == "gone":
            raise ConnectionError("offline")
        return FakeDataset([{"prompt": "p", "long_caption": "c", "picture": b"...", "tag": 1}])

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert read_prompts("hf:org/set") == (Prompt("p", 0, {"long_caption": "c", "tag": 1}),)
    assert read_prompts("hf:org/set:test:long_caption")[0].text == "c"
    assert asked == [("org/set", "train"), ("org/set", "test")]
    with pytest.raises(UserError, match=r"no column 'nope'; the columns are prompt, long_caption"):
        read_prompts("hf:org/set:test:nope")
    with pytest.raises(UserError, match=r"ConnectionError: offline"):
        read_prompts("hf:gone")
    with pytest.raises(UserError, match="name a dataset"):
        read_prompts("hf:")


def test_the_embedded_shapes_are_a_source() -> None:
    splits = {split: read_prompts(f"shapes:{split}") for split in ("train", "val", "test")}
    assert all([p.index for p in prompts] == list(range(len(prompts))) for prompts in splits.values())
    everything = [text for prompts in splits.values() for text in texts(prompts)]
    assert len(set(everything)) == len(everything) > 300
    with pytest.raises(UserError, match="shapes:train"):
        read_prompts("shapes:training")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "holds no prompts"),
        ("a.txt", "\n \n", "holds no prompts"),
        ("a.json", " ", "holds no prompts"),
        ("a.json", "[]", "holds no prompts"),
        ("a.jsonl", "", "holds no prompts"),
        ("a.csv", "", "holds no prompts"),
        ("a.csv", "prompt\n", "holds no prompts"),
        ("a.txt", b"one\ntwo\nth\xff\n", r"line 3: byte 0xff is not UTF-8"),
        ("a.csv", b"prompt\nth\xe9\n", r"line 2: byte 0xe9 is not UTF-8"),
        ("a.txt", "one\n\ntwo\n \nthree\n", r"blank prompts \(lines 2 and 4\)"),
        ("a.jsonl", '"one"\n\n"two"', r"blank prompts \(line 2\)"),
        ("a.json", '["one", ""]', r"blank prompts \(row 2\)"),
        ("a.json", '[{"prompt": null}]', r"blank prompts \(row 1\)"),
        ("a.csv", "prompt,tag\none,1\n\n,2\nthree,3\n", r"blank prompts \(rows 2 and 3\)"),
        ("a.txt", "one\ntwo\none\n", r"repeats prompts: line 3 \(as line 1: 'one'\)"),
        ("a.txt", "one\none \n one\n", r"line 2 \(as line 1: 'one'\) and line 3 \(as line 1: 'one'\)"),
        ("a.jsonl", '"one"\n{"prompt": "tw\n', r"line 2: not JSON \(Unterminated string.* at column 12\)"),
        ("a.json", '[\n"one"\n"two"]', r"line 3: not JSON"),
        ("a.json", '{"prompt": "one"}', "holds a JSON dict"),
        ("a.jsonl", '"one"\n3', "line 2: 3; a row must be a string or an object"),
        (
            "a.jsonl",
            '{"title": "one"}',
            "line 1: none of the columns prompt, caption, text is there, only title",
        ),
        (
            "a.csv",
            "title,tag\none,1\n",
            "row 1: none of the columns prompt, caption, text is there, only title, tag",
        ),
        ("a.jsonl", '{"prompt": 3}', "line 1: column 'prompt' holds 3; it must be a text"),
        ("a.jsonl", '{"prompt": "one", "negative": ["x"]}', "column 'negative' holds"),
        ("a.csv", "prompt,tag\na, b,1\n", "line 2: 3 cells under 2 column names"),
        ("a.csv", 'prompt,tag\n"a" b,1\n', "line 2: not CSV"),
        ("a.doc", "one", r"the suffix must be one of .txt, .json"),
        ("a", "one", r"the suffix must be one of .txt, .json"),
    ],
)
def test_bad_files_are_refused_with_their_place(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    source = write(tmp_path / name, content)
    with pytest.raises(UserError, match=message) as caught:
        read_prompts(source)
    assert source in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    for read in (read_prompts, check_source):
        with pytest.raises(UserError, match=r"none\.txt' does not exist \(looked in "):
            read(str(tmp_path / "none.txt"))
        (tmp_path / "folder.txt").mkdir(exist_ok=True)
        with pytest.raises(UserError, match="cannot be read: Is a directory"):
            read(str(tmp_path / "folder.txt"))


def test_check_source_accepts_what_may_exist(tmp_path: Path) -> None:
    for source in ("shapes:val", "hf:org/set", write(tmp_path / "a.TXT", "one")):
        check_source(source)
    for source in ("shapes:all", write(tmp_path / "a.yaml", "one")):
        with pytest.raises(UserError):
            check_source(source)


def test_duplicates_are_kept_or_dropped_on_request(tmp_path: Path) -> None:
    source = write(tmp_path / "a.txt", "one\ntwo\none\nthree\n")
    assert [(p.text, p.index) for p in read_prompts(source, "keep")] == [
        ("one", 0),
        ("two", 1),
        ("one", 2),
        ("three", 3),
    ]
    # What stays keeps its row, and with it its noise.
    assert [(p.text, p.index) for p in read_prompts(source, "drop")] == [("one", 0), ("two", 1), ("three", 3)]
    with pytest.raises(UserError, match="must be one of error, keep, drop"):
        read_prompts(source, "first")


def test_the_same_text_with_another_negative_is_no_duplicate(tmp_path: Path) -> None:
    rows = '{"prompt": "one", "negative": "blur"}\n{"prompt": "one", "negative": "dark"}'
    assert len(read_prompts(write(tmp_path / "a.jsonl", rows))) == 2


def test_line_numbers_are_an_editors(tmp_path: Path) -> None:
    # A line separator inside a prompt is no new line.
    source = write(tmp_path / "a.txt", "one\u2028half\ntwo\x0cmore\n\nfour\n")
    with pytest.raises(UserError, match=r"\(line 3\)"):
        read_prompts(source)
