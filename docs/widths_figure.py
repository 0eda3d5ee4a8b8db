"""Draw docs/assets/widths.png: accuracy of one file at four widths, beside networks trained one by one."""

from pathlib import Path

from slimclr_hub.evaluate.reported import REPORTED
from slimclr_hub.runs.figures import line_style, marker, new_figure
from slimclr_hub.weights.published import PUBLISHED, published_facts

SERIES = {
    'SlimCLR-MoCo v3, 300 epochs': 'one file, SlimCLR on MoCo v3, 300 epochs',
    'SlimCLR-MoCo v2, 800 epochs': 'one file, SlimCLR on MoCo v2, 800 epochs',
    'SlimCLR-MoCo v2, 200 epochs': 'one file, SlimCLR on MoCo v2, 200 epochs',
    'MoCo v2, individual networks': 'four trainings of MoCo v2, 200 epochs each',
}


def main() -> None:
    """Draw table 1 of the paper at the widths of ResNet-50."""
    figure, (axis,) = new_figure(width=7.5, height=4)
    cost = {facts.width: facts.multiply_adds / 1e9 for facts in published_facts(0)}
    for number, (series, label) in enumerate(SERIES.items()):
        (network,) = (of for of in REPORTED if of.method == series and len(of.costs) > 1)
        points = [(cost[width], top1) for width, top1 in network.result.top1.items()]
        style = line_style(number) if number < len(SERIES) - 1 else {'color': '0.5', 'linestyle': ':'}
        axis.plot(*zip(*points, strict=True), marker=marker(number), label=label, **style)
    for facts in published_facts(PUBLISHED['mocov3_300e_lincls_in1k'].num_classes):
        top1 = PUBLISHED['mocov3_300e_lincls_in1k'].reported[facts.width].top1
        text = f'width {facts.width:g}\n{facts.parameters / 1e6:.3g} M parameters'
        axis.annotate(text, (cost[facts.width], top1), (0, 9), textcoords='offset points', ha='center', fontsize=8)
    axis.set(xscale='log', xlim=(0.2, 6), ylim=(45, 79), ylabel='ImageNet top-1 (%)')
    axis.set_xticks(sorted(cost.values()), [f'{value:.3g} G' for value in sorted(cost.values())])
    axis.minorticks_off()
    axis.set_xlabel('multiply-adds for one image of 224x224; linear evaluation as reported by the paper')
    axis.legend(loc='lower right', fontsize=9)
    figure.tight_layout()
    figure.savefig(Path(__file__).parent / 'assets' / 'widths.png', dpi=120)


if __name__ == '__main__':
    main()
