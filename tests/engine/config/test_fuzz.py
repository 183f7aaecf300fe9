"""Thousands of damaged configs, manifests and files of tensors: each is read or refused with the error that users are
shown, nothing is executed, and nothing is written."""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.config import ConfigError
from engine.config import loading as config_file
from engine.safety import checkpoint, loading
from engine.safety.checkpoint import CheckpointError
from tests.checkpoints import PEER, a_run
from tests.runs import train_here
from tests.worlds import run_ranks

ROOT = Path(__file__).parents[3]
WRITES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.truncate", "shutil.rmtree")
EXECUTES = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect")
TOKENS = [
    *("!!python/object/apply:os.system [touch harm] ", "!!python/name:os.system ", "!!python/object:os.stat_result "),
    *(
        "&a ",
        "*a",
        "<<: *a",
        "[*a, *a]",
        "[",
        "]",
        "{",
        "}",
        "? ",
        ": ",
        "- ",
        "| ",
        "> ",
        "#",
        "\t",
        "'",
        '"',
        "=",
        "---",
    ),
    *("!!int ", "!!bool x", "!!timestamp x", "!!binary x", "!!set ", "!!omap ", "!!float x", "!!map [1]"),
    *("\0", '"\\0"', '"\\ud800"', "\u2028", "%YAML 9.9\n", "!", "@", "`", "~", ".inf", ".nan", "1e999", "-1", "0x"),
    *("9" * 5000, "2001-99-99", "2001-01-01", "1:99:99", "99999999999999999999", "[" * 60, "{a: " * 60, "\xff"),
    *("base: /dev/zero\n", "base: .\n", "base: f.yaml\n", "base: ../../..\n", "null", "true", "null, null", '": "'),
]


def mutated(data: bytes, chance: random.Random) -> bytes:
    """The data with one to eight changes."""
    result = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 4, 8])):
        at, kind = chance.randrange(len(result) + 1), chance.random()
        if kind < 0.4:
            result[at:at] = chance.choice(TOKENS).encode("latin-1", "replace")
        elif kind < 0.6 and at < len(result):
            result[at] ^= 1 << chance.randrange(8)
        elif kind < 0.8:
            del result[at : at + chance.randrange(1, 20)]
        else:
            lines = bytes(result).split(b"\n")
            line = chance.randrange(len(lines))
            lines[line] = lines[line].partition(b":")[0] + b": " + chance.choice(TOKENS).encode("latin-1", "replace")
            result = bytearray(b"\n".join(lines))
    return bytes(result)


def read_all(
    read: Callable[[Path], Any], path: Path, originals: list[bytes], count: int, allowed: type[Exception], seed: int
) -> tuple[list[Any], list[str]]:
    """Reads mutations of a file. Runs in a process of its own, as Python's audit cannot be ended.

    Returns:
        What was read where it was not refused, and what was written or executed meanwhile.
    """
    done: list[str] = []
    watching = False

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[1], str) and arguments[1][0] in "wax"
        if watching and (writes or event in WRITES or event.startswith(EXECUTES)):
            done.append(f"{event} {arguments}")

    sys.dont_write_bytecode = True
    sys.addaudithook(audit)
    chance = random.Random(seed)
    accepted = []
    for _ in range(count):
        data = mutated(chance.choice(originals), chance)
        path.write_bytes(data)
        watching = True
        try:
            accepted.append(read(path))
        except allowed:
            pass
        except BaseException as error:
            raise AssertionError(f"{type(error).__name__}: {error}; of {data!r}") from error
        watching = False
    return accepted, done


def load_and_dump(path: Path) -> bool:
    """Whether a config is read and is, written out, the same config."""
    config = config_file.load(path)
    again = path.with_name("again.yaml")
    return config_file.validate(config_file._parse(config_file.dump(config), str(again))) == config


def load_text(path: Path) -> str:
    """What is read, in words."""
    return repr(config_file.read_with_base(path))[:1000]


