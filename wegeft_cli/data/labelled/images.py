"""List the images of a classification task with their classes; none is decoded here."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wegeft_cli.data.labelled.texts import LabelledRows, check_fields, name_labels, read_label
from wegeft_cli.data.sources.hub import open_hub
from wegeft_cli.data.sources.loading import MAX_FAULTS, load_rows
from wegeft_cli.data.sources.paths import find_local, find_suffix
from wegeft_cli.errors import UserError, raise_all
from wegeft_cli.recipe.schema import DataSource
from wegeft_cli.storage.json_files import read_json

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
"""Endings of the files that count as images in a folder."""

_FIELDS = ("image", "image_path", "path", "file_name", "filename", "img", "pixel_values")
_LABELS = ("label", "labels", "class", "fine_label", "target", "category")


def read_images(source: DataSource, *, recipe_dir: Path | None) -> LabelledRows:
    """List the images of a source with their classes.

    Returns:
        The rows; an input is a path, or the bytes of an image in a table.

    Raises:
        UserError: If nothing is there, or a row has no image or class.
        ExceptionGroup: If several rows are bad.
    """
    local = find_local(source.path, recipe_dir)
    if local is None:
        return _read_hub(source, recipe_dir)
    if local.is_dir():
        folder = _find_class_folder(local, source.split)
        if folder is not None:
            return _read_folder(folder, source)
    elif local.suffix == ".json":
        values = read_json(local)
        if isinstance(values, dict):
            return _read_pairs(local, values, source, recipe_dir)
    return _read_table(source, recipe_dir)


def _find_class_folder(folder: Path, split: str) -> Path | None:
    """The folder of class folders: `<folder>/<split>`, or the folder itself without splits."""
    inside = [path for path in folder.iterdir() if path.is_dir() and not _is_hidden(path)]
    if (folder / split).is_dir():
        return folder / split
    if not inside or any(
        find_suffix(path) for path in folder.iterdir() if path.is_file() and not _is_hidden(path)
    ):
        return None  # a folder of tables
    if split != DataSource.split or any(path.name in ("validation", "test") for path in inside):
        names = ", ".join(sorted(path.name for path in inside)[:MAX_FAULTS])
        raise UserError(
            f"no folder for the split {split!r}; there are {names}",
            file=str(folder),
            hint="set `split`",
        )
    return folder


def _is_hidden(path: Path) -> bool:
    """Return whether a name begins with a dot, such as `._image.jpg` of macOS."""
    return path.name.startswith(".")


def _read_folder(folder: Path, source: DataSource) -> LabelledRows:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not _is_hidden(path))
    pairs = [
        (path, name)
        for name in names
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not any(map(_is_hidden, [path, *path.relative_to(folder).parents]))
    ]
    if not pairs:
        raise UserError(
            f"no images in the class folders {', '.join(names[:MAX_FAULTS]) or '(none)'}",
            file=str(folder),
            hint=f"an image's name ends in {', '.join(IMAGE_SUFFIXES[:4])}, ...",
        )
    return _list_paths(pairs[: source.limit], str(folder), folder)


def _read_pairs(
    file: Path, values: dict[str, Any], source: DataSource, recipe_dir: Path | None
) -> LabelledRows:
    root = _find_root(file, source, recipe_dir)
    pairs: list[tuple[Path, str]] = []
    faults: list[UserError] = []
    for name, value in list(values.items())[: source.limit]:
        try:
            pairs.append((root / name, read_label(value)))
        except UserError as fault:
            fault.file = f"{file}: {name!r}"
            faults.append(fault)
            if len(faults) == MAX_FAULTS:
                break
    raise_all(faults)
    if not pairs:
        raise UserError("there are no rows", file=str(file))
    return _list_paths(pairs, str(file), root)


def _find_root(file: Path, source: DataSource, recipe_dir: Path | None) -> Path:
    if source.image_dir is None:
        return file.parent
    root = find_local(source.image_dir, recipe_dir)
    if root is None or not root.is_dir():
        raise UserError(
            f"no such folder: {source.image_dir!r}",
            key="image_dir",
            hint="it is looked for from the working folder, then from the recipe's",
        )
    return root


def _list_paths(pairs: Sequence[tuple[Path, str]], origin: str, root: Path) -> LabelledRows:
    """Check that the images are there, and digest names, sizes and classes."""
    digest = hashlib.sha256()
    faults: list[UserError] = []
    num_missing = 0
    for path, label in pairs:
        try:
            size = path.stat().st_size
        except OSError:
            num_missing += 1
            if len(faults) < MAX_FAULTS:
                faults.append(UserError(f"names no image: {str(path)!r}", file=origin))
            continue
        digest.update(f"{path.relative_to(root)}\t{size}\t{label}\n".encode())
    if num_missing:
        faults[0].hint = (
            f"{num_missing} of {len(pairs)} images are not there; set `image_dir` to the folder "
            "that the paths begin in"
        )
    raise_all(faults)
    paths, labels = zip(*pairs, strict=True)
    return LabelledRows(list(paths), list(labels), origin, digest.hexdigest())


def _read_table(source: DataSource, recipe_dir: Path | None) -> LabelledRows:
    rows = load_rows(source, recipe_dir=recipe_dir)
    image, label = _find_columns(source, list(rows.rows[0]), rows.origin)
    file = Path(rows.parts[0][1])
    root = _find_root(file, source, recipe_dir)
    inputs: list[Any] = []
    labels: list[str] = []
    faults: list[UserError] = []
    for index, row in enumerate(rows.rows):
        try:
            labels.append(read_label(row.get(label)))
            inputs.append(_take_image(row.get(image), root))
        except UserError as fault:
            fault.file = rows.place(index)
            faults.append(fault)
            if len(faults) == MAX_FAULTS:
                break
    raise_all(faults)
    missing = [
        i for i, value in enumerate(inputs) if isinstance(value, Path) and not value.exists()
    ]
    raise_all(
        [
            UserError(f"names no image: {str(inputs[i])!r}", file=rows.place(i))
            for i in missing[:MAX_FAULTS]
        ]
    )
    return LabelledRows(inputs, labels, rows.origin, rows.sha256)


def _take_image(value: Any, root: Path) -> Any:
    """A path, bytes, or the object that `datasets` writes for an image: {bytes, path}."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return value
    if isinstance(value, str) and value:
        return root / value
    raise UserError(f"{value!r:.40} is neither an image's path nor its bytes")


