"""Every file format as people have it, and every way in which such a file is wrong."""

from __future__ import annotations

import gzip
import json
import logging
import os
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deeprec.errors import DataError
from deeprec.tools import data_files, loaders
from deeprec.tools.interactions import InteractionData
from deeprec.tools.loaders import FORMATS, detect_format


def load(
    path: Path, format: str = "auto", *, name: str | None = None, **options: object
) -> InteractionData:
    """`loaders.load` with options as keywords."""
    return loaders.load(path, format, name=name, options=options)


def history(data: InteractionData, user: str) -> list[str]:
    return [data.items[i].id for i in data.sequence(data.user_index[user])]


def by_id(data: InteractionData) -> dict[str, tuple[str, dict[str, tuple[str, ...]], str]]:
    return {i.id: (i.title, dict(i.attributes), i.description) for i in data.items}


def write(path: Path, *rows: str, encoding: str = "utf-8") -> Path:
    path.write_bytes("".join(row + "\n" for row in rows).encode(encoding))
    return path


def write_json(path: Path, *records: object) -> Path:
    text = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


# --- RecBole ---------------------------------------------------------------------------------

INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
ITEM = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\tprice:float"


@pytest.fixture
def atomic(tmp_path: Path) -> Path:
    rows = ["7\t2\t5\t20.9", "7\t1\t1\t10", "8\t3\t4\t5e1", "8\t2\t3\t60"]
    write(tmp_path / "ml.inter", INTER, *rows)
    write(
        tmp_path / "ml.item",
        ITEM,
        "1\tToy Story\t1995\tAnimation Children's Comedy\t9.5",
        '2\t"Quoted, \t1996\t\t',
        "4\tNever seen\t1997\tDrama\t1",
    )
    return tmp_path


def test_recbole(atomic: Path) -> None:
    data = load(atomic)
    assert data.name == "ml"
    assert history(data, "7") == ["1", "2"]
    assert data.times.tolist() == [10, 20, 50, 60]
    assert by_id(data) == {
        "2": ('"Quoted,', {"year": ("1996",)}, ""),
        "1": (
            "Toy Story",
            {"year": ("1995",), "genres": ("Animation", "Children's", "Comedy")},
            "",
        ),
        "3": ("3", {}, ""),
    }


def test_recbole_options(atomic: Path) -> None:
    assert len(load(atomic / "ml.inter", min_rating=4).users) == 2
    named = load(atomic, name="mine", title_field="class", attributes=["movie_title", "price"])
    assert named.name == "mine"
    assert by_id(named)["1"] == (
        "Animation Children's Comedy",
        {"movie_title": ("Toy", "Story"), "price": ("9.5",)},
        "",
    )


def test_recbole_without_items(atomic: Path, caplog: pytest.LogCaptureFixture) -> None:
    (atomic / "ml.item").unlink()
    with caplog.at_level(logging.WARNING):
        data = load(atomic)
    assert by_id(data)["1"] == ("1", {}, "")
    assert "3 of 3 items lack metadata" in caplog.text


def test_recbole_other_field_names(tmp_path: Path) -> None:
    write(tmp_path / "x.inter", "who:token\tvenue:token\tat:float", "u\tv\t1")
    fields = "venue:token\tvenue_name:token\tdescription:token_seq\tgenre:token_seq\tclass:token"
    write(tmp_path / "x.item", fields, "v\tThe  Venue\tA place\tBar,Pub\tPub")
    names = {"user_field": "who", "item_field": "venue", "time_field": "at"}
    data = load(tmp_path, "recbole", **names, seq_separator=",")
    assert by_id(data) == {"v": ("The Venue", {"genres": ("Bar", "Pub")}, "A place")}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("user_id\titem_id:token\ttimestamp:float", "'user_id' is not like user_id:token"),
        ("user_id:token\titem_id:text\ttimestamp:float", "'item_id:text' is not like"),
        ("user_id:token\tuser_id:float\ttimestamp:float", "occurs twice"),
        ("user_id:token\tuser_id:token\ttimestamp:float", "two columns 'user_id:token'"),
        ("user_id:token\titem_id:token\ttime:float", "no column 'timestamp' but 'user_id', 'it"),
        ("session:token\titem_id:token\ttimestamp:float", "no column 'user_id'"),
    ],
)
def test_recbole_wrong_header(tmp_path: Path, header: str, message: str) -> None:
    write(tmp_path / "x.inter", header, "1\t2\t3")
    with pytest.raises(DataError, match=message):
        load(tmp_path, "recbole")


