// The API of the server: its model, and streamed chat completions. Knows nothing of the page.

/**
 * An error message for the user. `status` is the HTTP status, or 0 without a response; `refused`: the same request would be
 * refused again.
 */
export class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
    this.refused = status >= 400 && status < 500 && ![401, 408, 429].includes(status);
  }
}

/**
 * The served model: {id, max_model_len, capabilities: {diffusion, speculative, infill, editing},
 * diffusion: {block_size, threshold} | null, options: [{name, type, ...}]}.
 */
export async function fetchModel(key) {
  const response = await request("v1/models", { headers: authorization(key) });
  const { data } = await response.json();
  if (!data?.length) throw new ApiError("The server has no model.");
  return data[0];
}

/** Parsed chunks of one chat completion, up to `[DONE]`. */
export async function* streamChat(body, key, signal) {
  const headers = { "Content-Type": "application/json", ...authorization(key) };
  const response = await request("v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body), signal });
  try {
    for await (const data of serverEvents(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(`The server ended the answer with an error: ${chunk.error.message}`);
      yield chunk;
    }
  } catch (error) {
    if (error instanceof ApiError || signal.aborted) throw error;
    throw new ApiError("The connection was lost before the answer was complete.");
  }
  throw new ApiError("The connection was lost before the answer was complete.");
}

async function request(path, options) {
  let response;
  try {
    response = await fetch(path, { ...options, credentials: "omit", cache: "no-store" });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new ApiError("The server cannot be reached. Is it still running?");
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function errorOf(response) {
  const { status } = response;
  const message = await response.json().then((body) => body.error?.message, () => null);
  const wait = Number(response.headers.get("Retry-After"));
  const later = wait > 0 ? `in ${wait} ${wait === 1 ? "second" : "seconds"}` : "in a moment";
  const words = {
    401: "The server needs a valid API key.",
    429: `The server is busy. Try again ${later}.`,
    503: `The server is starting or shutting down. Try again ${later}.`,
  };
  const generic = status < 500 ? "The server refused the request" : "Server error";
  return new ApiError(words[status] ?? `${generic}: ${message ?? `status ${status}`}`, status);
}

function authorization(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

/** The data of each server-sent event. */
async function* serverEvents(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const events = (rest + value).split(/\r?\n\r?\n/);
      rest = events.pop();
      for (const event of events) {
        const lines = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // the connection may be closed already
  }
}
