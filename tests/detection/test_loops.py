"""Evaluation by width, its report and the guard of checkpoints: a small detector on the coins in mmengine's runner."""

import json
import re
import shutil

import pytest
import timm
import torch
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.runner import Runner
from PIL import Image

from slimclr_hub.detection.coins import write_coins
from slimclr_hub.detection.precision import History, by_width, draw_history, precision_table
from slimclr_hub.errors import InputError
from tests.detection.small import MODELS, config, detector
from tests.hub.files import ROOT

PIPELINE = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(48, 48), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
HOOKS = [dict(type=f'{name}Hook') for name in ('WidthReport', 'CheckpointGuard', 'SyncBuffers', 'ClassesGuard')]


@pytest.fixture(scope='module')
def coins(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data') / 'coins'
    write_coins(folder)
    return folder


def loader(coins, split, pipeline, batch_size=1, **changes):
    return dict(
        batch_size=batch_size,
        num_workers=0,
        sampler=dict(type='DefaultSampler', shuffle=split == 'train'),
        dataset=dict(
            type='CoinsFolder',
            data_root=str(coins),
            ann_file=f'annotations/{split}.json',
            data_prefix=dict(img=split),
            pipeline=pipeline,
            **changes,
        ),
    )


def validation(coins, stage='val'):
    metric = dict(type='CocoMetric', ann_file=str(coins / 'annotations' / 'val.json'), metric=['bbox', 'segm'])
    return {f'{stage}_dataloader': loader(coins, 'val', PIPELINE), f'{stage}_evaluator': metric}


def runner(coins, work_dir, model=None, **changes):
    settings = dict(
        model=model or detector(),
        work_dir=str(work_dir),
        **validation(coins, 'test'),
        test_cfg=dict(type='SlimmableTestLoop'),
        custom_hooks=HOOKS,
        default_hooks=dict(logger=dict(type='LoggerHook')),
        default_scope='mmdet',
        experiment_name=f'{work_dir.name}-{len(list(work_dir.iterdir()))}',
        log_level='INFO',
    )
    return Runner(**{**settings, **changes})


def training(coins):
    read, resize, annotate, _ = PIPELINE
    pipeline = [read, annotate, resize, dict(type='PackDetInputs')]  # annotations are resized, too
    return dict(
        train_dataloader=loader(coins, 'train', pipeline, batch_size=2, indices=2),
        train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=1),
        optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=1e-3)),
    )


def test_every_width_is_evaluated(coins, tmp_path, capfd):
    model = detector()
    used = []
    model.backbone.register_forward_hook(lambda module, args, output: used.append(module.width))
    metrics = runner(coins, tmp_path, model).test()
    assert used == [1.0, 1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]
    assert {key.partition('/')[0] for key in metrics} == {'width_1.00', 'width_0.75', 'width_0.50', 'width_0.25'}
    assert {key.partition('/')[2] for key in metrics} >= {'coco/bbox_mAP', 'coco/segm_mAP'}
    assert model.width == 1.0
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert 'test at width 0.25' in log
    assert 'Average precision (%) by width' in log


def test_predictions_are_those_of_the_width(coins, tmp_path):
    """Each width's file holds that width's predictions, and the prefix is restored afterwards."""
    prefix = str(tmp_path / 'found')
    metric = dict(
        type='CocoMetric',
        ann_file=str(coins / 'annotations' / 'val.json'),
        metric=['bbox'],
        outfile_prefix=prefix,
        format_only=True,
    )
    test = runner(coins, tmp_path, test_evaluator=metric)
    test.test()
    assert test.test_loop.evaluator.metrics[0].outfile_prefix == prefix
    found = {w: json.loads((tmp_path / f'found.width_{w}.bbox.json').read_text()) for w in ('1.00', '0.50')}
    model = detector().eval()
    for name, records in found.items():
        with model.set_width(float(name)), torch.no_grad():
            (sample,) = model.test_step(next(iter(test.test_dataloader)))
        ours = [record['score'] for record in records if record['image_id'] == sample.img_id]
        assert ours == pytest.approx(sample.pred_instances.scores.tolist(), abs=1e-5)
    assert found['1.00'] != found['0.50']


