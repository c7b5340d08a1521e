"""What the documentation names is there, and what it shows of predictions does what it says."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_runs
from devices import environment
from programs import status_of

from knet_jax.cli import main
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


def program(words):
    """The command or the script that the words of a page call."""
    if "knet_jax.cli.main" in words:
        return words[2]
    return Path(words[0]).stem if words[0] in ("train.py", "eval.py") else words[0]


def usage(name, capsys):
    """What a program says of itself."""
    if name in main.COMMANDS:
        assert status_of(name, "--help") == 0
        return capsys.readouterr().out
    return subprocess.run(
        [sys.executable, name, "--help"],
        cwd=ROOT,
        env=environment(1),
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_programs_and_flags_are_there(capsys):
    programs = {program(words) for _, words in COMMANDS} - {"--help"}
    usages = {name: usage(name, capsys) for name in programs}
    missing = {
        (page, program(words), flag)
        for page, words in COMMANDS
        for flag in re.findall(r"(?:^| )(--(?!config\.|help)\w+)", " ".join(words))
        if not re.search(rf"{flag}\b", usages[program(words)])
    }
    assert not missing


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "results"),
    [
        ("predicting.md", ("segments.png", "out/contact_sheet.jpg")),
        (
            "beyond_the_paper.md",
            (
                "runs/demo/analysis/index.html",
                "out/videos/shapes.json",
                "runs/many/log.jsonl",
                "large_segments.png",
                "out/large/contact_sheet.jpg",
            ),
        ),
    ],
)
def test_a_page_does_what_it_says(page, results, tmp_path):
    """Its commands and its Python, on a tiny model in the place of the demo's."""
    overrides = f"--config.data.data_dir={tmp_path / 'prepared'}"
    tiny_runs.write(tmp_path / "runs" / "demo", "panoptic", overrides)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    for kind, code in blocks(ROOT / "docs" / page, "bash", "python"):
        if kind == "bash":
            wanted = (
                r"^(?:\.venv/bin/)?knet (?=shapes|train .*:tiny|(predict|eval) .*runs/demo( |$))"
            )
            lines = code.replace("\\\n", " ").splitlines()
            lines = [line for line in lines if re.match(wanted, line)]
            code = "\n".join(
                re.sub(wanted, f"{sys.executable} -m knet_jax.cli.main ", line) for line in lines
            )
        done = subprocess.run(
            ["bash", "-ec", code] if kind == "bash" else [sys.executable, "-c", code],
            cwd=tmp_path,
            env=environment(1) | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{code}\n{done.stderr}"
    assert all((tmp_path / name).is_file() for name in results)
