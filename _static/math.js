// Renders what Sphinx writes for mathematics: span.math with \(…\) and div.math with \[…\].
// An error is shown in the page (class katex-error), where the suite looks for it.
for (const node of document.querySelectorAll("span.math, div.math")) {
  const source = node.textContent.trim().replace(/^\\[([]|\\[)\]]$/g, "");
  katex.render(source, node, { displayMode: node.matches("div"), throwOnError: false });
}
