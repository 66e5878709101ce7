"""Packages whose versions do not fit together are one message with pip's command."""

import os
import subprocess
import sys

import pytest

from wegeft_cli.cli.broken_imports import describe_import_error
from wegeft_cli.errors import UserError
from wegeft_cli.models.loading import load_image_processor


@pytest.mark.parametrize("package", ["tokenizers", "huggingface-hub"])
def test_an_installed_version_that_does_not_fit_is_named(tmp_path, write_recipe, package):
    """What is installed is read from its metadata alone, so an old entry is enough."""
    entry = tmp_path / "old" / f"{package.replace('-', '_')}-0.1.0.dist-info"
    entry.mkdir(parents=True)
    (entry / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.1.0\n")
    path = os.pathsep.join([str(entry.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "wegeft_cli", "plan", str(write_recipe())],
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "500"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "0.1.0" in done.stderr
    assert f"pip install '{package}>=" in done.stderr


@pytest.mark.parametrize(("error", "command"), [
    (ModuleNotFoundError("No module named 'accelerate'", name="accelerate"),
     "pip install accelerate"),
    (ImportError("cannot import name 'x' from 'huggingface_hub'", name="huggingface_hub"),
     "pip install --upgrade transformers huggingface_hub"),
])  # fmt: skip
def test_other_broken_imports_name_the_package(error, command):
    fault = describe_import_error(error)
    assert fault.hint == command
    assert "transformers 5" in fault.message


def test_a_module_of_this_package_is_a_bug():
    assert describe_import_error(ImportError("no", name="wegeft_cli.models")) is None


def test_a_missing_pillow_names_the_extra(tmp_path, monkeypatch):
    from transformers import AutoImageProcessor

    def refuse(**options):
        raise ImportError("AutoImageProcessor requires the PIL library but it was not found")

    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "preprocessor_config.json").write_text("{}")
    monkeypatch.setattr(AutoImageProcessor, "from_pretrained", refuse)
    with pytest.raises(UserError) as caught:
        load_image_processor(str(tmp_path))
    assert caught.value.hint == "pip install 'wegeft-cli[vision]'"
