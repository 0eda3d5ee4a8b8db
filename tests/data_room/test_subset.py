"""Few labels, and images held out of a folder that has no split of its own."""

import numpy as np
import pytest

from slimclr_hub.data.config import LabelledDataConfig
from slimclr_hub.data.sources import has_validation, labels_of, make_dataset, read_embedded
from slimclr_hub.errors import InputError
from tests.data_room.files import some_images, write_classes, write_idx_set, write_parquet, write_pngs

LABELS = read_embedded('train')[1]


def chosen(**choice) -> np.ndarray:
    images = make_dataset(LabelledDataConfig(**choice), 'train')
    labels = labels_of(images)
    assert labels is not None
    assert labels.tolist() == [images[index][1] for index in range(len(images))]
    return labels


@pytest.mark.parametrize('share', [0.01, 0.1, 0.333, 1.0])
def test_share_of_each_class(share):
    counts = np.bincount(chosen(train_share=share), minlength=10)
    assert counts.tolist() == [max(1, round(share * count)) for count in np.bincount(LABELS)]


def test_tiny_share_leaves_one_image_of_each_class():
    assert np.bincount(chosen(train_share=1e-6)).tolist() == [1] * 10


def test_number_of_each_class_and_seed():
    assert np.bincount(chosen(per_class=8)).tolist() == [8] * 10
    first, again, other = (
        make_dataset(LabelledDataConfig(per_class=8, choice_seed=seed), 'train').fingerprint() for seed in (0, 0, 1)
    )
    assert first == again != other


def test_validation_split_is_whole():
    assert len(make_dataset(LabelledDataConfig(per_class=1), 'validation')) == len(read_embedded('test')[1])


def test_list_of_names(tmp_path):
    images, labels = some_images('train', 24)
    folder = write_classes(tmp_path / 'images' / 'train', images, labels)
    files = sorted(folder.rglob('*.png'))
    listed = [f'{files[3].parent.name}/{files[3].name}', f'{files[7].parent.name}/{files[7].stem}']
    (tmp_path / 'list.txt').write_text('\n'.join(listed) + '\n\n')
    where = {'root': str(tmp_path / 'images'), 'train_list': str(tmp_path / 'list.txt')}
    config = LabelledDataConfig(name='folder', hold_out=0, **where)
    found = make_dataset(config, 'train')
    assert {found.name(index) for index in range(len(found))} == {str(files[3]), str(files[7])}
    (tmp_path / 'list.txt').write_text(f'{listed[0]}\nn01440764_10026.JPEG\n')
    with pytest.raises(InputError, match=r'list\.txt: 1 of 2 are not among .*n01440764_10026'):
        make_dataset(config, 'train')
    (tmp_path / 'list.txt').write_text('0000\n')
    with pytest.raises(InputError, match='1 of 1 are names of several training images; write CLASS/NAME, 0000'):
        make_dataset(config, 'train')
    (tmp_path / 'list.txt').write_text('\n')
    with pytest.raises(InputError, match='names no image'):
        make_dataset(config, 'train')


def test_held_out_images_are_no_training_images(tmp_path):
    images, labels = some_images('train', 60)
    root = write_classes(tmp_path / 'photos', images, labels)
    config = LabelledDataConfig(name='folder', root=str(root), hold_out=0.25)
    assert has_validation(config)
    splits = [make_dataset(config, split) for split in ('train', 'validation')]
    names = [{split.name(index) for index in range(len(split))} for split in splits]
    assert not names[0] & names[1]
    assert len(names[0] | names[1]) == 60
    whole = np.bincount(labels, minlength=10)
    held = np.bincount(labels_of(splits[1]), minlength=10)
    assert held.tolist() == [min(max(1, round(0.25 * count)), count - 1) for count in whole]
    few = make_dataset(LabelledDataConfig(name='folder', root=str(root), hold_out=0.25, per_class=1), 'train')
    assert {few.name(index) for index in range(len(few))} < names[0]


def test_folder_with_a_split_holds_nothing_out(tmp_path):
    images, labels = some_images('train', 40)
    for split in 'train', 'val':
        write_classes(tmp_path / split, images, labels)
    config = LabelledDataConfig(name='folder', root=str(tmp_path))
    assert [len(make_dataset(config, split)) for split in ('train', 'validation')] == [40, 40]


def test_plain_configuration_holds_nothing_out(tmp_path):
    root = write_classes(tmp_path / 'photos', *some_images('train', 20))
    assert not has_validation(LabelledDataConfig(name='folder', root=str(root), hold_out=0))


def test_labels_of_each_source(tmp_path):
    images, labels = some_images('train', 20)
    sources = {
        'fashion-mnist': write_idx_set(tmp_path / 'idx', 20, 5),
        'folder': write_classes(tmp_path / 'photos', images, labels),
    }
    for name, root in sources.items():
        found = make_dataset(LabelledDataConfig(name=name, root=str(root), hold_out=0), 'train')
        assert labels_of(found).tolist() == [found[index][1] for index in range(20)]
    write_parquet(tmp_path / 'table', (20,))
    table = make_dataset(LabelledDataConfig(name=f'hfds/{tmp_path / "table"}', per_class=1), 'train')
    assert labels_of(table).tolist() == [table[index][1] for index in range(len(table))] == list(range(20))


def test_refusals(tmp_path):
    images, labels = some_images('train', 24)
    root = write_classes(tmp_path / 'photos', images, labels)
    most = np.bincount(labels).min()
    with pytest.raises(InputError, match=r'data.per_class 99: class \w+ has \d+ training images; give at most'):
        make_dataset(LabelledDataConfig(name='folder', root=str(root), hold_out=0, per_class=99), 'train')
    assert most < 99
    flat = write_pngs(tmp_path / 'flat', images)
    with pytest.raises(InputError, match=r'an image has no class.*let each class have a folder'):
        make_dataset(LabelledDataConfig(name='folder', root=str(flat), train_share=0.5), 'train')
    single = write_classes(tmp_path / 'single', images[:1], labels[:1])
    with pytest.raises(InputError, match=r'has a single image, and data.hold_out 0.2'):
        make_dataset(LabelledDataConfig(name='folder', root=str(single)), 'train')
    for wrong, words in (
        ({'train_share': 0.0}, r'data.train_share is 0.0; give a share in \(0, 1\]'),
        ({'train_share': 1.5}, 'data.train_share is 1.5'),
        ({'per_class': 0}, 'data.per_class is 0; give 1 or more'),
        ({'hold_out': 1.0}, 'data.hold_out is 1.0'),
        ({'per_class': 2, 'train_share': 0.1}, 'data.train_share and data.per_class each choose'),
        ({'per_class': 2, 'name': 'wds/'}, 'data.per_class chooses images by index, and data.name wds/ is a stream'),
    ):
        with pytest.raises(InputError, match=words):
            LabelledDataConfig(**wrong)
