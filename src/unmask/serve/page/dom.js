// Small tools for making elements.

/** An element with properties and children. */
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

export function button(label, onclick, properties = {}) {
  return make("button", { type: "button", onclick, ...properties }, label);
}

/** A button that copies what `text` returns when it is pressed. */
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

/** Without https, a page that is not on this machine has no clipboard: the old way still works. */
function copyBySelection(text) {
  const area = make("textarea", { value: text, className: "hidden" });
  const focused = document.activeElement;
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  focused?.focus();
  return copied;
}
