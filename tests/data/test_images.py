"""Images are found in folders, in FGVC's JSON and in tables; what is missing is named."""

import json

import pytest
from PIL import Image

from wegeft_cli.data.labelled.images import read_images
from wegeft_cli.errors import UserError
from wegeft_cli.recipe.schema import DataSource


@pytest.fixture
def folder(tmp_path):
    for split, names in {"train": "ab", "test": "bc"}.items():
        for name in names:
            place = tmp_path / split / name
            place.mkdir(parents=True)
            for number in range(2):
                Image.new("L", (4, 4), 50 * number).save(place / f"{number}.png")
            (place / "notes.txt").write_text("not an image")
    return tmp_path


def read(**source):
    return read_images(DataSource(**{"path": "", **source}), recipe_dir=None)


def test_a_folder_of_class_folders_by_split(folder):
    rows = read(path=str(folder), split="test")
    assert list(rows.labels) == ["b", "b", "c", "c"]
    assert [path.name for path in rows.inputs] == ["0.png", "1.png"] * 2


def test_hidden_files_and_folders_are_not_images(folder):
    expected = read(path=str(folder))
    (folder / "train" / ".cache").mkdir()
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    (folder / "train" / "a" / ".thumbs").mkdir()
    for name in ("a/._0.png", ".cache/1.png", "a/.thumbs/2.png"):
        (folder / "train" / name).write_bytes(b"\0\5\26\7")
    found = read(path=str(folder))
    assert (found.inputs, found.labels) == (expected.inputs, expected.labels)
    assert found.sha256 == expected.sha256


def test_a_folder_without_splits_is_the_training_split(folder):
    assert list(read(path=str(folder / "train")).labels) == ["a", "a", "b", "b"]
    with pytest.raises(UserError, match="no folder for the split 'validation'; there are a, b"):
        read(path=str(folder / "train"), split="validation")


def test_a_folder_of_other_splits_is_not_taken_for_classes(folder):
    (folder / "train").rename(folder / "training")
    with pytest.raises(UserError, match="no folder for the split 'train'"):
        read(path=str(folder))


def test_fgvc_json_with_string_and_number_ids(folder):
    file = folder / "splits.json"
    file.write_text(json.dumps({"a/0.png": "10", "a/1.png": 9, "b/0.png": "x"}))
    rows = read(path=str(file), image_dir=str(folder / "train"))
    assert list(rows.labels) == ["10", "9", "x"]
    assert rows.inputs[0] == folder / "train" / "a" / "0.png"
    with pytest.raises(ExceptionGroup) as caught:
        read(path=str(file))  # relative to the file, where they are not
    faults = caught.value.exceptions
    assert len(faults) == 3
    assert "set `image_dir`" in faults[0].hint


def test_tables_take_paths(folder):
    file = folder / "train" / "rows.jsonl"
    file.write_text(
        '{"img": "a/0.png", "kind": 0}\n{"img": "b/1.png", "kind": 1}\n', encoding="utf-8"
    )
    rows = read(path=str(file), columns={"image": "img", "label": "kind"})
    assert list(rows.labels) == ["0", "1"]
    with pytest.raises(UserError, match="no column 'label'; there are img, kind"):
        read(path=str(file), columns={"image": "img"})
    with pytest.raises(UserError, match="'picture' is no field"):
        read(path=str(file), columns={"picture": "img"})


def test_the_digest_knows_names_and_classes(folder):
    file = folder / "train" / "s.json"
    digests = set()
    for values in ({"a/0.png": 1}, {"a/1.png": 1}, {"a/0.png": 2}):
        file.write_text(json.dumps(values))
        digests.add(read(path=str(file)).sha256)
    assert len(digests) == 3


def test_hub_data_are_read_as_bytes_with_their_declared_names(folder, monkeypatch):
    import datasets

    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["dog", "cat"])
    )
    paths = [str(folder / "train" / "a" / f"{n}.png") for n in range(2)]
    table = datasets.Dataset.from_dict({"image": paths, "label": [1, 0]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: table)
    rows = read(path="owner/set")
    assert list(rows.labels) == ["cat", "dog"]
    assert rows.declared == ("dog", "cat")
    assert str(rows.inputs[1]) == paths[1]
