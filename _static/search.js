// The search page. Questions come from questions.json, matched in English and Chinese by substring: Pagefind cuts
// Chinese into words only on pages that are Chinese throughout, and these are English. Text comes from Pagefind.
const field = document.querySelector(".bd-search-container input[type=search]");
const status = document.getElementById("search-status");
const lists = ["search-questions", "search-text"].map((id) => document.getElementById(id));
let latest = 0;

/** Words of a query: a Latin word as it is, a run of Chinese as its pairs of characters, so that order may differ. */
function terms(query) {
  const found = query.toLowerCase().match(/[\u3400-\u9fff]+|[^\s\u3400-\u9fff]+/g) ?? [];
  return found.flatMap((run) =>
    /[\u3400-\u9fff]{3,}/.test(run) ? [...run].slice(1).map((_, at) => run.slice(at, at + 2)) : [run],
  );
}

function matching(questions, query) {
  const wanted = terms(query);
  const scored = questions.map((question) => {
    const content = `${question.question} ${question.question_zh}`.toLowerCase();
    return { question, score: wanted.filter((term) => content.includes(term)).length / wanted.length };
  });
  return scored.filter(({ score }) => score > 0.6).sort((a, b) => b.score - a.score).slice(0, 20);
}

function entry(url, title, ...lines) {
  const item = document.createElement("li");
  const link = Object.assign(document.createElement("a"), { href: url, textContent: title });
  item.append(link, " ", ...lines);
  return item;
}

function span(text, attributes) {
  return Object.assign(document.createElement("span"), { textContent: text, ...attributes });
}

/** The hits in the text: at most ten pages, each with the passage and the nearest heading above it. */
async function passages(pagefind, query) {
  const { results } = await pagefind.search(query);
  const pages = await Promise.all(results.slice(0, 10).map((result) => result.data()));
  return pages.map((page) => {
    const anchors = page.anchors.filter((anchor) => anchor.element === "section" && anchor.location <= page.locations[0]);
    const hash = anchors.length ? `#${anchors.at(-1).id}` : "";
    const excerpt = document.createElement("span");
    excerpt.className = "facts";
    excerpt.innerHTML = page.excerpt; // Pagefind escapes the text and adds <mark>
    return entry(page.url + hash, page.meta.title, excerpt);
  });
}

function show(list, items) {
  list.hidden = !items.length;
  list.querySelector("ul").replaceChildren(...items);
}

async function search() {
  const query = field.value.trim();
  const turn = ++latest;
  history.replaceState(null, "", query ? `?q=${encodeURIComponent(query)}` : location.pathname);
  if (!query) {
    lists.forEach((list) => show(list, []));
    status.textContent = "";
    return;
  }
  const [questions, pagefind] = await sources;
  const hits = matching(questions, query).map(({ question }) =>
    entry(question.url, question.question.replaceAll("`", ""), span(question.question_zh, { lang: "zh" }), " ",
      span(`${question.level} · ${question.evidence}`, { className: "facts" })));
  const texts = pagefind ? await passages(pagefind, query) : [];
  if (turn !== latest) return; // the reader has typed on
  show(lists[0], hits);
  show(lists[1], texts);
  status.textContent = hits.length + texts.length ? "" : `Nothing found for “${query}”.`;
}

const sources = Promise.all([
  fetch("questions.json").then((response) => response.json()),
  import(new URL("pagefind/pagefind.js", document.baseURI)).catch(() => null), // a build without make has no index
]);
field.value = new URLSearchParams(location.search).get("q") ?? "";
field.focus();
field.addEventListener("input", search);
field.form.addEventListener("submit", (event) => {
  event.preventDefault();
  search();
});
search();
