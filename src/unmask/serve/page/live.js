// The block that is being denoised: one element per token, its look saying how sure it is. Knows nothing of the server.

import { make } from "./dom.js";

const UNGUESSED = "░░";

/**
 * A view of a block is {start, committed, tokens: [{text, state, confidence}]}; places count from the answer's first token.
 * What is committed stands in the text before the block, and is not shown again.
 */
export class LiveBlock {
  element = make("span", { className: "block" });
  #view = null;
  #edited = new Set();

  constructor() {
    this.element.ariaHidden = "true"; // words that may change are not for reading aloud
  }

  /** Take in a view. Several may come between two drawings: what one of them edited is remembered. */
  see(view) {
    if (view.start !== this.#view?.start) this.#edited.clear();
    view.tokens.forEach(({ state }, place) => { if (state === "edited") this.#edited.add(place); });
    this.#view = view;
  }

  draw() {
    const view = this.#view;
    const spans = this.element.children;
    view.tokens.forEach((token, place) => {
      const span = spans[place] ?? this.element.appendChild(make("span"));
      draw(span, token, { wasEdited: this.#edited.has(place), isInText: view.start + place < view.committed });
    });
    while (spans.length > view.tokens.length) this.element.lastChild.remove();
  }
}

/** An edit lasts one step, too short to see: the token stays marked while its block forms. */
function draw(span, { text, state, confidence }, { wasEdited, isInText }) {
  const look = state !== "masked" && wasEdited ? "edited" : state;
  const shown = isInText ? "" : spell(text, state);
  const className = `token ${look}${shown === UNGUESSED ? " unguessed" : ""}`;
  if (span.className !== className) span.className = className;
  if (span.textContent !== shown) span.textContent = shown;
  span.hidden = shown === "";
  span.style.setProperty("--sure", state === "masked" ? confidence ?? 0 : 1);
}

function spell(text, state) {
  const whole = text.replaceAll("\ufffd", "·");
  if (state !== "masked") return whole.replaceAll("\n", "↵\n");
  const guess = whole.replaceAll("\n", "↵");
  return guess.trim() ? guess : UNGUESSED;
}
