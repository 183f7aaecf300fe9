"""Promise 6: nothing is guessed. A mistake is named with its key, its value, what was expected and the nearest."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from engine.config import ConfigError, RunConfig
from engine.config.loading import describe, dump, load, validate
from engine.ranks.planning.choosing import plan
from losses import METHODS

BASE: dict[str, Any] = {
    "name": "run",
    "method": {"name": "dml"},
    "peers": [{"network": "cifar_resnet8_b", "copies": 2}],
    "data": {"dataset": "fashion_mnist_subset", "global_batch": 24},
    "train": {"epochs": 2},
}


def raw(**changes: Any) -> dict[str, Any]:
    config = copy.deepcopy(BASE)
    for key, value in changes.items():
        together = isinstance(value, dict) and isinstance(config.get(key), dict)
        config[key] = config[key] | value if together else value
    return config


def refusal(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(raw(**changes))
    return str(caught.value)


UNLIKE_NAMES = [{"network": "cifar_resnet8_b", "copies": 2, "name": "a"}, {"network": "cifar_resnet8_b", "name": "a-0"}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train": {"epoch": 3}},
            "train.epoch = 3: unknown key; did you mean 'epochs'?; train has: accumulation, batch_peers, bce_sum, "
            "bce_threshold, clip_factor, clip_norm, drop_path, ema_decay, ema_warmup, epochs, loss, max_skipped, "
            "max_steps, peer_threads, sync_bn, timeout",
        ),
        ({"train": {"epochs": "3"}}, "train.epochs = '3': expected an integer"),
        ({"train": {"epochs": True}}, "train.epochs = True: expected an integer"),
        ({"train": {"epochs": 0}}, "train.epochs = 0: expected a value greater than or equal to 1"),
        ({"train": None}, "train = None: expected a section with keys"),
        ({"seed": -1}, "seed = -1: expected a value greater than or equal to 0"),
        ({"optimizer": {"lr": float("inf")}}, "optimizer.lr = inf: expected a finite number"),
        (
            {"method": {"name": "dmll"}},
            f"method.name = 'dmll': expected one of {', '.join(METHODS)}; did you mean 'dml'?",
        ),
        (
            {"method": {"combine": "men"}},
            "method.combine = 'men': expected one of mean, sum, ensemble; did you mean 'mean'?",
        ),
        (
            {"method": {"temprature": 2.0}},
            "method.temprature = 2.0: unknown key; did you mean 'temperature'?; method has: combine, name, order, "
            "ramp, temperature, weight, weights",
        ),
        (
            {"method": {"name": "independent", "temperature": 2.0}},
            "method.temperature = 2.0: unknown key; method has: name",
        ),
        (
            {"peers": [{"network": "cifar_resnet8_b"}]},
            "method.name = dml: dml needs at least 2 peers to teach each other, found 1",
        ),
        ({"peers": []}, "peers = []: expected at least 1 item"),
        ({"peers": UNLIKE_NAMES}, "peers: name 'a-0' is used twice; expected a different name for each peer"),
        (
            {"schedule": {"name": "step"}},
            "schedule.milestones = []: name = step needs at least one epoch, such as [60, 120, 180]",
        ),
        (
            {"schedule": {"milestones": [1.0]}},
            "schedule.milestones = [1.0]: only name = step has milestones, found name = cosine",
        ),
        (
            {"schedule": {"name": "step", "milestones": [2.0]}},
            "schedule.milestones = [2.0]: the last lies at or after the end of training, expected epochs below "
            "train.epochs = 2",
        ),
        (
            {"schedule": {"name": "step", "milestones": [1.5, 1.0]}},
            "schedule.milestones = [1.5, 1.0]: expected ascending epochs, each once",
        ),
        (
            {"schedule": {"warmup_epochs": 3}},
            "schedule.warmup_epochs = 3.0: expected at most train.epochs = 2",
        ),
        (
            {"train": {"accumulation": 2}, "method": {"order": "sequential"}},
            "train.accumulation = 2: peers that are updated in turn (method.order = sequential) need a whole batch at "
            "once; expected 1",
        ),
        (
            {"placement": {"kind": "hybrid"}},
            "placement.peers_per_rank = None: kind = hybrid needs a number of peers, other kinds have none; found "
            "kind = hybrid",
        ),
        (
            {"name": "a/b"},
            "name = 'a/b': expected letters, digits, '.', '_' and '-', starting with a letter or digit",
        ),
    ],
)
def test_a_mistake_is_named_in_full(changes: dict[str, Any], message: str) -> None:
    assert refusal(**changes) == message


def test_every_mistake_has_its_line() -> None:
    lines = refusal(train={"epochs": 0, "clip": 1.0}, seed="zero").splitlines()
    assert [line.split(" ")[0] for line in lines] == ["seed", "train.epochs", "train.clip"]


def test_a_missing_key_is_named() -> None:
    config = raw()
    del config["data"]["global_batch"]
    with pytest.raises(
        ConfigError, match=r"^data\.global_batch: missing; expected samples of one optimiser step, over all ranks$"
    ):
        validate(config)


def test_a_network_that_does_not_exist_is_refused_with_the_nearest() -> None:
    message = refusal(peers=[{"network": "cifar_resnet9_b", "copies": 2}])
    assert message.startswith("peers.0: network 'cifar_resnet9_b'")
    assert "nearest: 8, 14" in message


# -- peers ------------------------------------------------------------------------------------------------------------


def test_copies_are_written_out_with_names_of_their_own() -> None:
    peers = [
        {"network": "cifar_resnet8_b", "copies": 2},
        {"network": "timm/test_vit", "name": "small"},
        {"network": "torchvision/resnet18"},
    ]
    names = [name for name, _ in validate(raw(peers=peers)).cohort]
    assert names == ["cifar_resnet8_b-0", "cifar_resnet8_b-1", "small", "torchvision_resnet18"]


# -- files ------------------------------------------------------------------------------------------------------------

YAML = """
name: run
method: {name: dml, temperature: 4}
peers:
  - {network: cifar_resnet8_b, copies: 2}