@pytest.mark.parametrize('widths', [0.5, [0.5], (0.25, 1.0)])
def test_chosen_widths(coins, tmp_path, widths):
    metrics = runner(coins, tmp_path, test_cfg=dict(type='SlimmableTestLoop', widths=widths)).test()
    several = [widths] if isinstance(widths, float) else widths
    assert {key.partition('/')[0] for key in metrics} == {f'width_{width:.2f}' for width in several}


def test_files_of_mim_test_are_of_one_width_each(coins, tmp_path):
    """The options --out and --show-dir give each width its own files."""
    test = runner(
        coins,
        tmp_path,
        test_evaluator=dict(type='DumpDetResults', out_file_path=str(tmp_path / 'found.pkl')),
        test_cfg=dict(type='SlimmableTestLoop', widths=(1.0, 0.5)),
        default_hooks=dict(
            logger=dict(type='LoggerHook'),
            visualization=dict(type='DetVisualizationHook', draw=True, test_out_dir=str(tmp_path / 'drawn')),
        ),
        visualizer=dict(type='DetLocalVisualizer'),
    )
    test.test()
    for name in 'width_1.00', 'width_0.50':
        assert (tmp_path / f'found.{name}.pkl').exists()
        assert sorted(path.name for path in (tmp_path / 'drawn' / name).iterdir()) == ['01.png', '02.png']
    assert not (tmp_path / 'found.pkl').exists()


def test_classes_are_known_without_data(tmp_path):
    """`init_detector` asks for classes where there is no COCO, and must not write the coins."""
    for kind, classes in ('CocoFolder', 80), ('CoinsFolder', 1):
        about = dict(data_root=str(tmp_path / 'no'), ann_file='a.json', data_prefix=dict(img='i'), lazy_init=True)
        assert len(DATASETS.build(dict(type=kind, **about)).metainfo['classes']) == classes
    assert not (tmp_path / 'no').exists()
    (tmp_path / 'part' / 'i').mkdir(parents=True)
    with pytest.raises(InputError, match=r'no a\.json in .*part; delete this folder'):
        DATASETS.build(
            dict(type='CoinsFolder', data_root=str(tmp_path / 'part'), ann_file='a.json', data_prefix=dict(img='i'))
        )


def test_wrong_width(coins, tmp_path):
    with pytest.raises(InputError, match=r"width 0\.6 is not one of this network's widths, 1\.0, 0\.75, 0\.5, 0\.25"):
        runner(coins, tmp_path, test_cfg=dict(type='SlimmableTestLoop', widths=0.6)).test_loop  # noqa: B018
    with pytest.raises(InputError, match=r'width 0\.6 is not one of'):
        runner(
            coins,
            tmp_path,
            **training(coins),
            **validation(coins),
            val_cfg=dict(type='SlimmableValLoop', widths=[1.0, 0.6]),
        ).train()


def test_detector_of_one_width_has_nothing_to_switch(coins, tmp_path):
    plain = config(type='MaskRCNN')
    with pytest.raises(InputError, match='MaskRCNN has no widths to evaluate'):
        runner(coins, tmp_path, MODELS.build(plain)).test_loop  # noqa: B018


# Classes


@pytest.fixture(scope='module')
def two_classes(coins, tmp_path_factory):
    """Keywords of a data set with a coin and a token, in this order."""
    content = json.loads((coins / 'annotations' / 'train.json').read_text())
    content['categories'] = [{'id': 1, 'name': 'coin'}, {'id': 7, 'name': 'token'}]
    content['annotations'][0]['category_id'] = 7
    annotations = tmp_path_factory.mktemp('annotations') / 'two.json'
    annotations.write_text(json.dumps(content))
    return dict(type='CocoFolder', data_root=str(coins), ann_file=str(annotations), data_prefix=dict(img='train'))


@pytest.mark.parametrize(
    ('classes', 'message'),
    [
        (('coin', 'tokn'), 'metainfo names tokn, which it has not; metainfo leaves out token'),
        (('coin',), r'metainfo leaves out token; some_classes=True'),
        (('token', 'coin'), 'in another order, token; coin, which would swap labels'),
        (('coin', 'token', 'note'), 'metainfo names note, which it has not'),
        ('coin', 'metainfo names c; o; i; n, which it has not'),  # a tuple that has lost its comma
        (None, r'metainfo names person; .* and 75 more'),  # COCO's
    ],
)
def test_classes_are_those_of_the_annotations(two_classes, classes, message):
    named = {} if classes is None else dict(metainfo=dict(classes=classes))
    with pytest.raises(InputError, match=f'two.json has the classes coin; token in this order: .*{message}') as error:
        DATASETS.build({**two_classes, **named})
    assert '\n' not in str(error.value)


