"""What the documentation names is there, and what the first pages show does what they say."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_runs
from devices import environment

from knet_jax.config.files import load_config
from knet_jax.config.validation import validate

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))


def blocks(page, *kinds):
    """(kind, code) of the blocks of a page."""
    found = re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [(kind, code) for kind, code in found if kind in kinds]


def commands(page):
    """The words that follow `python` in the commands of a page."""
    lines = "".join(code for _, code in blocks(page, "bash")).replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines]
    found = [
        ["python", "-m", "knet_jax.cli.main", *words[1:]]
        if words and words[0].endswith("knet")
        else words
        for words in found
    ]
    return [words[1:] for words in found if words and words[0].endswith("python")]


COMMANDS = [
    (page.name, words)
    for page in PAGES
    for words in commands(page)
    if words[:2] not in (["-m", "venv"], ["-m", "pytest"])
]


def test_every_page_is_read():
    assert len(PAGES) > 9 and len(COMMANDS) > 35


def test_files_and_links_are_there():
    missing = []
    for page in PAGES:
        text = page.read_text()
        linked = re.findall(r"\]\(((?!http|#)[^)#]+)", text)
        missing += [f"{page.name}: {name}" for name in linked if not (page.parent / name).exists()]
        folders = r"(?<![\w/.])(?:knet_jax|configs|tests|docs|benchmarks)/[\w/]+(?:\.\w+)?"
        named = {name for name in re.findall(folders, text) if not name.endswith("/FILE.py")}
        named -= {name for name in named if name.startswith("benchmarks/results/")}
        missing += [f"{page.name}: {name}" for name in named if not (ROOT / name).exists()]
        modules = re.findall(r"-m (knet_jax[\w.]*)", text)
        modules = {name.replace(".", "/") for name in modules}
        missing += [
            f"{page.name}: {name}"
            for name in modules
            if not (ROOT / f"{name}.py").exists() and not (ROOT / name / "__main__.py").exists()
        ]
    assert not missing


def test_configs_and_keys_are_accepted(monkeypatch):
    monkeypatch.chdir(ROOT)
    for page, words in COMMANDS:
        if "--config" in words and not words[0].startswith("benchmarks/"):
            spec = words[words.index("--config") + 1]
            changes = [word for word in words if word.startswith("--config.")]
            try:
                validate(load_config(spec, changes))
            except ValueError as error:
                raise AssertionError(f"{page}: {shlex.join(words)}: {error}") from error


HELP = """
import os, runpy, sys
from pathlib import Path
# Once for all programs.
import knet_jax.app.predictions, knet_jax.saved.convert, knet_jax.training.evaluation, optax

for i, program in enumerate(sys.argv[2:]):
    if child := os.fork():
        os.waitpid(child, 0)
        continue
    file = Path(sys.argv[1], f"{i}.txt").open("w")
    os.dup2(file.fileno(), 1)
    words = program.split()
    sys.argv = [*words[words[0] == "-m":], "--help"]
    sys.path.insert(0, str(Path(words[0]).parent.resolve()))
    try:
        if words[0] == "-m":
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit:
        pass
    sys.stdout.flush()
    os._exit(0)  # what else ends with a process takes longer
"""


@pytest.mark.slow
def test_programs_and_flags_are_there(tmp_path):
    def program(words):
        length = 3 if "knet_jax.cli.main" in words else 2 if words[0] == "-m" else 1
        return " ".join(words[:length])

    programs = sorted({program(words) for _, words in COMMANDS})
    done = subprocess.run(
        [sys.executable, "-c", HELP, tmp_path, *programs],
        cwd=ROOT,
        env=environment(1) | {"PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        check=False,
    )
    usages = {name: (tmp_path / f"{i}.txt").read_text() for i, name in enumerate(programs)}
    assert all(usages.values()), (usages, done.stderr[-3000:])
    missing = {
        (page, program(words), flag)
        for page, words in COMMANDS
        for flag in re.findall(r"(?:^| )(--(?!config\.|help)\w+)", " ".join(words))
        if not re.search(rf"{flag}\b", usages[program(words)])
    }
    assert not missing


@pytest.mark.slow
def test_the_first_pages_do_what_they_say(tmp_path):
    """Their commands about predictions and their Python, on a tiny model in the place of the demo's."""
    tiny_runs.write(tmp_path / "runs" / "demo", "panoptic")
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    for name in ("README.md", "docs/predicting.md"):
        page = ROOT / name
        for kind, code in blocks(page, "bash") + blocks(page, "python"):
            if "knet_jax.train(" in code:
                continue  # takes long, and is tested where training is
            if kind == "bash":
                wanted = r"^(?:\.venv/bin/)?knet (?=shapes|predict .*--model runs/demo( |$))"
                lines = [line for line in code.splitlines() if re.match(wanted, line)]
                code = "\n".join(
                    re.sub(wanted, f"{sys.executable} -m knet_jax.cli.main ", line)
                    for line in lines
                )
            done = subprocess.run(
                ["bash", "-ec", code] if kind == "bash" else [sys.executable, "-c", code],
                cwd=tmp_path,
                env=environment(1) | {"PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, f"{name}: {code}\n{done.stderr}"
        assert (tmp_path / "segments.png").is_file()
        assert (tmp_path / "out" / "contact_sheet.jpg").is_file()
        (tmp_path / "segments.png").unlink()
