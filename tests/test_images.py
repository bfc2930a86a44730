"""Images in folders, as a viewer shows them."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from PIL import Image

from orca_rank.artifacts.damaged import DamagedFile
from orca_rank.data.image_files import read_image
from orca_rank.data.image_folder import ImageFolder

RAMP = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)


def photos(folder, classes=("ant", "bee"), count=6):
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (8, 8), (60 * number + 10, index, 0)).save(folder / name / f"{index}.png")


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, ending):
    Image.fromarray(RAMP).save(tmp_path / f"x.{ending}")
    found = read_image(tmp_path / f"x.{ending}", 8)
    assert np.abs(found[..., 0] - RAMP / 257).max() <= 0.5 and (found[..., 0] == found[..., 2]).all()


def test_an_image_is_turned_as_its_exif_data_say(tmp_path):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = 255  # bright above
    for orientation, turned in ((1, pixels), (3, pixels[::-1, ::-1]), (6, np.rot90(pixels, -1)), (8, np.rot90(pixels))):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
        assert np.array_equal(read_image(tmp_path / "x.png", 8), turned), orientation


def test_modes_of_all_kinds(tmp_path):
    clear = np.zeros((8, 8, 4), np.uint8)
    clear[:4] = (200, 0, 0, 255)
    Image.fromarray(clear).save(tmp_path / "clear.png")
    found = read_image(tmp_path / "clear.png", 8)
    assert found[0, 0].tolist() == [200, 0, 0] and found[7, 0].tolist() == [255, 255, 255]
    for mode in ("1", "L", "LA", "P", "CMYK", "YCbCr", "RGBA"):
        path = tmp_path / f"{mode}.{'jpg' if mode in ('CMYK', 'YCbCr') else 'png'}"
        Image.new("RGB", (8, 8), "white").convert(mode).save(path)
        assert read_image(path, 8).min() > 250, mode
    for mode in ("I", "F"):
        Image.new(mode, (8, 8), 70000).save(tmp_path / f"{mode}.tif")
        with pytest.raises(ValueError, match=r"32 bits.*data=arrays"):
            read_image(tmp_path / f"{mode}.tif", 8)


def test_hidden_files_are_passed_over_and_others_named(tmp_path, caplog):
    photos(tmp_path / "mine")
    (tmp_path / "mine" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "mine" / "ant" / ".thumbnails").mkdir()
    clean = ImageFolder(root=tmp_path, train="mine", size=8, test_fraction=0.3)
    before, parts = clean.contents, clean.parts
    Image.new("RGB", (8, 8)).save(tmp_path / "mine" / ".ipynb_checkpoints" / "x.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "mine" / "ant" / ".thumbnails" / "x.png")
    for name in ("ant/._0.png", "Thumbs.db", "bee/.DS_Store", "bee/desktop.ini"):
        (tmp_path / "mine" / name).write_bytes(b"not an image")
    again = ImageFolder(root=tmp_path, train="mine", size=8, test_fraction=0.3)
    assert again.contents == before and again.notes == () and again.task.classes == ("ant", "bee")
    assert torch.equal(again.parts.train[0], parts.train[0])
    for name in ("ant/7.heic", "ant/8.heic", "list.txt"):
        (tmp_path / "mine" / name).write_bytes(b"?")
    named = ImageFolder(root=tmp_path, train="mine", size=8, test_fraction=0.3)
    assert "2 .heic, 1 .txt" in named.notes[0] and named.notes[0] in caplog.text
    (tmp_path / "mine" / "cow").mkdir()
    (tmp_path / "mine" / "cow" / "1.heic").write_bytes(b"?")
    with pytest.raises(ValueError, match=r"without any are \['cow'\], which hold \{'.heic': 1\}"):
        ImageFolder(root=tmp_path, train="mine", size=8).setup()


def test_a_class_needs_images_enough(tmp_path):
    photos(tmp_path / "mine")
    photos(tmp_path / "mine", ["cow"], count=2)
    with pytest.raises(ValueError, match=r"fewer than 3 images: cow \(2\)"):
        ImageFolder(root=tmp_path, train="mine", size=8).setup()


def test_new_images_for_a_fine_tuned_model(tmp_path):
    photos(tmp_path / "old", ["ant", "bee", "cow"])
    old = ImageFolder(root=tmp_path, train="old", size=8)
    given = {"statistics": old.statistics, "classes": old.task.classes, "root": tmp_path, "size": 8}
    photos(tmp_path / "new", ["cow"], count=2)
    new = ImageFolder(train="new", **given)
    ((x, y),) = new.loader("all")
    assert y.tolist() == [2, 2] and torch.equal(x, old.parts.encode(new.everything()[0]))
    assert new.files() == ["cow/0.png", "cow/1.png"]
    ((x, y),) = ImageFolder(train="new/cow", **given).loader("all")
    assert len(x) == 2 and y is None
    photos(tmp_path / "other", ["dog"])
    with pytest.raises(ValueError, match=r"not fine-tuned for: \['dog'\]"):
        ImageFolder(train="other", **given).loader("all")


def test_images_beyond_the_limit_of_pixels_are_refused(tmp_path, monkeypatch):
    Image.new("L", (400, 400)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"cannot read the image .*x\.png"):
        read_image(tmp_path / "x.png", 8)


def test_an_image_that_would_grow_beyond_the_limit_is_refused(tmp_path, monkeypatch):
    Image.new("L", (100_000, 1)).save(tmp_path / "line.png")
    monkeypatch.setenv("ORCA_RANK_MAX_GIB", "0.5")
    with pytest.raises(DamagedFile, match=r"line\.png declares an image that is much longer than wide"):
        read_image(tmp_path / "line.png", 64)


def test_an_image_of_the_same_size_is_other_data(tmp_path):
    folder = tmp_path / "mine"
    for name in ("ant", "bee"):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), "red").save(folder / name / "x.bmp")
    before = ImageFolder(root=tmp_path, train="mine", size=8).contents
    assert ImageFolder(root=tmp_path, train="mine", size=8).contents == before
    Image.new("RGB", (8, 8), "blue").save(folder / "ant" / "x.bmp")
    assert ImageFolder(root=tmp_path, train="mine", size=8).contents != before


def test_a_test_folder_may_lack_classes_but_has_no_others(tmp_path):
    photos(tmp_path / "train", ["ant", "bee", "cow"])
    photos(tmp_path / "test", ["cow", "ant"], count=2)
    data = ImageFolder(root=tmp_path, train="train", test="test", size=8)
    assert sorted(data.parts.test[1].tolist()) == [0, 0, 2, 2]
    photos(tmp_path / "test", ["dog"])
    with pytest.raises(ValueError, match=r"has classes that train lacks: \['dog'\]"):
        ImageFolder(root=tmp_path, train="train", test="test", size=8).setup()


def test_a_name_does_not_choose_the_reader(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "x.jpg")
    (tmp_path / "x.jpg").rename(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png", 8)[0, 0, 0] > 250
    Image.new("RGB", (8, 8)).save(tmp_path / "x.eps")  # whose reader starts Ghostscript
    (tmp_path / "x.eps").rename(tmp_path / "y.png")
    with pytest.raises(DamagedFile, match=r"cannot read the image .*y\.png"):
        read_image(tmp_path / "y.png", 8)


def test_training_images_are_not_tested_on_in_silence(tmp_path):
    photos(tmp_path / "all")
    for test in ("all", "./all", "../" + tmp_path.name + "/all"):
        with pytest.raises(ValueError, match="is the training folder itself"):
            ImageFolder(root=tmp_path, train="all", test=test, size=8)
    photos(tmp_path / "new", count=2)
    assert "4 of 4 test samples of" in ImageFolder(root=tmp_path, train="all", test="new", size=8).notes[-1]
    for path in (tmp_path / "new").rglob("*.png"):
        Image.new("RGB", (8, 8), (0, 0, 200 + int(path.stem))).save(path)
    assert not ImageFolder(root=tmp_path, train="all", test="new", size=8).notes


def test_images_behind_links_count_as_what_they_hold(tmp_path):
    photos(tmp_path / "far")
    (tmp_path / "near").mkdir()
    for name in ("ant", "bee"):
        (tmp_path / "near" / name).symlink_to(tmp_path / "far" / name)
    before = ImageFolder(root=tmp_path, train="near", size=8).contents
    Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "far/ant/0.png")
    assert ImageFolder(root=tmp_path, train="near", size=8).contents != before


def test_a_pipe_is_not_waited_for(tmp_path):
    photos(tmp_path / "all")
    os.mkfifo(tmp_path / "all/ant/pipe.png")
    assert "not read: 1 .png" in ImageFolder(root=tmp_path, train="all", size=8).notes[0]
