"""The built site, in a browser: complete without a third party, readable by everyone, light, and in step with the notebooks.

`make test` builds the site first; alone, run `make book` and then `pytest tests/test_site.py`.
"""

import functools
import gzip
import http.server
import json
import shutil
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import bookdata
import pytest
import yaml
from axe_playwright_python.sync_playwright import Axe
from bookdata import ROOT
from playwright.sync_api import sync_playwright

SITE = ROOT / "_build" / "html"
PAGES = sorted(
    path.relative_to(SITE).as_posix()
    for path in SITE.rglob("*.html")
    if path.relative_to(SITE).parts[0] not in ("_static", "pagefind")
) or ["intro.html"]  # without a site there is still a test to fail
SHOWN = [name for name in PAGES if name != "index.html"]  # index.html is a copy of the first page
SOURCES = [ROOT / f"{name}.ipynb" for name in bookdata.toc() if (ROOT / f"{name}.ipynb").exists()]
NOTEBOOKS = [path.relative_to(ROOT).with_suffix(".html").as_posix() for path in SOURCES]
REPOSITORY = bookdata.config()["repository"]
PROJECT = REPOSITORY["url"].rstrip("/").split("/")[-1]
FIRST_LOAD = 400_000  # bytes, compressed
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SWITCHES = ["no-sandbox", "disable-gpu", "disable-background-networking", "disable-component-update", "disable-sync"]


def address() -> str:
    """The site's address on GitHub Pages."""
    owner, project = REPOSITORY["url"].rstrip("/").split("/")[-2:]
    return f"https://{owner.lower()}.github.io/{project}/"


class Page(HTMLParser):
    """What a page of the site links to, and what can be linked to in it."""

    def __init__(self, path: Path):
        super().__init__()
        self.ids, self.links, self.tags = set(), [], []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.ids.add(attributes.get("id"))
        self.links += [attributes[name] for name in ("href", "src") if attributes.get(name) is not None]

    def meta(self) -> dict[str, str]:
        named = [attributes for tag, attributes in self.tags if tag == "meta"]
        return {a.get("property") or a["name"]: a["content"] for a in named if "content" in a}


@functools.cache
def parsed(name: str) -> Page:
    return Page(SITE / name)


class Host(http.server.SimpleHTTPRequestHandler):
    """Serves the site as a static host does: at the root or below the project's name, with 404.html for what is missing."""

    def translate_path(self, path):
        return super().translate_path(path.removeprefix(f"/{PROJECT}"))

    def send_error(self, code, message=None, explain=None):
        if code != 404:
            return super().send_error(code, message, explain)
        body = (SITE / "404.html").read_bytes()
        self.send_response(404)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module", autouse=True)
def built():
    if not (SITE / "intro.html").is_file():
        pytest.fail("there is no site in _build/html: run make book", pytrace=False)


@pytest.fixture(scope="module")
def host():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Host, directory=SITE))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=[f"--{name}" for name in SWITCHES])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, host):
    """Open a page; afterwards nothing may have gone wrong in it, and nothing may have come from elsewhere."""
    contexts, wrong = [], []

    def foreign(request):
        return not request.url.startswith((host, "data:", "blob:"))

    def visit(name, width=1280, scheme="light", **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: wrong.append(f"foreign: {request.url}") if foreign(request) else None)
        page.on("requestfailed", lambda request: wrong.append(f"failed: {request.url}"))
        page.on("response", lambda reply: wrong.append(f"{reply.status}: {reply.url}") if reply.status >= 400 else None)
        page.goto(host + name, wait_until="networkidle")
        return page

    visit.wrong = wrong
    yield visit
    for context in contexts:
        context.close()
    assert wrong == []


# --- without a browser ------------------------------------------------------------------------------------------------


def test_every_document_of_the_table_of_contents_has_a_page():
    assert {f"{name}.html" for name in bookdata.toc()} | {"index.html", "404.html", "search.html"} == set(PAGES)


