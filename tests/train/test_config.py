import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import timm
import torch
import yaml

from slimclr_hub.data import DataConfig
from slimclr_hub.errors import InputError
from slimclr_hub.methods import METHODS
from slimclr_hub.methods.registry import settings_of
from slimclr_hub.runs.command_line import dump
from slimclr_hub.settings import RECIPE, flatten
from slimclr_hub.train.command import load_recipe, parse_pretrain
from slimclr_hub.train.config import MethodConfig, ModelConfig, OptimConfig, PretrainConfig, RunConfig
from slimclr_hub.train.setup import make_backbone, make_method, make_optimizer

RECIPES = Path(__file__).parents[2] / 'recipes'
CONFIGS = RECIPES / 'configs'
DEFAULT = CONFIGS / 'mocov2_resnet20_fashionmnist6k.yaml'


def parse(*argv: str) -> PretrainConfig:
    return parse_pretrain(DEFAULT, argv).config


def refusal(*argv: str) -> str:
    """The message of the one error that the command line gets."""
    with pytest.raises(InputError) as error:
        parse_pretrain(DEFAULT, argv)
    message = str(error.value)
    assert '\n' not in message
    return message


def test_options_win_over_recipes_wherever_they_stand(tmp_path):
    recipe = tmp_path / 'own.yaml'
    recipe.write_text('optim: {lr: 0.5, epochs: 3}')
    for argv in ['--optim.lr', '0.25', '--config', str(recipe)], ['--config', str(recipe), '--optim.lr', '0.25']:
        assert (parse(*argv).optim.lr, parse(*argv).optim.epochs) == (0.25, 3)


# Wrong values

WRONG = [
    ('model.widths', '[1.5]', '1.5'),
    ('model.widths', '[]', 'empty'),
    ('model.widths', '[1.0, 1.0]', 'twice'),
    ('model.widths', '[-0.5]', '-0.5'),
    ('model.widths', '[0.33333]', '0.33333'),
    ('model.widths', 'wide', 'wide'),
    ('model.widths', '0.5,wide', 'wide'),
    ('model.args', '[1]', '[1]'),
    ('method.name', 'simsiam', 'simsiam'),
    ('method.dim', '0', '0'),
    ('method.hidden_dim', '0', '0'),
    ('method.queue_size', '100', '100'),
    ('method.queue_size', '-1', '-1'),
    ('method.queue_size', '63', '64'),
    ('method.queue_size', 'many', 'many'),
    ('method.temperature', '0', '0'),
    ('method.temperature', 'nan', 'nan'),
    ('method.temperature', 'warm', 'warm'),
    ('method.momentum', '1', '1'),
    ('method.momentum', '-0.1', '-0.1'),
    ('method.distillation', 'hinton', 'hinton'),
    ('method.distillation_temperature', '-1', '-1'),
    ('method.distillation_squared', 'perhaps', 'perhaps'),
    ('method.loss_weights', 'equal', 'equal'),
    ('method.loss_weights', '[1, 2]', '2'),
    ('method.loss_weights', '[1, 2, 3, -1]', '-1'),
    ('method.bn_splits', '0', '0'),
    ('method.bn_splits', '3', '3'),
    ('method.bn_splits', '2.5', '2.5'),
    ('method.slow_start_epochs', '-1', '-1'),
    ('method.slow_start_epochs', '999', '999'),
    ('method.num_classes', '10', 'supervised'),
    ('method.momentum_schedule', 'linear', 'cosine'),
    ('method.sync_bn', 'true', 'method.bn_splits 4'),
    ('model.overlap', 'false', 'overlap=False'),
    ('data.name', 'cifar', 'cifar'),
    ('data.max_corrupt', '-1', '-1'),
    ('data.shuffle_buffer', '-1', '-1'),
    ('data.size', '0', '0'),
    ('data.size', '1.5', '1.5'),
    ('data.channels', '2', '2'),
    ('data.mean', '[0.1, 0.2]', '2'),
    ('data.std', '[0]', '0'),
    ('data.crop_pct', '1.1', '1.1'),
    ('data.batch_size', '1', '1'),
    ('data.num_workers', '-1', '-1'),
    ('data.num_samples', '-5', '-5'),
    ('data.download', 'maybe', 'maybe'),
    ('views.crop_min', '0', '0'),
    ('views.brightness', '-1', '-1'),
    ('views.hue', '0.6', '0.6'),
    ('views.flip_prob', '2', '2'),
    ('views.solarize_prob', '2', '2'),
    ('views.backend', 'dali', 'kornia'),
    ('optim.lr', '0', '0'),
    ('optim.lr_after_slow_start', '-1', '-1'),
    ('optim.accumulation_steps', '0', '0'),
    ('optim.accumulation_steps', '3', '64'),
    ('optim.filter_bias_and_bn', 'some', 'some'),
    ('probe.every', '-1', '-1'),
    ('probe.weight_decay', '-1', '-1'),
    ('run.checkpoint_steps', '0', '0'),
    ('optim.lr', 'fast', 'fast'),
    ('optim.lr', 'inf', 'inf'),
    ('optim.weight_decay', '-1', '-1'),
    ('optim.momentum', '-3', '-3'),
    ('optim.epochs', '0', '0'),
    ('optim.epochs', '1.5', '1.5'),
    ('optim.warmup_epochs', '-1', '-1'),
    ('optim.warmup_epochs', '999', '999'),
    ('knn.every', '-1', '-1'),
    ('knn.k', '0', '0'),
    ('knn.temperature', '0', '0'),
    ('knn.bank', '0', '0'),
    ('run.name', 'a/b', 'a/b'),
    ('run.name', '..', '..'),
    ('run.seed', '-1', '-1'),
    ('run.seed', '5000000000', '5000000000'),
    ('run.precision', 'fp8', 'fp8'),
    ('run.checkpoint_every', '0', '0'),
    ('run.keep_checkpoints', '0', '0'),
    ('run.log_every', '0', '0'),
    ('run.tracker', 'notebook', 'notebook'),
]


