"""The command `slimclr-hub`. Each sub-command parses, calls the room that does the work, and prints the outcome."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from slimclr_hub.errors import ExportError, InputError
from slimclr_hub.text import print_anything, printable

if TYPE_CHECKING:
    from rich.table import Table

app = typer.Typer(
    help='Slimmable self-supervised networks: the zoo, and every way to take a network away.',
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Network = Annotated[str, typer.Argument(help='A tag (slimclr-hub list), hf-hub:USER/NAME, a folder or .safetensors.')]
Images = Annotated[list[Path], typer.Argument(help='Image files, and folders of images.')]
Width = Annotated[float | None, typer.Option(help='Width to run at; by default the largest.')]
Overwrite = Annotated[bool, typer.Option('--overwrite', help='Replace existing files.')]
BatchSize = Annotated[int, typer.Option(help='Images of a batch.')]
Workers = Annotated[int | None, typer.Option(help='Processes that decode images.')]
Device = Annotated[str | None, typer.Option(help='Device, such as cuda:1; by default an accelerator if there is one.')]
Encoder = Literal['online', 'momentum']
DenseFormat = Literal['timm', 'torchvision', 'mmdet']
ExportFormat = Literal['onnx', 'openvino', 'executorch', 'litert', 'pt2']
Precision = Literal['no', 'fp16', 'bf16']
Resolutions = Annotated[Path | None, typer.Option(help='Statistics for --size: `slimclr-hub resolutions`.')]
Pixels = Annotated[int | None, typer.Option(help='Height and width of images, with --resolutions.')]
Skip = Annotated[bool, typer.Option('--skip-unreadable', help='Leave out images that cannot be read.')]


def main() -> None:
    """Run the command; a user's mistake is one line on standard error and exit status 1."""
    print_anything()
    # The line that says where weights come from.
    logging.basicConfig(format='%(message)s', level=logging.WARNING)
    for handler in logging.root.handlers:
        handler.addFilter(_printable)
    logging.getLogger('slimclr_hub').setLevel(logging.INFO)
    try:
        if '' in sys.argv[1:]:  # which a path would take for this folder
            raise InputError('an argument is empty, perhaps of a variable that is not set; give a name')
        app(prog_name='slimclr-hub')
    except (InputError, ExportError, OSError) as error:
        from rich.console import Console

        Console(stderr=True, soft_wrap=True, highlight=False).print('[bold red]Error:[/] ', end='')
        print(printable(error), file=sys.stderr)
        raise SystemExit(1) from None


def _printable(record: logging.LogRecord) -> bool:
    record.msg, record.args = printable(record.getMessage()), ()
    return True


@app.command('list')
def list_networks() -> None:
    """List the networks with weights: cost of each width, and accuracies."""
    from slimclr_hub.runs.result import load
    from slimclr_hub.weights.published import ARCHITECTURE, PUBLISHED, SHIPPED, published_facts

    table = _table(['tag', 'width', 'params', 'mult-adds', 'top-1', 'box AP', 'mask AP'], f'{ARCHITECTURE}.TAG')
    for published in PUBLISHED.values():
        for i, fact in enumerate(published_facts(published.num_classes)):
            reported = published.reported[fact.width]
            aps = ['' if ap is None else f'{ap:.1f}' for ap in (reported.box_ap, reported.mask_ap)]
            last = i == len(published.reported) - 1
            table.add_row(
                '' if i else published.tag, *fact.cells.values(), f'{reported.top1:.1f}', *aps, end_section=last
            )
    _print(table)
    print(
        'mult-adds: for one image of 224x224. As the paper reports: top-1 of a linear probe on\n'
        'ImageNet (%), AP on COCO of a Mask R-CNN fine-tuned from it. A tag with lincls in its name has the probe.\n'
        f"timm.create_model('{ARCHITECTURE}.{next(iter(PUBLISHED))}', pretrained=True, width=0.5)\n"
    )
    first = next(iter(SHIPPED.values()))
    table = _table(['tag', 'width', 'params', 'mult-adds', 'top-1'], f'{first.architecture}.TAG')
    for shipped in SHIPPED.values():
        top1 = next(result.top1 for result in load(shipped.results) if result.protocol.kind == 'linear')
        for i, fact in enumerate(published_facts(shipped.num_classes, shipped.architecture)):
            cells = ('' if i else shipped.tag, *fact.cells.values(), f'{top1[fact.width]:.1f}')
            table.add_row(*cells, end_section=i == len(top1) - 1)
    _print(table)
    print(
        f'In the package, for grey images of {first.size}x{first.size}: top-1 of a linear probe on {first.data} (%).\n'
        f"timm.create_model('{first.architecture}', pretrained=True, width=0.5)"
    )


