"use strict";
// What a mark says, beside the pointer or the finger.
const say = document.getElementById("say");
function show(event) {
  const mark = event.target.closest ? event.target.closest("[data-say]") : null;
  say.hidden = !mark;
  if (!mark) return;
  say.textContent = mark.dataset.say;
  const box = say.getBoundingClientRect(), room = document.documentElement.clientWidth - box.width - 8;
  say.style.left = Math.max(4, Math.min(event.clientX + 12, room)) + "px";
  const below = event.clientY + 18;
  say.style.top = (below + box.height > innerHeight ? event.clientY - box.height - 12 : below) + "px";
}
for (const kind of ["pointermove", "pointerdown"]) document.addEventListener(kind, show);
document.addEventListener("scroll", () => { say.hidden = true; }, true);

// Tables sort by the column whose name is clicked: numbers by size, the rest as text; once more turns the order.
const number = text => parseFloat(text.replace(/,/g, "").replace("−", "-"));
function sort(head) {
  const table = head.closest("table"), body = table.tBodies[0], place = head.cellIndex;
  const down = head.getAttribute("aria-sort") === "ascending";
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const text = row => row.cells[place].textContent.trim();
  const rows = [...body.rows].sort((a, b) => {
    const [x, y] = [text(a), text(b)], [i, j] = [number(x), number(y)];
    if (!x || !y) return !x - !y;  // empty cells stay below
    const order = isNaN(i) || isNaN(j) ? x.localeCompare(y) : i - j;
    return down ? -order : order;
  });
  body.append(...rows);
}
for (const head of document.querySelectorAll("thead th")) {
  head.tabIndex = 0;
  head.addEventListener("click", () => sort(head));
  head.addEventListener("keydown", event => { if (event.key === "Enter") sort(head); });
}

// What scrolls sideways says so, and fades at the right while there is more.
const mark = box => {
  const hidden = box.scrollWidth - box.clientWidth;
  box.classList.toggle("wide", hidden > 1);
  box.classList.toggle("more", hidden - box.scrollLeft > 1);
};
const sizes = new ResizeObserver(entries => requestAnimationFrame(() => { for (const entry of entries) mark(entry.target); }));
for (const box of document.querySelectorAll(".frame, .scroll, .next code")) {
  sizes.observe(box);
  box.addEventListener("scroll", () => mark(box), { passive: true });
}
addEventListener("beforeprint", () => { for (const fold of document.querySelectorAll("details")) fold.open = true; });
