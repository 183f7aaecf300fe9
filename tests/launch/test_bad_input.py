"""Promise 6: nothing is guessed. Every mistake ends with exit code 2 and one message that says what to write."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml

from launch.train import main
from tests.runs import small_run, train_here

ROOT = Path(__file__).parents[2]

CONFIG = """\
name: small
dir: {at}/run
device: cpu
method: {{name: dml}}
peers: [{{network: cifar_resnet8_b, copies: 2, options: {{width: 4}}}}]
data: {{dataset: fashion_mnist, root: {at}/data, global_batch: 24}}
train: {{epochs: 2}}
"""

SECTIONS = (
    "checkpoint, data, device, dir, evaluation, health, log, method, name, optimizer, peers, placement, precision, "
    "report, schedule, seed, train"
)
GET_FASHION = (
    "Get the four *-ubyte.gz files from https://github.com/zalandoresearch/fashion-mnist, "
    "or Debian's package: apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb DIR"
)
GET_CIFAR = (
    "Get the binary version: curl -O https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz "
    "&& tar -xzf cifar-10-binary.tar.gz"
)
ADAMW = "amsgrad, betas, capturable, differentiable, eps, foreach, layer_decay, layer_decay_min_scale, maximize"
SGD = "dampening, differentiable, foreach, layer_decay, layer_decay_min_scale, maximize, nesterov"
MEETING = "kind = jobs needs a folder where peers meet, other kinds have none"
KINDS = "kind = hybrid needs a number of peers, other kinds have none"

OVERRIDES: dict[str, tuple[str, str]] = {
    # Keys.
    "unknown_section": (
        "trian.epochs=3",
        f"trian = {{'epochs': 3}}: unknown key; did you mean 'train'?; a config has: {SECTIONS}",
    ),
    "unknown_section_like_none": ("foo=3", f"foo = 3: unknown key; a config has: {SECTIONS}"),
    "misspelt_key": (
        "train.epoch=3",
        "train.epoch = 3: unknown key; did you mean 'epochs'?; train has: accumulation, bce_sum, bce_threshold, "
        "clip_norm, ema_decay, ema_warmup, epochs, loss, max_skipped, sync_bn, timeout",
    ),
    "misspelt_key_of_a_peer": (
        "peers.0.netwrk=x",
        "peers.0.netwrk = 'x': unknown key; did you mean 'network'?; peers.0 has: "
        "copies, frozen, name, network, optimizer, options, pretrained",
    ),
    "key_below_a_value": ("train.epochs.x=3", "train.epochs.x: train.epochs = 2 has no keys below it"),
    "base_as_override": (
        "base=x.yaml",
        f"base = 'x.yaml': unknown key; did you mean 'seed'?; a config has: {SECTIONS}",
    ),
    # Types.
    "text_for_integer": ("train.epochs=many", "train.epochs = 'many': expected an integer"),
    "float_for_integer": ("train.epochs=1.5", "train.epochs = 1.5: expected an integer"),
    "whole_float_for_integer": ("train.epochs=2.0", "train.epochs = 2.0: expected an integer"),
    "bool_for_integer": ("train.epochs=true", "train.epochs = True: expected an integer"),
    "bool_for_number": ("optimizer.lr=true", "optimizer.lr = True: expected a number"),
    "integer_for_bool": ("log.progress=1", "log.progress = 1: expected true or false"),
    "list_for_text": ("name=[3]", "name = [3]: expected text"),
    "integer_for_path": ("dir=3", "dir = 3: expected a path"),
    "value_for_section": ("train=3", "train = 3: expected a section with keys"),
    "nothing_for_section": ("data=", "data = None: expected a section with keys"),
    "value_for_list": ("peers=3", "peers = 3: expected a list"),
    "text_for_peer": ("peers=[cifar_resnet8_b]", "peers.0 = 'cifar_resnet8_b': expected a section with keys"),
    "infinite_rate": ("optimizer.lr=.inf", "optimizer.lr = inf: expected a finite number"),
    "rate_not_a_number": ("optimizer.lr=.nan", "optimizer.lr = nan: expected a finite number"),
    # Ranges and choices.
    "no_epochs": ("train.epochs=0", "train.epochs = 0: expected a value greater than or equal to 1"),
    "negative_seed": ("seed=-1", "seed = -1: expected a value greater than or equal to 0"),
    "great_seed": (f"seed={2**63}", f"seed = {2**63}: expected a value less than {2**63}"),
    "negative_rate": ("optimizer.lr=-1", "optimizer.lr = -1: expected a value greater than 0"),
    "momentum_of_one": ("optimizer.momentum=1.0", "optimizer.momentum = 1.0: expected a value less than 1"),
    "name_with_a_space": (
        "name=a b",
        "name = 'a b': expected letters, digits, '.', '_' and '-', starting with a letter or digit",
    ),
    "unknown_device": ("device=gpu", "device = 'gpu': expected one of auto, cpu, cuda; did you mean 'cpu'?"),
    "unknown_precision": (
        "precision.amp=bf61",
        "precision.amp = 'bf61': expected one of float32, bf16, fp16; did you mean 'bf16'?",
    ),
    "yaml_takes_on_for_true": ("log.wandb=on", "log.wandb = True: expected one of disabled, offline, online"),
    # Methods.
    "text_for_method": ("method=dml", "method = 'dml': expected a section with keys"),
    "option_of_another_method": (
        "method={name: independent, temperature: 2.0}",
        "method.temperature = 2.0: unknown key; method has: name",
    ),
    "misspelt_option": (
        "method.temprature=2.0",
        "method.temprature = 2.0: unknown key; did you mean 'temperature'?; method has: combine, name, order, "
        "ramp, temperature, weight, weights",
    ),
    "unknown_choice_of_an_option": (
        "method.combine=avg",
        "method.combine = 'avg': expected one of mean, sum, ensemble",
    ),
    "one_peer_for_dml": (
        "peers.0.copies=1",
        "method.name = dml: dml needs at least 2 peers to teach each other, found 1",
    ),
    # Peers.
    "no_peers": ("peers=[]", "peers = []: expected at least 1 item"),
    "no_copies": ("peers.0.copies=0", "peers.0.copies = 0: expected a value greater than or equal to 1"),
    "unknown_network": (
        "peers=[{network: cifar_resnt8_b, copies: 2}]",
        "peers.0: network 'cifar_resnt8_b': there is none of that name; expected timm/NAME, torchvision/NAME or one of "
        "ours, such as cifar_resnet8_a, cifar_wrn_16_1; nearest: cifar_resnet8_b, cifar_resnet8_a, cifar_resnet56_b",
    ),
    "impossible_depth": (
        "peers.0.network=cifar_resnet9_b",
        "peers.0: network 'cifar_resnet9_b': depth 9 is not 6n+2 with n >= 1; nearest: 8, 14",
    ),
    "unknown_network_option": (
        "peers.0.options.wdth=3",
        "peers.0: network 'cifar_resnet8_b': unknown option 'wdth'; nearest: width; valid: width",
    ),
    "bad_network_option": (
        "peers.0.options.width=-3",
        "peers.0: network 'cifar_resnet8_b': option 'width' is -3; expected a positive integer",
    ),
    "same_name_twice": (
        "peers=[{network: cifar_resnet8_b, name: a-0}, {network: cifar_resnet8_b, name: a, copies: 2}]",
        "peers: name 'a-0' is used twice; expected a different name for each peer",
    ),
    "name_of_the_ensemble": (
        "peers=[{network: cifar_resnet8_b, name: ensemble}, {network: cifar_resnet8_b}]",
        "peers: name 'ensemble' stands for all peers together; expected another name",
    ),
    "index_out_of_range": ("peers.1.copies=2", "peers.1: expected an index from 0 to 0, found '1'"),
    "text_for_index": ("peers.first.copies=2", "peers.first: expected an index from 0 to 0, found 'first'"),
    # Placement.
    "batch_not_divisible": (
        "train.accumulation=5",
        "data.global_batch = 24: cannot be split evenly over 1 replicas x 5 micro-batches; nearest: 20 or 25",
    ),
    "world_does_not_fit": (
        "placement.kind=spread",
        "placement.kind = spread: 2 peers, 1 a rank, need a multiple of 2 ranks, found 1; nearest: 2, or "
        "placement.kind = auto",
    ),
    "hybrid_of_how_many": ("placement.kind=hybrid", f"placement.peers_per_rank = None: {KINDS}; found kind = hybrid"),
    "peers_per_rank_without_hybrid": (
        "placement.peers_per_rank=1",
        f"placement.peers_per_rank = 1: {KINDS}; found kind = auto",
    ),
    "peers_per_rank_no_divisor": (
        "placement={kind: hybrid, peers_per_rank: 3}",
        "placement.peers_per_rank = 3: expected a divisor of the number of peers, 2: one of 1, 2",
    ),
    "misspelt_placement": (
        "placement.kind=hybird",
        "placement.kind = 'hybird': expected one of auto, colocated, spread, hybrid, jobs; did you mean 'hybrid'?",
    ),
    # Peers that are jobs of their own.
    "jobs_of_a_method_that_exchanges_signals": (
        "placement={kind: jobs, meeting: '{at}/meeting', peer: cifar_resnet8_b-0}",
        "placement.kind = jobs: the peers of dml cannot train apart from each other; expected another kind, or "
        "method.name = codistillation",
    ),
    "jobs_that_meet_nowhere": ("placement.kind=jobs", f"placement.meeting = None: {MEETING}; found kind = jobs"),
    "a_meeting_of_no_jobs": ("placement.meeting=/m", f"placement.meeting = '/m': {MEETING}; found kind = auto"),
    "a_peer_without_jobs": (
        "placement.peer=cifar_resnet8_b-0",
        "placement.peer = 'cifar_resnet8_b-0': only a job of kind = jobs has one; found kind = auto",
    ),
    # Optimiser and schedule.
    "unknown_optimizer": ("optimizer.name=sdg", "optimizer.name = 'sdg': not one of timm's optimisers; nearest: sgd"),
    "optimizer_like_none": (
        "optimizer.name=zzz",
        "optimizer.name = 'zzz': not one of timm's optimisers; nearest: sgd, momentum, adamw, lamb",
    ),
    "unknown_optimizer_option": (
        "optimizer={name: adamw, options: {beta: [0.9, 0.99]}}",
        f"optimizer.options.beta = [0.9, 0.99]: not an option of adamw; did you mean 'betas'?; it has: {ADAMW}",
    ),
    "option_that_timm_would_drop": (
        "optimizer.options.betas=[0.9, 0.99]",
        f"optimizer.options.betas = [0.9, 0.99]: not an option of sgd; it has: {SGD}",
    ),
    "impossible_optimizer_option": (
        "optimizer={name: adamw, options: {betas: [2.0, 3.0]}}",
        "optimizer.options = {'betas': [2.0, 3.0]}: refused by adamw: Invalid beta parameter at index 0: 2.0",
    ),
    "step_without_milestones": (
        "schedule.name=step",
        "schedule.milestones = []: name = step needs at least one epoch, such as [60, 120, 180]",
    ),
    "milestones_without_step": (
        "schedule.milestones=[1]",
        "schedule.milestones = [1.0]: only name = step has milestones, found name = cosine",
    ),
    "milestones_descend": (
        "schedule={name: step, milestones: [60, 30]}",
        "schedule.milestones = [60.0, 30.0]: expected ascending epochs, each once",
    ),
    "milestone_after_the_end": (
        "schedule={name: step, milestones: [1, 2]}",
        "schedule.milestones = [1.0, 2.0]: the last lies at or after the end of training, expected epochs below "
        "train.epochs = 2",
    ),
    "milestone_is_text": (
        "schedule={name: step, milestones: [x]}",
        "schedule.milestones.0 = 'x': expected a number",
    ),
    "warm_up_too_long": (
        "schedule.warmup_epochs=3",
        "schedule.warmup_epochs = 3.0: expected at most train.epochs = 2",
    ),
    "sync_bn_on_cpu": (
        "train.sync_bn=true",
        "train.sync_bn = True: works on CUDA devices only, this rank runs on the CPU; expected false",
    ),
    # Data.
    "unknown_data_set": (
        "data.dataset=cifar-10",
        "data.dataset = 'cifar-10': expected one of fashion_mnist_subset, fashion_mnist, cifar10, cifar100, "
        "image_folder; did you mean 'cifar10'?",
    ),
    "no_root": ("data={dataset: cifar10, global_batch: 8}", "data.root: expected the folder of cifar10, found none"),
    "missing_root": (
        "data={dataset: cifar10, root: /nowhere/cifar, global_batch: 8}",
        f"data.root: /nowhere/cifar is not a folder. {GET_CIFAR}",
    ),
    "root_without_the_files": (
        "data.root={at}",
        f"data: {{at}}/train-images-idx3-ubyte: no such file, nor train-images-idx3-ubyte.gz. {GET_FASHION}",
    ),
    "batch_larger_than_the_set": (
        "data.global_batch=121",
        "data.global_batch: expected at most the 120 training samples of {at}/data, found 121",
    ),
    "key_of_another_data_set": (
        "data.decoding.threads=3",
        "data.decoding.threads: 3 has no meaning for dataset fashion_mnist; it belongs to image_folder",
    ),
    "misspelt_data_key": (
        "data.paddng=3",
        "data.paddng = 3: unknown key; did you mean 'augmentation.padding'?; data has: augmentation, dataset, "
        "decoding, global_batch, held_out, image, images_per_class, max_bad, mean, on_error, repeats, root, sampler, "
        "std, views",
    ),
    "misspelt_key_of_a_section_in_a_section": (
        "data.augmentation.paddng=3",
        "data.augmentation.paddng = 3: unknown key; did you mean 'padding'?; data.augmentation has: "
        "color_jitter, crop_area, crop_ratio, cutout, erasing, flip, gaussian_blur_prob, grayscale_prob, "
        "label_smoothing, mixing, off_epoch, padding, padding_mode, policy, solarize_prob",
    ),
    "moved_key": ("data.padding=3", "data.padding = 3: moved; write data.augmentation.padding"),
    "moved_keys": (
        "data={dataset: image_folder, root: /data, global_batch: 8, image_size: 64, threads: 2}",
        "data.image_size = 64: moved; write data.image.size\ndata.threads = 2: moved; write data.decoding.threads",
    ),
    "images_per_class_of_shuffled_images": (
        "data.images_per_class=4",
        "data.images_per_class: 4 has no meaning for sampler shuffle; it belongs to class_balanced and class_tuples",
    ),
    "misspelt_sampler": (
        "data.sampler=class_balance",
        "data.sampler = 'class_balance': expected one of shuffle, class_balanced, class_tuples; "
        "did you mean 'class_balanced'?",
    ),
    "batch_of_no_whole_tuples": (
        "data={dataset: fashion_mnist, root: {at}/data, global_batch: 24, sampler: class_tuples, images_per_class: 5}",
        "data.global_batch: expected a multiple of images_per_class = 5 for sampler class_tuples, found 24; "
        "nearest: 20 or 25",
    ),
    "more_tuples_than_classes": (
        "data.sampler=class_balanced",
        "data.global_batch: expected at most 20 for sampler class_balanced, images_per_class = 2 for each of 10 "
        "classes, found 24",
    ),
    "too_few_images_of_a_class": (
        "data={dataset: fashion_mnist, root: {at}/data, global_batch: 8, held_out: 0.9, sampler: class_tuples}",
        "images_per_class: 2 are more than the 0 training samples of class 'Trouser' that held_out = 0.9 leaves; "
        "expected sampler = shuffle",
    ),
    "padding_too_wide": (
        "data.augmentation.padding=28",
        "data.augmentation.padding: expected less than the image's 28 pixels, found 28",
    ),
    # The command line.
    "override_without_equals": ("train.epochs", "'train.epochs': expected section.key=value, such as train.epochs=10"),
    "override_without_key": ("=3", "'=3': expected section.key=value, such as train.epochs=10"),
    "override_is_no_yaml": (
        "train.epochs=[",
        "override train.epochs: not valid YAML: while parsing a flow node expected the node content, but found "
        "'<stream end>' in \"override train.epochs\", line 1, column 2: [ ^",
    ),
    "folder_is_a_file": (
        "dir={at}/small.yaml",
        "dir = '{at}/small.yaml': {at}/small.yaml is not a folder; expected a place for the run's folder",
    ),
    "folder_below_a_file": (
        "dir={at}/small.yaml/run",
        "dir = '{at}/small.yaml/run': {at}/small.yaml is not a folder; expected a place for the run's folder",
    ),
}

Outcome = tuple[int, str, str]


@pytest.fixture
def at(tiny: Path, tmp_path: Path) -> Path:
    """A folder with a config, small.yaml, that would run, and its data."""
    shutil.copytree(tiny, tmp_path / "data")
    (tmp_path / "small.yaml").write_text(CONFIG.format(at=tmp_path))
    return tmp_path


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """launch/train.py in this process: exit code, stdout, stderr."""

    def run(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["launch/train.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capfd.readouterr()
        return int(end.value.code or 0), out, err

    return run


def test_tuples_of_a_class_are_not_torn_apart(at: Path, command: Callable[..., Outcome]) -> None:
    """24 rows in 4 micro-batches of 6, which is no multiple of 4."""
    arguments = ("train.accumulation=4", "data.sampler=class_balanced", "data.images_per_class=4")
    message = (
        "error: data.global_batch = 24: cannot be split evenly over 1 replicas x 4 micro-batches in whole tuples of 4 "
        "images of a class; nearest: 16 or 32\n"
    )
    assert command(at / "small.yaml", *arguments) == (2, "", message)


@pytest.mark.parametrize("mistake", OVERRIDES)
def test_mistake(at: Path, command: Callable[..., Outcome], mistake: str) -> None:
    override, message = (text.replace("{at}", str(at)) for text in OVERRIDES[mistake])
    assert command(at / "small.yaml", override) == (2, "", f"error: {message}\n")
    assert not (at / "run").exists()
    assert not dist.is_initialized()


def test_the_config_that_the_mistakes_are_made_in_is_right(
    at: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["launch/train.py", str(at / "small.yaml"), "--check"])
    main()
    said = capfd.readouterr().out.splitlines()[0]
    assert said == "small: dml; colocated: all peers on every rank, 1 rank a peer, 1 in all"


def test_unknown_method(at: Path, command: Callable[..., Outcome]) -> None:
    code, out, err = command(at / "small.yaml", "method.name=dmll")
    assert (code, out) == (2, "")
    assert err.startswith("error: method.name = 'dmll': expected one of independent, dml")
    assert err.endswith("; did you mean 'dml'?\n")


def test_several_mistakes_are_told_at_once(at: Path, command: Callable[..., Outcome]) -> None:
    told = "error: seed = -1: expected a value greater than or equal to 0\ntrain.epochs = 'x': expected an integer\n"
    assert command(at / "small.yaml", "train.epochs=x", "seed=-1") == (2, "", told)


def test_cuda_where_there_is_none(at: Path, command: Callable[..., Outcome]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    message = "error: device = cuda: this machine has no CUDA device; expected cpu or auto here\n"
    assert command(at / "small.yaml", "device=cuda") == (2, "", message)


def test_accumulation_with_peers_updated_in_turn(at: Path, command: Callable[..., Outcome]) -> None:
    message = (
        "error: train.accumulation = 2: peers that are updated in turn (method.order = sequential) need a whole batch "
        "at once; expected 1\n"
    )
    assert command(at / "small.yaml", "train.accumulation=2", "method.order=sequential") == (2, "", message)


JOBS = """\
base: small.yaml
method: {{name: codistillation}}
placement: {{kind: jobs, meeting: {at}/meeting}}
"""

OF_JOBS: dict[str, tuple[str, str]] = {
    "which_peer": (
        "seed=1",
        "placement.peer: missing; with placement.kind = jobs each job is told which peer it trains: one of "
        "cifar_resnet8_b-0, cifar_resnet8_b-1, such as placement.peer=cifar_resnet8_b-0",
    ),
    "no_such_peer": (
        "placement.peer=cifar_resnet8_b_1",
        "placement.peer = 'cifar_resnet8_b_1': expected one of the peers cifar_resnet8_b-0, cifar_resnet8_b-1; did you "
        "mean 'cifar_resnet8_b-1'?",
    ),
    "number_for_a_peer": (
        "placement.peer=1",
        "placement.peer = '1': expected one of the peers cifar_resnet8_b-0, cifar_resnet8_b-1",
    ),
    "meeting_in_a_file": (
        "placement={kind: jobs, peer: cifar_resnet8_b-1, meeting: '{at}/small.yaml/m'}",
        "placement.meeting = '{at}/small.yaml/m': {at}/small.yaml is not a folder; expected a place for the folder "
        "where peers meet",
    ),
}


@pytest.mark.parametrize("mistake", OF_JOBS)
def test_mistake_in_a_job_of_one_peer(at: Path, command: Callable[..., Outcome], mistake: str) -> None:
    override, message = (text.replace("{at}", str(at)) for text in OF_JOBS[mistake])
    (at / "jobs.yaml").write_text(JOBS.format(at=at))
    assert command(at / "jobs.yaml", override) == (2, "", f"error: {message}\n")
    assert not (at / "run").exists()
    assert not (at / "meeting").exists()


def test_two_runs_that_would_meet_in_one_folder(
    at: Path, command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    (at / "jobs.yaml").write_text(JOBS.format(at=at))
    job = (at / "jobs.yaml", "placement.peer=cifar_resnet8_b-1", "method.interval=5", "train.epochs=1")
    monkeypatch.setattr(sys, "argv", ["launch/train.py", *map(str, job)])
    main()
    left = at / "meeting" / "cifar_resnet8_b-1.safetensors"
    before = left.read_bytes()
    code, _, err = command(*job, "optimizer.lr=0.2", f"dir={at}/other")
    assert code == 2
    assert err.splitlines()[-1] == (
        f"error: placement.meeting = '{at}/meeting': {left} is of a run with optimizer.lr = 0.1; give this one another "
        "folder, or start over with --fresh, which replaces that file"
    )
    assert left.read_bytes() == before
    assert not (at / "other").exists()


def test_a_job_in_the_folder_of_another(
    at: Path, command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs have folders of their own; who renames one into another's place is told."""
    (at / "jobs.yaml").write_text(JOBS.format(at=at))
    job = (at / "jobs.yaml", "placement.peer=cifar_resnet8_b-1", "train.epochs=1")
    monkeypatch.setattr(sys, "argv", ["launch/train.py", *map(str, job)])
    main()
    (at / "run" / "cifar_resnet8_b-1").rename(at / "run" / "cifar_resnet8_b-0")
    code, _, err = command(at / "jobs.yaml", "placement.peer=cifar_resnet8_b-0", "train.epochs=1")
    assert code == 2
    assert err.splitlines()[-1] == (
        f"error: placement.peer = 'cifar_resnet8_b-0': the run in {at}/run/cifar_resnet8_b-0 was started with "
        "'cifar_resnet8_b-1'; give this one another name= or dir=, or start over with --fresh, which moves that folder "
        "aside"
    )