@pytest.mark.parametrize(
    "fields", ["a_title:token\tb_title:token\tname:token", "city:token\tzip:token\tprice:float"]
)
def test_recbole_title_in_doubt(atomic: Path, fields: str) -> None:
    write(atomic / "ml.item", f"item_id:token\t{fields}", "1\tx\ty\t2")
    with pytest.raises(DataError, match="Name it by title_field"):
        load(atomic)


def test_recbole_title_by_its_exact_name(atomic: Path) -> None:
    write(atomic / "ml.item", "item_id:token\tsubtitle:token\ttitle:token", "1\tx\ty")
    assert by_id(load(atomic))["1"] == ("y", {"subtitle": ("x",)}, "")


def test_recbole_two_data_sets(atomic: Path) -> None:
    write(atomic / "other.inter", INTER, "1\t1\t1\t1")
    with pytest.raises(DataError, match=r"found: ml\.inter, other\.inter"):
        load(atomic)
    assert load(atomic / "other.inter").name == "other"


# --- MovieLens-1M ----------------------------------------------------------------------------


@pytest.fixture
def movielens(tmp_path: Path) -> Path:
    folder = tmp_path / "ml-1m"
    folder.mkdir()
    write(
        folder / "movies.dat",
        "1::Toy Story (1995)::Animation|Children's|Comedy",
        "2::Misérables, Les (1995)::Drama|Musical",
        "3::No year here::Drama",
        encoding="latin-1",
    )
    write(folder / "ratings.dat", "1::2::5::978300760", "1::1::3::978302109", "2::3::4::978301968")
    return folder


def test_movielens(movielens: Path) -> None:
    data = load(movielens)
    assert data.name == "ml-1m"
    assert history(data, "1") == ["2", "1"]
    assert by_id(data) == {
        "2": ("Misérables, Les", {"genres": ("Drama", "Musical"), "year": ("1995",)}, ""),
        "1": (
            "Toy Story",
            {"genres": ("Animation", "Children's", "Comedy"), "year": ("1995",)},
            "",
        ),
        "3": ("No year here", {"genres": ("Drama",)}, ""),
    }
    assert len(load(movielens, min_rating=4).users) == 2


def test_movielens_converted_to_utf8(movielens: Path) -> None:
    movies = movielens / "movies.dat"
    movies.write_bytes(movies.read_bytes().decode("latin-1").encode("utf-8-sig"))
    items = by_id(load(movielens))
    assert items["1"][0] == "Toy Story"
    assert items["2"][0] == "Misérables, Les"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("1::2::5", "4 fields separated by ::"),
        ("1,2,5,978300760", "4 fields separated by ::"),
        ("1::2::5::soon", "time 'soon' is no number"),
        ("1::2::good::978300760", "rating 'good'"),
        ("1::2::5::nan", "time nan is not a finite number"),
        ("1::2::5::inf", "time inf is not a finite number"),
        ("1::2::5::-1", "before 1970"),
        ("1::2::5::978300760000", "future"),
        ("1:: ::5::978300760", "empty or too long"),
        ("::2::5::978300760", "empty or too long"),
    ],
)
def test_movielens_wrong_row(movielens: Path, row: str, message: str) -> None:
    write(movielens / "ratings.dat", "1::2::5::978300760", "", row)
    with pytest.raises(DataError, match=rf"ratings\.dat, row 3: .*{message}.*\. \w"):
        load(movielens)


# --- Amazon Reviews --------------------------------------------------------------------------


def review18(user: str, item: str, seconds: object, stars: object = 5.0) -> dict[str, object]:
    return {"reviewerID": user, "asin": item, "unixReviewTime": seconds, "overall": stars}


def review23(user: str, item: str, milliseconds: object, stars: object = 5.0) -> dict[str, object]:
    return {
        "user_id": user,
        "asin": "variant",
        "parent_asin": item,
        "timestamp": milliseconds,
        "rating": stars,
    }


