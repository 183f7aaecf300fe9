"""What lies on disk is not believed: each kind of damage and forgery has its message, and nothing of it is executed."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipelines.sources.class_folders import list_folder
from engine.config import ConfigError, RunConfig
from engine.files import digest, write_json
from engine.safety import checkpoint, loading
from engine.safety.checkpoint import CheckpointError
from tests.checkpoints import PEER, a_run, change_state, edit, forge, replace_file
from tests.kills import assert_same_state, final_state, numbers
from tests.runs import train_here
from tests.worlds import run_ranks

MANIFEST = "{at}/manifest.json"
Damage = tuple[Callable[[Path], Any], str]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """As a rank among others has, and quicker for networks this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that came to its end."""
    folder = tmp_path_factory.mktemp("whole")
    train_here(a_run(tiny, folder))
    assert checkpoint.steps_on_disk(folder)[-2:] == [9, 10]
    return folder


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


# -- what does not verify ---------------------------------------------------------------------------------------------


def cut(name: str, to: float) -> Callable[[Path], None]:
    """Leaves a part of a file."""

    def inflict(at: Path) -> None:
        data = (at / name).read_bytes()
        (at / name).write_bytes(data[: int(len(data) * to)])

    return inflict


def flip(name: str, where: float, bit: int = 2) -> Callable[[Path], None]:
    """Flips a bit of a file."""

    def inflict(at: Path) -> None:
        data = bytearray((at / name).read_bytes())
        data[int(len(data) * where)] ^= 1 << bit
        (at / name).write_bytes(data)

    return inflict


def forged(**values: Any) -> Callable[[Path], None]:
    """Changes values of the manifest, with a SHA-256 that fits."""
    return lambda at: forge(at, lambda raw: raw.update(values))


def in_files(**values: Any) -> Callable[[Path], None]:
    """Changes what the manifest says of the second peer's file."""
    return lambda at: forge(at, lambda raw: raw["files"][PEER].update(values))


def manifest_text(change: Callable[[str], str]) -> Callable[[Path], None]:
    """Changes the manifest's text."""

    def inflict(at: Path) -> None:
        path = at / "manifest.json"
        path.write_text(change(path.read_text()))

    return inflict