@pytest.mark.parametrize(
    ("read", "count"), [(load_text, 500), (load_and_dump, 500), pytest.param(load_text, 6000, marks=pytest.mark.slow)]
)
def test_configs(tmp_path: Path, read: Callable[[Path], Any], count: int) -> None:
    paths = [ROOT / "configs/fashion_mnist/quickstart_dml.yaml", ROOT / "configs/cifar10/dml_resnet32.yaml"]
    originals = [config_file.dump(config_file.load(path)).encode() for path in paths]
    ((accepted, done),) = run_ranks(1, read_all, read, tmp_path / "f.yaml", originals, count, ConfigError, 1)
    assert done == []
    assert accepted
    assert all(accepted)
    assert list(tmp_path.iterdir()) == [tmp_path / "f.yaml"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [x, *a]", "{at}:1: alias 'a' stands within what it stands for"),
        (
            "a0: &a0 [x, x]\n" + "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)),
            "{at}:6: stands for more than 100000 values, by its aliases",
        ),
        ("[" * 100_000, "{at}:1: nested more than 50 deep"),
        ('name: x\ndir: "a\\0b"', "{at}:2: 'a\\x00b': expected text that can be written to a file"),
        ('name: "\\ud800"', "{at}:1: '\\ud800': expected text that can be written to a file"),
        ("name: !!python/object/apply:os.system ['touch harm']", "{at}: not valid YAML: could not determine a"),
        ("seed: " + "9" * 5000, "{at}:1: a number of 5000 characters; expected at most 400"),
        ("seed: 2001-13-01", "{at}: not valid YAML: month must be in 1..12"),
        ("seed: !!bool maybe", "{at}: not valid YAML: 'maybe'"),
        ("#" * (1 << 20) + "\nname: x", "{at}: larger than 1048576 bytes; expected a config"),
        ("base: /dev/zero", "/dev/zero (base of {at}): cannot be read: Not a file"),
        ("base: .", "{folder} (base of {at}): cannot be read: Is a directory"),
        ("base: loop.yaml", "{folder}/loop.yaml: cannot be read: "),
        ("base: f.yaml", "{at}: inherits from itself through base: f.yaml -> f.yaml"),
    ],
)
def test_what_would_be_too_much_is_refused_by_its_name(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    at = tmp_path / "f.yaml"
    at.write_text(text)
    with pytest.raises(ConfigError) as error:
        config_file.load(at)
    assert str(error.value).startswith(message.replace("{at}", str(at)).replace("{folder}", str(tmp_path)))
    assert len(str(error.value)) < 1000


def test_a_value_too_long_to_read_is_shown_by_its_beginning(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text(f"name: {'?' * 100_000}\n")
    with pytest.raises(ConfigError) as error:
        config_file.load(tmp_path / "f.yaml")
    assert "name = '????" in str(error.value)
    assert len(str(error.value)) < 2000


@pytest.fixture(scope="module")
def saved(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The newest checkpoint of a run."""
    folder = tmp_path_factory.mktemp("run")
    train_here(a_run(tiny, folder, train={"epochs": 1}))
    return checkpoint.folder_of(folder, 5)


def verify_above(path: Path) -> dict[str, Any]:
    """The manifest at a path."""
    return vars(checkpoint.read_manifest(path.parent))


def test_manifests(saved: Path, tmp_path: Path) -> None:
    """What is accepted says the same as the original: spaces may change, nothing else."""
    at = Path(shutil.copytree(saved, tmp_path / saved.name))
    path, expected = at / "manifest.json", loading.verify(at)
    arguments = (path, [path.read_bytes()], 1000, CheckpointError, 2)
    ((accepted, done),) = run_ranks(1, read_all, verify_above, *arguments)
    assert done == []
    assert 0 < len(accepted) < 100
    assert all(found == vars(expected) for found in accepted)


def read_peer(path: Path) -> bool:
    """Whether a peer's file is one of tensors."""
    return isinstance(loading.read_state(path.parent, path.name), dict)


def test_files_of_tensors(saved: Path, tmp_path: Path) -> None:
    """As if the manifest agreed with them, which is no protection against who writes both."""
    path = tmp_path / PEER
    arguments = (path, [(saved / PEER).read_bytes()], 300, CheckpointError, 3)
    ((_, done),) = run_ranks(1, read_all, read_peer, *arguments)
    assert done == []
    assert list(tmp_path.iterdir()) == [path]
