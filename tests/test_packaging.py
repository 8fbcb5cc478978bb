"""The mapping of folders to packages in pyproject.toml misses nothing."""

import sys
from importlib.resources import files
from pathlib import Path

import pytest

if sys.version_info < (3, 11):
    pytest.skip("tomllib is in the standard library from Python 3.11 on", allow_module_level=True)

import tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
FOLDERS = {"lla_compile": "lla_compile", "backends": "lla_compile.backends", "tuning_db": "lla_compile.tuning_db"}


def packages_in_the_tree():
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            yield ".".join([package, *path.parent.relative_to(ROOT / folder).parts])


def test_every_folder_of_modules_is_listed():
    assert set(SETUPTOOLS["packages"]) == set(packages_in_the_tree())
    for folder, package in FOLDERS.items():
        assert SETUPTOOLS["package-dir"][package] == folder


def test_every_data_file_is_listed():
    folders = {package: ROOT / folder for folder, package in FOLDERS.items()}
    folders["lla_compile.backends.cuda"] = ROOT / "backends" / "cuda"
    listed = {
        path
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
        for path in folders[package].glob(pattern)
    }
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts:
                assert path in listed, path


def test_data_files_are_found_where_the_package_is():
    names = {path.name for path in files("lla_compile.tuning_db").iterdir()}
    assert {"devices.yaml", "schema.json"} <= names


def test_version_and_licence():
    import lla_compile

    assert PROJECT["project"]["version"] == lla_compile.__version__
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
