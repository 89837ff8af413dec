/* The OpenAI-compatible endpoint: models, and chat completions as a stream of server-sent events. */

const LARGE = 20e6; // characters of a request

/** What went wrong, in words for the reader. */
export class ApiError extends Error {
  /** `retryAfter` in seconds; `lost`: the connection is gone, the server itself said nothing. */
  constructor(message, { status = null, retryAfter = null, lost = false } = {}) {
    super(message);
    Object.assign(this, { status, retryAfter, lost });
  }
}

/** The id of the first model. */
export async function firstModel(key) {
  const response = await call("v1/models", { headers: headers(key) });
  const { data } = await response.json();
  if (!data?.length) throw new ApiError("The server has no model.");
  return data[0].id;
}

/** The chunks of one streamed answer. Throws ApiError, or AbortError when `signal` fires. */
export async function* chat(request, key, signal) {
  const response = await call("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers(key) },
    body: JSON.stringify(request),
    signal,
  });
  for await (const data of serverEvents(response.body)) {
    if (data === "[DONE]") return;
    const chunk = parsed(data);
    if (chunk.error) throw new ApiError(sentence(chunk.error.message));
    yield chunk;
  }
  throw brokenOff();
}

/** The data of each complete event; chunks may end anywhere, inside a character too. */
export async function* serverEvents(body) {
  let data = [];
  for await (const line of lines(body)) {
    if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
    else if (line === "" && data.length) {
      yield data.join("\n");
      data = [];
    }
  }
}

async function* lines(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read().catch(orThrow(brokenOff));
    rest += decoder.decode(value, { stream: !done });
    // A carriage return at the very end may be the first half of a line end.
    const pieces = rest.split(/\r\n|\n|\r(?!$)/);
    rest = pieces.pop();
    yield* pieces;
    if (done) return;
  }
}

function parsed(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new ApiError("The server sent something that is no answer.");
  }
}

async function call(path, options) {
  // A server may hang up on a body that is too large, so that its answer is never seen.
  const lost = options.body?.length > LARGE ? hungUp : unreachable;
  const response = await fetch(path, options).catch(orThrow(lost));
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const { status } = response;
  const body = await response.json().catch(() => null);
  const said = body?.error?.message ?? `The server answered with status ${status} ${response.statusText}`;
  return new ApiError(sentence(said), { status, retryAfter: seconds(response.headers.get("Retry-After")) });
}

function seconds(retryAfter) {
  const value = Number.parseFloat(retryAfter);
  return Number.isFinite(value) ? Math.ceil(value) : null;
}

function sentence(text) {
  const trimmed = String(text ?? "").trim() || "The server gave no reason";
  // A word is capitalised, the name of a field is not.
  const start = /^[a-z]+[\s,]/.test(trimmed) ? trimmed[0].toUpperCase() : trimmed[0];
  return start + trimmed.slice(1) + (/[.!?]$/.test(trimmed) ? "" : ".");
}

/** A handler that lets an abort through and puts any other failure of the network into words. */
function orThrow(words) {
  return (error) => {
    throw error.name === "AbortError" ? error : words();
  };
}

const unreachable = () => new ApiError("The server can't be reached. Is it still running?", { lost: true });
const hungUp = () =>
  new ApiError("The server hung up. The conversation with its files may be too large for it.", { lost: true });
const brokenOff = () => new ApiError("The answer broke off: the connection closed before its end.", { lost: true });
const headers = (key) => (key ? { Authorization: `Bearer ${key}` } : {});