class _HubImages(Sequence[Any]):
    """The images of a hub table as bytes, each read when it is asked for."""

    def __init__(self, table: Any, column: str) -> None:
        self._table, self._column = table, column

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: Any) -> Any:
        return _take_image(self._table[index][self._column], Path())


def _read_hub(source: DataSource, recipe_dir: Path | None) -> LabelledRows:
    import datasets

    table, origin = open_hub(source, recipe_dir)
    if source.limit is not None:
        table = table.select(range(min(source.limit, len(table))))
    image, label = _find_columns(source, table.column_names, origin)
    if isinstance(table.features[image], datasets.Image):
        table = table.cast_column(image, datasets.Image(decode=False))
    declared = tuple(getattr(table.features[label], "names", None) or ())
    labels = name_labels(list(table[label]), declared, origin)
    return LabelledRows(_HubImages(table, image), labels, origin, None, declared)


def _find_columns(source: DataSource, columns: Sequence[str], origin: str) -> tuple[str, str]:
    """The column of the image and that of the class."""
    renamed = check_fields(source, ("image", "label"))
    found = []
    for field, known in (("image", _FIELDS), ("label", _LABELS)):
        name = renamed.get(field) or next((each for each in known if each in columns), None)
        if name not in columns:
            raise UserError(
                f"no column {name or field!r}; there are {', '.join(columns)}",
                file=origin,
                key="columns",
                hint=f"name it: `columns: {{{field}: NAME}}`",
            )
        found.append(str(name))
    return found[0], found[1]
