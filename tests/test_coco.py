"""Reading data sets: labels, image formats, bad input and reproducible augmentation."""

import copy
import json
import logging
import re
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from datasets.coco import CocoDetection, build_dataset, collate
from datasets.transforms import eval_transforms, train_transforms
from models.class_map import COCO_IDS, ClassMap
from models.errors import UserError
from models.images import read_image
from models.preprocess import IMAGENET_MEAN, IMAGENET_STD

CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]


def categories(ids):
    return [{"id": i, "name": f"name {i}"} for i in ids]


def coco_dict(images, annotations, **extra):
    return {"images": images, "annotations": annotations, "categories": CATEGORIES, **extra}


def image_entry(i=1, **fields):
    return {"id": i, "file_name": f"{i}.png", "height": 40, "width": 60, **fields}


def annotation(i=1, image_id=1, bbox=(10, 5, 20, 30), category_id=3, **fields):
    box = list(bbox)
    return {"id": i, "image_id": image_id, "bbox": box, "category_id": category_id, **fields}


@pytest.fixture
def make(tmp_path):
    """make(data, size=(width, height), **arguments): a data set with plain images on disk."""

    def make(data, size=(60, 40), transforms=None, **arguments):
        (tmp_path / "images").mkdir(exist_ok=True)
        for i, image in enumerate(data.get("images", [])):
            path = tmp_path / "images" / image.get("file_name", "none.png")
            if not path.exists():
                path.parent.mkdir(exist_ok=True)
                Image.new("RGB", size, (10 * i, 100, 200)).save(path)
        (tmp_path / "instances.json").write_text(json.dumps(data))
        transforms = transforms or eval_transforms([40], 200)
        return CocoDetection(
            tmp_path / "images", tmp_path / "instances.json", transforms, **arguments
        )

    return make


def pixel_boxes(target):
    h, w = target["orig_size"].tolist()
    cx, cy, bw, bh = (target["boxes"] * torch.tensor([w, h, w, h])).unbind(1)
    return torch.stack([cx - bw / 2, cy - bh / 2, cx + bw / 2, cy + bh / 2], 1).tolist()


# Labels


def test_coco_ids_are_labels():
    class_map = ClassMap.from_categories(categories(sorted(COCO_IDS)))
    assert len(COCO_IDS) == 80 and class_map.num_classes == 91
    assert class_map.ids == {i: i for i in COCO_IDS} and class_map.names[90] == "name 90"
    assert 12 not in class_map.ids and class_map.label_of[1] == 1


def test_other_ids_are_numbered_consecutively():
    class_map = ClassMap.from_categories(CATEGORIES)
    assert class_map.num_classes == 2
    assert class_map.ids == {0: 3, 1: 7} and class_map.names == {0: "dog", 1: "cat"}
    assert class_map.label_of == {3: 0, 7: 1}
    assert ClassMap.from_categories([{"id": 0}]).names == {0: "0"}


def test_num_classes_overrides():
    assert ClassMap.from_categories(CATEGORIES, 5).num_classes == 5
    assert ClassMap.from_categories(CATEGORIES, 5).ids == {0: 3, 1: 7}
    assert ClassMap.from_categories(CATEGORIES, 91).ids == {3: 3, 7: 7}
    assert ClassMap.from_categories(categories([5, 91]), 91).ids == {0: 5, 1: 91}
    assert ClassMap.from_categories(categories(sorted(COCO_IDS)), 80).ids[79] == 90
    with pytest.raises(UserError, match="num_classes is 1, but there are 2 categories"):
        ClassMap.from_categories(CATEGORIES, 1)


def test_labels_of_a_released_checkpoint():
    """Ids are labels if the class head covers them all; otherwise they are renumbered."""
    assert ClassMap.of_released(categories([90, 1]), 91).ids == {1: 1, 90: 90}
    assert ClassMap.of_released(categories([2, 1, 3]), 4).ids == {1: 1, 2: 2, 3: 3}
    assert ClassMap.of_released(categories([2, 1, 3]), 3).ids == {0: 1, 1: 2, 2: 3}
    with pytest.raises(UserError, match=r"num_classes is 2.* 3 categories"):
        ClassMap.of_released(categories([90, 1, 95]), 2)


