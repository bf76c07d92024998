// The block that is being denoised: one element per token, its look saying how sure it is. Knows nothing of the server.

import { make } from "./dom.js";

const UNGUESSED = "░░";

/**
 * A view of a block is {start, committed, tokens: [{text, state, confidence}]}; places count from the answer's first token.
 * What is committed stands in the text before the block, and is not shown again.
 */
export class LiveBlock {
  element = make("span", { className: "block" });
  #start = null;
  #edited = new Set();

  constructor() {
    this.element.ariaHidden = "true"; // words that may change are not for reading aloud
  }

  show(view) {
    if (view.start !== this.#start) {
      this.#start = view.start;
      this.#edited.clear();
      this.element.replaceChildren();
    }
    const spans = this.element.children;
    view.tokens.forEach((token, place) => {
      if (token.state === "edited") this.#edited.add(place);
      draw(spans[place] ?? this.element.appendChild(make("span")), token, this.#edited.has(place), view.start + place < view.committed);
    });
    while (spans.length > view.tokens.length) this.element.lastChild.remove();
  }
}

/** An edit lasts one step, too short to see: the token stays marked while its block forms. */
function draw(span, { text, state, confidence }, wasEdited, isHidden) {
  const look = state !== "masked" && wasEdited ? "edited" : state;
  const shown = spell(text, state);
  const className = `token ${look}${shown === UNGUESSED ? " unguessed" : ""}`;
  if (span.className !== className) span.className = className;
  if (span.textContent !== shown) span.textContent = shown;
  span.hidden = isHidden || shown === "";
  span.style.setProperty("--sure", state === "masked" ? confidence ?? 0 : 1);
}

function spell(text, state) {
  const whole = text.replaceAll("\ufffd", "·");
  if (state !== "masked") return whole.replaceAll("\n", "↵\n");
  const guess = whole.replaceAll("\n", "↵");
  return guess.trim() ? guess : UNGUESSED;
}
