"""`python -m models`."""

from __future__ import annotations

import subprocess
import sys

import pytest

from models import names
from models.__main__ import IMAGENET, describe, main


def test_a_line_says_what_the_network_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cifar_wrn_16_[24]", "--markdown"]) == 0
    heading, rule, two, four = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (heading, two, four)]
    assert cells[0] == ["name", "family", "input", "classes", "stages", "parameters", "multiply-adds", "source"]
    assert cells[1][:-1] == [
        "cifar_wrn_16_2",
        "Wide ResNet",
        "3x32x32",
        "100",
        "32x32 64x16 128x8",
        "703,284",
        "101.12 M",
    ]
    assert "MCL" in cells[1][-1]
    assert cells[2][0] == "cifar_wrn_16_4"
    assert set(rule) == set("|-: ")
    assert len({len(line) for line in (heading, rule, two, four)}) == 1


def test_names_beyond_the_list_and_of_the_libraries_have_lines() -> None:
    assert describe("cifar_resnet62_b").parameters == "958,836"
    line = describe("torchvision/resnet50")
    assert (line.family, line.input, line.classes, line.stages, line.parameters, line.multiply_adds, line.source) == (
        "ResNet",
        "3x224x224",
        "1000",
        "256x56 512x28 1024x14 2048x7",
        "25,557,032",
        "4,089.18 M",
        "torchvision",
    )
    line = describe("vit_tiny_patch16_384")
    assert (line.family, line.input, line.stages, line.source) == ("VisionTransformer", "3x384x384", "-", "timm")


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cifar_resnet33_b"]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err == "network 'cifar_resnet33_b': depth 33 is not 6n+2 with n >= 1; nearest: 32, 38\n"


def test_it_is_a_command() -> None:
    command = [sys.executable, "-W", "error", "-m", "models", "cifar_mobilenet"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["name", "cifar_mobilenet"]


@pytest.mark.slow
def test_all_of_ours_and_the_papers_are_in_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [*names("cifar_*"), *IMAGENET]
    assert not [line for line in lines if " - " in line]  # nothing is unknown


def test_help_says_what_a_pattern_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["--help"])
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    for what in ("--markdown", "'cifar_*'", "multiply-adds"):
        assert what in text