def test_a_part_of_the_classes_where_asked_for(two_classes):
    data = DATASETS.build({**two_classes, 'metainfo': dict(classes=('token',)), 'some_classes': True})
    assert [box['bbox_label'] for i in range(len(data)) for box in data.get_data_info(i)['instances']] == [0]


def test_heads_for_another_number_of_classes(coins, two_classes, tmp_path):
    changes = training(coins)
    named = dict(metainfo=dict(classes=('coin', 'token')))
    changes['train_dataloader']['dataset'].update({**two_classes, **named})
    message = r'the data have 2 classes \(coin; token\), and model\.roi_head\.bbox_head\.num_classes is 1; give 2'
    with pytest.raises(InputError, match=message):
        runner(coins, tmp_path, **changes).train()
    test = validation(coins, 'test')
    test['test_dataloader']['dataset'].update({**two_classes, **named})
    with pytest.raises(InputError, match=message):
        runner(coins, tmp_path, **test).test()


# Checkpoints


def test_checkpoint_of_this_detector(coins, tmp_path):
    saved = detector(seed=1)
    torch.save({'state_dict': {f'module.{k}': v for k, v in saved.state_dict().items()}}, tmp_path / 'c.pth')
    model = detector()
    runner(coins, tmp_path, model, load_from=str(tmp_path / 'c.pth')).load_or_resume()
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in model.state_dict().items())


def fewer_widths(tensors):
    return {name: value for name, value in tensors.items() if '.w075.' not in name}


def other_classes(tensors):
    return {**tensors, 'roi_head.bbox_head.fc_cls.weight': torch.zeros(81, 16)}


def of_the_authors(tensors):
    return {'backbone.conv1.weight': torch.zeros(64, 3, 7, 7)}


def backbone_alone(tensors):
    return {'conv1.weight': torch.zeros(64, 3, 7, 7)}


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (fewer_widths, r'backbone\.network\.bn1\.w075\.weight is missing.*Widths, classes and type'),
        (other_classes, r'fc_cls\.weight has shape \[81, 16\], not \[2, 16\].*custom_hooks\.1\.other_heads=True'),
        (of_the_authors, r'backbone\.network.* is missing.*slimclr-hub convert'),
        (backbone_alone, r'model\.backbone\.weights'),
    ],
)
def test_checkpoint_of_another_detector(coins, tmp_path, change, message):
    model = detector()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.save({'state_dict': change(model.state_dict())}, tmp_path / 'c.pth')
    with pytest.raises(InputError, match=f'the checkpoint is of another detector: .*{message}'):
        runner(coins, tmp_path, model, load_from=str(tmp_path / 'c.pth')).load_or_resume()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_heads_of_other_classes_where_asked_for(coins, tmp_path):
    saved, model = detector(seed=1), detector()
    torch.save({'state_dict': other_classes(saved.state_dict())}, tmp_path / 'c.pth')
    hooks = [dict(type='CheckpointGuardHook', other_heads=True)]
    runner(coins, tmp_path, model, load_from=str(tmp_path / 'c.pth'), custom_hooks=hooks).load_or_resume()
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert 'Not taken from the checkpoint: roi_head.bbox_head.fc_cls.weight has shape [81, 16], not [2, 16]' in log
    ours, theirs = model.state_dict(), saved.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if name != 'roi_head.bbox_head.fc_cls.weight')
    torch.save({'state_dict': fewer_widths(saved.state_dict())}, tmp_path / 'c.pth')
    with pytest.raises(InputError, match='w075'):
        runner(coins, tmp_path, load_from=str(tmp_path / 'c.pth'), custom_hooks=hooks).load_or_resume()


def test_best_checkpoint_needs_a_width(coins, tmp_path):
    best = dict(checkpoint=dict(type='CheckpointHook', save_best='coco/bbox_mAP', rule='greater'))
    with pytest.raises(InputError, match=r"save_best 'coco/bbox_mAP' names no width; .* width_1\.00/coco/bbox_mAP"):
        runner(coins, tmp_path, **training(coins), default_hooks=best).train()


