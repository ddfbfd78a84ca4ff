"""What an installation brings: ranges, the versions that they were tried with, licence and citation."""

from __future__ import annotations

import importlib.metadata
import re
import runpy
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import fimo
from fimo.app.command import console
from fimo.app.environment import versions

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
APART = ("ray", "optuna", "dashboard", "tensorboard", "bergson", "captum", "dattri", "kronfluence", "traker")
"""Extras that are not in `all`: they pin old packages, which do not go with the others, or few want them."""

TOOLS = ("ruff", "mypy", "pandas-stubs")
"""For work on fimo, in the lock's versions alone."""


def pins(name: str) -> dict[str, Version]:
    """Return the versions that a file of ``name==version`` lines holds."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    assert all(
        re.fullmatch(r"[a-z0-9.-]+==[0-9a-z.]+", line) for line in lines
    )  # no address, no local version
    named = [line.split("==") for line in lines]
    assert [n for n, _ in named] == sorted({canonicalize_name(n) for n, _ in named})
    return {name: Version(version) for name, version in named}


def requirements(*extras: str) -> list[Requirement]:
    """Return what the core and some extras ask for, without fimo's own extras."""
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in EXTRAS[extra])]
    return [r for r in map(Requirement, lines) if r.name != "fimo"]


LOCKED = requirements(*(extra for extra in EXTRAS if extra not in APART))
USED = requirements(*(extra for extra in EXTRAS if extra not in (*APART, "docs", "mutation")))


@pytest.mark.parametrize("requirement", LOCKED, ids=str)
def test_the_lock_satisfies_every_range(requirement: Requirement) -> None:
    assert requirement.specifier.contains(pins("requirements.lock")[canonicalize_name(requirement.name)])


def test_the_lock_holds_all_that_the_locked_versions_ask_for() -> None:
    lock = pins("requirements.lock")
    seen, waiting = set(), [(canonicalize_name(r.name), frozenset(r.extras)) for r in LOCKED]
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # of an extra that is not installed here
            continue
        if Version(Version(found.version).public) != lock[name]:
            continue
        for line in found.requires or ():
            asked = Requirement(line)
            here = [asked.marker is None or asked.marker.evaluate({"extra": e}) for e in (*extras, "")]
            if any(here):
                needed = canonicalize_name(asked.name)
                assert needed in lock, f"{name} asks for {line}"
                assert asked.specifier.contains(lock[needed], prereleases=True), f"{name} asks for {line}"
                waiting.append((needed, frozenset(asked.extras)))
    assert len(seen) > len(LOCKED)


@pytest.mark.parametrize("requirement", [r for r in USED if r.name not in TOOLS], ids=str)
def test_every_lower_bound_is_a_version_that_was_tried(requirement: Requirement) -> None:
    (bound,) = requirement.specifier
    assert bound.operator == ">="
    if requirement.name == "huggingface-hub":  # newer in that set because of transformers; tried without, too
        assert Version(bound.version) == Version("0.34")
        return
    assert Version(bound.version) == pins("requirements-oldest.txt")[canonicalize_name(requirement.name)]


def test_no_range_has_an_upper_bound_that_no_known_break_demands() -> None:
    every = requirements(*EXTRAS)
    assert {s.operator for r in every for s in r.specifier} == {">="}


def test_both_ways_to_start_it_tell_the_version(capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fimo", "--version"])
    console()
    runpy.run_module("fimo", run_name="__main__")
    assert capsys.readouterr().out == f"fimo {fimo.__version__}\n" * 2


def test_the_citation_names_the_paper_and_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == fimo.__version__
    assert citation["license"] == PROJECT["license"]
    paper = citation["references"][0]
    assert paper["title"].startswith("Final-Model-Only Data Attribution")
    assert paper["authors"][0] == {"family-names": "Wei", "given-names": "Dennis"}
    assert {"type": "other", "value": "arXiv:2412.03906"} in paper["identifiers"]


def test_hooks_before_a_commit_are_those_of_make_lint_and_need_no_network() -> None:
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repository["repo"] for repository in repositories] == ["local"]
    hooks = repositories[0]["hooks"]
    assert {hook["language"] for hook in hooks} == {"system"}
    lint = (ROOT / "Makefile").read_text().partition("\nlint:")[2].partition("\n\n")[0]
    for hook in hooks:
        command = hook["entry"].removeprefix(".venv/bin/")
        assert f"$(BIN)/{command}" in lint


def test_versions_are_known_of_a_checkout_that_is_not_installed(monkeypatch):
    installed = importlib.metadata.version

    def version(name):
        if name == "fimo":
            raise importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert versions()["fimo"] == fimo.__version__
    assert versions()["torch"] == installed("torch")
