"""What pip is told about where packages are, uv is told as well; and what an editable install puts on the path."""

import importlib.util
import shutil
import subprocess
import sys
import zipfile

import pytest


@pytest.fixture
def install(root):
    spec = importlib.util.spec_from_file_location("install", root / "infra/install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_environment_overrules_the_files_and_every_place_is_passed_on(install):
    listed = ":env:.find-links='/wheels'\nglobal.cert='/ca.crt'\nglobal.find-links='/old'\n"
    listed += "global.constraint='/caps.txt'\n"
    listed += "global.extra-index-url='file:///a file:///b'\ninstall.index-url='https://example.org/simple'\n"
    options = install.configuration(listed)
    assert options["cert"] == "/ca.crt"
    assert list(install.places(options)) == [
        *("--default-index", "https://example.org/simple"),
        *("--index", "file:///a", "--index", "file:///b"),
        *("--find-links", "/wheels"),
        *("--constraints", "/caps.txt"),
    ]
    assert list(install.places(install.configuration(""))) == []


@pytest.mark.parametrize(("fails", "installers"), [("", ["pip", "uv"]), ("uv", ["pip", "uv", "pip", "pip"])])
def test_pip_installs_where_uv_does_not(install, monkeypatch, fails, installers):
    commands = []

    def run(command, *, check, **_options):
        commands.append(command)
        failed = command[2] == fails
        assert not (failed and check)
        return subprocess.CompletedProcess(command, int(failed), stdout="")

    monkeypatch.setattr(subprocess, "run", run)
    install.main()
    listed, *others = commands
    assert listed[-2:] == ["config", "list"]
    assert [command[2] for command in others] == installers
    assert all(str(install.ROOT / "constraints.txt") in command for command in others)
    assert others[-1][-1].endswith("[dev]")


def test_a_script_beside_a_clone_of_the_same_name_imports_the_package(root, tmp_path):
    clone, site = tmp_path / "scsae", tmp_path / "site"
    clone.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, clone)
    for package in ("scsae", "pipelines", "sae_core", "feature_store"):
        shutil.copytree(root / package, clone / package, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    site.mkdir()
    build = f"import setuptools.build_meta as backend; backend.build_editable({str(site)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=clone, check=True, capture_output=True)
    (wheel,) = site.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    script = tmp_path / "script.py"
    script.write_text(f"import site; site.addsitedir({str(site)!r}); import scsae; print(scsae.__file__)")
    # -S: nothing that is installed already can be found instead
    for arguments in ([str(script)], ["-c", script.read_text()]):
        done = subprocess.run(
            [sys.executable, "-S", *arguments], cwd=tmp_path, env={}, check=True, capture_output=True, text=True
        )
        assert done.stdout.strip() == str(clone / "scsae" / "__init__.py")
