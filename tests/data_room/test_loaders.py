import pytest
import torch
from torch.utils.data import Subset

from slimclr_hub.data import DataConfig, ViewConfig
from slimclr_hub.data.loaders import EpochSampler, eval_loader, train_loader
from slimclr_hub.errors import InputError
from tests.data_room.files import some_images, write_idx_set


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return write_idx_set(tmp_path_factory.mktemp('idx'), 50, 20)


def config(root, **values) -> DataConfig:
    return DataConfig(**{'name': 'fashion-mnist', 'root': str(root), 'batch_size': 16, 'num_workers': 0, **values})


def order(sampler: EpochSampler, epoch: int) -> list[int]:
    sampler.set_epoch(epoch)
    keys = list(sampler)
    assert {key[0] for key in keys} == {epoch}
    return [index for _, index in keys]


def test_order_is_a_permutation_of_its_epoch_and_seed():
    sampler = EpochSampler(100, seed=1)
    orders = [order(sampler, epoch) for epoch in range(5)]
    for each in orders:
        assert sorted(each) == list(range(100))
    assert len(set(map(tuple, orders))) == 5
    assert order(sampler, 2) == orders[2]
    assert order(EpochSampler(100, seed=1), 3) == orders[3]
    assert order(EpochSampler(100, seed=2), 3) != orders[3]
    assert len(sampler) == 100


def test_order_does_not_depend_on_the_global_generator():
    sampler = EpochSampler(100, seed=1)
    torch.manual_seed(0)
    first = order(sampler, 0)
    torch.manual_seed(1)
    assert order(sampler, 0) == first


@pytest.mark.parametrize('processes', [1, 2, 4])
def test_train_loader(root, processes):
    loader, steps = train_loader(config(root), ViewConfig(), seed=0, processes=processes)
    assert steps == len(loader) == 3
    batches = list(loader)
    assert len(batches) == 3
    for (query, key), label in batches:
        # The batch of all processes; accelerate splits it.
        assert query.shape == key.shape == (16, 1, 28, 28)
        assert label.shape == (16,)
    labels = some_images('train', 50)[1]
    assert torch.cat([label for _, label in batches]).tolist() == labels[order(loader.sampler, 0)[:48]].tolist()


def test_batch_that_does_not_divide_over_processes(root):
    with pytest.raises(InputError, match=r'data\.batch_size 16 does not divide over 3 processes'):
        train_loader(config(root), ViewConfig(), seed=0, processes=3)


def test_batch_larger_than_the_data(root):
    assert train_loader(config(root, batch_size=50), ViewConfig(), seed=0, processes=1)[1] == 1
    with pytest.raises(InputError, match=r'data\.batch_size 51 is larger than the data set of 50 images'):
        train_loader(config(root, batch_size=51), ViewConfig(), seed=0, processes=1)


def test_evaluation_sees_every_image_once_in_order(root):
    loader = eval_loader(config(root), 'validation', at_most=None, seed=0)
    batches = list(loader)
    assert [len(label) for _, label in batches] == [16, 4]
    images, labels = some_images('test', 20)
    assert torch.cat([label for _, label in batches]).tolist() == labels.tolist()
    # At its own size an image is only normalised.
    expected = (torch.from_numpy(images).float()[:, None] / 255 - 0.286) / 0.353
    assert torch.allclose(torch.cat([image for image, _ in batches]), expected, atol=1e-5)


def test_evaluation_resizes_and_crops_the_centre(root):
    images, _ = next(iter(eval_loader(config(root, size=20, crop_pct=0.8), 'validation', at_most=None, seed=0)))
    assert images.shape == (16, 1, 20, 20)
    whole, _ = next(iter(eval_loader(config(root, size=20), 'validation', at_most=None, seed=0)))
    # A narrower crop shows less of the dark margin.
    assert images.mean() > whole.mean()


def test_bank_is_a_fixed_choice(root):
    def chosen(at_most, seed):
        loader = eval_loader(config(root), 'train', at_most, seed)
        return loader.dataset.indices if isinstance(loader.dataset, Subset) else None

    first = chosen(20, seed=0)
    assert len(set(first)) == len(first) == 20
    assert first == sorted(first)
    assert chosen(20, seed=0) == first
    assert chosen(20, seed=1) != first
    # Spread over the set rather than its first images, which may be of one class.
    assert first != list(range(20))
    assert chosen(50, seed=0) is None
    assert chosen(None, seed=0) is None
    labels = some_images('train', 50)[1]
    batches = list(eval_loader(config(root), 'train', 20, 0))
    assert torch.cat([label for _, label in batches]).tolist() == labels[first].tolist()
