"""Every catalogue format gives the same clips, mistakes are named by file and line, and large ones stay compact."""

import json

import pytest

from audiosep.catalogue import Catalogue, read_catalogue

ROWS = [
    {"wav": "a b/ünï.wav", "caption": "A dog barks.", "kind": "dog", "licence": "CC0"},
    {"wav": "/abs/c.flac", "caption": "Rain", "kind": "", "licence": "CC-BY"},
]


def write(folder, suffix):
    file = folder / f"clips{suffix}"
    if suffix == ".json":
        file.write_text(json.dumps({"data": ROWS}, indent=1))
    elif suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n\n" for row in ROWS))
    else:
        comma = "," if suffix == ".csv" else "\t"
        lines = [comma.join(ROWS[0]), *(comma.join(row.values()) for row in ROWS)]
        file.write_text("\n".join(lines) + "\n")
    return str(file)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".tsv"])
def test_formats_give_the_same_clips(tmp_path, suffix):
    catalogue = read_catalogue(write(tmp_path, suffix), check_files=False)
    dog, rain = catalogue.clip(0), catalogue.clip(1)
    assert (dog.path, dog.location) == ("a b/ünï.wav", str(tmp_path / "a b/ünï.wav"))
    assert (dog.captions, dog.kind, dog.licence) == (("A dog barks.",), "dog", "CC0")
    assert (rain.location, rain.captions, rain.kind) == ("/abs/c.flac", ("Rain",), "")
    assert catalogue.digest == read_catalogue(write(tmp_path, ".json"), check_files=False).digest


def test_all_phrasings_are_kept_once(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"path": "x.wav", "caption": "one", "captions": ["one", "two"]}\n')
    (tmp_path / "b.csv").write_text("path,captions\nx.wav,one|two\n")
    for name in ("a.jsonl", "b.csv"):
        assert read_catalogue(str(tmp_path / name), check_files=False).clip(0).captions == ("one", "two")


def test_the_digest_follows_the_content_and_not_the_place(tmp_path):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    one = read_catalogue(write(tmp_path / "here", ".json"), check_files=False)
    two = read_catalogue(write(tmp_path / "there", ".json"), check_files=False)
    assert one.digest == two.digest
    both = read_catalogue(
        {write(tmp_path / "here", ".csv"): 1, write(tmp_path / "there", ".csv"): 2}, check_files=False
    )
    assert both.digest != one.digest
    assert [both.clip(number).file for number in range(4)] == [0, 0, 1, 1]
    assert both.clip(2).location == str(tmp_path / "there/a b/ünï.wav")