@pytest.mark.parametrize(('key', 'value', 'named'), WRONG, ids=[f'{key}={value}' for key, value, _ in WRONG])
def test_wrong_value_on_the_command_line(key, value, named):
    message = refusal(f'--{key}', value)
    assert key in message
    assert named in message


@pytest.mark.parametrize(
    ('section', 'key', 'value'), [('optim', 'lr', -1), ('optim', 'epochs', 'many'), ('run', 'seed', -1)]
)
def test_wrong_value_in_a_recipe(tmp_path, section, key, value):
    path = tmp_path / 'recipe.yaml'
    path.write_text(yaml.safe_dump({section: {key: value}}))
    message = refusal('--config', str(path))
    assert f'{section}.{key}' in message
    assert str(value) in message


@pytest.mark.parametrize('argument', ['--optim.learning_rate', '--lr', '--optimizer.lr'])
def test_unknown_key_on_the_command_line(argument):
    assert argument in refusal(argument, '0.1')


@pytest.mark.parametrize('recipe', [{'optim': {'learning_rate': 0.1}}, {'learning_rate': 0.1}])
def test_unknown_key_in_a_recipe(tmp_path, recipe):
    path = tmp_path / 'recipe.yaml'
    path.write_text(yaml.safe_dump(recipe))
    assert 'learning_rate' in refusal('--config', str(path))


def test_stray_argument():
    assert 'stray' in refusal('stray')


def test_missing_files(tmp_path):
    assert 'missing.yaml' in refusal('--config', str(tmp_path / 'missing.yaml'))
    assert str(tmp_path) in refusal('--config', str(tmp_path))


def test_recipe_that_is_not_yaml(tmp_path):
    path = tmp_path / 'recipe.yaml'
    path.write_text('optim: {lr: 0.1')
    assert 'recipe.yaml' in refusal('--config', str(path))


@pytest.mark.parametrize('option', ['--config', '--resume'])
def test_option_without_its_value(option, capsys):
    assert option in refusal(option)