FILES: dict[str, tuple[str, str]] = {
    "syntax": (
        "name: x\ntrain: {epochs: 3\n",
        '{file}: not valid YAML: while parsing a flow mapping in "{file}", line 2, column 8: train: {epochs: 3 ^ '
        "expected ',' or '}', but got '<stream end>' in \"{file}\", line 3, column 1: ^",
    ),
    "empty": ("", "{file}: expected sections with keys, found NoneType"),
    "key_twice": ("name: x\ntrain:\n  epochs: 1\n  epochs: 2\n", "{file}:4: key 'epochs' stands twice"),
    "base_missing": (
        "base: smal.yaml\n",
        "{at}/smal.yaml (base of {file}): cannot be read: No such file or directory; did you mean 'small.yaml'?",
    ),
    "base_of_itself": (
        "base: bad.yaml\n",
        "{file}: inherits from itself through base: bad.yaml -> bad.yaml",
    ),
    "moved_key_in_a_file": (
        "base: small.yaml\ndata: {flip: false}\n",
        "data.flip = False: moved; write data.augmentation.flip",
    ),
    "base_is_a_number": ("base: 3\n", "{file}: base = 3: expected the path of another config, relative to this one"),
    "required_sections_missing": (
        "name: x\n",
        "method: missing; expected a value\npeers: missing; expected a value\ndata: missing; expected a value\n"
        "train: missing; expected a value",
    ),
}