def test_a_saved_catalogue_loads_the_same(tmp_path):
    catalogue = read_catalogue(write(tmp_path, ".json"), check_files=False)
    (tmp_path / "saved").mkdir()
    catalogue.save(tmp_path / "saved")
    again = Catalogue.load(tmp_path / "saved")
    assert [again.clip(i) for i in range(2)] == [catalogue.clip(i) for i in range(2)]
    assert again.digest == catalogue.digest


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            "wav,caption\nx.wav,dog\ny.wav,\n",
            r"a\.csv:3: y\.wav needs captions that are sentences, not \[''\]",
        ),
        ("a.csv", "file,caption\nx.wav,dog\n", r"a\.csv:2: no column 'wav' or 'path' \(there are file, caption\)"),
        ("a.tsv", "wav\tlabel\nx.wav\tdog\n", r"a\.tsv:2: no column 'caption' or 'captions'"),
        ("a.jsonl", '{"wav": "x.wav", "caption": "dog"}\n{"wav": \n', r"a\.jsonl:2: no JSON"),
        ("a.jsonl", '["x.wav", "dog"]\n', r"a\.jsonl:1: expected an object"),
        ("a.json", '{"data": [{"wav": "x.wav", "caption": "dog"}, {"wav": "y.wav"', r"a\.json: no JSON"),
        ("a.json", '{"clips": []}', r'a\.json: expected {"data": \['),
        ("a.json", '{"data": [{"wav": "x.wav", "caption": " "}]}', r"a\.json:1: x\.wav needs captions"),
        ("a.json", '{"data": [{"wav": "x.wav", "caption": 5}]}', r"a\.json:1: x\.wav needs captions .* not \[5\]"),
        ("a.jsonl", '{"wav": "x.wav", "captions": "dog"}', r"a\.jsonl:1: the captions of x\.wav are 'dog', not a list"),
        ("a.jsonl", '{"wav": "x.wav", "captions": 5}', r"a\.jsonl:1: the captions of x\.wav are 5, not a list"),
        ("a.jsonl", '{"wav": ["x.wav"], "caption": "dog"}', r"a\.jsonl:1: the path is \['x\.wav'\]"),
        ("a.csv", "wav,caption\nx.wav,a dog, barking\n", r"a\.csv:2: 2 columns, but also the values \[' barking'\]"),
        ("a.csv", 'wav,caption\nx.wav,"a dog\ny.wav,cat\n', r"a\.csv after line 1: unexpected end of data.*Quotes"),
        ("a.csv", "wav,caption,caption\nx.wav,dog,cat\n", r"a\.csv:1: a column stands twice"),
        (
            "a.csv",
            "wav,caption,byte_offset\nx.wav,dog,many\n",
            r"a\.csv:2: byte_offset and byte_size of x\.wav are 'many'",
        ),
        ("a.jsonl", '{"wav": "x", "caption": "dog", "byte_offset": -3}', r"a\.jsonl:1: byte_offset .* are -3 and None"),
        (
            "a.jsonl",
            '{"wav": "x", "caption": "dog", "byte_size": 1e30}',
            r"a\.jsonl:1: byte_offset .* are None and 1e\+30",
        ),
        ("a.json", '{"meta": {"data": 1, "x": [{"wav": "x", "caption": "dog"}]}}', r'a\.json: expected {"data": \['),
        ("a.json", '{"data": [{"wav": "x", "caption": "dog"}]}{"data": []}', r"a\.json: after the array 'data' comes"),
        ("a.json", '{"data": []}', r"a\.json lists no clips"),
        ("a.parquet", "", "a catalogue is a .json, .jsonl, .csv or .tsv file"),
    ],
)
def test_mistakes_are_named_by_file_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_catalogue(str(tmp_path / name), check_files=False)


def test_a_missing_clip_is_named_by_file_and_line(tmp_path):
    (tmp_path / "a.csv").write_text("wav,caption\na.csv,this is no audio but it exists\nnot here.wav,dog\n")
    with pytest.raises(
        ValueError, match=r"1 of 2 clips do not exist: .*a\.csv:3: .*not here\.wav\. Paths .*check_files"
    ):
        read_catalogue(str(tmp_path / "a.csv"), check_files=True)
    (tmp_path / "a.csv").write_text("wav,caption\n" + "".join(f"{i}.wav,dog\n" for i in range(1000)))
    with pytest.raises(ValueError, match=r"1000 of 1000 clips do not exist: .*0\.wav; .*4\.wav; \.\.\.\."):
        read_catalogue(str(tmp_path / "a.csv"), check_files=True)


def test_spreadsheets_marks_and_long_captions_are_read_and_other_encodings_named(tmp_path):
    text = f'wav,caption,byte_offset\nx.wav,"{"very long " * 20_000}",\n'
    (tmp_path / "a.csv").write_text(text, encoding="utf-8-sig")
    clip = read_catalogue(str(tmp_path / "a.csv"), check_files=False).clip(0)
    assert (clip.path, len(clip.captions[0]), clip.byte_range) == ("x.wav", 199_999, None)
    (tmp_path / "a.csv").write_text("wav,caption\nx.wav,café\n", encoding="latin1")
    with pytest.raises(ValueError, match=r"a\.csv is not UTF-8"):
        read_catalogue(str(tmp_path / "a.csv"), check_files=False)


@pytest.mark.parametrize("weights", [{}, {"a.csv": 0}, {"a.csv": float("nan")}, {"a.csv": float("inf")}])
def test_weights_are_positive_numbers(weights):
    with pytest.raises(ValueError, match="positive weights"):
        read_catalogue(weights, check_files=False)


def test_upstream_files_are_parsed_piece_by_piece(tmp_path, monkeypatch):
    monkeypatch.setattr("audiosep.catalogue.JSON_CHUNK_CHARACTERS", 70)
    rows = [{"wav": f"{i}.wav", "caption": f'with "quotes", [brackets] and ünïcode {i}'} for i in range(100)]
    (tmp_path / "a.json").write_text(json.dumps({"data": rows}))
    catalogue = read_catalogue(str(tmp_path / "a.json"), check_files=False)
    assert [catalogue.clip(i).captions[0] for i in range(100)] == [row["caption"] for row in rows]
