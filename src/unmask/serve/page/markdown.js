// Markdown to safe HTML. HTML in it stays text, links open in a new tab, images become links: nothing is loaded.

import { Marked } from "./vendor/marked.esm.js";
import { copyButton, make } from "./dom.js";

const { DOMPurify } = window;

const SANITIZE = {
  ALLOWED_TAGS: ["a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre",
    "strong", "table", "tbody", "td", "th", "thead", "tr", "ul"],
  ALLOWED_ATTR: ["align", "class", "href", "start", "title"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

const escape = (text) => text.replace(/[&<>"']/g, (letter) => `&#${letter.charCodeAt(0)};`);

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html: ({ text, block }) => (block ? `<p>${escape(text)}</p>` : escape(text)),
    image: ({ href, text }) => `<a href="${escape(href)}">${escape(text || href)}</a>`,
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  },
});

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.nodeName === "A" && node.hasAttribute("href")) {
    node.setAttribute("target", "_blank");
    node.setAttribute("rel", "noopener noreferrer");
  }
  if (node.className && !/^language-[\w+#.-]+$/.test(node.className)) node.removeAttribute("class");
});

/** An element that shows a growing text. Only changed parts are rendered again, so a selection before them survives. */
export class Markdown {
  #parts = [];

  constructor(element) {
    this.element = element;
  }

  update(text) {
    const tokens = marked.lexer(text);
    const same = tokens.findIndex((token, i) => token.raw !== this.#parts[i]?.raw);
    const numSame = same === -1 ? tokens.length : same;
    for (const { nodes } of this.#parts.splice(numSame)) nodes.forEach((node) => node.remove());
    for (const token of tokens.slice(numSame)) {
      const fragment = DOMPurify.sanitize(marked.parser([token]), SANITIZE);
      fragment.querySelectorAll("pre").forEach(addCodeHead);
      fragment.querySelectorAll("table").forEach((table) => wrap(table, "table-scroll"));
      this.#parts.push({ raw: token.raw, type: token.type, nodes: [...fragment.children] });
      this.element.append(...fragment.children);
    }
  }

  /** Append an element directly after the last word of `text`, the text shown now. */
  appendInline(text, element) {
    const last = this.#parts.at(-1);
    const space = text.match(/\s*$/)[0];
    if (!last?.nodes.length || startsParagraph(last, space)) {
      const paragraph = make("p", { className: "next" }, element);
      this.element.append(paragraph);
      return;
    }
    const parent = innermost(last.nodes.at(-1));
    const code = parent.closest("pre");
    if (code) parent.textContent = parent.textContent.trimEnd();
    parent.append(code && !parent.textContent ? "" : space, element);
  }
}

/** Whether text after this part begins a new paragraph. */
function startsParagraph({ type, raw }, space) {
  if (type === "code") return !raw.startsWith("`") || /\n\s*(`{3,}|~{3,})\s*$/.test(raw);
  if (type === "paragraph" || type === "text" || type === "list" || type === "blockquote") return /\n\s*\n/.test(space);
  return type === "heading" ? space.includes("\n") : true;
}

function innermost(node) {
  let inner = node;
  while (inner.lastElementChild?.matches("blockquote, code, li, ol, p, pre, ul")) inner = inner.lastElementChild;
  return inner;
}

function addCodeHead(pre) {
  const code = pre.firstElementChild ?? pre;
  const language = code.className.replace("language-", "");
  const frame = wrap(pre, "code");
  frame.prepend(make("div", { className: "code-head" }, make("span", {}, language), copyButton(() => code.textContent, "Copy code")));
  pre.tabIndex = 0; // makes horizontal scrolling possible by keyboard
}

function wrap(element, className) {
  const frame = make("div", { className });
  element.replaceWith(frame);
  frame.append(element);
  return frame;
}
