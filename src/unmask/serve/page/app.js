// The page: the open conversation, at most one running answer, and all user actions. Connects the other modules.

import { fetchModel } from "./api.js";
import { history, newAnswer, receive } from "./answer.js";
import { button, make } from "./dom.js";
import { Settings } from "./settings.js";
import { chatMarkdown, chatTitle, load, loadChats, newChat, removeChat, save, saveChat } from "./store.js";
import { AnswerTurn, userTurn } from "./turn.js";

const EXAMPLES = ["What is the capital of France?", "List three primary colours.", "Write one sentence about the sea.", "What is 7 + 5?"];
const THEMES = ["auto", "light", "dark"];
const THEME_ICONS = {
  auto: "M10 3a7 7 0 1 0 0 14zM10 3a7 7 0 0 1 0 14",
  light: "M10 6.5a3.5 3.5 0 1 0 0 7 3.5 3.5 0 0 0 0-7zM10 1.5v2M10 16.5v2M1.5 10h2M16.5 10h2M4 4l1.4 1.4M14.6 14.6L16 16M4 16l1.4-1.4M14.6 5.4L16 4",
  dark: "M16.5 12.2A7 7 0 0 1 7.8 3.5a7 7 0 1 0 8.7 8.7z",
};
const SAVE_EVERY = 500; // milliseconds while an answer runs
const MODEL_RETRY = 3000;
const CAPABILITIES = {
  diffusion: "denoises blocks",
  speculative: "verifies its drafts",
  infill: "fills holes (/v1/infill)",
  editing: "replaces decided tokens",
};

const $ = (id) => document.getElementById(id);
const input = $("input");
const scroller = $("scroller");
const settings = new Settings($("settings-form"));

let chats = loadChats();
let chat = chats.find(({ id }) => id === load("current", null)) ?? chats[0] ?? newChat();
let model = null;
let running = null; // {controller, chat, turn} of the running answer
let editing = null; // index of the message that the next one replaces
let following = true; // whether the view is at the end of the conversation

// ---- the model

async function loadModel() {
  try {
    model = await fetchModel(load("key", ""));
    settings.setModel(model);
    $("model").textContent = model.id;
    const able = Object.keys(CAPABILITIES).filter((name) => model.capabilities[name]);
    $("capabilities").textContent = `${model.id} ${able.map((name) => CAPABILITIES[name]).join(", ") || "decodes token by token"}.`;
    for (const element of document.querySelectorAll(".editing-only")) element.hidden = !model.capabilities.editing;
    for (const element of document.querySelectorAll(".diffusion-only")) element.hidden = !model.diffusion;
    for (const element of document.querySelectorAll(".autoregressive-only")) element.hidden = Boolean(model.diffusion);
  } catch (error) {
    if (error.status === 401) askForKey();
    $("model").textContent = error.status === 401 ? "needs a key" : "not connected";
    throw error;
  }
}

async function connect() {
  while (!model) {
    const error = await loadModel().catch((failure) => failure);
    if (error?.status === 401) return; // continued by the key form
    if (error) await new Promise((resolve) => setTimeout(resolve, MODEL_RETRY));
  }
}

function askForKey() {
  $("key-form").hidden = false;
  $("key-problem").hidden = true;
  $("key").value = load("key", "");
  $("key").focus();
}

$("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  save("key", $("key").value.trim());
  $("key-form").hidden = true;
  $("change-key").hidden = false;
  input.focus();
  model = null;
  await connect();
  $("key-problem").hidden = Boolean(model);
  if (model && chat.messages.at(-1)?.state === "failed") answerAgain();
});

// ---- messages and answers

async function send() {
  const text = input.value.trim();
  if (!text || running) return;
  if (editing !== null) chat.messages.length = editing;
  setDraft("");
  setEditing(null);
  await ask(text);
}

async function ask(text) {
  if (running) return;
  chat.messages.push({ role: "user", content: text });
  showChat();
  await answer();
}

async function answer() {
  const message = newAnswer();
  const run = { controller: new AbortController(), chat, turn: addAnswer(message) };
  chat.messages.push(message);
  setRunning(run);
  store(chat);
  showChats();
  toEnd();
  let saved = performance.now();
  const draw = everyFrame(() => {
    if (message.state !== "running") return;
    atEnd(() => run.turn.draw());
    if (performance.now() - saved > SAVE_EVERY) {
      saved = performance.now();
      store(run.chat);
    }
  });
  try {
    if (!model) await loadModel();
    await receive(message, {
      body: settings.request(history(run.chat.messages)),
      key: load("key", ""),
      signal: run.controller.signal,
      pace: () => settings.values.pace,
      show: (view) => {
        if (view) run.turn.update(view);
        draw();
      },
    });
  } catch (error) {
    Object.assign(message, { state: "failed", error: error.message });
    if (error.status === 401) askForKey();
  }
  atEnd(() => run.turn.draw());
  store(run.chat);
  setRunning(null);
  announce(message);
}

function answerAgain() {
  if (running) return;
  if (chat.messages.at(-1)?.role === "assistant") chat.messages.pop();
  showChat();
  focusInput();
  answer();
}

function stop() {
  running?.controller.abort();
}