@pytest.fixture(params=["", ".gz"])
def amazon18(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    write_json(
        tmp_path / f"Games_5.json{request.param}",
        review18("U", "B", 20),
        review18("U", "A", 10, 2.0),
        review18("V", "C", 5),
        review18("V", "D", 6),
    )
    write_json(
        tmp_path / f"meta_Games.json{request.param}",
        {
            "asin": "A",
            "title": " Tom &amp; Jerry \n",
            "category": ["Games", "Games", "PC &amp; Mac"],
            "brand": "by\n    \n    Acme",
            "description": ["First.", "Second\tline &lt;3"],
        },
        {"asin": "A", "title": "Again"},
        {"asin": "B", "title": "var x = new Date().getTime();", "category": [], "brand": ""},
        {"asin": "C", "title": "Half \ud83d", "brand": None},
        {"asin": "unreviewed", "title": {"not": "even read"}},
    )
    return tmp_path


def test_amazon_2018(amazon18: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        data = load(amazon18)
    assert data.name == "Games_5"
    assert history(data, "U") == ["A", "B"]
    assert data.times.tolist() == [10, 20, 5, 6]
    assert by_id(data) == {
        "B": ("B", {}, ""),
        "A": (
            "Tom & Jerry",
            {"category": ("Games", "PC & Mac"), "brand": ("Acme",)},
            "First. Second line <3",
        ),
        "C": ("Half \ufffd", {}, ""),
        "D": ("D", {}, ""),
    }
    assert "1 items came twice" in caplog.text
    assert "1 of 4 items lack metadata" in caplog.text
    assert len(load(amazon18, min_rating=3).users) == 3


def test_amazon_2023(tmp_path: Path) -> None:
    write_json(
        tmp_path / "Games.jsonl.gz",
        review23("U", "B", 1_588_687_728_923),
        review23("U", "A", 1_588_687_728_100),
    )
    write_json(
        tmp_path / "meta_Games.jsonl.gz",
        {
            "parent_asin": "A",
            "title": "Game",
            "main_category": "Video Games",
            "categories": ["Video Games", "PC"],
            "store": "Acme",
            "description": ["Fun."],
        },
    )
    data = load(tmp_path)
    assert history(data, "U") == ["A", "B"]
    assert data.times.tolist() == [1_588_687_728, 1_588_687_728]
    attributes = {
        "main_category": ("Video Games",),
        "category": ("Video Games", "PC"),
        "store": ("Acme",),
    }
    assert by_id(data) == {"B": ("B", {}, ""), "A": ("Game", attributes, "Fun.")}


def test_amazon_files_are_found_or_named(tmp_path: Path) -> None:
    for name in ("Books", "Games"):
        write_json(tmp_path / f"{name}.json", review18("U", name, 1))
        write_json(tmp_path / f"meta_{name}.json", {"asin": name, "title": f"A title of {name}"})
    with pytest.raises(DataError, match=r"reviews; found: Books\.json, Games\.json"):
        load(tmp_path, "amazon-2018")
    assert load(tmp_path / "Games.json").items[0].title == "A title of Games"
    other = load(tmp_path / "Games.json", metadata=tmp_path / "meta_Books.json")
    assert other.items[0].title == "Games"
    (tmp_path / "meta_Games.json").unlink()
    with pytest.raises(DataError, match=r"metadata \(meta_Games.*found: none.*Name it by metadata"):
        load(tmp_path / "Games.json")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"reviewerID": "U", ', "not a JSON object"),
        (b"{'reviewerID': 'U'}", "not a JSON object"),
        (b"[1, 2]", "a JSON object is wanted"),
        (b"[" * 100_000, "not a JSON object"),
        (b'{"reviewerID": "\xff"}', "not a JSON object in UTF-8"),
        (json.dumps(review23("U", "A", 1)).encode(), "reviewerID is 'None', not an id"),
        (json.dumps(review18("U\ud800", "A", 1)).encode(), "reviewerID"),
        (json.dumps(review18(7, "A", 1)).encode(), "reviewerID is '7'"),  # type: ignore[arg-type]
        (json.dumps(review18("U", " ", 1)).encode(), "empty or too long"),
        (json.dumps(review18("U", "A", "1")).encode(), "unixReviewTime is '1', not a number"),
        (json.dumps(review18("U", "A", None)).encode(), "unixReviewTime is 'None'"),
        (json.dumps(review18("U", "A", True)).encode(), "unixReviewTime is 'True'"),
        (json.dumps(review18("U", "A", float("nan"))).encode(), "not a finite number"),
        (json.dumps(review18("U", "A", 10**400)).encode(), "future"),
        (json.dumps(review18("U", "A", -5)).encode(), "before 1970"),
        (json.dumps(review18("U", "A", 1, None)).encode(), "overall is 'None'"),
        (json.dumps(review18("U", "A", 1, float("nan"))).encode(), "rating nan"),
        (json.dumps(review18("U", "A", 1, 10**400)).encode(), "rating 10{39} is no finite"),
        (json.dumps(review18("U", "A", 1, -float("inf"))).encode(), "rating -inf"),
    ],
)
@pytest.mark.parametrize("amazon18", [""], indirect=True)
def test_amazon_wrong_review(amazon18: Path, line: bytes, message: str) -> None:
    reviews = amazon18 / "Games_5.json"
    reviews.write_bytes(json.dumps(review18("U", "A", 1)).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(DataError, match=rf"Games_5\.json, row 3: .*{message}"):
        load(amazon18, "amazon-2018", min_rating=1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"title": 7}, "title is '7', not text"),
        ({"category": [["deep"]]}, "category is .*not text or a list"),
        ({"description": ["x", None]}, "description is .*not text"),
        ({"description": ["x" * 60_000] * 2}, "longer than 100000 characters"),
        ({"asin": None}, "asin is 'None', not an id"),
    ],
)
@pytest.mark.parametrize("amazon18", [""], indirect=True)
def test_amazon_wrong_metadata(amazon18: Path, fields: dict[str, object], message: str) -> None:
    write_json(amazon18 / "meta_Games.json", {"asin": "B"}, {"asin": "A"} | fields)
    with pytest.raises(DataError, match=rf"meta_Games\.json, row 2: .*{message}"):
        load(amazon18)