@pytest.mark.parametrize('option', ['--conf', '--resum'])
def test_options_are_not_abbreviated(tmp_path, option):
    """An abbreviation would reach the parser but not the choice of the recipe underneath."""
    path = tmp_path / RECIPE
    path.write_text(dump(PretrainConfig()))
    assert option in refusal(option, str(tmp_path if option == '--resum' else path))


def test_options_of_another_method():
    """One message names all of them, and what it says to add makes the recipe fit."""
    message = refusal('--method.name', 'mocov3')
    assert re.search(
        r'not for method\.name mocov3: method\.queue_size 512 \(of .*mocov2.*\), method\.bn_splits 4 \(of mocov2',
        message,
    )
    remedy = message.partition('; add ')[2].split()
    config = parse('--method.name', 'mocov3', *remedy)
    assert (config.method.name, config.method.dim, config.method.queue_size) == ('mocov3', 64, None)


def test_settings_that_do_not_fit_each_other_are_told_together():
    message = refusal(
        '--data.batch_size',
        '50',
        '--optim.epochs',
        '3',
        '--method.slow_start_epochs',
        '4',
        '--optim.warmup_epochs',
        '5',
    )
    for words in (
        'method.queue_size 512 is not a multiple of data.batch_size 50; give 500',
        'data.batch_size 50 does not divide into method.bn_splits 4',
        'method.slow_start_epochs 4 exceeds optim.epochs 3',
        'optim.warmup_epochs 5 exceeds optim.epochs 3',
    ):
        assert words in message


@pytest.mark.parametrize('epochs', ['1', '3', '40'])
def test_demo_recipe_takes_any_number_of_epochs(epochs):
    assert parse('--optim.epochs', epochs).slow_start == int(epochs) / 2


def test_keys_of_earlier_versions(tmp_path):
    path = tmp_path / 'mine.yaml'
    path.write_text('method: {weights: none}\nspeed: {shared: false, compile: true}\n')
    message = refusal('--config', str(path))
    assert 'method.weights is now method.loss_weights' in message
    assert 'speed.compile is now run.compile' in message
    assert 'speed.shared is gone' in message
    assert 'method.weights is now method.loss_weights' in refusal('--method.weights', 'none')
    assert 'speed.lerp is gone' in refusal('--speed.lerp=false')


def test_recorded_recipe_of_an_earlier_version(tmp_path, capsys):
    path = tmp_path / RECIPE
    path.write_text('method: {weights: none}\nspeed: {shared: false, lerp: true, compile: true}\n')
    config = load_recipe(path)
    assert (config.method.loss_weights, config.run.compile) == ('none', True)
    assert load_recipe(path) == config
    assert capsys.readouterr().out.count('dropped: speed.shared, speed.lerp\n') == 1


def test_second_views_of_a_single_view():
    recipe = str(CONFIGS / 'supervised_resnet20_fashionmnist6k.yaml')
    assert 'second_views' in refusal('--config', recipe, '--second_views', '{blur_prob: 0.1}')


# Recipes that derive from others


def write(path: Path, **recipe) -> str:
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


def test_recipe_derives_from_its_base(tmp_path):
    write(tmp_path / 'first.yaml', optim={'lr': 0.1, 'epochs': 9}, model={'widths': [1.0, 0.5], 'args': {'a': 1}})
    (tmp_path / 'sub').mkdir()
    write(tmp_path / 'sub' / 'second.yaml', base='../first.yaml', optim={'lr': 0.2})
    third = write(tmp_path / 'third.yaml', base='sub/second.yaml', model={'args': {'b': 2}})
    config = parse('--config', third, '--knn.k', '7')
    assert (config.optim.lr, config.optim.epochs, config.model.widths) == (0.2, 9, (1.0, 0.5))
    assert config.model.args == {'b': 2}
    assert config.knn.k == 7
    assert parse(f'--config={third}') == load_recipe(Path(third))


def test_base_that_is_not_there(tmp_path):
    message = refusal('--config', write(tmp_path / 'mine.yaml', base='gone.yaml'))
    assert 'mine.yaml' in message
    assert 'gone.yaml' in message