@pytest.mark.parametrize("mistake", FILES)
def test_mistake_in_a_file(at: Path, command: Callable[..., Outcome], mistake: str) -> None:
    text, message = FILES[mistake]
    file = at / "bad.yaml"
    file.write_text(text)
    message = message.replace("{file}", str(file)).replace("{at}", str(at))
    assert command(file) == (2, "", f"error: {message}\n")


def test_missing_config(at: Path, command: Callable[..., Outcome]) -> None:
    message = f"error: {at}/samll.yaml: cannot be read: No such file or directory; did you mean 'small.yaml'?\n"
    assert command(at / "samll.yaml") == (2, "", message)


def test_config_is_a_folder(at: Path, command: Callable[..., Outcome]) -> None:
    assert command(at) == (2, "", f"error: {at}: cannot be read: Is a directory\n")


USAGE = "usage: train.py [-h] [--print-config] [--check] [--ranks N] [--keys] [--fresh] [--preempted FILE] [CONFIG ...]"


def told(outcome: Outcome) -> tuple[int, str, str]:
    code, out, err = outcome
    return code, out, " ".join(err.split())


def test_no_config(command: Callable[..., Outcome]) -> None:
    message = "CONFIG is missing; expected a YAML file, such as configs/fashion_mnist/quickstart_dml.yaml"
    assert told(command()) == (2, "", f"error: {message} {USAGE}")


