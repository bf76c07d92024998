// The settings panel, and the request it makes of them. null means: left to the server.

import { load, save } from "./store.js";
import { make } from "./dom.js";

const DEFAULTS = {
  system: "", threshold: null, block_size: null, preset: "", watch: true, pace: 0, temperature: 0, max_tokens: null, seed: null,
};
const NUMBERS = new Set(["threshold", "block_size", "pace", "temperature", "max_tokens", "seed"]);
const BLOCK_SIZES = [4, 8, 16, 32, 64];

export class Settings {
  #form;
  #model = null;

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

  /** Take in the model's own values, the defaults of what is not set. */
  setModel(model) {
    this.#model = model;
    const own = model.diffusion?.block_size;
    const sizes = BLOCK_SIZES.filter((size) => size !== own);
    this.#form.elements.block_size.replaceChildren(
      make("option", { value: "" }, `${own ?? ""} (the model's)`),
      ...sizes.map((size) => make("option", { value: size }, size)),
    );
    this.#form.elements.max_tokens.max = model.max_model_len;
    this.#fill();
  }

  /** The body of a request for the next answer to these messages. */
  request(messages) {
    const { system, threshold, block_size, preset, watch, temperature, max_tokens, seed } = this.values;
    const turns = system.trim() ? [{ role: "system", content: system }, ...messages] : messages;
    const body = { model: this.#model.id, messages: turns, stream: true, stream_options: { include_usage: true }, temperature };
    if (max_tokens !== null) body.max_completion_tokens = max_tokens;
    if (seed !== null) body.seed = seed;
    if (this.#model.diffusion) {
      const given = { threshold, block_size, preset: preset || null };
      body.diffusion = { watch, ...Object.fromEntries(Object.entries(given).filter(([, value]) => value !== null)) };
    }
    return body;
  }

  #read(field) {
    const { name, type, value } = field;
    if (type === "checkbox") this.values[name] = field.checked;
    else if (NUMBERS.has(name)) this.values[name] = value === "" ? null : Number(value);
    else this.values[name] = value;
    save("settings", this.values);
    this.#showNumbers();
  }

  #fill() {
    const own = { threshold: this.#model?.diffusion?.threshold };
    for (const [name, value] of Object.entries(this.values)) {
      const field = this.#form.elements[name];
      if (!field) continue; // a setting of an older page
      if (field.type === "checkbox") field.checked = value;
      else field.value = value ?? own[name] ?? "";
    }
    this.#showNumbers();
  }

  #showNumbers() {
    const { threshold, preset } = this.values;
    for (const output of this.#form.querySelectorAll("output")) {
      const field = this.#form.elements[output.htmlFor];
      output.value = field.name === "threshold" && preset && threshold === null ? "as for the edits" : field.value;
    }
  }
}
