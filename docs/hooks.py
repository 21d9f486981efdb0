"""MkDocs hook: the notebooks of the repository become pages of the site."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every notebook under `notebooks/`."""
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        page = File(f"notebooks/{notebook.name}", str(ROOT), config.site_dir, config.use_directory_urls)
        files.append(page)
    return files
