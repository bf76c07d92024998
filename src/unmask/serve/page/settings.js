// The settings panel, its controls made from the server's declarations of decoding options, and the request it makes of them.
// An option without a value is left to the server.

import { load, save } from "./store.js";
import { make } from "./dom.js";

const DEFAULTS = { system: "", watch: true, pace: 0 }; // of the page itself

export class Settings {
  #form;
  #model = null;
  #options = [];

  constructor(form) {
    this.#form = form;
    this.values = { ...DEFAULTS, ...load("settings", {}) };
    form.addEventListener("input", ({ target }) => this.#read(target));
    form.addEventListener("submit", (event) => event.preventDefault());
    this.#fill();
  }

  reset() {
    this.values = { ...DEFAULTS, system: this.values.system };
    save("settings", this.values);
    this.#fill();
  }

  /** Make the controls of the options that the model has. */
  setModel(model) {
    this.#model = model;
    this.#options = model.options ?? [];
    const panels = Map.groupBy(this.#options, ({ panel }) => panel);
    const fieldsets = [...panels].map(([panel, options]) =>
      make("fieldset", {}, make("legend", {}, panel), ...options.map(control)));
    this.#form.querySelector("#options").replaceChildren(...fieldsets);
    this.#fill();
  }

  /** The body of a request for the next answer to these messages. */
  request(messages) {
    const { system, watch } = this.values;
    const turns = system.trim() ? [{ role: "system", content: system }, ...messages] : messages;
    const body = { model: this.#model.id, messages: turns, stream: true, stream_options: { include_usage: true } };
    if (this.#model.diffusion) body.diffusion = { watch };
    for (const { name, section } of this.#options) {
      const value = this.values[name] ?? null;
      if (value === null) continue;
      const target = section === "diffusion" ? (body.diffusion ??= {}) : body;
      target[name === "max_new_tokens" ? "max_completion_tokens" : name] = value;
    }
    return body;
  }

  #read({ name, type, value, checked }) {
    const option = this.#options.find((each) => each.name === name);
    if (type === "checkbox") this.values[name] = option && checked === option.default ? null : checked;
    else if (type === "number" || name === "pace") this.values[name] = value === "" ? null : Number(value);
    else this.values[name] = option && value === "" ? null : value;
    save("settings", this.values);
  }

  #fill() {
    for (const field of this.#form.elements) {
      if (!field.name) continue;
      const value = this.values[field.name] ?? null;
      if (field.type === "checkbox") field.checked = value ?? this.#options.find(({ name }) => name === field.name)?.default;
      else field.value = value ?? "";
    }
  }
}

/** The labelled control of an option; empty, it shows the default. */
function control({ name, type, default: value, default_text, minimum, maximum, choices, help }) {
  const label = (name[0].toUpperCase() + name.slice(1)).replaceAll("_", " ");
  const id = `option-${name}`;
  const shared = { id, name };
  const text = make("small", { id: `${id}-help` }, help);
  const shown = value ?? default_text;
  const input = type === "boolean"
    ? make("input", { ...shared, type: "checkbox" })
    : choices.length
      ? make("select", shared, make("option", { value: "" }, `default (${shown})`), ...choices.map((each) => make("option", {}, each)))
      : make("input", {
        ...shared, type: "number", min: minimum ?? "", max: maximum ?? "", step: type === "integer" ? 1 : "any",
        inputMode: type === "integer" ? "numeric" : "decimal", placeholder: shown,
      });
  input.setAttribute("aria-describedby", text.id);
  const labelled = type === "boolean" ? [make("label", { className: "check" }, input, label)] : [make("label", { htmlFor: id }, label), input];
  return make("div", { className: "field" }, ...labelled, text);
}