def test_iterations_are_counted_where_the_loop_does(coins, tmp_path):
    changes = training(coins)
    changes['train_dataloader']['sampler'] = dict(type='InfiniteSampler')
    changes['train_cfg'] = dict(type='IterBasedTrainLoop', max_iters=2, val_interval=1)
    val = dict(type='SlimmableValLoop', widths=0.25)
    runner(coins, tmp_path, **changes, **validation(coins), val_cfg=val).train()
    assert [*json.loads((tmp_path / 'ap_by_width.json').read_text())] == ['1', '2']
    assert 'by width after iteration 2' in next(tmp_path.glob('*/*.log')).read_text()


def test_checkpoints_of_another_run_are_kept(coins, tmp_path):
    (tmp_path / 'last_checkpoint').write_text('epoch_1.pth')
    (tmp_path / 'epoch_1.pth').write_bytes(b'precious')
    with pytest.raises(InputError, match=re.escape(f'{tmp_path} holds the checkpoints of another run: add --resume')):
        runner(coins, tmp_path, **training(coins)).train()
    assert (tmp_path / 'epoch_1.pth').read_bytes() == b'precious'


# The report


def test_history_goes_on_where_a_run_resumes(tmp_path):
    path = tmp_path / 'ap.json'
    first = History(path, resumed=False)
    for epoch in 1, 2, 3:
        first.add(epoch, {'width_1.00/coco/bbox_mAP': epoch / 10, 'text': 'not a number'})
    resumed = History(path, resumed=True)
    assert resumed.metrics == {e: {'width_1.00/coco/bbox_mAP': e / 10} for e in (1, 2, 3)}
    resumed.add(2, {'width_1.00/coco/bbox_mAP': 0.9})  # gone on from the first epoch's checkpoint
    assert [*History(path, resumed=True).metrics] == [1, 2]
    assert json.loads(path.read_text())['2'] == {'width_1.00/coco/bbox_mAP': 0.9}
    assert History(path, resumed=False).metrics == {}


def test_table():
    metrics = {
        'width_1.00/coco/bbox_mAP': 0.386,
        'width_1.00/coco/bbox_mAP_50': 0.601,
        'width_0.50/coco/bbox_mAP': 0.358,
        'width_0.50/coco/bbox_mAP_50': -1.0,
    }
    network = timm.create_model('slimclr_resnet50', device='meta')
    table = precision_table(by_width(metrics), network)
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in table.splitlines()]
    assert [row for row in rows if '---' not in row[0]] == [
        ['width', 'backbone', 'box AP', 'box AP50'],
        ['1', '25.6 M', '38.6', '60.1'],
        ['0.5', '6.9 M', '35.8', ''],
    ]
    assert precision_table(by_width({'width_1.00/lvis/bbox_AP': 0.3}), network) == ''


def test_figure(tmp_path):
    steps = {e: {f'width_{w}/coco/{k}_mAP': e / 10 for w in ('1.00', '0.25') for k in ('bbox', 'segm')} for e in (1, 2)}
    assert draw_history(steps, 'epoch', tmp_path / 'a.png')
    with Image.open(tmp_path / 'a.png') as image:
        assert image.size == (1200, 480)  # two panels
    assert not draw_history({1: {'width_1.00/lvis/bbox_AP': 0.3}}, 'epoch', tmp_path / 'b.png')
    assert not (tmp_path / 'b.png').exists()


# Images and classes of a user's own


@pytest.fixture
def own(coins, tmp_path):
    """The coins as two classes whose ids have gaps, with a crowd and an image without annotations, and the content."""
    folder = tmp_path / 'own'
    shutil.copytree(coins, folder)
    contents = {}
    for split in 'train', 'val':
        content = json.loads((folder / 'annotations' / f'{split}.json').read_text())
        content['categories'] = [{'id': 7, 'name': 'large'}, {'id': 3, 'name': 'small'}]
        for annotation in content['annotations']:
            annotation['category_id'] = 7 if annotation['area'] > 1500 else 3
        content['annotations'][0]['iscrowd'] = 1
        if split == 'train':
            content['annotations'] = [a for a in content['annotations'] if a['image_id'] != 2]
        contents[split] = content
        (folder / 'annotations' / f'{split}.json').write_text(json.dumps(content))
    return folder, contents


def own_config(folder, monkeypatch):
    monkeypatch.setenv('COCO_ROOT', str(folder))
    return Config.fromfile(ROOT / 'transfer' / 'mask_rcnn_slim_own.py')


