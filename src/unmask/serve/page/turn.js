// One message of the conversation on the page: its text, the block behind it, what it cost, what can be done with it.

import { button, copyButton, make } from "./dom.js";
import { LiveBlock } from "./live.js";
import { Markdown } from "./markdown.js";

const ENDS = {
  stop: "finished",
  length: "cut off at max tokens",
  tool_calls: "asked for a tool",
  content_filter: "withheld",
};

export function userTurn(message, { edit }) {
  const actions = make("div", { className: "actions" }, button("Edit", edit), copyButton(() => message.content));
  return make("li", { className: "turn user" }, heading("You"), make("div", { className: "said" }, message.content), actions);
}

/** An answer, drawn again as it grows. */
export class AnswerTurn {
  #live = new LiveBlock();
  #body = make("div", { className: "markdown" });
  #markdown = new Markdown(this.#body);
  #costs = make("p", { className: "costs" });
  #problem = make("p", { className: "problem", hidden: true });
  #actions;
  #view = null;

  constructor(message, { retry }) {
    this.message = message;
    this.#actions = make("div", { className: "actions" }, copyButton(() => message.content), button("Try again", retry, { className: "retry" }));
    this.element = make("li", { className: "turn answer" }, heading("Answer"), this.#body, this.#problem, this.#costs, this.#actions);
    this.draw();
  }

  /** Take in the block that is being denoised behind `view.text`, to be shown at the next drawing. */
  see(view) {
    this.#view = view;
    this.#live.see(view);
  }

  /** Show the message as it is, and the block while there is one. */
  draw() {
    const { content, state, error } = this.message;
    const running = state === "running";
    (this.#live.element.closest(".next") ?? this.#live.element).remove();
    const forming = running && this.#view !== null;
    const text = forming ? this.#view.text : content;
    this.#markdown.update(text);
    if (forming) {
      this.#live.draw();
      this.#markdown.appendInline(text, this.#live.element);
    }
    this.element.dataset.state = state;
    this.element.ariaBusy = String(running);
    this.#problem.hidden = !error;
    this.#problem.textContent = error ?? "";
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
    state === "running" ? !stats && "waiting for the first tokens" : state === "stopped" ? "stopped" : ENDS[finish] ?? finish,
  ];
  return parts.filter(Boolean).join(" · ");
}

const count = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;
const rate = (value) => value.toFixed(value < 10 ? 1 : 0);