@pytest.mark.parametrize("name", PAGES)
def test_internal_links_lead_somewhere(name):
    """Every link and every source inside the site, with its anchor."""
    base = "/" if name == "404.html" else f"/{name}"
    for link in parsed(name).links:
        url = urlsplit(urljoin(base, link))
        if url.scheme or url.netloc or link == urlsplit(address()).path:
            continue
        target = unquote(url.path).lstrip("/") or "index.html"
        assert (SITE / target).is_file(), f"{name}: {link}"
        if url.fragment and target.endswith(".html"):
            assert unquote(url.fragment) in parsed(target).ids, f"{name}: {link} has no anchor"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_question_keeps_its_address(name):
    """The id from the notebook is the section's own, and the one that the tables of contents use."""
    page = parsed(name)
    sections = [attributes.get("id") for tag, attributes in page.tags if tag == "section"]
    for question in bookdata.questions((ROOT / name).with_suffix(".ipynb")):
        assert question.id in sections
        assert f"#{question.id}" in page.links


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_says_when_it_was_verified(name):
    verified = bookdata.read((ROOT / name).with_suffix(".ipynb")).metadata["verified"]
    assert f"Last verified: {verified['date']} · Python {verified['python']} · torch" in parsed(name).text


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_buttons_lead_to_this_notebook_in_the_repository(name):
    source = name.replace(".html", ".ipynb")
    path = "/".join(REPOSITORY["url"].split("/")[-2:])
    links = parsed(name).links
    assert f"https://colab.research.google.com/github/{path}/blob/{REPOSITORY['branch']}/{source}" in links
    assert f"https://mybinder.org/v2/gh/{path}/{REPOSITORY['branch']}?urlpath=lab/tree/{source}" in links
    [download] = [link for link in links if "_sources/" in link]
    downloaded = (SITE / name).parent / download
    assert downloaded.read_bytes() == (ROOT / source).read_bytes()


def test_binder_installs_labkit_and_the_models():
    environment = yaml.safe_load((ROOT / "binder/environment.yml").read_text())
    assert "conda-forge" in environment["channels"]
    script = ROOT / "binder/postBuild"
    assert script.stat().st_mode & 0o111
    assert "--no-deps -e ." in script.read_text() and "--no-deps -r requirements-models.txt" in script.read_text()


@pytest.mark.parametrize("name", [name for name in SHOWN if name not in ("404.html", "search.html")])
def test_a_page_describes_itself(name):
    page, meta = parsed(name), parsed(name).meta()
    assert ("html", "en") in [(tag, attributes.get("lang")) for tag, attributes in page.tags]
    assert meta["og:title"] and meta["og:description"] and meta["twitter:card"]
    assert meta["og:url"] == address() + name


def test_the_site_opens_with_its_first_page():
    assert parsed("index.html").meta() == parsed("intro.html").meta()


def test_the_sitemap_lists_every_page():
    sitemap = (SITE / "sitemap.xml").read_text()
    for name in bookdata.toc():
        assert f"<loc>{address()}{name}.html</loc>" in sitemap


def test_questions_json_is_what_the_notebooks_say():
    expected = [question for path in SOURCES for question in bookdata.questions(path)]
    records = json.loads((SITE / "questions.json").read_text(encoding="utf-8"))
    assert [record["id"] for record in records] == [question.id for question in expected]
    for record, question in zip(records, expected, strict=True):
        assert record["question"] == question.text and record["question_zh"] == question.text_zh
        assert record["url"] == question.url and record["claims"] == question.claims
        for name in ("chapter", "level", "evidence", "collections"):
            assert record[name] == getattr(question, name)


def test_lists_hold_every_question_and_every_claim():
    questions = json.loads((SITE / "questions.json").read_text(encoding="utf-8"))
    claims = [claim for question in questions for claim in question["claims"]]
    rows = [tag for tag, attributes in parsed("claims.html").tags if tag == "tr" and attributes.get("role") == "row"]
    heads = [question for question in questions if question["claims"]]
    assert len(rows) == len(claims) + len(heads)
    assert f"{len(claims):,} claim" in parsed("claims.html").text
    for question in questions:
        assert question["url"] in parsed("questions.html").links
        front = f"chapters/{question['chapter']}/index.html"
        if front in PAGES:
            assert any(link.endswith(f"#{question['id']}") for link in parsed(front).links)


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHOWN)
def test_a_page_is_complete_and_fits_a_telephone(visit, name):
    """No error, no foreign request (see `visit`), all mathematics rendered, every figure there, no sideways scrolling."""
    page = visit(name, width=360)
    page.evaluate("for (const image of document.images) image.loading = 'eager'")
    page.wait_for_function("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    raw = page.evaluate(
        r"[...document.querySelectorAll('.math')].filter((node) => !node.querySelector('.katex')).length"
    )
    assert raw == 0 and page.locator(".katex-error").count() == 0
    assert bool(page.locator(".katex").count()) == ('class="math' in parsed(name).text)
    prose = page.evaluate(
        """() => {
            const main = document.querySelector("main").cloneNode(true);
            main.querySelectorAll("pre, code, script, .katex").forEach((node) => node.remove());
            return main.textContent;
        }"""
    )
    assert r"\(" not in prose  # mathematics that nothing rendered; in code it is a regular expression
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


