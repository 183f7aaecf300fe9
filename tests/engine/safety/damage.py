"""Ways to damage a checkpoint so that it does not verify, and what is said of each."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.files import digest
from tests.checkpoints import PEER, edit, forge

MANIFEST = "{at}/manifest.json"
Damage = tuple[Callable[[Path], Any], str]


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
