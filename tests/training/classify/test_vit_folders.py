"""Image folders with links: every real folder once, and no image under the label of another class."""

import logging

import pytest

from comcat_hf.errors import InvalidValueError
from comcat_hf.training.classify.data import open_splits
from comcat_hf.training.classify.settings import CompressSettings
from tests.training.classify.test_vit_data import generic_config, write_folders


NAMES = ("cat", "dog", "owl")


@pytest.fixture
def root(tmp_path):
    return write_folders(tmp_path / "set", NAMES, 2)


def link(path, target):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target, target_is_directory=target.is_dir())


def counted(root, role="train", classes=3):
    """How many images each class has."""
    folder = {f"{role}_dir": str(root)}
    split = getattr(open_splits(CompressSettings(**folder), generic_config(classes), 0), role)
    labels = [split.raw(index).label for index in range(split.size)]
    return [labels.count(number) for number in range(classes)]


# By name: where the link stands, where it leads, and what is counted; warned of where a link is left out.
LINKS = {
    "back_to_the_class": ("cat/loop", "cat", [2, 2, 2], False),
    "to_a_folder_of_the_class": ("cat/again", "cat/more", [3, 2, 2], False),
    "from_below_to_the_class": ("cat/more/loop", "cat", [3, 2, 2], False),
    "back_to_the_root": ("cat/loop", ".", [2, 2, 2], True),
    "above_the_root": ("cat/loop", "..", [2, 2, 2], True),
    "to_another_class": ("cat/more/dogs", "dog", [3, 2, 2], True),
    "outside": ("cat/other", "../other", [2, 2, 2], True),
    "a_class_that_is_another": ("newt", "dog", [2, 2, 2], True),
    "a_class_inside_another": ("newt", "cat/more", [3, 2, 2], True),
    "a_class_that_is_the_root": ("newt", ".", [2, 2, 2], True),
    "a_class_above_the_root": ("newt", "..", [2, 2, 2], True),
    "a_file_of_another_class": ("cat/9.png", "dog/0.png", [2, 2, 2], True),
    "a_file_outside": ("cat/9.png", "../other/5.png", [3, 2, 2], False),
}


@pytest.mark.parametrize(("place", "target", "expected", "warned"), LINKS.values(), ids=LINKS)
@pytest.mark.parametrize("role", ["train", "validation"])
def test_links_inside_image_folders(root, caplog, place, target, expected, warned, role):
    write_folders(root.parent, ("other",), 6)
    if "more" in place + target:
        write_folders(root / "cat", ("more",), 1)
    link(root / place, root / target)
    with caplog.at_level(logging.WARNING):
        assert counted(root, role) == expected
    said = f"{root}: 1 links that lead out of their class are left out, among them {root / place}"
    assert (said in caplog.text) == warned == ("left out" in caplog.text)


def test_classes_may_be_links_to_folders_elsewhere(root, tmp_path):
    """As subsets of large data sets are made; a link back is found there, too."""
    for name in NAMES[:2]:
        link(tmp_path / "few" / name, root / name)
    link(root / "cat" / "loop", root)
    assert counted(tmp_path / "few", classes=2) == [2, 2]
    link(tmp_path / "few" / "pet", root / "dog")
    with pytest.raises(InvalidValueError, match="found that dog and pet lead to the same images"):
        counted(tmp_path / "few", classes=2)


def test_links_to_nothing_are_no_folders(root):
    link(root / "newt", root / "newt")
    link(root / "cat" / "none", root / "none")
    assert counted(root) == [2, 2, 2]
