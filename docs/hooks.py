"""Pages of the manual that stand elsewhere in the repository: shown where they are, stored once."""

import posixpath
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = ('RESULTS.md', 'CONTRIBUTING.md', 'CHANGELOG.md', 'transfer/README.md')


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the repository, and the figures that they show."""
    figures = [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob('benchmarks/figures/*.png'))]
    for path in (*PAGES, *figures):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links to the manual lead to its pages; show those to other files of the repository as their text alone.

    Links of pages in docs/ are right in the repository, where `..` leads to what the site has beside them.
    """

    def relink(match: re.Match[str]) -> str:
        text, target = match.groups()
        folder = PurePosixPath(page.file.src_uri).parent
        path, hash_mark, anchor = target.partition('#')
        if files.get_file_from_path((folder / path).as_posix()) is not None:
            return match[0]
        in_repository = posixpath.normpath(folder / path)
        if in_repository.startswith('docs/'):
            return f'[{text}]({posixpath.relpath(in_repository, "docs" / folder)}{hash_mark}{anchor})'
        return f'`{text.strip("`")}`' if (ROOT / in_repository).exists() else match[0]

    if page.file.src_uri not in PAGES:
        return markdown.replace('](../', '](')
    return re.sub(r'(?<!!)\[([^\]]+)\]\((?!https?:|#)([^)\s]+)\)', relink, markdown)
