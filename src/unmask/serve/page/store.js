// Local storage of the browser: conversations, settings, the key. One entry per conversation, so that two tabs do not
// overwrite each other's.

const PREFIX = "unmask.";
const CHAT = "chat.";

/** The stored value of a name, or `fallback` where there is none that can be read. */
export function load(name, fallback) {
  try {
    return JSON.parse(localStorage.getItem(PREFIX + name)) ?? fallback;
  } catch {
    return fallback;
  }
}

/** Store a value; false where the browser refuses (storage full or disabled). */
export function save(name, value) {
  try {
    localStorage.setItem(PREFIX + name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

export function newChat() {
  return { id: `${Date.now().toString(36)}${Math.random().toString(36).slice(2, 6)}`, changed: Date.now(), messages: [] };
}

/** All stored conversations, newest first. An answer interrupted by a reload is marked as stopped. */
export function loadChats() {
  const names = storedNames().filter((name) => name.startsWith(PREFIX + CHAT));
  const chats = names.map((name) => load(name.slice(PREFIX.length), null)).filter((chat) => Array.isArray(chat?.messages));
  for (const message of chats.flatMap((chat) => chat.messages)) {
    if (message.state === "running") message.state = "stopped";
  }
  return chats.sort((a, b) => b.changed - a.changed);
}

export function saveChat(chat) {
  return save(CHAT + chat.id, chat);
}

export function removeChat(chat) {
  try {
    localStorage.removeItem(PREFIX + CHAT + chat.id);
  } catch {
    // nothing is stored where storage is disabled
  }
}

export function chatTitle(chat) {
  const first = chat.messages.find((message) => message.role === "user")?.content ?? "New chat";
  return first.replace(/\s+/g, " ").slice(0, 60);
}

export function chatMarkdown(chat) {
  const names = { user: "You", assistant: "Answer" };
  return chat.messages.map(({ role, content }) => `### ${names[role]}\n\n${content}\n`).join("\n");
}

function storedNames() {
  try {
    return Object.keys(localStorage);
  } catch {
    return [];
  }
}
