from pathlib import Path

import pytest
import yaml

from slimclr_hub.errors import InputError
from slimclr_hub.evaluate.linear_eval.config import LinearEvalConfig, SweepConfig, parse_linear_eval
from slimclr_hub.runs.command_line import dump
from slimclr_hub.train.config import PretrainConfig

CONFIGS = Path(__file__).parents[2] / 'recipes' / 'configs' / 'linear_eval'
RECIPES = sorted(CONFIGS.glob('*.yaml'))


def recipe(name: str, *arguments: str) -> LinearEvalConfig:
    return parse_linear_eval(['--network', 'x', '--config', str(CONFIGS / f'{name}.yaml'), *arguments])


@pytest.mark.parametrize('path', RECIPES, ids=[path.stem for path in RECIPES])
def test_recipe_is_read_as_it_is_written(path, tmp_path):
    config = parse_linear_eval(['--network', 'x', f'--config={path}'])
    for section, values in yaml.safe_load(path.read_text()).items():
        for key, value in values.items() if isinstance(values, dict) else ():
            found = getattr(getattr(config, section), key)
            assert (list(found) if isinstance(found, tuple) else found) == value
    (tmp_path / 'recipe.yaml').write_text(dump(config))
    assert parse_linear_eval(['--config', str(tmp_path / 'recipe.yaml')]) == config


def test_recipes_are_the_papers():
    config = recipe('mocov2_imagenet', '--data.root', '/images')
    assert (config.data.batch_size, config.data.root, config.data.size) == (1024, '/images', 224)
    assert (config.optim.rates, config.optim.milestone_epochs, config.optim.epochs) == ((60.0,), (60, 80), 100)
    assert (config.optim.schedule, config.optim.momentum, config.optim.weight_decay) == ('step', 0.9, 0)
    assert str(config.protocol) == 'linear evaluation, switchable, augmented, 100 epochs'
    assert config.probe.distillation
    views = config.views
    assert (views.jitter_prob, views.gray_prob, views.blur_prob, views.solarize_prob) == (0, 0, 0, 0)
    assert (views.crop_min, views.flip_prob) == (0.08, 0.5)
    assert not config.features.standardised
    slimmable = recipe('mocov2_imagenet_slimmable', '--data.root', '/images')
    assert str(slimmable.protocol) == 'linear evaluation, slimmable, augmented, 100 epochs'
    assert slimmable.optim == config.optim
    third = recipe('mocov3_imagenet')
    assert (third.data.batch_size, third.optim.rates, third.optim.epochs) == (1024, (0.4,), 90)
    assert (third.optim.schedule, third.features, third.views) == ('cosine', config.features, config.views)


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        ([], 'switchable, cached, 50 epochs'),
        (['--probe.head', 'slimmable', '--optim.epochs', '1'], 'slimmable, cached, 1 epoch'),
        (['--features.train_images', '600'], 'switchable, cached, at most 600 training images, 50 epochs'),
        (['--features.standardise', 'false'], 'switchable, cached, not standardised, 50 epochs'),
        (['--features.standardise', 'true'], 'switchable, cached, 50 epochs'),
        (['--probe.distillation', 'false'], 'switchable, cached, without distillation, 50 epochs'),
        (['--features.mode', 'augmented'], 'switchable, augmented, 50 epochs'),
    ],
)
def test_protocol_names_what_accuracies_depend_on(arguments, words):
    assert str(parse_linear_eval(['--network', 'x', *arguments]).protocol) == f'linear evaluation, {words}'


def test_recipe_of_fashion_mnist_is_the_default():
    assert recipe('fashionmnist_cached') == parse_linear_eval(['--network', 'x'])


def test_images_are_those_of_the_run(tmp_path):
    pretrained = PretrainConfig()
    (tmp_path / 'recipe.yaml').write_text(dump(pretrained))
    config = parse_linear_eval(['--network', str(tmp_path), '--data.size', '20'])
    assert (config.data.name, config.data.size, config.data.mean) == ('fashion-mnist-6k', 20, pretrained.data.mean)
    assert config.data.batch_size == 256
    assert parse_linear_eval(['--network', 'slimclr_resnet50.x']).data.size == 224


def test_default_milestones():
    assert SweepConfig(schedule='step', epochs=30).milestone_epochs == (18, 24)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ([], r'no network to test; give --network'),
        (['--optim.epochs', '3'], r'no network to test; give --network'),
        (['--network', 'x', '--probe.head', 'both'], r"probe.head 'both' is not one of switchable, slimmable"),
        (['--network', 'x', '--features.mode', 'fast'], r"features.mode 'fast' is not one of cached, augmented"),
        (['--network', 'x', '--optim.schedule', 'flat'], r"optim.schedule 'flat' is not one of cosine, step"),
        (['--network', 'x', '--optim.lr', '[]'], r'optim.lr is empty; give one'),
        (['--network', 'x', '--optim.lr', '[1, -2]'], r'optim.lr is -2'),
        (['--network', 'x', '--optim.lr', '[1, 2, 1]'], r'names a learning rate twice; give each once'),
        (['--network', 'x', '--optim.milestones', '[3]'], r'are for optim.schedule step, and it is cosine; drop'),
        (
            ['--network', 'x', '--optim.milestones', '[3, 9]', '--optim.schedule', 'step', '--optim.epochs', '9'],
            r'optim.milestones: 9 is not between 0 and optim.epochs 9',
        ),
        (
            ['--network', 'x', '--features.mode', 'augmented', '--features.standardise', 'true'],
            r'standardise needs features.mode cached, and it is augmented; set it to null',
        ),
        (
            ['--network', 'x', '--features.mode', 'augmented', '--features.train_images', '9'],
            r'train_images is for features.mode cached, and it is augmented; set it to null',
        ),
        (['--network', 'x', '--probe.num_classes', '1'], r'probe.num_classes is 1; give 2 or more'),
        (['--network', 'x', '--run.seed', '-1'], r'run.seed is -1'),
        (['--network', 'x', '--run.precision', 'int8'], r"run.precision 'int8' is not one of no, fp16, bf16"),
        (['--network', 'x', '--optim.rate', '1'], r'optim.rate'),
    ],
)
def test_a_mistake_is_named(arguments, message):
    with pytest.raises(InputError, match=message):
        parse_linear_eval(arguments)


def test_one_learning_rate_needs_no_list():
    assert parse_linear_eval(['--network', 'x', '--optim.lr', '3']).optim.rates == (3.0,)
