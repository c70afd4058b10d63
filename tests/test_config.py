"""Settings: one declaration, and flags, YAML and keywords that agree."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lowtide.config import build, given_values, parser_for, setting
from lowtide.errors import ConfigError
from lowtide.settings_file import read_yaml, to_yaml


@dataclass(frozen=True, kw_only=True)
class Inherited:
    """Where it comes from."""

    source: str = setting(help="a file to read", filled=True)


@dataclass(frozen=True, kw_only=True)
class Settings(Inherited):
    """What the tests set."""

    count: int = setting(3, help="how many", minimum=1, maximum=2**40)
    rate: float = setting(0.5, help="100% of a rate", above=0)
    kind: str = setting("plain", help="which kind", choices=("plain", "fancy"))
    limit: float | None = setting(None, help="a limit", minimum=0)
    loud: bool = setting(False, help="say more")
    names: str = setting("all", help="names", listed=True)
    learning_rate: float = setting(1e-4, help="step size")


def parse(*argv: str) -> Settings:
    return build(Settings, given_values(parser_for(Settings, "prog", "").parse_strictly(argv)))


def test_flags_yaml_and_keywords_give_the_same_settings(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("source: a b\ncount: 7\nrate: 1e-3\nloud: true\nlimit: null\nnames: [x, y]\n")
    keywords = build(
        Settings,
        {"source": Path("a b"), "count": 7, "rate": 1e-3, "loud": True, "names": ("x", "y")},
    )
    flags = parse("--source", "a b", "--count", "7", "--rate", "1e-3", "--loud", "--names", "x,y")
    assert parse("--config", str(file)) == flags == keywords
    assert keywords.rate == 1e-3
    assert keywords.names == "x,y"


def test_flags_win_over_the_file_whose_keys_may_have_dashes(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("source: file\nlearning-rate: 0.25\ncount: 4\nloud: true\n")
    found = parse("--config", str(file), "--count", "9", "--no-loud")
    assert (found.source, found.learning_rate, found.count, found.loud) == ("file", 0.25, 9, False)


def test_saved_settings_read_back_as_they_were(tmp_path: Path) -> None:
    before = build(Settings, {"source": "ü: [#'\"] ", "rate": 1e-7, "names": "no", "limit": 0})
    file = tmp_path / "s.yaml"
    file.write_text(to_yaml(before), encoding="utf-8")
    assert build(Settings, read_yaml(file)) == before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"count": 0}, "count = 0: expected at least 1"),
        ({"count": 2**41}, f"count = {2**41}: expected at most {2**40}"),
        ({"count": 1.5}, "count = 1.5: expected a whole number"),
        ({"count": True}, "count = True: expected a whole number"),
        ({"count": "many"}, "count = 'many': expected a whole number"),
        ({"count": None}, "count = None: expected a whole number"),
        ({"rate": 0}, "rate = 0.0: expected more than 0"),
        ({"rate": "fast"}, "rate = 'fast': expected a number"),
        ({"rate": float("nan")}, "rate = nan: expected a finite number"),
        ({"rate": "inf"}, "rate = inf: expected a finite number"),
        ({"rate": 10**400}, "expected a number"),
        ({"rate": False}, "rate = False: expected a number"),
        ({"kind": "fanzy"}, "kind = 'fanzy': choose plain, fancy; did you mean 'fancy'?"),
        ({"kind": 4}, "kind = 4: expected text"),
        ({"loud": 1}, "loud = 1: expected true or false"),
        ({"loud": "yes"}, "loud = 'yes': expected true or false"),
        ({"source": "  "}, "source is empty; expected: a file to read"),
        ({"source": ["a"]}, "source = ['a']: expected text"),
        ({"source": "a\0b"}, "expected text without NUL characters"),
        ({"limit": -1}, "limit = -1.0: expected at least 0"),
        ({"coutn": 1}, "unknown setting 'coutn'; did you mean 'count'?"),
        ({"lr": 1}, "unknown setting 'lr'; did you mean 'learning_rate'?"),
        ({7: 1}, "unknown setting 7"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(Settings, {"source": "x", **given})
    assert message in str(error.value)
    assert error.value.exit_code == 2


def test_all_problems_come_together() -> None:
    with pytest.raises(ConfigError) as error:
        build(Settings, {"count": 0, "sourc": "x", "rate": "y"})
    text = str(error.value)
    for part in ("count = 0", "did you mean 'source'?", "rate = 'y'", "--source is required"):
        assert part in text, text


def test_a_required_setting_is_missed_even_where_another_problem_names_it() -> None:
    with pytest.raises(ConfigError) as error:
        build(Settings, {"count": "source"})
    assert "--source is required: a file to read" in str(error.value)
    with pytest.raises(ConfigError) as error:
        build(Settings, {"source": 3})
    assert "required" not in str(error.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--cuont", "3"], "unknown argument '--cuont'; did you mean '--count'?"),
        (["--cuont=3"], "unknown argument '--cuont=3'; did you mean '--count'?"),
        (["--lr", "3"], "unknown argument '--lr'; did you mean '--learning-rate'?"),
        (["--coun", "3"], "unknown argument '--coun'"),  # no abbreviations
        (["stray"], "unknown argument 'stray'; a setting is given as --name value"),
        (["--count"], "argument --count: expected one argument. See `prog --help`"),
        (["--count", "x"], "count = 'x': expected a whole number"),
        (["--rate", "nan"], "rate = nan: expected a finite number"),
        (["--kind", "odd"], "kind = 'odd': choose plain, fancy"),
        (["--source", ""], "source is empty"),
    ],
)
def test_a_wrong_flag_is_named_with_what_was_expected(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse("--source", "x", *argv)
    assert message in str(error.value)


def test_the_value_of_an_unknown_flag_is_not_reported_as_another() -> None:
    with pytest.raises(ConfigError) as error:
        parse("--source", "x", "--cuont", "value-of-it")
    assert "value-of-it" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a\n- b\n", "holds list; expected key: value"),
        (b"just words", "holds str; expected key: value"),
        (b"a: [1, 2", "cannot be read as YAML"),
        (b"\xff\xfe\x00", "cannot be read as YAML"),
        (b"a: !!python/object/apply:os.getcwd []", "cannot be read as YAML"),
        (b"? [1, 2]\n: 3\n", "cannot be read as YAML"),
    ],
)
def test_a_file_that_is_not_a_mapping_is_refused(
    tmp_path: Path, content: bytes, message: str
) -> None:
    file = tmp_path / "s.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        read_yaml(file)
    assert message in str(error.value)
    assert str(file) in str(error.value)


def test_a_missing_file_and_a_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        read_yaml(tmp_path)


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("# nothing yet\n")
    assert parse("--source", "x", "--config", str(file)) == build(Settings, {"source": "x"})


def test_help_names_every_setting_its_default_and_what_is_required() -> None:
    text = " ".join(parser_for(Settings, "prog", "What it does.").format_help().split())
    assert text.startswith("usage: prog --source PATH [flags]")
    for part in (
        "required: --source PATH a file to read",
        "--count N how many (default: 3)",
        "--rate X 100% of a rate (default: 0.5)",
        "--kind plain|fancy which kind (default: plain)",
        "--loud, --no-loud say more (default: no)",
        "--limit X a limit (default: none)",
        "--config FILE",
        "--json",
    ):
        assert part in text, text
