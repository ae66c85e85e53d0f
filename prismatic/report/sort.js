"use strict";
// A click on the head of a column orders the rows of its table: ascending, then descending. Totals stay below.
for (const button of document.querySelectorAll("table.sortable thead button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th");
    const table = head.closest("table");
    const column = head.cellIndex;
    const descending = head.getAttribute("aria-sort") === "ascending";
    const compare = (first, second) => {
      const [a, b] = [first, second].map((row) => row.cells[column]);
      if (a.dataset.sort !== undefined && b.dataset.sort !== undefined) return a.dataset.sort - b.dataset.sort;
      return a.textContent.trim().localeCompare(b.textContent.trim(), undefined, { numeric: true });
    };
    const body = table.tBodies[0];
    const rows = [...body.rows].sort(compare);
    if (descending) rows.reverse();
    body.append(...rows);
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
  });
}
