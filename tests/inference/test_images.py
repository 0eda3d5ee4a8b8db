import os
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm.data
from PIL import Image

from slimclr_hub.errors import InputError
from slimclr_hub.inference.images import find_unreadable, list_images
from tests.data_room.files import some_images, write_pngs

PIXELS = some_images('test', 4)[0]


def save(path: Path, index: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(PIXELS[index]).save(path)
    return path


def test_folder_in_natural_order(tmp_path):
    names = ['10.png', '2.png', 'a/1.PNG', 'a/b/1.jpeg', 'b.tif', 'B.tif', 'c.webp', '1²3.png']
    for name in names:
        save(tmp_path / name)
    (tmp_path / 'labels.csv').write_text('no image')
    save(tmp_path / '.ipynb_checkpoints' / '2.png')
    (tmp_path / '._2.png').write_bytes(b'what macOS leaves on other disks')
    listed = list_images(tmp_path)
    assert listed.names == ['1²3.png', '2.png', '10.png', 'a/1.PNG', 'a/b/1.jpeg', 'B.tif', 'b.tif', 'c.webp']
    assert [item.relative_to(tmp_path).as_posix() for item in listed.items] == listed.names
    assert list_images([str(tmp_path)]).names == listed.names
    assert len(listed) == len(names)


def test_several_keep_their_order_and_begin_as_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(Path('a/1.png'))
    save(Path('b/1.png'), 1)
    save(Path('image.of_any_kind.png')).rename('image.dat')
    listed = list_images(['b', Path('image.dat'), 'a', Image.fromarray(PIXELS[2])])
    assert listed.names == ['b/1.png', 'image.dat', 'a/1.png', '3']
    assert np.array_equal(listed.read(0, 'L'), PIXELS[1])
    assert np.array_equal(listed.read(3, 'L'), PIXELS[2])
    assert list_images('a/1.png').names == ['a/1.png']
    assert list_images(path for path in ('a', 'a/1.png')).names == ['a/1.png', 'a/1.png']


def test_endings_of_timm_are_extended(tmp_path):
    save(tmp_path / '1.gif')
    with pytest.raises(InputError, match=r'no images in this folder; searched for .*jpg.*tiff'):
        list_images(tmp_path)
    timm.data.add_img_extensions('.gif')
    try:
        assert list_images(tmp_path).names == ['1.gif']
    finally:
        timm.data.del_img_extensions('.gif')


def test_names_fit_in_any_file(tmp_path):
    """A name is bytes to the file system: breaks of lines and what is no UTF-8 are allowed in it."""
    for name in b'two\nlines.png', b'latin-\xe9.png':
        save(tmp_path / 'image.png').rename(tmp_path / os.fsdecode(name))
    listed = list_images(tmp_path)
    assert listed.names == ['latin-\\udce9.png', 'two\\nlines.png']
    assert find_unreadable(listed) == {}
    '\n'.join(listed.names).encode()


@pytest.mark.parametrize(
    ('images', 'message'),
    [
        ('no/such/image.png', 'images no/such/image.png: No such file or directory'),
        (['x' * 1000], 'File name too long'),
        ([], 'there are no images'),
        ([np.zeros((2, 2, 3))], r'images\[0\] is a ndarray, not the path of a file or folder or a PIL image$'),
        ([{'image': None}], r"images\[0\] is a dict, .* dataset\['image'\]"),
        (3, 'images is a int; give files'),
    ],
)
def test_wrong_images(images, message):
    with pytest.raises(InputError, match=message):
        list_images(images)


def test_empty_folder(tmp_path):
    with pytest.raises(InputError, match=f'images {tmp_path}: no images in this folder'):
        list_images(tmp_path)


def test_column_of_a_data_set_stays_lazy():
    """Else all images of a data set would have to fit in memory."""
    images = [Image.fromarray(image) for image in PIXELS]
    dataset = datasets.Dataset.from_dict({'image': images}, datasets.Features({'image': datasets.Image()}))
    listed = list_images(dataset['image'])
    assert not isinstance(listed.items, list)
    assert listed.names == ['0', '1', '2', '3']
    assert np.array_equal(listed.read(2, 'L'), PIXELS[2])
    assert find_unreadable(listed) == {}
    assert list_images(dataset[:2]['image']).names == ['0', '1']
    with pytest.raises(InputError, match=r"give the column of images: dataset\['image'\]"):
        list_images(dataset)


def test_unreadable_are_found(tmp_path):
    folder = write_pngs(tmp_path, PIXELS)
    (folder / '0001.png').write_text('<html>404</html>')
    (folder / '0002.png').write_bytes(b'')
    cut = (folder / '0003.png').read_bytes()[:300]
    (folder / '0003.png').write_bytes(cut)
    listed = list_images(folder)
    problem = 'not an image that Pillow can read'
    # The header of the last is whole; that the rest is missing shows when it is read.
    assert find_unreadable(listed) == {1: problem, 2: problem}
    left = listed.without([1, 2])
    assert left.names == ['0000.png', '0003.png']
    assert left.items == [folder / '0000.png', folder / '0003.png']

    lazy = [Image.open(folder / '0000.png'), Image.open(folder / '0003.png')]
    (index,) = find_unreadable(list_images([*lazy, lazy[0]]))
    assert index == 1


def test_loops_of_links_and_other_endings(tmp_path):
    """A folder is read once, and what is left out is counted."""
    write_pngs(tmp_path / 'a', PIXELS)
    (tmp_path / 'a' / 'up').symlink_to(tmp_path)
    for name in '1.gif', '2.gif', '3.avif':
        (tmp_path / name).write_bytes(b'')
    with pytest.warns(UserWarning, match=r'left out: 2 \.gif, 1 \.avif$'):
        listed = list_images(tmp_path)
    assert len(listed) == len(PIXELS)


def test_what_is_no_file_is_no_image(tmp_path):
    """Reading a pipe would wait for its writer for ever."""
    write_pngs(tmp_path, PIXELS)
    os.mkfifo(tmp_path / 'pipe.png')
    listed = list_images(tmp_path)
    assert find_unreadable(listed) == {len(PIXELS): 'not a file'}


def test_vanished_file_is_named_once(tmp_path):
    listed = list_images(save(tmp_path / '1.png'))
    (tmp_path / '1.png').unlink()
    assert find_unreadable(listed) == {0: 'No such file or directory'}
