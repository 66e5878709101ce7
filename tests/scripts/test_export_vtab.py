"""VTAB-1k's export writes the published slices and classes, on a stand-in for TFDS."""

from __future__ import annotations

import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from classifiers import write_vit
from PIL import Image

from wegeft_cli.planning.preview import preview

NUM_TRAIN, NUM_TEST = 2005, 31


def make_image(values) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.asarray(values, dtype=np.uint8)).save(stream, format="PNG")
    return stream.getvalue()


PICTURE = make_image(np.arange(64).reshape(8, 8))


class Rows:
    """Splits of rows that know their own place."""

    def __init__(self, **counts):
        self._counts = counts

    def count(self, split):
        return self._counts[split]

    def read(self, split, start, stop):
        for place in range(self._counts[split])[start:stop]:
            yield {"image": PICTURE, "label": place % 100, "place": place}


@pytest.fixture
def script(load_script):
    return load_script("export_vtab")


def test_slices_begin_where_they_are_published(script, tmp_path):
    rows = Rows(train=NUM_TRAIN, test=NUM_TEST)
    told = script.export_task(script.TASKS["cifar100"], rows, tmp_path)
    assert told == {"train800": 800, "val200": 200, "test": NUM_TEST, "train800val200": 1000}
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in told}
    begin = NUM_TRAIN * 90 // 100
    assert list(found["train800"].values()) == [str(n % 100) for n in range(800)]
    assert list(found["val200"].values()) == [str(n % 100) for n in range(begin, begin + 200)]
    assert found["train800val200"] == {**found["train800"], **found["val200"]}
    first = next(iter(found["test"]))
    assert (tmp_path / first).read_bytes() == PICTURE


def test_the_recipe_reads_what_is_written(script, tmp_path):
    script.export_task(
        script.TASKS["cifar100"], Rows(train=NUM_TRAIN, test=NUM_TEST), tmp_path / "cifar100"
    )
    paths = {"train": "train800", "validation": "val200", "test": "test"}
    told = preview(
        "vit_vtab",
        [
            f"model.name_or_path={write_vit(tmp_path / 'vit')}",
            *(
                f"data.{part}[0].path={tmp_path / 'cifar100' / name}.json"
                for part, name in paths.items()
            ),
        ],
    )
    assert (told.num_rows, told.num_validation_rows, told.num_test_rows) == (800, 200, NUM_TEST)
    assert [each["label"] for each in told.classes] == [str(n) for n in range(100)]


@pytest.mark.parametrize(
    ("name", "validation", "test"),
    [
        ("eurosat", ("train", 1203), ("train", 1604)),
        ("smallnorb_azimuth", ("test", 0), ("test", 250)),
        ("clevr_count", ("train", 1804), ("validation", 0)),
        ("dtd", ("validation", 0), ("test", 0)),
    ],
)
def test_every_rule_of_slices(script, tmp_path, name, validation, test):
    asked = []

    class Noted(Rows):
        def read(self, split, start, stop):
            asked.append((split, start, stop))
            for row in super().read(split, start, stop):
                count = {"size": [0] * (3 + row["place"] % 8)}
                yield {**row, "label": 0, "label_azimuth": 0, "objects": count}

    rows = Noted(train=NUM_TRAIN, validation=300, test=500)
    script.export_task(script.TASKS[name], rows, tmp_path)
    assert asked == [("train", 0, 800), (*validation, validation[1] + 200), (*test, None)]


def test_classes_of_the_structured_tasks(script):
    tasks = script.TASKS
    objects = {"size": [0] * 7, "pixel_coords": np.array([[0, 0, 9.2], [0, 0, 8.7]])}
    assert tasks["clevr_count"].label({"objects": objects}) == 4
    assert tasks["clevr_distance"].label({"objects": objects}) == 2
    scene = {"type": np.array([5, 1]), "location": np.array([[0, 0, 3.0], [0, 0, 12.0]])}
    assert tasks["kitti_distance"].label({"objects": scene}) == 1
    none = {"type": np.array([5]), "location": np.array([[0, 0, 3.0]])}
    assert tasks["kitti_distance"].label({"objects": none}) == 3
    labels = [tasks["dsprites_location"].label({"label_x_position": n}) for n in range(32)]
    assert labels == [n // 2 for n in range(32)]
    turned = [tasks["dsprites_orientation"].label({"label_orientation": n}) for n in range(40)]
    assert turned[:6] == [0, 0, 0, 1, 1, 2]
    assert max(turned) == 15


def test_the_19_tasks_are_those_that_the_page_lists(script, repository):
    page = (repository / "docs" / "images.md").read_text()
    assert len(script.TASKS) == 19
    for task in script.TASKS.values():
        name, version = task.dataset.split(":")
        (line,) = [line for line in page.splitlines() if f"{name} {version}" in line]
        assert f"({task.num_classes})" in line.partition(f"{name} {version}")[2]


def test_pixels_of_0_and_1_become_black_and_white(script, tmp_path):
    path = script.write_image(make_image([[0, 1], [1, 0]]), tmp_path / "one", 255)
    assert np.asarray(Image.open(path)).tolist() == [[0, 255], [255, 0]]


def test_faults_end_before_a_file_tells_that_all_is_there(script, tmp_path):
    with pytest.raises(SystemExit, match="val200 has 111 rows, and 200 were expected"):
        script.export_task(script.TASKS["cifar100"], Rows(train=1110, test=3), tmp_path)
    with pytest.raises(SystemExit, match="class 10 of 10"):
        script.export_task(script.TASKS["svhn"], Rows(train=NUM_TRAIN, test=3), tmp_path)
    assert not list(tmp_path.glob("*.json"))


def test_tfds_is_asked_for_stored_bytes_in_its_own_order(script, monkeypatch):
    asked = []

    class Builder:
        info = SimpleNamespace(splits={"train": SimpleNamespace(num_examples=5)})

        def download_and_prepare(self):
            asked.append("prepared")

        def as_dataset(self, **options):
            asked.append(options)
            return [{"image": PICTURE}]

    tfds = SimpleNamespace(
        builder=lambda name, data_dir: asked.append((name, data_dir)) or Builder(),
        decode=SimpleNamespace(SkipDecoding=lambda: "stored"),
        as_numpy=iter,
    )
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", tfds)
    reader = script.TfdsReader("dtd:3.0.1", "kept")
    assert reader.count("train") == 5
    assert list(reader.read("train", 2, None)) == [{"image": PICTURE}]
    options = {"split": "train[2:]", "decoders": {"image": "stored"}, "shuffle_files": False}
    assert asked == [("dtd:3.0.1", "kept"), "prepared", options]