function setRunning(run) {
  const hadFocus = document.activeElement?.closest("#composer"); // the button with the focus may be hidden below
  running = run;
  $("send").hidden = Boolean(run);
  $("stop").hidden = !run;
  if (hadFocus) focusInput();
}

/** Focus the input, except on touch screens, where the keyboard would cover the answer. */
function focusInput() {
  if (matchMedia("(hover: hover)").matches) input.focus();
}

function announce({ state, content, error }) {
  const words = { done: "Answer complete.", stopped: "Stopped.", failed: error };
  $("announce").textContent = `${words[state]} ${content.slice(0, 500)}`;
}

function everyFrame(draw) {
  let waiting = false;
  return () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; draw(); });
  };
}

// ---- the open conversation

function showChat() {
  $("messages").replaceChildren();
  chat.messages.forEach((message, index) => {
    if (message.role === "user") $("messages").append(userTurn(message, { edit: () => setEditing(index) }));
    else addAnswer(message);
  });
  $("empty").hidden = chat.messages.length > 0;
  toEnd();
}

function addAnswer(message) {
  const turn = new AnswerTurn(message, { retry: answerAgain });
  $("messages").append(turn.element);
  return turn;
}

function openChat(next) {
  stop();
  chat = next;
  save("current", chat.id);
  setEditing(null);
  showChat();
  showChats();
  if ($("chats").matches(":popover-open")) $("chats").hidePopover();
  focusInput();
}

function showChats() {
  chats.sort((a, b) => b.changed - a.changed);
  $("chat-list").replaceChildren(...chats.map((one) => {
    const open = button(chatTitle(one), () => openChat(one), { className: "open" });
    if (one === chat) open.ariaCurrent = "true";
    return make("li", {}, open, deleteButton(one));
  }));
}

/** Deletes at the second press, because a deletion cannot be undone. */
function deleteButton(one) {
  const remove = button("Delete", () => {
    if (remove.textContent === "Delete") {
      remove.textContent = "Really?";
      return;
    }
    if (one === running?.chat) stop();
    chats = chats.filter((other) => other !== one);
    removeChat(one);
    one.deleted = true; // so that a running answer does not store it again
    openChat(one === chat ? chats[0] ?? newChat() : chat);
  }, { className: "delete", onblur: () => { remove.textContent = "Delete"; } });
  return remove;
}

function store(one) {
  if (one.deleted) return;
  one.changed = Date.now();
  if (!chats.includes(one)) chats.push(one);
  const isStored = saveChat(one) && save("current", chat.id);
  $("chats").classList.toggle("full", !isStored);
}

function setEditing(index) {
  editing = index;
  $("editing").hidden = index === null;
  if (index === null) return;
  const unsent = input.value.trim();
  setDraft(chat.messages[index].content + (unsent ? `\n\n${unsent}` : ""));
  input.focus();
}

function setDraft(text) {
  input.value = text;
  save("draft", text);
}

// ---- scrolling: follow the answer only while the view is at its end

function atEnd(change) {
  const follow = following;
  change();
  if (follow) toEnd();
}

function toEnd() {
  scroller.scrollTop = scroller.scrollHeight;
  following = true;
  $("to-end").hidden = true;
}

scroller.addEventListener("scroll", () => {
  following = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 48;
  $("to-end").hidden = following;
}, { passive: true });

// ---- the theme

function showTheme() {
  const theme = document.documentElement.dataset.theme;
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", THEME_ICONS[theme]);
  const icon = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  icon.setAttribute("viewBox", "0 0 20 20");
  icon.append(path);
  $("theme").replaceChildren(icon);
  $("theme").ariaLabel = $("theme").title = `Theme: ${theme}`;
}

$("theme").addEventListener("click", () => {
  const { dataset } = document.documentElement;
  dataset.theme = THEMES[(THEMES.indexOf(dataset.theme) + 1) % THEMES.length];
  save("theme", dataset.theme);
  showTheme();
});

// ---- user actions

$("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
$("stop").addEventListener("click", stop);
$("to-end").addEventListener("click", () => { toEnd(); input.focus(); });
$("new-chat").addEventListener("click", () => openChat(newChat()));
$("cancel-edit").addEventListener("click", () => { setDraft(""); setEditing(null); input.focus(); });
$("reset").addEventListener("click", () => settings.reset());
$("change-key").addEventListener("click", () => { $("settings").hidePopover(); askForKey(); });
$("export").addEventListener("click", () => {
  const url = URL.createObjectURL(new Blob([chatMarkdown(chat)], { type: "text/markdown" }));
  make("a", { href: url, download: `${chatTitle(chat).replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40)}.md` }).click();
  URL.revokeObjectURL(url);
});

input.addEventListener("input", () => save("draft", input.value));
input.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector(":popover-open")) return;
  if (running) stop();
  else if (editing !== null) $("cancel-edit").click();
});
addEventListener("pagehide", () => { // otherwise the aborted request would count as failed
  if (!running) return;
  store(running.chat);
  stop();
});

$("examples").append(...EXAMPLES.map((text) => make("li", {}, button(text, () => { ask(text); focusInput(); }))));
$("change-key").hidden = !load("key", "");
input.value = load("draft", "");
showTheme();
showChat();
showChats();
connect();
input.focus();
