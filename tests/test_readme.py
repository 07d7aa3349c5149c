"""The README's tables of messages have a row for every message in the code, and no row for one that is not there;
its table of the evidence is the report's.

Outside: AssertionError, and ValueError and KernelError for the arguments of pure functions (OUTSIDE), which no command
can get wrong; and messages with fewer than two words of their own, which pass on another's.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = [*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("data/*/*.py"), *ROOT.glob("kernels/*.py")]
OUTSIDE = {("dro.py", "ValueError"), ("shared.py", "KernelError")}
HOLE = "..."  # in the place of a value in a message, as in the README


def name_of(node: ast.expr) -> str:
    """The last one of a.b.c."""
    return getattr(node, "attr", getattr(node, "id", ""))


def text_of(node: ast.expr) -> str:
    """A text or f-string with a HOLE for each value; for any other expression a HOLE."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    return HOLE


def messages_of(source: str, file: str) -> Iterator[tuple[int, str]]:
    """(line, text) of what is raised, warned about or written to stderr."""
    parts = set()  # of f-strings, which come before them
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            parts |= set(node.values)
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            kind = name_of(node.exc.func)
            if kind != "AssertionError" and (file, kind) not in OUTSIDE:
                yield node.lineno, text_of(node.exc.args[0])
        elif isinstance(node, ast.Call):
            if name_of(node.func) == "FitError":  # one that is kept, not raised at once
                yield node.lineno, text_of(node.args[0])
            elif name_of(node.func) == "warn":
                yield node.lineno, text_of(node.args[-1])  # log.warn(step, text), warnings.warn(text, stacklevel=2)
            elif any(k.arg == "file" and name_of(k.value) == "stderr" for k in node.keywords):
                yield node.lineno, text_of(node.args[0])
        elif node not in parts and isinstance(node, ast.expr) and text_of(node).startswith("warning: "):
            yield node.lineno, text_of(node)


def words(text: str) -> int:
    return len(re.findall("[A-Za-z]{2,}", text))


@cache
def messages() -> dict[str, str]:
    """Of the whole project: text to place. What is before it on the terminal ("error: ") is not part of it."""
    found = {}
    for file in FILES:
        for line, text in messages_of(file.read_text(), file.name):
            text = re.sub(r"^(error|warning): ", "", text.strip())  # noqa: PLW2901
            if words(text) > 1:
                found[text] = f"{file.relative_to(ROOT)}:{line}"
    return found


@cache
def section() -> str:
    return (ROOT / "README.md").read_text().partition("\n## When things go wrong\n")[2].partition("\n## ")[0]


@cache
def rows() -> list[tuple[list[str], str]]:
    """(messages, what they mean) of every row of the section's tables; the messages are its first cell's code."""
    cells = [line.strip("| ").split(" | ") for line in section().splitlines() if line.startswith("| ")]
    return [(re.findall("`([^`]+)`", row[0]), row[1]) for row in cells if len(row) == 2 and row[0] != "message"]


def pattern(message: str) -> re.Pattern:
    """`...` stands for anything."""
    parts = re.sub("^warning: ", "", message).split("...")
    return re.compile(".*".join(map(re.escape, parts)), re.DOTALL)


@cache
def matching() -> dict[str, list[str]]:
    """The rows' messages that each message of the code fits."""
    patterns = {message: pattern(message) for messages_here, _ in rows() for message in messages_here}
    return {text: [message for message, p in patterns.items() if p.fullmatch(text)] for text in messages()}


def test_every_message_has_a_row():
    missing = [f"{place}: {text}" for text, place in messages().items() if not matching()[text]]
    assert len(messages()) > 200
    assert not missing, "\n".join(missing)


def test_every_row_is_needed():
    needed = {found[0] for found in matching().values() if len(found) == 1}
    idle = [message for messages_here, _ in rows() for message in messages_here if message not in needed]
    assert not idle, "no message, or all of its messages have another row:\n" + "\n".join(idle)


def test_a_row_has_a_message_and_what_to_do():
    for messages_here, meaning in rows():
        assert messages_here
        assert len(meaning.split()) >= 4, messages_here
        for message in messages_here:
            assert words(message) > 1, f"{message}: a row for anything"


def test_what_counts_as_a_message():
    source = """
raise UserError(f"{name} = {value}: must be one of " "a and b")
raise UserError("no such file")
raise AssertionError("a bug")
raise KernelError("x must be contiguous")
raise UserError(problem)
log.warn(step, f"domain {d} ends")
warnings.warn("it drifts", stacklevel=2)
say(f"warning: {name}: it is full")
print("stopped by hand", file=sys.stderr)
print("all is well")
"""
    found = [text for _, text in messages_of(source, "shared.py")]
    assert sorted(found) == sorted(
        [
            "... = ...: must be one of a and b",
            "no such file",
            "...",
            "domain ... ends",
            "it drifts",
            "warning: ...: it is full",
            "stopped by hand",
        ]
    )


def test_dots_stand_for_anything_and_nothing_else_does():
    assert pattern("domain ...: no (...) text").fullmatch("domain ...: no (...) text")
    assert not pattern("domain ...: no (...) text").fullmatch("domain ...: no [...] text")
    assert pattern("warning: no tokenizer").fullmatch("no tokenizer")


def test_the_table_of_the_evidence_is_the_report_s():
    evidence = (ROOT / "README.md").read_text().partition("\n## Does the mix help?\n")[2].partition("\n## ")[0]
    report = (ROOT / "experiments/RESULTS.md").read_text()
    lines = [line for line in evidence.splitlines() if line.startswith(("|", "**Source"))]
    assert len(lines) > 4
    assert set(lines) <= set(report.splitlines())
