"""Mistakes in `placement.ranks`, as those in `mistakes.OVERRIDES`: two peers, cifar_resnet8_b-0 and -1, on one rank."""

BALANCED = {
    "ranks_without_balanced": (
        "placement.ranks={cifar_resnet8_b-0: 1, cifar_resnet8_b-1: 2}",
        "placement.ranks = {'cifar_resnet8_b-0': 1, 'cifar_resnet8_b-1': 2}: only kind = balanced has them; found kind "
        "= auto",
    ),
    "ranks_of_a_stranger": (
        "placement={kind: balanced, ranks: {cifar_resnet8_b-0: 1, cifar_resnet8_b: 2}}",
        "placement.ranks.cifar_resnet8_b: expected one of the peers cifar_resnet8_b-0, cifar_resnet8_b-1; did you mean "
        "'cifar_resnet8_b-1'?",
    ),
    "ranks_of_too_few_peers": (
        "placement={kind: balanced, ranks: {cifar_resnet8_b-0: 1}}",
        "placement.ranks.cifar_resnet8_b-1: missing; expected the ranks of each peer, at least 1",
    ),
    "no_ranks_for_a_peer": (
        "placement={kind: balanced, ranks: {cifar_resnet8_b-0: 1, cifar_resnet8_b-1: 0}}",
        "placement.ranks.cifar_resnet8_b-1 = 0: expected a value greater than or equal to 1",
    ),
    "other_ranks_than_there_are": (
        "placement={kind: balanced, ranks: {cifar_resnet8_b-0: 1, cifar_resnet8_b-1: 2}}",
        "placement.ranks = {cifar_resnet8_b-0: 1, cifar_resnet8_b-1: 2}: 3 ranks in all, found 1, or leave them out, "
        "to have them chosen by what the peers cost",
    ),
}