@pytest.mark.parametrize("amazon18", [".gz"], indirect=True)
def test_amazon_torn_gzip(amazon18: Path) -> None:
    reviews = amazon18 / "Games_5.json.gz"
    whole = reviews.read_bytes()
    for torn in (whole[:-9], whole[:40], whole[:10] + b"\xff" + whole[11:]):
        reviews.write_bytes(torn)
        with pytest.raises(DataError, match=r"Games_5\.json\.gz, row \d: "):
            load(amazon18, "amazon-2018")


def test_a_row_that_never_ends_is_refused_early(
    amazon18: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_files, "MAX_ROW_BYTES", 60)
    with pytest.raises(DataError, match=r"row 1: the row is longer than 60 bytes"):
        load(amazon18, "amazon-2018")


# --- CSV and Parquet -------------------------------------------------------------------------

NAMES = {"user": "who", "item": "what", "time": "when"}


def test_csv_with_items(tmp_path: Path) -> None:
    log = write(
        tmp_path / "log.csv", "when,stars,what,who", "9,5,p1,ann", "3,1,NA,ann", "", '1,4,p1,"b,c"'
    )
    items = tmp_path / "items.tsv"
    write(items, "sku\tlabel\ttags\tyear\ttext", 'p1\t"A ""big"" one"\tx|y| x\t1999\tlong\ttext')
    with pytest.raises(DataError, match=r"items\.tsv, row 2: Expected 5 columns, got 6"):
        load(log, **NAMES, items=items, item_key="sku", title="label")
    write(items, "sku\tlabel\ttags\tyear\ttext", 'p1\t"A ""big"" one"\tx|y| x\t1999\t"long\ntext"')
    options = {"item_key": "sku", "title": "label", "description": "text"}
    data = load(log, **NAMES, items=items, **options, attributes=["tags", "year"])
    assert data.name == "log"
    assert history(data, "ann") == ["NA", "p1"]
    assert history(data, "b,c") == ["p1"]
    assert by_id(data) == {
        "p1": ('A "big" one', {"tags": ("x", "y"), "year": ("1999",)}, "long text"),
        "NA": ("NA", {}, ""),
    }
    assert len(load(log, **NAMES, rating="stars", min_rating=4).users) == 2


