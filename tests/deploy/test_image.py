"""The image: what its file promises to whoever runs it. `make image-test` runs it."""

from __future__ import annotations

import re
import tomllib

import pytest

from service.cli import make_parser
from service.settings import Settings
from tests.deploy.dockerfile import LAST_STAGE, environment_of_the_image, exec_form, instructions
from tests.docs.test_documented import NO_SETTING
from tests.processes import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()


def test_the_server_is_process_one_and_gets_the_signal_to_drain() -> None:
    [entry], [command] = instructions("ENTRYPOINT"), instructions("CMD")
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    [program] = exec_form(entry)
    assert program in scripts
    assert make_parser().parse_args(exec_form(command)).run
    assert instructions("STOPSIGNAL") == ["SIGTERM"]


def test_its_health_check_is_a_command_of_the_service() -> None:
    [check] = instructions("HEALTHCHECK")
    program, *arguments = exec_form(check.partition("CMD ")[2])
    assert [program] == exec_form(instructions("ENTRYPOINT")[0])
    assert make_parser().parse_args(arguments).run


def test_it_runs_as_a_number_that_is_not_root() -> None:
    [user] = instructions("USER")
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", user)


def test_what_it_sets_are_settings() -> None:
    own = {name for name in environment_of_the_image() if name.startswith("BACKBONE_")}
    assert own - NO_SETTING <= {f"BACKBONE_{name.upper()}" for name in Settings.model_fields}


def test_it_listens_for_others_and_so_starts_with_keys_or_a_gateway_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment_of_the_image().items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="BACKBONE_API_KEYS"):
        Settings()


def test_everything_that_is_copied_goes_into_the_build_and_nothing_else_does() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split("\n")
    wanted = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE)
    assert {name for names in copied for name in names.split()} == wanted
    assert "*" in ignored


def test_the_variant_without_cuda_takes_torch_from_the_index_without_cuda() -> None:
    stage = DOCKERFILE.partition("AS dependencies-cpu")[2].partition("\nFROM ")[0]
    assert re.search(r"ARG TORCH_INDEX_URL=https://\S+/cpu$", stage, re.MULTILINE)
    assert re.search(
        r'--no-deps --index-url "\$\{TORCH_INDEX_URL\}".*torch torchvision', stage.replace("\\\n", "")
    )
    assert "ARG VARIANT=cpu\n" in DOCKERFILE


def test_all_that_is_installed_is_pinned() -> None:
    installs = re.findall(r"pip[^\n]* install .*?(?=\n\S|&&)", DOCKERFILE, re.DOTALL)
    assert len(installs) >= 4
    assert all("-c constraints.txt" in command for command in installs)


def test_the_last_stage_installs_nothing_unless_told() -> None:
    assert "install -c" not in LAST_STAGE
    assert re.findall(r'if \[ "\$\{COMPILER\}" = gcc \]; then\s+apt-get update', LAST_STAGE)
    assert LAST_STAGE.count("apt-get install") == 1