@app.command()
def info(network: Network) -> None:
    """Describe a network: widths, cost, head, preprocessing, and the origin of its weights."""
    model = _described(network)
    cfg = model.pretrained_cfg
    size = cfg['input_size'][-1]
    head = f'{model.head}, {model.num_classes} classes' if model.num_classes else 'none'
    print(printable(f'{cfg.get("architecture")}, head: {head}'))
    mean, std = ([round(value, 4) for value in cfg[key]] for key in ('mean', 'std'))
    print(f'images: {model.in_chans} channels, {size}x{size}, mean {mean}, std {std}, crop {cfg["crop_pct"]}')
    for key in ('tag', 'description', 'license', 'origin_url'):
        if cfg.get(key):
            print(f'{key}: {printable(cfg[key])}')
    _print(_needs_table(model.describe(), _known_accuracies(network, model)))


@app.command()
def latency(
    network: Network,
    width: Annotated[list[float] | None, typer.Option(help='Widths; all unless given, repeat for each.')] = None,
    size: Annotated[list[int] | None, typer.Option(help="Heights of images; the network's unless given.")] = None,
    batch_size: Annotated[list[int] | None, typer.Option(help='Images of a batch; 1 unless given.')] = None,
    threads: Annotated[list[int] | None, typer.Option(help="Threads of the CPU; PyTorch's unless given.")] = None,
    runtime: Annotated[list[str] | None, typer.Option(help='torch, onnxruntime, openvino; torch unless given.')] = None,
    repeats: Annotated[int, typer.Option(help='Repeats of each case, all in turns.')] = 50,
    device: Annotated[str, typer.Option(help='Device of PyTorch, such as cuda.')] = 'cpu',
    figure: Annotated[Path | None, typer.Option(help='Draw accuracy over milliseconds, as PNG and PDF.')] = None,
) -> None:
    """Measure milliseconds of each width on this machine, and keep them for `choose` and `create_model(max_ms=...)`."""
    from itertools import product

    import torch

    from slimclr_hub.inference.latency import draw_timings, measure, timings_table
    from slimclr_hub.models.budget import RUNTIMES, Setting, read_table, table_path, versions_of
    from slimclr_hub.runs.figures import figure_name

    _check_drawing(figure)
    for name in runtime or RUNTIMES[:1]:
        if name in RUNTIMES:
            versions_of(name)  # before a network is downloaded
    model = _on_device(network, None, device, lazy=False)
    settings = [
        Setting(pixels, images, count, name, device)
        for pixels, images, count, name in product(
            size or [model.pretrained_cfg['input_size'][-1]],
            batch_size or [1],
            threads or [torch.get_num_threads()],
            runtime or RUNTIMES[:1],
        )
    ]
    found, path = measure(model, settings, repeats, width), table_path(model)
    try:
        table = read_table(path).with_timings(found)
    except (FileNotFoundError, InputError):  # what cannot be read is replaced
        table = found
    _print(timings_table(found.timings))
    table.save(path)
    if figure:
        draw_timings(found.timings, _known_accuracies(network, model), figure_name(figure))
    print(f'{found.machine}: kept in {path}')


@app.command()
def choose(
    network: Network,
    max_ms: Annotated[float | None, typer.Option(help='Milliseconds of a batch.')] = None,
    max_mib: Annotated[float | None, typer.Option(help="MiB of a width's tensors.")] = None,
    max_macs: Annotated[float | None, typer.Option(help='Multiply-adds of an image, such as 1e9.')] = None,
    size: Annotated[int | None, typer.Option(help="Height of images; the network's unless given.")] = None,
    batch_size: Annotated[int, typer.Option(help='Images of a batch.')] = 1,
    threads: Annotated[int | None, typer.Option(help="Threads of the CPU; PyTorch's unless given.")] = None,
    runtime: Annotated[str, typer.Option(help='torch, onnxruntime or openvino.')] = 'torch',
    device: Annotated[str, typer.Option(help='Device of PyTorch, such as cuda.')] = 'cpu',
    resolutions: Annotated[Path | None, typer.Option(help='Choose the size, too: `slimclr-hub resolutions`.')] = None,
) -> None:
    """Choose the widest width within a budget, or the best pair of width and size, and say why."""
    import torch

    from slimclr_hub.models.budget import Budget, Setting
    from slimclr_hub.models.budget import choose as choose_width
    from slimclr_hub.models.resolutions import load_resolutions

    budget = Budget(max_ms, max_mib, max_macs)
    if not budget:
        raise InputError('no budget; give --max-ms, --max-mib or --max-macs')
    if resolutions is not None and size is not None:
        raise InputError(f'--size {size}: a size of {resolutions} is chosen; leave one of the two out')
    found = None if resolutions is None else load_resolutions(resolutions)
    model = _described(network) if found is None else _on_device(network, None, 'cpu', lazy=False)
    if found is not None:
        model.load_resolutions(resolutions)  # which are of these weights, or refused
    pixels = model.pretrained_cfg['input_size'][-1] if size is None else size
    setting = Setting(pixels, batch_size, torch.get_num_threads() if threads is None else threads, runtime, device)
    choice = choose_width(model, budget, setting, found)
    if found is None:
        _print(_needs_table(list(choice.needs.values()), _known_accuracies(network, model)))
        print(choice.why)
        print(f"timm.create_model('{_in_timm(network)}', pretrained=True, width={choice.width:g})")
        if max_ms or max_macs:
            command = f'slimclr-hub resolutions {network} IMAGES --size PIXELS --out resolutions.safetensors'
            print(f'Smaller images may be better than fewer channels: {command}')
        return
    _print(_pairs_table(choice.needs))
    print(choice.why if found.tested else f'No accuracies are known of sizes. {choice.why}')
    arguments = f"pretrained=True, width={choice.width:g}, resolutions='{resolutions}'"
    print(f"model = timm.create_model('{_in_timm(network)}', {arguments})")
    print(f'model.set_resolution({choice.size})')


