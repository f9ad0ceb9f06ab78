"use strict";
// Tables sort, the theme switches, and everything opens for printing. Without this script the page still says it all.

const collator = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" });

function valueOf(row, column) {
  const cell = row.cells[column];
  return cell.dataset.value ?? cell.textContent.trim();
}

// Cells without a value stay last in both directions.
function compare(one, other, numbers, sign) {
  if (one === "" || other === "") return (one === "") - (other === "");
  return sign * (numbers ? Number(one) - Number(other) : collator.compare(one, other));
}

function sortBy(table, column, direction) {
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const values = new Map(rows.map((row) => [row, valueOf(row, column)]));
  const numbers = [...values.values()].every((value) => value === "" || Number.isFinite(Number(value)));
  const sign = direction === "ascending" ? 1 : -1;
  rows.sort((one, other) => compare(values.get(one), values.get(other), numbers, sign));
  body.append(...rows);
  for (const head of table.tHead.rows[0].cells) head.removeAttribute("aria-sort");
  table.tHead.rows[0].cells[column].setAttribute("aria-sort", direction);
}

function makeSortable(table) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    if (table.tBodies[0].rows[0]?.cells[column]?.classList.contains("number")) head.classList.add("number");
    const button = document.createElement("button");
    button.type = "button";
    const notes = [...head.children].filter((part) => part.tagName === "SMALL");
    button.append(...[...head.childNodes].filter((part) => !notes.includes(part)));
    button.addEventListener("click", () => {
      sortBy(table, column, head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending");
    });
    head.prepend(button);
  });
  const hint = document.createElement("span");
  hint.className = "unseen";
  hint.textContent = ", sortable by the buttons in its header";
  table.caption.append(hint);
}

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

// Some viewers give a page no storage; the switch then works until the page is left.
function remember(theme) {
  try { localStorage.setItem("headroom-theme", theme); } catch { /* nothing to remember it in */ }
}

function remembered() {
  try { return localStorage.getItem("headroom-theme"); } catch { return null; }
}

function showTheme(button) {
  button.setAttribute("aria-pressed", String(isDark()));
}

const theme = remembered();
if (theme === "dark" || theme === "light") document.documentElement.dataset.theme = theme;
const themeSwitch = document.getElementById("theme");
themeSwitch.hidden = false;
showTheme(themeSwitch);
themeSwitch.addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  remember(document.documentElement.dataset.theme);
  showTheme(themeSwitch);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => showTheme(themeSwitch));

document.querySelectorAll("table.sortable").forEach(makeSortable);

let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open])")];
  opened.forEach((part) => { part.open = true; });
});
addEventListener("afterprint", () => opened.forEach((part) => { part.open = false; }));