def test_unknown_option(at: Path, command: Callable[..., Outcome]) -> None:
    message = "unrecognized arguments: --chek; did you mean '--check'?"
    assert told(command(at / "small.yaml", "--chek")) == (2, "", f"error: {message} {USAGE}")


def test_an_option_is_not_guessed_from_its_beginning(at: Path, command: Callable[..., Outcome]) -> None:
    """--fre would move a folder aside."""
    message = "unrecognized arguments: --fre; did you mean '--fresh'?"
    assert told(command(at / "small.yaml", "--fre")) == (2, "", f"error: {message} {USAGE}")


@pytest.mark.parametrize(
    "words",
    [
        ["CONFIG", "--print-config", "optimizer.lr=0.03", "train.epochs=7", "name=20240101"],
        ["--print-config", "optimizer.lr=0.03", "CONFIG", "--train.epochs=7", "--name", "20240101"],
        ["--optimizer.lr", "0.03", "--print-config", "--name=20240101", "CONFIG", "train.epochs=7"],
    ],
)
def test_values_stand_anywhere_and_as_other_programs_write_them(
    at: Path, words: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config = str(at / "small.yaml")
    monkeypatch.setattr(sys, "argv", ["launch/train.py", *(config if word == "CONFIG" else word for word in words)])
    main()
    found = yaml.safe_load(capfd.readouterr().out)
    assert (found["optimizer"]["lr"], found["train"]["epochs"], found["name"]) == (0.03, 7, "20240101")


def test_a_key_without_a_value_is_no_option(at: Path, command: Callable[..., Outcome]) -> None:
    message = "--optimizer.lr: expected a value, such as --optimizer.lr=VALUE"
    for words in (["--optimizer.lr"], ["--optimizer.lr", "train.epochs=3"], ["--optimizer.lr", "--check"]):
        assert told(command(at / "small.yaml", *words)) == (2, "", f"error: {message} {USAGE}")


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("data.batch_size=8", "data.global_batch"),
        ("epochs=8", "train.epochs"),
        ("lr=0.1", "optimizer.lr"),
        ("optimizer.learning_rate=0.1", "optimizer.lr"),
        ("train.lr=0.1", "optimizer.lr"),
        ("data.workers=2", "data.decoding.threads"),
        ("output_dir=x", "dir"),
    ],
)
def test_what_other_trainers_call_a_key_is_understood(
    at: Path, command: Callable[..., Outcome], word: str, meant: str
) -> None:
    code, _, err = command(at / "small.yaml", word)
    assert code == 2
    assert f"unknown key; did you mean {meant!r}?" in err


