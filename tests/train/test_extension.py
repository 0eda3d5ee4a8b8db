"""A method, a distillation and a network from a user's own file, by `--import`, through the real script."""

import yaml

from tests.train.runs import direct, direct_well, make_place, read_metrics

FILE = '''
import torch
import torch.nn.functional as F
from timm.models import register_model

from slimclr_hub.methods import register_distillation, register_method
from slimclr_hub.methods.objective import Objective
from slimclr_hub.models.registry import build
from slimclr_hub.models.slimmable_resnet import BasicBlock, SlimmableResNet


@register_distillation('l1')
def l1(student, teacher, target):
    return F.l1_loss(student, teacher)


@register_model
def slimclr_resnet8(pretrained=False, **kwargs):
    arch = {'block': BasicBlock, 'layers': (1, 1, 1), 'channels': (16, 32, 64), 'small_stem': True}
    return build(SlimmableResNet, 'slimclr_resnet8', pretrained, **{**arch, **kwargs})


@register_method('pairs')
class Pairs(torch.nn.Module):
    """Each first view finds its second one.

    Args:
        scale: Factor of the similarities.
    """

    def __init__(self, backbone, *, scale: float = 5.0, **options):
        super().__init__()
        self.backbone, self.widths, self.scale = backbone, backbone.widths, scale
        self.objective = Objective(backbone.widths, **options)

    def forward(self, views, widths, momentum=None, labels=None):
        first, second = (self.backbone.forward_widths(view, widths) for view in views)
        logits = {w: self.scale * F.normalize(first[w]) @ F.normalize(second[w]).T for w in widths}
        return self.objective(logits, torch.arange(len(views[0]), device=views[0].device))
'''
METHOD = {'name': 'pairs', 'scale': 4, 'distillation': 'l1', 'slow_start_epochs': 0}


def test_method_of_ones_own(tmp_path):
    place = make_place(tmp_path, optim={'epochs': 1}, knn={'every': 1}, model={'name': 'slimclr_resnet8'})
    content = yaml.safe_load((place / 'tiny.yaml').read_text())
    (place / 'tiny.yaml').write_text(yaml.safe_dump({**content, 'method': METHOD}))
    mine = place / 'mine.py'
    mine.write_text(FILE)
    unknown = direct(place)
    assert unknown.returncode != 0
    assert "'scale'" in unknown.stderr

    direct_well(place, '--import', 'mine.py', '--run.name', 'own')
    folder = place / 'runs' / 'own'
    recipe = yaml.safe_load((folder / 'recipe.yaml').read_text())
    assert list(recipe['imports']) == [str(mine)]
    assert (recipe['method']['scale'], recipe['method']['loss_weights']) == (4.0, 'full_plus_sum')
    last = read_metrics(folder, 'train')[-1]
    assert {'info_nce/1', 'distillation/0.25'} <= last.keys()

    # The recorded file is imported again.
    again = direct(place, '--config', str(folder / 'recipe.yaml'), '--run.name', 'again')
    assert again.returncode == 0, again.stderr
    assert read_metrics(place / 'runs' / 'again') == read_metrics(folder)
    mine.write_text(FILE + '# changed\n')
    changed = direct(place, '--resume', str(folder))
    assert changed.returncode != 0
    assert 'has changed since the recipe was recorded' in changed.stderr
    mine.unlink()
    assert 'mine.py is to be imported and is not there' in direct(place, '--resume', str(folder)).stderr
