"""The texts say what is there: commands, make targets, links, names in files, and the map of the rooms."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
from helpers.commands import run_here

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
FILES = [
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in FILES}
ALL = "\n".join(TEXTS.values()).replace("\\\n", " ")
# A command ends with its line, or with the code in a sentence. The same one in two texts is checked once.
COMMANDS = sorted(
    {
        (job, shlex.join(shlex.split(words, comments=True)))
        for job, words in re.findall(r"python ((?:jobs|benchmarks)/\S+\.py)\b([^`\n]*)", ALL)
    }
)
SHORT = {"imagenet_deit.py": "--dump", "tune_position.py": "--list"}
LINKS = [
    (file, link)
    for file, text in TEXTS.items()
    for link in re.findall(r"\]\(([^)\s]+)\)", text)
    if "://" not in link
]
NAMES = [
    (file, name, path)
    for file, text in TEXTS.items()
    for names, path in re.findall(
        r"((?:`\w+`(?:,| or| and)? )+)in\s+(?:the )?\[[^]]*\]\(([^)\s]+\.py)\)", text
    )
    for name in re.findall(r"\w+(?=`)", names)
]


@pytest.mark.parametrize(("job", "words"), COMMANDS, ids=[f"{job} {words[:30]}" for job, words in COMMANDS])
def test_a_command_is_understood(job: str, words: str) -> None:
    """Run the exact command with an option that ends it before it works on data; `--help` hides unknown options."""
    given, end = shlex.split(words), SHORT.get(Path(job).name, "--help")
    done = run_here(job, *given, end)
    assert done.returncode == 0, done.stderr
    if end == "--help":
        named = {word.partition("=")[0] for word in given if word.startswith("--")}
        assert named <= set(re.findall(r"--[\w.-]*\w", done.stdout))


def test_the_readme_shows_every_job_but_the_demo() -> None:
    shown = set(re.findall(r"python jobs/(\S+\.py)", TEXTS["README.md"]))
    assert shown == {path.name for path in (ROOT / "jobs").glob("*.py")} - {"demo.py"}


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^    |`)make ([a-z-]+)", ALL, re.MULTILINE)) <= targets


def anchors(path: Path) -> set[str]:
    """List the anchors that GitHub gives to a text's headings."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(("file", "link"), LINKS)
def test_a_link_leads_somewhere(file: str, link: str) -> None:
    name, _, anchor = link.partition("#")
    target = (ROOT / file).parent / name if name else ROOT / file
    assert target.exists()
    assert not anchor or anchor in anchors(target)


def test_files_named_in_the_texts_exist() -> None:
    """A path in the checkout, wherever it stands; `runs/` and `data/` are the user's."""
    rooms = "lape_ray|jobs|benchmarks|tests|docs|docker|k8s|examples"
    paths = set(re.findall(rf"(?<![\w./])((?:{rooms})/[\w./-]*\w/?)", ALL))
    missing = {path for path in paths if not (ROOT / path).exists()} - {"docker/.env"}
    assert not missing


@pytest.mark.parametrize(("file", "name", "path"), NAMES)
def test_a_name_is_in_the_file_that_is_linked(file: str, name: str, path: str) -> None:
    code = ((ROOT / file).parent / path).read_text()
    assert re.search(rf"^(?:def |class )?{name}(?=[:( ])", code, re.MULTILINE)


def test_the_readme_is_short_and_leads_to_all_else() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= 170
    linked = {link.partition("#")[0] for file, link in LINKS if file == "README.md"}
    assert TEXTS.keys() - {"README.md"} <= linked


def test_the_map_names_every_room() -> None:
    written = TEXTS["README.md"].partition("## Map")[2]
    files = {path.name for path in (ROOT / "lape_ray").glob("*.py")} - {"__init__.py"}
    for name in files | {f"{path.parent.name}/" for path in (ROOT / "lape_ray").glob("*/__init__.py")}:
        assert re.search(rf"^ +{name} {{2,}}\S", written, re.MULTILINE), (
            f"{name} is missing from the README's map"
        )


ROOMS = sorted(
    path.parent
    for path in (ROOT / "lape_ray").glob("*/**/__init__.py")
    if len([*path.parent.glob("*.py")]) > 1 and path.parent.name not in {"search"}
)


@pytest.mark.parametrize("room", ROOMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_docstring_of_a_room_is_its_map(room: Path) -> None:
    """A line for each file and folder, and no line for what is not there."""
    text = ast.get_docstring(ast.parse((room / "__init__.py").read_text())) or ""
    lines = re.findall(r"^ *(\w+/?(?:, \w+/?)*) {2,}\S", text, re.MULTILINE)
    named = {name for line in lines for name in line.split(", ")}
    files = {path.stem for path in room.glob("*.py")} - {"__init__"}
    assert named == files | {f"{path.parent.name}/" for path in room.glob("*/__init__.py")}
