"""Build the sdist and the wheel, check what they contain, install both and run every main command.

    python scripts/release_check.py                 # all of it; some minutes
    python scripts/release_check.py --no-install    # build and contents alone

The files are left in dist/. Fresh environments are made under .cache/release, with the versions of
constraints.txt, and `scripts/main_road.py` runs in each.
"""

from __future__ import annotations

import argparse
import email
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".cache" / "release"
# What neither file may contain.
UNWANTED = re.compile(
    r"^(tests|runs|site|dist)/|(^|/)(\.cache|\.venv|\.git|\.ci|__pycache__|\.\w+_cache)/"
    r"|\.(pyc|pt|safetensors|log)$"
)
# Part of the package that is not a module.
DATA_FILES = re.compile(r"\.(jinja|css|js|typed)$")
# What is written by the build itself, and differs between two builds of the same files.
VARYING = re.compile(r"\.dist-info/(RECORD|WHEEL)$")


def list_expected(root: Path) -> set[str]:
    """Return the files of the package, as they are called in a wheel."""
    modules = {
        path.relative_to(root).as_posix()
        for path in (root / "wegeft_cli").rglob("*")
        if path.suffix == ".py" or DATA_FILES.search(path.name)
    }
    recipes = [*(root / "recipes").glob("*.yaml"), root / "recipes" / "recipe.schema.json"]
    return modules | {f"wegeft_cli/shipped/{path.name}" for path in recipes}


def check_wheel(names: set[str], expected: set[str]) -> list[str]:
    """Return the faults of a wheel's list of files."""
    inside = {name for name in names if ".dist-info/" not in name}
    faults = [f"the wheel lacks {name}" for name in sorted(expected - inside)]
    faults += [f"the wheel contains {name}" for name in sorted(inside - expected)]
    if not any(name.endswith(".dist-info/licenses/LICENSE") for name in names):
        faults.append("the wheel lacks its license")
    return faults


def check_sdist(names: set[str], expected: set[str]) -> list[str]:
    """Return the faults of an sdist's list of files, without its outermost folder."""
    needed = {name for name in expected if "/shipped/" not in name}
    needed |= {f"recipes/{Path(name).name}" for name in expected if "/shipped/" in name}
    needed |= {"pyproject.toml", "setup.py", "README.md", "LICENSE", "CHANGELOG.md"}
    faults = [f"the sdist lacks {name}" for name in sorted(needed - names)]
    faults += [f"the sdist contains {name}" for name in sorted(names) if UNWANTED.search(name)]
    return faults


def check_metadata(text: str, version: str) -> list[str]:
    """Return the faults of a wheel's METADATA."""
    found = email.message_from_string(text)
    faults = []
    if found["Version"] != version:
        faults.append(f"the wheel's version is {found['Version']}, the package's {version}")
    description = str(found.get_payload())
    faults += [
        f"the description has a relative link: {link}"
        for link in re.findall(r"\]\((?!https?:|#)[^)]*\)", description)
    ]
    if not description.lstrip().startswith("# wegeft"):
        faults.append("the description is not README.md")
    return faults


def compare_wheels(first: Path, second: Path) -> list[str]:
    """Return where two wheels differ, by the checksum of each file."""
    contents = []
    for path in (first, second):
        with zipfile.ZipFile(path) as archive:
            contents.append(
                {i.filename: i.CRC for i in archive.infolist() if not VARYING.search(i.filename)}
            )
    return [
        f"the wheel of the sdist differs in {name}"
        for name in sorted(contents[0].keys() | contents[1].keys())
        if contents[0].get(name) != contents[1].get(name)
    ]


def run(*command: str | Path, cwd: Path = ROOT) -> None:
    """Run a command; exit if it fails."""
    print("+", *command, flush=True)
    if subprocess.run([str(word) for word in command], cwd=cwd, check=False).returncode:
        sys.exit(f"release check: failed: {' '.join(map(str, command))}")


def build(isolated: bool) -> tuple[Path, Path, Path]:
    """Build in copies of the files under version control; return sdist, its wheel, the tree's."""
    shutil.rmtree(WORK, ignore_errors=True)
    tree = WORK / "tree"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    options = [] if isolated else ["--no-isolation"]
    command = (sys.executable, "-m", "build", "--quiet", *options)
    # Without --wheel, the wheel is built from the sdist.
    run(*command, "--outdir", WORK / "dist", cwd=tree)
    run(*command, "--wheel", "--outdir", WORK / "direct", cwd=tree)
    (sdist,) = (WORK / "dist").glob("*.tar.gz")
    (wheel,) = (WORK / "dist").glob("*.whl")
    (direct,) = (WORK / "direct").glob("*.whl")
    return sdist, wheel, direct


def check_contents(sdist: Path, wheel: Path, direct: Path, version: str) -> list[str]:
    """Return all faults of the built files."""
    expected = list_expected(ROOT)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        faults = check_metadata(archive.read(metadata).decode(), version)
    faults += check_wheel(names, expected)
    with tarfile.open(sdist) as archive:
        members = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    return faults + check_sdist(members, expected) + compare_wheels(wheel, direct)


def install(package: Path, name: str) -> None:
    """Install a file into a fresh environment and run the main commands there."""
    folder = WORK / name
    venv.create(folder, with_pip=True, clear=True)
    python = folder / "bin" / "python"
    pins = ROOT / "constraints.txt"
    uv = shutil.which("uv")
    installer = (
        (uv, "pip", "install", "--quiet", "--python", python)
        if uv
        else (python, "-m", "pip", "install", "--quiet")
    )
    run(*installer, f"wegeft-cli[peft] @ {package.as_uri()}", "-c", pins, cwd=WORK)
    run(python, ROOT / "scripts" / "main_road.py", cwd=WORK)


def main() -> None:
    """Run the checks and report every fault of the contents at once."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--no-install", action="store_true", help="build and check contents alone")
    parser.add_argument(
        "--no-isolation", action="store_true", help="build with the installed setuptools"
    )
    arguments = parser.parse_args()
    version = re.search(r'VERSION = "([^"]+)"', (ROOT / "wegeft_cli" / "version.py").read_text())
    assert version is not None
    sdist, wheel, direct = build(not arguments.no_isolation)
    run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel)
    faults = check_contents(sdist, wheel, direct, version[1])
    if faults:
        sys.exit("\n".join(faults))
    if not arguments.no_install:
        install(wheel, "from-wheel")
        install(sdist, "from-sdist")
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    shutil.copytree(WORK / "dist", ROOT / "dist")
    for path in sorted((ROOT / "dist").iterdir()):
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