def test_csv_as_other_programs_write_it(tmp_path: Path) -> None:
    text = "user_id,item_id,timestamp\r\n1,é,5\r\n1, 2 ,6\r\n"
    plain = tmp_path / "a.csv"
    plain.write_bytes(text.encode("utf-8-sig"))
    packed = tmp_path / "a.csv.gz"
    packed.write_bytes(gzip.compress(text.encode()))
    misnamed = tmp_path / "b.csv"
    misnamed.write_bytes(packed.read_bytes())
    old = tmp_path / "c.csv"
    old.write_bytes(text.encode("latin-1"))
    for path in (plain, packed, misnamed):
        assert history(load(path), "1") == ["é", "2"]
    assert history(load(old, encoding="latin-1"), "1") == ["é", "2"]
    with pytest.raises(DataError, match=r"c\.csv, row 2: .*invalid UTF8.*right encoding"):
        load(old)
    with pytest.raises(DataError, match=r"unknown encoding: no-such.*that Python knows"):
        load(old, encoding="no-such")


def test_parquet(tmp_path: Path) -> None:
    log = tmp_path / "log.parquet"
    columns = {
        "who": pa.array([2, 1, 2], pa.int64()),
        "what": pa.array(["b", "b", "a"]).dictionary_encode(),
        "when": pa.array([2_500_000_000, 0, 1_000_000_000], pa.timestamp("ns")),
    }
    pq.write_table(pa.table(columns), log)
    items = tmp_path / "items.parquet"
    described = {"what": ["a", "b"], "title": ["A", None], "tags": [["x", "y"], None], "n": [3, 4]}
    pq.write_table(pa.table(described), items)
    data = load(log, **NAMES, items=items, attributes=["tags", "n"])
    assert history(data, "2") == ["a", "b"]
    assert data.times.tolist() == [1, 2, 0]
    attributes = {"tags": ("x", "y"), "n": ("3",)}
    assert by_id(data) == {"b": ("b", {"n": ("4",)}, ""), "a": ("A", attributes, "")}


@pytest.mark.parametrize(
    ("unit", "text", "seconds"),
    [
        ("s", "1700000000.9", 1_700_000_000),
        ("s", "1.7e9", 1_700_000_000),
        ("ms", "1700000000999", 1_700_000_000),
        ("us", "1700000000999999", 1_700_000_000),
        ("iso", "2023-11-14T22:13:20", 1_700_000_000),
        ("iso", "2023-11-14 23:13:20+01:00", 1_700_000_000),
        ("iso", "2023-11-14", 1_699_920_000),
    ],
)
def test_time_units(tmp_path: Path, unit: str, text: str, seconds: int) -> None:
    log = write(tmp_path / "a.csv", "user_id,item_id,timestamp", f"u,i,{text}")
    assert load(log, time_unit=unit).times.tolist() == [seconds]


@pytest.mark.parametrize(
    ("row", "unit", "message"),
    [
        ("u,i,", "s", "timestamp '' is no number"),
        ("u,i,NaN", "s", "timestamp 'NaN' is no number"),
        ("u,i,inf", "s", "timestamp 'inf' is no number"),
        ("u,i,1e999", "s", "timestamp inf is not finite"),
        ("u,i,yesterday", "s", "timestamp 'yesterday' is no number"),
        ("u,i,True", "s", "timestamp 'True' is no number"),
        ("u,i,-1", "s", "before 1970"),
        ("u,i,1700000000000", "s", "future.*milliseconds.*time_unit"),
        ("u,i,yesterday", "iso", "time 'yesterday' is not like 2024-"),
        ("u,i,1700000000", "iso", "time '1700000000' is not like 2024-"),
        (",i,5", "s", "column 'user_id' is empty"),
        ("u, ,5", "s", "column 'item_id' is empty"),
        ("u,5", "s", "Expected 3 columns, got 2"),
        ("u,i,5,6", "s", "Expected 3 columns, got 4"),
        (f"u,{'i' * 100_001},5", "s", "column 'item_id' is too long"),
    ],
)
def test_csv_wrong_row(tmp_path: Path, row: str, unit: str, message: str) -> None:
    good = "u,i,2020-01-01" if unit == "iso" else "u,i,5"
    log = write(tmp_path / "a.csv", "user_id,item_id,timestamp", good, good, row, good)
    with pytest.raises(DataError, match=rf"a\.csv, row 4: .*{message}"):
        load(log, time_unit=unit)