def test_class_map_survives_json_and_checkpoints(tmp_path):
    class_map = ClassMap.from_categories(CATEGORIES, 4)
    assert ClassMap.from_state_dict(json.loads(json.dumps(class_map.state_dict()))) == class_map
    torch.save(class_map.state_dict(), tmp_path / "checkpoint.pth")
    state = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert ClassMap.from_state_dict(state) == class_map


# Targets


def test_a_sample(make):
    data = coco_dict(
        [image_entry(12), image_entry(5)],
        [
            annotation(1, 12),
            annotation(2, 5, (1, 2, 3, 4), 7),
            annotation(3, 12, (0, 0, 60, 40), 7),
            annotation(4, 12, iscrowd=1),
        ],
    )
    dataset = make(data, transforms=eval_transforms([80], 200))
    image, target = dataset[0]
    assert image.shape == (3, 80, 120) and image.dtype == torch.float32
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    expected = (torch.tensor([0, 100, 200]) / 255 - mean) / std
    assert torch.allclose(image[:, 40, 60], expected, atol=1e-5)
    assert set(target) == {"labels", "boxes", "image_id", "orig_size", "size"}
    assert target["labels"].tolist() == [0, 1] and target["labels"].dtype == torch.int64
    assert pixel_boxes(target) == [[10, 5, 30, 35], [0, 0, 60, 40]]
    assert target["boxes"].dtype == torch.float32 and type(target["boxes"]) is torch.Tensor
    assert target["image_id"].item() == 12 and target["image_id"].shape == ()
    assert target["orig_size"].tolist() == [40, 60] and target["size"].tolist() == [80, 120]
    assert pixel_boxes(dataset[1][1])[0] == pytest.approx([1, 2, 4, 6]) and len(dataset) == 2
    assert dataset.most_objects() == (2, "12.png")


def test_images_without_objects_are_kept(make):
    dataset = make(coco_dict([image_entry(1), image_entry(2)], [annotation(1, 2)]), train=True)
    assert len(dataset) == 2
    assert dataset[0][1]["boxes"].shape == (0, 4) and dataset[0][1]["labels"].shape == (0,)


def test_invalid_boxes_are_dropped_or_clipped_and_counted(make, caplog):
    nan = float("nan")
    boxes = [
        (10, 5, 20, 30), (nan, 5, 20, 30), (10, 5, float("inf"), 30), (10, 5, 0, 30),
        (10, 5, 20, -1), (None, 5, 20, 30), (-10, -5, 20, 30), (50, 30, 100, 100),
        (60, 0, 10, 10), (-20, 0, 20, 10), (59.5, 39.5, 0.6, 0.6),
    ]  # fmt: skip
    data = coco_dict([image_entry()], [annotation(i, bbox=box) for i, box in enumerate(boxes)])
    with caplog.at_level(logging.WARNING):
        _, target = make(data)[0]
    expected = [[10, 5, 30, 35], [0, 0, 10, 25], [50, 30, 60, 40], [59.5, 39.5, 60, 40]]
    assert np.allclose(pixel_boxes(target), expected, atol=1e-4)
    (record,) = caplog.records
    for count in ("ignored 5 empty or non-finite boxes", "2 outside the image", "clipped 2"):
        assert count in record.getMessage()


def test_valid_data_set_loads_silently(make, caplog, capsys):
    dataset = make(coco_dict([image_entry()], [annotation()]))
    assert len([image for image, _ in dataset]) == 1  # the loop ends
    assert not caplog.records and capsys.readouterr() == ("", "")


