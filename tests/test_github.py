"""GitHub reads these files only after a push: here their schemas, and what they call, are checked before."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import bookdata
import pytest
import yaml

ROOT = bookdata.ROOT
BIN = Path(sys.executable).parent
GITHUB = ROOT / ".github"
WORKFLOWS = sorted(GITHUB.glob("workflows/*.yml"))
ACTIONS = sorted(GITHUB.glob("actions/*/action.yml"))
FORMS = sorted(path for path in GITHUB.glob("ISSUE_TEMPLATE/*.yml") if path.name != "config.yml")
SCHEMAS = [
    *((path, "vendor.github-workflows") for path in WORKFLOWS),
    *((path, "custom.github-workflows-require-timeout") for path in WORKFLOWS),
    *((path, "vendor.github-actions") for path in ACTIONS),
    *((path, "vendor.github-issue-forms") for path in FORMS),
    (GITHUB / "ISSUE_TEMPLATE/config.yml", "vendor.github-issue-config"),
    (GITHUB / "dependabot.yml", "vendor.dependabot"),
]


def name_of(value):
    return value.relative_to(GITHUB).as_posix() if isinstance(value, Path) else None


def load(path):
    # BaseLoader: YAML 1.1 would read the key "on" as true
    return yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader)


def steps(path):
    document = load(path)
    jobs = document["jobs"].values() if "jobs" in document else [document["runs"]]
    return [step for job in jobs for step in job.get("steps", [])]


def schema_errors(path, schema):
    """What check-jsonschema says against the file, "" if nothing; a schema it would have to fetch makes it fail."""
    nowhere = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
    command = [BIN / "check-jsonschema", "--builtin-schema", schema, path]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **nowhere})
    return "" if done.returncode == 0 else done.stdout + done.stderr or "failed"


@pytest.mark.parametrize(("path", "schema"), SCHEMAS, ids=name_of)
def test_schema(path, schema):
    assert schema_errors(path, schema) == ""


@pytest.mark.parametrize(
    ("source", "schema", "right", "wrong"),
    [
        ("workflows/main.yml", "vendor.github-workflows", "runs-on:", "run-on:"),
        ("workflows/main.yml", "vendor.github-workflows", "pages: write", "pages: yes"),
        ("workflows/main.yml", "custom.github-workflows-require-timeout", "timeout-minutes:", "#"),
        ("actions/environment/action.yml", "vendor.github-actions", "using: composite", "using: python"),
        ("ISSUE_TEMPLATE/wrong_answer.yml", "vendor.github-issue-forms", "type: input", "type: entry"),
        ("ISSUE_TEMPLATE/config.yml", "vendor.github-issue-config", "true", "perhaps"),
        ("dependabot.yml", "vendor.dependabot", "monthly", "sometimes"),
    ],
)
def test_planted_schema_fault_is_found(source, schema, right, wrong, tmp_path):
    text = (GITHUB / source).read_text(encoding="utf-8")
    assert right in text
    broken = tmp_path / "broken.yml"
    broken.write_text(text.replace(right, wrong), encoding="utf-8")
    assert "broken.yml" in schema_errors(broken, schema)


def test_the_workflows_are_those_expected():
    assert [path.name for path in WORKFLOWS] == ["main.yml", "pull_request.yml", "weekly.yml"]
    assert [path.name for path in FORMS] == ["new_question.yml", "wrong_answer.yml"]
    assert "pull_request" in load(GITHUB / "workflows/pull_request.yml")["on"]
    assert load(GITHUB / "workflows/main.yml")["on"]["push"] == {
        "branches": [bookdata.config()["repository"]["branch"]]
    }
    assert "schedule" in load(GITHUB / "workflows/weekly.yml")["on"]


# --- what the workflows call exists -----------------------------------------------------------------------------------


def missing(script, root=ROOT):
    """The make targets, commands of the environment, modules and paths in a shell script that do not exist."""
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][\w-]*):(?!=)", makefile, re.MULTILINE))
    words = shlex.split(script, comments=True)
    found = []
    for before, word in zip(["", *words], words, strict=False):
        if before == "make":
            exists = word in targets
        elif before == "-m":
            exists = any((root / f"{word.replace('.', '/')}{end}").exists() for end in (".py", "/__init__.py"))
            exists = exists or word == "pytest"
        elif word.startswith(".venv/bin/"):
            exists = (BIN / word.removeprefix(".venv/bin/")).exists()
        elif word.startswith("_build/"):
            continue  # made by the build
        elif re.fullmatch(r"\.?[\w*][\w*./-]*", word) and ("/" in word or re.search(r"\.(py|toml|txt|sh)$", word)):
            exists = (root / word.split("*")[0]).exists()  # of a pattern, the folder
        else:
            continue
        if not exists:
            found.append(word)
    return found


@pytest.mark.parametrize("path", WORKFLOWS + ACTIONS, ids=name_of)
def test_everything_that_is_called_exists(path):
    assert [word for step in steps(path) for word in missing(step.get("run", ""))] == []


@pytest.mark.parametrize(
    ("call", "word"),
    [
        ("make nothing", "nothing"),
        (".ci/walk", ".ci/walk"),
        (".venv/bin/nothing x", ".venv/bin/nothing"),
        ("python tools/nothing.py", "tools/nothing.py"),
        ("python -m labkit.nothing", "labkit.nothing"),
    ],
)
def test_planted_call_of_nothing_is_found(call, word):
    assert missing(f"# a comment\n{call}\nmake env") == [word]


# --- what a schema cannot say -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", WORKFLOWS + ACTIONS, ids=name_of)
def test_actions_are_pinned_and_scripts_interpolate_nothing(path):
    for step in steps(path):
        assert "${{" not in step.get("run", ""), (
            "pass it through env: the shell would execute what the expression holds"
        )
        if "uses" in step:
            local = step["uses"].startswith("./") and (ROOT / step["uses"] / "action.yml").exists()
            assert local or re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"]), step["uses"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=name_of)
def test_permissions_are_the_least(path):
    document = load(path)
    assert "pull_request_target" not in document["on"]  # it would run a stranger's notebooks with our token
    assert document["permissions"] == {"contents": "read"}
    for name, job in document["jobs"].items():
        publishes = any("deploy-pages" in step.get("uses", "") for step in job["steps"])
        assert job.get("permissions") == ({"pages": "write", "id-token": "write"} if publishes else None), name
        assert job["runs-on"] == "ubuntu-latest"


def test_the_site_is_published_only_after_the_suite():
    jobs = load(GITHUB / "workflows/main.yml")["jobs"]
    assert ".ci/run" in [step.get("run") for step in jobs[jobs["publish"]["needs"]]["steps"]]
    assert jobs["publish"]["environment"]["name"] == "github-pages"


def test_the_form_offers_the_book_s_levels_and_evidence():
    fields = {field["id"]: field for field in load(GITHUB / "ISSUE_TEMPLATE/new_question.yml")["body"]}
    assert tuple(fields["level"]["attributes"]["options"]) == bookdata.LEVELS
    assert tuple(fields["evidence"]["attributes"]["options"]) == bookdata.EVIDENCE


def test_licences():
    assert "Apache License\n                           Version 2.0" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    text = (ROOT / "LICENSE-CC-BY-4.0").read_text(encoding="utf-8")
    assert text.startswith("Creative Commons Attribution 4.0 International Public License") and "Section 8 -- " in text


# --- which notebooks a pull request validates -------------------------------------------------------------------------

A, B, LAB = "chapters/a/one.ipynb", "chapters/b/two.ipynb", "labs/c/lab.ipynb"
EVIL = "chapters/a/$(shell touch evil).ipynb"


@pytest.fixture
def pull_request(tmp_path):
    """A function: what the step asks of make for a pull request that changes the named files, and its exit status."""
    script = next(step["run"] for step in steps(GITHUB / "workflows/pull_request.yml") if step.get("id") == "changed")
    # make, but it only notes what it is asked, and fails for the first notebook
    fake = tmp_path / "bin/make"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\necho "$*" >> "$RUNNER_TEMP/asked"\ntest "$*" != "check NB={A}"\n')
    fake.chmod(0o755)
    repo = tmp_path / "repo"
    names = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    for role in ("AUTHOR", "COMMITTER"):
        names |= {f"GIT_{role}_NAME": "t", f"GIT_{role}_EMAIL": "t@t"}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    path = f"{fake.parent}{os.pathsep}{os.environ['PATH']}"
    env = {**inherited, **names, "PATH": path, "RUNNER_TEMP": str(tmp_path)}

    def git(*arguments):
        subprocess.run(["git", *arguments], cwd=repo, env=env, check=True, capture_output=True)

    def run(changes, deletes=()):
        for name in (A, B, LAB):
            (repo / name).parent.mkdir(parents=True, exist_ok=True)
            (repo / name).write_text(name)
        git("init", "-q")
        git("add", "-A")
        git("commit", "-qm", "base")
        for name in changes:
            (repo / name).parent.mkdir(parents=True, exist_ok=True)
            (repo / name).write_text("changed")
        for name in deletes:
            (repo / name).unlink()
        git("add", "-A")
        git("commit", "-qm", "merge")
        # the shell as GitHub calls it for `shell: bash`
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
        done = subprocess.run(command, cwd=repo, env=env, capture_output=True, text=True)
        asked = tmp_path / "asked"
        return (asked.read_text().splitlines() if asked.exists() else []), done.returncode

    return run


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
@pytest.mark.parametrize(
    ("changes", "deletes", "asked", "passes"),
    [
        ([B], [], [f"check NB={B}"], True),
        ([A, B], [], [f"check NB={A}", f"check NB={B}"], False),  # the first fails: the second is still checked
        ([LAB, "intro.ipynb"], [], ["check NB=intro.ipynb", f"check NB={LAB}"], True),
        (["chapters/a/index.md", "README.md", "tests/broken.ipynb"], [], [], True),
        ([], [B], [], True),
        *(
            ([B, name], [], ["test"], True)
            for name in (
                "labkit/models.py",
                "conftest.py",
                "requirements-models.txt",
                "tools/nb.py",
                "_ext/bookdata.py",
                "labs/c/results/h100.json",
            )
        ),
        ([B, EVIL], [], [], False),
    ],
)
def test_a_pull_request_validates_what_it_changes(pull_request, changes, deletes, asked, passes):
    calls, status = pull_request(changes, deletes)
    assert (calls, status == 0) == (asked, passes)
