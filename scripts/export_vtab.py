"""Write tasks of VTAB-1k out of TensorFlow Datasets, as the recipe `vit_vtab` reads them.

    pip install tensorflow tensorflow_datasets       # in an environment of its own
    python scripts/export_vtab.py --data-dir ~/tensorflow_datasets --task cifar100

Each task becomes `<output>/<task>/{train800,val200,train800val200,test}.json`, an object of image
path -> class, beside the images as they are stored, byte for byte (of dsprites, whose pixels are 0
and 1, times 255). A class is its number in TFDS, or the number that VTAB makes of the row
(task_adaptation by Google Research, Apache-2.0). Slices are by absolute place, rounded down; TFDS's
order is fixed by the version, which is named.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

NUM_TRAIN, NUM_VALIDATION = 800, 200
CLEVR_DISTANCES = (0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0)
KITTI_DISTANCES = (-100.0, 8.0, 20.0, 999.0)
NO_VEHICLE = 1000.0
FIRST_NO_VEHICLE = 3  # types 0 to 2 of KITTI are car, van and truck
ENDS = {"JPEG": ".jpg", "PNG": ".png"}  # of what is written as it is stored

Row = Mapping[str, Any]


class Reader(Protocol):
    """What gives the rows of a data set's splits, in its own order."""

    def count(self, split: str) -> int:
        """Count a split's rows."""
        ...

    def read(self, split: str, start: int, stop: int | None) -> Iterator[Row]:
        """Give rows by place, the image as its stored bytes."""
        ...