def test_boxes_are_clipped_to_the_actual_image(make, caplog):
    boxes = [(10, 5, 45, 30), (31, 0, 9, 9)]
    data = coco_dict([image_entry()], [annotation(i, bbox=box) for i, box in enumerate(boxes)])
    dataset = make(data, size=(30, 20))
    for _ in range(2):
        assert np.allclose(pixel_boxes(dataset[0][1]), [[10, 5, 30, 20]])
    (record,) = caplog.records
    assert "1.png" in record.getMessage() and "(20, 30), not (40.0, 60.0)" in record.getMessage()
    del data["images"][0]["width"], data["images"][0]["height"]
    assert np.allclose(pixel_boxes(make(data, size=(30, 20))[0][1]), [[10, 5, 30, 20]])


def test_collate_pads(make):
    data = coco_dict([image_entry(1), image_entry(2)], [annotation()])
    batch, targets = collate([make(data)[0], make(data, transforms=eval_transforms([20], 90))[1]])
    assert batch.tensors.shape == (2, 3, 40, 60) and not batch.mask[0].any()
    assert batch.mask[1].sum() == 40 * 60 - 20 * 30 and [len(t["labels"]) for t in targets] == [
        1,
        0,
    ]


# Images


def left_red_right_blue():
    pixels = np.zeros((40, 60, 3), dtype=np.uint8)
    pixels[:, :30, 0], pixels[:, 30:, 2] = 250, 250
    return Image.fromarray(pixels)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK", "P transparent", "LA", "L", "1"])
def test_modes_are_converted_to_rgb(tmp_path, mode, recwarn):
    source, path, options = left_red_right_blue(), tmp_path / "image.png", {}
    if mode == "P transparent":
        source, options = source.convert("P"), {"transparency": bytes([255, 128, 0])}
    elif mode == "CMYK":
        path = tmp_path / "image.jpg"
    source.convert(mode.split()[0]).save(path, **options)
    pixels = read_image(path)
    assert pixels.shape == (3, 40, 60) and pixels.dtype == torch.uint8
    if mode in ("L", "LA", "1"):
        assert (pixels[0] == pixels[1]).all() and (pixels[0] == pixels[2]).all()
    else:
        expected = torch.tensor([[250, 0, 0], [0, 0, 250]])
        assert (pixels[:, 20, [10, 50]].T - expected).abs().max() <= 6
    assert not recwarn.list


@pytest.mark.parametrize("size", [(64, 48), (33, 17), (1, 2)])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_pixels_are_those_of_pil(tmp_path, mode, size):
    image, path = Image.effect_noise((64, 48), 90).resize(size).convert("RGB"), tmp_path / "x.jpg"
    image = Image.merge("RGB", [image.getchannel(0).rotate(angle) for angle in (0, 90, 180)])
    for subsampling in range(3):
        for progressive in (False, True):
            options = {"subsampling": subsampling, "progressive": progressive}
            image.convert(mode).save(path, quality=80, **options)
            pixels = read_image(path)
            expected = np.array(Image.open(path).convert("RGB"))
            assert np.array_equal(pixels.permute(1, 2, 0), expected)
            assert pixels.permute(1, 2, 0).is_contiguous()  # else resizing is slow


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_images_are_scaled_not_clipped(tmp_path, suffix):
    grey = np.repeat(np.array([[0, 51400, 32896, 65535]], dtype=np.uint16), 3, axis=0)
    Image.fromarray(grey).save(tmp_path / f"grey.{suffix}")
    assert read_image(tmp_path / f"grey.{suffix}")[1, 0].tolist() == [0, 200, 128, 255]
    Image.fromarray(grey.astype(np.int32)).save(tmp_path / "i.tif")
    with Image.open(tmp_path / "i.tif") as image:
        assert image.mode == "I"
    assert read_image(tmp_path / "i.tif")[0, 2].tolist() == [0, 200, 128, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_exif_orientation_is_applied_and_boxes_match(make, tmp_path, orientation, suffix):
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    displayed = Image.new("RGB", (60, 40))
    displayed.paste((255, 255, 255), (10, 5, 30, 35))
    stored = displayed.transpose(undo[orientation]) if orientation > 1 else displayed
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "images").mkdir()
    stored.save(tmp_path / "images" / f"1.{suffix}", exif=exif, quality=95)
    data = coco_dict([image_entry(file_name=f"1.{suffix}")], [annotation()])
    for sizes in ({}, {"height": None, "width": None}):
        data["images"][0].update(sizes)
        image, target = make(data)[0]
        ys, xs = torch.nonzero(image[1] > 0, as_tuple=True)
        found = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        assert target["orig_size"].tolist() == [40, 60]
        assert np.abs(np.array(pixel_boxes(target)[0]) - np.array(found)).max() <= 1