@app.command()
def fetch(network: Network, width: Width = None) -> None:
    """Download a network into the cache, for use offline: all of it, or only what widths up to one need."""
    from slimclr_hub.hub.open import open_network

    arguments: dict[str, Any] = {} if width is None else {'width': width, 'lazy': True}
    model = open_network(network, **arguments)
    words = ''.join(f', {key}={value}' for key, value in arguments.items()) if len(model.widths) > 1 else ''
    print(printable(f'{network}: widths up to {width or model.widths[0]:g} are on this machine'))
    call = f"timm.create_model('{_in_timm(network)}', pretrained=True{words})"
    print(printable(f'Without a connection: HF_HUB_OFFLINE=1, {call}'))


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="The authors' checkpoint, a ResNet's, or one of MoCo v2 or v3.")],
    target: Annotated[Path, typer.Argument(help='A folder for timm, or a .safetensors; .pth for a whole detector.')],
    encoder: Annotated[Encoder, typer.Option(help='Which network of a pre-training checkpoint.')] = 'online',
    width: Annotated[list[float] | None, typer.Option(help='Widths for a plain network; repeat for each.')] = None,
    overwrite: Overwrite = False,
) -> None:
    """Convert a foreign checkpoint into weights of this package."""
    from slimclr_hub.hub.folder import convert_file
    from slimclr_hub.models import DEFAULT_WIDTHS
    from slimclr_hub.models.widths import check_widths

    widths = check_widths(width) if width else DEFAULT_WIDTHS
    if target.suffix == '.pth' and _convert_detector(source, target, overwrite):
        return
    done = convert_file(source, target, encoder=encoder, widths=widths, overwrite=overwrite)
    probe = f', with a probe of {done.layout.num_classes} classes' if done.layout.num_classes else ''
    print(
        f'{printable(done.path)}: {done.layout.architecture}, widths {", ".join(map(str, done.layout.widths))}{probe}'
    )
    if done.tag:
        print(f'By its name it is the published {done.tag}.')
    if not done.calibrated:
        options = f'--model.name {done.layout.architecture} --model.weights {target}'
        if widths != DEFAULT_WIDTHS:
            options += f" --model.widths '{list(widths)}'"
        print(f'A start for training: accelerate launch recipes/pretrain.py {options}')
    elif target.suffix != '.safetensors':
        print(f"Open it: timm.create_model('local-dir:{target}', pretrained=True, width={done.layout.widths[-1]})")


