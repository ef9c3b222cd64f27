"""What the site needs beyond its text: mathematics, icons, light pages, a 404 page and a sitemap, all from its own files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from xml.sax.saxutils import escape

import bookdata
import imagesize
from docutils import nodes
from fontTools import subset
from sphinx.application import Sphinx
from sphinx.ext import mathjax

# The scripts that a page loads: the theme's, the copy buttons' and the book's. Sphinx's search and highlighting are not
# used, and its index grows with the book.
_UNUSED = ("doctools.js", "sphinx_highlight.js", "searchtools.js", "language_data.js", "searchindex.js")
_ICON_RULE = re.compile(r'(?:\.fa-[\w-]+:before,?)+\{content:"\\([0-9a-f]+) ?"\}')


def configure(app: Sphinx, config: Any) -> None:
    """Derive the site's address from the repository, and keep Jupyter Book from loading every file of `_static`."""
    owner, name = bookdata.config(Path(app.srcdir))["repository"]["url"].rstrip("/").split("/")[-2:]
    host = f"{owner.lower()}.github.io"
    config.html_baseurl = config.html_baseurl or f"https://{host}/" + ("" if name.lower() == host else f"{name}/")
    config.ogp_site_url = config.html_baseurl
    config.html_css_files, config.html_js_files = ["book.css"], []


def prepare(app: Sphinx) -> None:
    """Pagefind makes the search index (see the Makefile): Sphinx makes none."""
    app.builder.search = False


def dress(
    app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Give a page the scripts that it uses and no others, and let its figures wait until they are scrolled to."""
    scripts = context["script_files"]
    scripts[:] = [script for script in scripts if not str(script.filename or "").endswith(_UNUSED)]
    if doctree and any(doctree.findall(lambda node: isinstance(node, nodes.math | nodes.math_block))):
        app.add_css_file("vendor/katex/katex.min.css")
        app.add_js_file("vendor/katex/katex.min.js", loading_method="defer", priority=800)
        app.add_js_file("math.js", loading_method="defer", priority=801)
    if pagename in ("questions", "search"):
        app.add_js_file(f"{pagename}.js", loading_method="defer", priority=801)
    if "body" in context:
        sources = {Path(name).name: app.srcdir / path for path, (_, name) in app.env.images.items()}
        context["body"] = re.sub(r'<img(?=[^>]* src="([^"]*)")', lambda tag: _lazy(tag, sources), context["body"])


def _lazy(tag: re.Match, sources: dict[str, Path]) -> str:
    """An image tag with its size, so that nothing moves when the image arrives."""
    source = sources.get(Path(tag[1]).name)
    width, height = imagesize.get(source) if source and source.exists() else (-1, -1)
    return '<img loading="lazy" decoding="async"' + (f' width="{width}" height="{height}"' if width > 0 else "")


def extra_pages(app: Sphinx) -> list[tuple[str, dict[str, Any], str]]:
    """The search page, and the page for addresses that do not exist."""
    return [("search", {}, "search.html"), ("404", {"base_path": urlsplit(app.config.html_baseurl).path}, "404.html")]


def finish(app: Sphinx, exception: Exception | None) -> None:
    if exception or app.builder.format != "html":
        return
    out = Path(app.outdir)
    _remove_stale(app, out)
    _write_index(app, out)
    _write_sitemap(app, out)
    _subset_icons(out)


def _remove_stale(app: Sphinx, out: Path) -> None:
    """Pages of documents that are gone: Sphinx leaves them, where search and old links would find them."""
    kept = {*app.env.found_docs, "index", "search", "404"}
    for page in out.rglob("*.html"):
        name = page.relative_to(out).with_suffix("").as_posix()
        if name not in kept and name.split("/")[0] not in ("_static", "pagefind"):
            page.unlink()
    for source in (out / "_sources").rglob("*"):
        if source.is_file() and source.relative_to(out / "_sources").with_suffix("").as_posix() not in kept:
            source.unlink()


def _write_index(app: Sphinx, out: Path) -> None:
    """The site's root is its first page, not a redirect to it: the address that people share has a title and a text."""
    page = (out / f"{app.config.root_doc}.html").read_text(encoding="utf-8")
    page = page.replace('<article class="bd-article">', '<article class="bd-article" data-pagefind-ignore="all">')
    (out / "index.html").write_text(page, encoding="utf-8")


def _write_sitemap(app: Sphinx, out: Path) -> None:
    """All pages of the book, also those that this build did not write again."""
    base = app.config.html_baseurl
    pages = "".join(f"<url><loc>{escape(base + name)}.html</loc></url>\n" for name in sorted(app.env.found_docs))
    (out / "sitemap.xml").write_text(
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f'<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">\n{pages}</urlset>\n',
        encoding="utf-8",
    )


def _subset_icons(out: Path) -> None:
    """Cut the theme's icon fonts, and the style sheet that names every icon, down to the icons that the pages use."""
    static = out / "_static"
    sheet = static / "styles" / "pydata-sphinx-theme.css"
    css = sheet.read_text(encoding="utf-8")
    text = "".join(
        path.read_text(encoding="utf-8") for path in [*out.rglob("*.html"), *static.glob("scripts/*theme.js")]
    )
    used = set(re.findall(r"\bfa-[\w-]+", text))
    codes = {
        ord(char) for char in css if 0xE000 <= ord(char) <= 0xF8FF
    }  # the theme's own rules name icons as characters
    codes |= {
        int(code, 16) for code in re.findall(r'"\\(f\w{3})"', (static / "styles/sphinx-book-theme.css").read_text())
    }

    def keep(rule: re.Match) -> str:
        if not used & set(re.findall(r"fa-[\w-]+", rule[0])):
            return ""
        codes.add(int(rule[1], 16))
        return rule[0]

    css = _ICON_RULE.sub(keep, css)
    css = re.sub(r',url\([^)]*\.ttf\) format\("truetype"\)', "", css)
    sheet.write_text(css, encoding="utf-8")
    for font in (static / "vendor/fontawesome/webfonts").iterdir():
        if font.suffix != ".woff2":
            font.unlink()
            continue
        options = subset.Options(flavor="woff2", layout_features=[], desubroutinize=True)
        loaded = subset.load_font(str(font), options)
        subsetter = subset.Subsetter(options)
        subsetter.populate(unicodes=codes)
        subsetter.subset(loaded)
        subset.save_font(loaded, str(font), options)
    for unused in static.glob("scripts/fontawesome.js*"):
        unused.unlink()


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_html_math_renderer("katex", (mathjax.html_visit_math, None), (mathjax.html_visit_displaymath, None))
    app.connect("config-inited", configure)
    app.connect("builder-inited", prepare)
    app.connect("html-page-context", dress, priority=900)
    app.connect("html-collect-pages", extra_pages)
    app.connect("build-finished", finish)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
