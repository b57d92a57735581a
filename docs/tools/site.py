"""What mkdocs cannot do by itself: pages from outside docs/, pages made from the code, links as GitHub reads them."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from mkdocs.structure.files import File, Files

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from reference import PAGES  # noqa: E402

ROOT = HERE.parents[1]
OUTSIDE = {
    "README.md": "index.md",
    "spec.md": "spec.md",
    "AGENTS.md": "contributing.md",
}  # in the repository, on the site
TITLES = {"flags.md": "Flags", "files.md": "Files of a run folder", "python.md": "Python functions"}
CODE = r"^(?P<fence>```+).*?^(?P=fence)`*\s*?$|^(?: {4}|\t).*?$|`+[^`\n]*`+"
LINK = re.compile(rf"(?ms){CODE}|(?P<shown>!?\[(?:[^\]\[]|\[[^\]]*\])*\])\((?P<to>[^)\s]+)\)")


def on_config(config):
    config.mdx_configs.setdefault("toc", {})["slugify"] = slug
    return config


def slug(text: str, joint: str = "-") -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", re.sub(r"<[^>]*>", "", text)).strip().lower().replace(" ", joint)


def on_files(files: Files, config) -> Files:
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text("utf-8")))
    for name, made in PAGES.items():
        files.append(File.generated(config, f"reference/{name}", content=made()))
    return files


def on_page_markdown(markdown: str, page, config, files) -> str:
    name = page.file.src_uri
    source = next((ROOT / outside for outside, inside in OUTSIDE.items() if inside == name), ROOT / "docs" / name)
    if name == "reference/index.md":
        markdown += "\n## Pages\n\n" + "\n".join(f"- [{TITLES[one]}]({one})" for one in PAGES) + "\n"
    return LINK.sub(lambda found: _on_site(found, source, name), markdown)


def _on_site(found: re.Match, source: Path, page: str) -> str:
    """A link of a file in the repository as a link of the site; the bare text where the site has no such page."""
    if found["to"] is None or re.match(r"[a-z]+:|#", found["to"]):
        return found[0]
    path, mark, anchor = found["to"].partition("#")
    target = Path(os.path.normpath(source.parent / path)).relative_to(ROOT).as_posix()
    if target in OUTSIDE:
        target = OUTSIDE[target]
    elif target.startswith("docs/"):
        target = target.removeprefix("docs/")
    else:
        return found["shown"][1:-1]
    return f"{found['shown']}({os.path.relpath(target, Path(page).parent)}{mark}{anchor})"
