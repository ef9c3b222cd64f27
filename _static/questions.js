// The filter of the question index. Without this script the page shows every question and no form.
const index = document.getElementById("question-index");
const form = index.querySelector("form");
const items = [...index.querySelectorAll("li")];
const status = index.querySelector(".question-count");

function filter() {
  const { text, ...wanted } = Object.fromEntries(new FormData(form));
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  for (const item of items) {
    const content = item.textContent.toLowerCase();
    item.hidden =
      Object.entries(wanted).some(([name, value]) => value && item.dataset[name] !== value) ||
      !words.every((word) => content.includes(word));
  }
  for (const section of index.querySelectorAll("section")) {
    section.hidden = !section.querySelector("li:not([hidden])");
  }
  const shown = items.filter((item) => !item.hidden).length;
  status.textContent = `${shown} of ${items.length} questions`;
}

form.hidden = false;
form.addEventListener("input", filter);
form.addEventListener("submit", (event) => event.preventDefault());
filter(); // a browser may restore the fields of an earlier visit
