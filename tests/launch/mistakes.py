"""Mistakes of users, each with what they are told."""

from __future__ import annotations

from tests.launch.mistakes_of_balance import BALANCED

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
        "train.epoch = 3: unknown key; did you mean 'epochs'?; train has: accumulation, batch_peers, bce_sum, "
        "bce_threshold, clip_factor, clip_norm, drop_path, ema_decay, ema_warmup, epochs, loss, max_skipped, "
        "max_steps, peer_threads, sync_bn, timeout",
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
    "home_of_nobody": (
        "dir=~nosuchuser/x",
        "dir = '~nosuchuser/x': expected a path; no user has the home ~nosuchuser",
    ),
    "data_in_the_home_of_nobody": (
        "data.root=~nosuchuser/x",
        "data.root = '~nosuchuser/x': expected a path; no user has the home ~nosuchuser",
    ),
    "long_name": (
        f"dir=/tmp/{'a' * 300}",
        f"dir = '/tmp/{'a' * 294}...: expected names of at most 255 bytes in a path, found one of 300",
    ),
    "long_path": (
        f"placement.meeting={'a/' * 2100}b",
        f"placement.meeting = '{'a/' * 149}a...: expected a path of at most 4095 bytes, found 4201",
    ),
    "link_in_a_circle": (
        "dir={at}/circle/x",
        "dir = '{at}/circle/x': {at}/circle is not a folder; expected a place for the run's folder",
    ),
    "number_of_a_thousand_digits": (
        f"seed={'9' * 1000}",
        "override seed:1: a number of 1000 characters; expected at most 400",
    ),
    "number_to_the_base_of_sixty": (
        f"optimizer.lr=1{':59' * 1000}.5",
        "override optimizer.lr:1: a number of 3003 characters; expected at most 400",
    ),
    "endless_timeout": (
        "train.timeout=1e15",
        "train.timeout = 1000000000000000.0: expected a value less than or equal to 2000000",
    ),
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
    "batch_too_small": (
        "train.accumulation=25",
        "data.global_batch = 24: 1 replicas x 25 micro-batches do not get a row each; expected at least 25",
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
        "placement.kind = 'hybird': expected one of auto, colocated, spread, hybrid, balanced, jobs; did you mean "
        "'hybrid'?",
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
        "npz, image_folder, webdataset, hub; did you mean 'cifar10'?",
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
        "data.decoding.threads: 3 has no meaning for dataset fashion_mnist; it belongs to image_folder, "
        "webdataset and hub",
    ),
    "misspelt_data_key": (
        "data.paddng=3",
        "data.paddng = 3: unknown key; did you mean 'augmentation.padding'?; data has: augmentation, cache, "
        "class_weights, classes, dataset, decoding, fraction, global_batch, held_out, image, images_per_class, "
        "label_column, links, max_bad, mean, on_error, repeats, root, sampler, scale_to, shape, shared_decode, std, "
        "val_labels, val_root, views",
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
    **BALANCED,
}

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
        "name: x\npeers: [{network: cifar_resnet8_b}]\ndata: {dataset: fashion_mnist_subset, global_batch: 8}\n",
        "method: missing; expected a section with a name, that of the method\n"
        "train: missing; expected a section with epochs, or max_steps",
    ),
}
