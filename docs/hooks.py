"""MkDocs hook: the notebooks and the changelog of the repository become pages of the site."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every notebook under `notebooks/`, and the changelog."""
    for path in (*sorted((ROOT / "notebooks").glob("*.ipynb")), ROOT / "CHANGELOG.md"):
        page = File(path.relative_to(ROOT).as_posix(), str(ROOT), config.site_dir, config.use_directory_urls)
        files.append(page)
    return files
