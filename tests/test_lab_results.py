"""Recorded results: all say where they come from; the throughput lab's follow their schema, and a run goes on where it stopped."""

import json
from datetime import date

import pytest
from jsonschema import Draft202012Validator

from labs.vllm_throughput import __main__ as driver
from labs.vllm_throughput.results import RESULTS, fitted, recorded

SCHEMA = Draft202012Validator(json.loads((driver.HERE / "schema.json").read_text(encoding="utf-8")))
FILES = sorted(RESULTS.glob("*.json"))

CHAPTERS = [path for lab in ("agent", "rag") for path in sorted((driver.HERE.parent / lab / "results").glob("*.json"))]


@pytest.mark.parametrize("path", CHAPTERS, ids=["/".join(path.parts[-3::2]) for path in CHAPTERS])
def test_every_recorded_result_names_its_machine_versions_commit_and_date(path):
    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    record = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert record["machine"]["cores"] > 0 and record["versions"] and record["commit"]
    assert date.fromisoformat(record["date"][:10])


def test_there_are_results():
    assert FILES and recorded()


@pytest.mark.parametrize("path", FILES, ids=[path.name for path in FILES])
def test_recorded_results_follow_the_schema(path):
    record = json.loads(path.read_text(encoding="utf-8"))
    assert [error.message for error in SCHEMA.iter_errors(record)] == []


def test_a_time_below_its_bound_is_refused():
    record = json.loads(
        next(path for path in FILES if path.name.endswith("base.decode.json")).read_text(encoding="utf-8")
    )
    record["rows"][0]["over_bound"] = 0.9
    assert not SCHEMA.is_valid(record)


def test_machines_that_differ_in_cores_alone_are_kept_apart(tmp_path):
    record = json.loads(FILES[0].read_text(encoding="utf-8"))
    for cores in (2, 16):
        record["machine"]["cores"] = cores
        (tmp_path / f"{cores}.json").write_text(json.dumps(record), encoding="utf-8")
    assert len(recorded(tmp_path)) == 2


def test_every_machine_with_steps_and_prompts_has_a_model():
    for records in recorded().values():
        for model, setting, step in records:
            if step == "load":
                assert fitted(records, model, setting).capacity(128, 32) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--steps", "nonsense"], "no such step: nonsense"), (["--profile", "tpu"], "invalid choice")],
)
def test_bad_options_are_refused(options, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["lab", *options])
    with pytest.raises(SystemExit):
        driver.main()
    assert message in capsys.readouterr().err


def test_a_model_that_cannot_be_found_is_one_message(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(driver, "device", lambda: json.loads(FILES[0].read_text(encoding="utf-8"))["machine"])
    monkeypatch.setattr(
        "sys.argv", ["lab", "--model", "no-such/model", "--steps", "capacity", "--results", str(tmp_path)]
    )
    assert driver.main() == 1
    assert "no-such/model is neither a model's folder nor a hub id" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