data: {dataset: fashion_mnist_subset, global_batch: 24}
train: {epochs: 2}
optimizer: {name: sgd, lr: 1e-2, options: {dampening: 0.0}}
schedule: {name: step, milestones: [1]}
"""


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_numbers_are_read_as_people_write_them(tmp_path: Path) -> None:
    config = load(write(tmp_path, "a.yaml", YAML))
    assert config.optimizer.lr == 0.01
    assert config.schedule.milestones == [1.0]
    assert config.method.model_dump()["temperature"] == 4.0


def test_what_is_dumped_can_be_loaded_and_is_the_same(tmp_path: Path) -> None:
    config = load(write(tmp_path, "a.yaml", YAML), ["train.clip_norm=0.5", f"dir={tmp_path}"])
    again = load(write(tmp_path, "b.yaml", dump(config)))
    assert again == config


def test_a_config_inherits_section_by_section(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", YAML)
    child = write(tmp_path, "child.yaml", "base: base.yaml\ntrain: {ema_decay: 0.9}\noptimizer: {lr: 0.3}\n")
    config = load(child)
    assert (config.train.epochs, config.train.ema_decay) == (2, 0.9)
    assert (config.optimizer.lr, config.optimizer.options) == (0.3, {"dampening": 0.0})


def test_a_section_of_another_name_starts_afresh(tmp_path: Path) -> None:
    """The options of SGD are none of AdamW's, and a temperature is none of `independent`."""
    write(tmp_path, "base.yaml", YAML)
    child = write(tmp_path, "child.yaml", "base: base.yaml\nmethod: {name: independent}\noptimizer: {name: adamw}\n")
    config = load(child)
    assert config.method.name == "independent"
    assert (config.optimizer.options, config.optimizer.lr) == ({}, 0.1)


def test_overrides_reach_lists_and_sections(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", YAML)
    config = load(path, ["peers.0.copies=3", "precision.amp=bf16", "train.ema_decay=null", "optimizer.lr=2e-3"])
    assert len(config.cohort) == 3
    assert (config.precision.amp, config.train.ema_decay, config.optimizer.lr) == ("bf16", None, 0.002)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs", "'train.epochs': expected section.key=value, such as train.epochs=10"),
        ("peers.3.copies=2", "peers.3: expected an index from 0 to 0, found '3'"),
        ("train.epochs.first=2", "train.epochs.first: train.epochs = 2 has no keys below it"),
    ],
)
def test_wrong_overrides_are_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, "a.yaml", YAML), [override])
    assert str(caught.value) == message


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "name: one\nseed: 1\nname: two\n")
    with pytest.raises(ConfigError, match=r"a\.yaml:3: key 'name' stands twice$"):
        load(path)