def test_base_that_goes_in_a_circle(tmp_path):
    write(tmp_path / 'one.yaml', base='two.yaml')
    assert 'derives from itself' in refusal('--config', write(tmp_path / 'two.yaml', base='one.yaml'))


def test_unknown_network():
    with pytest.raises(InputError, match=r"model\.name 'resnet5O'.*slimclr_resnet20"):
        make_backbone(ModelConfig(name='resnet5O'), 3)
    with pytest.raises(InputError, match=r"model\.name 'resnet18' is not slimmable.*slimclr_resnet50"):
        make_backbone(ModelConfig(name='resnet18'), 3)
    with pytest.raises(InputError, match=r'model\.args.*depth'):
        make_backbone(ModelConfig(args={'depth': 3}), 3)


def test_dense_network_is_not_among_those_proposed():
    with pytest.raises(InputError) as error:
        make_backbone(ModelConfig(name='slimclr_resnet50_050'), 3)
    assert 'slimmable' in str(error.value)
    assert str(error.value).count('_050') == 1


def test_unknown_optimizer():
    with pytest.raises(InputError, match=r"optim\.name 'sdg'"):
        make_optimizer(OptimConfig(name='sdg'), torch.nn.Linear(2, 2))


def test_checks_apply_in_python_as_well():
    with pytest.raises(InputError, match=r'method\.queue_size 100 .*128.*give 128'):
        PretrainConfig(method=MethodConfig(queue_size=100))
    with pytest.raises(InputError, match=r'run\.name'):
        RunConfig(name='')


# Right values


def test_default_recipe_applies():
    config = parse()
    assert config == load_recipe(DEFAULT)
    written = yaml.safe_load(DEFAULT.read_text())
    values = flatten(config)
    for section, keys in written.items():
        for key, value in keys.items():
            assert values[f'{section}.{key}'] == value


def test_command_line_overrides_the_recipe(tmp_path):
    path = tmp_path / 'mine.yaml'
    path.write_text('optim: {lr: 0.3, epochs: 4}\nmodel: {widths: [1.0, 0.5]}\n')
    config = parse('--config', str(path), '--optim.lr', '0.1', '--model.widths', '[0.5]', '--data.root', 'null')
    assert (config.optim.lr, config.optim.epochs) == (0.1, 4)
    assert config.model.widths == (0.5,)
    assert config.data.root is None
    assert parse('--optim.lr', '0.1', '--config', str(path)).optim.lr == 0.1
    # What neither names is the default of the class, not that of the default recipe.
    assert config.method == MethodConfig()
    assert parse(f'--config={path}').optim.lr == 0.3


def test_types_come_out_as_declared():
    config = parse('--method.loss_weights', '[4, 3, 2, 1]', '--optim.lr', '1', '--model.args', '{drop_path_rate: 0.1}')
    assert tuple(config.method.loss_weights) == (4.0, 3.0, 2.0, 1.0)
    assert isinstance(config.optim.lr, float)
    assert config.model.args['drop_path_rate'] == 0.1
    assert parse('--run.name', '2024').run.name == '2024'
    assert parse('--method.hidden_dim', 'null').method.hidden_dim is None
    assert parse('--run.channels_last', 'false').run.channels_last is False


@pytest.mark.parametrize('value', ['0.5,0.25', '[0.5, 0.25]', '[0.5,0.25]'])
def test_several_numbers(value):
    assert parse('--model.widths', value).model.widths == (0.5, 0.25)
    assert parse(f'--model.widths={value}').model.widths == (0.5, 0.25)
    assert parse('--model.widths', value, '--method.loss_weights', '2,1').method.loss_weights == (2.0, 1.0)
    assert parse('--model.widths', '0.5').model.widths == (0.5,)


def test_slow_start_is_half_of_the_epochs_unless_given():
    assert PretrainConfig(optim=OptimConfig(epochs=5)).slow_start == 2.5
    assert PretrainConfig(method=MethodConfig(slow_start_epochs=0)).slow_start == 0