def test_time_of_tomorrow_is_the_limit(tmp_path: Path) -> None:
    head = "user_id,item_id,timestamp"
    assert load(write(tmp_path / "a.csv", head, f"u,i,{time.time() + 80_000}"))
    with pytest.raises(DataError, match=r"row 2: .*future of this machine's clock"):
        load(write(tmp_path / "a.csv", head, f"u,i,{time.time() + 90_000}"))


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("when", pa.array([1, None]), "row 2: when is missing"),
        ("when", pa.array([1.0, float("nan")]), "row 2: when nan is not finite"),
        ("when", pa.array([0, None], pa.timestamp("s")), "row 2: when is missing"),
        ("when", pa.array([True, False]), "holds bool, not numbers"),
        ("when", pa.array([1, 2**62]), "row 2: .*future"),
        ("who", pa.array(["u", None]), "row 2: column 'who' is empty"),
        ("who", pa.array([1.0, 2.0]), "holds double; ids must be text or integers"),
        ("what", pa.array([["a"], ["b"]]), "ids must be text or integers"),
    ],
)
def test_parquet_wrong_values(tmp_path: Path, column: str, values: pa.Array, message: str) -> None:
    good = {"who": ["u", "u"], "what": ["a", "b"], "when": [1, 2]}
    pq.write_table(pa.table(good | {column: values}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message):
        load(tmp_path / "a.parquet", **NAMES)


def test_table_rating_that_is_none(tmp_path: Path) -> None:
    log = write(tmp_path / "a.csv", "user_id,item_id,timestamp,rating", "u,i,1,5", "u,i,2,")
    assert len(load(log).users) == 2
    with pytest.raises(DataError, match="row 3: rating '' is no number"):
        load(log, min_rating=1)


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_min_rating_that_leaves_nothing(tmp_path: Path, format: str) -> None:
    write(tmp_path / "x.inter", INTER, "1\t1\t5\t1")
    write(tmp_path / "ratings.dat", "1::1::5::1")
    write(tmp_path / "movies.dat", "1::T::G")
    year = "2018" if format == "amazon-2018" else "2023"
    review, key = (review18, "asin") if year == "2018" else (review23, "parent_asin")
    write_json(tmp_path / "R.json", review("U", "A", 1))
    write_json(tmp_path / "meta_R.json", {key: "A"})
    table = write(tmp_path / "t.csv", "user_id,item_id,timestamp,rating", "1,1,1,5")
    path = table if format == "table" else tmp_path
    assert len(load(path, format, min_rating=5).users) == 1
    with pytest.raises(DataError, match=r"no interaction is rated 5\.5 or more"):
        load(path, format, min_rating=5.5)


# --- files that are none ---------------------------------------------------------------------


def wrong(values: list[bytes], type_: pa.DataType) -> pa.Array:
    """Bytes that a careless writer declared as text."""
    return pa.array(values, pa.binary()).cast(type_, safe=False)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"title": pa.array([b"caf\xe9"])}, r"column 'title' is binary.*UTF-8"),
        ({"title": wrong([b"caf\xe9"], pa.string())}, r"column 'title' is string.*UTF-8"),
        ({"title": pa.array([{"en": "x"}])}, r"column 'title' holds struct.*not text"),
        ({"tags": pa.array([[{"en": "x"}]])}, r"column 'tags' is list.*Convert"),
        ({"tags": pa.array([[["x"]]])}, r"column 'tags' is list.*Convert"),
        ({"tags": pa.array([[b"\xff"]])}, r"column 'tags' is list.*Convert"),
        ({"tags": pa.array([{"en": "x"}])}, r"column 'tags' holds struct"),
        ({"item_id": wrong([b"\xff"], pa.string())}, r"column 'item_id' is string.*UTF-8"),
    ],
    ids=repr,
)
def test_parquet_columns_that_are_no_text_are_named(
    tmp_path: Path, columns: dict[str, pa.Array], message: str
) -> None:
    log = write(tmp_path / "log.csv", "user_id,item_id,timestamp", "u,i,1")
    sound = {"item_id": pa.array(["i"]), "title": pa.array(["I"]), "tags": pa.array(["x"])}
    pq.write_table(pa.table(sound | columns), tmp_path / "items.parquet")
    with pytest.raises(DataError, match=rf"items\.parquet: {message}"):
        load(log, items=tmp_path / "items.parquet", attributes=["tags"])