def test_exif_orientation_is_ignored_if_boxes_fit_the_stored_image(make, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "images").mkdir()
    left_red_right_blue().save(tmp_path / "images" / "1.png", exif=exif)
    image, target = make(coco_dict([image_entry()], [annotation(bbox=(0, 0, 30, 40))]))[0]
    assert target["orig_size"].tolist() == [40, 60] and pixel_boxes(target) == [[0, 0, 30, 40]]
    assert (image[0, :, :30] > 0).all() and (image[0, :, 30:] < 0).all()


def corrupt_file(path, kind):
    Image.effect_noise((60, 40), 90).convert("RGB").save(path, "JPEG")
    content = {"truncated": path.read_bytes()[:900], "empty": b"", "text": b"<html>no</html>"}
    path.write_bytes(content[kind])


@pytest.mark.parametrize("kind", ["truncated", "empty", "text"])
def test_unreadable_image(make, tmp_path, kind):
    data = coco_dict([image_entry(i) for i in (1, 2, 3)], [annotation(1, 1), annotation(2, 3)])
    make(data)
    for name in ("2.png", "3.png"):
        corrupt_file(tmp_path / "images" / name, kind)
    image, target = make(data, train=True)[1]
    assert target["skipped"] == ["2.png", "3.png"] and target["image_id"].item() == 1
    assert torch.equal(image, make(data, train=True)[0][0]) and len(target["labels"]) == 1
    assert "skipped" not in make(data, train=True)[0][1]
    for arguments in ({"train": True, "strict": True}, {"train": False}):
        with pytest.raises(UserError, match=r"2\.png: cannot be read as an image") as caught:
            make(data, **arguments)[1]
        assert "\n" not in str(caught.value) and "instances.json" in str(caught.value)


def test_training_fails_if_no_image_is_readable(make, tmp_path):
    data = coco_dict([image_entry(i) for i in range(30)], [annotation(1, 1)])
    dataset = make(data, train=True)
    for i in range(30):
        (tmp_path / "images" / f"{i}.png").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read as an image"):
        dataset[5]


def test_worker_error_is_reported_in_one_line(make, tmp_path):
    dataset = make(coco_dict([image_entry()], [annotation()]))
    corrupt_file(tmp_path / "images" / "1.png", "truncated")
    with pytest.raises(UserError) as caught:
        list(DataLoader(dataset, num_workers=1, collate_fn=collate))
    assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)


# Bad input


def change(path, value):
    """An edit that sets `path` in the JSON to `value`, or deletes it for `del_`."""

    def apply(data):
        *parents, last = path
        for key in parents:
            data = data[key]
        if value is del_:
            del data[last]
        else:
            data[last] = value

    return apply


del_ = object()