def test_round_trip(tmp_path):
    config = parse(
        '--model.widths', '[1.0, 0.3]', '--method.loss_weights', '[2, 1]', '--method.slow_start_epochs', '1.5',
        '--data.name', 'folder', '--data.root', '/data/with space: and colon', '--run.name', 'null-ish',
        '--run.seed', '7', '--optim.weight_decay', '1e-5',
        '--model.args', '{drop_path_rate: 0.1}', '--data.num_samples', '12',
    )  # fmt: skip
    path = tmp_path / RECIPE
    path.write_text(dump(config))
    assert flatten(load_recipe(path)) == flatten(config)
    assert load_recipe(path) == config
    default = PretrainConfig()
    path.write_text(dump(default))
    assert load_recipe(path) == default


def test_help_explains_every_key(capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '120')
    with pytest.raises(SystemExit) as end:
        parse_pretrain(DEFAULT, ['--help'])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for section in fields(PretrainConfig):
        if section.name == 'second_views':  # has the keys of views, and its own help
            assert '--second_views.help' in shown
            continue
        if section.name == 'imports':
            continue
        keys = {key for name in METHODS for key in settings_of(name)} if section.name == 'method' else None
        for key in keys or [key.name for key in fields(section.default_factory)]:
            # The name, and after it more than the type and the default.
            explained = re.search(rf'--{section.name}\.{key} (?:[^\n]*?)\n?\s+(.+?)\(type:', shown, re.DOTALL)
            assert explained, f'{section.name}.{key}'
            assert len(explained[1]) > 5
    for option in '--config', '--resume', 'accelerate launch':
        assert option in shown


def test_default_recipe_trains_on_a_normal_device():
    config = load_recipe(DEFAULT)
    method = make_method(config)
    views = [torch.randn(8, config.data.channels, config.data.size, config.data.size) for _ in range(2)]
    output = method(views, method.widths, 0.99)
    output['loss'].backward()
    assert output['loss'].isfinite()
    assert timm.is_model(config.model.name)


# Resuming


@pytest.fixture
def run_folder(tmp_path):
    (tmp_path / RECIPE).write_text(dump(replace(PretrainConfig(), data=DataConfig(name='folder', root='/old'))))
    return tmp_path


def test_resume_takes_the_runs_own_recipe(run_folder):
    command = parse_pretrain(DEFAULT, ['--resume', str(run_folder)])
    assert command.resume == run_folder
    assert command.config == load_recipe(run_folder / RECIPE)
    assert command.config != load_recipe(DEFAULT)
    assert parse_pretrain(DEFAULT, [f'--resume={run_folder}']).resume == run_folder


@pytest.mark.parametrize(
    ('argument', 'value'), [('--data.root', '/new'), ('--data.num_workers', '0'), ('--run.tracker', 'tensorboard')]
)
def test_what_may_change_on_resume(run_folder, argument, value):
    config = parse_pretrain(DEFAULT, ['--resume', str(run_folder), argument, value]).config
    assert str(flatten(config)[argument[2:]]) == value


@pytest.mark.parametrize(
    ('key', 'value', 'before'),
    [
        ('optim.lr', '0.1', '0.06'),
        ('optim.epochs', '9', '8'),
        ('model.widths', '[1.0, 0.5]', '[1.0, 0.75, 0.5, 0.25]'),
        ('data.batch_size', '64', '128'),
        ('views.flip_prob', '0.1', '0.5'),
        # The seed orders the images and draws the views, so another one is another run.
        ('run.seed', '1', '0'),
    ],
)
def test_what_may_not_change_on_resume(run_folder, key, value, before):
    message = refusal('--resume', str(run_folder), f'--{key}', value)
    assert f'{key} {before} -> {value}' in message
    assert message.count('->') == 1


def test_resume_with_the_value_it_has_already(run_folder):
    assert parse_pretrain(DEFAULT, ['--resume', str(run_folder), '--optim.lr', '0.06']).resume == run_folder


def test_resume_of_what_is_not_a_run(tmp_path):
    for folder in tmp_path, tmp_path / 'missing':
        message = refusal('--resume', str(folder))
        assert str(folder) in message
        assert RECIPE in message
