"use strict";
// Sorting: numbers by value, words by letters; what is missing stays at the end in both directions.
const order = (a, b) => {
  const [x, y] = [Number(a), Number(b)];
  return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b) : x - y;
};
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    // Numbers are looked at from the highest, words from A.
    const first = head.classList.contains("number") ? "descending" : "ascending";
    const other = first === "ascending" ? "descending" : "ascending";
    const way = head.getAttribute("aria-sort") === first ? other : first;
    heads.forEach((each) => each.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", way);
    const key = (row) => row.cells[column].dataset.key;
    const sign = way === "ascending" ? 1 : -1;
    const rows = [...table.tBodies[0].rows];
    rows.sort((a, b) => (key(a) === "") - (key(b) === "") || sign * order(key(a), key(b)));
    table.tBodies[0].append(...rows);
  }));
}
// All tables show the same number of steps.
const filters = [...document.querySelectorAll(".filter button")];
for (const button of filters) {
  button.addEventListener("click", () => {
    filters.forEach((each) => each.setAttribute("aria-pressed", String(each === button)));
    document.documentElement.classList.toggle("filtered", button.dataset.steps !== "all");
    document.querySelectorAll("tbody").forEach((body) => body.classList.remove("unfiltered"));
    for (const row of document.querySelectorAll("tr[data-steps]")) {
      row.hidden = ![row.dataset.steps, "all"].includes(button.dataset.steps);
    }
  });
}
// The slider shows pictures that are in the page already, so that each is stored once.
for (const prompt of document.querySelectorAll("article.prompt")) {
  const stage = prompt.querySelector(".stage"), range = stage.querySelector("input");
  const cards = [...prompt.querySelectorAll(".card")];
  const sides = [["before", prompt.querySelector(".left")], ["after", prompt.querySelector(".right")]];
  const show = () => {
    for (const [name, choice] of sides) {
      const picture = stage.querySelector(`.${name}`);
      picture.src = cards[choice.selectedIndex].querySelector("img").src;
      picture.alt = choice.value;
    }
    cards.forEach((each, i) => each.setAttribute("aria-pressed", String(i === sides[1][1].selectedIndex)));
  };
  for (const [, choice] of sides) choice.addEventListener("change", show);
  cards.forEach((card, i) => card.addEventListener("click", () => {
    sides[1][1].selectedIndex = i;
    show();
  }));
  const cut = () => stage.style.setProperty("--cut", `${range.value}%`);
  range.addEventListener("input", cut);
  // Fingers and the mouse drag anywhere on the picture; the keyboard moves the range that lies over it, unseen. A finger
  // that scrolls the page up or down moves nothing.
  let from = null;
  const move = (event) => {
    const box = stage.getBoundingClientRect();
    range.value = 100 * (event.clientX - box.left) / box.width;
    cut();
  };
  stage.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    from = [event.clientX, event.clientY];
    stage.setPointerCapture(event.pointerId);
    range.focus({ preventScroll: true });
    if (event.pointerType === "mouse") move(event);
    event.preventDefault();
  });
  stage.addEventListener("pointermove", (event) => {
    if (from === null) return;
    const [x, y] = [Math.abs(event.clientX - from[0]), Math.abs(event.clientY - from[1])];
    if (event.pointerType === "mouse" || x > y) move(event);
  });
  stage.addEventListener("pointerup", (event) => {
    if (from !== null) move(event);
    from = null;
  });
  stage.addEventListener("pointercancel", () => { from = null; });
  show();
}