@pytest.mark.parametrize(
    ("path", "value", "parts"),
    [
        (["images"], del_, ["'images'", "missing"]),
        (["annotations"], del_, ["'annotations'", "missing"]),
        (["categories"], del_, ["'categories'", "missing"]),
        (["images"], [], ["'images'", "empty"]),
        (["annotations"], {}, ["'annotations'", "not a list"]),
        (["annotations"], ["no"], ["'annotations'", "not a list of objects"]),
        (["images", 0, "id"], del_, ["'id' of image number 1", "missing"]),
        (["images", 0, "id"], "1", ["'id' of image 1", "'1'", "integer"]),
        (["images", 1, "id"], 1, ["image id 1", "more than once"]),
        (["images", 1, "file_name"], del_, ["'file_name' of image 2", "missing"]),
        (["images", 1, "height"], "tall", ["'height' of image 2", "'tall'"]),
        (["annotations", 0, "image_id"], 99, ["'image_id' of annotation 4", "99"]),
        (["annotations", 0, "image_id"], [1], ["'image_id' of annotation 4"]),
        (["annotations", 0, "category_id"], 8, ["'category_id' of annotation 4", "8"]),
        (["annotations", 0, "category_id"], del_, ["'category_id' of annotation 4", "missing"]),
        (["annotations", 0, "bbox"], del_, ["'bbox' of annotation 4", "missing"]),
        (["annotations", 0, "bbox"], [1, 2, 3], ["'bbox' of annotation 4", "[1, 2, 3]"]),
        (["annotations", 0, "bbox"], [1, 2, 3, "4"], ["'bbox' of annotation 4"]),
        (["annotations", 0, "area"], "big", ["'area' of annotation 4", "'big'"]),
        (["annotations", 0, "bbox", 2], 0, ["no usable object"]),
        (["annotations", 0, "iscrowd"], 1, ["no usable object"]),
        (["categories", 0, "id"], del_, ["'id' of category number 1", "missing"]),
        (["categories", 0, "id"], 3, ["category id 3", "more than once"]),
    ],
)
def test_bad_fields_are_named(make, path, value, parts):
    data = copy.deepcopy(coco_dict([image_entry(1), image_entry(2)], [annotation(4)]))
    change(path, value)(data)
    with pytest.raises(UserError) as caught:
        make(data)
    message = str(caught.value)
    assert "instances.json" in message and "\n" not in message
    assert all(part in message for part in parts), message


def test_bad_files_are_named(make, tmp_path):
    data = coco_dict([image_entry(i) for i in (1, 2, 3)], [annotation()])
    make(data)
    images, file, transforms = tmp_path / "images", tmp_path / "instances.json", None
    with pytest.raises(UserError, match="absent: cannot be listed"):
        CocoDetection(tmp_path / "absent", file, transforms)
    with pytest.raises(UserError, match=r"absent\.json: cannot be read"):
        CocoDetection(images, tmp_path / "absent.json", transforms)
    for name in ("2.png", "3.png"):
        (images / name).unlink()
    with pytest.raises(UserError, match=r"2\.png: no such file; 2 of the 3 images") as caught:
        CocoDetection(images, file, transforms)
    assert str(file) in str(caught.value)
    for content in ('{"images": [', "[]", "version https://git-lfs"):
        file.write_text(content)
        with pytest.raises(UserError, match=r"instances\.json"):
            CocoDetection(images, file, transforms)


def test_images_in_subdirectories(make, tmp_path):
    data = coco_dict(
        [image_entry(1, file_name="a/1.png"), image_entry(2, file_name="b/1.png")], [annotation()]
    )
    assert len(make(data)) == 2
    (tmp_path / "images" / "b" / "1.png").unlink()
    with pytest.raises(UserError, match=r"b/1\.png: no such file; 1 of"):
        CocoDetection(tmp_path / "images", tmp_path / "instances.json", None)


def test_class_map_of_another_data_set(make, caplog):
    data = coco_dict([image_entry()], [annotation()])
    own = ClassMap.from_categories([{"id": 3, "name": "Dog"}, {"id": 9, "name": "cow"}])
    assert make(data, class_map=own)[0][1]["labels"].tolist() == [0] and not caplog.records
    make(data, class_map=ClassMap.from_categories([{"id": 3, "name": "cat"}]))
    assert "category 3 is 'dog' here, but 'cat' in the model" in caplog.text
    with pytest.raises(UserError, match="'category_id' of annotation 1 is 3"):
        make(data, class_map=ClassMap.from_categories([{"id": 9}]))
    with pytest.raises(UserError, match=r"instances\.json: num_classes is 1"):
        make(data, class_map=partial(ClassMap.from_categories, num_classes=1))


