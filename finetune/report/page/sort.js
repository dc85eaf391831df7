"use strict";
for (const table of document.querySelectorAll("table.sorts")) {
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, column) => {
    header.querySelector("button").addEventListener("click", () => {
      const down = header.getAttribute("aria-sort") === "ascending";
      const sign = down ? -1 : 1;
      const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const numeric = header.classList.contains("number");
      const compare = (one, other) => {
        const [a, b] = [key(one), key(other)];
        if (!numeric) return sign * a.localeCompare(b, undefined, { numeric: true });
        if (a === "" || b === "") return (a === "") - (b === "");
        return sign * (Number(a) - Number(b));
      };
      const body = table.tBodies[0];
      body.append(...[...body.rows].sort(compare));
      for (const other of headers) other.setAttribute("aria-sort", "none");
      header.setAttribute("aria-sort", down ? "descending" : "ascending");
    });
  });
}