def test_own_classes_are_read_from_the_annotations(own, monkeypatch):
    folder, contents = own
    settings = own_config(folder, monkeypatch)
    assert settings.model.roi_head.bbox_head.num_classes == settings.model.roi_head.mask_head.num_classes == 2
    train, val = (DATASETS.build(settings[f'{split}_dataloader'].dataset) for split in contents)
    assert train.metainfo['classes'] == val.metainfo['classes'] == ('large', 'small')
    assert (len(train), len(val)) == (11, 2)  # training leaves the image without annotations out
    settings.train_dataloader.dataset.filter_cfg.filter_empty_gt = False
    assert len(DATASETS.build(settings.train_dataloader.dataset)) == 12
    instances = [instance for i in range(len(train)) for instance in train.get_data_info(i)['instances']]
    expected = [
        (annotation['category_id'] == 3, annotation['iscrowd']) for annotation in contents['train']['annotations']
    ]
    assert [(box['bbox_label'], box['ignore_flag']) for box in instances] == expected
    assert Config.fromstring(settings.pretty_text, '.py').classes == ('large', 'small')  # as checkpoints keep it


def test_own_classes_train_and_evaluate(own, tmp_path):
    """With a crowd, and an image without annotations alone in its batch."""
    folder, _ = own
    about = dict(type='CocoFolder', metainfo=dict(classes=('large', 'small')))
    changes = {**training(folder), **validation(folder), 'val_cfg': dict(type='SlimmableValLoop')}
    changes['train_dataloader']['batch_size'] = 1
    changes.update(validation(folder, 'test'))
    for stage in 'train', 'val', 'test':
        changes[f'{stage}_dataloader']['dataset'].update(about)
    heads = dict(num_classes=2)
    small = config()
    small.roi_head.bbox_head.update(heads)
    small.roi_head.mask_head.update(heads)
    run = runner(folder, tmp_path, MODELS.build(small), **changes)
    losses = []
    step = run.model.train_step
    run.model.train_step = lambda *data, **options: losses.append(step(*data, **options)) or losses[-1]
    run.train()
    assert len(losses) == 2
    assert all(value.isfinite().all() for log in losses for value in log.values())
    kept = json.loads((tmp_path / 'ap_by_width.json').read_text())['1']
    assert {key for key in kept if key.endswith('bbox_mAP')} == {
        f'width_{width:.2f}/coco/bbox_mAP' for width in run.model.widths
    }


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (
            lambda content: content['annotations'][1].pop('iscrowd'),
            'annotation 2 has no iscrowd; each needs image_id, ',
        ),
        (lambda content: content['annotations'][1].update(segmentation=[]), 'annotation 2 has no segmentation;'),
        (lambda content: content['annotations'][1].update(category_id=1), 'annotation 2 has the category_id 1, which'),
        (lambda content: content['annotations'][1].update(image_id=99), 'annotation 2 has the image_id 99, which'),
        (lambda content: content['images'][0].update(file_name='x.png'), r'1 of 12 images are not in .*train: x\.png'),
        (lambda content: content['annotations'].clear(), r"filter_cfg=.*'filter_empty_gt': True.* leaves none of its"),
    ],
)
def test_own_annotations_are_checked_before_training(own, damage, message, monkeypatch):
    folder, contents = own
    damage(contents['train'])
    (folder / 'annotations' / 'train.json').write_text(json.dumps(contents['train']))
    dataset = own_config(folder, monkeypatch).train_dataloader.dataset
    with pytest.raises(InputError, match=rf'^annotations/train\.json: .*{message}|train\.json: {message}') as error:
        DATASETS.build(dataset)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        (None, r'no annotations/train\.json in .*; COCO_ROOT \(environment\) is the folder'),
        ('{}', "train.json is not in COCO's format: KeyError 'categories'"),
        ('{"categories": []}', 'train.json names no class'),
        ('{"categories": [{"name": "a"}, {"name": "a"}]}', 'train.json names a class twice: a; a'),
    ],
)
def test_own_classes_that_cannot_be_read(text, message, tmp_path, monkeypatch):
    (tmp_path / 'annotations').mkdir()
    if text is not None:
        (tmp_path / 'annotations' / 'train.json').write_text(text)
    with pytest.raises(InputError, match=message):
        own_config(tmp_path, monkeypatch)
