"""Every recipe that ships: it parses, builds its network, and takes a step of each kind on small images."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from slimclr_hub.methods import METHODS
from slimclr_hub.runs.command_line import dump
from slimclr_hub.train.command import load_recipe
from slimclr_hub.train.config import PretrainConfig
from slimclr_hub.train.diagnostics import last_linear
from slimclr_hub.train.setup import make_method, make_optimizer, make_schedule
from tests.networks import small_teacher

CONFIGS = Path(__file__).parents[2] / 'recipes' / 'configs'
RECIPES = sorted(path for path in CONFIGS.rglob('*.yaml') if path.parent.name not in ('linear_eval', 'suite_eval'))
BATCH, SIZE = 2, 32


@cache
def recipe(name: str) -> PretrainConfig:
    return load_recipe(CONFIGS / f'{name}.yaml')


def small(config: PretrainConfig) -> PretrainConfig:
    """The recipe with a batch and a depth that a test can afford; the batch does not divide into splits."""
    method = config.method.replace(bn_splits=1 if config.method.bn_splits else None)
    layers = (1,) * (3 if 'resnet20' in config.model.name else 4)
    model = replace(config.model, args={**config.model.args, 'layers': layers})
    return replace(config, method=method, model=model, data=replace(config.data, batch_size=BATCH))


def kind(config: PretrainConfig) -> tuple[object, ...]:
    """What a step runs: the recipe without its numbers, which the configuration checks where it is built."""
    method = tuple(value for _, value in sorted(vars(config.method).items()) if isinstance(value, bool | str))
    network = config.model.name, config.model.overlap, len(config.model.widths) > 1
    observed = config.diagnostics.gradients > 0
    return method, network, config.optim.name, config.optim.filter_bias_and_bn, config.view_count, observed


@pytest.fixture(scope='module')
def trained() -> set[tuple[object, ...]]:
    return set()


@pytest.mark.parametrize('path', RECIPES, ids=[path.stem for path in RECIPES])
def test_recipe_trains(path, tmp_path, trained):
    config = recipe(str(path.relative_to(CONFIGS).with_suffix('')))
    (tmp_path / 'recipe.yaml').write_text(dump(config))
    assert load_recipe(tmp_path / 'recipe.yaml') == config
    if kind(config) in trained:  # another recipe has taken the same steps
        return
    trained.add(kind(config))
    method = make_method(small(config), small_teacher(config.data.channels)).train()
    assert isinstance(method, METHODS[config.method.name])
    assert method.backbone.widths == tuple(sorted(config.model.widths, reverse=True))
    if config.diagnostics.gradients:
        assert last_linear(method).requires_grad
    optimizer = make_optimizer(config.optim, method)
    schedule = make_schedule(config, steps_per_epoch=10)
    size = min(config.views.size or config.data.size, SIZE)
    count = config.view_count * (1 if config.method.neighbours is None else 2)
    # An early step, and the first one after slow start, where all widths train; at the very first the rate is about 0.
    for step in 1, max(2, int(config.slow_start * 10)):
        views = [torch.randn(BATCH, config.data.channels, size, size) for _ in range(count)]
        before = method.backbone.conv1.weight.clone()
        widths = schedule.widths_at(step)
        output = method(views, widths, schedule.momentum_at(step), torch.arange(BATCH))
        optimizer.zero_grad(set_to_none=True)
        output['loss'].backward()
        for group in optimizer.param_groups:
            group['lr'] = schedule.lr_at(step)
        optimizer.step()
        assert output['loss'].isfinite()
        assert not method.backbone.conv1.weight.equal(before)
        assert all(f'loss/{width:g}' in output for width in widths)
    assert widths == method.widths


# That they are the paper's


@pytest.mark.parametrize('epochs', [200, 800])
def test_mocov2(epochs):
    config = recipe(f'mocov2_resnet50_imagenet_{epochs}e')
    method, optim = config.method, config.optim
    assert config.model.widths == (1.0, 0.75, 0.5, 0.25)
    assert (method.queue_size, method.dim, method.hidden_dim, method.temperature) == (65536, 128, None, 0.2)
    assert (method.momentum, method.momentum_schedule, method.loss_weights) == (0.999, 'constant', 'full_plus_sum')
    assert (method.distillation, method.distillation_temperature) == ('kd', 5.0)
    assert (optim.name, optim.lr, optim.momentum, optim.weight_decay) == ('momentum', 0.2, 0.9, 1e-4)
    assert (config.data.batch_size, optim.warmup_epochs, optim.epochs) == (1024, 10, epochs)
    assert config.slow_start == epochs / 2
    assert (config.views.crop_min, config.views.blur_prob, config.views.gray_prob) == (0.2, 0.5, 0.2)
    assert config.second_views is None


def test_mocov3():
    config = recipe('mocov3_resnet50_imagenet_300e')
    method, optim = config.method, config.optim
    assert (method.dim, method.hidden_dim, method.temperature, method.distillation_temperature) == (256, 4096, 1, 1)
    assert (method.momentum, method.momentum_schedule, method.sync_bn) == (0.99, 'cosine', True)
    assert (optim.name, optim.lr, optim.lr_after_slow_start, optim.weight_decay) == ('lars', 1.2, 3.2, 1e-6)
    assert (optim.filter_bias_and_bn, optim.warmup_epochs, optim.epochs, config.slow_start) == (True, 10, 300, 150)
    first, second = config.views, config.second_views
    assert (first.blur_prob, first.solarize_prob, first.saturation) == (1.0, 0.0, 0.2)
    assert (second.blur_prob, second.solarize_prob, second.saturation) == (0.1, 0.2, 0.2)


def test_individual_networks():
    for width in 1.0, 0.75, 0.5, 0.25:
        for stem in 'mocov2_resnet50_imagenet_200e', 'supervised_resnet50_imagenet_100e':
            config = recipe(f'{stem}_w{100 * width:03.0f}')
            assert config.model.widths == (width,)
            assert replace(config, model=recipe(stem).model) == recipe(stem)
    for stem in 'mocov2_resnet50_imagenet_800e', 'mocov3_resnet50_imagenet_300e':
        alone, four = recipe(f'{stem}_w100'), recipe(stem)
        # The rate rises where narrower widths start, and here none does.
        optim = replace(four.optim, lr_after_slow_start=None)
        assert alone == replace(four, model=replace(four.model, widths=(1.0,)), optim=optim)


def test_supervised_and_three_widths():
    config = recipe('supervised_resnet50_imagenet_100e')
    views, optim, method = config.views, config.optim, config.method
    jitter = views.jitter_prob, views.brightness, views.contrast, views.saturation, views.hue
    assert jitter == (1.0, 0.4, 0.4, 0.4, 0.0)
    assert (optim.filter_bias_and_bn, method.distillation, method.loss_weights) == (True, 'none', 'none')
    for stem, base in (
        ('mocov2_resnet50_imagenet_200e_fig3', 'mocov2_resnet50_imagenet_200e_vanilla'),
        ('supervised_resnet50_imagenet_100e_fig3', 'supervised_resnet50_imagenet_100e'),
    ):
        three, four = recipe(stem), recipe(base)
        assert three.diagnostics.on
        model = replace(four.model, widths=(1.0, 0.5, 0.25))
        assert three == replace(four, model=model, diagnostics=three.diagnostics)


@pytest.mark.parametrize(
    'stem',
    [
        'mocov2_resnet50_imagenet_200e',
        'mocov3_resnet50_imagenet_300e',
        'simclr_resnet50_imagenet_100e',
        'supervised_resnet50_imagenet_100e',
    ],
)
def test_precision_is_the_papers(stem):
    assert recipe(stem).run.precision == 'fp16'


@pytest.mark.parametrize('stem', ['resnet20x4_cifar10_100e_fig5', 'resnet20_fashionmnist_20e_fig5'])
def test_sides_of_figure_5_differ_in_the_method_alone(stem):
    contrastive, supervised = recipe(f'mocov2_{stem}'), recipe(f'supervised_{stem}')
    assert replace(supervised, method=contrastive.method) == contrastive
    assert (contrastive.model.widths, contrastive.diagnostics.on) == ((1.0, 0.5), True)
    for config in contrastive, supervised:
        method = config.method
        assert (method.slow_start_epochs, method.distillation, method.loss_weights) == (0, 'none', 'none')
        alone = recipe(f'{method.name}_{stem}_w100')
        assert alone == replace(config, model=replace(config.model, widths=(1.0,)))


def test_ablations_change_what_their_table_names():
    """Each experiment is the baseline of the next table."""
    vanilla = recipe('mocov2_resnet50_imagenet_200e_vanilla').method
    assert (vanilla.slow_start_epochs, vanilla.distillation, vanilla.loss_weights) == (0, 'none', 'none')
    slow = recipe('ablations/table3b_slow_start_100').method
    assert slow == vanilla.replace(slow_start_epochs=100)
    for name in 'mse', 'atkd', 'dkd', 'kd':
        assert recipe(f'ablations/table3c_{name}').method == slow.replace(distillation=name)
    kd = recipe('ablations/table3c_kd').method
    for temperature in 3.0, 4.0, 5.0, 6.0:
        method = recipe(f'ablations/table3d_temperature_{temperature:g}').method
        assert method == kd.replace(distillation_temperature=temperature)
    for number, weights in enumerate(['full_plus_sum', 'full_plus_max', 'proportional', 'cumulative'], 1):
        method = recipe(f'ablations/table3e_weights_{number}').method
        assert method == kd.replace(loss_weights=weights)
    whole = recipe('mocov2_resnet50_imagenet_200e').method
    assert recipe('ablations/table3e_weights_1').method == whole.replace(slow_start_epochs=100)
    for start in 200, 300, 400, 500:
        config = recipe(f'ablations/table3f_slow_start_{start}')
        assert (config.slow_start, config.optim.epochs) == (start, 800)


def test_single_gpu_recipes_scale_with_the_batch():
    for name in 'mocov2_resnet50_imagenet_200e', 'mocov3_resnet50_imagenet_300e':
        full, one = recipe(name), recipe(f'{name}_1gpu')
        share = one.data.batch_size / full.data.batch_size
        assert one.optim.lr == pytest.approx(share * full.optim.lr)
        if full.optim.lr_after_slow_start:
            assert one.optim.lr_after_slow_start == pytest.approx(share * full.optim.lr_after_slow_start)