# Randomness

AUGMENT = train_transforms(range(24, 49), 90, [30, 40], [20, 30])


def augmented(dataset, **loader):
    loader = DataLoader(dataset, collate_fn=lambda batch: batch[0], **loader)
    return [(image, target["boxes"]) for image, target in loader]


def same(a, b):
    pairs = zip(a, b, strict=True)
    return [x[0].shape == y[0].shape and torch.equal(x[0], y[0]) for x, y in pairs]


def test_augmentation_depends_only_on_seed_epoch_and_index(make):
    data = coco_dict([image_entry(i) for i in range(8)], [annotation(i, i) for i in range(8)])
    dataset = make(data, train=True, seed=3, transforms=AUGMENT)
    torch.manual_seed(0)
    first = augmented(dataset)
    state = torch.get_rng_state()
    dataset[0]
    assert torch.equal(state, torch.get_rng_state())  # the global generator is untouched
    torch.manual_seed(1)
    assert all(same(first, augmented(dataset, num_workers=2)))
    assert all(same(first, [dataset[i] for i in range(8)]))
    assert not all(same(first, augmented(make(data, train=True, seed=4, transforms=AUGMENT))))
    shapes = {tuple(image.shape) for image, _ in first}
    assert len(shapes) > 3  # the images differ from each other


def test_persistent_workers_follow_the_epoch(make):
    data = coco_dict([image_entry(i) for i in range(8)], [annotation(i, i) for i in range(8)])
    dataset = make(data, train=True, transforms=AUGMENT)
    loader = DataLoader(
        dataset, num_workers=1, persistent_workers=True, collate_fn=lambda batch: batch[0]
    )
    epochs = []
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        epochs.append(list(loader))
    assert all(same(epochs[0], epochs[2])) and not all(same(epochs[0], epochs[1]))


# Layout


def config(root, **changes):
    values = {
        "masks": False,
        "coco_path": str(root), "num_classes": None, "seed": 0, "strict_data": False,
        "data_aug_scales": [24, 40], "data_aug_max_size": 90, "data_aug_scales2_resize": [30],
        "data_aug_scales2_crop": [20, 30], "fix_size": False,
    }  # fmt: skip
    return SimpleNamespace(**{**values, **changes})


def test_build_dataset(tmp_path):
    data = coco_dict([image_entry(1), image_entry(2)], [annotation()])
    (tmp_path / "annotations").mkdir()
    names = {"train": "instances_train2017", "val": "instances_val2017"}
    for split, name in {**names, "test": "image_info_test-dev2017"}.items():
        (tmp_path / f"{split}2017").mkdir()
        for i in (1, 2):
            Image.new("RGB", (60, 40)).save(tmp_path / f"{split}2017" / f"{i}.png")
        content = {"images": data["images"]} if split == "test" else data
        (tmp_path / "annotations" / f"{name}.json").write_text(json.dumps(content))
    train = build_dataset(config(tmp_path, num_classes=4), "train")
    assert train.train and train.class_map.num_classes == 4
    assert {tuple(train[i][0].shape) for i in (0, 1)} != {(3, 40, 60)}
    val = build_dataset(config(tmp_path), "val", train.class_map)
    assert not val.train and val.class_map is train.class_map and val[0][0].shape == (3, 40, 60)
    fixed = build_dataset(config(tmp_path, fix_size=True), "train")
    assert fixed[0][0].shape == fixed[1][0].shape == (3, 40, 90)
    test = build_dataset(config(tmp_path), "test", train.class_map)
    assert len(test) == 2 and test[1][1]["labels"].shape == (0,)
    assert build_dataset(config(tmp_path, strict_data=True), "train").strict
    with pytest.raises(UserError, match=r"image_info_test-dev2017\.json: 'categories' is missing"):
        build_dataset(config(tmp_path), "test")
    with pytest.raises(UserError, match=re.escape("--coco_path")):
        build_dataset(config(""), "train")
