"""How the words of a command line are read. Nothing here imports torch, which takes seconds that `--help` shall not
take, nor shall a mistake in an option."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import socket
import sys
import time
from typing import NoReturn

from launch.with_parent import obey_signals

_BEGUN = time.monotonic()
"""About when this process began. Where that is long ago the machine is busy, and other ranks are late too."""


def say(message: str) -> None:
    """Says a mistake once, from rank 0, or from another where rank 0 has not ended by the same."""
    rank = int(os.environ.get("RANK", 0))
    if rank == 0:
        print(f"error: {message}", file=sys.stderr, flush=True)
        return
    # torchrun ends the others as soon as one rank has ended: rank 0 shall have spoken by then, and there is no run that
    # its signal should wait for.
    obey_signals()
    time.sleep(max(10.0, 3 * (time.monotonic() - _BEGUN)))
    print(f"error: rank {rank} on {socket.gethostname()}: {message}", file=sys.stderr, flush=True)


class Parser(argparse.ArgumentParser):
    """Says mistakes as `launch.entry.user_errors` does."""

    def parse_words(self) -> tuple[argparse.Namespace, str | None, list[str]]:
        """The options of the command line; the first word without `=` that belongs to none, and all other such words.

        `--section.key=value` and `--section.key value`, as other programs write it, are words `section.key=value`.
        """
        given, arguments = list(sys.argv[1:]), []
        while given:
            word = given.pop(0)
            key, equals, _ = word.removeprefix("--").partition("=")
            if not word.startswith("--") or f"--{key}" in self._option_string_actions or not _is_key(key):
                arguments.append(word)
            elif equals:
                arguments.append(word.removeprefix("--"))
            elif given and not given[0].startswith("--") and "=" not in given[0]:
                arguments.append(f"{key}={given.pop(0)}")
            else:
                self.error(f"{word}: expected a value, such as {word}=VALUE")
        options = self.parse_intermixed_args(arguments)
        words: list[str] = options.words
        subject = next((word for word in words if "=" not in word), None)
        if subject is not None:
            words.remove(subject)
        return options, subject, words

    def add_words(self, first: str, means: str) -> None:
        """Declares what `parse_words` returns: `first` is what the command is about."""
        self.add_argument(
            "words", nargs="*", metavar=first, help=f"{means}, and section.key=value over those of the file"
        )

    def error(self, message: str) -> NoReturn:
        unknown, _, first = message.partition(": ")
        if unknown == "unrecognized arguments":
            near = difflib.get_close_matches(first.split()[0], self._option_string_actions, n=1)
            message += f"; did you mean {near[0]!r}?" if near else ""
        say(f"{message}\n{self.format_usage().rstrip()}")
        sys.exit(2)


def _is_key(key: str) -> bool:
    """Whether a word is meant as a key of a config, rightly written or not."""
    if not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", key):
        return False
    if "." in key:
        return True
    # Few words get here; what a run is made of takes torch to know.
    from engine.config import RunConfig

    return key in RunConfig.model_fields


def parser(description: str, epilog: str) -> Parser:
    """An argument parser whose help keeps its line breaks, whose options are written out, and whose rank 0 speaks."""
    return Parser(
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def positive(text: str) -> int:
    """A word that is a number of at least 1, as the `type` of an argument."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, found {text!r}")
    return int(text)
