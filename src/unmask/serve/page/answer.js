// One streamed answer: builds the message from the stream's chunks. Knows nothing of the page.

import { ApiError, streamChat } from "./api.js";

export const newAnswer = () => ({ role: "assistant", content: "", state: "running", finish: null, error: null, stats: null });

/**
 * Stream an answer from the server into `message`.
 *
 * @param show called after each chunk with the block being denoised and the text before it, or null.
 * @param pace milliseconds to wait after each step (slow motion).
 * Ends with message.state "done", "stopped" (by `signal`) or "failed" (with message.error); throws only an ApiError of
 * status 401.
 */
export async function receive(message, { body, key, signal, pace, show }) {
  const started = performance.now();
  const seconds = () => (performance.now() - started) / 1000;
  try {
    for await (const chunk of streamChat(body, key, signal)) {
      addChunk(chunk, message, pace() ? null : seconds()); // slow motion has no meaningful speed
      const view = chunk.diffusion?.tokens ? { ...chunk.diffusion, text: message.content } : null;
      show(view);
      if (view && pace()) await pause(pace(), signal);
      if (signal.aborted) break;
    }
    message.state = signal.aborted ? "stopped" : "done";
  } catch (error) {
    message.state = signal.aborted ? "stopped" : "failed";
    if (!signal.aborted) message.error = error instanceof ApiError ? error.message : `Error on this page: ${error.message}`;
    message.refused = error instanceof ApiError && error.refused;
    if (message.refused) message.error += ". Your message is left out of the conversation: edit it, or try again.";
    if (error.status === 401) throw error;
  }
}

function addChunk({ choices: [choice] = [], diffusion, usage }, message, seconds) {
  message.content += choice?.delta?.content ?? "";
  message.finish = choice?.finish_reason ?? message.finish;
  if (diffusion?.tokens) {
    message.stats = { ...message.stats, tokens: diffusion.committed, forwards: diffusion.forwards, seconds };
  } else if (diffusion) {
    const { forwards, tokens_per_forward: perForward, tokens_per_second: perSecond, edits } = diffusion;
    message.stats = { ...message.stats, forwards, perForward, perSecond, edits, seconds: diffusion.seconds };
  }
  if (usage) message.stats = { seconds, ...message.stats, tokens: usage.completion_tokens };
}

function pause(milliseconds, signal) {
  return new Promise((resolve) => {
    setTimeout(resolve, milliseconds);
    signal.addEventListener("abort", resolve, { once: true });
  });
}

/** The messages to send to the server: without those that it refused; user messages around a missing answer are joined. */
export function history(messages) {
  const turns = [];
  for (const [index, { role, content }] of messages.entries()) {
    if (!content || messages[index + 1]?.refused) continue;
    if (turns.at(-1)?.role === role) turns.at(-1).content += `\n\n${content}`;
    else turns.push({ role, content });
  }
  return turns;
}
