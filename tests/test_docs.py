"""The commands of the documentation: that they are accepted, and what the first page shows, run."""

import json
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import tiny_runs
from devices import environment

from knet_jax.config.files import load_config
from knet_jax.config.validation import validate

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks/README.md")


def blocks(page, *kinds):
    """(kind, code) of the blocks of a page."""
    found = re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [(kind, code) for kind, code in found if kind in kinds]


def commands(page):
    """What the page calls Python with."""
    lines = "".join(code for _, code in blocks(page, "bash")).replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines]
    return [words[1:] for words in found if words and words[0].endswith("python")]


COMMANDS = [
    pytest.param(words, id=f"{page.name}-{i}")
    for page in PAGES
    for i, words in enumerate(commands(page))
    if words[:2] != ["-m", "venv"]
]


@cache
def usage(*program):
    done = subprocess.run(
        [sys.executable, *program, "--help"],
        cwd=ROOT,
        env=environment(1),
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_every_page_is_read():
    assert len(PAGES) > 9 and len(COMMANDS) > 35


@pytest.mark.slow
@pytest.mark.parametrize("words", COMMANDS)
def test_programs_and_flags_are_there(words):
    program = words[:2] if words[0] == "-m" else words[:1]
    flags = {word.split("=")[0] for word in words if re.match(r"--(?!config\.)", word)}
    text = usage(*program)
    missing = {flag for flag in flags - {"--help"} if not re.search(rf"{flag}\b", text)}
    assert not missing


@pytest.mark.parametrize(
    "words", [case for case in COMMANDS if case.values[0][0] in ("train.py", "prepare_data.py")]
)
def test_configs_and_keys_are_accepted(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    spec = words[words.index("--config") + 1]
    validate(load_config(spec, [word for word in words if word.startswith("--config.")]))


def run(folder, kind, code):
    done = subprocess.run(
        ["bash", "-ec", code] if kind == "bash" else [sys.executable, "-c", code],
        cwd=folder,
        env=environment(1) | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_first_page_does_what_it_says(tmp_path):
    """What it does with a model, on a tiny one in the place of the demo's."""
    data = f"--config.data.data_dir={tmp_path / 'data'}"
    model = tiny_runs.write(tmp_path / "runs" / "demo", "panoptic", data)
    (tmp_path / "runs" / "mine").symlink_to(model)
    for name in ("predict.py", "eval.py", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    page = ROOT / "README.md"
    programs = (
        r"-m knet_jax\.data\.shapes|predict\.py|eval\.py --workdir runs/mine|-m knet_jax\.export"
    )
    lines = "".join(code for _, code in blocks(page, "bash")).splitlines()
    chosen = [line for line in lines if re.match(rf"(\.venv/bin/)?python ({programs})", line)]
    assert len(chosen) == 7
    for line in chosen:
        run(tmp_path, "bash", re.sub(r"^\S*python", sys.executable, line))
    [(kind, code)] = blocks(page, "python")
    assert len(code.strip().splitlines()) <= 10
    assert run(tmp_path, kind, code).strip()
    assert (tmp_path / "segments.png").is_file()
    assert (tmp_path / "out" / "contact_sheet.jpg").is_file()
    assert {path.name for path in model.glob("model.*")} == {"model.onnx", "model.stablehlo.npz"}
    for linked in re.findall(r"\]\(((?!http|#)[^)]+)\)", page.read_text()):
        assert (ROOT / linked).exists(), linked


@pytest.mark.slow
def test_the_page_about_predicting_does_what_it_says(tmp_path):
    """Its commands and its Python, on a tiny model in the place of the demo's."""
    page = ROOT / "docs" / "predicting.md"
    found = blocks(page, "bash", "python")
    assert [kind for kind, _ in found] == ["bash", "bash", "python"]
    tiny_runs.write(tmp_path / "runs" / "demo", "panoptic")
    (tmp_path / "predict.py").symlink_to(ROOT / "predict.py")
    environment_made = {"make demo", ". .venv/bin/activate"}
    for kind, code in found:
        lines = [line for line in code.splitlines() if line not in environment_made]
        code = "\n".join(lines)
        run(
            tmp_path,
            kind,
            code.replace("python ", f"{sys.executable} ") if kind == "bash" else code,
        )
    listed = json.loads((tmp_path / "out" / "images.json").read_text())["images"]
    assert [image["file_name"] for image in listed] == [f"{i:02}.png" for i in range(12)]
    assert (tmp_path / "segments.png").is_file()
