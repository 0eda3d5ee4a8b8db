"""Upload of a folder as a repository on the Hub."""

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml
from huggingface_hub import CommitInfo, CommitOperationAdd, EvalResult, HfApi, ModelCard, ModelCardData, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id
from torch import nn

from slimclr_hub.errors import InputError
from slimclr_hub.files import encoded
from slimclr_hub.hub.folder import check_overlap
from slimclr_hub.hub.open import open_any
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.models.layers import shapes_at
from slimclr_hub.runs.result import RESULT, results_in
from slimclr_hub.settings import RECIPE, read_yaml
from slimclr_hub.text import first_line
from slimclr_hub.weights.bounded import in_time
from slimclr_hub.weights.progressive import encode
from slimclr_hub.weights.source import WEIGHTS, is_transport_error, with_retries
from slimclr_hub.weights.tensor_file import TensorFile

_NEEDED = ('config.json', WEIGHTS, 'README.md')
# Files of a run that a reader of the card may want; not its checkpoints.
_OPTIONAL = (RECIPE, 'metrics.jsonl', '*.png', RESULT, f'*/{RESULT}')
_SYSTEMS = (PurePosixPath, PureWindowsPath)
# A path within a word, up to its last part; https://... is none.
_FOLDERS = re.compile(r'(?<![\w./~\\-])(?:~|/(?!/)|[A-Za-z]:[\\/])[^\[\](),=\'"]*[\\/]')
_LOCAL = re.compile(r"(?<=['\"`])local-dir:[^'\"`\n]+|local-dir:[^'\"`\s]+")
_ABOUT_LOCAL = re.compile(r'From the Hugging Face Hub it is `hf-hub:USER/NAME` instead of `local-dir:`\.\s*')


@dataclass(frozen=True)
class Plan:
    """Files to upload to `repo`: path in the repository -> a file, or text or bytes that were made for the Hub."""

    repo: str
    files: dict[str, Path | str | bytes]

    def sizes(self) -> dict[str, int]:
        """Path in the repository -> bytes."""
        contents = {name: _content(content) for name, content in self.files.items()}
        return {
            name: content.stat().st_size if isinstance(content, Path) else len(content)
            for name, content in contents.items()
        }


def _content(content: Path | str | bytes) -> Path | bytes:
    return encoded(content) if isinstance(content, str) else content


