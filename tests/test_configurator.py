"""Settings by name and type, from files and the command line."""

from dataclasses import dataclass

import pytest

from configurator import UserError, described, load


@dataclass(frozen=True)
class Settings:
    steps: int = 10
    rate: float = 0.5
    name: str = "x"
    on: bool = False
    shares: tuple[float, ...] = ()
    names: tuple[str, ...] = ()


@pytest.fixture
def file(tmp_path):
    def write(text):
        (tmp_path / "c.py").write_text(text)
        return str(tmp_path / "c.py")

    return write


def test_later_settings_win(file):
    cfg = load(Settings, ["--steps=3", file("steps = 4\nrate = 1\nshares = [0.5, 1]"), "--rate=2e-3", "--on"])
    assert cfg == Settings(steps=4, rate=2e-3, on=True, shares=(0.5, 1.0))


def test_names_with_an_underscore_are_the_files_own(file):
    assert load(Settings, [file("_half = 0.5\nrate = _half / 2")]).rate == 0.25


def test_a_file_may_assign_several_names_at_once_and_reckon(file):
    text = '"""What for."""\nsteps, rate = 3 * 4 // 2 - 1, -1 + 2.5\n_a = name = "b"\nnames = [_a]'
    cfg = load(Settings, [file(text)])
    assert cfg == Settings(steps=5, rate=1.5, name="b", names=("b",))


def test_lists_come_from_the_command_line(file):
    assert load(Settings, ["--names=a,b", "--shares=0.25,1"]) == Settings(names=("a", "b"), shares=(0.25, 1.0))
    assert load(Settings, ["--names=a", "--names="]).names == ()
    assert load(Settings, ["--names=en,nan,2024"]).names == ("en", "nan", "2024")


def test_a_text_may_look_like_a_number():
    assert load(Settings, ["--name=007"]).name == "007"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stpes=3"], "unknown setting 'stpes'; did you mean 'steps'?"),
        (["--zzz=3"], "unknown setting 'zzz'; settings are steps, rate"),
        (["--steps=3.5"], "steps must be int, is float 3.5"),
        (["--steps=many"], "steps must be int, is str 'many'"),
        (["--steps"], "--steps needs a value"),
        (["--steps=true"], "steps must be int"),
        (["--on=maybe"], "on must be bool, is str 'maybe'"),
        (["--shares=0.5,b"], "shares must be float, is str 'b'"),
        ([f"--steps={2**63}"], "setting steps: too large a number"),
        (["nowhere.py"], "nowhere.py: no such config file"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(UserError) as caught:
        load(Settings, arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stpes = 3", "unknown setting 'stpes'; did you mean 'steps'?"),
        ("steps = '3'", "steps must be int, is str '3'"),
        ("steps = True", "steps must be int, is bool True"),
        ("rate = None", "rate must be float"),
        ("shares = 0.5", "shares must be a tuple of float, is 0.5"),
        ("import os", "line 1: a config file has assignments only"),
        ("raise SystemExit(0)", "line 1: a config file has assignments only"),
        ("steps = 3\nsteps += 1", "line 2: a config file has assignments only"),
        ("steps = 1 / 0", "cannot be read: ZeroDivisionError"),
        ("steps = = 3", "cannot be read: SyntaxError"),
        ("name = open('x').read()", "line 1: \"open('x').read()\": expected a number"),
        ("steps = 10 ** 9", "expected a number"),
        ("name = __name__", "expected a number"),
        ("name = 'x' * 1000", "arithmetic is for numbers only"),
        ("names = ('a',) + ('b',)", "arithmetic is for numbers only"),
        ("steps = 999999999999 * 999999999999", "too large a number"),
        ("rate = 1e308 * 10", "too large a number"),
        ("steps, rate = 1, 2, 3", "expected 2 values"),
        ("steps, rate = 12", "expected 2 values"),
        ("names[0] = 'a'", "only names are assigned to"),
        ("steps = " + "-" * 100_000 + "1", "cannot be read"),
        ("steps = " + "1 + " * 5000 + "1", "cannot be read"),
        ("name = '" + "x" * (1 << 20) + "'", "not a config file"),
        ("\0", "cannot be read"),
    ],
)
def test_bad_files_are_refused_naming_the_file(file, text, message):
    path = file(text)
    with pytest.raises(UserError) as caught:
        load(Settings, [path])
    assert message in str(caught.value) and path in str(caught.value)


def test_the_description_marks_what_differs_from_its_default():
    lines = described(Settings(steps=3)).splitlines()
    assert lines[0] == "  * steps = 3" and lines[1] == "    rate = 0.5"