def by_key(name: str, divisor: float = 1.0) -> Callable[[Row], int]:
    """Take a number of the row, several neighbours as one class where the divisor is above 1."""
    return lambda row: int(float(row[name]) // divisor)


take_label = by_key("label")


def find_bin(value: float, edges: tuple[float, ...]) -> int:
    """Return the last edge below a value."""
    return int(np.flatnonzero(np.array(edges) < value)[-1])


def count_objects(row: Row) -> int:
    """CLEVR: 3 to 10 objects."""
    return len(row["objects"]["size"]) - 3


def find_clevr_distance(row: Row) -> int:
    """CLEVR: the nearest object's distance to the camera, in six bins."""
    return find_bin(float(row["objects"]["pixel_coords"][:, 2].min()), CLEVR_DISTANCES)


def find_kitti_distance(row: Row) -> int:
    """KITTI: the nearest vehicle's distance, in three bins; the fourth is for no vehicle."""
    is_vehicle = np.asarray(row["objects"]["type"]) < FIRST_NO_VEHICLE
    distances = np.asarray(row["objects"]["location"])[is_vehicle, 2]
    return find_bin(float(np.append(distances, NO_VEHICLE).min()), KITTI_DISTANCES)


@dataclass(frozen=True)
class Task:
    """A task of VTAB-1k.

    Args:
        dataset: TFDS's name with its version.
        num_classes: Classes.
        validation: Where the 200 rows begin: (split, share of it in hundredths).
        test: Where the test rows begin, to the split's end.
        label: Gives a row's class.
        factor: What pixels are multiplied with; 1 leaves the stored bytes.
    """

    dataset: str
    num_classes: int
    validation: tuple[str, int]
    test: tuple[str, int] = ("test", 0)
    label: Callable[[Row], int] = take_label
    factor: int = 1


HELD_OUT = ("validation", 0)
DSPRITES = ("dsprites:2.0.0", 16, ("train", 80), ("train", 90))
SMALLNORB = ("smallnorb:2.0.0", ("test", 0), ("test", 50))
TASKS = {
    "cifar100": Task("cifar100:3.0.2", 100, ("train", 90)),
    "caltech101": Task("caltech101:3.0.1", 102, ("train", 90)),
    "dtd": Task("dtd:3.0.1", 47, HELD_OUT),
    "flowers": Task("oxford_flowers102:2.1.1", 102, HELD_OUT),
    "pets": Task("oxford_iiit_pet:3.2.0", 37, ("train", 80)),
    "svhn": Task("svhn_cropped:3.0.0", 10, ("train", 90)),
    "sun397": Task("sun397/tfds:4.0.0", 397, HELD_OUT),
    "camelyon": Task("patch_camelyon:2.0.0", 2, HELD_OUT),
    "eurosat": Task("eurosat/rgb:2.0.0", 10, ("train", 60), ("train", 80)),
    "resisc45": Task("resisc45:3.0.0", 45, ("train", 60), ("train", 80)),
    "retinopathy": Task("diabetic_retinopathy_detection/btgraham-300:3.0.0", 5, HELD_OUT),
    "clevr_count": Task("clevr:3.1.0", 8, ("train", 90), HELD_OUT, count_objects),
    "clevr_distance": Task("clevr:3.1.0", 6, ("train", 90), HELD_OUT, find_clevr_distance),
    "dmlab": Task("dmlab:2.0.1", 6, HELD_OUT),
    "kitti_distance": Task("kitti:3.2.0", 4, HELD_OUT, label=find_kitti_distance),
    "dsprites_location": Task(*DSPRITES, by_key("label_x_position", 32 / 16), 255),
    "dsprites_orientation": Task(*DSPRITES, by_key("label_orientation", 40 / 16), 255),
    "smallnorb_azimuth": Task(SMALLNORB[0], 18, *SMALLNORB[1:], by_key("label_azimuth")),
    "smallnorb_elevation": Task(SMALLNORB[0], 9, *SMALLNORB[1:], by_key("label_elevation")),
}


def export_task(task: Task, reader: Reader, folder: Path) -> dict[str, int]:
    """Write a task's images and its four JSON files.

    Args:
        task: The task.
        reader: Gives its rows.
        folder: The task's folder.

    Returns:
        Rows of each file.

    Raises:
        SystemExit: If a row's class is none of the task's, or a slice is too short.
    """
    split, share = task.validation
    begin = reader.count(split) * share // 100
    parts = {"train800": ("train", 0, NUM_TRAIN), "val200": (split, begin, begin + NUM_VALIDATION)}
    split, share = task.test
    parts["test"] = (split, reader.count(split) * share // 100, None)
    found = {}
    for name, (split, start, stop) in parts.items():
        place = folder / "images" / name
        place.mkdir(parents=True, exist_ok=True)
        labels = {}
        for number, row in enumerate(reader.read(split, start, stop)):
            label = task.label(row)
            if not 0 <= label < task.num_classes:
                raise SystemExit(f"{name} row {number}: class {label} of {task.num_classes}")
            path = write_image(row["image"], place / f"{number:06d}", task.factor)
            labels[path.relative_to(folder).as_posix()] = str(label)
        wanted = None if stop is None else stop - start
        if not labels or (wanted is not None and len(labels) != wanted):
            raise SystemExit(f"{name} has {len(labels)} rows, and {wanted or 'some'} were expected")
        found[name] = labels
    found["train800val200"] = {**found["train800"], **found["val200"]}
    for name, labels in found.items():  # last, so that a file tells that its images are there
        (folder / f"{name}.json").write_text(json.dumps(labels, indent=0) + "\n", encoding="utf-8")
    return {name: len(labels) for name, labels in found.items()}


def write_image(data: bytes, path: Path, factor: int) -> Path:
    """Write an image's stored bytes under its kind's ending, another kind as PNG; give the file."""
    with Image.open(io.BytesIO(data)) as image:
        kind = image.format or ""
        if factor != 1 or kind not in ENDS:
            values = np.asarray(image if factor != 1 else image.convert("RGB")) * np.uint8(factor)
            stream = io.BytesIO()
            Image.fromarray(values.astype(np.uint8)).save(stream, format="PNG")
            data, kind = stream.getvalue(), "PNG"
    path = path.with_suffix(ENDS[kind])
    path.write_bytes(data)
    return path


class TfdsReader:
    """Reads a prepared data set of TensorFlow Datasets.

    Args:
        dataset: Its name with its version.
        data_dir: TFDS's folder; None takes its own default.
    """

    def __init__(self, dataset: str, data_dir: str | None) -> None:
        import tensorflow_datasets as tfds

        self._tfds = tfds
        self._builder = tfds.builder(dataset, data_dir=data_dir)
        self._builder.download_and_prepare()

    def count(self, split: str) -> int:
        """Count a split's rows."""
        return int(self._builder.info.splits[split].num_examples)

    def read(self, split: str, start: int, stop: int | None) -> Iterator[Row]:
        """Give rows by place, the image as its stored bytes."""
        rows = self._builder.as_dataset(
            split=f"{split}[{start}:{'' if stop is None else stop}]",
            decoders={"image": self._tfds.decode.SkipDecoding()},
            shuffle_files=False,
        )
        yield from self._tfds.as_numpy(rows)


def main() -> None:
    """Write the tasks that are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--data-dir", help="TFDS's folder; left out: its own default")
    parser.add_argument("--output", type=Path, default=Path("data/vtab"))
    options = parser.parse_args()
    for name in options.task:
        folder = options.output / name
        if (folder / "test.json").is_file():
            print(f"{name}: {folder} is there already")
            continue
        rows = export_task(TASKS[name], TfdsReader(TASKS[name].dataset, options.data_dir), folder)
        print(f"{name}: " + ", ".join(f"{part} {count:,}" for part, count in rows.items()))


if __name__ == "__main__":
    main()
