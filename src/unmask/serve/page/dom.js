// Helpers for creating elements.

/** An element with properties and children. */
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

export function button(label, onclick, properties = {}) {
  return make("button", { type: "button", onclick, ...properties }, label);
}

/** A button that copies the result of `text()`. */
export function copyButton(text, label = "Copy") {
  const copy = button(label, async () => {
    copy.textContent = (await copyText(text())) ? "Copied" : "Could not copy";
    setTimeout(() => { copy.textContent = label; }, 1500);
  });
  return copy;
}

async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copyBySelection(text);
  }
}

/** Pages without https from another machine have no clipboard API; the deprecated command still works there. */
function copyBySelection(text) {
  const area = make("textarea", { value: text, className: "hidden" });
  const previousFocus = document.activeElement;
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  previousFocus?.focus();
  return copied;
}
