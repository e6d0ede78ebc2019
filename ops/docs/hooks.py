"""The pages of the site that docs/ does not hold, and links that work on GitHub and on the site alike. mkdocs calls this module.

In the repository a page links to files, also to those outside docs/. On the site each link leads to the page that the file became
(`site_path`); one to a file that the site does not have is a warning, and so an error under `mkdocs build --strict`.
"""

import json
import logging
import posixpath
import re
from pathlib import Path

import agents
import openapi_pages
import settings_page
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pages import HERE, PUBLISHED, RESULTS, ROOT, decisions, site_path

DECISIONS = "# Decisions\n\nWhat someone may question in a year, and why it is as it is.\n\n"
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)([^)\s#]+)")
_log = logging.getLogger("mkdocs.hooks.docs")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """In the navigation, the decisions in their order."""
    for entry in config.nav or []:
        if "Decisions" in entry:
            entry["Decisions"] = ["decisions/index.md", *({title: f"decisions/{name}"} for name, title in decisions())]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    document = json.loads((ROOT / "docs/openapi.json").read_text())
    made = {
        "decisions/index.md": DECISIONS + "\n".join(f"- [{title}]({name})" for name, title in decisions()),
        "reference/api.md": openapi_pages.calls(document),
        "reference/objects.md": openapi_pages.objects(document),
        "reference/python.md": (HERE / "python.md").read_text(),
        "reference/settings.md": settings_page.page(),
        "site.css": (HERE / "site.css").read_text(),
    }
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    for name, target in PUBLISHED.items():
        if name.endswith(".md"):
            files.append(File.generated(config, target, abs_src_path=str(ROOT / name)))
    for path in sorted((ROOT / RESULTS).iterdir()):
        target = site_path(RESULTS + path.name)
        files.append(File.generated(config, target, abs_src_path=str(path)))

    def address(path: str) -> str:
        page = files.get_file_from_path(site_path(path) or "")
        assert page is not None, f"{path} is not on the site"
        return page.url

    files.append(File.generated(config, "llms.txt", content=agents.llms_txt(address)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """The page with each link to a file of the repository made one to a file of the site."""
    source = page.file.abs_src_path
    if source is None or not Path(source).is_relative_to(ROOT):
        return markdown  # made above, for the site alone
    folder = Path(source).parent.relative_to(ROOT).as_posix()

    def on_site(link: re.Match[str]) -> str:
        target = site_path(posixpath.normpath(posixpath.join(folder, link[1])))
        if target is None or files.get_file_from_path(target) is None:
            _log.warning("%s links to %s, which is not on the site", page.file.src_uri, link[1])
            return link[0]
        return posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or ".")

    return _LINK.sub(on_site, markdown)