def test_data_file_cut_short(at: Path, command: Callable[..., Outcome]) -> None:
    path = at / "data" / "train-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-5])
    code, out, err = command(at / "small.yaml")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: data: {path} ")
    assert f"expected {8 + 120} bytes, found " in err
    assert err.endswith(f". {GET_FASHION}\n")


# -- runs that are there already --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained_once(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of small.yaml."""
    before, folder = torch.get_num_threads(), tmp_path_factory.mktemp("trained")
    torch.set_num_threads(1)  # Quicker for networks this small.
    train_here(small_run(tiny, folder, optimizer={"lr": 0.1}))
    torch.set_num_threads(before)
    return folder


@pytest.fixture
def trained(trained_once: Path, at: Path) -> Path:
    """`at`, with that run in its folder."""
    shutil.copytree(trained_once, at / "run")
    return at


@pytest.mark.parametrize(
    ("override", "key", "now", "before"),
    [
        ("seed=1", "seed", "1", "0"),
        ("optimizer.lr=0.2", "optimizer.lr", "0.2", "0.1"),
        ("data.global_batch=12", "data.global_batch", "12", "24"),
        ("method={name: independent}", "method.name", "'independent'", "'dml'"),
    ],
)
def test_same_folder_with_a_changed_key(
    trained: Path, command: Callable[..., Outcome], override: str, key: str, now: str, before: str
) -> None:
    left = {path: path.read_bytes() for path in (trained / "run").rglob("*") if path.is_file()}
    meant = "; if that is meant, checkpoint.recipe_may_change=true goes on with it" if key == "optimizer.lr" else ""
    message = (
        f"error: {key} = {now}: the run in {trained}/run was started with {before}; give this one another name= or "
        f"dir=, or start over with --fresh, which moves that folder aside{meant}\n"
    )
    assert command(trained / "small.yaml", override) == (2, "", message)
    assert {path: path.read_bytes() for path in (trained / "run").rglob("*") if path.is_file()} == left


