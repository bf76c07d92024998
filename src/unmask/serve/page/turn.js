// One message of the conversation on the page: its text, the block being denoised, its costs and its buttons.

import { button, copyButton, make } from "./dom.js";
import { LiveBlock } from "./live.js";
import { Markdown } from "./markdown.js";

const FINISH_REASONS = {
  stop: "finished",
  length: "cut off at max tokens",
  tool_calls: "tool call",
  content_filter: "withheld",
};

export function userTurn(message, { edit }) {
  const actions = make("div", { className: "actions" }, button("Edit", edit), copyButton(() => message.content));
  return make("li", { className: "turn user" }, heading("You"), make("div", { className: "user-text" }, message.content), actions);
}

/** An answer, redrawn while it grows. */
export class AnswerTurn {
  #live = new LiveBlock();
  #body = make("div", { className: "markdown" });
  #markdown = new Markdown(this.#body);
  #costs = make("p", { className: "costs" });
  #error = make("p", { className: "error", hidden: true });
  #actions;
  #view = null;

  constructor(message, { retry }) {
    this.message = message;
    this.#actions = make("div", { className: "actions" }, copyButton(() => message.content), button("Try again", retry, { className: "retry" }));
    this.element = make("li", { className: "turn answer" }, heading("Answer"), this.#body, this.#error, this.#costs, this.#actions);
    this.draw();
  }

  /** Take in the block that is being denoised after `view.text`; the next `draw` shows it. */
  update(view) {
    this.#view = view;
    this.#live.update(view);
  }

  /** Show the message, and the block while there is one. */
  draw() {
    const { content, state, error } = this.message;
    const running = state === "running";
    (this.#live.element.closest(".next") ?? this.#live.element).remove();
    const isDenoising = running && this.#view !== null;
    const text = isDenoising ? this.#view.text : content;
    this.#markdown.update(text);
    if (isDenoising) {
      this.#live.draw();
      this.#markdown.appendInline(text, this.#live.element);
    }
    this.element.dataset.state = state;
    this.element.ariaBusy = String(running);
    this.#error.hidden = !error;
    this.#error.textContent = error ?? "";
    this.#costs.textContent = costs(this.message);
    this.#actions.hidden = running;
  }
}

function heading(name) {
  return make("h3", { className: "hidden" }, name);
}

function costs({ state, finish, stats }) {
  const { tokens, forwards, seconds, edits } = stats ?? {};
  const perForward = stats?.perForward ?? tokens / forwards;
  const parts = [
    tokens > 0 && count(tokens, "token"),
    forwards > 0 && count(forwards, "forward"),
    tokens > 0 && forwards > 0 && `${perForward.toFixed(2)} tokens per forward`,
    tokens > 0 && seconds > 0 && `${rate(stats.perSecond ?? tokens / seconds)} tokens/s`,
    edits > 0 && count(edits, "edit"),
    state === "running" ? !stats && "waiting for the first tokens" : state === "stopped" ? "stopped" : FINISH_REASONS[finish] ?? finish,
  ];
  return parts.filter(Boolean).join(" · ");
}

const count = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;
const rate = (value) => value.toFixed(value < 10 ? 1 : 0);