def plan_push(folder: Path, repo: str) -> Plan:
    """Check a folder and list the files to upload, without using the network.

    A slimmable network goes as weights in parts, too (`weights.progressive`), so that others fetch it by size. They are
    made here and not by training, as a folder on the disk is read by slices and would only take twice the space. In the
    card, `local-dir:...` becomes `hf-hub:REPO`, so that its usage works for its readers, and the accuracies in
    the folder's `result.json` become evaluation results of the Hub. In the recipe and results, commands included, of an
    absolute path only the last part stays.

    Args:
        folder: A folder that timm opens, as `save_folder` or `slimclr-hub convert` write it.
        repo: Name of the repository, `account/name`.

    Raises:
        InputError: A file is missing, damaged or a link to outside of the folder, the weights do not fit the
            configuration, the widths do not overlap, or the name is not one.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f'{repo!r} is not the name of a repository: {error}') from error
    if repo.count('/') != 1:
        raise InputError(f'{repo!r} is not the name of a repository; give account/name')
    if not folder.is_dir():
        raise InputError(f'{folder} is not a folder')
    if missing := [name for name in _NEEDED if not (folder / name).is_file()]:
        raise InputError(f'{folder} lacks {", ".join(missing)}; `slimclr-hub convert` and training write them')
    paths = [path for pattern in (*_NEEDED, *_OPTIONAL) for path in sorted(folder.glob(pattern))]
    for path in paths:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise InputError(f'{path} is a link to {path.resolve()}, outside of the folder; replace it by a copy')
    model = open_any(str(folder))  # whoever downloads it will do the same
    check_overlap(getattr(model, 'overlap', True), folder)
    files: dict[str, Path | str | bytes] = {str(path.relative_to(folder)): _without_paths(path) for path in paths}
    try:
        card = _ABOUT_LOCAL.sub('', (folder / 'README.md').read_text(encoding='utf-8'))
    except UnicodeDecodeError as error:
        raise InputError(f'{folder / "README.md"} is not text in UTF-8 ({error}); save it as that') from error
    files['README.md'] = _with_results(_LOCAL.sub(f'hf-hub:{repo}', card), folder, repo)
    return Plan(repo, files | _parts(model, folder / WEIGHTS))


def _parts(model: nn.Module, path: Path) -> dict[str, bytes]:
    """Weights in parts, of a network of several widths that has all that is in its file."""
    if not isinstance(model, SlimmableResNet) or len(model.widths) == 1:
        return {}
    with TensorFile(path) as file:
        found = file.shapes
    shapes = {width: shapes_at(model, model.widths[i:]) for i, width in enumerate(model.widths)}
    whole = shapes[model.widths[0]]
    if any(whole.get(name) != shape for name, shape in found.items()):
        return {}  # a file of more widths than its config.json names, or of other image channels
    return encode(path, shapes)


def _without_paths(path: Path) -> Path | str:
    """The file, or where a recipe or result names folders of this machine, its text with their last parts."""
    if path.name not in (RECIPE, RESULT):
        return path
    write: Callable[[Any], str]
    try:
        if path.name == RECIPE:
            content, write = read_yaml(path), lambda value: yaml.safe_dump(value, sort_keys=False)
        else:
            content, write = json.loads(path.read_bytes()), lambda value: json.dumps(value, indent=2) + '\n'
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f'{path} cannot be read: {" ".join(str(error).split())}') from error
    shortened = _last_parts(content)
    return path if shortened == content else write(shortened)


def _last_parts(value: Any) -> Any:
    if isinstance(value, dict):
        return {_last_parts(key): _last_parts(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_last_parts(each) for each in value]
    if not isinstance(value, str):
        return value
    if value.startswith('~') or any(kind(value).is_absolute() for kind in _SYSTEMS):
        return PureWindowsPath(value).name  # which knows either separator
    try:
        words, command = shlex.split(value), True  # whose paths may have spaces
    except ValueError:  # an apostrophe
        words, command = value.split(), False
    shortened = [_FOLDERS.sub('', word) for word in words]
    if shortened == words:
        return value
    return shlex.join(shortened) if command else ' '.join(shortened)


def _with_results(text: str, folder: Path, repo: str) -> str:
    # Of the results in a file the first is the best.
    results = [results[0] for results in results_in(folder).values() if results and results[0].top1]
    if not results:
        return text
    try:
        card = ModelCard(text)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise InputError(f'{folder / "README.md"} has metadata that the Hub refuses: {first_line(error)}') from error
    assert isinstance(card.data, ModelCardData)
    card.data.model_name = repo.partition('/')[2]
    card.data.eval_results = [
        EvalResult(
            task_type='image-classification',
            dataset_type=re.sub(r'[^a-z0-9]+', '-', str(result.protocol.data).lower()).strip('-'),
            dataset_name=str(result.protocol.data),
            metric_type='accuracy',
            metric_name=f'{name} at width {width:g}, {result.protocol}',
            metric_value=round(value, 2),
        )
        for result in results
        for name, accuracies in (('top-1 (%)', result.top1), ('top-5 (%)', result.top5))
        for width, value in accuracies.items()
    ]
    return str(card)


def push(plan: Plan, *, private: bool = False, revision: str | None = None, message: str | None = None) -> str:
    """Upload as one commit, into a repository that is made if it does not exist, and return the commit's address.

    Endpoint and token are those of huggingface_hub (`HF_ENDPOINT`, `HF_TOKEN`, `hf auth login`).

    Args:
        plan: What to upload.
        private: True to make a new repository private.
        revision: Branch to commit to, made if it does not exist; `main` unless given.
        message: Message of the commit.

    Raises:
        InputError: Offline, not logged in, or the Hub refuses.
    """
    if constants.HF_HUB_OFFLINE:
        raise InputError('offline (HF_HUB_OFFLINE); nothing can be pushed')
    api = HfApi(library_name='slimclr_hub')
    operations = [CommitOperationAdd(name, _content(content)) for name, content in plan.files.items()]

    def upload() -> CommitInfo:
        with_retries(lambda: api.create_repo(plan.repo, private=private, exist_ok=True))
        if revision:
            with_retries(lambda: api.create_branch(plan.repo, branch=revision, exist_ok=True))
        text = message or 'Upload with slimclr-hub'
        return with_retries(lambda: api.create_commit(plan.repo, operations, commit_message=text, revision=revision))

    try:
        commit = in_time(upload)
    except LocalTokenNotFoundError as error:
        raise InputError(f'not logged in: `hf auth login`, or set HF_TOKEN, to push to {plan.repo}') from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        remedy = '; `hf auth login` with a token that may write there' if status in (401, 403) else ''
        raise InputError(f'the Hub refused {plan.repo} with {status}{remedy}: {first_line(error)}') from error
    except ValueError as error:  # the client's, about the card's metadata
        raise InputError(f'{plan.repo}: {" ".join(str(error).split())}') from error
    except Exception as error:
        if not (is_transport_error(error) or isinstance(error, OSError)):
            raise
        raise InputError(f'the Hub cannot be reached: {first_line(error)}') from error
    return commit.commit_url
