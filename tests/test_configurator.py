"""Settings by name and type, from files and the command line; the frame of every command."""

import dataclasses
import importlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import configurator
import train
from configurator import UserError, load

ROOT = Path(__file__).parents[1]
COMMANDS = ["train", "evaluate", "sample", "export", "plot", "demo", "bench", "data.prepare", "data.embedded.prepare"]
COMMANDS += [
    "data.smollm2.prepare",
    "data.languages.prepare",
    "experiments.run",
    "experiments.report",
    "experiments.tasks",
]


@dataclass(frozen=True)
class Settings:
    # how far
    steps: int = 10  # optimizer steps
    rate: float = 0.5
    # the rest
    name: str = "x"  # a | b
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


def test_a_file_may_have_names_of_its_own_several_at_once_and_arithmetic(file):
    text = '"""What for."""\nsteps, rate = 3 * 4 // 2 - 1, -1 + 2.5\n_a = name = "b"\nnames = [_a]'
    assert load(Settings, [file(text)]) == Settings(steps=5, rate=1.5, name="b", names=("b",))


def test_lists_and_texts_come_from_the_command_line():
    assert load(Settings, ["--names=a,b", "--shares=0.25,1"]) == Settings(names=("a", "b"), shares=(0.25, 1.0))
    assert load(Settings, ["--names=a", "--names="]).names == ()
    assert load(Settings, ["--names=en,nan,2024", "--name=007"]) == Settings(names=("en", "nan", "2024"), name="007")


def test_a_tilde_is_the_home_folder_and_only_at_a_path_s_beginning(file, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for argument in ("--name=~/data", file('name = "~/data"')):
        assert load(Settings, [argument]).name == "/home/me/data"
    assert load(Settings, ["--name=a~/b", "--names=~/a,b"]) == Settings(name="a~/b", names=("/home/me/a", "b"))


def test_what_is_no_number_is_refused():
    for argument in ("--rate=nan", "--shares=0.5,nan"):
        with pytest.raises(UserError, match="must be float, is nan"):
            load(Settings, [argument])


def test_a_misspelt_setting_is_refused_with_a_suggestion(file):
    for argument in ("--stpes=3", file("stpes = 3")):
        with pytest.raises(UserError, match="did you mean 'steps'"):
            load(Settings, [argument])


@pytest.mark.parametrize(
    "text", ["steps = '3'", "steps = True", "steps = 3.5", "rate = None", "shares = 0.5", "on = 1", "names = (1,)"]
)
def test_a_wrong_type_is_refused_in_files_and_on_the_command_line(file, text):
    with pytest.raises(UserError, match="must be"):
        load(Settings, [file(text)])
    with pytest.raises(UserError, match="must be"):
        load(Settings, ["--steps=many"])


def test_a_config_file_may_begin_with_a_byte_order_mark(file):
    assert load(Settings, [file("\ufeffsteps = 3")]).steps == 3


@pytest.mark.parametrize(
    "text", ["import os", "steps += 1", "steps = 1 / 0", "steps = = 3", "name = open('x').read()", "names[0] = 'a'"]
)
def test_a_config_file_is_read_and_never_run(file, text):
    with pytest.raises(UserError, match="not a config file"):
        load(Settings, [file(text)])


def test_every_setting_is_explained_by_its_own_comment():
    assert configurator.explained(Settings)[:3] == [
        ("how far", "steps", "10", "optimizer steps"),
        ("how far", "rate", "0.5", ""),
        ("the rest", "name", '"x"', "a | b"),
    ]
    assert all(comment for _, _, _, comment in configurator.explained(train.Config))


def test_the_table_of_settings_in_the_docs_is_up_to_date():
    assert configurator.markdown(train.Config) in (ROOT / "docs/configuration.md").read_text()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_and_each_of_its_settings(name):
    module = importlib.import_module(name)
    settings = [value for value in vars(module).values() if dataclasses.is_dataclass(value)]
    own = next(c for c in settings if c.__module__ == name and c.__name__ in ("Config", "Options"))
    assert module.__doc__ and all(comment for _, _, _, comment in configurator.explained(own))
    assert configurator.help_of(own).count("--") >= len(dataclasses.fields(own))


def test_a_command_helps_and_without_arguments_says_what_to_do():
    def run(*arguments):
        return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)

    shown = run("train.py", "--help")
    assert shown.returncode == 0 and "--max_steps=1000" in shown.stdout
    for command in ("train.py", "data/prepare.py"):
        ended = run(command)
        assert ended.returncode == 1 and f"python {command}" in ended.stderr and "--help" in ended.stderr
    assert "1 arguments beside the settings, expected at most 0" in run("-m", "data.shards", "a folder").stderr