@app.command()
def extract(
    network: Network,
    target: Annotated[Path, typer.Argument(help='A folder for timm; a .pth or .safetensors file for the others.')],
    width: Annotated[float, typer.Option(help='Width to take.')],
    format: Annotated[DenseFormat, typer.Option(help='Whose format.')] = 'timm',
    config: Annotated[Path | None, typer.Option(help="A detector's config, which runs and is kept whole.")] = None,
    resolutions: Resolutions = None,
    size: Pixels = None,
    overwrite: Overwrite = False,
) -> None:
    """Extract one width as an ordinary network that opens without this package.

    With `--format mmdet`, the checkpoint of a slimmable detector gives a detector.
    """
    from slimclr_hub.hub import formats
    from slimclr_hub.hub.folder import check_file, check_folder
    from slimclr_hub.hub.open import open_network

    if _extract_detector(Path(network), target, width, format, config, overwrite):
        return
    if config:
        raise InputError(f'--config {config}: {network} is no slimmable detector; leave it out')
    _check_resolution(resolutions, size)
    if format == 'timm':
        check_folder(target, overwrite)
    else:
        check_file(target, overwrite)
    model = open_network(network, width=width)
    _set_resolution(model, resolutions, size)
    if format == 'timm':
        formats.save_timm_folder(model, width, target, tagged='tag' in model.pretrained_cfg)
        print(f"Open it: timm.create_model('local-dir:{target}', pretrained=True)")
    elif format == 'torchvision':
        formats.save_tensors(formats.torchvision_state_dict(model, width), target)
        print(f'{target}: a state dict for torchvision')
    else:
        backbone = formats.mmdet_config(model, width, str(target))
        formats.save_tensors(formats.mmdet_state_dict(model, width), target)
        print(f'backbone = {backbone!r}')
        with model.set_width(width):
            print(f'neck in_channels: {[stage["num_chs"] for stage in model.feature_info[1:]]}')


