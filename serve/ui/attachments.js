/* The files of the message being written, and the ways they come in: dropped, pasted, picked. */

import { byId, notify } from "./dom.js";
import { Medium, mediaCard } from "./media.js";

const list = byId("attachments");
let pending = [];

export const attachments = {
  get count() {
    return pending.length;
  },

  add(medium) {
    pending.push(medium);
    list.append(mediaCard(medium, { editable: true, onremove: (card) => remove(medium, card) }));
    list.hidden = false;
    list.scrollTop = list.scrollHeight;
    notify("");
  },

  /** Everything attached; the list is empty afterwards. */
  take() {
    const media = pending;
    pending = [];
    list.replaceChildren();
    list.hidden = true;
    return media;
  },

  listen() {
    acceptDrops();
    acceptPastes();
    offerFiles();
  },
};

function addFiles(files) {
  const unknown = [];
  for (const file of files) {
    const medium = Medium.of(file);
    if (medium) attachments.add(medium);
    else unknown.push(file.name);
  }
  if (unknown.length) notify(`Not an image, sound or video: ${unknown.join(", ")}`, true);
  byId("question").focus();
}

function remove(medium, card) {
  pending = pending.filter((other) => other !== medium);
  medium.release();
  card.remove();
  list.hidden = !pending.length;
  byId("question").focus();
}

function acceptDrops() {
  const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
  const hovering = (on) => document.body.classList.toggle("dropping", on);
  document.addEventListener("dragover", (event) => {
    if (!carriesFiles(event)) return;
    event.preventDefault();
    hovering(true);
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) hovering(false); // out of the window
  });
  document.addEventListener("drop", (event) => {
    hovering(false);
    if (!carriesFiles(event)) return;
    event.preventDefault();
    addFiles(event.dataTransfer.files);
  });
}

function acceptPastes() {
  document.addEventListener("paste", (event) => {
    const { files } = event.clipboardData;
    if (!files.length) return;
    event.preventDefault();
    addFiles(files);
  });
}

function offerFiles() {
  byId("attach").addEventListener("click", () => byId("files").click());
  byId("files").addEventListener("change", ({ target }) => {
    addFiles(target.files);
    target.value = ""; // so that the same file can be picked again
  });
}
