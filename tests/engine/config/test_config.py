"""Config files: inheritance, overrides, YAML as people write it, and what is written being read again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from data_pipelines.sources.sections import DataSet
from engine.config import ConfigError
from engine.config.loading import describe, dump, load, validate

WHOLE = """\
name: small
method: {name: dml, temperature: 2.0}
peers: [{network: cifar_resnet8_b, copies: 2, options: {width: 4}}]
data: {dataset: fashion_mnist_subset, global_batch: 24}
train: {epochs: 2, clip_norm: 5.0}
"""

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load(path, overrides)
    return str(error.value)


# -- base -------------------------------------------------------------------------------------------------------------


def test_base_is_relative_to_the_file_that_names_it(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write("common/base.yaml", WHOLE)
    path = write("data_set/run.yaml", "base: ../common/base.yaml\nname: other\n")
    monkeypatch.chdir(path.parent.parent)
    assert load("data_set/run.yaml").name == "other"
    assert load("data_set/run.yaml").train.epochs == 2


def test_base_may_have_a_base(write: Write) -> None:
    write("one.yaml", WHOLE)
    write("two.yaml", "base: one.yaml\ntrain: {epochs: 3}\nseed: 1\n")
    config = load(write("three.yaml", "base: two.yaml\nseed: 2\n"))
    assert (config.train.epochs, config.seed, config.train.clip_norm) == (3, 2, 5.0)


def test_a_cycle_of_bases_is_refused(write: Write) -> None:
    write("a.yaml", "base: b.yaml\n")
    write("b.yaml", "base: c.yaml\n")
    path = write("c.yaml", "base: a.yaml\n")
    assert refusal(path) == f"{path}: inherits from itself through base: c.yaml -> a.yaml -> b.yaml -> c.yaml"


def test_a_base_of_itself_is_refused(write: Write) -> None:
    path = write("a.yaml", "base: ./a.yaml\n")
    assert refusal(path) == f"{path}: inherits from itself through base: a.yaml -> a.yaml"


def test_a_missing_base_is_named_with_who_wants_it_and_the_nearest(write: Write) -> None:
    near = write("base.yaml", WHOLE)
    path = write("run.yaml", "base: bsae.yaml\n")
    assert refusal(path) == (
        f"{near.with_name('bsae.yaml')} (base of {path}): cannot be read: No such file or directory; "
        "did you mean 'base.yaml'?"
    )


@pytest.mark.parametrize(("base", "shown"), [("3", "3"), ("[a.yaml]", "['a.yaml']")])
def test_a_base_that_is_no_path_is_refused(write: Write, base: str, shown: str) -> None:
    path = write("run.yaml", f"base: {base}\n")
    assert refusal(path) == f"{path}: base = {shown}: expected the path of another config, relative to this one"


def test_base_is_not_part_of_the_resolved_config(write: Write) -> None:
    write("one.yaml", WHOLE)
    assert "base" not in yaml.safe_load(dump(load(write("two.yaml", "base: one.yaml\n"))))


# -- merging ----------------------------------------------------------------------------------------------------------


def test_keys_of_a_section_are_merged_one_by_one(write: Write) -> None:
    write("one.yaml", WHOLE)
    train = load(write("two.yaml", "base: one.yaml\ntrain: {epochs: 9}\n")).train
    assert (train.epochs, train.clip_norm) == (9, 5.0)


def test_null_takes_a_value_back(write: Write) -> None:
    write("one.yaml", WHOLE)
    assert load(write("two.yaml", "base: one.yaml\ntrain: {clip_norm: null}\n")).train.clip_norm is None


def test_a_list_replaces_a_list(write: Write) -> None:
    write("one.yaml", WHOLE)
    config = load(write("two.yaml", "base: one.yaml\npeers: [{network: cifar_resnet14_b, copies: 3}]\n"))
    assert [(p.network, p.copies, p.options) for p in config.peers] == [("cifar_resnet14_b", 3, {})]


def test_a_section_of_another_name_starts_afresh(write: Write) -> None:
    """A temperature of dml is no option of independent."""
    write("one.yaml", WHOLE)
    assert load(write("two.yaml", "base: one.yaml\nmethod: {name: independent}\n")).method.name == "independent"


def test_a_section_of_the_same_name_keeps_its_options(write: Write) -> None:
    write("one.yaml", WHOLE)
    method = load(write("two.yaml", "base: one.yaml\nmethod: {name: dml, combine: sum}\n")).method
    assert method.model_dump() == {
        "name": "dml", "combine": "sum", "order": "simultaneous", "temperature": 2.0, "weight": 1.0,
        "weights": None, "ramp": 0,
    }  # fmt: skip


def test_another_data_set_starts_afresh(write: Write) -> None:
    write("one.yaml", WHOLE.replace("global_batch: 24", "global_batch: 24, augmentation: {padding: 2}"))
    path = write("two.yaml", "base: one.yaml\ndata: {dataset: image_folder, root: /data, global_batch: 8}\n")
    assert load(path).data.model_dump()["augmentation"] == {"crop_area": (0.08, 1.0), "crop_ratio": (3 / 4, 4 / 3)}


def test_sections_within_a_section_are_merged_too(write: Write) -> None:
    write("one.yaml", WHOLE.replace("global_batch: 24", "global_batch: 24, augmentation: {padding: 2, flip: false}"))
    path = write("two.yaml", "base: one.yaml\ndata: {augmentation: {padding_mode: zeros}}\n")
    assert load(path, ["data.augmentation.flip=true"]).data.augmentation.model_dump(
        include={"padding", "padding_mode", "flip"}
    ) == {"padding": 2, "padding_mode": "zeros", "flip": True}


def test_two_files_with_one_base_do_not_disturb_each_other(write: Write) -> None:
    write("one.yaml", WHOLE)
    first, second = (write(f"{i}.yaml", f"base: one.yaml\ntrain: {{epochs: {i}}}\n") for i in (3, 4))
    assert [load(path).train.epochs for path in (first, second, first)] == [3, 4, 3]


# -- overrides --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.epochs=7", lambda c: c.train.epochs == 7),
        ("peers.0.network=cifar_resnet14_b", lambda c: c.peers[0].network == "cifar_resnet14_b"),
        ("peers.0.options.width=8", lambda c: c.peers[0].options == {"width": 8}),
        ("peers.0.copies=5", lambda c: len(c.cohort) == 5),
        ("optimizer.options.nesterov=false", lambda c: c.optimizer.options == {"nesterov": False}),
        ("optimizer.lr=1e-4", lambda c: c.optimizer.lr == 1e-4),
        ("train.clip_norm=null", lambda c: c.train.clip_norm is None),
        ("train.clip_norm=", lambda c: c.train.clip_norm is None),
        ("name=a=b", None),
        ("name=other", lambda c: c.name == "other"),
        ("dir=/tmp/x=y", lambda c: c.dir == Path("/tmp/x=y")),
        ("data.mean=[0.5]", lambda c: c.data.mean == [0.5]),
    ],
)
def test_an_override_reaches_its_key(write: Write, override: str, value: Callable[[Any], bool] | None) -> None:
    path = write("run.yaml", WHOLE)
    if value is None:
        assert "name = 'a=b'" in refusal(path, override)
    else:
        assert value(load(path, [override]))


def test_the_later_override_wins(write: Write) -> None:
    path = write("run.yaml", WHOLE)
    assert load(path, ["peers=[{network: cifar_resnet8_b, copies: 2}]", "peers.0.copies=4"]).peers[0].copies == 4
    assert load(path, ["train.epochs=4", "train.epochs=3"]).train.epochs == 3


def test_an_override_changes_one_item_of_a_list_only(write: Write) -> None:
    two = WHOLE.replace(
        "[{network: cifar_resnet8_b, copies: 2, options: {width: 4}}]",
        "[{network: cifar_resnet8_b, name: a}, {network: cifar_resnet8_b, name: b}]",
    )
    config = load(write("run.yaml", two), ["peers.1.network=cifar_resnet14_b"])
    assert [p.network for p in config.peers] == ["cifar_resnet8_b", "cifar_resnet14_b"]


# -- YAML as people write it ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.e-4", "1.0e-4", "0.0001", "+1e-4"])
def test_a_number_with_an_exponent_is_a_number(write: Write, text: str) -> None:
    assert load(write("run.yaml", f"{WHOLE}optimizer: {{lr: {text}}}\n")).optimizer.lr == 1e-4


def test_an_integer_will_do_for_a_number(write: Write) -> None:
    assert load(write("run.yaml", f"{WHOLE}optimizer: {{lr: 1}}\n")).optimizer.lr == 1.0


def test_a_name_with_an_exponent_inside_stays_text(write: Write) -> None:
    assert load(write("run.yaml", WHOLE), ["name=a1e5"]).name == "a1e5"


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        (f"{WHOLE}train: {{epochs: 3}}\n", 6, "train"),
        (f"{WHOLE}log:\n  progress: true\n  progress: false\n", 8, "progress"),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_its_line(write: Write, text: str, line: int, key: str) -> None:
    path = write("run.yaml", text)
    assert refusal(path) == f"{path}:{line}: key {key!r} stands twice"


def test_a_tag_that_would_run_code_is_refused(write: Write) -> None:
    path = write("run.yaml", f"{WHOLE}seed: !!python/object/apply:os.getpid []\n")
    assert refusal(path).startswith(f"{path}: not valid YAML: could not determine a constructor for the tag")


@pytest.mark.parametrize(("text", "found"), [("", "NoneType"), ("- 1\n", "list"), ("train\n", "str")])
def test_a_file_without_sections_is_refused(write: Write, text: str, found: str) -> None:
    path = write("run.yaml", text)
    assert refusal(path) == f"{path}: expected sections with keys, found {found}"


def test_a_file_that_is_not_text_is_refused(write: Write) -> None:
    path = write("run.yaml", "")
    path.write_bytes(b"name: \xff\xfe\n")
    # The nearest name is the file itself, and no help.
    assert refusal(path).startswith(f"{path}: cannot be read: not a text file")


# -- the whole --------------------------------------------------------------------------------------------------------

DATA: dict[str, dict[str, Any]] = {
    "fashion_mnist_subset": {
        "global_batch": 24,
        "augmentation": {"padding": 2, "flip": False, "padding_mode": "zeros"},
    },
    "fashion_mnist": {"root": "~/fashion", "global_batch": 128, "mean": [0.1], "std": [0.2]},
    "cifar10": {"root": "/data/cifar", "global_batch": 128},
    "cifar100": {"root": "relative/cifar", "global_batch": 128},
    "npz": {"root": "/data/a.npz", "global_batch": 8, "shape": [32, 3], "mean": [0.5] * 3, "std": [0.2] * 3},
    "webdataset": {"root": "/data/shards", "global_batch": 8, "val_labels": "labels.txt", "links": "anywhere"},
    "hub": {"root": "/data/hub", "global_batch": 8, "label_column": "fine_label", "cache": "~/cache"},
    "image_folder": {
        "root": "/data/imagenet",
        "global_batch": 256,
        "image": {"size": 160, "resize": 182},
        "augmentation": {"crop_area": [0.25, 1.0]},
        "decoding": {"decoder": "cpu", "threads": 2},
    },
}


def test_every_data_set_is_dumped_below() -> None:
    assert set(DATA) == set(get_args(DataSet))


@pytest.mark.parametrize("dataset", DATA)
@pytest.mark.parametrize("method", [{"name": "independent"}, {"name": "dml", "order": "sequential", "weight": 1e-7}])
def test_what_is_dumped_is_loaded_as_an_equal_config(write: Write, dataset: str, method: dict[str, Any]) -> None:
    config = validate(
        {
            "name": "a.b-c_d",
            "dir": "/tmp/somewhere",
            "seed": 2**62,
            "method": method,
            "peers": [{"network": "cifar_resnet8_b", "copies": 3}, {"network": "timm/resnet18", "name": "x"}],
            "data": {"dataset": dataset, **DATA[dataset]},
            "train": {"epochs": 30, "clip_norm": 1e-3},
            "optimizer": {"name": "adamw", "lr": 3e-5, "options": {"betas": [0.9, 0.99]}},
            "schedule": {"name": "step", "milestones": [10, 20.5]},
            "placement": {"kind": "hybrid", "peers_per_rank": 2},
        }
    )
    again = load(write("again.yaml", dump(config)))
    assert again == config
    assert dump(again) == dump(config)


def test_copies_get_names_of_their_own(write: Write) -> None:
    peers = [{"network": "timm/resnet18"}, {"network": "cifar_resnet8_b", "copies": 2}]
    config = load(write("run.yaml", WHOLE), [f"peers={peers}"])
    assert [name for name, _ in config.cohort] == ["timm_resnet18", "cifar_resnet8_b-0", "cifar_resnet8_b-1"]


def test_the_folder_of_a_run_is_named_after_it_unless_it_is_given(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    path = write("run.yaml", WHOLE)
    assert load(path).folder == Path("runs/small")
    assert load(path, ["dir=/tmp/x"]).folder == Path("/tmp/x")
    assert load(path, ["dir=~/x"]).folder == Path("/home/somebody/x")


def test_every_mistake_is_told_at_once(write: Write) -> None:
    message = refusal(write("run.yaml", WHOLE), "train.epochs=x", "seed=-1", "log.progress=3")
    assert message.split("\n") == [
        "seed = -1: expected a value greater than or equal to 0",
        "train.epochs = 'x': expected an integer",
        "log.progress = 3: expected true or false",
    ]


def test_the_description_of_keys_holds_every_key_of_a_resolved_config(write: Write) -> None:
    described = {line.split(" = ")[0] for line in describe().splitlines() if not line.startswith(" ")}
    raw = yaml.safe_load(dump(load(write("run.yaml", WHOLE))))

    def keys(raw: Any, prefix: str) -> Iterator[str]:
        for key, value in raw.items():
            if key == "peers":
                yield from keys(value[0], "peers.N.")
            elif isinstance(value, dict) and key != "options":
                yield from keys(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}"

    assert "data.augmentation.padding" in described
    assert described.issuperset(keys(raw, "")), set(keys(raw, "")) - described


def test_on_and_off_are_words_though_yaml_takes_them_for_true_and_false(write: Write) -> None:
    path = write("run.yaml", WHOLE)
    for word, read in (("on", "on"), ("off", "off"), ("true", "on"), ("auto", "auto")):
        assert load(path, [f"train.batch_peers={word}"]).train.batch_peers == read
