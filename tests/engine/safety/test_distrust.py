"""What lies on disk is not believed: each kind of damage and forgery has its message, and nothing of it is executed."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipelines.sources.opening import open_photos
from data_pipelines.sources.sections import Where
from engine.config import ConfigError, RunConfig
from engine.files import write_json
from engine.safety import checkpoint, loading
from engine.safety.checkpoint import CheckpointError
from tests.checkpoints import PEER, a_run, change_state, forge, replace_file
from tests.engine.safety.damage import DOES_NOT_VERIFY, Damage, forged
from tests.kills import assert_same_state, final_state, numbers
from tests.runs import train_here
from tests.worlds import run_ranks

# -- what does not verify ---------------------------------------------------------------------------------------------


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
    of_rank_0, of_rank_1 = run_ranks(2, tell_refusal, a_run(tiny, run), timeout=240)
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
    train, _ = open_photos(Where("image_folder", tmp_path / "data"))
    assert {os.fsencode(name) for name in train.classes} == {name for name in names if not name.startswith(b".")}
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run" / "classes.json", train.classes)
    assert tuple(json.loads((tmp_path / "run" / "classes.json").read_text())) == train.classes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "run"]


def test_the_tables_hold_at_least_thirty_kinds_each_with_a_message_of_its_own() -> None:
    assert len(DOES_NOT_VERIFY) + len(CANNOT_BE_USED) >= 30
    json.dumps({name: message for name, (_, message) in (DOES_NOT_VERIFY | CANNOT_BE_USED).items()})
