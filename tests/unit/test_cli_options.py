from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from wholeslide.cli.command import Command
from wholeslide.cli.parser import parse
from wholeslide.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How it is read.

    Args:
        mpp: Microns per pixel.
        mask_dir: Folder of masks.
    """

    mpp: float | Literal["native"] = 2.0
    mask_dir: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Example:
    """All kinds of options."""

    manifest: Path
    """CSV of the cohort."""
    slide: list[Path] = field(default_factory=list)
    """Slides."""
    first_stride: int | None = None
    """Stride of the first convolution, in 100% of the cases."""
    seed: int = 0
    """Seed."""
    flips: bool = True
    """Flip."""
    json: bool = False
    """Write JSON."""
    fractions: tuple[float, float, float] = (0.7, 0.15, 0.15)
    """Shares."""
    schedule: Literal["simultaneous", "sequential"] = "simultaneous"
    """Order of the stages."""
    weights: str | None = None
    """Weights."""
    scale: Scale = Scale()


COMMAND = Command(
    name="example",
    summary="An example.",
    arguments=Example,
    run=lambda arguments: 0,
    example="wholeslide example labels.csv",
    positionals=("manifest", "slide"),
)


def parsed(*tokens: str) -> Example:
    example = parse(COMMAND, tokens)
    assert isinstance(example, Example)
    return example


def refused(*tokens: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(COMMAND, tokens)
    return str(caught.value).splitlines()


def test_defaults() -> None:
    assert parsed("m.csv") == Example(manifest=Path("m.csv"))


def test_every_kind_of_option() -> None:
    tokens = "m.csv a.svs b.svs --first-stride 3 --no-flips --json --fractions 0.5,0.25,.25 --schedule sequential"
    assert parsed(*tokens.split(), "--mpp", "native", "--mask-dir=masks", "--weights", "random") == Example(
        manifest=Path("m.csv"),
        slide=[Path("a.svs"), Path("b.svs")],
        first_stride=3,
        flips=False,
        json=True,
        fractions=(0.5, 0.25, 0.25),
        schedule="sequential",
        weights="random",
        scale=Scale(mpp="native", mask_dir=Path("masks")),
    )


def test_underscores_are_dashes() -> None:
    assert parsed("m.csv", "--first_stride", "3", "--mask_dir=a_b").first_stride == 3
    assert parsed("m.csv", "--mask_dir=a_b").scale.mask_dir == Path("a_b")


@pytest.mark.parametrize(
    ("tokens", "flips", "json"),
    [
        (("--flips", "off"), False, False),
        (("--flips=no",), False, False),
        (("--json", "on"), True, True),
        (("--json=true", "--no-json"), True, False),
    ],
)
def test_switches_may_be_given_a_word(tokens: tuple[str, ...], flips: bool, json: bool) -> None:
    example = parsed("m.csv", *tokens)
    assert (example.flips, example.json) == (flips, json)


def test_positionals_may_stand_anywhere() -> None:
    assert parsed("--seed", "3", "m.csv", "--json", "a.svs").slide == [Path("a.svs")]


@pytest.mark.parametrize("name", ["[1].svs", "null", "a: b.svs", "12", "a,b.svs", "😐.svs", "{x}"])
def test_a_strange_file_name_stays_itself(name: str) -> None:
    assert parsed("m.csv", name).slide == [Path(name)]


def test_home_folder_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert parsed("m.csv", "--mask-dir=~/masks").scale.mask_dir == Path("/home/me/masks")


def test_all_problems_are_reported_together() -> None:
    assert refused("--first-strid", "--seed", "x", "--mpp", "nativ", "--schedule", "both", "--fractions", "1,2") == [
        "unknown option (--first-strid): did you mean --first-stride?",
        "x is not a value it takes (--seed): give a whole number",
        "nativ is not a value it takes (--mpp): give a number or native",
        "both is not a value it takes (--schedule): give one of simultaneous, sequential",
        "1,2 is not a value it takes (--fractions): give 3 times a number, separated by commas",
        "not given (MANIFEST): for example: wholeslide example labels.csv",
    ]


def test_an_option_without_its_value() -> None:
    assert refused("m.csv", "--seed") == ["no value given (--seed): give a whole number"]


def test_a_switch_with_a_value() -> None:
    assert refused("m.csv", "--json=3") == ["a switch takes no value (--json): write --json or --no-json"]


def test_an_option_like_no_other() -> None:
    assert refused("m.csv", "--qqq") == ["unknown option (--qqq): see wholeslide example --help"]


def test_an_empty_path() -> None:
    assert refused("m.csv", "--mask-dir", "") == [" is not a value it takes (--mask-dir): give a path"]


def test_one_argument_too_many() -> None:
    single = Command(
        name="single", summary="", arguments=Scale, run=lambda arguments: 0, example="wholeslide single", positionals=()
    )
    with pytest.raises(ConfigError, match=r"one argument too many \(extra\): for example: wholeslide single"):
        parse(single, ["extra"])


class TestConfigFile:
    def write(self, folder: Path, text: str) -> str:
        (folder / "config.yaml").write_text(text, encoding="utf-8")
        return str(folder / "config.yaml")

    def test_gives_options_and_positionals(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, "manifest: m.csv\nfirst-stride: 3\nfractions: [0.5, 0.25, 0.25]\nflips: false\n")
        example = parsed("--config", path)
        assert example == Example(manifest=Path("m.csv"), first_stride=3, fractions=(0.5, 0.25, 0.25), flips=False)

    def test_the_command_line_wins_wherever_it_stands(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, "manifest: m.csv\nseed: 3\njson: true\n")
        assert parsed("--seed", "5", "--no-json", "--config", path, "n.csv") == Example(manifest=Path("n.csv"), seed=5)

    def test_empty_is_fine(self, tmp_path: Path) -> None:
        assert parsed("m.csv", "--config", self.write(tmp_path, "# nothing\n")) == Example(manifest=Path("m.csv"))

    def test_a_run_directory_s_own_file_is_taken(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, "format_version: 1\nseed: 2\nclasses: [a, b]\nversions: {torch: '2'}\n")
        assert parsed("m.csv", "--config", path).seed == 2

    def test_problems_name_the_key_and_the_file(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, "sed: 3\nmpp: foo\nflips: 3\n")
        assert refused("m.csv", "--config", path) == [
            f"unknown option (sed in {path}): did you mean seed?",
            f"'foo' is not a value it takes (mpp in {path}): give a number or native".replace("'", ""),
            f"3 is not a value it takes (flips in {path}): give on or off",
        ]

    def test_broken_yaml(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, "seed: 3\nmpp: [1\n")
        assert refused("m.csv", "--config", path) == [
            f"not valid YAML ({path} line 3): write one OPTION: VALUE a line, as in epochs: 30"
        ]

    def test_a_list_is_no_config(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, "- seed\n")
        assert refused("m.csv", "--config", path) == [
            f"not a list of options ({path}): write one OPTION: VALUE a line, as in epochs: 30"
        ]

    def test_missing(self) -> None:
        assert refused("m.csv", "--config", "nowhere.yaml") == [
            "no such file or directory (--config nowhere.yaml): name a YAML file that can be read"
        ]


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        parse(COMMAND, ["--help"])
    assert leaving.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith("usage: wholeslide example MANIFEST SLIDE... [options] An example.")
    for part in (
        "--first-stride N Stride of the first convolution, in 100% of the cases.",
        "--seed N Seed. (default: 0)",
        "--flips, --no-flips Flip. (default: on)",
        "--json Write JSON.",
        "--fractions X,X,X Shares. (default: 0.7,0.15,0.15)",
        "--mpp X|native Microns per pixel. (default: 2.0)",
        "MANIFEST: CSV of the cohort. SLIDE: Slides.",
        "For example: wholeslide example labels.csv",
    ):
        assert part in text, part