def test_files_that_inherit_from_each_other_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "base: b.yaml\n")
    path = write(tmp_path, "b.yaml", "base: a.yaml\n")
    with pytest.raises(ConfigError, match=r"inherits from itself through base: b\.yaml -> a\.yaml -> b\.yaml$"):
        load(path)


def test_a_missing_base_is_named_with_the_nearest_file(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", YAML)
    path = write(tmp_path, "child.yaml", "base: bse.yaml\n")
    with pytest.raises(
        ConfigError, match=r"bse\.yaml \(base of .*child\.yaml\): cannot be read: .*mean 'base\.yaml'\?"
    ):
        load(path)


def test_describe_names_every_key() -> None:
    described = describe()
    for key in ("train.epochs = null\n", "optimizer.lr = 0.1\n", "method.temperature = 1.0\n", "peers.N.network\n"):
        assert key in described
    assert "None" not in described


# -- placement --------------------------------------------------------------------------------------------------------


def planned(
    world: int,
    peers: int = 2,
    batch: int = 24,
    parts: int = 1,
    method: dict[str, Any] | None = None,
    **placement: Any,
) -> Any:
    config: RunConfig = validate(
        raw(
            method=method or {"name": "dml"},
            peers=[{"network": "cifar_resnet8_b", "copies": peers}],
            data={"global_batch": batch},
            train={"accumulation": parts},
            placement=placement,
        )
    )
    return [plan(config, world, rank) for rank in range(world)]


@pytest.mark.parametrize(
    ("world", "peers", "expected"),
    [(1, 2, "colocated"), (2, 2, "spread"), (4, 2, "spread"), (3, 2, "colocated"), (2, 4, "hybrid"), (6, 4, "hybrid")],
)
def test_auto_puts_as_few_peers_on_a_rank_as_the_ranks_allow(world: int, peers: int, expected: str) -> None:
    assert {place.kind for place in planned(world, peers)} == {expected}


@pytest.mark.parametrize(("world", "peers"), [(1, 3), (4, 2), (6, 3), (6, 4), (8, 2)])
def test_every_peer_sees_every_row_once(world: int, peers: int) -> None:
    seen = [(k, row) for place in planned(world, peers) for k in place.residents for row in range(24)[place.rows(24)]]
    assert sorted(seen) == [(k, row) for k in range(peers) for row in range(24)]


@pytest.mark.parametrize(("world", "peers"), [(1, 2), (2, 3), (4, 2)])
def test_all_ranks_of_a_job_are_replicas_of_its_peer(world: int, peers: int) -> None:
    for k in range(peers):
        job: Any = {"kind": "jobs", "meeting": "/meeting", "peer": f"cifar_resnet8_b-{k}"}
        places = planned(world, peers, method={"name": "codistillation"}, **job)
        assert [list(place.residents) for place in places] == [[k]] * world
        assert [list(place.peers) for place in places] == [[k]] * world
        assert {(place.kind, len(place.groups), place.replicas, place.group) for place in places} == {
            ("jobs", 1, world, 0)
        }
        assert sorted(row for place in places for row in range(24)[place.rows(24)]) == list(range(24))


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (
            {"world": 3, "kind": "spread"},
            "placement.kind = spread: 2 peers, 1 a rank, need a multiple of 2 ranks, found 3; nearest: 2 or 4, or "
            "placement.kind = auto",
        ),
        (
            {"world": 2, "peers": 4, "kind": "hybrid", "peers_per_rank": 3},
            "placement.peers_per_rank = 3: expected a divisor of the number of peers, 4: one of 1, 2, 4",
        ),
        (
            {"world": 4, "batch": 3, "parts": 2},
            "data.global_batch = 3: 2 replicas x 2 micro-batches do not get a row each; expected at least 4",
        ),
    ],
)
def test_what_cannot_be_placed_is_refused(wanted: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        planned(**wanted)
    assert str(caught.value) == message