def test_checkpoint_of_other_peers(trained: Path, command: Callable[..., Outcome]) -> None:
    (trained / "run" / "config.yaml").unlink()
    code, out, err = command(trained / "small.yaml", "peers.0.name=other")
    assert (code, out) == (2, "")
    assert err == (
        f"error: {trained}/run/checkpoints/step_00000010: of the peers cifar_resnet8_b-0, cifar_resnet8_b-1; "
        "expected other-0, other-1\n"
    )


def test_resolved_config_damaged(trained: Path, command: Callable[..., Outcome]) -> None:
    (trained / "run" / "config.yaml").write_text("name: [\n")
    code, out, err = command(trained / "small.yaml")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {trained}/run/config.yaml: not valid YAML: while parsing a flow node")


# -- real processes ---------------------------------------------------------------------------------------------------


def python(*arguments: str | Path, **environment: str) -> Outcome:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=100,
    )
    return done.returncode, done.stdout, done.stderr


def test_one_message_and_exit_code_2_from_a_process(at: Path) -> None:
    message = "error: train.epochs = 'many': expected an integer\n"
    assert python("launch/train.py", at / "small.yaml", "train.epochs=many") == (2, "", message)


def test_a_rank_that_refuses_waits_for_no_other(at: Path) -> None:
    """Of a world of 2 only rank 0 is there: whoever joins a process group before the checks would hang."""
    world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    message = (
        "error: data.global_batch = 25: cannot be split evenly over 2 replicas x 1 micro-batches; nearest: 24 or 26\n"
    )
    arguments = ("launch/train.py", at / "small.yaml", "data.global_batch=25", "placement.kind=colocated")
    assert python(*arguments, **world) == (2, "", message)


def test_under_torchrun_the_message_is_printed_once_and_soon(at: Path) -> None:
    begin = time.monotonic()
    code, out, err = python(
        *("-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=2", "--rdzv-backend=c10d"),
        *("--rdzv-endpoint=127.0.0.1:0", "launch/train.py", at / "small.yaml", "peers.0.network=cifar_resnet9_b"),
    )
    assert code == 1, "torchrun's own"
    assert out == ""
    message = "error: peers.0: network 'cifar_resnet9_b': depth 9 is not 6n+2 with n >= 1; nearest: 8, 14\n"
    assert err.count("depth 9 is not") == err.count(message) == 1
    assert "exitcode  : 2" in err
    assert "RuntimeError" not in err
    assert not (at / "run").exists()
    assert time.monotonic() - begin < 60


def test_the_table_holds_at_least_thirty_mistakes() -> None:
    everything: dict[str, Any] = {**OVERRIDES, **FILES}
    assert len(everything) >= 30
    assert len({message for _, message in everything.values()}) == len(everything)
