"""Finished cells: kept, found again, and never mixed with those of other settings."""

import gzip
import json

import pytest

from apr_jax.config import ConfigError
from apr_jax.evaluation.compare.grid import Cell, Row
from apr_jax.evaluation.compare.store import Results, read_records, read_results

SETTINGS = {"weights": "a1", "problems": "b2 (3)", "seed": 0, "engine.lanes": 4}
RECORDS = [{"problem": index, "correct": index > 0} for index in range(3)]


def cell(label="cons@2:adaptive", temperature=1.0):
    return Cell(Row(label, label, "adaptive"), None, temperature, 512)


@pytest.fixture
def workdir(tmp_path):
    Results(tmp_path).add(cell(), SETTINGS, {"accuracy": 2 / 3}, RECORDS)
    return tmp_path


def test_a_cell_that_is_done_is_found_with_its_records(workdir):
    row = Results(workdir).find(cell(), SETTINGS)
    assert row == read_results(workdir)[0]
    assert (row["method"], row["temperature"], row["accuracy"]) == ("cons@2:adaptive", 1.0, 2 / 3)
    assert read_records(workdir, row) == RECORDS
    assert Results(workdir).find(cell(temperature=0.5), SETTINGS) is None
    assert Results(workdir).find(cell("serial"), SETTINGS | {"weights": "c3"}) is None


def test_a_half_written_line_and_lost_records_are_cells_to_do_again(workdir):
    path = workdir / "results.jsonl"
    whole = path.read_text()
    path.write_text(whole + whole[:40])
    assert len(read_results(workdir)) == 1
    path.write_text(whole[:-1])
    assert Results(workdir).find(cell(), SETTINGS) is None
    path.write_text(whole)
    next((workdir / "records").iterdir()).unlink()
    assert Results(workdir).find(cell(), SETTINGS) is None


def torn(data):
    return data[: len(data) // 2]


def overwritten(data):
    return data[:12] + b"\xff" * 8 + data[20:]


@pytest.mark.parametrize(
    "damage",
    [torn, overwritten, lambda data: b"plain", lambda data: b"", lambda data: gzip.compress(b'{"problem": 0\n')],
    ids=["torn", "overwritten", "no gzip", "empty", "no JSON"],
)
def test_damaged_records_are_named_and_missing_ones_are_missing(workdir, damage):
    (row,) = read_results(workdir)
    path = workdir / row["records"]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ConfigError, match=rf"{path.name}: damaged records .* start launch/compare\.py again"):
        read_records(workdir, row)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read_records(workdir, row)


def test_another_cell_joins_and_the_same_cell_replaces(workdir):
    results = Results(workdir)
    results.add(cell("serial"), SETTINGS, {"accuracy": 0.5}, RECORDS)
    results.add(cell(), SETTINGS, {"accuracy": 0.25}, RECORDS)
    assert [(row["method"], row["accuracy"]) for row in read_results(workdir)] == [
        ("serial", 0.5),
        ("cons@2:adaptive", 0.25),
    ]


@pytest.mark.parametrize("field", ["weights", "problems", "seed", "engine.lanes"])
def test_a_cell_of_other_settings_is_refused_with_both_values(workdir, field):
    with pytest.raises(
        ConfigError, match=f"(?s){field}: {SETTINGS[field]!r} there, 'else' now".replace("(3)", r"\(3\)")
    ):
        Results(workdir).find(cell(), SETTINGS | {field: "else"})


@pytest.mark.parametrize("field", ["problems", "seed", "engine.lanes", "at_once"])
def test_cells_that_cannot_be_compared_do_not_share_a_folder(workdir, field):
    with pytest.raises(ConfigError, match="another --workdir"):
        Results(workdir).find(cell("serial"), SETTINGS | {field: "else"})


@pytest.mark.parametrize("line", ["nonsense\n", "[]\n", json.dumps({"method": "x"}) + "\n"])
def test_what_is_no_row_is_named(workdir, line):
    with (workdir / "results.jsonl").open("a") as file:
        file.write(line)
    with pytest.raises(ConfigError, match=r"results\.jsonl, line 2"):
        read_results(workdir)


def test_the_same_records_are_the_same_bytes(workdir, tmp_path):
    (first,) = (workdir / "records").iterdir()
    other = Results(tmp_path / "other").add(cell(), SETTINGS, {}, RECORDS)
    assert (tmp_path / "other" / other["records"]).read_bytes() == first.read_bytes()