def test_missing_empty_and_irregular_files(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.csv"
    os.mkfifo(pipe)
    loop = tmp_path / "loop.csv"
    loop.symlink_to(loop)
    empty = write(tmp_path / "empty.csv")
    header = write(tmp_path / "header.csv", "user_id,item_id,timestamp")
    no_parquet = write(tmp_path / "text.parquet", "user_id,item_id,timestamp")
    binary = tmp_path / "binary.csv"
    binary.write_bytes(bytes(range(256)) * 10)
    for path, message in [
        (tmp_path / "none.csv", "does not exist"),
        (loop, "does not exist"),
        (pipe, "not a regular file"),
        (tmp_path, "must end in"),
        (empty, "is empty"),
        (header, "no rows below its header"),
        (no_parquet, "no Parquet file"),
        (binary, r"binary\.csv"),
        (write(tmp_path / "x.xlsx"), "must end in"),
    ]:
        with pytest.raises(DataError, match=message):
            load(path, "table")
    link = tmp_path / "link.csv"
    write(header, "user_id,item_id,timestamp", "u,i,1")
    link.symlink_to(header)
    assert load(link).name == "link"


@pytest.mark.parametrize("format", sorted(set(FORMATS) - {"table"}))
def test_other_formats_in_a_folder_without_them(tmp_path: Path, format: str) -> None:
    for path, message in [
        (tmp_path, r"must hold one file|movies\.dat does not exist"),
        (tmp_path / "missing", "missing does not exist"),
        (tmp_path / "no" / "foo.json", r"foo\.json does not exist"),
    ]:
        with pytest.raises(DataError, match=message):
            load(path, format)


def test_a_huge_or_endless_attribute_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = write(tmp_path / "log.csv", "user_id,item_id,timestamp", "u,i,1")
    items = write(tmp_path / "items.csv", "item_id,title,tags", "i,I,x", f"j,J,{'x' * 100_001}")
    with pytest.raises(DataError, match=r"items\.csv, row 3: a field is longer than 100000"):
        load(log, items=items, attributes=["tags"])
    write(items, "item_id,title,tags", "i,I,x", "j,J,1|2|3|4")
    assert load(log, items=items, attributes=["tags"])
    monkeypatch.setattr(data_files, "MAX_VALUES", 3)
    with pytest.raises(DataError, match=r"items\.csv, row 3: .* more than 3 attribute values"):
        load(log, items=items, attributes=["tags"])


def test_what_comes_twice_is_told_by_its_row(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = ["u,i,5", "u,j,5", "u,i,5", "u,j,5", "u,i,6"]
    log = write(tmp_path / "log.csv", "user_id,item_id,timestamp", *rows)
    items = write(tmp_path / "items.csv", "item_id,title", "i,I", "j,J", "i,Other")
    with caplog.at_level(logging.WARNING):
        assert len(load(log, items=items).users) == 3
    assert "2 duplicate rows were dropped (rows 4, 5)" in caplog.text
    assert "1 items came twice (rows 4); the first was kept" in caplog.text


def test_rows_that_are_not_of_the_named_encoding(tmp_path: Path) -> None:
    log = write(tmp_path / "a.csv", "user_id,item_id,timestamp", "u,i,1", "u,é,2")
    with pytest.raises(DataError, match=r"a\.csv, row 3: .*read as ascii"):
        load(log, encoding="ascii")


def outside(folder: Path, name: str) -> Path:
    """Move a file of the folder elsewhere, and leave a link to it."""
    other = folder.parent / "elsewhere"
    other.mkdir(exist_ok=True)
    file = (folder / name).rename(other / name)
    (folder / name).symlink_to(file)
    return folder


@pytest.mark.parametrize("name", ["ml.inter", "ml.item"])
def test_recbole_links_that_leave_the_folder(atomic: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for file in atomic.glob("ml.*"):
        file.rename(folder / file.name)
    with pytest.raises(DataError, match=rf"{name} is a link to .*elsewhere.*outside"):
        load(outside(folder, name), "recbole")


@pytest.mark.parametrize("name", ["ratings.dat", "movies.dat"])
def test_movielens_links_that_leave_the_folder(movielens: Path, name: str) -> None:
    with pytest.raises(DataError, match=rf"{name} is a link to .*elsewhere.*outside"):
        load(outside(movielens, name), "movielens-1m")


def test_links_within_a_folder_and_named_ones_are_followed(atomic: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (atomic / "ml.item").rename(tmp_path / "real" / "items")
    (atomic / "ml.item").symlink_to(tmp_path / "real" / "items")
    assert by_id(load(atomic))["1"][0] == "Toy Story"


def test_blank_files_by_line(movielens: Path) -> None:
    write(movielens / "ratings.dat", "", "  ")
    with pytest.raises(DataError, match="holds no rows"):
        load(movielens)


def test_csv_row_of_many_megabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_files, "MAX_ROW_BYTES", 1000)
    rows = ["u,i,5"] * 50
    log = write(tmp_path / "a.csv", "user_id,item_id,timestamp", *rows, f"u,{'i' * 5000},5")
    with pytest.raises(DataError, match=r"a\.csv, row 52: the row is longer than 1000 bytes"):
        load(log)


def test_line_breaks_in_quotes_wherever_a_block_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_files, "MAX_ROW_BYTES", 100)
    rows = [f'u,"i\n\n{n}",{n}' for n in range(100)]
    data = load(write(tmp_path / "a.csv", "user_id,item_id,timestamp", *rows))
    assert history(data, "u") == [f"i\n\n{n}" for n in range(100)]


def test_torn_gzip_csv(tmp_path: Path) -> None:
    text = "user_id,item_id,timestamp\n" + "".join(f"u{n},i{n},{n}\n" for n in range(2000))
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(text.encode())[:-100])
    with pytest.raises(DataError, match=r"a\.csv\.gz"):
        load(path)


# --- dispatch --------------------------------------------------------------------------------


def test_detection_needs_one_answer(atomic: Path, movielens: Path, tmp_path: Path) -> None:
    assert detect_format(atomic / "ml.inter") == "recbole"
    assert detect_format(movielens) == "movielens-1m"
    write(movielens / "x.inter", INTER, "1\t1\t1\t1")
    with pytest.raises(DataError, match="recbole or movielens-1m"):
        detect_format(movielens)
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match=r"none fits.*recbole, movielens-1m.*table"):
        detect_format(tmp_path / "bare")
    with pytest.raises(DataError, match="does not exist"):
        detect_format(tmp_path / "missing")
    load(atomic / "ml.inter").save(tmp_path / "prepared")
    with pytest.raises(DataError, match="already a prepared data set"):
        detect_format(tmp_path / "prepared")


