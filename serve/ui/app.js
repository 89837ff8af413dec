/* The page: the conversation, the composer's buttons and the keys, put together. */

import { attachments } from "./attachments.js";
import { Capture } from "./capture.js";
import { connection } from "./connection.js";
import { byId, notify } from "./dom.js";
import { chat } from "./stream.js";
import { Turn } from "./turn.js";

const HINTS = {
  image: "Now add the image: drop it anywhere, paste it, attach it, or take a photo.",
  sound: "Now add the sound: record it, or attach a file and choose “sound”.",
  video: "Now add the video: drop it anywhere, attach it, or record it.",
  speech: "Now add the image, and record your question with “Speech”.",
};
const page = document.documentElement;
const question = byId("question");
const settings = byId("settings");
const turns = [];
let answering = null; // the AbortController of the answer that is coming

const capture = new Capture(byId("capture"), {
  done: attachments.add,
  trouble: (text) => notify(text, true),
  closed: () => question.focus(),
});

/* Conversation */

function send() {
  const text = question.value.trim();
  if (answering || !(text || attachments.count)) return;
  if (capture.isOpen) return notify("A recording is still running: stop it or cancel it first.", true);
  if (!connection.model) return notify("No model to ask yet: the server isn't connected.", true);
  const turn = new Turn(text, attachments.take(), { retry, edit });
  turns.push(turn);
  byId("conversation").append(turn.node);
  question.value = "";
  notify("");
  answer(turn);
}

async function answer(turn) {
  if (answering) return;
  const control = new AbortController();
  answering = control;
  turn.start();
  refresh();
  bringIntoView(turn);
  let messages = [];
  try {
    messages = await messagesFor(turn);
    const request = requestOf(messages);
    turn.sent();
    for await (const chunk of chat(request, connection.key, control.signal)) following(() => turn.take(chunk));
    following(() => turn.finish());
  } catch (error) {
    following(() => (control.signal.aborted ? turn.stop() : turn.fail(error, messages)));
    if (error.status === 401) connection.askForKey();
    else if (error.lost) connection.connect();
  }
  if (answering === control) answering = null;
  refresh();
}

async function messagesFor(turn) {
  const messages = [];
  for (const earlier of turns.slice(0, turns.indexOf(turn))) {
    if (earlier.counts) messages.push(await earlier.question(), earlier.reply());
  }
  return [...messages, await turn.question()];
}

function requestOf(messages) {
  return {
    model: connection.model,
    messages,
    stream: true,
    stream_options: { include_usage: true },
    expert_load: true,
    ...sampling(),
  };
}

/** The settings that are filled in. */
function sampling() {
  const fields = { temperature: "temperature", max_completion_tokens: "max-tokens", seed: "seed" };
  const values = Object.entries(fields).map(([name, id]) => [name, byId(id).valueAsNumber]);
  return Object.fromEntries(values.filter(([, value]) => Number.isFinite(value)));
}

function retry(turn) {
  question.focus(); // the button that had the focus goes away
  answer(turn);
}

/** Takes a failed or stopped question back into the composer. */
function edit(turn) {
  turns.splice(turns.indexOf(turn), 1);
  turn.node.remove();
  question.value = turn.text;
  turn.media.forEach(attachments.add);
  question.focus();
  refresh();
}

function startOver() {
  answering?.abort();
  answering = null;
  for (const turn of turns.splice(0)) turn.release();
  notify("");
  refresh();
  question.focus();
}

function refresh() {
  const hadFocus = document.activeElement;
  byId("send").hidden = Boolean(answering);
  byId("stop").hidden = !answering;
  byId("new").hidden = !turns.length;
  byId("empty").hidden = Boolean(turns.length);
  if (hadFocus === byId("send") || hadFocus === byId("stop")) question.focus();
}

function bringIntoView(turn) {
  if (turn === turns.at(-1)) page.scrollTop = page.scrollHeight;
  else turn.node.scrollIntoView({ block: "nearest" });
}

/** Changes the page and stays at its end, unless the reader has scrolled up. */
function following(change) {
  const atEnd = page.scrollHeight - page.scrollTop - page.clientHeight < 80;
  change();
  if (atEnd) page.scrollTop = page.scrollHeight;
}

/* Keys and buttons */

function onKey(event) {
  if (event.key === "Escape") {
    if (answering) answering.abort();
    else if (capture.isOpen) capture.close();
    else closeSettings();
  } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.target === question) {
    event.preventDefault();
    send();
  }
}

function closeSettings() {
  if (settings.contains(document.activeElement)) settings.firstElementChild.focus();
  settings.open = false;
}

function tryExample({ currentTarget: example }) {
  question.value = example.lastChild.textContent.trim();
  notify(HINTS[example.dataset.example]);
  question.focus();
}

function main() {
  for (const form of document.forms) form.addEventListener("submit", (event) => event.preventDefault());
  byId("composer").addEventListener("submit", send);
  byId("settings-form").addEventListener("submit", closeSettings);
  byId("stop").addEventListener("click", () => answering?.abort());
  byId("new").addEventListener("click", startOver);
  for (const tool of document.querySelectorAll("[data-capture]")) {
    tool.addEventListener("click", () => capture.open(tool.dataset.capture));
  }
  for (const example of document.querySelectorAll("[data-example]")) example.addEventListener("click", tryExample);
  document.addEventListener("keydown", onKey);
  document.addEventListener("pointerdown", ({ target }) => {
    if (!settings.contains(target)) settings.open = false;
  });
  attachments.listen();
  connection.rememberKey();
  connection.connect();
}

main();