@app.command()
def export(
    network: Network,
    target: Annotated[Path, typer.Argument(help='Folder for the files.')],
    format: Annotated[ExportFormat, typer.Option(help='For which runtime; pt2 is an ExportedProgram of PyTorch.')],
    width: Annotated[list[float] | None, typer.Option(help='Widths; all unless given, repeat for each.')] = None,
    size: Annotated[int | None, typer.Option(help="Height and width of images; the network's unless given.")] = None,
    resolutions: Resolutions = None,
    int8: Annotated[bool, typer.Option('--int8', help='Quantise to 8 bits, by the images of --calibration.')] = False,
    calibration: Annotated[Path | None, typer.Option(help='Folder of images like those of the task, for int8.')] = None,
    least_cosine: Annotated[
        float | None,
        typer.Option(min=-1, max=1, help='Least mean cosine of outputs in int8 with those in float32 to accept.'),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Export each width for other runtimes, and check it against PyTorch."""
    from slimclr_hub.hub.export import Calibration, check_format, export_network
    from slimclr_hub.hub.export.checks import check_size
    from slimclr_hub.hub.open import open_network
    from slimclr_hub.text import human

    if int8 != (calibration is not None) or (least_cosine is not None and not int8):
        raise InputError(
            '--int8, --calibration FOLDER and --least-cosine go together; give the first two, or none for float32'
        )
    check_format(format, int8=int8)
    if size is not None:
        check_size(size)
    if resolutions is not None:
        _check_resolution(resolutions, size)
    model = open_network(network)
    _set_resolution(model, resolutions, size)
    images = None
    if calibration:
        from slimclr_hub.inference.sample import read_sample

        if size is not None:
            model.pretrained_cfg['input_size'] = (model.in_chans, size, size)
        sample = read_sample(model, calibration, at_least=16, at_most=512)
        images = Calibration.split(sample, least_cosine)
    options: dict[str, Any] = {'size': size, 'widths': width, 'calibration': images, 'overwrite': overwrite}
    exported = export_network(model, target, format, **options)
    quality = ['cosine to float32', 'same class (%)'] if int8 else ['max difference to PyTorch']
    table = _table(['width', 'file', 'bytes', *quality])
    written: set[Path] = set()
    for file in exported:
        new = [path for path in (file.path, *file.beside) if path not in written]
        written.update(new)
        sizes = human(sum(path.stat().st_size for path in new)) if new else ''
        cells = [f'{file.difference:.1e}']
        if file.cosine is not None:
            cells = [f'{file.cosine:.4f}', '' if file.agreement is None else f'{100 * file.agreement:.1f}']
        table.add_row(f'{file.width:g}', file.path.name, sizes, *cells)
    print(f'{target}:')
    _print(table)
    if len(exported) > 1 and len(shared := {path for file in exported for path in file.beside}) == 1:
        print(f'The weights of all widths are in {shared.pop().name}, which has to lie beside them.')


@app.command()
def embed(
    network: Network,
    images: Images,
    out: Annotated[Path, typer.Option('--out', '-o', help='A file in .safetensors, .npy or .parquet.')],
    width: Width = None,
    batch_size: BatchSize = 64,
    workers: Workers = None,
    device: Device = None,
    precision: Annotated[Precision, typer.Option(help='Mixed precision.')] = 'no',
    skip_unreadable: Skip = False,
    overwrite: Overwrite = False,
) -> None:
    """Write features of images at one width."""
    from slimclr_hub.inference import embed as embedding
    from slimclr_hub.inference.images import list_images

    embedding.check_output(out, overwrite)
    listed = list_images(images)  # before a network is downloaded
    model = _on_device(network, width, device)
    embeddings = embedding.embed(
        model, listed, batch_size=batch_size, workers=workers, precision=precision, skip_unreadable=skip_unreadable
    )
    embedding.save_embeddings(embeddings, out, overwrite)
    count, length = embeddings.features.shape
    print(f'{out}: {count} images, {length} features each, at width {embeddings.width:g}')


@app.command()
def predict(
    network: Network,
    images: Images,
    width: Width = None,
    top: Annotated[int, typer.Option(help='Classes for each image.')] = 5,
    batch_size: BatchSize = 64,
    workers: Workers = None,
    device: Device = None,
    skip_unreadable: Skip = False,
    cascade: Annotated[Path | None, typer.Option(help='Run wider only where unsure: `slimclr-hub cascade`.')] = None,
    budget: Annotated[float, typer.Option(help='Of a cascade: mean multiply-adds of an image, such as 5e6.')] = inf,
    resolutions: Resolutions = None,
    size: Pixels = None,
) -> None:
    """Print the most probable classes of images, by a network with a probe."""
    from slimclr_hub.inference import predict as prediction
    from slimclr_hub.inference.images import list_images
    from slimclr_hub.models.cascade import load_cascades
    from slimclr_hub.text import human

    if cascade is None and budget != inf:
        raise InputError(f'--budget {budget:g} is of a cascade; give --cascade FILE, of `slimclr-hub cascade`')
    if cascade is not None:
        if width is not None:
            raise InputError(f'--width {width:g}: a cascade chooses the width of each image; leave one of the two out')
        load_cascades(cascade)
    _check_resolution(resolutions, size)
    listed = list_images(images)  # before a network is downloaded
    # A cascade may run any width, and resolutions are of all of them, else one is read.
    model = _on_device(network, width, device, lazy=cascade is None and resolutions is None)
    _set_resolution(model, resolutions, size)
    if cascade is not None:
        chosen = model.load_cascades(cascade).within(budget)
        print(
            f'Cascade {", ".join(f"{w:g}" for w in chosen.widths)}: {human(round(chosen.multiply_adds))} multiply-adds '
            f'an image where it was fitted, {100 * chosen.agreement:.1f} % of the answers those of the widest',
            file=sys.stderr,
        )
    predictions = prediction.predict(
        model,
        listed,
        top=top,
        budget=None if cascade is None else budget,
        batch_size=batch_size,
        workers=workers,
        skip_unreadable=skip_unreadable,
    )
    _print(prediction.predictions_table(predictions))


@app.command()
def cascade(
    network: Network,
    images: Images,
    out: Annotated[Path, typer.Option('--out', '-o', help='A .json file for the thresholds.')],
    figure: Annotated[Path | None, typer.Option(help='Draw what is reached over cost, as PNG and PDF.')] = None,
    speed: Annotated[bool, typer.Option(help='Measure milliseconds, here and now.')] = True,
    batch_size: BatchSize = 32,
    workers: Workers = None,
    device: Device = None,
    skip_unreadable: Skip = False,
    overwrite: Overwrite = False,
) -> None:
    """Fit thresholds by which narrow widths answer what they are sure of, and show what that reaches.

    No labels are needed. Where images lie in folders named by the network's classes, the table shows accuracy.
    """
    from dataclasses import replace

    from slimclr_hub.files import try_folder
    from slimclr_hub.hub.folder import check_file
    from slimclr_hub.inference import cascade as fitting
    from slimclr_hub.inference.images import list_images
    from slimclr_hub.inference.runner import InferenceConfig
    from slimclr_hub.runs.figures import figure_name

    check_file(out, overwrite)
    try_folder(out.parent, '--out')
    _check_drawing(figure)
    listed = list_images(images)
    model = _on_device(network, None, device, lazy=False)
    config = InferenceConfig(batch_size, workers, skip_unreadable=skip_unreadable)
    fitted, held_out = fitting.fit(model, fitting.answer(model, listed, config))
    rows = fitting.compare(held_out, fitted.cascades)
    if speed:
        times = fitting.measure(model, held_out.images, [row.cascade for row in rows], batch_size)
        rows = [replace(row, milliseconds=taken) for row, taken in zip(rows, times, strict=True)]
    fitted.save(out)
    _print(fitting.cascades_table(rows, len(held_out.images)))
    print(fitting.verdict(rows, len(held_out.images)))
    if figure:
        fitting.draw_cascades(rows, figure_name(figure))
    print(f'{out}: fitted on {fitted.images} images. Use it: slimclr-hub predict {network} IMAGES --cascade {out}')


@app.command()
def resolutions(
    network: Network,
    images: Images,
    size: Annotated[list[int], typer.Option(help="Height and width of images besides the network's; repeat for each.")],
    out: Annotated[Path, typer.Option('--out', '-o', help='A .safetensors file.')],
    batch_size: BatchSize = 64,
    workers: Workers = None,
    device: Device = None,
    skip_unreadable: Skip = False,
    overwrite: Overwrite = False,
) -> None:
    """Estimate statistics of batch normalisation for images of other sizes, and show what each width reaches with them.

    No labels are needed. Where images lie in folders named by the network's classes, the table shows accuracy, and
    `choose` and `create_model` choose the best pair of width and size within a budget.
    """
    from slimclr_hub.files import try_folder
    from slimclr_hub.hub.folder import check_file
    from slimclr_hub.inference import resolutions as fitting
    from slimclr_hub.inference.images import list_images
    from slimclr_hub.inference.runner import InferenceConfig

    check_file(out, overwrite)
    try_folder(out.parent, '--out')
    listed = list_images(images)
    model = _on_device(network, None, device, lazy=False)
    config = InferenceConfig(batch_size, workers, skip_unreadable=skip_unreadable)
    found, statistics = fitting.fit_resolutions(model, listed, size, config)
    found.save(statistics, out)
    costs = fitting.costs_of(model, found.pairs)
    _print(fitting.resolutions_table(found, costs))
    print(fitting.verdict(found, costs))
    print(f'{out}: of {found.images} images. Use it: slimclr-hub choose {network} --max-macs 1e9 --resolutions {out}')


@app.command()
def compare(
    networks: Annotated[
        list[str] | None, typer.Argument(metavar='RUN...', help='Folders of runs and networks, and published tags.')
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help='Write tables as Markdown; - prints them instead.')] = None,
    csv: Annotated[Path | None, typer.Option(help='Write all numbers as CSV; - as above.')] = None,
    latex: Annotated[Path | None, typer.Option(help='Write the tables as LaTeX; - as above.')] = None,
    figure: Annotated[Path | None, typer.Option(help='Draw accuracy over multiply-adds, as PNG and PDF.')] = None,
    reported: Annotated[bool, typer.Option('--reported', help='What the paper reports too; alone, all of it.')] = False,
    seeds: Annotated[bool, typer.Option('--seeds', help='Mean and spread of runs that differ in the seed.')] = False,
    speed: Annotated[bool, typer.Option(help='Measure images/s, here and now.')] = True,
    baselines: Annotated[bool, typer.Option(help='Show what raw pixels and random weights reach.')] = True,
    batch_size: BatchSize = 32,
) -> None:
    """Compare runs and networks: accuracy by width, parameters, multiply-adds and images/s."""
    with _train_extra('comparing'):
        from slimclr_hub.evaluate.compare.compare import compare_networks
    written = compare_networks(
        networks or [],
        markdown=markdown,
        csv=csv,
        latex=latex,
        figure=figure,
        reported=reported,
        same_recipe=_same_recipe if seeds else None,
        batch_size=batch_size if speed else None,
        baselines=baselines,
    )
    for path in written:
        print(f'Written: {path}')


@app.command(
    add_help_option=False,
    context_settings={'allow_extra_args': True, 'ignore_unknown_options': True, 'allow_interspersed_args': False},
)
def analyze(context: typer.Context) -> None:
    """Analyse runs: gradients, trajectories, error surfaces, linear-probe condition; `analyze --help` lists them."""
    from slimclr_hub.analysis.entry import main as run

    with _train_extra('analysing'):
        run(context.args)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help='A folder that training, convert or extract wrote.')],
    repo: Annotated[str, typer.Argument(help='Repository on the Hub, account/name.')],
    private: Annotated[bool, typer.Option('--private', help='Make a new repository private.')] = False,
    revision: Annotated[str | None, typer.Option(help='Branch to commit to, made if need be.')] = None,
    message: Annotated[str | None, typer.Option(help='Message of the commit.')] = None,
    dry_run: Annotated[bool, typer.Option('--dry-run', help='Check and list the files; upload nothing.')] = False,
) -> None:
    """Publish a folder on the Hub: weights, configuration and card, after checking that they fit."""
    from slimclr_hub.hub.push import plan_push
    from slimclr_hub.hub.push import push as run
    from slimclr_hub.text import human

    plan = plan_push(folder, repo)
    print(f'{printable(folder)} -> {repo}')
    table = _table(['file', 'bytes'])
    for name, size in plan.sizes().items():
        table.add_row(printable(name), human(size))
    _print(table)
    if dry_run:
        print('Nothing was uploaded (--dry-run).')
        return
    print(run(plan, private=private, revision=revision, message=message))
    print(f"timm.create_model('hf-hub:{repo}{f'@{revision}' if revision else ''}', pretrained=True)")


@app.command()
def cards(folder: Annotated[Path, typer.Argument(help='Where to write them.')] = Path('model_cards')) -> None:
    """Write the model cards of the published networks, as they are in model_cards/."""
    from slimclr_hub.hub.card import all_cards

    folder.mkdir(parents=True, exist_ok=True)
    for name, text in all_cards().items():
        (folder / name).write_text(text, encoding='utf-8')
        print(str(folder / name))


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Option(help='Config to check; by default transfer/mask_rcnn_slim.py.')] = None,
    data: Annotated[Path | None, typer.Option(help='Folder of COCO; COCO_ROOT or data/coco unless given.')] = None,
    link_ops: Annotated[bool, typer.Option('--link-ops', help="torchvision's ops in mmcv-lite, for mim test.")] = False,
) -> None:
    """Check that fine-tuning a detector could start: packages, the command to type, data files."""
    from slimclr_hub.detection.doctor import OPTIONAL, examine

    if link_ops:
        from slimclr_hub.detection.ops import link_ops as link

        written = link()
        print(f'Written: {written}' if written else 'Nothing to link: mmcv has operators of its own.')
    report = examine(config, data, with_files=not link_ops or bool(config or data))
    table = _table(['package', 'version', 'state', 'installed as', 'note'])
    for column in table.columns[1:]:
        column.justify = 'left'
    for name, package in report.packages.items():
        optional = package.state != 'ok' and name in OPTIONAL
        state = f'{package.state} (not needed)' if optional else package.state
        table.add_row(name, package.version, state, package.distribution, ', '.join(package.notes))
    _print(table)
    for line in report.lines():
        print(line)
    if not report.ready:
        raise typer.Exit(1)


def _convert_detector(source: Path, target: Path, overwrite: bool) -> bool:
    """Convert the authors' detector; return False if the source is something else."""
    from slimclr_hub.detection.authors import convert_detector_file

    done = convert_detector_file(source, target, overwrite)
    if done is None:
        return False
    kind = 'Mask R-CNN' if done.has_masks else 'Faster R-CNN'
    widths = ', '.join(map(str, done.backbone.widths))
    print(f'{target}: {kind}, {done.backbone.architecture}, widths {widths}, {done.num_classes} classes')
    config = 'transfer/mask_rcnn_slim_reference.py'
    if done.has_masks and done.num_classes == 80:
        _print_evaluation(config, target)
        print(f'One width of it: slimclr-hub extract {target} half.pth --width 0.5 --format mmdet --config {config}')
    else:
        print(f'A config for it has the box coders, anchors and RoIAlign of {config}')
    return True


def _extract_detector(
    network: Path, target: Path, width: float, format: DenseFormat, config: Path | None, overwrite: bool
) -> bool:
    """Extract one width of a slimmable detector; return False if the network is no checkpoint of one."""
    if network.suffix != '.pth' or not network.is_file():
        return False
    from slimclr_hub.detection.extract import extract_detector, read_detector

    detector = read_detector(network)
    if detector is None:
        return False
    if format != 'mmdet':
        raise InputError(f'{network} is a detector, which --format {format} has not; --format mmdet has it')
    written, evaluated = extract_detector(detector, target, width, overwrite, config)
    print(f'{target}, {written}: a detector of MMDetection at width {width:g}')
    if evaluated:
        _print_evaluation(written, target)
    else:
        print('It names no images to evaluate on; --config CONFIG takes all of a config of your own.')
    return True


def _same_recipe(first: Path, second: Path) -> bool:
    """True if two runs differ in nothing but the seed."""
    from slimclr_hub.settings import RECIPE, differences
    from slimclr_hub.train.command import load_recipe

    changes = differences(load_recipe(first / RECIPE), load_recipe(second / RECIPE))
    return all(change.startswith('run.seed ') for change in changes)


def _print_evaluation(config: str | Path, checkpoint: Path) -> None:
    from importlib.util import find_spec
    from shlex import quote

    from slimclr_hub.detection.ops import install_ops, linked_ops

    print(f'Evaluate it: mim test mmdet {quote(str(config))} --checkpoint {quote(str(checkpoint))}')
    if find_spec('mmcv') and install_ops() != 'compiled' and not linked_ops().exists():
        print('For `mim test`, once: slimclr-hub doctor --link-ops')


def _check_drawing(figure: Path | None) -> None:
    """Raise an InputError, before any work, if a figure is asked for and cannot be drawn."""
    if figure is not None:
        with _train_extra('--figure'):
            import matplotlib  # noqa: F401


@contextmanager
def _train_extra(doing: str) -> Iterator[None]:
    """Turn a missing module into an error that names the extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise InputError(f'{doing} needs {error.name}; pip install "slimclr-hub[train]"') from error


def _described(network: str) -> Any:
    """Open a network; a published one without its weights, which needs no download."""
    import timm

    from slimclr_hub.hub.open import open_network
    from slimclr_hub.weights.published import ARCHITECTURE, PUBLISHED

    tag = network.removeprefix(f'{ARCHITECTURE}.') if network != ARCHITECTURE else next(iter(PUBLISHED))
    if tag == network or tag not in PUBLISHED or Path(network).exists():
        return open_network(network)
    published = PUBLISHED[tag]
    return timm.create_model(published.name, num_classes=published.num_classes, device='meta')


def _known_accuracies(network: str, model: Any) -> dict[float, float]:
    """Width -> top-1 accuracy in percent, as reported for a tag, or as measured last of what is in a folder."""
    from slimclr_hub.runs.result import load, results_in
    from slimclr_hub.weights.published import PUBLISHED, SHIPPED

    tag = model.pretrained_cfg.get('tag')
    found: list[Any] = []
    if Path(network).is_dir():
        found = [result for results in results_in(Path(network)).values() for result in results]
    elif tag in SHIPPED:
        found = load(SHIPPED[tag].results)
    measured = [dict(result.top1) for result in found if result.protocol.kind in ('classifier', 'linear')]
    if tag in PUBLISHED and not Path(network).is_dir():
        measured.append({width: each.top1 for width, each in PUBLISHED[tag].reported.items()})
    return next((top1 for top1 in measured if set(model.widths) <= top1.keys()), {})


def _pairs_table(needs: dict[Any, Any]) -> 'Table':
    """A table of pairs of width and size, the best first: what each needs, and its accuracy where it is known."""
    table = _table(['size', *next(iter(needs.values())).cells, 'accuracy (%)'])
    for pair, each in needs.items():
        known = '' if pair.accuracy is None else f'{100 * pair.accuracy:.1f}'
        table.add_row(str(pair.size), *each.cells.values(), known)
    return table


def _needs_table(needs: list[Any], top1: dict[float, float]) -> 'Table':
    """A table of widths: what each needs, and its accuracy where it is known."""
    table = _table([*needs[0].cells, *(['top-1 (%)'] if top1 else [])])
    for each in needs:
        table.add_row(*each.cells.values(), *([f'{top1[each.width]:.1f}'] if top1 else []))
    return table


def _in_timm(network: str) -> str:
    """The name by which timm opens a network, which has a prefix for folders."""
    return f'local-dir:{network}' if Path(network).is_dir() else network


def _on_device(network: str, width: float | None, device: str | None, *, lazy: bool = True) -> Any:
    import torch

    from slimclr_hub.hub.open import open_network

    arguments = {} if width is None else {'width': width}
    try:
        model = open_network(network, lazy=lazy, **arguments)  # one width is asked for, so one is read
    except InputError:
        if not lazy or not Path(network).exists():
            raise
        model = open_network(network, **arguments)  # of a format, or of widths, that are read whole
    if device is None:
        device = str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else 'cpu'
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f'--device {device}: {str(error).partition(chr(10))[0]}') from error


def _check_resolution(resolutions: Path | None, size: int | None) -> None:
    """Raise an InputError, before any work, unless both are given, or none, and the file is one."""
    from slimclr_hub.models.resolutions import load_resolutions

    if (resolutions is None) != (size is None):
        raise InputError('--resolutions FILE and --size go together; give both or none')
    if resolutions is not None:
        load_resolutions(resolutions)


def _set_resolution(model: Any, resolutions: Path | None, size: int | None) -> None:
    if resolutions is not None:
        model.load_resolutions(resolutions)
        model.set_resolution(size)


def _table(headers: list[str], title: str | None = None) -> 'Table':
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify='left', box=box.SIMPLE_HEAD)
    for i, header in enumerate(headers):
        is_name = i == 0 or header == 'file'
        table.add_column(header, justify='left' if is_name else 'right', no_wrap=is_name)
    return table


def _print(table: 'Table') -> None:
    from rich.console import Console

    # Not cut to 80 columns where the output goes to a file or another program; brackets in a path are no markup.
    Console(width=None if sys.stdout.isatty() else 160, markup=False, emoji=False).print(table)


if __name__ == '__main__':
    main()