KINDS = ["404.html", "search.html", "intro.html", "questions.html", "claims.html", *NOTEBOOKS[:2]]
KINDS += [name for name in SHOWN if name.endswith("/index.html")][:1]
# axe looks at every coloured word: of what a page repeats by the hundred (code cells, rows, entries) it gets the first few.
THIN = """for (const alike of [".cell_input", "#all-claims table", "#question-index li"]) {
  [...document.querySelectorAll(alike)].slice(4).forEach((node) => node.remove());
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", KINDS)
def test_a_page_is_accessible(visit, name, scheme):
    """Colours are compared once for each scheme: they do not depend on the width."""
    page = visit(name, scheme=scheme)
    for width in (1280, 360):
        if width != 1280:
            page.set_viewport_size({"width": width, "height": 900})
            page.reload()  # the theme makes what scrolls focusable when it loads
        page.evaluate(THIN)
        rules = {"color-contrast": {"enabled": width == 1280}}
        options = {"preload": False, "resultTypes": ["violations"], "rules": rules}
        violations = Axe().run(page, options=options).response["violations"]
        grave = [(v["id"], v["nodes"][0]["html"]) for v in violations if v["impact"] in ("serious", "critical")]
        assert grave == [], f"{width} px"


def weight(browser, url) -> int:
    """Bytes of everything that a first visit fetches, compressed."""
    page, replies = browser.new_page(viewport={"width": 1280, "height": 900}), []
    page.on("response", lambda reply: replies.append(reply))
    page.goto(url, wait_until="networkidle")
    total = sum(len(gzip.compress(reply.body())) for reply in replies)
    page.close()
    return total


def test_the_heaviest_notebook_page_is_light(browser, host):
    weights = {name: weight(browser, host + name) for name in NOTEBOOKS}
    heaviest = max(weights, key=weights.get)
    print(f"{heaviest}: {weights[heaviest] / 1000:.0f} KB")
    assert weights[heaviest] < FIRST_LOAD, heaviest


@pytest.mark.parametrize("language", ["question", "question_zh"])
def test_search_finds_a_question(visit, language):
    wanted = json.loads((SITE / "questions.json").read_text(encoding="utf-8"))[-1]
    page = visit("intro.html")
    page.keyboard.press("Control+k")
    page.locator("#pst-search-dialog input").fill(wanted[language].strip("?？"))
    page.keyboard.press("Enter")
    page.wait_for_url("**/search.html?q=*")
    link = page.locator(f"#search-questions a[href='{wanted['url']}']")
    link.wait_for()
    link.click()
    page.wait_for_url(f"**/{wanted['url']}")
    assert page.locator(f"section#{wanted['id']}").is_visible()


def test_search_finds_text_and_says_when_it_finds_nothing(visit, host):
    """Below the project's path, where a path from the server's root would lead elsewhere."""
    page = visit(f"{PROJECT}/search.html")
    field = page.locator(".bd-search-container input[type=search]")
    field.fill("collections of interview questions")  # stands on the page of all questions
    link = page.locator("#search-text a[href*='questions.html']")
    link.wait_for()
    assert link.evaluate("link => link.href").startswith(f"{host}{PROJECT}/questions.html")
    field.fill("龘龘")  # in Latin letters Pagefind would fall back to a shorter word
    page.locator("#search-status", has_text="Nothing found").wait_for()


def test_the_question_filter_narrows_the_list(visit):
    questions = json.loads((SITE / "questions.json").read_text(encoding="utf-8"))
    page = visit("questions.html")
    shown = page.locator("#question-index li:visible")
    assert shown.count() == len(questions)
    for name in ("level", "evidence", "chapter"):
        value = questions[-1][name]
        page.locator(f".question-filter [name={name}]").select_option(value)
        assert shown.count() == sum(question[name] == value for question in questions)
        page.locator(f".question-filter [name={name}]").select_option("")
    for text in (questions[0]["question_zh"], questions[0]["question"].replace("`", "").upper()):
        page.locator(".question-filter [name=text]").fill(text)
        assert 1 <= shown.count() < len(questions)
        assert page.locator("#question-index a:visible").first.get_attribute("href") == questions[0]["url"]


def test_the_question_index_works_without_scripts(visit):
    page = visit("questions.html", java_script_enabled=False)
    assert page.locator("#question-index li:visible").count() == len(json.loads((SITE / "questions.json").read_text()))
    assert not page.locator(".question-filter").is_visible()


def test_code_can_be_copied(visit):
    page = visit(NOTEBOOKS[0])
    assert page.locator(".cell_input button.copybtn").count() == page.locator(".cell_input").count() > 0
    assert page.locator(".cell_output button.copybtn").count() == 0


@pytest.mark.parametrize("prefix", ["", f"{PROJECT}/"], ids=["root", "project path"])
def test_a_missing_page_leads_back(visit, host, prefix):
    page = visit(f"{prefix}a/b/missing.html")
    assert len(visit.wrong) == 2 and all("404" in problem for problem in visit.wrong)  # the page itself, said twice
    visit.wrong.clear()
    page.locator("a", has_text="All questions").click()
    page.wait_for_url(f"{host}{prefix}questions.html")
    assert page.locator("h1").first.inner_text().startswith("All questions")
