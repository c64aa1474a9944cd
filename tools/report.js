
"use strict";
// Which clips are listed: those of a view, or of a cell of the confusion matrix. Without this script all of them are.
const cards = [...document.querySelectorAll(".cards li")];
const buttons = [...document.querySelectorAll("button")];
const listed = document.getElementById("listed");
const heading = document.getElementById("clips");

function list(button) {
  const { view, label, answer, count } = button.dataset;
  const cell = label !== undefined;
  const fits = ({ dataset }) =>
    cell ? dataset.label === label && dataset.answer === answer : !view || dataset.view === view;
  let shown = 0;
  for (const card of cards) {
    card.hidden = !fits(card);
    shown += !card.hidden;
    if (card.hidden) card.querySelector("audio").pause();
  }
  for (const other of buttons) other.setAttribute("aria-pressed", other === button);
  listed.textContent = cell
    ? `${button.getAttribute("aria-label")}: ${shown} of them ${shown === 1 ? "is" : "are"} on this page, ${
        count - shown} more in predictions.csv`
    : `${shown} of the ${cards.length} clips on this page`;
  if (cell) heading.focus();
}

for (const button of buttons) button.addEventListener("click", () => list(button));
document.querySelector(".views").hidden = false;
list(buttons.find(({ dataset }) => dataset.view === (cards[0]?.dataset.view ?? "")));

// One sound at a time.
document.addEventListener("play", ({ target }) => {
  for (const audio of document.querySelectorAll("audio")) if (audio !== target) audio.pause();
}, true);

// A table that does not fit says so, because a phone shows no scroll bar.
for (const table of document.querySelectorAll(".wide")) {
  const hint = table.previousElementSibling;
  new ResizeObserver(() => { hint.hidden = table.scrollWidth <= table.clientWidth; }).observe(table);
}
