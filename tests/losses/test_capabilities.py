"""The files of `losses/capabilities/`: each says which methods have what is in it, and some method has each."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import re

import pytest

from losses import METHODS, capabilities

FILES = [info.name for info in pkgutil.iter_modules(capabilities.__path__)]


@pytest.mark.parametrize("file", FILES)
def test_a_file_names_the_methods_that_have_what_is_in_it(file: str) -> None:
    module = importlib.import_module(f"losses.capabilities.{file}")
    assert module.__doc__
    said = re.search(r"^Had by: (.+)\.$", module.__doc__, re.MULTILINE)
    assert said, "expected a line such as 'Had by: dml, pcl.'"
    had = {
        name: {method.name for method in METHODS.values() if issubclass(method, found)}
        for name, found in inspect.getmembers(module, inspect.isclass)
        if found.__module__ == module.__name__
        # What a capability takes and gives: dataclasses and protocols.
        and not dataclasses.is_dataclass(found)
        and not getattr(found, "_is_protocol", False)
    }
    assert had
    assert all(had.values()), had
    assert set(said[1].split(", ")) == set().union(*had.values())