def test_options_may_come_as_text(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp,rating\nu,a,1,4\nu,b,2,1\n")
    (tmp_path / "items.csv").write_text("item_id,title,kind,mood\na,A,x,dark\nb,B,y,light\n")
    data = load(
        tmp_path / "log.csv",
        items=str(tmp_path / "items.csv"),
        min_rating="3",
        attributes="kind, mood",
    )
    assert [item.attributes for item in data.items] == [{"kind": ("x",), "mood": ("dark",)}]
    with pytest.raises(DataError, match=r"option min_rating: .*number.*'many'"):
        load(tmp_path / "log.csv", min_rating="many")


def test_a_folder_with_other_json_is_told_by_its_names(atomic: Path) -> None:
    (atomic / "about.json").write_text('{\n "not": "reviews"\n}\n')
    assert detect_format(atomic) == "recbole"


@pytest.mark.parametrize("name", ["name", "path", "format", "k_core"])
def test_what_is_no_option_of_the_loader_is_refused(atomic: Path, name: str) -> None:
    with pytest.raises(DataError, match=rf"no option '{name}'\. Its options: user_field"):
        loaders.load(atomic, options={name: "x"})


def test_unknown_format_and_option(atomic: Path) -> None:
    with pytest.raises(DataError, match=r"unknown data format 'csv'\. Known: recbole"):
        load(atomic, "csv")
    with pytest.raises(DataError, match=r"no option 'time_unit'.*title_field"):
        load(atomic, time_unit="ms")
    log = write(atomic / "a.csv", "user_id,item_id,timestamp", "u,i,1")
    with pytest.raises(DataError, match=r"unknown time unit 'min'\. Known: s, ms, us, iso"):
        load(log, time_unit="min")
    with pytest.raises(DataError, match="no column 'who' but 'user_id', 'item_id'"):
        load(log, user="who")
