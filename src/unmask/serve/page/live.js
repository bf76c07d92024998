// The block that is being denoised: one element per token, styled by its state and confidence. Knows nothing of the server.

import { make } from "./dom.js";

const NO_CANDIDATE = "░░";

/**
 * A view of a block is {start, committed, tokens: [{text, state, confidence}]}; positions count from the answer's first token.
 * Committed tokens are part of the text before the block and are not shown again.
 */
export class LiveBlock {
  element = make("span", { className: "block" });
  #view = null;
  #edited = new Set();

  constructor() {
    this.element.ariaHidden = "true"; // text that may change is not read aloud
  }

  /** Take in a view. Several may arrive between two redraws, so edits of all of them are remembered. */
  update(view) {
    if (view.start !== this.#view?.start) this.#edited.clear();
    view.tokens.forEach(({ state }, index) => { if (state === "edited") this.#edited.add(index); });
    this.#view = view;
  }

  draw() {
    const view = this.#view;
    const spans = this.element.children;
    view.tokens.forEach((token, index) => {
      const span = spans[index] ?? this.element.appendChild(make("span"));
      draw(span, token, { wasEdited: this.#edited.has(index), isInText: view.start + index < view.committed });
    });
    while (spans.length > view.tokens.length) this.element.lastChild.remove();
  }
}

/** An edit lasts one step, which is too short to see: the token stays marked while its block is denoised. */
function draw(span, { text, state, confidence }, { wasEdited, isInText }) {
  const style = state !== "masked" && wasEdited ? "edited" : state;
  const label = isInText ? "" : visibleText(text, state);
  const className = `token ${style}${label === NO_CANDIDATE ? " no-candidate" : ""}`;
  if (span.className !== className) span.className = className;
  if (span.textContent !== label) span.textContent = label;
  span.hidden = label === "";
  span.style.setProperty("--confidence", state === "masked" ? confidence ?? 0 : 1);
}

function visibleText(text, state) {
  const whole = text.replaceAll("\ufffd", "·");
  if (state !== "masked") return whole.replaceAll("\n", "↵\n");
  const candidate = whole.replaceAll("\n", "↵");
  return candidate.trim() ? candidate : NO_CANDIDATE;
}