def replace_by(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Puts something that is no file in the place of a file."""

    def inflict(at: Path) -> None:
        (at / name).rename(at.parent / f"away_{name}")
        make(at / name)

    return inflict


def name_a_file(where: str) -> Callable[[Path], None]:
    """The manifest names a file that is there, outside of the checkpoint."""

    def inflict(at: Path) -> None:
        path = Path(os.path.normpath(at / where))
        path.parent.mkdir(exist_ok=True)
        shutil.copy(at / "shared.pt", path)
        forge(at, lambda raw: raw["files"].update({where: digest(path)}))

    return inflict


def link_out(at: Path) -> None:
    shutil.move(at / PEER, at.parent / "outside.pt")
    (at / PEER).symlink_to(at.parent / "outside.pt")


DOES_NOT_VERIFY: dict[str, Damage] = {
    # Files
    "peer_without_its_end": (cut(PEER, 0.999), f"{{at}}/{PEER}: cut short or altered: {{size}} bytes expected, "),
    "peer_cut_in_half": (cut(PEER, 0.5), f"{{at}}/{PEER}: cut short or altered: {{size}} bytes expected, "),
    "peer_cut_to_its_header": (cut(PEER, 0.001), f"{{at}}/{PEER}: cut short or altered: {{size}} bytes expected, "),
    "peer_empty": (cut(PEER, 0), f"{{at}}/{PEER}: cut short or altered: {{size}} bytes expected, 0 found"),
    "shared_cut": (cut("shared.pt", 0.7), "{at}/shared.pt: cut short or altered: "),
    "peer_too_long": (
        lambda at: (at / PEER).write_bytes((at / PEER).read_bytes() + b"\0"),
        f"{{at}}/{PEER}: cut short or altered: {{size}} bytes expected, ",
    ),
    "bit_of_the_first_byte": (flip(PEER, 0), f"{{at}}/{PEER}: altered: its SHA-256 is not the one in the manifest"),
    "bit_of_a_peer": (flip(PEER, 0.5), f"{{at}}/{PEER}: altered: its SHA-256 is not the one in the manifest"),
    "bit_of_the_last_byte": (
        flip(PEER, 0.99999),
        f"{{at}}/{PEER}: altered: its SHA-256 is not the one in the manifest",
    ),
    "bit_of_the_shared": (
        flip("shared.pt", 0.5),
        "{at}/shared.pt: altered: its SHA-256 is not the one in the manifest",
    ),
    "peer_missing": (lambda at: (at / PEER).unlink(), f"{{at}}/{PEER}: missing"),
    "shared_missing": (lambda at: (at / "shared.pt").unlink(), "{at}/shared.pt: missing"),
    "peer_is_a_folder": (replace_by(PEER, Path.mkdir), f"{{at}}/{PEER}: not a file"),
    "peer_is_a_pipe": (replace_by(PEER, os.mkfifo), f"{{at}}/{PEER}: not a file"),
    "peers_swapped": (
        lambda at: (at / PEER).write_bytes((at / "peer_cifar_resnet8_b-0.pt").read_bytes()),
        f"{{at}}/{PEER}: altered: its SHA-256 is not the one in the manifest",
    ),
    # Files outside
    "names_a_file_above": (name_a_file("../escape.pt"), f"{MANIFEST}: names a file outside the checkpoint: '../esc"),
    "names_a_file_below": (name_a_file("below/x.pt"), f"{MANIFEST}: names a file outside the checkpoint: 'below/x.pt'"),
    "names_an_absolute_path": (
        lambda at: forge(at, lambda raw: raw["files"].update({"/etc/passwd": digest(Path("/etc/passwd"))})),
        f"{MANIFEST}: names a file outside the checkpoint: '/etc/passwd'",
    ),
    "names_a_null_byte": (
        lambda at: forge(at, lambda raw: raw["files"].update({"a\0b": raw["files"][PEER]})),
        f"{MANIFEST}: names a file outside the checkpoint: 'a\\x00b'",
    ),
    "peer_is_a_link_out": (link_out, f"{MANIFEST}: names a file outside the checkpoint: '{PEER}'"),
    "peer_is_a_link_to_itself": (
        replace_by(PEER, lambda path: path.symlink_to(path)),
        f"{MANIFEST}: names a file outside the checkpoint: '{PEER}'",
    ),
    "manifest_is_a_link_out": (
        replace_by("manifest.json", lambda path: path.symlink_to("/dev/zero")),
        f"{MANIFEST}: a link out of the checkpoint",
    ),
    "a_peer_named_as_a_path": (
        forged(peers=["cifar_resnet8_b-0", "../../x"]),
        f"{MANIFEST}: not a manifest: peers.1: String should match pattern",
    ),
    # The manifest
    "manifest_missing": (
        lambda at: (at / "manifest.json").unlink(),
        f"{MANIFEST}: missing; the checkpoint was not finished",
    ),
    "manifest_is_a_folder": (replace_by("manifest.json", Path.mkdir), f"{MANIFEST}: not a file"),
    "manifest_is_a_pipe": (replace_by("manifest.json", os.mkfifo), f"{MANIFEST}: not a file"),
    "manifest_empty": (
        cut("manifest.json", 0),
        f"{MANIFEST}: not a manifest: Expecting value: line 1 column 1 (char 0)",
    ),
    "manifest_cut": (cut("manifest.json", 0.6), f"{MANIFEST}: not a manifest: "),
    "manifest_binary": (
        lambda at: (at / "manifest.json").write_bytes(b"\xff\x00"),
        f"{MANIFEST}: not a manifest: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte",
    ),
    "manifest_a_list": (manifest_text(lambda text: f"[{text}]"), f"{MANIFEST}: not a manifest: "),
    "manifest_nested_deeply": (
        manifest_text(lambda text: '{"version": ' + "[" * 100_000 + "]" * 100_000 + "}"),
        f"{MANIFEST}: not a manifest: maximum recursion depth exceeded",
    ),
    "manifest_key_twice": (
        manifest_text(lambda text: text.replace('"step"', '"method": "dml",\n  "step"', 1)),
        f"{MANIFEST}: not a manifest: key 'method' stands twice",
    ),
    "manifest_not_a_number": (
        manifest_text(lambda text: text.replace('"in_a_row": 0', '"in_a_row": NaN')),
        f"{MANIFEST}: not a manifest: NaN is no number",
    ),
    "manifest_number_of_5000_digits": (
        manifest_text(lambda text: text.replace('"in_a_row": 0', f'"in_a_row": {"9" * 5000}')),
        f"{MANIFEST}: not a manifest: Exceeds the limit",
    ),
    "manifest_one_digit_altered": (
        manifest_text(lambda text: text.replace('"in_a_row": 0', '"in_a_row": 1')),
        f"{MANIFEST}: altered: its SHA-256 is not the one that it names",
    ),
    "manifest_without_its_hash": (
        lambda at: edit(at / "manifest.json", lambda raw: raw.pop("sha256") and None),
        f"{MANIFEST}: altered: its SHA-256 is not the one that it names",
    ),
    # The manifest, forged with a SHA-256 that fits
    "other_version": (forged(version=9), f"{MANIFEST}: version 9; this program reads version 3"),
    "version_is_a_text": (forged(version="2"), f"{MANIFEST}: version '2'; this program reads version 3"),
    "no_version": (
        lambda at: forge(at, lambda raw: raw.pop("version") and None),
        f"{MANIFEST}: not a manifest: 'version'",
    ),
    "of_another_step": (forged(step=11), f"{MANIFEST}: of step 11, which is not that of its folder"),
    "negative_step": (
        forged(step=-10),
        f"{MANIFEST}: not a manifest: step: Input should be greater than or equal to 0",
    ),
    "step_is_a_text": (forged(step="10"), f"{MANIFEST}: not a manifest: step: Input should be a valid integer"),
    "step_is_huge": (forged(step=10**400), f"{MANIFEST}: not a manifest: step: Input should be less than"),
    "no_classes": (forged(num_classes=0), f"{MANIFEST}: not a manifest: num_classes: Input should be greater than"),
    "best_is_infinite": (
        forged(best={"step": 5, "top1": 1e999}),
        f"{MANIFEST}: not a manifest: Infinity is no number",
    ),
    "best_without_a_step": (forged(best={"top1": 1.0}), f"{MANIFEST}: not a manifest: best.step: Field required"),
    "unknown_key": (forged(note="x"), f"{MANIFEST}: not a manifest: note: Unexpected keyword argument"),
    "missing_key": (
        lambda at: forge(at, lambda raw: raw.pop("method") and None),
        f"{MANIFEST}: not a manifest: method: Field required",
    ),
    "files_are_a_list": (forged(files=[PEER]), f"{MANIFEST}: not a manifest: files: Input should be an object"),
    "file_without_a_hash": (
        lambda at: forge(at, lambda raw: raw["files"][PEER].pop("sha256") and None),
        f"{MANIFEST}: not a manifest: files.{PEER}.sha256: Field required",
    ),
    "hash_of_another_kind": (in_files(sha256="d41d8cd9"), f"{MANIFEST}: not a manifest: files.{PEER}.sha256: String"),
    "negative_size": (in_files(size=-1), f"{MANIFEST}: not a manifest: files.{PEER}.size: Input should be greater"),
    "huge_size": (in_files(size=10**15), f"{{at}}/{PEER}: cut short or altered: {10**15} bytes expected, {{size}} fo"),
    "size_of_nothing": (in_files(size=0), f"{{at}}/{PEER}: cut short or altered: 0 bytes expected, {{size}} found"),
    "other_hash": (in_files(sha256="0" * 64), f"{{at}}/{PEER}: altered: its SHA-256 is not the one in the manifest"),
    "does_not_name_a_peer": (
        lambda at: forge(at, lambda raw: raw["files"].pop(PEER) and None),
        f"{MANIFEST}: does not name {PEER}",
    ),
    "does_not_name_the_shared": (
        lambda at: forge(at, lambda raw: raw["files"].pop("shared.pt") and None),
        f"{MANIFEST}: does not name shared.pt",
    ),
}


@pytest.mark.parametrize("damage", DOES_NOT_VERIFY)
def test_damage_is_named_and_the_checkpoint_before_is_found(run: Path, damage: str) -> None:
    inflict, expected = DOES_NOT_VERIFY[damage]
    at = checkpoint.folder_of(run, 10)
    size = (at / PEER).stat().st_size
    inflict(at)
    with pytest.raises(CheckpointError) as error:
        loading.verify(at)
    assert str(error.value).startswith(expected.format(at=at, size=size))
    assert "\n" not in str(error.value)
    manifest, damaged = loading.newest(run)
    assert manifest is not None
    assert (manifest.step, damaged) == (9, [str(error.value)])


@pytest.mark.parametrize(
    "damage",
    [
        *("peer_without_its_end", "bit_of_a_peer", "bit_of_the_shared", "peer_missing", "peer_is_a_folder"),
        *("names_a_file_above", "peer_is_a_link_out", "manifest_missing", "manifest_empty", "manifest_binary"),
        *("manifest_nested_deeply", "other_version", "of_another_step", "does_not_name_a_peer"),
    ],
)
def test_a_run_with_a_damaged_checkpoint_goes_on_from_the_one_before(
    tiny: Path, whole: Path, run: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    DOES_NOT_VERIFY[damage][0](checkpoint.folder_of(run, 10))
    damaged = loading.newest(run)[1]
    train_here(a_run(tiny, run))
    said = capsys.readouterr().err
    assert f"not used: {damaged[0]}\n" in said
    assert "going on at step 9 of 10" in said
    assert_same_state(final_state(run), final_state(whole))
    assert numbers(run) == numbers(whole)


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(tiny: Path, run: Path) -> None:
    """It would cut its metrics to nothing, and prune what is only not there at the moment."""
    for step in checkpoint.steps_on_disk(run):
        (checkpoint.folder_of(run, step) / PEER).unlink()
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError) as error:
        train_here(a_run(tiny, run))
    said = str(error.value)
    assert said.startswith(f"{run}: none of its checkpoints can be used, and a run that has some is not begun anew by")
    assert "--fresh" in said
    assert [line.strip() for line in said.splitlines()[1:]] == [
        f"{checkpoint.folder_of(run, step)}/{PEER}: missing" for step in (10, 9)
    ]
    assert (run / "metrics.jsonl").read_bytes() == before
    assert checkpoint.steps_on_disk(run) == [9, 10]


# -- what verifies and cannot be used ---------------------------------------------------------------------------------


class Harmful:
    """What a pickle may do when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.write_text, (self.path, "executed")


def harm(at: Path) -> None:
    replace_file(at, PEER, pickle.dumps(Harmful(at.parents[1] / "harm"), protocol=2))


def harm_among_tensors(at: Path) -> None:
    torch.save({"network": Harmful(at.parents[1] / "harm")}, at / PEER)
    replace_file(at, PEER, (at / PEER).read_bytes())


def in_network(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Changes the weights of the second peer."""
    return lambda at: change_state(at, PEER, lambda state: change(state["network"]))


def in_momentum(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Changes what the second peer's optimiser keeps."""
    return lambda at: change_state(at, PEER, lambda state: change(state["optimizer"]))


REFUSED = f"{{at}}/{PEER}: refused, as it is no file of tensors and nothing in it is executed: "
UNFIT = f"{{at}}/{PEER}: does not fit this run: "

CANNOT_BE_USED: dict[str, Damage] = {
    "foreign_pickle": (harm, REFUSED),
    "foreign_pickle_among_tensors": (harm_among_tensors, REFUSED),
    "empty": (lambda at: replace_file(at, PEER, b""), REFUSED),
    "no_tensors_at_all": (lambda at: replace_file(at, PEER, b"no tensors at all"), REFUSED),
    "a_list": (lambda at: change_state(at, PEER, lambda state: [state]), f"{UNFIT}expected a dict, found list"),
    "part_missing": (lambda at: change_state(at, PEER, lambda state: state.pop("head")), f"{UNFIT}lacks 'head'"),
    "part_unknown": (
        lambda at: change_state(at, PEER, lambda state: state.update(more=1)),
        f"{UNFIT}has 'more', unknown here",
    ),
    "no_weights": (
        lambda at: change_state(at, PEER, lambda state: state.update(network=None)),
        f"{UNFIT}network: expected weights, found NoneType",
    ),
    "weight_missing": (
        in_network(lambda net: net.__delitem__("conv1.weight")),
        f"{UNFIT}network: lacks 'conv1.weight'",
    ),
    "weight_unknown": (
        in_network(lambda net: net.update(extra=torch.zeros(1))),
        f"{UNFIT}network: has 'extra', unknown here",
    ),
    "weight_of_another_shape": (
        in_network(lambda net: net.update({"conv1.weight": torch.zeros(2, 2)})),
        f"{UNFIT}network: conv1.weight: expected float32 [4, 1, 3, 3], found float32 [2, 2]",
    ),
    "weight_of_another_format": (
        in_network(lambda net: net.update({"conv1.weight": net["conv1.weight"].double()})),
        f"{UNFIT}network: conv1.weight: expected float32 [4, 1, 3, 3], found float64 [4, 1, 3, 3]",
    ),
    "weight_is_a_text": (
        in_network(lambda net: net.update({"conv1.weight": "x"})),
        f"{UNFIT}network: conv1.weight: expected float32 [4, 1, 3, 3], found str",
    ),
    "momentum_of_another_shape": (
        in_momentum(lambda kept: kept["state"][0].update(momentum_buffer=torch.zeros(7))),
        f"{UNFIT}optimizer: momentum_buffer [7] for a weight [4, 1, 3, 3]",
    ),
    "fewer_parameters": (
        in_momentum(lambda kept: kept["param_groups"][0]["params"].__delitem__(0)),
        f"{UNFIT}loaded state dict contains a parameter group that doesn't match the size of optimizer's group",
    ),
    "no_groups": (in_momentum(lambda kept: kept.__delitem__("param_groups")), f"{UNFIT}'param_groups'"),
    "shared_without_modules": (
        lambda at: change_state(at, "shared.pt", lambda state: state.pop("modules") and None),
        "{at}/shared.pt: does not fit this run: lacks 'modules'",
    ),
    "of_another_method": (forged(method="independent"), "{at}: of method independent; expected dml"),
    "of_a_renamed_peer": (
        lambda at: (
            (at / PEER).rename(at / "peer_b.pt"),
            forge(
                at,
                lambda raw: raw.update(
                    peers=["cifar_resnet8_b-0", "b"],
                    files={name.replace(PEER, "peer_b.pt"): entry for name, entry in raw["files"].items()},
                ),
            ),
        ),
        "{at}: of the peers cifar_resnet8_b-0, b; expected cifar_resnet8_b-0, cifar_resnet8_b-1",
    ),
}


@pytest.mark.parametrize("damage", CANNOT_BE_USED)
def test_a_checkpoint_that_verifies_and_cannot_be_used_ends_the_start_with_its_name(
    tiny: Path, run: Path, damage: str
) -> None:
    inflict, expected = CANNOT_BE_USED[damage]
    at = checkpoint.folder_of(run, 10)
    inflict(at)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert loading.verify(at).step == 10
    with pytest.raises(CheckpointError) as error:
        train_here(a_run(tiny, run))
    assert str(error.value).startswith(expected.format(at=at))
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("damage", ["foreign_pickle", "momentum_of_another_shape", "of_another_method"])
def test_all_ranks_refuse_alike_what_one_rank_cannot_use(tiny: Path, run: Path, damage: str) -> None:
    inflict, expected = CANNOT_BE_USED[damage]
    at = checkpoint.folder_of(run, 10)
    inflict(at)
    of_rank_0, of_rank_1 = run_ranks(2, tell_refusal, a_run(tiny, run), timeout=60)
    assert of_rank_0 == of_rank_1
    assert of_rank_0.startswith(expected.format(at=at))


def tell_refusal(config: RunConfig) -> str:
    try:
        train_here(config)
    except CheckpointError as error:
        return str(error)
    return "none"


def test_the_foreign_pickle_would_be_harmful(run: Path) -> None:
    at = checkpoint.folder_of(run, 10)
    harm(at)
    pickle.loads((at / PEER).read_bytes())
    assert (run / "harm").read_text() == "executed"


def forget_the_config(run: Path) -> None:
    """It would have refused it earlier."""
    (run / "config.yaml").unlink()
    for step in checkpoint.steps_on_disk(run):
        forge(checkpoint.folder_of(run, step), lambda raw: raw.update(config={}))


def test_a_checkpoint_of_other_peers_is_refused(tiny: Path, run: Path) -> None:
    forget_the_config(run)
    peers = [{"network": "cifar_resnet8_b", "name": name, "options": {"width": 4}} for name in ("a", "b")]
    with pytest.raises(CheckpointError) as error:
        train_here(a_run(tiny, run, peers=peers))
    assert str(error.value) == (
        f"{checkpoint.folder_of(run, 10)}: of the peers cifar_resnet8_b-0, cifar_resnet8_b-1; expected a, b"
    )


def test_a_network_that_has_become_wider_is_refused(tiny: Path, run: Path) -> None:
    forget_the_config(run)
    peers = [{"network": "cifar_resnet8_b", "copies": 2, "options": {"width": 8}}]
    with pytest.raises(CheckpointError) as error:
        train_here(a_run(tiny, run, peers=peers))
    assert str(error.value) == (
        f"{checkpoint.folder_of(run, 10)}/peer_cifar_resnet8_b-0.pt: does not fit this run: network: conv1.weight: "
        "expected float32 [8, 1, 3, 3], found float32 [4, 1, 3, 3]"
    )


# -- names that become paths ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../x", "/x", "a/b", "..", ".x", "-x", "a\n", "a\n/b", "a\\b", "ü", "a b", "", "a\0b"]
)
def test_a_name_that_could_lead_elsewhere_is_refused(tiny: Path, tmp_path: Path, name: str) -> None:
    expected = "expected letters, digits, '.', '_' and '-', starting with a letter or digit"
    with pytest.raises(ConfigError, match="^name = .*: " + re.escape(expected)):
        a_run(tiny, tmp_path, name=name)
    with pytest.raises(ConfigError, match=re.escape("peers.0.name = ") + ".*: " + re.escape(expected)):
        a_run(tiny, tmp_path, peers=[{"network": "cifar_resnet8_b", "name": name}])


def test_classes_named_oddly_stay_names(tmp_path: Path) -> None:
    names = [b"-rf", b"$(touch harm)", b"a b", b"a\nb", b"..x"[1:] + b"..", "ü".encode(), b"\xff", b'"', b"x;y"]
    for split in (b"train", b"val"):
        for name in names:
            folder = os.path.join(os.fsencode(tmp_path), b"data", split, name)
            os.makedirs(folder)
            Path(os.fsdecode(folder), "x.png").touch()
    train, _ = list_folder(tmp_path / "data")
    assert {os.fsencode(name) for name in train.classes} == {name for name in names if not name.startswith(b".")}
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run" / "classes.json", train.classes)
    assert tuple(json.loads((tmp_path / "run" / "classes.json").read_text())) == train.classes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "run"]


def test_the_tables_hold_at_least_thirty_kinds_each_with_a_message_of_its_own() -> None:
    assert len(DOES_NOT_VERIFY) + len(CANNOT_BE_USED) >= 30
    json.dumps({name: message for name, (_, message) in (DOES_NOT_VERIFY | CANNOT_BE_USED).items()})
