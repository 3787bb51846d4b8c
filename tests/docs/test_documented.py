"""What there is, is documented; and what is documented, is there."""

from __future__ import annotations

import argparse
import re

import pytest
from fastapi.routing import iter_route_contexts

from service.api.app import create_app
from service.api.errors import problem_type, status_of
from service.api.openapi import problem_classes
from service.cli import flag_of, make_parser, shown_default, variable_of
from service.settings import Settings
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
ERRORS = (ROOT / "docs" / "errors.md").read_text()
TEXTS = {path.name: path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
# Set by the image build, not by an operator.
NO_SETTING = {"BACKBONE_BUILD"}
ROUTE = re.compile(r"`(GET|POST|PUT|DELETE) (/[^`?\s]*)")


def routes() -> set[tuple[str, str]]:
    """(method, path) of every route that the app serves."""
    found = set()
    for route in iter_route_contexts(create_app(Settings()).routes):
        path = re.sub(r":\w+}", "}", route.path)
        methods = set(getattr(route, "methods", None) or ()) - {"HEAD"}
        found |= {(method, path) for method in methods}
    return found


def subcommands() -> dict[str, argparse.ArgumentParser]:
    for action in make_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    raise AssertionError("no subcommands")


def flags(parser: argparse.ArgumentParser) -> set[str]:
    return {flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")}


def settings_rows() -> dict[str, tuple[str, str]]:
    rows = re.findall(r"^\| `(BACKBONE_\w+)` \| (.*) \| (.*) \|$", README, re.MULTILINE)
    return {name: (meaning, default) for name, meaning, default in rows}


def error_sections() -> dict[str, str]:
    parts = re.split(r"^### ", ERRORS, flags=re.MULTILINE)[1:]
    return {part.partition("\n")[0].strip("`"): part for part in parts}


def test_every_route_is_in_the_readme_and_no_other() -> None:
    named = set(ROUTE.findall(README))
    assert routes() == named


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_a_text_names_only_routes_that_there_are(name: str) -> None:
    assert set(ROUTE.findall(TEXTS[name])) <= routes()


def test_every_setting_is_in_the_readme_with_its_meaning_and_default() -> None:
    rows = settings_rows()
    assert list(rows) == [variable_of(name) for name in Settings.model_fields]
    for name, field in Settings.model_fields.items():
        meaning, default = rows[variable_of(name)]
        assert meaning == field.description
        assert default.replace("`", "").replace(", ", ",") == shown_default(name)


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_a_text_names_only_settings_that_there_are(name: str) -> None:
    known = {variable_of(setting) for setting in Settings.model_fields} | NO_SETTING
    assert set(re.findall(r"\bBACKBONE_[A-Z_]+\b", TEXTS[name])) <= known


def test_every_setting_is_a_flag_of_serve_whose_help_has_its_default() -> None:
    serve = subcommands()["serve"]
    assert {flag_of(name) for name in Settings.model_fields} <= flags(serve)
    text = " ".join(serve.format_help().split())
    for name, field in Settings.model_fields.items():
        shown = f"{field.description} (default: {shown_default(name)})"
        assert shown.replace(" ", "") in text.replace(" ", "")


def test_every_subcommand_and_its_flags_are_in_the_readme() -> None:
    for name, parser in subcommands().items():
        assert f"`backbone-service {name}" in README
        own = flags(parser) - {"--help"}
        if name == "serve":  # documented by the table of settings
            own -= {flag_of(setting) for setting in Settings.model_fields}
            own -= {flag_of(f"no_{setting}") for setting in Settings.model_fields}
        assert {flag for flag in own if flag not in README} == set()
    assert {flag for flag in flags(make_parser()) if flag not in README} == set()


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_a_text_names_only_subcommands_and_flags_that_there_are(name: str) -> None:
    commands = subcommands()
    known = flags(make_parser()).union(*(flags(parser) for parser in commands.values()))
    lines = [line for line in TEXTS[name].splitlines() if "backbone-service " in line or "ARGS=" in line]
    used = set(re.findall(r"--[a-z][a-z-]*", " ".join(lines)))
    called = set(re.findall(r"(?:`|bin/)backbone-service ([a-z]+)", TEXTS[name]))
    assert used <= known
    assert called <= set(commands)


def test_every_problem_type_has_a_section_with_its_status() -> None:
    sections = error_sections()
    assert set(sections) == {problem_type(error_class) for error_class in problem_classes()}
    for error_class in problem_classes():
        section = sections[problem_type(error_class)]
        assert f"Status {status_of(error_class)}." in section


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_a_text_names_only_problems_that_there_are(name: str) -> None:
    known = {problem_type(error_class) for error_class in problem_classes()}
    assert set(re.findall(r"/problems/[a-z-]+", TEXTS[name])) <= known


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_links_between_the_texts_lead_somewhere(name: str) -> None:
    folder = ROOT if name == "README.md" else ROOT / "docs"
    links = re.findall(r"\]\(([^)#:]+)\)", TEXTS[name])
    assert [link for link in links if not (folder / link).exists()] == []
